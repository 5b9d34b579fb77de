"""The simulators, behind one Gymnasium interface (ArmEnv in mujoco_panda.py).

mujoco_panda.py      the embedded simulator, its arms in arms.py, its tasks in mujoco_tasks.py
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
    robot: str = "fr3",
):
    """A new environment.

    image_size: height and width in pixels, or one number for both. cameras: names. sim: "mujoco",
    "rlbench", or a perturbation's name. images: whether observations have images; without, an
    image is drawn when it is asked for. protocol: how RLBench runs (sims/rlbench_protocol.py).
    robot: whose arm is simulated (sims/arms.py); RLBench has its own. Raises UserError for an
    unknown task or robot.
    """
    if sim == "rlbench":
        from sims.rlbench_panda import RLBenchEnv

        return RLBenchEnv(task, image_size, cameras, images, protocol)
    from sims.mujoco_panda import PandaEnv
    from sims.perturbed_panda import PERTURBATIONS, PerturbedEnv

    if sim in PERTURBATIONS:
        return PerturbedEnv(sim, task, image_size, cameras, images, robot)
    return PandaEnv(task, image_size, cameras, images, robot)


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
        robot: str = "fr3",
    ):
        """The environment for these arguments of make_env."""
        key = (task, image_size, tuple(cameras), sim, images, protocol, robot)
        if key not in self.environments:
            self.environments[key] = make_env(*key)
        return self.environments[key]

    def of_policy(self, policy, task: str, sim: str = "mujoco", protocol=RLBENCH_PROTOCOL):
        """The environment that a policy was trained for: its cameras, image size and robot."""
        size = tuple(policy.image_size)
        robot = getattr(policy, "robot", "fr3")
        return self.get(task, size, policy.cameras, sim, False, protocol, robot)
