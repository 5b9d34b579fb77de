"""Two processes with half the batch each reach the weights of one; a killed training loses nothing.

The slow one: twenty kills at random moments.
"""

import csv
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from turbo import make_turbo

OPTIONS = {"train_controlnet.py": [], "train_act.py": ["--device", "cpu", "--precision", "fp32"]}
WEIGHTS = {
    "train_controlnet.py": "controlnet/controlnet/diffusion_pytorch_model.safetensors",
    "train_act.py": "act/model.safetensors",
}
# Rounded to bf16, no two orders of summing are the same.
PLAIN = {"train_controlnet.py": ["--precision", "fp32"]}
# float32: the halves are summed in another order; a weight has moved by up to 5e-3.
TOLERANCE = 2e-5


def copy_of(recorded, folder):
    folder.mkdir()
    for name in ("episodes", "spheres"):
        (folder / name).symlink_to(recorded / name)
    return folder


def start(processes, run, script, *options):
    """The stage, run by one process or by accelerate on several."""
    launch = []
    if processes > 1:
        # --multi_gpu starts the processes and ACCELERATE_USE_CPU keeps them off the GPU. (With
        # --cpu, --num_processes counts for MPI alone.)
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes]
        launch += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
        launch += ["--main_process_port", 0]
    command = [sys.executable, *launch, script, "--run", run, *OPTIONS[script], *options]
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )


def written(path):
    """When a file was written, 0 before it exists."""
    return path.stat().st_mtime_ns if path.exists() else 0


def losses(run, script):
    rows = list(csv.DictReader((run / WEIGHTS[script].split("/")[0] / "losses.csv").open()))
    return [float(row["loss"]) for row in rows]


@pytest.mark.parametrize(
    "script, more",
    [("train_controlnet.py", []), ("train_act.py", []), ("train_controlnet.py", ["sd-turbo"])],
)
def test_two_processes_are_one(recorded, tmp_path, script, more):
    if script == "train_controlnet.py" and not more:
        more = ["--base", "none"]
    elif more:
        base = make_turbo(tmp_path / "base")
        more = ["--size", "sd-turbo", "--base", base, "--resolution", 32]
        more += ["--micro-batch-size", 1, "--learning-rate", 1e-3]
    options = [*PLAIN.get(script, []), "--steps", 5, "--batch-size", 4, "--checkpoint-every", 5]
    runs = {processes: copy_of(recorded, tmp_path / f"run{processes}") for processes in (1, 2)}
    for processes, run in runs.items():
        process = start(processes, run, script, *options, *more)
        printed = process.communicate(timeout=500)[0]
        assert process.returncode == 0, printed
        assert printed.count(f"{run / WEIGHTS[script].split('/')[0]}: ") == 1  # one of them speaks
        assert ("on 2 processes" in printed) == (processes == 2), printed
    one, two = (load_file(run / WEIGHTS[script]) for run in runs.values())
    difference = max((one[name] - two[name]).abs().max().item() for name in one)
    assert one.keys() == two.keys() and difference < TOLERANCE, difference
    np.testing.assert_allclose(*(losses(run, script) for run in runs.values()), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("script", WEIGHTS)
def test_killed_twenty_times(recorded, tmp_path, script):
    options = ["--steps", 240, "--batch-size", 2, "--checkpoint-every", 3]
    if script == "train_controlnet.py":
        options += ["--base", "none"]
    whole, broken = (copy_of(recorded, tmp_path / name) for name in ("whole", "broken"))
    assert start(1, whole, script, *options).wait(600) == 0
    random = np.random.default_rng(0)
    kills = 0
    checkpoint = broken / WEIGHTS[script].split("/")[0] / "training.pt"
    while kills < 20:
        before = written(checkpoint)
        process = start(1, broken, script, *options)
        while process.poll() is None and written(checkpoint) == before:
            time.sleep(0.01)  # at least one checkpoint more, or it never comes to an end
        time.sleep(random.uniform(0, 1))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills == 20, kills
    assert start(1, broken, script, *options).wait(600) == 0
    assert losses(whole, script) == losses(broken, script)
    one, two = (load_file(run / WEIGHTS[script]) for run in (whole, broken))
    assert all(torch.equal(one[name], two[name]) for name in one)
