"""Recordings that are sound and unusual: both readers understand them, or say one sentence."""

import json

import cv2
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT, make_episode
from make_recordings import INSTRUCTION, PANDA_HOME, motion, pictures, write_vendor

from genima.episodes import write_episode
from genima.export_lerobot import export_dataset
from genima.files import UserError
from genima.import_hdf5 import open_recording, read_recording
from genima.import_lerobot import read_episode_rows, read_lerobot
from genima.mapping import read_mapping, split_columns

FRAMES = 20
JOINTS, GRIPPER = motion(PANDA_HOME, FRAMES)
STATE = np.concatenate([JOINTS, GRIPPER[:, None]], axis=1)
FINGERS = np.stack([0.04 * GRIPPER, -0.04 * GRIPPER], axis=1)
MATRIX = np.array([[128, 0, 64], [0, 128, 48], [0, 0, 1]])
POSE = np.array([[1.0, 0, 0, 0.5], [0, -1, 0, 0.1], [0, 0, -1, 0.9], [0, 0, 0, 1]])
LISTS = {"joints": "joints", "gripper": "grip", "action": None, "gripper_command": "grip"}


def mapping_with(folder, base, lines):
    path = folder / "mine.yaml"
    content = yaml.safe_load((ROOT / "mappings" / f"{base}.yaml").read_text())
    path.write_text(yaml.safe_dump(content | lines))
    return read_mapping(path)


def read_vendor(folder, datasets=None, attributes=None, source_fps=None, **lines):
    """The recording of a vendor's file in which some things are others. None: not there."""
    path = folder / "take.hdf5"
    write_vendor(path, frames=FRAMES, fps=10.0, cameras={"front": (48, 64)})
    with h5py.File(path, "r+") as root:
        for name, values in (datasets or {}).items():
            if name in root:
                del root[name]
            root[name] = values
        for name, value in (attributes or {}).items():
            root.attrs[name] = value
    with open_recording(path) as root:
        return read_recording(root, mapping_with(folder, "vendor", lines), source_fps)


def read_dataset(
    folder,
    columns=None,
    tasks=(INSTRUCTION,),
    camera="observation.images.front",
    source_fps=None,
    **lines,
):
    """The recording of the one episode in a LeRobot dataset with other columns."""
    data = "data/chunk-000/file-000.parquet"
    for part in ("meta/episodes/chunk-000", "data/chunk-000"):
        (folder / part).mkdir(parents=True)
    files = [cv2.imencode(".png", picture)[1].tobytes() for picture in pictures(FRAMES, 48, 64)]
    table = {
        "observation.state": STATE.tolist(),
        "action": STATE.tolist(),
        "timestamp": (np.arange(FRAMES) / 10).tolist(),
        "frame_index": list(range(FRAMES)),
        "episode_index": [0] * FRAMES,
        camera: [{"bytes": file, "path": "x.png"} for file in files],
    }
    pq.write_table(pa.table(table | (columns or {})), folder / data)
    row = {"episode_index": 0, "tasks": list(tasks), "length": FRAMES}
    row |= {"data/chunk_index": 0, "data/file_index": 0}
    episodes = folder / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pa.Table.from_pylist([row]), episodes)
    info = {"codebase_version": "v3.0", "robot_type": "panda", "fps": 10, "data_path": data}
    info["features"] = {camera: {"dtype": "image", "shape": [48, 64, 3]}}
    (folder / "meta/info.json").write_text(json.dumps(info))
    mapping = mapping_with(folder, "lerobot", lines)
    return read_lerobot(folder, read_episode_rows(folder)[0], mapping, source_fps)


def sentence_of(read, folder, *arguments, **named):
    """The one sentence with which a reader refuses; it names the file and advises something."""
    with pytest.raises(UserError) as caught:
        read(folder, *arguments, **named)
    sentence = str(caught.value)
    assert str(folder) in sentence and sentence.endswith(".") and "\n" not in sentence
    assert "again" not in sentence and "delete" not in sentence
    return sentence


# ------------------------------------------------------------------------------------- actions
def test_actions_that_are_no_joints(tmp_path):
    action = STATE[:, 1:]
    words = "action: null in the mapping"
    assert words in sentence_of(read_dataset, tmp_path, {"action": action.tolist()})
    datasets = {"action": action[:, :-1]}
    assert words in sentence_of(read_vendor, tmp_path, datasets, action="action")


