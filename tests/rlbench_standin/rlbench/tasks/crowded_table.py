import numpy as np

from rlbench.backend.exceptions import TaskEnvironmentError
from rlbench.tasks import Task


class CrowdedTable(Task):
    """Finds a place in one scene of three or so."""

    def init_episode(self, index):
        if np.random.uniform() < 0.6:
            raise TaskEnvironmentError("Could not place the task crowded_table in the scene.")
        return super().init_episode(index)
