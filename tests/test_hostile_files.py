"""Files that nobody would write on purpose: exit code 2, one sentence with the file, nothing lost.

HDF5 that points elsewhere or promises more than it holds, YAML of a few lines that stands for
billions, JSON deeper than Python's stack.
"""

import json
import os

import h5py
import numpy as np
import pytest
from damage import (
    attribute,
    instead,
    promised,
    refusal,
    unknown_filter,
    virtual,
    write,
    zeros,
)
from test_episodes import contents

import pretrain_painter
from genima import scene_files
from genima.calibration_files import read_calibration_file
from genima.demonstrations import read_demonstrations
from genima.documents import read_json, read_yaml
from genima.episodes import find_episodes, read_episode
from genima.mapping import read_mapping
from genima.painter_data import find_frames
from render_spheres import check_mixture
from robot.recording import recover


def check_all(run):
    sources = find_episodes(run / "episodes")
    check_mixture(read_episode(sources[0], images=False), sources[1:], {}, False)


READERS = {  # what each stage reads before it does anything
    "render_spheres": check_all,
    "train_controlnet": find_frames,
    "train_act": lambda run: read_demonstrations(run, images=True),
}
pytestmark = pytest.mark.usefixtures("little_memory")


# ------------------------------------------------------------------------------- episodes, spheres
QPOS = "observations/qpos"
FRONT = "observations/images/front"
EPISODES = {
    "fps that is text": attribute("fps", "fast"),
    "fps that is no number": attribute("fps", float("nan")),
    "fps of nothing": attribute("fps", 0.0),
    "fps below nothing": attribute("fps", -10.0),
    "a seed that is text": attribute("seed", "first"),
    "a seed of several numbers": attribute("seed", [1, 2, 3]),
    "instructions that are a number": attribute("instructions", 3),
    "no instructions": attribute("instructions", np.zeros(0)),
    "success that is a table": attribute("success", np.ones((2, 2))),
    "a link to itself": instead(QPOS, lambda _: h5py.SoftLink("/" + QPOS)),
    "a link to nowhere": instead("action", lambda _: h5py.SoftLink("/nowhere")),
    "a link to a missing file": instead("action", lambda _: h5py.ExternalLink("no.hdf5", "/x")),
    "a link to a device": instead("action", lambda _: h5py.ExternalLink("/dev/zero", "/x")),
    "a link to a folder": instead(FRONT, lambda _: h5py.ExternalLink("/tmp", "/x")),
    "a group for an array": lambda root: (root.pop("action"), root.create_group("action")),
    "text for numbers": instead("action", lambda shape: np.full(shape, b"left")),
    "numbers in another file": virtual("action"),
    "an array never written": promised("action", 6, 8),
    "an array of terabytes": promised("action", 10**10, 8),
    "pictures of terabytes": promised(FRONT, 10**6, 4096, 4096, 3, kind=np.uint8),
    "gigabytes of zeros": zeros("action", 100_000_000, 8),
    "a filter that is missing": unknown_filter("action"),
    "nothing inside": lambda root: [root.pop(name) for name in list(root)],
}


NOT_PAINTED = {  # damage to numbers that stage 2 does not read
    "a link to itself",
    "text for numbers",
    "numbers in another file",
    "an array never written",
    "a filter that is missing",
}


@pytest.mark.parametrize("what", EPISODES)
def test_a_hostile_episode_is_one_sentence(copied, what):
    path = sorted(copied.glob("episodes/*/*.hdf5"))[0]
    with h5py.File(path, "r+") as root:
        EPISODES[what](root)
    before = contents(copied)
    for name, read in READERS.items():
        if name != "train_controlnet" or what not in NOT_PAINTED:
            assert str(path) in refusal(read, copied), name
    assert contents(copied) == before


LAYERS = "layers/front"
SPHERES = {
    "a horizon that is text": attribute("horizon", "far"),
    "a horizon that is no number": attribute("horizon", float("nan")),
    "no settings": lambda root: root.attrs.pop("settings"),
    "a target that is no number": lambda root: root["target/qpos"].write_direct(
        np.full(root["target/qpos"].shape, np.nan, np.float32)
    ),
    "a target of terabytes": promised("target/qpos", 10**10, 8),
    "layers never written": promised(LAYERS, 6, 16, 16, 4, kind=np.uint8),
    "layers that are text": instead(LAYERS, lambda shape: np.full(shape, b"x")),
    "layers in another file": virtual(LAYERS),
    "a camera too few": lambda root: root.pop(LAYERS),
    "a filter that is missing": unknown_filter("target/qpos"),
}
SEEN_BY = {  # the stages that read what is broken; none named: all
    "a horizon that is text": ["train_controlnet", "train_act"],
    "a horizon that is no number": ["train_controlnet", "train_act"],
    "no settings": ["render_spheres"],
    "a target that is no number": ["train_act"],
    "a target of terabytes": ["train_act"],
    "a filter that is missing": ["train_act"],
    "layers never written": ["train_controlnet"],
    "layers that are text": ["train_controlnet"],
    "layers in another file": ["train_controlnet"],
    "a camera too few": ["train_controlnet"],
}


