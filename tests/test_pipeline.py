"""The whole method on a miniature, as `make demo` runs it: every promised file opens."""

import csv
import json
import math
import subprocess
import sys

import imageio.v2 as imageio
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from genima.episodes import CAMERAS, find_episodes, read_episode
from genima.plots import HEADING_HEIGHT
from genima.spheres import read_spheres
from render_spheres import PREVIEW_FILM

TASKS, SIZE, STEPS = ("reach_target", "push_button"), 32, 3
STAGES = {
    "collect": [
        "collect_demos.py",
        "--run",
        "{run}",
        "--tasks",
        *TASKS,
        "--scenes",
        2,
        "--image-size",
        SIZE,
    ],
    "check": ["episodes.py", "--check", "{run}/episodes"],
    "spheres": ["render_spheres.py", "--run", "{run}", "--preview"],
    "painter": [
        "train_controlnet.py",
        "--run",
        "{run}",
        "--base",
        "none",
        "--steps",
        STEPS,
        "--batch-size",
        2,
    ],
    "controller": ["train_act.py", "--run", "{run}", "--steps", STEPS, "--batch-size", 2],
    "genima": ["evaluate.py", "--run", "{run}", "--episodes", 1, "--language", 1],
    "oracle": ["evaluate.py", "--run", "{run}", "--episodes", 1, "--policy", "oracle"],
}


def command(run, *words):
    """Run a stage as a person would; it must succeed. Returns what it printed."""
    words = [str(word).format(run=run) for word in words]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """The run's folder, and what each stage printed."""
    run = tmp_path_factory.mktemp("runs") / "miniature"
    return run, {stage: command(run, *words) for stage, words in STAGES.items()}


def test_episodes_and_spheres(miniature):
    run, printed = miniature
    paths = find_episodes(run / "episodes", TASKS)
    assert len(paths) > 8  # two tasks, two scenes, three objects; an attempt may fail
    for path in paths:
        episode = read_episode(path)
        layers, target = read_spheres(run / "spheres" / path.relative_to(run / "episodes"))
        assert (
            episode.success and episode.sim and set(episode.images) == set(layers) == set(CAMERAS)
        )
        assert len(target) == len(episode.qpos) and all(
            layer.shape[1:] == (SIZE, SIZE, 4) for layer in layers.values()
        )
        assert (
            path.name == f"{episode.seed:07d}_{episode.variation:02d}.hdf5"
            and episode.instruction in episode.instructions
        )
    for task in TASKS:
        assert f"{task}: 1" in printed["collect"] and f"{task} " in printed["check"]  # 100.0% or so
    assert imageio.imread(run / "spheres/preview.png").ndim == 3


def test_repeating_collection_and_drawing_does_nothing_new(miniature):
    run, _ = miniature
    before = {path: path.stat().st_mtime_ns for path in run.glob("*/*/*.hdf5")}
    printed = command(run, *STAGES["collect"])
    assert len(before) < 24 or printed.count("nothing left to record") == len(TASKS)
    command(run, "render_spheres.py", "--run", "{run}")
    assert {path: path.stat().st_mtime_ns for path in run.glob("*/*/*.hdf5")} == before


@pytest.mark.parametrize(
    "folder, names",
    [
        (
            "controlnet",
            [
                "unet/diffusion_pytorch_model.safetensors",
                "controlnet/diffusion_pytorch_model.safetensors",
                "text_encoder/model.safetensors",
                "tokenizer",
                "scheduler",
                "painter.json",
                "validation.png",
            ],
        ),
        ("act", ["config.json", "model.safetensors"]),
    ],
)
def test_networks(miniature, folder, names):
    run, printed = miniature
    for name in [*names, "training.pt", "losses.png", "losses.csv"]:
        assert (run / folder / name).exists(), name
    rows = list(csv.DictReader((run / folder / "losses.csv").open()))
    assert len(rows) == STEPS and all(np.isfinite(float(row["loss"])) for row in rows)
    assert f"{run / folder}: " in printed[{"controlnet": "painter", "act": "controller"}[folder]]


@pytest.mark.parametrize("policy, suffix", [("genima", ""), ("oracle", "_oracle")])
def test_evaluation(miniature, policy, suffix):
    run, printed = miniature
    report = json.loads((run / f"evaluation/evaluation{suffix}.json").read_text())
    assert (
        report["policy"] == policy
        and {"git_commit", "seeds"} <= set(report)
        and set(report["tasks"]) == set(TASKS)
    )
    for name, task in report["tasks"].items():
        assert {
            "successes",
            "episodes",
            "rate",
            "wilson_95",
            "mean_steps",
            "paint_ms",
            "control_ms",
        } <= set(task)
        assert (
            task["episodes"] == 1
            and task["successes"] in (0, 1)
            and task["paint_ms"] > 0
            and task["control_ms"] > 0
        )
        film = imageio.mimread(run / f"evaluation/{name}{suffix}.mp4", memtest=False)
        assert len(film) > 1 and film[0].ndim == 3
        assert (run / f"evaluation/{name}{suffix}.png").exists() and name in printed[policy]
    assert (run / f"evaluation/success{suffix}.png").exists()
    if policy == "genima":
        assert report["language"]["cases"] == 3  # the buttons of one scene


def test_every_picture_opens_and_nothing_is_half_written(miniature):
    run, _ = miniature
    pictures = sorted(run.rglob("*.png"))
    assert len(pictures) == 1 + 2 + 1 + 2 * (len(TASKS) + 1)
    for path in pictures:
        Image.open(path).load()
    film = imageio.mimread(run / "spheres/preview.mp4", memtest=False)
    side = 2 * SIZE * math.ceil(PREVIEW_FILM / SIZE)  # two views in a row, enlarged
    assert film[0].shape[:2] == (HEADING_HEIGHT + side, side)
    assert not [path for path in run.rglob("*") if path.name.startswith(".") or ".tmp" in path.name]
