"""import_demos.py: what labs and vendors record becomes the same episodes, or one sentence."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv

import cv2
import h5py
import numpy as np
import pytest
from conftest import ROOT, make_episode
from make_recordings import (
    HAND_EYE,
    INSTRUCTION,
    PANDA_HOME,
    ROS,
    UR5E_HOME,
    motion,
    pictures,
    room_cameras,
    write_act,
    write_vendor,
)

import import_demos
from genima.episodes import read_episode, write_episode
from genima.files import UserError, run_stage
from genima.import_hdf5 import reason_of
from genima.kinematics import franka_chain
from genima.mapping import read_mapping
from genima.recordings import commands_from_motion, find_gaps, kinematics_error, nearest
from genima.robots import beyond_limits, robot_chain, robot_frames

TASK = "pick_up_the_cup"
TWO = {"front": (96, 128), "side": (120, 90)}
WRIST = {
    "wrist": {
        "intrinsics": [[60.0, 0, 32.0], [0, 60.0, 24.0], [0, 0, 1]],
        "hand_from_camera": [[1, 0, 0, 0.06], [0, 1, 0, 0], [0, 0, 1, -0.06], [0, 0, 0, 1]],
    }
}


@pytest.fixture
def command(monkeypatch, capsys):
    """Run import_demos.py -> (exit code, standard output, the sentences of its error)."""

    def run(*arguments):
        monkeypatch.setattr(
            sys, "argv", ["import_demos.py", *map(str, arguments), "--workers", "1"]
        )
        code = 0
        try:
            run_stage(import_demos.main)
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        sentences = [line.split("\r")[-1] for line in err.splitlines()]
        sentences = [line for line in sentences if line and "episode" not in line[-20:]]
        assert "Traceback" not in err and "delete" not in err
        return code, out, "\n".join(sentences)

    return run


@pytest.fixture
def cams(tmp_path):
    path = tmp_path / "cams.json"
    path.write_text(json.dumps(WRIST))
    return path


def imported(run, task=TASK):
    return [read_episode(path) for path in sorted((run / "episodes" / task).glob("*.hdf5"))]


# ------------------------------------------------------------------------- whole deliveries
def test_a_franka_with_one_wrist_camera(tmp_path, command):
    """30 Hz, width in metres, 480x640, two failed takes, a ROS calibration and a hand-eye one."""
    bought = tmp_path / "bought"
    bought.mkdir()
    for number in range(4):
        write_vendor(bought / f"take_{number}.hdf5", success=number < 2, seed=number, frames=31)
    (tmp_path / "lens.yaml").write_text(ROS)
    (tmp_path / "pose.yaml").write_text(HAND_EYE)
    run = tmp_path / "run"
    files = (tmp_path / "lens.yaml", tmp_path / "pose.yaml")
    arguments = (bought, "--run", run, "--calibration", *files)
    code, out, err = command(*arguments)
    assert (code, err) == (0, "")
    assert "4 demonstrations: mapping 'vendor'" in out
    assert "4 demonstrations imported" in out and "2 of them FAILED" in out
    assert "metres" in out and "taken for a panda" in out

    episodes = imported(run)
    assert [episode.success for episode in episodes] == [True, True, False, False]
    assert [episode.seed for episode in episodes] == [0, 1, 2, 3]
    matrix = np.array([[607.0, 0, 320.0], [0, 606.0, 240.0], [0, 0, 1]])
    lens = np.array([0.1, -0.2, 0.001, -0.002, 0.0])
    for number, episode in enumerate(episodes):
        joints, gripper = motion(PANDA_HOME, 31, number)
        assert (episode.fps, episode.robot, episode.sim) == (10.0, "panda", False)
        assert episode.instruction == INSTRUCTION and episode.instructions == [INSTRUCTION]
        np.testing.assert_allclose(episode.qpos[:, :7], joints[::3], atol=1e-6)
        np.testing.assert_allclose(episode.qpos[:, 7], gripper[::3], atol=1e-6)
        following = [*range(3, 31, 3), 30]
        np.testing.assert_allclose(episode.action[:, :7], joints[following], atol=1e-6)
        closing = np.flatnonzero(np.diff(gripper[::3]) < -0.02)[0]
        assert episode.action[:, 7].tolist() == [1.0] * closing + [0.0] * (11 - closing)
        speed = (joints[6] - joints[0]) / 0.2
        np.testing.assert_allclose(episode.qvel[1, :7], speed, atol=1e-5)
        poses = franka_chain().forward_kinematics(joints[::3])
        np.testing.assert_allclose(episode.joint_poses, poses, atol=1e-6)
        mount = robot_frames("panda")["hand"].copy()
        mount[:3, 3] += mount[:3, :3] @ [0.06, 0, -0.06]
        np.testing.assert_allclose(episode.extrinsics["wrist"], poses[:, -2] @ mount, atol=1e-6)
        half = [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]
        np.testing.assert_allclose(episode.intrinsics["wrist"], matrix + half)
        taken = pictures(31, 480, 640, 10 * number)
        straight = cv2.undistort(taken[9], matrix, lens, newCameraMatrix=matrix)
        difference = episode.images["wrist"][3].astype(int) - straight
        assert np.abs(difference).mean() < 0.1
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.hdf5")}
    code, out, _ = command(*arguments)
    assert code == 0 and "4 were there already" in out
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.hdf5")}


def test_a_ur5e_with_two_cameras_of_different_sizes(tmp_path, command):
    path = tmp_path / "take.hdf5"
    write_vendor(path, UR5E_HOME, frames=30, fps=10.0, cameras=TWO)
    cams = tmp_path / "cams.json"
    cams.write_text(json.dumps(room_cameras(TWO), indent="\t"))
    run = tmp_path / "run"
    code, out, err = command(path, "--run", run, "--calibration", cams, "--gripper-length", 0.2)
    assert (code, err) == (0, "") and "taken for a ur5e" in out
    (episode,) = imported(run)
    assert episode.image_sizes == TWO
    assert episode.qpos.shape == (30, 7) and episode.joint_poses.shape == (30, 7, 4, 4)
    assert episode.robot == "ur5e"
    for camera, size in zip(TWO, TWO.values()):
        seed = list(TWO).index(camera)
        np.testing.assert_array_equal(episode.images[camera], pictures(30, *size, seed))
        pose = room_cameras(TWO)[camera]["world_from_camera"]
        np.testing.assert_allclose(episode.extrinsics[camera][4], pose)
    # The tool is a gripper's length before the flange, along the last axis.
    last = episode.joint_poses[:, 5]
    tool = last[:, :3, 3] + last[:, :3, 2] * (0.0996 + 0.2)
    np.testing.assert_allclose(episode.joint_poses[:, 6, :3, 3], tool, atol=1e-6)


def as_jpeg(picture):
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def true_colours(picture):
    return as_jpeg(picture[..., ::-1])


@pytest.mark.parametrize("encode", [None, as_jpeg])
def test_act_raw_and_compressed(tmp_path, command, cams, encode):
    path = tmp_path / "episode_0.hdf5"
    write_act(path, 50, encode)
    arguments = (path, "--calibration", cams, "--instruction", "Open the drawer!")
    code, out, err = command(*arguments, "--run", tmp_path / "run", "--robot", "fr3")
    assert (code, err) == (0, "")
    assert "mapping 'act'" in out and "no timestamps: 50 Hz" in out
    (episode,) = imported(tmp_path / "run", "open_the_drawer")
    joints, gripper = motion(PANDA_HOME, 50)
    assert episode.robot == "fr3" and len(episode.qpos) == 10
    np.testing.assert_allclose(episode.qpos[:, :7], joints[::5], atol=1e-6)
    np.testing.assert_allclose(episode.qpos[:, 7], gripper[::5], atol=1e-6)
    # The command that leads to the next frame is the last one before it.
    np.testing.assert_allclose(episode.action[:-1, :7], joints[5::5], atol=1e-6)
    assert set(episode.action[:, 7]) == {0.0, 1.0}
    difference = np.abs(episode.images["wrist"].astype(int) - pictures(50, 48, 64)[::5])
    assert difference.max() <= (0 if encode is None else 12)


def test_a_jpeg_in_its_true_colours_needs_a_line_in_the_mapping(tmp_path, command, cams):
    path = tmp_path / "episode_0.hdf5"
    write_act(path, 50, true_colours)
    mapping = tmp_path / "mine.yaml"
    text = (ROOT / "mappings" / "act.yaml").read_text()
    mapping.write_text(text.replace("compressed_color: rgb", "compressed_color: bgr"))
    arguments = (path, "--mapping", mapping, "--calibration", cams, "--instruction", "go")
    assert command(*arguments, "--run", tmp_path / "run")[0] == 0
    (episode,) = imported(tmp_path / "run", "go")
    difference = np.abs(episode.images["wrist"].astype(int) - pictures(50, 48, 64)[::5])
    assert difference.max() <= 12


def test_one_of_two_arms_by_columns_and_counts_for_a_gripper(tmp_path, command, cams):
    joints, gripper = motion(PANDA_HOME, 30)
    path = tmp_path / "two.h5"
    with h5py.File(path, "w") as root:
        counts = 255 * (1 - gripper[:, None])
        root["state"] = np.concatenate([np.zeros((30, 8)), np.degrees(joints), counts], axis=1)
        root["cam/wrist/color"] = pictures(30, 48, 64)[..., ::-1]
        root["nanoseconds"] = (1e9 * np.arange(30) / 10).astype(np.int64)
        root["task"] = np.bytes_("wipe the table")
    mapping = tmp_path / "mine.yaml"
    mapping.write_text(
        "joints: state[8:15]\njoint_unit: degrees\ngripper: state[15]\ngripper_range: [255, 0]\n"
        "images: cam/{camera}/color\ncolor: bgr\ntimestamps: nanoseconds\n"
        "timestamp_unit: nanoseconds\ninstruction: task\nrobot: panda\n"
    )
    arguments = (path, "--mapping", mapping, "--calibration", cams, "--run", tmp_path / "run")
    code, _, err = command(*arguments)
    assert (code, err) == (0, "")
    (episode,) = imported(tmp_path / "run", "wipe_the_table")
    np.testing.assert_allclose(episode.qpos[:, :7], joints, atol=1e-6)
    np.testing.assert_allclose(episode.qpos[:, 7], gripper, atol=1e-6)
    np.testing.assert_array_equal(episode.images["wrist"], pictures(30, 48, 64))


def test_our_own_episodes_come_back_at_another_rate(tmp_path, command, cams):
    path = tmp_path / "episode_0.hdf5"
    write_act(path, 50)
    arguments = (path, "--calibration", cams, "--instruction", "go")
    assert command(*arguments, "--run", tmp_path / "a", "--fps", 50)[0] == 0
    code, out, _ = command(tmp_path / "a" / "episodes", "--run", tmp_path / "b", "--fps", 25)
    assert code == 0 and "mapping 'nanogenima'" in out
    (fast,) = imported(tmp_path / "a", "go")
    (slow,) = imported(tmp_path / "b", "go")
    assert slow.fps == 25 and slow.robot == "panda"
    np.testing.assert_array_equal(slow.qpos, fast.qpos[::2])
    np.testing.assert_array_equal(slow.images["wrist"], fast.images["wrist"][::2])
    np.testing.assert_array_equal(slow.extrinsics["wrist"], fast.extrinsics["wrist"][::2])
    np.testing.assert_array_equal(slow.action[:, :7], fast.action[1::2, :7])


# ------------------------------------------------------------------------------------- time
def test_uneven_times_take_the_nearest_frame_and_gaps_are_said(tmp_path, command, cams):
    path = tmp_path / "take.hdf5"
    write_vendor(path, frames=60, cameras={"wrist": (48, 64)})
    random = np.random.default_rng(0)
    with h5py.File(path, "r+") as root:
        seconds = root["timestamps"][()] + random.uniform(0, 0.01, 60)
        seconds[30:] += 0.5
        root["timestamps"][...] = seconds
    code, out, err = command(path, "--run", tmp_path / "run", "--calibration", cams)
    assert (code, err) == (0, "")
    assert re.search(r"a gap of 0\.5\d s at 0\.9\d s", out)
    (episode,) = imported(tmp_path / "run")
    joints, _ = motion(PANDA_HOME, 60)
    for t, angles in enumerate(episode.qpos[:, :7]):
        index = np.abs(seconds - seconds[0] - t / 10).argmin()
        np.testing.assert_allclose(angles, joints[index], atol=1e-6)


def test_pictures_with_times_of_their_own(tmp_path, command, cams):
    path = tmp_path / "take.hdf5"
    write_vendor(path, frames=100, fps=100.0, cameras={"wrist": (48, 64)})
    with h5py.File(path, "r+") as root:
        del root["rgb/wrist"]
        root["rgb/wrist"] = pictures(30, 48, 64)
        root["rgb_times/wrist"] = 1000.02 + np.arange(30) / 30
    mapping = tmp_path / "mine.yaml"
    text = (ROOT / "mappings" / "vendor.yaml").read_text()
    mapping.write_text(text + "image_timestamps: rgb_times/{camera}\n")
    arguments = (path, "--run", tmp_path / "run", "--calibration", cams, "--mapping", mapping)
    assert command(*arguments)[0] == 0
    (episode,) = imported(tmp_path / "run")
    joints, _ = motion(PANDA_HOME, 100)
    np.testing.assert_allclose(episode.qpos[:, :7], joints[2::10][:10], atol=1e-6)
    np.testing.assert_array_equal(episode.images["wrist"], pictures(30, 48, 64)[::3])


def test_the_measures():
    seconds = np.array([0.0, 0.1, 0.2, 0.7, 0.8])
    ((when, length),) = find_gaps(seconds)
    assert when == pytest.approx(0.2) and length == pytest.approx(0.5)
    assert nearest(seconds, np.array([-1, 0.14, 0.16, 0.46, 9])).tolist() == [0, 1, 2, 3, 4]
    opening = np.array([1, 1, 0.7, 0.5, 0.5, 0.5, 0.8, 1.0])
    assert commands_from_motion(opening).tolist() == [1, 0, 0, 0, 0, 1, 1, 1]
    joints = np.array([PANDA_HOME, PANDA_HOME + [0, 0, 0, 2.2, 0, 0, 0]])
    assert beyond_limits(joints, "panda").tolist() == [False, True]
    last = franka_chain().forward_kinematics(joints)[:, -2]
    frames = robot_frames("panda")
    assert kinematics_error(last @ frames["flange"], last, frames) == (0.0, "flange")
    off = last @ frames["tool"]
    off[1, 0, 3] += 0.05
    error, frame = kinematics_error(off, last, frames)
    assert frame == "tool" and error == pytest.approx(0.05)


def test_ur5e_is_where_its_table_says():
    """Denavit and Hartenberg's product, and the posture at zero, known from the data sheet."""
    chain = robot_chain("ur5e", 0.0)
    stretched = chain.forward_kinematics(np.zeros(6))[-1]
    np.testing.assert_allclose(stretched[:3, 3], [-0.8172, -0.2329, 0.0628], atol=1e-9)
    a = [0, -0.425, -0.3922, 0, 0, 0]
    d = [0.1625, 0, 0, 0.1333, 0.0997, 0.0996]
    alpha = np.pi / 2 * np.array([1, 0, 0, 1, -1, 0])
    q = np.random.default_rng(0).uniform(-3, 3, 6)
    pose = np.eye(4)
    for i in range(6):
        ct, st, ca, sa = np.cos(q[i]), np.sin(q[i]), np.cos(alpha[i]), np.sin(alpha[i])
        pose = pose @ [
            [ct, -st * ca, st * sa, a[i] * ct],
            [st, ct * ca, -ct * sa, a[i] * st],
            [0, sa, ca, d[i]],
            [0, 0, 0, 1],
        ]
    np.testing.assert_allclose(chain.forward_kinematics(q)[-1], pose, atol=1e-9)


