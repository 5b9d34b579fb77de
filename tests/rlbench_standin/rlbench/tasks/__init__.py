"""Two tasks, and three that give trouble."""

import re

import numpy as np

from rlbench.backend.scene import START


class Task:
    variations, plannable = 12, True

    def get_name(self):
        return re.sub("(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    def variation_count(self):
        return self.variations

    def init_episode(self, index):
        self.goal = START + np.random.uniform(-0.4, 0.4, 7)
        colour = ("red", "blue", "green")[index % 3]
        return [f"reach the {colour} target", f"touch the {colour} ball"]
