"""Files that nobody would write on purpose: exit code 2, one sentence with the file, nothing lost.

HDF5 that points elsewhere or promises more than it holds, YAML of a few lines that stands for
billions, JSON deeper than Python's stack, pictures of gigapixels, checkpoints with code in them.
"""

import json
import os
import pickle
import resource
import shutil
import struct
import zlib

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT
from make_recordings import room_cameras, write_vendor
from test_episodes import contents

import import_demos
import pretrain_painter
from genima import scene_files
from genima.calibration_files import read_calibration_file
from genima.demonstrations import read_demonstrations
from genima.documents import read_json, read_yaml
from genima.episodes import find_episodes, write_episode
from genima.files import UserError
from genima.mapping import read_mapping
from genima.painter_data import find_frames
from render_spheres import check_mixture

SHORT = ["--steps", 3, "--batch-size", 2, "--checkpoint-every", 3]
TRAINING = {"train_controlnet": [*SHORT, "--base", "none"], "train_act": SHORT}
READERS = {  # what each stage reads before it does anything
    "render_spheres": lambda run: check_mixture(find_episodes(run / "episodes"), {}, False),
    "train_controlnet": find_frames,
    "train_act": lambda run: read_demonstrations(run, images=True),
}


@pytest.fixture(autouse=True)
def little_memory():
    """Four gigabytes more than the tests have: a bomb ends a test, and not the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refusal(function, *arguments):
    """The sentence with which a function refuses."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 1000 and sentence.endswith("."), sentence
    assert "delete" not in sentence, sentence
    return sentence


# -------------------------------------------------------------------------------- HDF5: episodes
def attribute(name, value):
    def change(root):
        root.attrs[name] = value

    return change


def instead(dataset, make):
    """A way to damage a file: in place of a dataset stands what make(its shape) gives."""

    def change(root):
        shape = root[dataset].shape
        del root[dataset]
        root[dataset] = make(shape)

    return change


def missing_source(shape):
    layout = h5py.VirtualLayout(shape, np.float32)
    layout[...] = h5py.VirtualSource("elsewhere.hdf5", "data", shape)
    return layout


def virtual(dataset):
    def change(root):
        shape = root[dataset].shape
        del root[dataset]
        root.create_virtual_dataset(dataset, missing_source(shape))

    return change


def promised(dataset, *shape, chunks=None, kind=np.float32):
    """An array of this shape of which nothing was written."""

    def change(root):
        del root[dataset]
        root.create_dataset(dataset, shape, kind, chunks=chunks or True)

    return change


def zeros(dataset, *shape):
    """A megabyte in the file, and gigabytes in memory."""

    def change(root):
        del root[dataset]
        chunk = (10_000, *shape[1:])
        data = root.create_dataset(dataset, shape, np.float32, chunks=chunk, compression=9)
        packed = zlib.compress(bytes(4 * int(np.prod(chunk))), 9)
        for first in range(0, shape[0], chunk[0]):
            data.id.write_direct_chunk((first, *[0] * (len(shape) - 1)), packed)

    return change


def unknown_filter(dataset):
    def change(root):
        data = root[dataset][()]
        del root[dataset]
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk(data.shape)
        plist.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple(data.shape)
        kind = h5py.h5t.py_create(data.dtype)
        made = h5py.h5d.create(root.id, dataset.encode(), kind, space, plist)
        made.write_direct_chunk((0,) * data.ndim, data.tobytes())

    return change


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


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


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


# --------------------------------------------------------------------------------- checkpoints
def painter_config(**changes):
    config = json.loads((ROOT / "checkpoints/demo/controlnet/painter.json").read_text())
    return json.dumps(config | changes)


PAINTERS = {
    "another size": painter_config(size="huge"),
    "a size of a number": painter_config(size=3),
    "no base": painter_config(size="sd-turbo"),
    "a base of a number": painter_config(size="sd-turbo", base=3),
    "a base that is not there": painter_config(size="sd-turbo", base="/nowhere"),
    "an objective unheard of": painter_config(objective="magic"),
    "cameras of a number": painter_config(cameras=3),
    "cameras of numbers": painter_config(cameras=[1, 2, 3, 4]),
    "no cameras": painter_config(cameras=[]),
    "cameras twice": painter_config(cameras=["front", "front"]),
    "a resolution of text": painter_config(resolution="high"),
    "a resolution of nothing": painter_config(resolution=0),
    "a resolution of terabytes": painter_config(resolution=10**9),
    "a picture of text": painter_config(image_size="64"),
    "a picture of no number": painter_config(image_size=float("nan")),
    "a picture of no size": painter_config(image_size=None),
    "sizes of other cameras": painter_config(image_size=None, image_sizes={"top": [1, 1]}),
    "sizes of text": painter_config(image_sizes={"front": "64"}),
    "a horizon of half a step": painter_config(horizon=0.5),
    "steps without end": painter_config(num_inference_steps=float("inf")),
    "an earlier version": json.dumps({"picture": 128, "steps": 1}),
    "a list": "[]",
    "deep": "[" * 100_000,
    "half": "{",
    "nothing": "",
}