# --------------------------------------------------------------------------- one sentence
def change(name, values):
    """A way to spoil a vendor's file: one dataset becomes `values` of itself, None removes it."""

    def spoil(path):
        with h5py.File(path, "r+") as root:
            data = root[name][()]
            del root[name]
            if values is not None:
                root[name] = values(data)

    return spoil


def back_in_time(seconds):
    seconds[20] -= 1
    return seconds


def one_is_nan(joints):
    joints[3, 2] = np.nan
    return joints


def cut(path):
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    "spoil, arguments, words",
    [
        (change("timestamps", back_in_time), [], "timestamps go back at frame 20"),
        (change("timestamps", lambda seconds: 1e6 * seconds), [], "timestamp_unit"),
        (change("timestamps", lambda seconds: seconds[:-1]), [], "timestamps has shape (29,)"),
        (change("timestamps", None), [], "--source-fps"),
        (change("joint_positions", one_is_nan), [], "NaN"),
        (change("joint_positions", np.degrees), [], "joint_unit: degrees"),
        (change("joint_positions", lambda joints: np.tile(joints, 2)), [], "14 joints"),
        (
            change("joint_positions", lambda joints: joints[:, :6]),
            ["--robot", "fr3"],
            "a fr3 has 7",
        ),
        (change("joint_positions", None), [], "no ready mapping fits"),
        (change("joint_positions", None), ["--mapping", "vendor"], "has no joint_positions"),
        (change("gripper_width", lambda width: 2550 * width), [], "gripper_range"),
        (change("rgb/wrist", lambda images: images[:-1]), [], "29 pictures for 30 frames"),
        (change("rgb/wrist", lambda images: images.astype(np.float32)), [], "uint8"),
        (change("rgb/wrist", lambda images: images[:, 0, :, 0]), [], "no JPEG or PNG"),
        (change("rgb/wrist", lambda images: images[..., :2]), [], "uint8"),
        (change("rgb/wrist", lambda images: 7), [], "no pictures of a camera"),
        (change("rgb/wrist", None), ["--mapping", "vendor"], "no pictures at rgb/{camera}"),
        (None, ["--fps", 60], "give --fps 31 or less"),
        (None, ["--robot", "kuka"], "'kuka'"),
        (None, ["--cameras", "front"], "no pictures of front"),
        (None, ["--mapping", "aloha2"], "no mapping 'aloha2'"),
        (None, ["--fps", 0], "--fps must be from 0.1 to 1000, not 0"),
        (cut, [], "no whole HDF5 file"),
        (lambda path: path.write_text("joints"), [], "no whole HDF5 file"),
    ],
)
def test_what_cannot_be_imported_is_said_in_one_sentence(
    tmp_path, command, cams, spoil, arguments, words
):
    path = tmp_path / "take.hdf5"
    write_vendor(path, frames=30, cameras={"wrist": (48, 64)})
    if spoil:
        spoil(path)
    run = tmp_path / "run"
    code, _, err = command(path, "--run", run, "--calibration", cams, *arguments)
    assert code == 2
    sentences = err.splitlines()
    assert words in sentences[0]
    assert len(sentences) <= 2  # the second counts them
    assert str(path) in sentences[0] or arguments
    assert not list(run.rglob("*.hdf5"))


