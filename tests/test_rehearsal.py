"""Stage 2 with random scenes among the demonstrations, and with other rooms behind these."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from conftest import call

import pretrain_painter
import train_controlnet
from genima import painter_augmentation, scene_files
from genima import painter_training as setup
from genima.episodes import CAMERAS
from genima.files import UserError
from genima.painter_augmentation import Augmentation, replace_room
from genima.painter_data import PainterDataset, find_frames
from genima.scene_files import find_scenes

SIZE = 16  # pixels a view, as the recorded run's
SENTENCE = "scene {}, sentence {}"


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(scene_files, "SHARD", 2)
    monkeypatch.setattr(pretrain_painter, "SHARD", 2)
    monkeypatch.setattr(setup, "LEAST_SCENES", 1)


def make_scenes(folder, first=0, size=SIZE):
    """A file as pretrain_painter.py draws them; every number in a picture says whose it is."""
    images = np.zeros((2, 4, size, size, 3), np.uint8)
    layers = np.zeros((2, 4, 4, size, size, 4), np.uint8)
    sentences = []
    for scene in range(2):
        for view in range(4):
            images[scene, view] = 100 + 10 * scene + view
        for which in range(4):
            layers[scene, which] = 200 + 10 * scene + which
            sentences.append(SENTENCE.format(first + scene, which))
    path = folder / f"scenes/{first:07d}.hdf5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as root:
        root.attrs["format"] = scene_files.FORMAT
        root["images"] = images
        root["layers"] = layers
        root["sentences"] = np.array(sentences, dtype=h5py.string_dtype()).reshape(2, 4)
    return folder


def make_dataset(run, scenes, **share):
    data = find_frames(run)
    return PainterDataset(data.training, data.cameras, 2 * SIZE, None, scenes=scenes, **share)


def test_every_fourth_sample_is_a_scene(recorded, tmp_path):
    """Each with the sentence, the views in their places, and the layer, that belong together."""
    make_scenes(tmp_path, 0)
    scenes = find_scenes(make_scenes(tmp_path, 2), list(CAMERAS), SIZE)
    assert len(scenes) == 4
    dataset = make_dataset(recorded, scenes)
    seen = set()
    for step in range(30):
        batch = dataset[step]
        rehearsed = [i for i, prompt in enumerate(batch["prompts"]) if "sentence" in prompt]
        assert rehearsed == [3, 7]
        for i in rehearsed:
            words = batch["prompts"][i].split("'")[1]
            scene, which = (int(part.split()[-1]) for part in words.split(","))
            seen.add((scene, which))
            picture = 255 * batch["observation"][i]  # (3, 32, 32): the views in two rows
            corners = picture[0, ::SIZE, ::SIZE].flatten()
            expected = 100 + 10 * (scene % 2) + torch.arange(4)
            torch.testing.assert_close(corners, expected.float(), atol=0.01, rtol=0)
            alpha = 255 * batch["layer"][i, 3]
            assert alpha.sub(200 + 10 * (scene % 2) + which).abs().max() < 0.01
    assert len(seen) == 16


def test_of_other_cameras_only_those_are_read(tmp_path):
    scenes = find_scenes(make_scenes(tmp_path), ["front", "wrist"], SIZE)
    scene = scenes.draw(np.random.default_rng(0))
    views = scene.read_views(["front", "wrist"])
    numbers = [100 + 10 * scene.index + CAMERAS.index(name) for name in ("front", "wrist")]
    assert [int(image[0, 0, 0]) for image, _ in views] == numbers


def test_two_processes_draw_what_one_does(recorded, tmp_path):
    scenes = find_scenes(make_scenes(tmp_path), list(CAMERAS), SIZE)
    whole = make_dataset(recorded, scenes)[3]
    halves = []
    for process in range(2):
        dataset = make_dataset(recorded, scenes, process=process, num_processes=2)
        halves.append(dataset[3])
    assert halves[0]["prompts"] + halves[1]["prompts"] == whole["prompts"]
    joined = torch.cat([half["observation"] for half in halves])
    torch.testing.assert_close(joined, whole["observation"])


def test_scenes_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="no scenes to rehearse.*--steps 0"):
        find_scenes(tmp_path, list(CAMERAS), SIZE)
    folder = make_scenes(tmp_path / "scenes")
    with pytest.raises(UserError, match="16 pixels, this run's 64.*--image-size 64"):
        find_scenes(folder, list(CAMERAS), 64)
    for cameras, size in ((["ego"], SIZE), (["wrist"], None)):
        with pytest.raises(UserError, match="this run has others"):
            find_scenes(folder, cameras, size)
    assert find_scenes(None, ["ego"], None) is None


def test_scenes_alone_then_stage_2(recorded, tmp_path, capsys):
    """`--steps 0` draws scenes and trains nothing; a training goes on with the same scenes only."""
    scenes = tmp_path / "scenes"
    words = ["--steps", 0, "--scenes", 2, "--image-size", SIZE, "--out", scenes, "--workers", 1]
    assert call(pretrain_painter, *words) == 0
    assert sorted(path.name for path in scenes.iterdir()) == ["scenes", "scenes.png"]
    files = len(list((scenes / "scenes").iterdir()))
    assert f"{files * pretrain_painter.SHARD} scenes." in capsys.readouterr().out

    out = tmp_path / "painter"
    words = ["--run", recorded, "--out", out, "--steps", 2, "--batch-size", 4]
    words += ["--precision", "fp32", "--rehearse"]
    assert call(train_controlnet, *words, scenes) == 0
    assert "2 random scenes among them" in capsys.readouterr().out
    assert call(train_controlnet, *words, scenes) == 0  # it is trained already
    make_scenes(tmp_path / "others", 4)
    assert call(train_controlnet, *words, tmp_path / "others") == 2
    assert "rehearsed" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ other rooms
def test_another_room_is_seen_behind_what_is_before_it(monkeypatch):
    monkeypatch.setattr(painter_augmentation, "OTHER_ROOMS", 1)
    room = torch.full((3, SIZE, 2 * SIZE), 0.5)
    room[:, :, :SIZE] = torch.inf  # the left view's camera is on the arm
    picture = torch.full((7, SIZE, 2 * SIZE), 0.5)
    picture[:3, 4:8, 20:24] = 0.9  # a block in the right view
    replaced = replace_room(picture, room, np.random.default_rng(0), 2)
    torch.testing.assert_close(replaced[3:], picture[3:])
    torch.testing.assert_close(replaced[:, :, :SIZE], picture[:, :, :SIZE])
    torch.testing.assert_close(replaced[:, 3:9, 19:25], picture[:, 3:9, 19:25])
    changed = (replaced[:3] - picture[:3]).abs().amax(0) > 0.01
    changed[3:9, 19:25] = True
    assert changed[:, SIZE:].float().mean() > 0.9
    assert replaced[:3].min() >= 0 and replaced[:3].max() <= 1


def test_the_room_is_what_a_camera_sees_most_of_the_time(recorded, monkeypatch):
    monkeypatch.setattr(setup, "ROOM_SAMPLES", 10_000)
    data = find_frames(recorded)
    room = setup.find_room(data, 2 * SIZE)
    wrist, front = room[:, :SIZE, :SIZE], room[:, :SIZE, SIZE:]
    assert data.cameras[:2] == ["wrist", "front"]
    assert wrist.isinf().all()
    pictures = []
    for frame in data.training:
        with h5py.File(frame.episode) as root:
            pictures.append(root["observations/images/front"][frame.t])
    middle = np.sort(pictures, axis=0)[(len(pictures) - 1) // 2] / 255  # (16, 16, 3)
    torch.testing.assert_close(front, torch.from_numpy(middle).permute(2, 0, 1).float())

    with pytest.raises(UserError, match="--backgrounds needs a camera in the room, but wrist"):
        setup.find_room(replace(data, cameras=["wrist"]), 2 * SIZE)
    monkeypatch.undo()
    with pytest.raises(UserError, match="at least 5 scenes.* here are 4: train without it"):
        setup.find_room(replace(data, scenes=4), 2 * SIZE)


def test_half_of_the_demonstrations_are_in_other_rooms(recorded, tmp_path):
    """The targets are the same spheres; random scenes stay as they are."""
    scenes = find_scenes(make_scenes(tmp_path), list(CAMERAS), SIZE)
    plain = make_dataset(recorded, scenes)
    data = find_frames(recorded)
    room = setup.find_room(data, 2 * SIZE)
    moved = make_dataset(recorded, scenes)
    moved.augmentation = Augmentation(0, 0, 0, 0, 0, room)
    others = []
    for step in range(12):
        before, after = plain[step], moved[step]
        assert after["keys"] == [None] * 8
        differs = (after["observation"] - before["observation"]).abs().amax((1, 2, 3)) > 0.05
        assert not differs[3] and not differs[7]
        others += differs[[0, 1, 2, 4, 5, 6]].tolist()
        torch.testing.assert_close(after["layer"], before["layer"])
    assert 0.3 < np.mean(others) < 0.7


def test_stage_2_with_other_rooms_resumes_with_them_alone(recorded, tmp_path, capsys):
    words = ["--run", recorded, "--out", tmp_path / "painter", "--steps", 2, "--batch-size", 4]
    words += ["--precision", "fp32"]
    assert call(train_controlnet, *words, "--backgrounds") == 0
    assert call(train_controlnet, *words, "--backgrounds") == 0
    assert call(train_controlnet, *words) == 2
    assert "backgrounds" in capsys.readouterr().err
    words[3] = tmp_path / "plain"
    assert call(train_controlnet, *words) == 0
    losses = [(tmp_path / name / "losses.csv").read_text() for name in ("painter", "plain")]
    assert losses[0] != losses[1]