def copy_checkpoint(tmp_path):
    run = shutil.copytree(ROOT / "checkpoints/demo", tmp_path / "run")
    return run, ["--run", run, "--tasks", "push_button", "--episodes", 1, "--language", 0]


@pytest.mark.parametrize("what", PAINTERS)
def test_a_hostile_painter_is_one_sentence(tmp_path, sentence_of, what):
    run, options = copy_checkpoint(tmp_path)
    path = write(run / "controlnet/painter.json", PAINTERS[what])
    before = contents(run)
    sentence = sentence_of("evaluate", *options, "--workers", 1)
    assert str(path) in sentence or "/nowhere" in sentence
    assert contents(run) == before


def act_config(**changes):
    config = json.loads((ROOT / "checkpoints/demo/act/config.json").read_text())
    return json.dumps(config | changes)


CONTROLLERS = {
    "another size": act_config(size="huge"),
    "joints of text": act_config(joints="seven"),
    "other joints": act_config(joints=6),
    "joints of terabytes": act_config(joints=10**9),
    "a horizon below nothing": act_config(horizon=-8),
    "a horizon of gigabytes": act_config(horizon=60_000),
    "a mean of text": act_config(state_mean=["x"] * 8),
    "a mean of one": act_config(state_mean=[0.0]),
    "a deviation of nothing": act_config(state_std=[0.0] * 8),
    "a deviation of no number": act_config(state_std=[float("nan")] * 8),
    "words of numbers": act_config(vocabulary=[1, 2]),
    "pictures of one side": act_config(image_size=[64]),
    "an observation unheard of": act_config(observation="touch"),
    "nothing said": "{}",
    "a list": "[]",
    "deep": '{"a":' * 100_000,
    "half": "{",
}


@pytest.mark.parametrize("what", CONTROLLERS)
def test_a_hostile_controller_is_one_sentence(tmp_path, sentence_of, what):
    run, options = copy_checkpoint(tmp_path)
    write(run / "act/config.json", CONTROLLERS[what])
    before = contents(run)
    assert str(run / "act") in sentence_of("evaluate", *options, "--workers", 1)
    assert contents(run) == before