@pytest.mark.parametrize("what", SPHERES)
def test_hostile_spheres_are_one_sentence(copied, sentence_of, what):
    """render_spheres.py looks at the settings of what it drew, the trainings at all they need."""
    path = sorted(copied.glob("spheres/*/*.hdf5"))[0]
    with h5py.File(path, "r+") as root:
        SPHERES[what](root)
    before = contents(copied)
    for name in SEEN_BY.get(what, READERS):
        if name == "render_spheres":
            sentence = sentence_of(name, "--run", copied)
        else:
            sentence = refusal(READERS[name], copied)
        assert str(path) in sentence, name
    assert contents(copied) == before


# ---------------------------------------------------------------------------- JSON, YAML, mappings
def bomb(lines=12):
    """Billion laughs: each line stands for nine times the line before it."""
    text = 'a0: &a0 ["ha"]\n'
    for i in range(1, lines):
        text += f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n"
    return text


def merge_bomb():
    text = "a0: &a0 {x: 1}\n"
    for i in range(1, 12):
        text += f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n"
    return text


DOCUMENTS = {
    "billion laughs": bomb(),
    "merged laughs": merge_bomb(),
    "a list in itself": "front: &a [*a]",
    "a tag that runs code": "!!python/object/apply:os.system ['echo broken']",
    "a tag of a module": "front: !!python/module:os",
    "an unknown tag": "front: !camera {fx: 1}",
    "a deep list": "[" * 100_000,
    "a deep JSON": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "a long number": '{"front": ' + "9" * 100_000 + "}",
    "bytes that are no text": b"\xff\xfe\x00front",
    "zeros": bytes(1000),
    "nothing": "",
    "text": "hello",
    "a number": "3",
    "no number": "NaN",
    "half a file": '{"front": {"intrinsics": [[1,',
}
CAMERAS = {
    "size of text": {"intrinsics": np.eye(3).tolist(), "size": ["high", "wide"]},
    "size without end": {"intrinsics": np.eye(3).tolist(), "size": [float("inf"), 1]},
    "a number too large": {"intrinsics": [[10**400, 0, 0], [0, 1, 0], [0, 0, 1]]},
    "no number": {"intrinsics": [[float("nan"), 0, 0], [0, 1, 0], [0, 0, 1]]},
    "a width of text": {"fx": 1, "fy": 1, "ppx": 1, "ppy": 1, "width": "wide", "height": 2},
    "a width without end": {"fx": 1, "fy": 1, "ppx": 1, "ppy": 1, "width": 1e999, "height": 2},
    "a matrix of text": {"camera_matrix": "front"},
    "a matrix of nothing": {"camera_matrix": None},
    "a resolution of one": {"camera_model": "pinhole", "intrinsics": [1, 1, 1, 1], "resolution": 3},
    "a pose from and to": {"world_from_camera_from_flange": np.eye(4).tolist()},
    "a pose of text": {"world_from_camera": "here"},
}
HAND_EYES = [
    {"transformation": 3},
    {"transformation": None},
    {"transformation": {"translation": 3, "rotation": 4}},
    {"transformation": {"translation": {"x": 0}, "rotation": {}}},
    {"transformation": dict.fromkeys(("x", "y", "z", "qx", "qy", "qz", "qw"), "0.x")},
    {"transformation": {"x": 0}, "parameters": 3},
    {"transformation": {"x": 0}, "parameters": None},
    {"transform": []},
]


@pytest.mark.parametrize("what", DOCUMENTS)
def test_a_hostile_document_is_one_sentence(tmp_path, what):
    path = write(tmp_path / "cameras.yaml", DOCUMENTS[what])
    assert str(path) in refusal(read_calibration_file, path)
    assert str(path) in refusal(read_mapping, path)
    assert os.listdir(tmp_path) == ["cameras.yaml"]


@pytest.mark.parametrize("what", CAMERAS)
def test_a_hostile_camera_is_one_sentence(tmp_path, what):
    path = write(tmp_path / "cameras.json", json.dumps({"front": CAMERAS[what]}))
    assert str(path) in refusal(read_calibration_file, path)


@pytest.mark.parametrize("content", HAND_EYES)
def test_a_hostile_hand_eye_calibration_is_one_sentence(tmp_path, content):
    path = write(tmp_path / "hand_eye.yaml", json.dumps(content))
    assert str(path) in refusal(read_calibration_file, path)


@pytest.mark.parametrize("reader", [read_json, read_yaml])
def test_a_file_without_end_and_what_is_no_file(tmp_path, reader):
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    for path in ("/dev/zero", loop, tmp_path, tmp_path / "no", tmp_path / ("x" * 300)):
        assert str(path) in refusal(reader, path)