@pytest.mark.parametrize(
    "line, words",
    [
        ("gripper_range: [0]", "gripper_range has to be [closed, open]"),
        ("gripper_range: [0.08, 0.08]", "gripper_range has to be [closed, open]"),
        ("gripper_range: 0.08", "gripper_range has to be [closed, open]"),
        ("gripper: joint_positions[7]", "joint_positions has 7 columns"),
        ("action: [joint_positions]", "'action' has to be a name"),
        ("instruction: 3", "'instruction' has to be a name"),
        ("timestamps: null\nrate: '@language_instruction'", "is no rate: give --source-fps"),
        ("rate: 0\ntimestamps: null", "rate is 0, not a rate in Hz"),
        ("joint_unit: grad", "joint_unit is not one of"),
        ("colour: rgb", "'colour' is not one of"),
    ],
)
def test_a_mapping_that_is_wrong_is_one_sentence(tmp_path, command, cams, line, words):
    path = tmp_path / "take.hdf5"
    write_vendor(path, frames=30, cameras={"wrist": (48, 64)})
    text = (ROOT / "mappings" / "vendor.yaml").read_text()
    for entry in line.splitlines():
        key = entry.split(":")[0]
        text = re.sub(rf"^{key}:.*\n", "", text, flags=re.MULTILINE)
    (tmp_path / "mine.yaml").write_text(f"{text}\n{line}\n")
    arguments = (path, "--run", tmp_path / "run", "--calibration", cams)
    code, _, err = command(*arguments, "--mapping", tmp_path / "mine.yaml")
    assert code == 2 and words in err.splitlines()[0]


