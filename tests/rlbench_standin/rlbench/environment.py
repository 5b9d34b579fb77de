import inspect

from rlbench.action_modes.action_mode import MoveArmThenGripper
from rlbench.backend.scene import Scene
from rlbench.observation_config import ObservationConfig
from rlbench.task_environment import TaskEnvironment


class Environment:
    launched = None  # a process has one CoppeliaSim

    def __init__(
        self,
        action_mode,
        dataset_root="",
        obs_config=None,
        headless=False,
        static_positions=False,
        robot_setup="panda",
        arm_max_velocity=1.0,
        arm_max_acceleration=4.0,
    ):
        assert isinstance(action_mode, MoveArmThenGripper)
        assert isinstance(obs_config, ObservationConfig) and headless
        self._action_mode = action_mode
        self._config = obs_config
        self._arm_max_velocity = arm_max_velocity
        self._arm_max_acceleration = arm_max_acceleration
        self._scene = None

    def launch(self):
        if Environment.launched:
            raise RuntimeError("Already called launch!")
        Environment.launched = self
        self._scene = Scene(self._config)

    def shutdown(self):
        Environment.launched = None
        self._scene = None

    def get_task(self, task_class):
        assert inspect.isclass(task_class) and self._scene is not None
        self._scene.check()
        return TaskEnvironment(self._scene, task_class(), self._action_mode)
