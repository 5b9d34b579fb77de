import numpy as np

from rlbench.backend.exceptions import InvalidActionError


class JointPosition:
    def __init__(self, absolute_mode=True):
        assert absolute_mode

    def action(self, scene, action):
        if np.shape(action) != (7,):
            raise InvalidActionError(
                f"Expected the action shape to be: (7,), but was shape: {np.shape(action)}"
            )
        scene.move(action)
