"""Terminals, machines and folders that are not as usual: the stages work, or say why they cannot.

Each line is a process of its own, since most of it is decided when a program starts.
"""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from genima.files import UserError
from sims.rendering import choose_renderer

COLLECT = ["collect_demos.py", "--tasks", "push_button", "--demos", 1, "--image-size", 16]
COLLECT += ["--workers", 1]  # the last word is the number of them
ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
NARROW = {**ASCII, "COLUMNS": "80", "TERM": "dumb"}
NO_EGL = {"__EGL_VENDOR_LIBRARY_FILENAMES": "/nowhere", "EGL_PLATFORM": "nonsense"}
NO_EGL |= {"LIBGL_DRIVERS_PATH": "/nowhere", "GALLIUM_DRIVER": "nonsense"}
NO_HOME = {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere/cache"}
linux = pytest.mark.skipif(sys.platform != "linux", reason="a matter of Linux")


def start(command, environment=None, before=(), cwd=ROOT):
    """Run a stage as a command. before: what stands in front of python."""
    script, *options = command
    words = [*before, sys.executable, ROOT / script, *options]
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | (environment or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )


def check_refusal(done, *words):
    said = done.stderr.decode()
    assert done.returncode == 2 and "Traceback" not in said, said
    sentence = said.rstrip().splitlines()[-1].split("\r")[-1]
    assert sentence.endswith("."), sentence
    for word in words:
        assert word in sentence, sentence


def check_success(done):
    said = done.stderr.decode()
    assert done.returncode == 0 and "Traceback" not in said, said
    return done.stdout.decode()


# ------------------------------------------------------------------------------------- terminals
SCRIPTS = ["collect_demos.py", "import_demos.py", "real_robot.py run", "real_robot.py record"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_in_a_terminal_of_ascii(script):
    """MUJOCO_GL is wrong, too: nothing is drawn for a --help."""
    done = start([*script.split(), "--help"], NARROW | {"MUJOCO_GL": "cgl"})
    assert "--" in check_success(done)
    assert done.stdout.isascii()


def test_a_run_in_a_terminal_of_ascii(tmp_path):
    run = tmp_path / "schräg"
    printed = check_success(start([*COLLECT, "--run", run], NARROW))
    assert "push_button" in printed and printed.isascii()
    printed = check_success(start(["render_spheres.py", "--run", run], NARROW))
    assert "spheres" in printed and printed.isascii()
    done = start(["train_act.py", "--run", tmp_path / "nirgends wo/ü"], NARROW)
    check_refusal(done, "nirgends wo")
    assert done.stderr.isascii()


# -------------------------------------------------------------------------------------- renderers
@linux
def test_a_renderer_that_is_none_is_named(tmp_path, monkeypatch):
    done = start([*COLLECT, "--run", tmp_path], {"MUJOCO_GL": "cgl"})
    check_refusal(done, "MUJOCO_GL", "'cgl'")
    assert os.listdir(tmp_path) == []
    for value in ("nonsense", "EGL,osmesa", "/etc/passwd", "egl "):
        monkeypatch.setenv("MUJOCO_GL", value)
        if value == "egl ":
            assert choose_renderer() == "egl"
            continue
        with pytest.raises(UserError, match=f"MUJOCO_GL is '{value.lower()}'"):
            choose_renderer()


def test_an_empty_renderer_is_none_chosen(tmp_path):
    check_success(start([*COLLECT, "--run", tmp_path], {"MUJOCO_GL": ""}))


@linux
def test_what_egl_says_is_passed_on(tmp_path):
    done = start([*COLLECT, "--run", tmp_path], {"MUJOCO_GL": "egl", **NO_EGL})
    check_refusal(done, "MUJOCO_GL=egl", "EGL")
    assert not list(tmp_path.rglob("*.hdf5"))


# ------------------------------------------------------------------------------------ the machine
def test_no_file_of_the_current_folder_is_run(tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    names = ("mujoco", "torch", "numpy", "h5py", "sims", "signal", "json", "OpenGL")
    for name in (*names, "sitecustomize", "usercustomize"):
        (here / f"{name}.py").write_text(f"open('{tmp_path}/{name} ran', 'w')")
    check_success(start([*COLLECT, "--run", tmp_path / "run"], cwd=here))
    assert sorted(os.listdir(tmp_path)) == ["here", "run"]


@pytest.mark.skipif(not shutil.which("taskset"), reason="there is no taskset")
def test_one_core_is_one_worker():
    for script in ("collect_demos.py", "import_demos.py"):
        printed = check_success(start([script, "--help"], before=["taskset", "-c", "0"]))
        assert "(default: 1)" in printed.partition("--workers")[2][:400], printed


@linux
def test_few_open_files_are_one_sentence(tmp_path):
    shell = ["bash", "-c", 'ulimit -n 24 && exec "$@"', "bash"]
    done = start([*COLLECT[:-1], 40, "--run", tmp_path, "--demos", 40], before=shell)
    check_refusal(done, "limit is reached")


def test_a_home_that_is_not_there(tmp_path):
    check_success(start([*COLLECT, "--run", tmp_path], NO_HOME))
    check_success(start(["render_spheres.py", "--run", tmp_path, "--preview"], NO_HOME))


@linux
def test_a_folder_that_cannot_be_written(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", folder]
    if subprocess.run(options, capture_output=True).returncode:
        pytest.skip("no disk may be mounted here")
    try:
        check_refusal(start([*COLLECT, "--run", folder]), str(folder), "Read-only")
        board = ["real_robot.py", "calibrate", "--print-board", folder / "board.pdf"]
        check_refusal(start(board), str(folder), "Read-only")
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@linux
@pytest.mark.parametrize("place", ["/proc/1/nowhere", "/dev/null/run", "/dev/full"])
def test_a_place_that_is_no_folder(sentence_of, place):
    assert place in sentence_of(COLLECT[0].removesuffix(".py"), *COLLECT[1:], "--run", place)
