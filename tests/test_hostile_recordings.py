"""Recordings of others, broken in every way: import_demos.py says one sentence about each."""

import json
import shutil
import struct
import zlib

import av
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_episode
from damage import instead, promised, unknown_filter, virtual, write, zeros
from make_recordings import room_cameras, write_vendor

import import_demos
from genima.episodes import write_episode
from genima.export_lerobot import export_dataset
from genima.files import UserError

pytestmark = pytest.mark.usefixtures("little_memory")


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
    assert (str(folder) in sentence or "/dev/zero" in sentence) and sentence.endswith("."), sentence
    assert not list(run.rglob("*.hdf5"))
