import numpy as np

from rlbench.backend.exceptions import InvalidActionError


class Discrete:
    def __init__(self, attach_grasped_objects=True, detach_before_open=True):
        pass

    def action(self, scene, action):
        if np.shape(action) != (1,):
            raise InvalidActionError(
                f"Expected the action shape to be: (1,), but was shape: {np.shape(action)}"
            )
        scene.gripper_open = float(action[0] > 0.5)