def test_the_others_are_imported_all_the_same(tmp_path, command, cams):
    for number in range(3):
        path = tmp_path / "bought" / f"take_{number}.hdf5"
        path.parent.mkdir(exist_ok=True)
        write_vendor(path, frames=30, cameras={"wrist": (48, 64)})
    cut(path)
    code, out, err = command(path.parent, "--run", tmp_path / "run", "--calibration", cams)
    assert code == 2 and "take_2.hdf5" in err and "1 demonstration not imported" in err
    assert "2 demonstrations imported" in out
    assert len(imported(tmp_path / "run")) == 2


def test_a_camera_without_a_calibration(tmp_path, command):
    write_vendor(tmp_path / "take.hdf5", frames=30, cameras={"wrist": (48, 64)})
    code, _, err = command(tmp_path / "take.hdf5", "--run", tmp_path / "run")
    assert code == 2 and "give --calibration" in err and "'wrist'" in err


def test_inverted_extrinsics_are_refused_at_import(tmp_path, command):
    path = tmp_path / "take.hdf5"
    write_vendor(path, UR5E_HOME, frames=30, fps=10.0, cameras=TWO)
    entries = room_cameras(TWO)
    pose = np.linalg.inv(entries["side"]["world_from_camera"])
    entries["side"]["world_from_camera"] = pose.tolist()
    cams = tmp_path / "cams.json"
    cams.write_text(json.dumps(entries))
    code, _, err = command(path, "--run", tmp_path / "run", "--calibration", cams)
    assert code == 2
    assert "cams.json" in err and "'side'" in err and "inverted" in err
    entries["side"]["camera_from_base"] = entries["side"].pop("world_from_camera")
    cams.write_text(json.dumps(entries))
    assert command(path, "--run", tmp_path / "run", "--calibration", cams)[0] == 0


