"""episodes.py --check: good demonstrations pass, each kind of bad one is named."""

import json
import os
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
from conftest import ROOT, look_at, make_episode
from make_recordings import PANDA_HOME, motion, pictures, write_vendor

import episodes
import import_demos
from genima.episodes import read_episode, write_episode
from genima.files import run_stage
from genima.kinematics import franka_chain
from genima.robots import robot_frames

FRAMES = 30
MOUNT = np.array([[1, 0, 0, 0.06], [0, 1, 0, 0], [0, 0, 1, 0.03], [0, 0, 0, 1.0]])


def make_good(seed=0, success=True):
    """A Franka's smooth demonstration at 10 Hz, with all that an importer adds."""
    episode = make_episode(seed, frames=FRAMES, size=(48, 64))[0]
    joints, opening = motion(PANDA_HOME, FRAMES, seed)
    poses = franka_chain().forward_kinematics(joints)
    episode.qpos = np.append(joints, opening[:, None], axis=1).astype(np.float32)
    episode.action = np.append(episode.qpos[1:], episode.qpos[-1:], axis=0)
    episode.action[:, -1] = opening > 0.7
    episode.joint_poses = poses.astype(np.float32)
    episode.extrinsics["front"] = np.repeat(look_at((1.3, 0.4, 0.7), (0, 0, 0.4))[None], FRAMES, 0)
    episode.extrinsics["wrist"] = poses[:, -2] @ MOUNT
    episode.images = {"front": pictures(FRAMES, 48, 64, seed), "wrist": pictures(FRAMES, 48, 64)}
    episode.success = success
    flange = poses[:, -2] @ robot_frames("panda")["flange"]
    seconds = 100 + np.arange(FRAMES) / 10
    episode.extras = {"timestamps": seconds, "timestamps_wrist": seconds, "tool_pose": flange}
    return episode


