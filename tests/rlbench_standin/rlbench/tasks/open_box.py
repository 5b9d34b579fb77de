from rlbench.tasks import Task


class OpenBox(Task):
    pass