# ------------------------------------------------------------------------------------- gripper
@pytest.mark.parametrize("columns", [GRIPPER[:, None], np.abs(FINGERS), FINGERS])
def test_a_gripper_in_lists(tmp_path, columns):
    wanted = GRIPPER if columns.shape[1] == 1 else 0.08 * GRIPPER
    table = {"joints": JOINTS.tolist(), "grip": columns.tolist()}
    for recording in (
        read_dataset(tmp_path, table, **LISTS),
        read_vendor(tmp_path, {"gripper_width": columns}, gripper_command="gripper_width"),
    ):
        np.testing.assert_allclose(recording.gripper, wanted)
        np.testing.assert_allclose(recording.gripper_command, wanted)


def test_columns_that_are_no_fingers(tmp_path):
    both = np.stack([GRIPPER - 0.7, GRIPPER], axis=1)
    assert "no widths of fingers" in sentence_of(read_vendor, tmp_path, {"gripper_width": both})
    table = {"joints": JOINTS.tolist(), "grip": both.tolist()}
    assert "no widths of fingers" in sentence_of(read_dataset, tmp_path, table, **LISTS)


# ------------------------------------------------------------------------------------- cameras
@pytest.mark.parametrize(
    ("key", "pattern", "camera"),
    [
        ("observation.image", "observation.image", "image"),
        ("observation.front.rgb", "observation.{camera}.rgb", "front"),
        ("observation.images.front", "observation.images.{camera}", "front"),
    ],
)
def test_names_of_cameras_in_a_dataset(tmp_path, key, pattern, camera):
    recording = read_dataset(tmp_path, camera=key, images=pattern)
    assert list(recording.images) == [camera]


def test_a_camera_in_a_group_of_its_own(tmp_path):
    datasets = {"rgb/arm/left": pictures(FRAMES, 24, 32), "rgb/arm/times": np.arange(FRAMES)}
    recording = read_vendor(tmp_path, datasets)
    assert sorted(recording.images) == ["arm_left", "front"]
    datasets["rgb/arm_left"] = datasets["rgb/arm/left"]
    assert "would both be the camera arm_left" in sentence_of(read_vendor, tmp_path, datasets)


def in_file(intrinsics, extrinsics):
    return {"cam/front/K": intrinsics, "cam/front/T": extrinsics}


WHERE = {"intrinsics": "cam/{camera}/K", "extrinsics": "cam/{camera}/T"}


@pytest.mark.parametrize("intrinsics", [MATRIX, np.tile(MATRIX, (FRAMES, 1, 1))])
@pytest.mark.parametrize("extrinsics", [POSE, POSE[:3], np.tile(POSE[:3], (FRAMES, 1, 1))])
def test_cameras_in_the_file(tmp_path, intrinsics, extrinsics):
    recording = read_vendor(tmp_path, in_file(intrinsics, extrinsics), **WHERE)
    assert recording.intrinsics["front"].dtype == np.float64
    np.testing.assert_array_equal(recording.intrinsics["front"], MATRIX)
    np.testing.assert_array_equal(recording.extrinsics["front"], np.tile(POSE, (FRAMES, 1, 1)))


def test_cameras_in_the_file_that_are_none(tmp_path):
    poses = np.tile(POSE, (7, 1, 1))
    sentence = sentence_of(read_vendor, tmp_path, in_file(MATRIX, poses), **WHERE)
    assert "cam/front/T has shape (7, 4, 4)" in sentence
    sentence = sentence_of(read_vendor, tmp_path, in_file(MATRIX[:2], POSE), **WHERE)
    assert "cam/front/K has shape (2, 3)" in sentence


def test_a_dataset_has_one_place_for_each_camera(tmp_path):
    paths = [tmp_path / f"{number}.hdf5" for number in range(2)]
    for path in paths:
        episode = make_episode(0, frames=6, size=(32, 32))[0]
        if path == paths[1]:
            episode.extrinsics["front"] = episode.extrinsics["front"].copy()
            episode.extrinsics["front"][:, 0, 3] += 0.05
        write_episode(path, episode)
    with pytest.raises(UserError) as caught:
        export_dataset(paths, tmp_path / "out")
    assert str(paths[0]) in str(caught.value) and str(paths[1]) in str(caught.value)
    assert "camera front" in str(caught.value)
    assert not (tmp_path / "out" / "meta" / "info.json").exists()