def test_a_depth_picture_among_the_cameras_can_be_left_out(tmp_path, command, cams):
    path = tmp_path / "take.hdf5"
    write_vendor(path, frames=30, cameras={"wrist": (48, 64)})
    with h5py.File(path, "r+") as root:
        root["rgb/depth"] = np.zeros((30, 48, 64), np.uint16)
    arguments = (path, "--run", tmp_path / "run", "--calibration", cams)
    code, _, err = command(*arguments)
    assert code == 2 and "rgb/depth" in err and "--cameras" in err
    assert command(*arguments, "--cameras", "wrist")[0] == 0
    (episode,) = imported(tmp_path / "run")
    assert list(episode.images) == ["wrist"]


def with_alpha(images):
    return np.concatenate([images, np.full_like(images[..., :1], 255)], axis=-1)


@pytest.mark.parametrize(
    "layout", [lambda images: images.transpose(0, 3, 1, 2), with_alpha], ids=["3HW", "RGBA"]
)
def test_pictures_in_other_layouts(tmp_path, command, cams, layout):
    path = tmp_path / "take.hdf5"
    write_vendor(path, frames=30, fps=10, cameras={"wrist": (48, 64)})
    with h5py.File(path, "r+") as root:
        pictures = root["rgb/wrist"][()]
        del root["rgb/wrist"]
        root["rgb/wrist"] = layout(pictures)
    assert command(path, "--run", tmp_path / "run", "--calibration", cams)[0] == 0
    (episode,) = imported(tmp_path / "run")
    np.testing.assert_array_equal(episode.images["wrist"], pictures)


