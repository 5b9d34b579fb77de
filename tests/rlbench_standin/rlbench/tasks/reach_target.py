from rlbench.tasks import Task


class ReachTarget(Task):
    pass
