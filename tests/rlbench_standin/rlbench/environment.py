import inspect

from rlbench.action_modes.action_mode import MoveArmThenGripper
from rlbench.backend.scene import Scene
from rlbench.observation_config import ObservationConfig
from rlbench.task_environment import TaskEnvironment


class Environment:
    def __init__(
        self,
        action_mode,
        dataset_root="",
        obs_config=None,
        headless=False,
        static_positions=False,
        robot_setup="panda",
    ):
        assert (
            isinstance(action_mode, MoveArmThenGripper)
            and isinstance(obs_config, ObservationConfig)
            and headless
        )
        self._action_mode, self._config, self._scene = action_mode, obs_config, None

    def launch(self):
        if self._scene is not None:
            raise RuntimeError("Already called launch!")
        self._scene = Scene(self._config)

    def shutdown(self):
        self._scene = None

    def get_task(self, task_class):
        assert inspect.isclass(task_class) and self._scene is not None
        return TaskEnvironment(self._scene, task_class(), self._action_mode)