@pytest.mark.parametrize(
    ("label", "success"),
    [
        (False, False),
        ("False", False),
        (True, True),
        ([0] * 20, False),
        ([0] * 19 + [1], True),
        ([0] * 12 + [1] * 7 + [0], True),
        (h5py.Empty("f"), True),  # no label: it counts as successful, and this is said
    ],
)
def test_labels_in_datasets_instead_of_attributes(tmp_path, command, cams, label, success):
    """Once for the episode, or once for each of its frames."""
    path = tmp_path / "take.hdf5"
    write_vendor(path, frames=20, fps=10.0, cameras={"wrist": (48, 64)})
    with h5py.File(path, "r+") as root:
        sentences = [root.attrs.pop("language_instruction")] * 20
        del root.attrs["success"]
        root["language_instruction"] = np.array(sentences, h5py.string_dtype())
        root["success"] = label
    run = tmp_path / "run"
    code, out, _ = command(path, "--run", run, "--calibration", cams)
    assert code == 0 and ("no label of success" in out) == isinstance(label, h5py.Empty)
    (episode,) = imported(run)
    assert episode.instruction == INSTRUCTION
    assert episode.success == success


def test_an_empty_attribute_is_none(tmp_path, command, cams):
    path = tmp_path / "take.hdf5"
    write_vendor(path, frames=20, fps=10.0, cameras={"wrist": (48, 64)})
    with h5py.File(path, "r+") as root:
        root.attrs["language_instruction"] = h5py.Empty("S9")
    code, _, err = command(path, "--run", tmp_path / "run", "--calibration", cams)
    assert code == 2 and "has no instruction" in err


def test_an_instruction_that_changes_on_the_way(tmp_path, command, cams):
    path = tmp_path / "take.hdf5"
    write_vendor(path, frames=20, fps=10.0, cameras={"wrist": (48, 64)})
    with h5py.File(path, "r+") as root:
        del root.attrs["language_instruction"]
        sentences = np.array(["open it"] * 12 + ["close it"] * 8, h5py.string_dtype())
        root["language_instruction"] = sentences
    arguments = (path, "--run", tmp_path / "run", "--calibration", cams)
    code, _, err = command(*arguments)
    assert code == 2 and "'open it' becomes 'close it' at frame 12" in err
    assert command(*arguments, "--instruction", INSTRUCTION)[0] == 0
    (episode,) = imported(tmp_path / "run")
    assert episode.instruction == INSTRUCTION


def test_a_constant_gripper_and_a_tool_elsewhere_are_said(tmp_path, command, cams):
    path = tmp_path / "take.hdf5"
    write_vendor(path, frames=30, cameras={"wrist": (48, 64)})
    change("gripper_width", lambda width: 0 * width + 0.02)(path)
    with h5py.File(path, "r+") as root:
        poses = robot_chain("panda").forward_kinematics(root["joint_positions"][()])[:, -1]
        poses[:, 2, 3] += 0.2
        root["ee_pose"] = poses
    code, out, _ = command(path, "--run", tmp_path / "run", "--calibration", cams)
    assert code == 0
    assert "never moves" in out and "0.25" in out and "never opens more than half" in out
    assert "from forward kinematics" in out


def test_another_rate_needs_another_run(tmp_path, command, cams):
    path = tmp_path / "take.hdf5"
    write_vendor(path, frames=30, cameras={"wrist": (48, 64)})
    arguments = (path, "--run", tmp_path / "run", "--calibration", cams)
    assert command(*arguments)[0] == 0
    code, _, err = command(*arguments, "--fps", 5)
    assert code == 2 and "use another --run" in err


def test_folders_that_hold_something_else(tmp_path, command):
    (tmp_path / "empty").mkdir()
    pickle = tmp_path / "rlbench/open_box/variation0/episodes/episode0/low_dim_obs.pkl"
    pickle.parent.mkdir(parents=True)
    pickle.touch()
    for folder, words in [
        (tmp_path / "empty", "neither HDF5 files"),
        (tmp_path / "rlbench", "at 20 frames a second: give --fps 20"),
        (tmp_path / "nowhere", "does not exist"),
    ]:
        code, _, err = command(folder, "--run", tmp_path / "run")
        assert code == 2 and words in err
    code, _, err = command("--run", tmp_path / "run")
    assert code == 2 and "nothing to import" in err


def test_a_file_in_use_is_not_called_broken(tmp_path):
    path = tmp_path / "take.hdf5"
    path.touch()
    locked = OSError(11, "unable to lock file, errno = 11, 'Resource temporarily unavailable'")
    assert "another program has it open" in reason_of(path, locked)
    assert "permissions" in reason_of(path, PermissionError(13, "Permission denied"))


# ------------------------------------------------------------------------------------- out
@pytest.fixture
def demos(tmp_path):
    """A folder of three episodes of different lengths, the last one failed."""
    for seed, frames in enumerate((9, 12, 10)):
        episode = make_episode(seed=5, frames=frames, size=(32, 40))[0]
        smooth = pictures(frames, 32, 40, seed)
        episode.images = {"front": smooth, "wrist": smooth[:, ::-1]}
        episode.success = seed < 2
        episode.robot = "panda"
        write_episode(tmp_path / "demos" / "lift" / f"{seed}.hdf5", episode)
    return tmp_path / "demos"


