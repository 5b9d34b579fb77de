"""The whole method with two cameras of the simulator, wide views, from the base that is shipped."""

import subprocess
import sys

import pytest
from conftest import ROOT

from genima.episodes import find_episodes, read_episode
from genima.painter import load_painter

RECORD = ["collect_demos.py", "--tasks", "push_button", "--demos", 2]
TWO = ["--cameras", "wrist", "front", "--image-size", 24, 32]


def command(run, *words):
    words = [*map(str, words), "--run", run]
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def recorded_by_two(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "two"
    for words in ([*RECORD, *TWO], ["render_spheres.py"]):
        done = command(run, *words)
        assert done.returncode == 0, done.stderr
    return run


def test_two_cameras_from_the_base_to_the_closed_loop(recorded_by_two):
    run = recorded_by_two
    for path in find_episodes(run / "episodes"):
        assert read_episode(path).image_sizes == {"wrist": (24, 32), "front": (24, 32)}

    done = command(run, "train_controlnet.py", "--steps", 1, "--batch-size", 2)
    assert done.returncode == 0, done.stderr
    assert "is of cameras ['wrist', 'front', 'right_shoulder', 'left_shoulder']" in done.stdout
    painter = load_painter(run / "controlnet")
    assert painter.config["cameras"] == ["wrist", "front"]
    assert painter.config["resolution"] == 64  # the base's cells, in one row

    done = command(run, "train_act.py", "--steps", 1, "--batch-size", 2)
    assert done.returncode == 0, done.stderr
    done = command(run, "evaluate.py", "--episodes", 1, "--language", 1)
    assert done.returncode == 0, done.stderr
    assert (run / "evaluation/push_button.mp4").exists()


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--cameras", "wrist", "front"], "'front': (24, 32), 'wrist': (24, 32)} pixels, not"),
        ([*TWO[:2], *TWO[3:]], "pixels, not {'wrist': (24, 32)}: use another --run."),
        (["--cameras", "wrist", "roof"], "The embedded simulator's cameras are wrist, front,"),
        (["--image-size", 8, 8, 8], "--image-size takes one or two numbers"),
        (["--image-size", 8, 0], "--image-size must be"),
    ],
)
def test_other_views_are_one_sentence(recorded_by_two, options, sentence):
    done = command(recorded_by_two, *RECORD, *options)
    assert done.returncode == 2 and sentence in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
