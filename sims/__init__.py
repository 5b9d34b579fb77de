"""The simulators. Import this before MuJoCo: it decides how MuJoCo draws."""

import os
import subprocess
import sys

# EGL where it works, else OSMesa. MuJoCo reads this variable when it is imported, and cannot change its mind in one process: another
# one tries.
if "MUJOCO_GL" not in os.environ and sys.platform == "linux":
    attempt = [sys.executable, "-c", "import mujoco; mujoco.GLContext(8, 8)"]
    works = (
        subprocess.run(
            attempt, env=os.environ | {"MUJOCO_GL": "egl"}, capture_output=True
        ).returncode
        == 0
    )
    os.environ["MUJOCO_GL"] = "egl" if works else "osmesa"


from functools import cache


@cache
def make_env(task, image_size, cameras, sim=None, images=False):
    """One environment per task and process; sim: mujoco, rlbench, or a perturbation. Without images, pictures are taken when looked at."""
    from sims.mujoco_panda import PandaEnv
    from sims.perturbed_panda import PERTURBATIONS, PerturbedEnv
    from sims.rlbench_panda import RLBenchEnv

    if sim in PERTURBATIONS:
        return PerturbedEnv(sim, task, image_size, cameras, images)
    return (RLBenchEnv if sim == "rlbench" else PandaEnv)(task, image_size, cameras, images)