# ------------------------------------------------------------------------------------- columns
def test_joints_in_another_order(tmp_path):
    order = [2, 1, 0, 3, 4, 5, 6]
    bracket = "[2, 1,0,3,4,5,6]"
    mixed = JOINTS[:, order]
    recording = read_vendor(
        tmp_path, {"joint_positions": mixed}, joints="joint_positions" + bracket
    )
    np.testing.assert_array_equal(recording.joints, JOINTS)
    state = np.concatenate([mixed, GRIPPER[:, None]], axis=1)
    lines = {"joints": "observation.state" + bracket, "action": None}
    recording = read_dataset(tmp_path, {"observation.state": state.tolist()}, **lines)
    np.testing.assert_array_equal(recording.joints, JOINTS)


def test_brackets():
    assert split_columns("q[2,1,0]") == ("q", [2, 1, 0])
    assert split_columns("q [ -1 ]") == ("q", -1)
    assert split_columns("q[:-1]") == ("q", slice(None, -1))
    assert split_columns("a/q") == ("a/q", None)
    for name in ("q[]", "q[-]", "q[1 2]", "q[0:4:2]", "q[1,]"):
        with pytest.raises(UserError, match="names no columns"):
            split_columns(name)


@pytest.mark.parametrize("bracket", ["[9]", "[8:10]", "[0,9]"])
def test_columns_that_are_not_there(tmp_path, bracket):
    words = "has 8 columns, so there is no"
    lines = {"gripper": "observation.state" + bracket}
    assert words in sentence_of(read_dataset, tmp_path, **lines)
    lines = {"gripper": "state" + bracket}
    assert words in sentence_of(read_vendor, tmp_path, {"state": STATE}, **lines)


# -------------------------------------------------------------------------- lines of a mapping
def test_a_rate_instead_of_timestamps(tmp_path):
    recording = read_dataset(tmp_path, source_fps=30.0)
    np.testing.assert_allclose(recording.seconds, np.arange(FRAMES) / 30)
    assert not recording.timed


def test_lines_that_a_dataset_understands(tmp_path):
    tool = np.tile([0.1, 0.2, 0.3, 0, 0, 0, 1], (FRAMES, 1))
    table = {"ee": tool.tolist(), "lang": ["wipe it"] * FRAMES}
    table["clock"] = list(range(0, 100 * FRAMES, 100))
    lines = {"tool_pose": "ee", "instruction": "lang", "timestamps": "clock"}
    recording = read_dataset(tmp_path, table, **lines, timestamp_unit="milliseconds")
    np.testing.assert_allclose(recording.tool_poses[:, :3, 3], tool[:, :3])
    np.testing.assert_allclose(recording.seconds, np.arange(FRAMES) / 10)
    assert recording.timed and recording.instruction == "wipe it"


@pytest.mark.parametrize(
    ("key", "value"), [("rate", 30), ("color", "bgr"), ("intrinsics", "K"), ("extrinsics", "T")]
)
def test_lines_that_mean_nothing_in_a_dataset(tmp_path, key, value):
    sentence = sentence_of(read_dataset, tmp_path, **{key: value})
    assert f"'{key}'" in sentence and "leave the line out" in sentence


# ---------------------------------------------------------------------------- label of success
LABELS = [
    *((word, True) for word in ("succeeded", "Successful", "ok", "pass", "y", "done", 1.0, "1")),
    *((word, False) for word in ("failed", "no", "FALSE", 0, 0.0)),
    *((word, None) for word in (float("nan"), "")),
]


@pytest.mark.parametrize(("label", "success"), LABELS)
def test_labels_of_success(tmp_path, label, success):
    assert read_vendor(tmp_path, attributes={"success": label}).success is success
    recording = read_dataset(tmp_path, {"next.success": [label] * FRAMES})
    assert recording.success is success
    said = "no label of success: it counts as successful." in recording.notes
    assert said == (success is None)


