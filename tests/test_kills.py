"""Runs that are killed or stopped at random moments, in every stage (make test-slow).

Afterwards no process of theirs is left, and the same command ends with the same results, without
a left-over.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from test_full_disks import left_over, numbers
from test_parallel import children, is_running

SHORT = ["--steps", 6, "--batch-size", 2, "--checkpoint-every", 1, "--keep", 2]
COMMANDS = {
    "collect_demos": ["--tasks", "push_button", "--scenes", 8, "--image-size", 32],
    "render_spheres": ["--preview", "--size", 128],
    "train_controlnet": [*SHORT, "--base", "none"],
    "train_act": SHORT,
    "evaluate": ["--tasks", "push_button", "--episodes", 3, "--language", 0, "--videos", 0],
}
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
KILLS = 3  # of each signal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def prepare(name, recorded, run):
    """The folder of a run that has what the stage reads."""
    run.mkdir()
    if name == "evaluate":
        for part in ("act", "controlnet"):
            shutil.copytree(ROOT / "checkpoints/demo" / part, run / part)
        return run
    if name != "collect_demos":
        shutil.copytree(recorded / "episodes", run / "episodes")
    if name.startswith("train"):
        shutil.copytree(recorded / "spheres", run / "spheres")
    return run


def start(name, run):
    command = [sys.executable, f"{name}.py", "--run", run, *COMMANDS[name]]
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def run_to_its_end(name, run):
    """Returns the seconds that it takes."""
    before = time.monotonic()
    process = start(name, run)
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said
    return time.monotonic() - before


def outcomes(run):
    """What became of each episode of an evaluation."""
    return [
        json.loads(path.read_text())["tasks"]["push_button"]["outcomes"]
        for path in run.glob("evaluation/evaluation.json")
    ]


def stop(process, number):
    """Send a signal to a run and to none of its workers. Returns its exit code and last words."""
    workers = children(process.pid)
    process.send_signal(number)
    # A training that is asked to stop ends after its step, with a checkpoint.
    _, said = process.communicate(timeout=120)
    for _ in range(20):
        if not any(is_running(worker) for worker in workers):
            break
        time.sleep(0.1)
    assert not [worker for worker in workers if is_running(worker)], said
    return process.returncode, said


@pytest.mark.parametrize("name", COMMANDS)
def test_runs_that_are_killed_at_random_moments(recorded, tmp_path, name):
    whole = prepare(name, recorded, tmp_path / "whole")
    seconds = run_to_its_end(name, whole)
    broken = prepare(name, recorded, tmp_path / "broken")
    random = np.random.default_rng(0)
    for number in SIGNALS * KILLS:
        process = start(name, broken)
        time.sleep(random.uniform(0.2, 1) * seconds)
        code, said = stop(process, number)
        if number == signal.SIGKILL:
            assert code in (0, -number), said
        else:
            # Before Python has read the stage, the signal itself ends the process.
            assert code in (0, 130, -number), said
        if code == 130:
            assert "Stopped" in said and "Traceback" not in said, said
    run_to_its_end(name, broken)
    assert numbers(broken) == numbers(whole)
    assert outcomes(broken) == outcomes(whole)
    assert not left_over(broken)
