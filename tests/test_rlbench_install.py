"""The steps of requirements-rlbench.txt, on local repositories that ask for each other as RLBench
and PyRep do."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

COMMIT = re.compile(r"^(pyrep|rlbench) @ git\+https://github.com/stepjam/(\w+)\.git@[0-9a-f]{40}$")


def run(*words, **options):
    return subprocess.run([*map(str, words)], capture_output=True, text=True, **options)


def has_pip():
    modules = "import setuptools, pip"
    return run(sys.executable, "-c", modules).returncode == 0 and shutil.which("git")


def make_repository(folder, name, requires):
    """A git repository of a package of one module -> its commit."""
    folder.mkdir()
    (folder / f"{name}.py").write_text("")
    setup = {"name": name, "version": "1.0", "py_modules": [name], "install_requires": requires}
    (folder / "setup.py").write_text(f"from setuptools import setup\n\nsetup(**{setup!r})\n")
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        done = run("git", "-C", folder, *command)
        assert done.returncode == 0, done.stderr
    return run("git", "-C", folder, "rev-parse", "HEAD").stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(not has_pip(), reason="pip, setuptools or git is missing")
def test_pip_installs_rlbench_as_the_file_says(tmp_path):
    pyrep = make_repository(tmp_path / "PyRep", "pyrep", [])
    address = f"pyrep @ git+file://localhost{tmp_path / 'PyRep'}"  # without a commit, as RLBench's
    rlbench = make_repository(tmp_path / "RLBench", "rlbench", [address])
    file = tmp_path / "requirements.txt"
    file.write_text(
        f"pyrep @ git+file://localhost{tmp_path / 'PyRep'}@{pyrep}\n"
        f"rlbench @ git+file://localhost{tmp_path / 'RLBench'}@{rlbench}\n"
    )
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation"]
    pip += ["--disable-pip-version-check", "--ignore-installed", "--target", tmp_path / "site"]
    done = run(*pip, "-r", file, cwd=tmp_path)
    assert done.returncode != 0, "pip resolves it by itself: --no-deps is no longer needed"
    assert "conflict" in done.stdout + done.stderr
    done = run(*pip, "--no-deps", "-r", file, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    assert run(sys.executable, "-c", "import pyrep, rlbench", env=environment).returncode == 0


def test_the_file_names_commits_and_all_that_the_two_need():
    lines = (ROOT / "requirements-rlbench.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    by_commit = [line for line in wanted if COMMIT.match(line)]
    assert [line.split()[0] for line in by_commit] == ["pyrep", "rlbench"]
    base = (ROOT / "requirements.txt").read_text().splitlines()
    # install_requires of the two, and what those need themselves
    needed = {"cffi", "pycparser", "numpy", "pillow", "pyquaternion", "scipy", "natsort"}
    present = {re.split(r"[<>=\[;~ #]", line)[0].lower() for line in wanted + base}
    assert needed <= present, needed - present
    assert any("pip install --no-deps -r requirements-rlbench.txt" in line for line in lines)
