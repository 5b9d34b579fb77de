"""The simulators, behind one Gymnasium interface (ArmEnv in mujoco_panda.py).

mujoco_panda.py      the embedded simulator, and its tasks in mujoco_tasks.py
perturbed_panda.py   the same, looking different
rlbench_panda.py     RLBench in CoppeliaSim
rlbench_protocol.py  how RLBench runs: its way, the paper's
rendering.py         how MuJoCo draws
"""

from sims import rendering  # first of all: it imports MuJoCo without choosing how to draw
from sims.rlbench_protocol import RLBENCH_PROTOCOL

__all__ = ["Simulators", "make_env", "rendering"]


def make_env(
    task: str,
    image_size,
    cameras,
    sim: str = "mujoco",
    images: bool = False,
    protocol=RLBENCH_PROTOCOL,
):
    """A new environment.

    image_size: height and width in pixels, or one number for both. cameras: names. sim: "mujoco",
    "rlbench", or a perturbation's name. images: whether observations have images; without, an
    image is drawn when it is asked for. protocol: how RLBench runs (sims/rlbench_protocol.py).
    Raises UserError for an unknown task.
    """
    if sim == "rlbench":
        from sims.rlbench_panda import RLBenchEnv

        return RLBenchEnv(task, image_size, cameras, images, protocol)
    from sims.mujoco_panda import PandaEnv
    from sims.perturbed_panda import PERTURBATIONS, PerturbedEnv

    if sim in PERTURBATIONS:
        return PerturbedEnv(sim, task, image_size, cameras, images)
    return PandaEnv(task, image_size, cameras, images)


class Simulators:
    """The environments of one process: each is made when it is first asked for, and kept."""

    def __init__(self):
        self.environments = {}

    def get(
        self,
        task: str,
        image_size,
        cameras,
        sim: str = "mujoco",
        images: bool = False,
        protocol=RLBENCH_PROTOCOL,
    ):
        """The environment for these arguments of make_env."""
        key = (task, image_size, tuple(cameras), sim, images, protocol)
        if key not in self.environments:
            self.environments[key] = make_env(*key)
        return self.environments[key]