def test_labels_of_which_there_are_none(tmp_path):
    recording = read_vendor(tmp_path, {"label": np.zeros(0)}, success="label")
    assert recording.success is None
    recording = read_dataset(tmp_path, {"next.success": [None] * (FRAMES - 1) + [True]})
    assert recording.success is True


@pytest.mark.parametrize("label", ["perhaps", 0.97, 2, -1])
def test_labels_that_are_not_understood(tmp_path, label):
    sentence = sentence_of(read_vendor, tmp_path, attributes={"success": label})
    assert f"'{label}'" in sentence and "succeeded" in sentence and "failed" in sentence
    columns = {"next.success": [label] * FRAMES}
    assert f"'{label}'" in sentence_of(read_dataset, tmp_path, columns)


# --------------------------------------------------------------------------------- instruction
def test_two_tasks_in_an_episode(tmp_path):
    tasks = ("open the drawer", "close the drawer")
    sentence = sentence_of(read_dataset, tmp_path / "a", tasks=tasks)
    assert all(task in sentence for task in tasks) and "--instruction" in sentence
    assert read_dataset(tmp_path / "b", tasks=tasks, instruction="").instruction == ""


@pytest.mark.parametrize(
    ("stored", "ways"),
    [("b'pick up the cup'", 1), (json.dumps([INSTRUCTION, "take it"]), 2), ("[now] take it", 1)],
)
def test_instructions_in_other_clothes(tmp_path, stored, ways):
    wanted = stored if stored.startswith("[now]") else INSTRUCTION
    for recording in (
        read_vendor(tmp_path, attributes={"language_instruction": stored}),
        read_dataset(tmp_path, tasks=(stored,)),
    ):
        assert recording.instruction == wanted
        assert any("2 ways to say it" in note for note in recording.notes) == (ways == 2)


def test_several_ways_to_say_it(tmp_path):
    sentences = np.array([INSTRUCTION, "take the cup", "lift it"], h5py.string_dtype())
    recording = read_vendor(tmp_path, {"said": sentences}, instruction="said")
    assert recording.instruction == INSTRUCTION
    assert any("3 ways to say it" in note for note in recording.notes)


def test_an_instruction_in_several_languages(tmp_path):
    stored = json.dumps({"en": INSTRUCTION, "de": "Heb die Tasse"})
    sentence = sentence_of(read_vendor, tmp_path, attributes={"language_instruction": stored})
    assert "give --instruction" in sentence
    assert "give --instruction" in sentence_of(read_dataset, tmp_path, tasks=(stored,))


# ---------------------------------------------------------------------- files that are sound
def test_times_of_text_need_a_rate(tmp_path):
    texts = {"timestamps": np.array([b"2024-05-01T12:00"] * FRAMES)}
    assert "holds no numbers: give --source-fps" in sentence_of(read_vendor, tmp_path, texts)
    assert not read_vendor(tmp_path, texts, source_fps=10.0).timed


def test_times_of_seconds_and_nanoseconds(tmp_path):
    steps = np.arange(FRAMES)
    pairs = np.stack([7 + steps // 10, steps % 10 * 10**8], axis=1)
    recording = read_vendor(tmp_path, {"timestamps": pairs})
    np.testing.assert_allclose(recording.seconds, 7 + steps / 10)
    halves = {"timestamps": pairs + 0.5}
    assert "seconds and nanoseconds" in sentence_of(read_vendor, tmp_path, halves)


def test_a_gripper_of_text(tmp_path):
    texts = np.array([b"open"] * FRAMES)
    sentence = sentence_of(read_vendor, tmp_path, {"gripper_width": texts})
    assert "gripper_width holds no numbers: name others" in sentence
    columns = {"joints": JOINTS.tolist(), "grip": ["open"] * FRAMES}
    assert "grip holds no numbers" in sentence_of(read_dataset, tmp_path, columns, **LISTS)


def test_no_frames(tmp_path):
    none = {"joint_positions": np.zeros((0, 7)), "gripper_width": np.zeros(0)}
    assert "has no frames" in sentence_of(read_vendor, tmp_path, none)
    columns = {"episode_index": [1] * FRAMES}
    assert "has no frames" in sentence_of(read_dataset, tmp_path, columns)
