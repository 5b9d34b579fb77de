"""Two tasks, and four that give trouble."""

import re

import numpy as np

from rlbench.backend.scene import START


class Task:
    variations = 12
    plannable = True

    def get_name(self):
        return re.sub("(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    def variation_count(self):
        return self.variations

    def init_episode(self, index):
        colour = ("red", "blue", "green")[index % 3]
        return [f"reach the {colour} target", f"touch the {colour} ball"]

    def place(self):
        """Where the task is in the workspace. Raises BoundaryError if there is no room."""
        self.goal = START + np.random.uniform(-0.4, 0.4, 7)

    def validate(self):
        """Raises WaypointError if the task is out of reach there."""

    def step(self):
        """Called after each step of the simulation."""
