import numpy as np

from rlbench.backend.exceptions import BoundaryError
from rlbench.tasks import Task


class CrowdedTable(Task):
    """Finds a place in one scene of three or so, after 40 attempts."""

    def place(self):
        super().place()
        if np.random.uniform() < 0.987:
            raise BoundaryError("Could not place within boundary.")
