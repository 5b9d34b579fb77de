"""The simulators. Import this before MuJoCo: it decides how MuJoCo draws."""

import os
import subprocess
import sys

# EGL where it works, else OSMesa. MuJoCo reads this variable when it is imported, and cannot change its mind in one process: another
# one tries.
if "MUJOCO_GL" not in os.environ and sys.platform == "linux":
    attempt = [sys.executable, "-c", "import mujoco; mujoco.GLContext(8, 8)"]
    works = subprocess.run(attempt, env=os.environ | {"MUJOCO_GL": "egl"}, capture_output=True).returncode == 0
    os.environ["MUJOCO_GL"] = "egl" if works else "osmesa"
