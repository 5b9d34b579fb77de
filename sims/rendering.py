"""How MuJoCo draws: chosen when the first image is drawn, not when something is imported.

MuJoCo reads the environment variable MUJOCO_GL when it is imported. If it is not set, MuJoCo takes
a library that needs a screen and starts a process to look at it; if it is wrong, not even `--help`
would work. So this module imports MuJoCo without anything to draw with, and choose_renderer()
decides later:

    MUJOCO_GL=egl, osmesa or glfw     that one
    MUJOCO_GL not set, or empty       on Linux EGL where it works, else OSMesa

EGL uses the graphics card or its driver in software, OSMesa is software alone, both without a
screen. Whether one works is tried in a process of its own, because a library that failed to draw
cannot be exchanged for another in one process.
"""

import importlib
import os
import subprocess
import sys

from genima.files import UserError

TRIED = {"linux": ("egl", "osmesa"), "darwin": ("cgl", "glfw"), "win32": ("glfw",)}  # in this order
TITLES = {"egl": "EGL", "osmesa": "OSMesa", "cgl": "CGL", "glfw": "GLFW"}
ATTEMPT = """
import importlib, sys
library, *sys.path = sys.argv[1:]
importlib.import_module(f"mujoco.{library}").GLContext(8, 8).make_current()
"""


def import_mujoco():
    """The module mujoco, which has nothing to draw with yet. The environment is as before."""
    before = os.environ.get("MUJOCO_GL")
    os.environ["MUJOCO_GL"] = "disabled"
    try:
        return importlib.import_module("mujoco")
    finally:
        del os.environ["MUJOCO_GL"]
        if before is not None:
            os.environ["MUJOCO_GL"] = before


mujoco = import_mujoco()


def choose_renderer() -> str:
    """Decide with which library MuJoCo draws in this process, and return its name.

    The choice is written to MUJOCO_GL, so that processes started from here need not try again.
    Raises UserError if MUJOCO_GL names no library for this system, or no library can draw.
    """
    tried = TRIED.get(sys.platform, ("glfw",))
    library = os.environ.get("MUJOCO_GL", "").strip().lower()
    if not library:
        library = first_that_draws(tried)
        os.environ["MUJOCO_GL"] = library
    known = (*tried, "glfw")
    if library not in known:
        raise UserError(
            f"The environment variable MUJOCO_GL is '{library}', with which MuJoCo cannot draw "
            f"here: unset it, or set it to {' or '.join(dict.fromkeys(known))}."
        )
    return library


def first_that_draws(libraries: tuple[str, ...]) -> str:
    """The first of these libraries that can draw on this machine. Raises UserError if none can."""
    reasons = []
    for library in libraries:
        reason = try_to_draw(library)
        if reason is None:
            return library
        reasons.append(f"{TITLES[library]} says '{reason}'")
    titles = " nor ".join(TITLES[library] for library in libraries)
    raise UserError(
        f"Neither {titles} can draw on this machine: {', '.join(reasons)}; on Debian and Ubuntu "
        "both come with apt-get install libegl1 libgl1 libosmesa6."
    )


def try_to_draw(library: str) -> str | None:
    """None if a library can draw; else what it said, in one line."""
    # -I: no file of the current folder is imported, such as a mujoco.py that happens to lie there.
    # The child imports from where this process does.
    folders = [os.path.abspath(folder) for folder in sys.path if folder]
    attempt = subprocess.run(
        [sys.executable, "-I", "-c", ATTEMPT, library, *folders],
        env=os.environ | {"MUJOCO_GL": library},
        capture_output=True,
        text=True,
    )
    if attempt.returncode == 0:
        return None
    lines = attempt.stderr.split("\nException ignored")[0].strip().splitlines()
    return lines[-1] if lines else f"exit code {attempt.returncode}"


def new_renderer(model, height: int, width: int):
    """A mujoco.Renderer for images of this size; the first one decides how MuJoCo draws.

    Raises UserError if this machine cannot draw.
    """
    library = choose_renderer()
    try:
        context = importlib.import_module(f"mujoco.{library}").GLContext
        importlib.import_module("mujoco.rendering.classic.gl_context").GLContext = context
        return mujoco.Renderer(model, height, width)
    except Exception as error:  # each library fails in its own way
        reason = " ".join(str(error).split())
        raise UserError(
            f"MuJoCo cannot draw with MUJOCO_GL={library} ({reason}): unset this variable to let "
            "the program choose, or install the library."
        ) from error
