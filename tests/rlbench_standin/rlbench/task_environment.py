import numpy as np

from rlbench.backend.exceptions import BoundaryError, TaskEnvironmentError, WaypointError
from rlbench.backend.scene import START
from rlbench.demo import Demo

MAX_RESET_ATTEMPTS = 40


class TaskEnvironment:
    def __init__(self, scene, task, action_mode):
        self._scene = scene
        self._task = task
        self._task.scene = scene
        self._action_mode = action_mode
        self._variation_number = 0
        self._reset_called = False
        self._attempts = 0

    def get_name(self):
        return self._task.get_name()

    def sample_variation(self):
        self._variation_number = np.random.randint(0, self._task.variation_count())
        return self._variation_number

    def set_variation(self, v):
        """As RLBench's, which lets negative numbers through."""
        count = self.variation_count()
        if v >= count:
            raise TaskEnvironmentError(
                f"Requested variation {v}, but there are only {count} variations."
            )
        self._variation_number = v

    def variation_count(self):
        return self._task.variation_count()

    def reset(self, demo=None):
        assert demo is None or isinstance(demo, Demo)
        self._scene.put(START)
        self._scene.action = None
        place_demo = demo is not None and demo.num_reset_attempts is not None
        most = demo.num_reset_attempts if place_demo else MAX_RESET_ATTEMPTS
        try:
            descriptions = self._init_episode(most, place_demo)
        except (BoundaryError, WaypointError) as error:
            raise TaskEnvironmentError(
                f"Could not place the task {self.get_name()} in the scene. This should not "
                "happen, please raise an issues on this task."
            ) from error
        self._reset_called = True
        return descriptions, self._scene.get_observation(self._variation_number)

    def _init_episode(self, most, place_demo):
        """Place the task until it fits; for a demo as often as it took when that was recorded."""
        self._attempts = 0
        while self._attempts < most:
            descriptions = self._task.init_episode(self._variation_number)
            try:
                self._task.place()
                if not place_demo:
                    self._task.validate()
                    break
                self._attempts += 1
            except (BoundaryError, WaypointError):
                self._attempts += 1
                if self._attempts >= most:
                    raise
        return descriptions

    def reset_to_demo(self, demo):
        demo.restore_state()
        self.set_variation(demo._observations[0].misc["variation_index"])
        return self.reset(demo)

    def step(self, action):
        if not self._reset_called:
            raise RuntimeError("Call 'reset' before calling 'step' on a task.")
        assert isinstance(action, np.ndarray) and action.shape == (8,), action
        self._scene.check()
        self._action_mode.action(self._scene, action)
        self._task.step()
        success = bool(np.abs(self._scene.q - self._task.goal).max() < 0.02)
        return self._scene.get_observation(self._variation_number), float(success), success

    def get_demos(
        self,
        amount,
        live_demos=False,
        image_paths=False,
        callable_each_step=None,
        max_attempts=10,
        random_selection=True,
        from_episode_number=0,
    ):
        assert live_demos and amount > 0
        return [self._get_live_demo(max_attempts) for _ in range(amount)]

    def _get_live_demo(self, attempts):
        for _ in range(attempts):
            state = np.random.get_state()
            self.reset()
            if self._task.plannable:
                demo = Demo(self._move_to_goal(), random_seed=state)
                demo.num_reset_attempts = self._attempts + 1
                return demo
        raise RuntimeError("Could not collect demos. Maybe a problem with the task?")

    def _move_to_goal(self):
        scene = self._scene
        steps = 12
        observations = [scene.get_observation(self._variation_number)]
        for i in range(1, steps + 1):
            scene.move(START + (self._task.goal - START) * i / steps)
            scene.gripper_open = float(i < 9)
            # as in RLBench: the planner cannot say what it sent in the last step of a path
            sent = None if i == steps else scene.q + 0.001
            scene.action = np.append(sent, scene.gripper_open)
            observations.append(scene.get_observation(self._variation_number))
        return observations
