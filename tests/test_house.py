"""The house rules: which module imports which, what an import may do, and how long things are."""

import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT

STAGES = sorted(path.stem for path in ROOT.glob("*.py"))
PACKAGES = ("genima", "robot", "sims", "tools")
# A module may import modules of its own level's packages and of those below.
ALLOWED = {
    "genima": {"genima"},
    "robot": {"robot", "sims", "genima"},  # sims: for the simulated arm
    "sims": {"sims", "genima"},
    "tools": {"tools", "stage", "sims", "robot", "genima"},
    "stage": {"sims", "robot", "genima"},
}


def modules():
    """Every module of the stages and packages: {name: path}; a package has its own name."""
    found = {stage: ROOT / f"{stage}.py" for stage in STAGES}
    for package in PACKAGES:
        for path in sorted((ROOT / package).glob("*.py")):
            name = package if path.stem == "__init__" else f"{package}.{path.stem}"
            found[name] = path
    return found


MODULES = modules()


def imports(name):
    """The modules of this repository that a module imports, also inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in MODULES else node.module)
    return (found & MODULES.keys()) - {name}


def level(name):
    return "stage" if name in STAGES else name.split(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downwards_only(name):
    wrong = [other for other in sorted(imports(name)) if level(other) not in ALLOWED[level(name)]]
    assert not wrong, f"{name} imports {', '.join(wrong)}"


def test_no_circle_of_imports():
    remaining = {name: imports(name) for name in MODULES}
    while True:
        free = [name for name, needed in remaining.items() if not needed & remaining.keys()]
        if not free:
            break
        for name in free:
            del remaining[name]
    assert not remaining, f"these import one another: {remaining}"


# A process that imports a module, and fails if that starts a process or makes ready to draw.
WATCH = """
import importlib, os, platform, subprocess, sys

platform.processor()  # h5py asks for it, and the answer is kept: this starts `uname`

def refuse(*arguments, **named):
    raise AssertionError(f"importing {importing} starts {arguments[1:]}")

subprocess.Popen.__init__ = refuse
os.system = os.fork = os.posix_spawn = refuse
before = dict(os.environ)
for name in sys.argv[1:]:
    importing = name
    importlib.import_module(name)
for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM"):
    assert os.environ.get(name) == before.get(name), f"an import changes {name}"
drawing = [name for name in sys.modules if name in ("mujoco.egl", "mujoco.osmesa", "mujoco.glfw")]
assert not drawing, f"an import chooses how to draw: {drawing}"
"""


def import_watched(*names, **environment):
    variables = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    done = subprocess.run(
        [sys.executable, "-c", WATCH, *names],
        cwd=ROOT,
        env=variables | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_an_import_starts_nothing():
    import_watched(*(name for name in MODULES if level(name) != "tools"))


@pytest.mark.parametrize("value", ["", "cgl", "egl"])
def test_an_import_does_not_ask_how_to_draw(value):
    import_watched("sims.perturbed_panda", "sims.demonstrator", MUJOCO_GL=value)


# Every stage's --help, one after the other in one process.
HELP = """
import runpy, sys
for stage in sys.argv[1:]:
    sys.argv = [stage, "--help"]
    try:
        runpy.run_path(stage, run_name="__main__")
    except SystemExit as end:
        assert not end.code, stage
"""


def test_help_needs_nothing_to_draw_and_no_unicode_and_keeps_its_lines():
    stages = [f"{stage}.py" for stage in STAGES]
    done = subprocess.run(
        [sys.executable, "-c", HELP, *stages],
        cwd=ROOT,
        env=os.environ | {"MUJOCO_GL": "cgl", "LANG": "C", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    printed = {line.rstrip() for line in done.stdout.splitlines()}
    for stage in stages:
        docstring = ast.get_docstring(ast.parse((ROOT / stage).read_text()))
        laid_out = [line for line in docstring.splitlines() if line.startswith("    ")]
        assert any("In:" in line for line in laid_out) or stage == "episodes.py", stage
        assert set(laid_out) <= printed, stage


# ---------------------------------------------------------------------------------------- lengths
SOURCES = sorted(
    path
    for folder in (".", *PACKAGES, "tests", "variations")
    for path in (ROOT / folder).glob("*.py")
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_line_is_longer_than_100_columns(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert len(line) <= 100, f"{path.name}:{number} has {len(line)} columns"


@pytest.mark.parametrize("name", [*STAGES, *(name for name in MODULES if level(name) == "genima")])
def test_a_file_fits_into_the_head(name):
    most = 350 if name in STAGES else 300
    lines = len(MODULES[name].read_text().splitlines())
    assert lines <= most, f"{name} has {lines} lines, more than {most}"


def test_hardly_any_exception_from_the_linter():
    exceptions = []
    for path in SOURCES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if "# no" + "qa" in line:
                exceptions.append(f"{path.name}:{number}")
            assert "# fmt: " + "skip" not in line, f"{path.name}:{number}"
            assert "# fmt: " + "off" not in line, f"{path.name}:{number}"
    assert len(exceptions) <= 10, exceptions