def write_good(folder, count=2):
    for seed in range(count):
        write_episode(folder / f"lift/{seed:06d}.hdf5", make_good(seed))


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a stage -> (exit code, output, errors)."""

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["stage.py", *map(str, arguments)])
        code = 0
        try:
            run_stage(main)
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err and "delete" not in err
        return code, out, "\n".join(line.split("\r")[-1] for line in err.splitlines())

    return run


def test_good_demonstrations_pass(tmp_path, command):
    write_good(tmp_path / "data")
    code, out, err = command(episodes.main, "--check", tmp_path / "data")
    assert code == 0 and ".hdf5" not in err
    assert "longest gap 0.100 s, jitter up to 0.000 s" in out
    assert "tool poses: up to 0.0 cm" in out
    assert "gripper: from 0.40 to 1.00" in out
    assert "spheres in view of front: 100%" in out


def spoil_step(episode):
    episode.qpos[12:, 2] += 0.4


def spoil_jerk(episode):
    episode.qpos[12, 2] += 0.1


def spoil_limit(episode):
    episode.action[5, 3] = 0.0


def spoil_gap(episode):
    episode.extras["timestamps"][20:] += 0.4


def spoil_jitter(episode):
    episode.extras["timestamps"][20] += 0.08
    episode.extras["timestamps"][21] += 0.08


def spoil_lag(episode):
    episode.extras["timestamps_wrist"] = episode.extras["timestamps_wrist"] + 0.2


def spoil_tool(episode):
    episode.extras["tool_pose"][:, 2, 3] += 0.05


def spoil_kinematics(episode):
    episode.joint_poses[10:, 3, 0, 3] += 0.02


def spoil_gripper_range(episode):
    episode.qpos[:, -1] *= 80


def spoil_gripper_metres(episode):
    episode.qpos[:, -1] *= 0.08


def spoil_gripper_stuck(episode):
    episode.qpos[:, -1] = 0.5


def spoil_extrinsics(episode):
    episode.extrinsics["front"] = np.linalg.inv(episode.extrinsics["front"])


def spoil_dark(episode):
    episode.images["wrist"][:] = 3


def spoil_frozen(episode):
    episode.images["front"][:] = episode.images["front"][0]


def spoil_place(episode):
    episode.extrinsics["front"][:, 1, 3] += 0.05


SPOILED = {
    spoil_step: "joint 3 turns by 0.4",
    spoil_jerk: "joint 3 jerks by",
    spoil_limit: "beyond a panda's limits in 1 frames, first in frame 5",
    spoil_gap: "a gap of 0.50 s after frame 19",
    spoil_jitter: "frame 20 is 0.08 s off its time",
    spoil_lag: "camera 'wrist' is +0.20 s off the joints",
    spoil_tool: "the recorded tool is up to 5.0 cm from forward kinematics (nearest: the flange)",
    spoil_kinematics: "joint_poses does not follow qpos",
    spoil_gripper_range: "the gripper's opening goes from 32.00 to 80.00",
    spoil_gripper_metres: "opens to 0.080 only: is that a width?",
    spoil_gripper_stuck: "the gripper is commanded, but stays at 0.50",
    spoil_extrinsics: "camera 'front' never has the arm in its picture",
    spoil_dark: "camera 'wrist' is dark",
    spoil_frozen: "camera 'front' shows the same picture throughout",
    spoil_place: "camera 'front' is 5 cm from where it is in",
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_what_is_out_of_bounds_is_named_with_its_file(tmp_path, command, spoil):
    write_good(tmp_path / "data")
    episode = make_good(7)
    spoil(episode)
    write_episode(tmp_path / "data/lift/bad.hdf5", episode)
    code, _, err = command(episodes.main, "--check", tmp_path / "data", "--json", tmp_path / "x")
    found = [line for line in err.splitlines() if "bad.hdf5" in line]
    assert code == 1 and len(found) == 1
    assert SPOILED[spoil] in found[0]
    assert "1 of 3 episodes are out of bounds." in err
    report = json.loads((tmp_path / "x").read_text())
    assert [bool(one["out_of_bounds"]) for one in report["episodes"]] == [False, False, True]


def test_duplicates_name_each_other(tmp_path, command):
    write_good(tmp_path / "data")
    shutil.copy(tmp_path / "data/lift/000001.hdf5", tmp_path / "data/lift/copy.hdf5")
    code, _, err = command(episodes.main, "--check", tmp_path / "data")
    assert code == 1 and "copy.hdf5: the same motion as in" in err and "000001.hdf5" in err


def test_the_numbers_as_json(tmp_path, command):
    write_good(tmp_path / "data")
    write_episode(tmp_path / "data/lift/failed.hdf5", make_good(5, success=False))
    (tmp_path / "data/lift/broken.hdf5").write_text("no")
    code, _, err = command(episodes.main, "--check", tmp_path / "data", "--json", tmp_path / "x")
    assert code == 2 and "1 of 4 files cannot be used" in err
    report = json.loads((tmp_path / "x").read_text())
    assert report["summary"]["episodes"] == 3 and report["summary"]["frames"] == 3 * FRAMES
    assert report["tasks"]["lift"]["success"] == pytest.approx(2 / 3)
    assert len(report["unusable"]) == 1 and "broken.hdf5" in report["unusable"][0]
    one = report["episodes"][0]
    joints, opening = motion(PANDA_HOME, FRAMES, 0)
    assert one["step"] == pytest.approx(np.abs(np.diff(joints, axis=0)).max(), abs=1e-5)
    assert one["gripper"] == pytest.approx([0.4, 1.0])
    assert one["tool_frame"] == "flange" and one["tool_error"] < 1e-5
    assert one["visible"]["front"] == [1.0] * 4
    # The wrist's camera sits beside the last joint's axis, which the tool is on.
    assert one["axis"]["wrist"] == pytest.approx(0.06, abs=1e-6)


def test_a_page_with_pictures(tmp_path, command):
    write_good(tmp_path / "data")
    episode = make_good(9)
    episode.qpos[12:, 2] += 0.4
    write_episode(tmp_path / "data/lift/<odd>.hdf5", episode)
    page = tmp_path / "report.html"
    assert command(episodes.main, "--check", tmp_path / "data", "--html", page)[0] == 1
    text = page.read_text()
    assert "&lt;odd&gt;.hdf5" in text and "<odd>" not in text
    assert text.count("data:image/jpeg;base64") == 2 * 2 * 3  # episodes, cameras, frames
    assert "joint 3 turns by" in text


def test_an_import_keeps_times_and_tool_poses(tmp_path, command):
    """A vendor's file with uneven times and tool poses 5 cm off: the report says both."""
    cams = tmp_path / "cams.json"
    intrinsics = [[60.0, 0, 32.0], [0, 60.0, 24.0], [0, 0, 1]]
    cams.write_text(
        json.dumps({"wrist": {"intrinsics": intrinsics, "hand_from_camera": np.eye(4).tolist()}})
    )
    path = tmp_path / "take.hdf5"
    write_vendor(path, frames=90, cameras={"wrist": (48, 64)})
    joints, _ = motion(PANDA_HOME, 90)
    tool = franka_chain().forward_kinematics(joints)[:, -1]
    tool[:, 0, 3] += 0.05
    with h5py.File(path, "r+") as root:
        seconds = root["timestamps"][()]
        seconds[45:] += 0.5
        root["timestamps"][...] = seconds
        root["ee_pose"] = tool
    run = tmp_path / "run"
    arguments = (path, "--run", run, "--calibration", cams, "--workers", 1)
    assert command(import_demos.main, *arguments)[0] == 0
    (imported,) = run.rglob("*.hdf5")
    extras = read_episode(imported).extras
    assert np.abs(np.diff(extras["timestamps"])).max() > 0.4
    assert np.isin(extras["timestamps"], seconds).all()
    assert np.isin(extras["tool_pose"][:, 0, 3], tool[:, 0, 3]).all()
    code, _, err = command(episodes.main, "--check", run / "episodes")
    assert code == 1 and "a gap of 0.5" in err and "5.0 cm from forward kinematics" in err


def test_many_files_are_counted_in_a_narrow_terminal(tmp_path):
    episode = make_good()
    episode.qpos[12:, 2] += 0.4
    for number in range(25):
        write_episode(tmp_path / f"data/lift/{number}.hdf5", episode)
    done = subprocess.run(
        [sys.executable, "episodes.py", "--check", tmp_path / "data"],
        cwd=ROOT,
        capture_output=True,
        env=os.environ | {"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 1
    assert max(len(line) for line in done.stdout.decode("ascii").splitlines()) <= 80
    err = done.stderr.decode("ascii")
    assert "... and 5 more: --json FILE names them all." in err
    assert "25 of 25 episodes are out of bounds." in err
