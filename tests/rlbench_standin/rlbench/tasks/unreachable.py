from rlbench.tasks import Task


class Unreachable(Task):
    """There is never a path."""

    plannable = False