def test_acts_loader_reads_the_export(demos, tmp_path, command):
    """What ACT's get_norm_stats and EpisodicDataset access, in one stack."""
    code, out, _ = command("--to-act", demos, tmp_path / "act")
    assert (
        code == 0 and "2 episodes of 12 frames" in out and "1 failed demonstration left out" in out
    )
    assert sorted(path.name for path in (tmp_path / "act").iterdir()) == [
        "episode_0.hdf5",
        "episode_1.hdf5",
    ]
    stacks = []
    for number in range(2):
        with h5py.File(tmp_path / "act" / f"episode_{number}.hdf5", "r") as root:
            assert root.attrs["sim"]
            stacks.append([root[f"/{name}"][()] for name in ("observations/qpos", "action")])
            views = [root[f"/observations/images/{camera}"][11] for camera in ("front", "wrist")]
            assert np.stack(views).shape == (2, 32, 40, 3)
            assert root["/observations/qvel"].shape == (12, 8)
    qpos, action = np.array(stacks).transpose(1, 0, 2, 3)
    assert qpos.shape == (2, 12, 8)
    short = read_episode(demos / "lift" / "0.hdf5")
    np.testing.assert_array_equal(qpos[0, :9], short.qpos)
    np.testing.assert_array_equal(action[0, 9:], short.action[[-1] * 3])
    code, _, err = command("--to-act", demos, tmp_path / "act")
    assert code == 2 and "not empty" in err