def test_documents_of_people_are_read(tmp_path):
    content = {"front": {"x": [1, 2.5, None, True]}, "é": "ß"}
    plain = write(tmp_path / "plain.json", json.dumps(content, indent="\t"))
    marked = write(tmp_path / "marked.json", b"\xef\xbb\xbf" + plain.read_bytes())
    named = write(tmp_path / "named.yaml", "x: &a [1, 2]\ny: *a\n")
    assert read_yaml(plain) == read_json(plain) == read_json(marked) == content
    assert read_yaml(named) == {"x": [1, 2], "y": [1, 2]}


def test_names_in_yaml_are_the_text_that_was_written(tmp_path):
    serial = write(tmp_path / "s.yaml", "017322071051:\n  no: 010\n1e3: {on: yes}\n&a 7: *a\n")
    content = {"017322071051": {"no": 8}, "1e3": {"on": True}, "7": 7}
    assert read_yaml(serial) == content


def test_yaml_as_ros_prints_it_ends_with_a_line(tmp_path):
    once = write(tmp_path / "once.yaml", "x: 1\n---\n")
    assert read_yaml(once) == {"x": 1}
    twice = write(tmp_path / "twice.yaml", "x: 1\n---\nx: 2\n---\n")
    assert "holds 2 documents" in refusal(read_yaml, twice)


MAPPINGS = {
    "a number for a name": "joints: 3\nimages: a/{camera}\n",
    "a list for a name": "joints: [a, b]\nimages: a/{camera}\n",
    "a number for pictures": "joints: a\nimages: 3\n",
    "a range of one": "joints: a\nimages: b\ngripper_range: [1]\n",
    "a range of text": "joints: a\nimages: b\ngripper_range: open\n",
    "a range of nothing": "joints: a\nimages: b\ngripper_range: [1, 1]\n",
    "a rate of a list": "joints: a\nimages: b\nrate: [1]\n",
    "a rate below nothing": "joints: a\nimages: b\nrate: -5\n",
    "keys that are numbers": "1: 2\n",
    "colours that are none": "joints: a\nimages: b\ncolor: cmyk\n",
}


@pytest.mark.parametrize("what", MAPPINGS)
def test_a_hostile_mapping_is_one_sentence(tmp_path, what):
    path = write(tmp_path / "mine.yaml", MAPPINGS[what])
    assert str(path) in refusal(read_mapping, path)


# ------------------------------------------------------------------------- scenes of the base
def write_shard(path, size=8, **changes):
    arrays = {
        "images": np.zeros((4, 4, size, size, 3), np.uint8),
        "layers": np.zeros((4, 4, 4, size, size, 4), np.uint8),
        "sentences": np.full((4, 4), "the rose block", dtype=h5py.string_dtype()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as root:
        root.attrs["format"] = scene_files.FORMAT
        for name, array in (arrays | changes).items():
            if array is not None:
                root[name] = array


SHARDS = {
    "no pictures": dict(images=None),
    "pictures of text": dict(images=np.full((4, 4, 8, 8, 3), b"x")),
    "pictures of another size": dict(images=np.zeros((4, 4, 16, 16, 3), np.uint8)),
    "layers of fewer scenes": dict(layers=np.zeros((3, 4, 4, 8, 8, 4), np.uint8)),
    "sentences of one": dict(sentences=np.full(4, "x", dtype=h5py.string_dtype())),
}


@pytest.mark.parametrize("what", [*SHARDS, "half a file", "text"])
def test_hostile_scenes_are_one_sentence(tmp_path, sentence_of, monkeypatch, what):
    monkeypatch.setattr(scene_files, "SHARD", 4)
    monkeypatch.setattr(pretrain_painter, "SHARD", 4)
    paths = list(scene_files.find_shards(tmp_path / "scenes", 0, 8))
    for path in paths:
        write_shard(path)
    if what in SHARDS:
        write_shard(paths[1], **SHARDS[what])
    elif what == "text":
        paths[1].write_text("hello")
    else:
        paths[1].write_bytes(paths[1].read_bytes()[:3000])
    before = contents(tmp_path)
    options = ["--out", tmp_path, "--scenes", 8, "--image-size", 8, "--steps", 1]
    assert str(paths[1]) in sentence_of("pretrain_painter", *options, "--workers", 1)
    assert contents(tmp_path) == before


# --------------------------------------------------------------- what a killed recording has left
@pytest.mark.parametrize("about", ["", "{", "[1]", "{}", '{"fields": 3}', "[" * 100_000])
def test_a_recording_that_cannot_be_recovered_is_kept(tmp_path, about):
    folder = tmp_path / "robot/now/log.recording"
    folder.mkdir(parents=True)
    (folder / "about.json").write_text(about)
    (folder / "events.jsonl").write_text("")
    (folder / "frames.bin").write_bytes(bytes(1000))
    before = contents(tmp_path)
    sentence = refusal(recover, tmp_path)
    assert str(folder) in sentence and "move this folder away" in sentence
    assert contents(tmp_path) == before
