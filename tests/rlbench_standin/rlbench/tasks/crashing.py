import os
from pathlib import Path

from rlbench.tasks import Task


class Crashing(Task):
    """Ends its process, as CoppeliaSim can.

    Only the first time if $STANDIN_CRASHED names a file to remember it by.
    """

    def init_episode(self, index):
        once = os.environ.get("STANDIN_CRASHED")
        if not once or not Path(once).exists():
            if once:
                Path(once).touch()
            os._exit(139)
        return super().init_episode(index)
