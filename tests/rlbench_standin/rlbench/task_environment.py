import numpy as np

from rlbench.backend.exceptions import TaskEnvironmentError
from rlbench.backend.scene import START
from rlbench.demo import Demo


class TaskEnvironment:
    def __init__(self, scene, task, action_mode):
        self._scene, self._task, self._action_mode = scene, task, action_mode
        self._variation_number, self._reset_called = 0, False

    def get_name(self):
        return self._task.get_name()

    def sample_variation(self):
        self._variation_number = np.random.randint(0, self._task.variation_count())
        return self._variation_number

    def set_variation(self, v):
        if v >= self.variation_count():
            raise TaskEnvironmentError(
                f"Requested variation {v}, but there are only {self.variation_count()} variations."
            )
        self._variation_number = v

    def variation_count(self):
        return self._task.variation_count()

    def reset(self, demo=None):
        assert demo is None or isinstance(demo, Demo)
        self._scene.put(START)
        self._scene.action = None
        descriptions = self._task.init_episode(self._variation_number)
        self._reset_called = True
        return descriptions, self._scene.get_observation(self._variation_number)

    def reset_to_demo(self, demo):
        demo.restore_state()
        self.set_variation(demo._observations[0].misc["variation_index"])
        return self.reset(demo)

    def step(self, action):
        if not self._reset_called:
            raise RuntimeError("Call 'reset' before calling 'step' on a task.")
        assert isinstance(action, np.ndarray) and action.shape == (8,), action
        self._action_mode.action(self._scene, action)
        success = bool(np.abs(self._scene.q - self._task.goal).max() < 0.02)
        return self._scene.get_observation(self._variation_number), float(success), success

    def get_demos(self, amount, live_demos=False, image_paths=False, callable_each_step=None, max_attempts=10, random_selection=True,
                  from_episode_number=0):  # fmt: skip
        assert live_demos and amount > 0
        demos = []
        for _ in range(amount):
            state = np.random.get_state()
            self.reset()
            if not self._task.plannable:
                raise RuntimeError("Could not collect demos. Maybe a problem with the task?")
            scene, steps = self._scene, 12
            observations = [scene.get_observation(self._variation_number)]
            for i in range(1, steps + 1):
                scene.move(START + (self._task.goal - START) * i / steps)
                scene.gripper_open = float(i < 9)
                # as in RLBench: the planner cannot say what it sent in the last step of a path
                scene.action = np.append(
                    None if i == steps else scene.q + 0.001, scene.gripper_open
                )
                observations.append(scene.get_observation(self._variation_number))
            demos.append(Demo(observations, random_seed=state, num_reset_attempts=1))
        return demos
