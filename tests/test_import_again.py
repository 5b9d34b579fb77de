"""import_demos.py, once more: names, what is there already, units, cameras, and its sentences."""

import json
import re

import cv2
import h5py
import numpy as np
import pytest
import yaml
from conftest import ROOT
from make_recordings import (
    PANDA_HOME,
    UR5E_HOME,
    look_from,
    motion,
    pictures,
    room_cameras,
    write_vendor,
)

import import_demos
from genima.episodes import read_episode
from genima.files import UserError
from genima.import_sources import find_lerobot, name_places, prepare
from genima.kinematics import franka_chain
from genima.labels import check_order
from genima.mapping import read_mapping
from genima.quality import examine

FRONT = {"front": (96, 128)}
FRAMES = 20


def vendor(path, cameras=FRONT, **options):
    """A vendor's file of 20 frames at 10 Hz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_vendor(path, frames=FRAMES, fps=10.0, cameras=cameras, **options)
    return path


def edit(path, **datasets):
    """Replace datasets of a file; a__b is a/b."""
    with h5py.File(path, "r+") as root:
        for name, values in datasets.items():
            name = name.replace("__", "/")
            if name in root:
                del root[name]
            root[name] = values


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def mapping(tmp_path, base="vendor", **lines):
    """The path of a ready mapping with some lines changed."""
    content = yaml.safe_load((ROOT / f"mappings/{base}.yaml").read_text()) | lines
    path = tmp_path / f"mine_{len(list(tmp_path.glob('*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def episodes(run):
    return [read_episode(path) for path in sorted(run.glob("episodes/*/*.hdf5"))]


# ------------------------------------------------------------------------- what is there already
def test_files_of_the_same_name_stay_apart(tmp_path, run, bring):
    for seed, day in enumerate(("mon", "tue")):
        vendor(tmp_path / f"in/{day}/raw/e0.hdf5", seed=seed)
    out, error = bring(tmp_path / "in", workers=2)
    assert error == "" and "2 demonstrations imported" in out
    names = [path.name for path in sorted(run.glob("episodes/*/*.hdf5"))]
    assert names == ["mon_raw_e0.hdf5", "tue_raw_e0.hdf5"]
    out, error = bring(tmp_path / "in")
    assert error == "" and "2 were there already" in out


def test_another_recording_is_not_there_already(tmp_path, run, bring):
    for seed, day in enumerate(("mon", "tue")):
        vendor(tmp_path / f"in/{day}/raw/e0.hdf5", seed=seed)
    assert bring(tmp_path / "in/mon")[1] == ""
    before = (run / "episodes/pick_up_the_cup/e0.hdf5").read_bytes()
    _, error = bring(tmp_path / "in/tue")
    assert "another recording than" in error and "tue/raw/e0.hdf5" in error
    assert str(run / "episodes/pick_up_the_cup/e0.hdf5") in error
    assert (run / "episodes/pick_up_the_cup/e0.hdf5").read_bytes() == before


def test_names_of_places(tmp_path):
    places = []
    for name in ("a/x/e.hdf5", "b/x/e.hdf5", "b/y/e.hdf5", "b/y/f.hdf5"):
        places.append(tmp_path / name)
    names = name_places(places)
    assert names == ["a_x_e", "b_x_e", "y_e", "f"]
    with pytest.raises(UserError, match="rename one of them"):
        name_places([tmp_path / "a/e.hdf5", tmp_path / "a/e.h5"])


def test_other_settings_are_not_there_already(tmp_path, run, bring):
    path = vendor(tmp_path / "a.hdf5")
    assert bring(path)[1] == ""
    assert "1 were there already" in bring(path)[0]
    moved = room_cameras(FRONT)
    moved["front"]["world_from_camera"][0][3] += 0.01
    calibration = tmp_path / "moved.json"
    calibration.write_text(json.dumps(moved))
    for options, word in [
        ({"mapping": mapping(tmp_path, gripper_range=[0, 0.1])}, "qpos"),
        ({"calibration": (str(calibration),)}, "extrinsics of front"),
        ({"gripper_length": 0.2}, "joint_poses"),
        ({"robot": "fr3"}, "7 joints of fr3"),
        ({"mapping": mapping(tmp_path, color="bgr")}, "pictures of front"),
        ({"instruction": "take the cup", "task": "pick_up_the_cup"}, "instruction"),
    ]:
        out, error = bring(path, **options)
        assert word in error and "there already" not in out, options
    assert len(episodes(run)) == 1


def test_one_run_is_of_one_robot_and_its_cameras(tmp_path, run, bring):
    vendor(tmp_path / "in/a.hdf5")
    vendor(tmp_path / "in/b.hdf5", home=UR5E_HOME)
    vendor(tmp_path / "in/c.hdf5", cameras={"front": (90, 120)})
    _, error = bring(tmp_path / "in", workers=3)
    assert "6 joints of ur5e" in error and "in/b.hdf5" in error
    assert "(90, 120)" in error and "2 demonstrations not imported" in error
    assert len(episodes(run)) == 1


# ------------------------------------------------------------------------------- the gripper's unit
GRIPPER = motion(PANDA_HOME, FRAMES)[1]  # from 1 to 0.4
OPEN = GRIPPER > 0.7


@pytest.mark.parametrize(
    ("state", "unit", "command", "command_unit"),
    [
        (100 * GRIPPER, [0, 100], OPEN * 1.0, [0, 1]),
        (255 * (1 - GRIPPER), [255, 0], ~OPEN * 1.0, [1, 0]),
        (0.08 * GRIPPER, None, np.where(OPEN, -1.0, 1.0), [1, -1]),
    ],
)
def test_a_command_in_a_unit_of_its_own(tmp_path, run, bring, state, unit, command, command_unit):
    path = vendor(tmp_path / "a.hdf5")
    edit(path, gripper_width=state, command=command)
    lines = {"gripper_range": unit, "gripper_command": "command"}
    _, error = bring(path, mapping=mapping(tmp_path, **lines))
    assert "gripper_command goes from" in error
    assert "set gripper_command_range: [closed, open]" in error
    lines["gripper_command_range"] = command_unit
    assert bring(path, mapping=mapping(tmp_path, **lines))[1] == ""
    (episode,) = episodes(run)
    np.testing.assert_allclose(episode.qpos[:, -1], GRIPPER, atol=1e-6)
    np.testing.assert_array_equal(episode.action[:, -1], OPEN)


def test_a_command_that_is_no_number(tmp_path, bring):
    path = vendor(tmp_path / "a.hdf5")
    command = OPEN * 1.0
    command[3] = np.nan
    edit(path, command=command)
    _, error = bring(path, mapping=mapping(tmp_path, gripper_command="command"))
    assert "gripper_command is NaN or infinite in frame 3" in error and "nan to" not in error


def test_one_delivery_has_one_scale(tmp_path, run, bring):
    for seed, width in enumerate((0.14, 0.08)):
        path = vendor(tmp_path / f"in/{seed}.hdf5", home=UR5E_HOME, seed=seed)
        edit(path, gripper_width=np.linspace(width, 0.04, FRAMES))
    out, error = bring(tmp_path / "in")
    assert error == "" and "divided by 0.14 m" in out
    for episode in episodes(run):
        assert episode.qpos[-1, -1] == pytest.approx(0.04 / 0.14)


def test_one_scale_also_where_one_file_is_in_another_unit(tmp_path, run, bring):
    vendor(tmp_path / "in/a.hdf5")
    edit(vendor(tmp_path / "in/b.hdf5", seed=1), gripper_width=255 * GRIPPER)
    _, error = bring(tmp_path / "in")
    assert "a.hdf5 and the other recordings: gripper goes from" in error
    assert "set gripper_range: [closed, open]" in error and not episodes(run)


def test_metres_are_not_taken_for_the_openings_of_another_file(tmp_path, run, bring):
    vendor(tmp_path / "in/a.hdf5")  # 0.032 to 0.08 m
    edit(vendor(tmp_path / "in/b.hdf5", seed=1), gripper_width=GRIPPER)
    edit(vendor(tmp_path / "in/c.hdf5", seed=2), gripper_width=np.zeros(FRAMES))
    _, error = bring(tmp_path / "in")
    assert "a.hdf5: gripper goes from" in error and "perhaps metres" in error
    assert "1 demonstration not imported" in error
    assert sorted(episode.path.stem for episode in episodes(run)) == ["b", "c"]  # closed stays so


# ------------------------------------------------------ cameras that the file itself describes
MATRIX = [[128.0, 0, 64], [0, 128.0, 48], [0, 0, 1]]
POSE = look_from([1.3, 0.5, 0.7], [0.0, 0.0, 0.4])
IN_FILE = {"intrinsics": "cam/{camera}/K", "extrinsics": "cam/{camera}/T"}


def test_poses_recorded_at_the_cameras_rate(tmp_path, run, bring):
    path = vendor(tmp_path / "a.hdf5")
    poses = np.tile(POSE, (60, 1, 1))
    poses[:, 0, 3] += np.arange(60) / 100
    many = np.repeat(pictures(FRAMES, 96, 128), 3, axis=0)
    edit(path, rgb__front=many, times__front=1000 + np.arange(60) / 30)
    edit(path, cam__front__K=MATRIX, cam__front__T=poses)
    lines = IN_FILE | {"image_timestamps": "times/{camera}"}
    assert bring(path, mapping=mapping(tmp_path, **lines), calibration=())[1] == ""
    (episode,) = episodes(run)
    np.testing.assert_allclose(episode.extrinsics["front"], poses[::3])


@pytest.mark.parametrize(
    ("matrix", "poses", "words"),
    [
        (MATRIX, POSE, ""),
        (
            MATRIX,
            np.tile(np.linalg.inv(POSE), (FRAMES, 1, 1)),
            "pose of camera 'front' is inverted",
        ),
        ([[607.0, 0, 320], [0, 606, 240], [0, 0, 1]], POSE, "128x96: give --calibration"),
        (MATRIX, np.tile(POSE, (7, 1, 1)), "has shape (7, 4, 4)"),
        (MATRIX, 2 * POSE, "its extrinsics holds a matrix"),
    ],
)
def test_cameras_in_the_file_are_checked(tmp_path, bring, matrix, poses, words):
    path = vendor(tmp_path / "a.hdf5")
    edit(path, cam__front__K=matrix, cam__front__T=poses)
    _, error = bring(path, mapping=mapping(tmp_path, **IN_FILE), calibration=())
    assert words in error and bool(error) == bool(words)
    if words:
        assert "a.hdf5" in error


# -------------------------------------------------------------------------- the right sentence
def test_a_lens_from_a_file_and_a_pose_from_the_recording(tmp_path, run, bring):
    path = vendor(tmp_path / "in/a.hdf5")
    edit(path, cam__front__T=np.tile(POSE, (FRAMES, 1, 1)))
    mine = mapping(tmp_path, **IN_FILE)
    lens = tmp_path / "lens.json"
    lens.write_text(json.dumps({"front": {"intrinsics": MATRIX, "distortion": [0.1, 0, 0, 0]}}))
    assert bring(path, mapping=mine, calibration=(str(lens),))[1] == ""
    (episode,) = episodes(run)
    np.testing.assert_allclose(episode.extrinsics["front"][0], POSE, atol=1e-6)
    np.testing.assert_allclose(episode.intrinsics["front"], MATRIX, atol=1e-6)
    with h5py.File(path) as root:  # straightened: the lens bends
        assert (episode.images["front"][0] != root["rgb/front"][0]).any()


def test_a_pose_from_a_file_and_a_lens_from_the_recording(tmp_path, run, bring):
    path = vendor(tmp_path / "in/a.hdf5")
    edit(path, cam__front__K=MATRIX)
    mine = mapping(tmp_path, **IN_FILE)
    pose = tmp_path / "pose.json"
    pose.write_text(json.dumps({"front": {"world_from_camera": POSE.tolist()}}))
    assert bring(path, mapping=mine, calibration=(str(pose),))[1] == ""
    (episode,) = episodes(run)
    np.testing.assert_allclose(episode.extrinsics["front"][0], POSE, atol=1e-6)
    np.testing.assert_allclose(episode.intrinsics["front"], MATRIX, atol=1e-6)


def test_a_calibration_counts_more_than_the_recording(tmp_path, run, bring):
    path = vendor(tmp_path / "in/a.hdf5")
    edit(path, cam__front__K=0.9 * np.array(MATRIX), cam__front__T=np.tile(POSE, (FRAMES, 1, 1)))
    mine = mapping(tmp_path, **IN_FILE)
    other = room_cameras(FRONT)
    assert bring(path, mapping=mine)[1] == ""
    (episode,) = episodes(run)
    np.testing.assert_allclose(episode.intrinsics["front"], other["front"]["intrinsics"])


def test_a_size_in_a_file_of_the_pose_says_nothing_of_the_recorded_lens(tmp_path, run, bring):
    path = vendor(tmp_path / "in/a.hdf5")
    edit(path, cam__front__K=MATRIX)
    pose = tmp_path / "pose.json"
    entry = {"size": [480, 640], "world_from_camera": POSE.tolist()}
    pose.write_text(json.dumps({"front": entry}))
    assert bring(path, mapping=mapping(tmp_path, **IN_FILE), calibration=(str(pose),))[1] == ""
    (episode,) = episodes(run)
    np.testing.assert_allclose(episode.intrinsics["front"], MATRIX, atol=1e-6)


@pytest.mark.parametrize("with_lens", [True, False])
def test_recorded_poses_in_millimetres_are_refused(tmp_path, bring, with_lens):
    path = vendor(tmp_path / "in/a.hdf5")
    poses = np.tile(POSE, (FRAMES, 1, 1))
    poses[:, :3, 3] *= 1000
    edit(path, cam__front__K=MATRIX, cam__front__T=poses)
    lens = tmp_path / "lens.json"
    lens.write_text(json.dumps({"front": {"intrinsics": MATRIX}}))
    files = (str(lens),) if with_lens else ()
    _, error = bring(path, mapping=mapping(tmp_path, **IN_FILE), calibration=files)
    assert "is it in millimetres?" in error


def test_a_fault_of_the_lens_is_its_files(tmp_path, bring):
    path = vendor(tmp_path / "in/a.hdf5")
    edit(path, cam__front__T=np.tile(POSE, (FRAMES, 1, 1)))
    lens = tmp_path / "lens.json"
    lens.write_text(json.dumps({"front": {"intrinsics": MATRIX, "size": [480, 480]}}))
    _, error = bring(path, mapping=mapping(tmp_path, **IN_FILE), calibration=(str(lens),))
    assert error.startswith(str(lens)) and "'front' was calibrated at 480x480" in error


def test_a_camera_from_one_that_moves(tmp_path, bring):
    path = vendor(tmp_path / "in/a.hdf5", cameras={"cam0": (96, 128), "cam1": (96, 128)})
    poses = np.tile(POSE, (FRAMES, 1, 1))
    edit(path, cam__cam0__K=MATRIX, cam__cam0__T=poses)
    kalibr = tmp_path / "kalibr.yaml"
    lens = {"camera_model": "pinhole", "intrinsics": [128, 128, 63.5, 47.5]}
    lens |= {"distortion_model": "radtan", "distortion_coeffs": [0, 0, 0, 0]}
    shifted = np.eye(4)
    shifted[0, 3] = 0.1
    second = lens | {"T_cn_cnm1": shifted.tolist()}
    kalibr.write_text(yaml.safe_dump({"cam0": lens, "cam1": second}))
    mine = mapping(tmp_path, **IN_FILE)
    assert bring(path, mapping=mine, calibration=(str(kalibr),))[1] == ""
    poses[:, 0, 3] += np.arange(FRAMES) / 100
    edit(path, cam__cam0__T=poses)
    _, error = bring(path, mapping=mine, calibration=(str(kalibr),))
    assert "'cam1' is given from 'cam0', which was recorded moving" in error


def test_seven_radians_are_no_degrees(tmp_path, bring):
    home = UR5E_HOME.copy()
    home[5] = 7.2
    path = vendor(tmp_path / "a.hdf5", home=home)
    _, error = bring(path)
    assert "joint 6 goes up to 7." in error and "degrees" not in error
    edit(path, joint_positions=np.degrees(motion(UR5E_HOME, FRAMES)[0]))
    assert "set joint_unit: degrees" in bring(path)[1]


@pytest.mark.parametrize(
    "names",
    [
        ["elbow joint", "shoulder-lift", "shoulderPan", "wrist1Joint", "wrist.2", "WRIST_3"],
        ["Elbow", "Shoulder", "Base", "Wrist1", "Wrist2", "Wrist3"],
    ],
)
def test_other_spellings_of_a_urs_joints(names):
    with pytest.raises(UserError, match=re.escape("q[2,1,0,3,4,5]")):
        check_order(names, "q", 6, "a.hdf5")


ALPHABET = ["elbow", "shoulder_lift", "shoulder_pan", "wrist_1", "wrist_2", "wrist_3"]


def test_joints_in_the_order_of_the_alphabet_are_refused(tmp_path, run, bring):
    path = vendor(tmp_path / "a.hdf5", home=UR5E_HOME)
    with h5py.File(path, "r+") as root:
        joints = root["joint_positions"][()]
        root["joint_positions"][...] = joints[:, [2, 1, 0, 3, 4, 5]]
        root.attrs["joint_names"] = [f"{name}_joint" for name in ALPHABET]
    _, error = bring(path)
    assert "in the order elbow_joint, shoulder_lift_joint" in error
    assert "joint_positions[2,1,0,3,4,5]" in error
    mine = mapping(tmp_path, joints="joint_positions[2,1,0,3,4,5]")
    assert bring(path, mapping=mine)[1] == ""
    (episode,) = episodes(run)
    np.testing.assert_allclose(episode.qpos[:, :-1], joints, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "joints", "columns"),
    [
        ([f"panda_joint{i}" for i in range(1, 8)], "q", ""),
        ([*(f"joint_{i}.pos" for i in range(7)), "gripper.pos"], "q[:-1]", ""),
        ({"motors": ["x", "y", "z", "roll", "pitch", "yaw", "grip"]}, "q", ""),
        ([f"m{i}" for i in (7, 6, 5, 4, 3, 2, 1)], "q", "q[6,5,4,3,2,1,0]"),
        (["gripper", *(f"joint{i}" for i in (2, 1, 3, 4, 5, 6, 7))], "q[1:]", "q[2,1,3,4,5,6,7]"),
        ([b"j1", b"j1", b"j1", b"j1", b"j1", b"j1", b"j1"], "q", ""),
        ([f"joint{i}_pos_0" for i in (7, 6, 5, 4, 3, 2, 1)], "q", "q[6,5,4,3,2,1,0]"),
        (json.dumps([f"joint{i}" for i in (2, 1, 3, 4, 5, 6, 7)]), "q", "q[1,0,2,3,4,5,6]"),
        ("joint2, joint1, joint3, joint4, joint5, joint6, joint7", "q", "q[1,0,2,3,4,5,6]"),
        ({f"joint{i}": c for c, i in enumerate((2, 1, 3, 4, 5, 6, 7))}, "q", "q[1,0,2,3,4,5,6]"),
        (np.array([[f"joint{i}" for i in (2, 1, 3, 4, 5, 6, 7)]] * 4), "q", "q[1,0,2,3,4,5,6]"),
        ([*(f"j{i}" for i in (2, 1, 3, 4, 5, 6, 7)), "finger_joint"], "q", "q[1,0,2,3,4,5,6]"),
        ([f"yumi_joint_{i}_r" for i in (1, 2, 7, 3, 4, 5, 6)], "q", ""),
        ([], "q", ""),
    ],
)
def test_names_that_tell_an_order(names, joints, columns):
    if columns:
        with pytest.raises(UserError, match=re.escape(columns)):
            check_order(names, joints, 7, "a.hdf5")
    else:
        check_order(names, joints, 7, "a.hdf5")


def test_one_nan_does_not_hide_a_tool_elsewhere(tmp_path, run, bring):
    path = vendor(tmp_path / "a.hdf5")
    poses = franka_chain().forward_kinematics(motion(PANDA_HOME, FRAMES)[0])[:, -1]
    poses[:, 1, 3] += 0.2
    poses[4] = np.nan
    edit(path, ee_pose=poses)
    assert "the recorded tool pose is up to 20.0 cm" in bring(path)[0]
    (found,) = run.glob("episodes/*/*.hdf5")
    facts, _ = examine(found, None)
    assert facts.tool_error == pytest.approx(0.2, abs=0.01)
    assert "recorded tool is up to 20.0 cm" in str(facts.out_of_bounds)


def test_tool_poses_that_are_all_nan_are_said(tmp_path, run, bring):
    path = vendor(tmp_path / "a.hdf5")
    edit(path, ee_pose=np.full((FRAMES, 4, 4), np.nan))
    assert "tool poses are all NaN" in bring(path)[0]
    (found,) = run.glob("episodes/*/*.hdf5")
    facts, _ = examine(found, None)
    assert facts.tool_error is None and "tool poses are all NaN" in str(facts.out_of_bounds)


def test_clocks_of_different_epochs(tmp_path, bring):
    path = vendor(tmp_path / "a.hdf5")
    edit(path, times__front=1.7e9 + np.arange(FRAMES) / 10)
    _, error = bring(path, mapping=mapping(tmp_path, image_timestamps="times/{camera}"))
    assert "camera 'front' (1700000000.0 to 1700000001.9 s)" in error and "do not overlap" in error


def test_timestamps_that_count_frames(tmp_path, run, bring):
    path = vendor(tmp_path / "a.hdf5")
    edit(path, timestamps=np.arange(20.0))
    assert "--source-fps where its timestamps only count" in bring(path)[1]
    assert bring(path, source_fps=10.0)[1] == ""


def test_a_picture_of_another_size_and_an_unknown_robot_are_named(tmp_path, bring):
    path = vendor(tmp_path / "a.hdf5")
    images = list(pictures(FRAMES, 96, 128))
    images[7] = images[7][::2, ::2]
    kind = h5py.vlen_dtype(np.uint8)
    with h5py.File(path, "r+") as root:
        del root["rgb/front"]
        stored = root.create_dataset("rgb/front", (FRAMES,), kind)
        for frame, image in enumerate(images):
            stored[frame] = cv2.imencode(".png", image)[1].reshape(-1)
    _, error = bring(path)
    assert "a.hdf5: camera 'front': frame 7 has shape (48, 64, 3)" in error
    _, error = bring(vendor(tmp_path / "b.hdf5"), mapping=mapping(tmp_path, robot="xArm7"))
    assert "b.hdf5: Robot 'xArm7' is not known" in error


def test_all_that_failed_are_counted(tmp_path, bring):
    for number in range(3):
        vendor(tmp_path / f"in/{number}.hdf5", cameras={"side": (96, 128)}, seed=number)
    calibration = tmp_path / "others.json"
    calibration.write_text(json.dumps(room_cameras({"front": (96, 128), "top": (96, 128)})))
    _, error = bring(tmp_path / "in", calibration=(str(calibration),))
    assert "3 demonstrations not imported" in error


def test_a_task_needs_a_name(tmp_path, run, bring):
    path = vendor(tmp_path / "a.hdf5")
    _, error = bring(path, instruction="拿起杯子")
    assert "has no Latin letters" in error and "give --task" in error
    for name in ("..", "...", "a/b", "."):
        with pytest.raises(UserError, match="give a name, not a path"):
            import_demos.check_settings(import_demos.Settings((path,), run, task=name))
    assert bring(path, instruction="拿起杯子", task="cup")[1] == ""
    assert [path.parent.name for path in run.rglob("*.hdf5")] == ["cup"]


def test_a_camera_in_millimetres_is_out_of_bounds(tmp_path, run, bring):
    bring(vendor(tmp_path / "a.hdf5"))
    (found,) = run.glob("episodes/*/*.hdf5")
    with h5py.File(found, "r+") as file:
        extrinsics = file["cameras/front/extrinsics"]
        poses = extrinsics[()]
        poses[:, :3, 3] *= 1000
        extrinsics[...] = poses
    facts, _ = examine(found, None)
    assert "may be in millimetres" in str(facts.out_of_bounds)


# ------------------------------------------------------------------------------- what is found
def test_endings_in_capitals_are_found(tmp_path, run, bring):
    vendor(tmp_path / "in/a.HDF5")
    vendor(tmp_path / "in/b.H5", seed=1)
    vendor(tmp_path / "in/c.hdf5", seed=2)
    assert "3 demonstrations imported" in bring(tmp_path / "in")[0]


def lerobot_dataset(folder, seed=0):
    """A LeRobot dataset of one episode, its pictures as PNG files in the table."""
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    from pyarrow import parquet

    joints, gripper = motion(PANDA_HOME, FRAMES, seed)
    states = np.concatenate([joints, gripper[:, None]], axis=1).tolist()
    images = []
    for picture in pictures(FRAMES, 96, 128, seed):
        images.append({"bytes": cv2.imencode(".png", picture[..., ::-1])[1].tobytes(), "path": ""})
    table = {
        "observation.state": states,
        "action": states,
        "observation.images.front": images,
        "timestamp": (np.arange(FRAMES) / 10).tolist(),
        "frame_index": list(range(FRAMES)),
        "episode_index": [0] * FRAMES,
    }
    row = {"episode_index": 0, "tasks": ["pick up the cup"], "length": FRAMES}
    row |= {"data/chunk_index": 0, "data/file_index": 0}
    for part in ("data", "meta/episodes"):
        (folder / part / "chunk-000").mkdir(parents=True)
    parquet.write_table(pa.table(table), folder / "data/chunk-000/file-000.parquet")
    rows = pa.Table.from_pylist([row])
    parquet.write_table(rows, folder / "meta/episodes/chunk-000/file-000.parquet")
    info = {
        "codebase_version": "v3.0",
        "robot_type": "panda",
        "fps": 10,
        "features": {"observation.images.front": {"dtype": "image", "shape": [96, 128, 3]}},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    }
    (folder / "meta/info.json").write_text(json.dumps(info))
    return folder


def test_datasets_beside_files_and_of_one_name(tmp_path, run, bring):
    lerobot_dataset(tmp_path / "in/mon/set")
    lerobot_dataset(tmp_path / "in/tue/set", seed=1)
    vendor(tmp_path / "in/a.hdf5", seed=2)
    out, error = bring(tmp_path / "in")
    assert error == "" and "3 demonstrations imported" in out
    names = [path.name for path in sorted(run.glob("episodes/*/*.hdf5"))]
    assert names == ["a.hdf5", "mon_set_000000.hdf5", "tue_set_000000.hdf5"]
    _, error = bring(tmp_path / "in/tue")
    assert error == ""  # its name is set_000000 where it is alone


def test_the_scale_of_a_lerobot_dataset(tmp_path):
    (source,) = find_lerobot(lerobot_dataset(tmp_path / "set"), "set", read_mapping("lerobot"))
    prepare([source])
    assert source.extremes["gripper"] == pytest.approx((0.4, 1.0))


def test_the_order_of_joints_in_a_lerobot_dataset(tmp_path, run, bring):
    folder = lerobot_dataset(tmp_path / "set")
    path = folder / "meta/info.json"
    info = json.loads(path.read_text())
    names = [*(f"joint_{i}.pos" for i in (2, 1, 3, 4, 5, 6, 7)), "gripper.pos"]
    info["features"]["observation.state"] = {"dtype": "float32", "shape": [8], "names": names}
    path.write_text(json.dumps(info))
    assert "observation.state[1,0,2,3,4,5,6]" in bring(folder)[1]
    info["features"]["observation.state"]["names"] = [*sorted(names[:-1]), "gripper.pos"]
    path.write_text(json.dumps(info))
    assert bring(folder)[1] == ""


def test_a_mapping_that_is_called_rlbench(tmp_path, run, bring):
    path = tmp_path / "rlbench.yaml"
    path.write_text((ROOT / "mappings/vendor.yaml").read_text())
    _, error = bring(vendor(tmp_path / "a.hdf5"), mapping=str(path))
    assert error == "" and len(episodes(run)) == 1


@pytest.mark.parametrize("layout", ["task/all_variations/episodes", "task/episodes"])
def test_other_layouts_of_rlbench_are_found(tmp_path, bring, layout):
    episode = tmp_path / "in" / layout / "episode0"
    episode.mkdir(parents=True)
    (episode / "low_dim_obs.pkl").touch()
    assert "is a dataset of RLBench" in bring(tmp_path / "in")[1]


def test_a_task_of_rlbench_may_be_a_link(tmp_path, bring):
    episode = tmp_path / "disk/task/variation0/episodes/episode0"
    episode.mkdir(parents=True)
    (episode / "low_dim_obs.pkl").touch()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/task").symlink_to(tmp_path / "disk/task")
    assert "is a dataset of RLBench" in bring(tmp_path / "in")[1]


def test_a_file_that_is_named_twice_is_imported_once(tmp_path, bring):
    path = vendor(tmp_path / "in/a.hdf5")
    assert "1 demonstration imported" in bring(tmp_path / "in", path)[0]


def test_a_rate_and_an_instruction_for_a_lerobot_dataset(tmp_path, run, bring):
    folder = lerobot_dataset(tmp_path / "set")
    _, error = bring(folder, source_fps=20.0, instruction="take it")
    (episode,) = episodes(run)
    assert error == "" and len(episode.qpos) == 10 and episode.task == "take_it"