WEIGHTS = {
    "a huge header": struct.pack("<Q", 2**62) + b"{}",
    "a header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "a header that is no JSON": struct.pack("<Q", 5) + b"[[[[[",
    "weights beyond the file": struct.pack("<Q", 69)
    + b'{"queries":{"dtype":"F32","shape":[8,128],"data_offsets":[0,4096]}}  ',
    "no weights": struct.pack("<Q", 2) + b"{}",
    "zeros": bytes(100),
    "a pickle": pickle.dumps({"queries": 3}),
    "nothing": b"",
}


@pytest.mark.parametrize("what", WEIGHTS)
@pytest.mark.parametrize(
    "place", ["act/model.safetensors", "controlnet/unet/diffusion_pytorch_model.safetensors"]
)
def test_hostile_weights_are_one_sentence(tmp_path, sentence_of, place, what):
    run, options = copy_checkpoint(tmp_path)
    path = run / place
    assert path.is_file()
    write(path, WEIGHTS[what])
    assert str(path.parent) in sentence_of("evaluate", *options, "--workers", 1)


class RunsCode:
    """What pickle calls when it reads this."""

    def __reduce__(self):
        return os.system, ("touch broken",)


@pytest.mark.parametrize("name", TRAINING)
def test_a_pickle_in_a_checkpoint_is_not_run(copied, sentence_of, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    folder = copied / {"train_act": "act", "train_controlnet": "controlnet"}[name]
    folder.mkdir()
    path = folder / "training.pt"
    torch.save({"step": RunsCode(), "identity": {}}, path)
    zipped = path.read_bytes()
    for content in (zipped, pickle.dumps(RunsCode()), zipped[:-100], b"PK\x05\x06" + bytes(18)):
        path.write_bytes(content)
        assert str(path) in sentence_of(name, "--run", copied, *TRAINING[name])
        assert path.read_bytes() == content
    assert not (tmp_path / "broken").exists()


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
    paths = scene_files.find_shards(tmp_path / "scenes", 8)
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


# --------------------------------------------------------------------------- recordings of others
def png_bomb(side=40_000):
    """A PNG of this many pixels a side, all black: a few megabytes, and gigabytes in memory."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10_000)))
        + chunk(b"IEND", b"")
    )


def pictures(*rows):
    def change(root):
        del root["rgb/wrist"]
        longest = max(len(row) for row in rows)
        padded = [np.frombuffer(row.ljust(longest, b"\0"), np.uint8) for row in rows]
        root["rgb/wrist"] = np.stack([padded[i % len(padded)] for i in range(45)])

    return change


def leap(root):
    root["timestamps"][-1] = 1e15


RECORDINGS = {
    "joints of text": instead("joint_positions", lambda shape: np.full(shape, b"left")),
    "joints of no number": instead("joint_positions", lambda shape: np.full(shape, np.nan)),
    "joints never written": promised("joint_positions", 45, 7),
    "joints of terabytes": promised("joint_positions", 10**12, 7),
    "joints of gigabytes of zeros": zeros("joint_positions", 100_000_000, 7),
    "joints elsewhere": virtual("joint_positions"),
    "joints that are a loop": instead("joint_positions", lambda _: h5py.SoftLink("/rgb/../x")),
    "joints in a device": instead("gripper_width", lambda _: h5py.ExternalLink("/dev/zero", "x")),
    "a filter that is missing": unknown_filter("joint_positions"),
    "time of text": instead("timestamps", lambda shape: np.full(shape, b"noon")),
    "time of no number": instead("timestamps", lambda shape: np.full(shape, np.nan)),
    "time that leaps": leap,
    "pictures never written": promised("rgb/wrist", 45, 48, 64, 3, kind=np.uint8),
    "pictures of text": instead("rgb/wrist", lambda shape: np.full(shape, b"x")),
    "pictures that are none": pictures(b"hello"),
    "pictures of gigapixels": pictures(png_bomb()),
    "pictures too large": pictures(png_bomb(9_000)),
}


@pytest.mark.parametrize("what", RECORDINGS)
def test_a_hostile_recording_is_one_sentence(tmp_path, what):
    path = tmp_path / "bought" / "take.hdf5"
    path.parent.mkdir()
    write_vendor(path, cameras={"wrist": (48, 64)})
    with h5py.File(path, "r+") as root:
        RECORDINGS[what](root)
    room = write(tmp_path / "room.json", json.dumps(room_cameras({"wrist": (48, 64)})))
    before = path.read_bytes()
    run = tmp_path / "run"
    settings = import_demos.Settings((path.parent,), run, calibration=(str(room),), workers=1)
    with pytest.raises(UserError) as caught:
        import_demos.import_all(settings)
    sentence, summary = str(caught.value).splitlines()
    assert str(path) in sentence and sentence.endswith("."), sentence
    assert summary == "1 demonstration not imported."
    assert path.read_bytes() == before and not list(run.rglob("*.hdf5"))


# -------------------------------------------------------------------------- LeRobot's datasets
@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An episode as a dataset of LeRobot."""
    folder = tmp_path_factory.mktemp("exported")
    path = folder / "episodes/pick_and_lift/000000_00.hdf5"
    write_episode(path, make_episode(0, frames=12, size=(64, 64))[0])
    export_dataset([path], folder / "lerobot", False)
    return folder / "lerobot"


def info(**changes):
    def change(folder):
        path = folder / "meta/info.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def overwrite(pattern, content):
    def change(folder):
        for path in folder.glob(pattern):
            write(path, content)

    return change


def rows(pattern, name, value):
    """A way to damage a table: one of its columns holds `value` in every row."""

    def change(folder):
        for path in folder.glob(pattern):
            table = pq.read_table(path)
            place = table.column_names.index(name)
            pq.write_table(table.set_column(place, name, pa.array([value] * len(table))), path)

    return change


def sound_alone(folder):
    for path in folder.glob("videos/*/*/*.mp4"):
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=44_100)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 44_100
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))


META = "meta/episodes/*/*.parquet"
DATA = "data/*/*.parquet"
DATASETS = {
    "a rate of text": info(fps="fast"),
    "a rate of no number": info(fps=float("nan")),
    "a rate of nothing": info(fps=0),
    "features of a number": info(features=3),
    "a feature of a number": info(features={"observation.state": 3}),
    "no features": info(features={}),
    "a path of code": info(data_path="{chunk_index.__class__.__mro__}"),
    "a path of unknown parts": info(data_path="{nothing}"),
    "a path of a number": info(data_path=3),
    "a path to a device": info(data_path="/dev/zero"),
    "info that is half": overwrite("meta/info.json", "{"),
    "info that is deep": overwrite("meta/info.json", "[" * 100_000),
    "tables that are text": overwrite(DATA, "hello"),
    "tables of nothing": overwrite(DATA, ""),
    "episodes that are text": overwrite(META, "hello"),
    "an episode that is text": rows(META, "episode_index", "first"),
    "a chunk that is text": rows(META, "data/chunk_index", "x"),
    "states that are text": rows(DATA, "observation.state", "left"),
    "states of nothing": rows(DATA, "observation.state", []),
    "time of text": rows(DATA, "timestamp", "noon"),
    "another episode's frames": rows(DATA, "episode_index", 7),
    "a video that is text": overwrite("videos/*/*/*.mp4", "hello"),
    "a video of nothing": overwrite("videos/*/*/*.mp4", ""),
    "a video of sound": sound_alone,
}


@pytest.mark.parametrize("what", DATASETS)
def test_a_hostile_dataset_is_one_sentence(exported, tmp_path, what):
    folder = shutil.copytree(exported, tmp_path / "lerobot")
    DATASETS[what](folder)
    run = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        import_demos.import_all(import_demos.Settings((folder,), run, workers=1))
    sentence = str(caught.value).splitlines()[0]
    assert str(folder) in sentence and sentence.endswith("."), sentence
    assert not list(run.rglob("*.hdf5"))
