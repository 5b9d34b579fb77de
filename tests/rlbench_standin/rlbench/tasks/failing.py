from rlbench.tasks import Task


class Failing(Task):
    """The simulator fails at the third step of every second scene, and for ever after."""

    def step(self):
        self.steps += 1
        if self.steps == 3 and int(self.goal[0] * 1e6) % 2:
            self.scene.broken = True
            raise RuntimeError("The call failed on the V-REP side. Return value: -1")

    def init_episode(self, index):
        self.steps = 0
        return super().init_episode(index)