def test_lerobot_there_and_back(demos, tmp_path, command):
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    out_folder = tmp_path / "lerobot"
    code, out, _ = command("--to-lerobot", demos, out_folder, "--failed")
    assert code == 0 and "3 episodes, 31 frames" in out
    info = json.loads((out_folder / "meta" / "info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["total_frames"] == 31
    statistics = json.loads((out_folder / "meta" / "stats.json").read_text())
    originals = [read_episode(demos / "lift" / f"{number}.hdf5") for number in range(3)]
    states = np.concatenate([episode.qpos for episode in originals])
    np.testing.assert_allclose(statistics["observation.state"]["mean"], states.mean(0), atol=1e-5)
    np.testing.assert_allclose(statistics["observation.state"]["std"], states.std(0), atol=1e-5)
    assert np.shape(statistics["observation.images.front"]["mean"]) == (3, 1, 1)

    run = tmp_path / "run"
    code, out, err = command(out_folder, "--run", run)
    assert (code, err) == (0, "") and "1 of them FAILED" in out
    episodes = imported(run, "pick_up_the_cube")
    assert [episode.success for episode in episodes] == [True, True, False]
    for ours, original in zip(episodes, originals):
        np.testing.assert_array_equal(ours.qpos, original.qpos)
        np.testing.assert_allclose(ours.action[:, :7], original.action[:, :7])
        for camera in ("front", "wrist"):
            difference = ours.images[camera].astype(int) - original.images[camera]
            assert np.abs(difference).mean() < 3
            np.testing.assert_allclose(ours.intrinsics[camera], original.intrinsics[camera])


def test_a_lerobot_dataset_of_an_older_version(tmp_path, command):
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    path = tmp_path / "old" / "meta" / "info.json"
    path.parent.mkdir(parents=True)
    path.write_text(
        json.dumps({"codebase_version": "v2.1", "features": {}, "fps": 10, "data_path": ""})
    )
    code, _, err = command(tmp_path / "old", "--run", tmp_path / "run")
    assert code == 2 and "v2.1" in err and "convert" in err


READ = """
import json, sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
data = LeRobotDataset("lab/read", root=sys.argv[1], video_backend="pyav")
frames = [data[t] for t in range(len(data))]
np.savez(
    sys.argv[2],
    state=np.stack([frame["observation.state"] for frame in frames]),
    action=np.stack([frame["action"] for frame in frames]),
    front=np.stack([frame["observation.images.front"] for frame in frames]),
    episode=np.stack([frame["episode_index"] for frame in frames]),
    task=[frame["task"] for frame in frames],
)
"""
WRITE = """
import sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
given = np.load(sys.argv[2])
height, width = given["pictures"].shape[1:3]
vector = {"dtype": "float32", "shape": (8,), "names": [f"m{i}" for i in range(8)]}
features = {
    "observation.state": vector, "action": vector,
    "observation.images.wrist": {
        "dtype": "video", "shape": (height, width, 3), "names": ["height", "width", "channels"],
    },
}
data = LeRobotDataset.create("lab/written", 10, features, root=sys.argv[1], robot_type="panda")
for start, end in ((0, 12), (12, 30)):
    for t in range(start, end):
        data.add_frame({
            "observation.state": given["qpos"][t], "action": given["qpos"][t],
            "observation.images.wrist": given["pictures"][t], "task": "pick up the cup",
        })
    data.save_episode()
data.finalize()
"""


@pytest.fixture(scope="module")
def lerobot(tmp_path_factory):
    """A Python that has LeRobot: LEROBOT_PYTHON, or an environment made here (8 GB of PyTorch)."""
    if "LEROBOT_PYTHON" in os.environ:
        yield os.environ["LEROBOT_PYTHON"]
        return
    folder = tmp_path_factory.mktemp("lerobot")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "lerobot==0.4.4"]
    made = subprocess.run(install, capture_output=True, text=True)
    if made.returncode:
        pytest.skip("LeRobot cannot be installed here: " + made.stderr[-200:])
    yield python
    shutil.rmtree(folder)


ACT_LOADER = """
import sys
sys.modules["IPython"] = type(sys)("IPython")  # ACT imports its debugger
sys.modules["IPython"].embed = None
sys.path.insert(0, sys.argv[1])
from utils import EpisodicDataset, get_norm_stats
from torch.utils.data import DataLoader
numbers = get_norm_stats(sys.argv[2], 2)
data = EpisodicDataset([0, 1], sys.argv[2], ["front", "wrist"], numbers)
images, qpos, action, is_pad = next(iter(DataLoader(data, batch_size=2)))
print(images.shape, qpos.shape, action.shape, is_pad.shape)
"""


@pytest.mark.slow
def test_acts_own_loader_reads_the_export(demos, tmp_path, command):
    """ACT is in no package index: ACT_FOLDER says where its code lies."""
    if "ACT_FOLDER" not in os.environ:
        pytest.skip("set ACT_FOLDER to a clone of ACT's repository")
    assert command("--to-act", demos, tmp_path / "act")[0] == 0
    arguments = [sys.executable, "-c", ACT_LOADER, os.environ["ACT_FOLDER"], tmp_path / "act"]
    shown = subprocess.run(arguments, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    for shape in ("2, 2, 3, 32, 40", "2, 8", "2, 12, 8", "2, 12"):
        assert f"torch.Size([{shape}])" in shown.stdout


@pytest.mark.slow
def test_lerobots_own_loader_reads_the_export(lerobot, demos, tmp_path, command):
    assert command("--to-lerobot", demos, tmp_path / "out")[0] == 0
    subprocess.run([lerobot, "-c", READ, tmp_path / "out", tmp_path / "read.npz"], check=True)
    read = np.load(tmp_path / "read.npz")
    originals = [read_episode(demos / "lift" / f"{number}.hdf5") for number in range(2)]
    for name, ours in (("state", "qpos"), ("action", "action")):
        expected = np.concatenate([getattr(episode, ours) for episode in originals])
        np.testing.assert_array_equal(read[name], expected)
    assert read["episode"].reshape(-1).tolist() == [0] * 9 + [1] * 12
    assert set(read["task"]) == {"pick up the cube"}
    shown = np.concatenate([episode.images["front"] for episode in originals]) / 255
    assert np.abs(read["front"].transpose(0, 2, 3, 1) - shown).mean() < 3 / 255


@pytest.mark.slow
def test_what_lerobot_wrote_is_imported(lerobot, tmp_path, command):
    pytest.importorskip("pyarrow")
    joints, gripper = motion(PANDA_HOME, 30)
    qpos = np.concatenate([joints, gripper[:, None]], axis=1).astype(np.float32)
    taken = pictures(30, 96, 128)
    np.savez(tmp_path / "given.npz", qpos=qpos, pictures=taken)
    subprocess.run([lerobot, "-c", WRITE, tmp_path / "set", tmp_path / "given.npz"], check=True)
    entry = {"intrinsics": [[100.0, 0, 64], [0, 100.0, 48], [0, 0, 1]]}
    entry["hand_from_camera"] = WRIST["wrist"]["hand_from_camera"]
    cams = tmp_path / "cams.json"
    cams.write_text(json.dumps({"wrist": entry}))
    code, out, err = command(tmp_path / "set", "--run", tmp_path / "run", "--calibration", cams)
    assert (code, err) == (0, "") and "2 demonstrations imported" in out
    episodes = imported(tmp_path / "run")
    assert [len(episode.qpos) for episode in episodes] == [12, 18]
    np.testing.assert_array_equal(np.concatenate([episode.qpos for episode in episodes]), qpos)
    shown = np.concatenate([episode.images["wrist"] for episode in episodes]).astype(int)
    assert np.abs(shown - taken).mean() < 6


def test_bad_mappings(tmp_path):
    path = tmp_path / "mine.yaml"
    for text, words in [
        ("joints: a\n", "'images'"),
        ("joints: a\nimages: b\ngrip: c\n", "'grip'"),
        ("joints: a\nimages: b\njoint_unit: turns\n", "joint_unit"),
        ("joints: a\nimages: b\ntimestamp_unit: days\n", "timestamp_unit"),
        ("3", "no mapping"),
        ("joints: [", "neither JSON nor YAML"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError) as caught:
            read_mapping(path)
        assert words in str(caught.value) and "mine.yaml" in str(caught.value)
