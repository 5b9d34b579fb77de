"""Which scenes are held out, what becomes of failed demonstrations, and what may not be mixed."""

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT, make_episode

from genima.demonstrations import describe_held_out, read_demonstrations, split_scenes
from genima.episodes import write_episode
from genima.files import UserError
from genima.painter_data import find_frames
from genima.scenes import Scene, describe_split, held_out_scenes, measured_in, scene_of


@pytest.mark.parametrize(
    "count, held_out",
    [(0, []), (1, []), (2, [1]), (9, [8]), (10, [9]), (29, [9]), (30, [9, 29]), (50, [9, 29, 49])],
)
def test_every_20th_scene_is_held_out_from_the_10th_on(count, held_out):
    scenes = [Scene("push_button", seed, "") for seed in range(count)]
    found = held_out_scenes(reversed(scenes + scenes))  # order and repetition mean nothing
    assert sorted(found) == [scenes[i] for i in held_out]
    assert len(found) < max(count, 1)


def test_a_recording_of_a_real_arm_is_a_scene_of_its_own():
    path = Path("episodes/push/take_7.hdf5")
    assert scene_of(path, "push", 3, sim=True) == scene_of(Path("x/y.hdf5"), "push", 3, sim=True)
    assert scene_of(path, "push", 3, sim=False) != scene_of(Path("x/y.hdf5"), "push", 3, sim=False)
    scenes = [scene_of(Path(f"take_{i}.hdf5"), "push", 0, sim=False) for i in range(12)]
    assert len(held_out_scenes(scenes)) == 1


def test_what_is_said_about_the_split():
    assert describe_split(42, 2, 0, 0) == "2 of 42 scenes held out."
    assert "3 failed demonstrations left out (--failed uses them)" in describe_split(42, 2, 3, 0)
    assert "unseen" in measured_in(1) and "unseen" not in measured_in(0)


# ------------------------------------------------------------------------------- in both trainings
def stage(script, *words):
    command = [sys.executable, script, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def record(folder, seeds=(0, 1, 2), **changes):
    """Episodes of one arm; changes: {attribute: value, or a function of the episode}."""
    for seed in seeds:
        episode = make_episode(0, size=(16, 16))[0]
        episode.seed = seed
        for name, value in changes.items():
            setattr(episode, name, value)
        write_episode(folder / f"episodes/pick_and_lift/{seed:06d}_00.hdf5", episode)


@pytest.fixture
def drawn(tmp_path):
    record(tmp_path)
    done = stage("render_spheres.py", "--run", tmp_path, "--horizon", 2)
    assert done.returncode == 0, done.stderr
    return tmp_path


def fail(run, seed):
    with h5py.File(run / f"episodes/pick_and_lift/{seed:06d}_00.hdf5", "r+") as root:
        root.attrs["success"] = False


def seeds_of(frames):
    return {int(Path(frame.episode).stem.split("_")[0]) for frame in frames}


def test_both_stages_hold_out_the_same_and_leave_failures_out(drawn):
    data = find_frames(drawn)
    assert seeds_of(data.training) == {0, 1} and seeds_of(data.held_out) == {2}
    training, held_out = split_scenes(read_demonstrations(drawn, images=False))
    assert {one.seed for one in training} == {0, 1} and {one.seed for one in held_out} == {2}

    fail(drawn, 2)
    data = find_frames(drawn)
    assert seeds_of(data.training) == {0} and seeds_of(data.held_out) == {1}
    assert (data.failed, data.scenes, data.scenes_held_out) == (1, 2, 1)
    demonstrations = read_demonstrations(drawn, images=False)
    training, held_out = split_scenes(demonstrations)
    assert {one.seed for one in training} == {0} and {one.seed for one in held_out} == {1}
    assert "1 failed demonstrations left out" in describe_held_out(demonstrations, drawn)

    data = find_frames(drawn, use_failed=True)
    assert seeds_of(data.training) == {0, 1} and seeds_of(data.held_out) == {2}
    demonstrations = read_demonstrations(drawn, images=False, use_failed=True)
    assert {one.seed for one in demonstrations} == {0, 1, 2}
    assert "1 failed demonstrations among them" in describe_held_out(demonstrations, drawn)

    fail(drawn, 0)
    data = find_frames(drawn)  # one is left: nothing can be held out
    assert seeds_of(data.training) == {1} and data.held_out == [] and data.scenes_held_out == 0
    training, validation = split_scenes(read_demonstrations(drawn, images=False))
    assert training == validation

    fail(drawn, 1)
    for read in (find_frames, lambda run: read_demonstrations(run, images=False)):
        with pytest.raises(UserError, match="All 3 demonstrations in .* failed"):
            read(drawn)


def test_no_false_claim_where_nothing_is_held_out(drawn):
    fail(drawn, 0)
    fail(drawn, 1)
    options = ["--run", drawn, "--steps", 1, "--batch-size", 2]
    painter = stage("train_controlnet.py", *options, "--base", "none")
    assert painter.returncode == 0, painter.stderr
    assert "0 of 1 scenes held out, 2 failed demonstrations left out" in painter.stdout
    controller = stage("train_act.py", *options, "--device", "cpu")
    assert controller.returncode == 0, controller.stderr
    assert "0 of 1 scenes held out, 2 failed demonstrations left out" in controller.stdout
    card = (drawn / "controlnet/README.md").read_text().lower()
    for text in (painter.stdout, controller.stdout, card):
        assert "unseen" not in text
    assert "scenes trained on" in painter.stdout


# ----------------------------------------------------------------------------------------- mixtures
def moved(metres):
    extrinsics = make_episode(0, size=(16, 16))[0].extrinsics
    extrinsics["front"] = extrinsics["front"].copy()
    extrinsics["front"][:, 0, 3] += metres
    return extrinsics


MIXTURES = {
    "rates": ({"fps": 30.0}, "at 30 frames a second"),
    "robots": ({"robot": "ur5e"}, "joints of ur5e"),
    "places of a camera": ({"extrinsics": moved(0.4)}, "the camera 'front' 40 cm from where"),
}


@pytest.mark.parametrize("what", MIXTURES)
def test_stage_1_refuses_mixtures_and_names_both_files(tmp_path, what):
    changes, sentence = MIXTURES[what]
    record(tmp_path, seeds=[0])
    record(tmp_path, seeds=[1], **changes)
    done = stage("render_spheres.py", "--run", tmp_path)
    assert done.returncode == 2 and sentence in done.stderr, done.stderr
    assert "000000_00.hdf5" in done.stderr and "000001_00.hdf5" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "spheres").exists()


def test_cameras_may_move_a_little_and_on_request(tmp_path):
    record(tmp_path, seeds=[0])
    record(tmp_path, seeds=[1], extrinsics=moved(0.005))
    assert stage("render_spheres.py", "--run", tmp_path).returncode == 0
    record(tmp_path, seeds=[2], extrinsics=moved(0.4))
    assert stage("render_spheres.py", "--run", tmp_path).returncode == 2
    assert stage("render_spheres.py", "--run", tmp_path, "--moved-cameras").returncode == 0
    assert np.ptp(
        [one.extrinsics["front"][0, 0, 3] for one in read_demonstrations(tmp_path, False)]
    )
