"""The real robot's loop: limits, timing and recordings without a robot; faults and a whole run
over the robot's own protocol."""

import contextlib
import errno
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import types
from functools import partial
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest

import real_robot
from genima.calibration_files import read_calibration_file
from genima.episodes import read_episode
from genima.files import UserError, run_stage
from genima.kinematics import JOINT_LIMITS, franka_chain
from genima.lens import undistort, undistortion
from real_robot import Record, Replay, Run
from robot import policy_process
from robot.arm import Fault, Franka, explain
from robot.cameras import Cameras, resize_and_crop
from robot.chunks import ChunkFollower
from robot.policy_process import Answer, PolicyProcess
from robot.recording import Recording, recover
from robot.safety import FRANKA_VELOCITY, Safety
from robot.session import stop_on_signals
from robot.workcell import Workcell, open_workcell

HOME = np.array([0.0, -0.3, 0.0, -2.2, 0.0, 1.9, 0.7853])
CAMERA = {
    "intrinsics": np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]]),
    "world_from_camera": np.eye(4),
}


# ------------------------------------------------------------------------------------- kinematics
def test_kinematics_are_the_simulators():
    from sims.mujoco_panda import PandaEnv, mujoco

    env, random = PandaEnv("reach_target", 16, images=False), np.random.default_rng(0)
    mounted = {
        "wrist": {"last_joint_from_camera": np.eye(4)},
        "front": {"world_from_camera": 2 * np.eye(4)},
    }
    chain = franka_chain(mounted)
    for joints in random.uniform(*JOINT_LIMITS["fr3"], (5, 7)):
        env.data.qpos[:7] = joints
        mujoco.mj_forward(env.model, env.data)
        poses = chain.forward_kinematics(joints)
        assert np.abs(poses - env.joint_poses()).max() < 1e-5
        assert (chain.camera_pose("wrist", poses) == poses[6]).all() and (
            chain.camera_pose("front", poses) == 2 * np.eye(4)
        ).all()


# ----------------------------------------------------------------------------------------- safety
def test_speed_is_capped_and_the_rest_of_the_way_remains():
    target = HOME + 0.1 * np.eye(7)[0]
    command, fraction = Safety(speed=0.2).limit_step(HOME, target)
    assert np.abs(command - HOME).max() == pytest.approx(0.2 * 2.175 / 10)
    assert fraction == pytest.approx(0.435)
    assert (Safety(speed=1.0).limit_step(HOME, target)[0] == target).all()
    assert Safety().limit_step(HOME, HOME)[1] == 1


@pytest.mark.parametrize("speed", [0.07, 0.1, 0.2, 1.0])
def test_no_target_is_passed_at_the_maximum_velocity(speed):
    """The planner refuses one that is above it by a rounding."""
    safety = Safety(speed=speed, workspace=(-2, -2, -2, 2, 2, 2))
    chunk = np.tile(np.append(HOME, 1.0), (8, 1))
    chunk[:, [0, 6]] += 0.3 * np.arange(1, 9)[:, None] * [1, -1]
    follower = fast_follower(safety, chunk)
    fastest = []
    for _ in range(6):
        velocity = follower.next_command()[1]
        fastest.append(np.abs(velocity / FRANKA_VELOCITY).max())
    assert speed * 0.98 < max(fastest) < speed * 0.995


def fast_follower(safety, chunk):
    """Follows a chunk from HOME on."""
    policy = types.SimpleNamespace(config={"cameras": ("front",), "image_size": (4, 4)})
    follower = ChunkFollower(policy, safety, Run(), "", None)
    follower.chunk = chunk
    follower.previous = HOME
    follower.origin = 0.0
    return follower


@pytest.mark.parametrize(
    "joint, change, words", [(0, 1.0, "jump by 1.00"), (0, np.nan, "jump by nan")]
)
def test_jumps_are_refused(joint, change, words):
    target = HOME.copy()
    target[joint] += change
    with pytest.raises(Fault, match=words):
        Safety().limit_step(HOME, target)


def test_joint_limits_have_a_margin_and_the_way_back_is_free():
    safety = Safety(speed=1.0, workspace=(-2, -2, -2, 2, 2, 2))
    edge = HOME.copy()
    edge[6] = JOINT_LIMITS["fr3"][1][6] - 0.06
    safety.limit_step(edge, edge + 0.005 * np.eye(7)[6])
    with pytest.raises(Fault, match="joint 7 at .*are allowed"):
        safety.limit_step(edge, edge + 0.03 * np.eye(7)[6])
    beyond = edge + 0.04 * np.eye(7)[6]
    safety.limit_step(beyond, beyond - 0.01 * np.eye(7)[6])
    with pytest.raises(Fault):
        safety.limit_step(beyond, beyond + 0.001 * np.eye(7)[6])


def test_the_workspace_is_a_box_around_the_fingertips():
    tool = franka_chain().forward_kinematics(HOME)[-1, :3, 3]
    down = HOME + 0.02 * np.eye(7)[1]  # leans forward: the hand sinks
    sunk = franka_chain().forward_kinematics(down)[-1, 2, 3]
    assert sunk < tool[2] - 0.001

    def box(floor):
        return (0, -1, floor, 1, 1, 1)

    Safety(workspace=box(sunk - 1e-4)).limit_step(HOME, down)
    with pytest.raises(Fault, match="outside the --workspace"):
        Safety(speed=1.0, workspace=box(sunk + 1e-4)).limit_step(HOME, down)
    Safety(workspace=box(sunk + 1e-4)).limit_step(down, HOME)


def test_other_checks():
    safety = Safety()
    for bad in (np.full((8, 8), np.nan), np.full((8, 8), np.inf), np.zeros((8, 7))):
        with pytest.raises(Fault, match="NaN or infinite"):
            safety.check_chunk(bad)
    safety.check_frames({"front": 9.8, "wrist": 9.9}, 10.0)
    with pytest.raises(Fault, match="'wrist' has sent no picture for 0.4 s"):
        safety.check_frames({"front": 9.9, "wrist": 9.6}, 10.0)
    with pytest.raises(Fault, match="silent"):
        safety.check_robot_clock(0.3)
    with pytest.raises(Fault, match="late by more than 0.5 s"):
        safety.check_watchdog(0.51)
    with pytest.raises(Fault, match="Joint 2 moves"):
        safety.check_velocity(np.array([0, -2.1, 0, 0, 0, 0, 0, 0]))
    for speed in (0, 1.5):
        with pytest.raises(UserError, match="--speed"):
            Safety(speed=speed)
    for wrong in (
        dict(workspace=(0.8, -0.5, 0, 0.2, 0.5, 1)),
        dict(workspace=(np.nan, 0, 0, 1, 1, 1)),
        dict(watchdog=np.nan),
    ):
        with pytest.raises(UserError, match="--workspace .* --watchdog"):
            Safety(**wrong)


def test_nothing_moves_unless_a_person_confirms(tmp_path, capsys):
    painted = {"front": np.zeros((8, 8, 3), np.uint8)}
    path = tmp_path / "first_target.png"
    with pytest.raises(Fault, match="nothing was sent"):
        Safety().confirm(painted, path, ask=lambda question: "n")
    assert path.exists() and "first_target.png" in capsys.readouterr().out
    Safety().confirm(painted, path, ask=lambda question: "y")
    Safety().confirm(painted, path, ask=None)


REJECTED = "libfranka: Move command rejected: command not possible in the current mode"
REFLEX = "libfranka: Move command aborted: motion aborted by reflex!"
MESSAGES = [  # as libfranka 0.21 prints them, and what the sentence has to say
    (f'{REFLEX} ["cartesian_reflex"]', "it touched something"),
    (f'{REFLEX} ["joint_velocity_violation"]', "lower --speed"),
    (f'{REJECTED} ("Reflex")!', "an earlier reflex"),
    (f'{REJECTED} ("Guiding")!', "let go of the buttons"),
    (f'{REJECTED} ("User stopped")!', "release it"),
    (f"{REJECTED} (kUserStopped)!", "release it"),
    ("libfranka: Move command aborted: User Stop pressed!", "release it"),
    (f'{REJECTED} ("Other")! Did you open the brakes?', "unlock the joints"),
    (f'{REJECTED} ("Automatic error recovery")!', "still recovering"),
    ("libfranka: Move command rejected: manual error recovery required!", "acknowledge the error"),
    ("libfranka: TCP receive: Connection reset by peer", "ended the connection"),
    ("libfranka: server closed connection", "ended the connection"),
    ("libfranka: Connection timeout. Please check your network connection", "does not answer"),
    ("libfranka: UDP receive: Timeout", "does not answer"),
    ("libfranka: Connection to FCI refused. Please install FCI feature", "activate it in Desk"),
    ("libfranka: Incompatible library version (server version: 9, library version: 10)", "wheel"),
    ("Move command rejected due to activated safety function!", "Watchman"),
]


@pytest.mark.parametrize("message, advice", MESSAGES)
def test_libfrankas_messages_get_advice_of_their_own(message, advice):
    sentence = explain(message)
    assert advice in sentence and message in sentence


def test_an_unknown_message_is_repeated():
    assert "(something new): see in Desk" in explain("something\n new")


# ------------------------------------------------------------------------ pictures and recordings
@pytest.mark.parametrize("size", [(96, 96), (120, 160), (96, 160)])
def test_resizing_keeps_what_a_pixel_sees(size):
    picture = np.zeros((480, 640, 3), np.uint8)
    picture[200:220, 400:420] = 255
    resized, intrinsics = resize_and_crop(picture, size, CAMERA["intrinsics"])
    x, y, _ = intrinsics @ np.linalg.solve(CAMERA["intrinsics"], [410, 210, 1])
    white = np.argwhere(resized[..., 0] > 128) + 0.5
    assert resized.shape == (*size, 3) and np.abs(white.mean(0) - [y, x]).max() < 0.01


@pytest.mark.parametrize("size", [None, (480, 640)])
def test_a_picture_of_the_right_size_stays(size):
    picture = np.zeros((480, 640, 3), np.uint8)
    intrinsics = CAMERA["intrinsics"]
    assert resize_and_crop(picture, size, intrinsics) == (picture, intrinsics)


ABOUT = dict(
    task="wipe",
    variation=0,
    instruction="wipe the table",
    instructions=["wipe the table"],
    robot="fr3",
    sim=False,
    seed=1,
)


def recording(path, frames, commanded=False):
    log, action = (
        Recording(path, ABOUT, {"front": CAMERA}),
        {"action": np.append(HOME, 1)} if commanded else {},
    )
    for t in range(frames):
        qpos = np.append(HOME + t / 100, 1 - t / 10)
        log.add(
            {"front": np.full((6, 8, 3), t, np.uint8)},
            time=t / 10,
            qpos=qpos,
            qvel=np.zeros(8),
            **action,
        )
    return log


def test_a_recording_becomes_an_episode(tmp_path):
    path = recording(tmp_path / "demo.hdf5", 4).finish(True)
    episode = read_episode(path)
    assert (
        episode.success
        and episode.instruction == "wipe the table"
        and (episode.images["front"][3] == 3).all()
    )
    assert (episode.action[:3, :7] == episode.qpos[1:, :7]).all() and (
        episode.action[:, 7] == 0
    ).all()  # the hand was closing
    assert (
        np.abs(episode.joint_poses - franka_chain().forward_kinematics(episode.qpos[:, :7])).max()
        < 1e-5
    )
    assert os.listdir(tmp_path) == ["demo.hdf5"]
    assert (
        read_episode(recording(tmp_path / "run.hdf5", 2, True).finish(False)).action[:, :7]
        == HOME.astype(np.float32)
    ).all()


def test_a_recording_is_never_overwritten(tmp_path):
    recording(tmp_path / "demo.hdf5", 2).finish(True)
    with pytest.raises(UserError, match="exists already"):
        recording(tmp_path / "demo.hdf5", 2)


def test_what_a_killed_program_left_is_recovered(tmp_path, capsys):
    log = recording(tmp_path / "episodes/wipe/demo.hdf5", 3)
    log.queue.put((log.frames, b"half a frame"))
    log.queue.put(None), log.writer.join()
    recover(tmp_path)  # as long as it is being recorded, nothing happens
    assert not log.path.exists()
    log.frames.close()
    recover(tmp_path)
    episode = read_episode(log.path)
    assert (
        len(episode.qpos) == 3 and not episode.success and (episode.images["front"][2] == 2).all()
    )
    assert "cut off" in capsys.readouterr().out and not log.folder.exists()
    recover(tmp_path)


def test_a_full_disk_keeps_what_there_was(tmp_path):
    log = recording(tmp_path / "episodes/wipe/demo.hdf5", 2)
    while log.queue.qsize():
        time.sleep(0.01)
    full = types.SimpleNamespace(
        write=lambda data: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left"))
    )
    log.queue.put((full, b"frame"))
    while not log.error:
        time.sleep(0.01)
    for more in (lambda: log.add({}), lambda: log.finish(True)):
        with pytest.raises(OSError, match="No space"):
            more()
    recover(tmp_path)
    assert len(read_episode(log.path).qpos) == 2


def test_large_episodes_are_written_frame_by_frame(tmp_path, monkeypatch):
    monkeypatch.setattr("genima.files.LARGE", 100)
    episode = read_episode(recording(tmp_path / "demo.hdf5", 3).finish(True))
    assert (episode.images["front"][2] == 2).all()
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=10))
    log = recording(tmp_path / "more.hdf5", 3)
    with pytest.raises(OSError) as error:
        log.finish(True)
    assert error.value.errno == errno.ENOSPC and log.folder.exists() and not log.path.exists()


# ------------------------------------------------------------------------------ the loop's timing
class Arm:
    """Is at once where it is sent."""

    def __init__(self):
        self.joints = HOME.copy()
        self.sent = []  # joint 1's commands
        self.velocities = []
        self.opened = []
        self.braked = []  # after how many commands

    def state(self):
        return time.monotonic(), np.append(self.joints, 1), np.zeros(8)

    def send(self, joints, velocity):
        self.joints = joints
        self.velocities.append(velocity[0])
        self.sent.append(joints[0])

    def grip(self, opened):
        self.opened.append(opened)

    def brake(self):
        self.braked.append(len(self.sent))


class Eyes:
    """Pictures of this moment, or older ones."""

    def __init__(self, age=0.0):
        self.age = age

    def read_frames(self):
        return {"front": time.monotonic() - self.age}, {"front": np.zeros((4, 4, 3), np.uint8)}


class Ramp:
    """A policy that raises joint 1 by 0.01 rad a step and answers after `seconds`: any pause or
    repetition shows."""

    config = {"cameras": ("front",), "image_size": (4, 4), "horizon": 8}

    def __init__(self, seconds):
        self.seconds = seconds
        self.due = None
        self.steps = []

    def request(self, images, qpos, instruction, progress):
        self.due = time.monotonic() + self.seconds
        self.steps.append(progress)
        first = (
            qpos[0] - HOME[0] + (0.01 if progress == 0 else 0)
        )  # action 0 is the one that was under way
        chunk = np.tile(np.append(HOME, 0.0), (8, 1))
        chunk[:, 0] += first + 0.01 * np.arange(8)
        self.answer = Answer(chunk, images, self.seconds)

    def receive(self, timeout=0.0):
        if timeout:
            time.sleep(self.seconds)
        if self.due and time.monotonic() >= self.due:
            self.due = None
            return self.answer
        return None


class Log:
    def __init__(self, path):
        self.path = path
        self.events = []
        self.count = 0

    def add(self, images, painted, **values):
        self.count += 1

    def event(self, text):
        self.events.append(text)


def loop(tmp_path, policy, safety=None, steps=30, eyes=None, log=None, is_over=None, **settings):
    arm = Arm()
    log = log or Log(tmp_path / "log.hdf5")
    safety = safety or Safety(speed=1.0)
    eyes = eyes or Eyes()
    is_over = is_over or real_robot.never
    real_robot.drive(arm, eyes, policy, safety, log, Run(**settings), "", steps, is_over)
    return arm


def test_chunks_follow_one_another_without_a_pause(tmp_path):
    policy = Ramp(0.03)
    arm = loop(tmp_path, policy)
    assert np.allclose(arm.sent, 0.01 * np.arange(1, 31))  # no step twice, none left out
    assert policy.steps[1:6] == [0, 8, 15, 22, 29]  # one look for every seven steps
    assert not any(arm.opened)
    assert (
        np.allclose(arm.velocities[1:6], 0.1) and arm.velocities[7] == 0
    )  # passes its targets, and rests where a chunk ends


def test_the_horizon_can_be_set_and_a_slower_policy_is_asked_earlier(tmp_path):
    policy = Ramp(0.03)
    assert np.allclose(
        loop(tmp_path, policy, execution_horizon=4, steps=12).sent, 0.01 * np.arange(1, 13)
    )
    assert policy.steps[1:4] == [0, 5, 9]
    slow = Ramp(0.13)
    sent = loop(tmp_path, slow, steps=26).sent
    assert slow.steps[3] - slow.steps[2] == 6  # asked a step earlier, once it is known to be slow
    assert np.allclose(np.diff(sent), 0.01, atol=0.011)


def test_the_age_of_a_picture_is_made_up_for(tmp_path):
    sent = np.array(loop(tmp_path, Ramp(0.03), steps=20, eyes=Eyes(0.05)).sent)
    # The fake arm was a step further back when the picture was taken, and the chunk begins there:
    # half a step later in the chunk.
    assert np.allclose(np.diff(sent), 0.01, atol=0.0055) and (np.diff(sent) > 0).all()


def test_a_slow_arm_plays_the_chunk_slowly(tmp_path):
    sent = loop(tmp_path, Ramp(0.03), Safety(speed=0.005 / 0.2175), steps=30).sent
    assert np.allclose(sent, 0.005 * np.arange(1, 31))  # half a step at a time


def test_the_watchdog_stops_a_policy_that_is_late(tmp_path):
    policy = Ramp(0.03)
    receive = policy.receive
    policy.receive = lambda timeout=0.0: receive(timeout) if len(policy.steps) < 4 else None
    with pytest.raises(Fault, match="late"):
        loop(tmp_path, policy, Safety(speed=1.0, watchdog=0.3))


def test_the_policy_may_take_its_time_before_the_arm_moves(tmp_path):
    """A busy laptop: the first answers are later than the watchdog allows in motion."""
    policy = Ramp(0.03)
    request = policy.request

    def slow_at_rest(images, qpos, instruction, progress):
        policy.seconds = 0.4 if progress == 0 else 0.03
        request(images, qpos, instruction, progress)

    policy.request = slow_at_rest
    arm = loop(tmp_path, policy, Safety(speed=1.0, watchdog=0.3), steps=12)
    assert len(arm.sent) == 12


class PausingEyes(Eyes):
    """A camera that sends nothing for a while, once, when the arm is on its way."""

    def __init__(self, log, seconds):
        super().__init__()
        self.log = log
        self.seconds = seconds
        self.stopped = None

    def read_frames(self):
        stamps, images = super().read_frames()
        if self.log.count >= 10:
            if self.stopped is None:
                self.stopped = stamps["front"]
            if stamps["front"] < self.stopped + self.seconds:
                stamps["front"] = self.stopped
        return stamps, images


def test_a_camera_that_pauses_makes_the_arm_hold_and_continue(tmp_path):
    log = Log(tmp_path / "log.hdf5")
    arm = loop(tmp_path, Ramp(0.03), eyes=PausingEyes(log, 1.2), log=log)
    assert len(arm.sent) == 30 and len(arm.braked) == 1
    assert 8 < arm.braked[0] < 14  # at most 0.25 s, not after the pause
    assert any("paused: Camera 'front' has sent no picture" in event for event in log.events)
    assert np.abs(np.diff(arm.sent)).max() < 0.025  # it continues where it held


def test_a_camera_that_does_not_come_back_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(real_robot, "CAMERA_PAUSE", 0.3)
    log = Log(tmp_path / "log.hdf5")
    with pytest.raises(Fault, match="'front' has sent no picture"):
        loop(tmp_path, Ramp(0.03), eyes=PausingEyes(log, 60), log=log)


def test_enter_ends_a_run(tmp_path):
    """It is pressed once, and read once."""
    typed = iter([False] * 5 + [True])
    arm = loop(tmp_path, Ramp(0.03), is_over=lambda: next(typed, False))
    assert len(arm.sent) == 5


def test_dry_run_sends_nothing(tmp_path):
    assert not loop(tmp_path, Ramp(0.03), steps=10, dry_run=True).sent


# ----------------------------------------------------------------------------- cameras, bad input
def test_cameras_that_are_not_there_are_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyrealsense2", None)
    with pytest.raises(UserError, match="pyrealsense2 is not installed"):
        Cameras({"front": "1"})
    monkeypatch.setitem(sys.modules, "pyrealsense2", fake_realsense([], serials=()))
    with pytest.raises(UserError, match="no RealSense camera 1 for 'front'; connected are: none"):
        Cameras({"front": "1"})


TIMEOUT = RuntimeError("Frame didn't arrive within 1000")


def fake_realsense(events, serials=("1",)):
    """pyrealsense2 whose camera gives these frames and errors, one every 10 ms, then waits."""
    devices = [
        types.SimpleNamespace(get_info=lambda _, serial=serial: serial) for serial in serials
    ]
    config = types.SimpleNamespace(enable_device=lambda _: None, enable_stream=lambda *_: None)
    waiting = iter(events)

    def wait_for_frames(_):
        time.sleep(0.01)
        event = next(waiting, None)
        if event is None:
            time.sleep(0.1)
            raise TIMEOUT
        if isinstance(event, Exception):
            raise event
        data = np.full((480, 640, 3), event, np.uint8)
        frame = types.SimpleNamespace(get_data=lambda: data)
        return types.SimpleNamespace(get_color_frame=lambda: frame)

    pipeline = types.SimpleNamespace(
        start=lambda _: None, wait_for_frames=wait_for_frames, stop=lambda: None
    )
    return types.SimpleNamespace(
        context=lambda: types.SimpleNamespace(query_devices=lambda: devices),
        camera_info=types.SimpleNamespace(serial_number=0),
        config=lambda: config,
        stream=types.SimpleNamespace(color=0),
        format=types.SimpleNamespace(rgb8=0),
        pipeline=lambda: pipeline,
    )


def wait_for(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_newest_picture_is_read_and_a_failing_camera_is_a_fault(monkeypatch):
    failure = RuntimeError("Device disconnected")
    monkeypatch.setitem(sys.modules, "pyrealsense2", fake_realsense([1, 2] + [3] * 5 + [failure]))
    cameras = Cameras({"front": "1"})
    wait_for(lambda: cameras.newest["front"][1][0, 0, 0] == 3)
    stamps, images = cameras.read_frames()
    assert (images["front"] == 3).all() and 0 < time.monotonic() - stamps["front"] < 1
    wait_for(lambda: cameras.errors)
    with pytest.raises(Fault, match="'front' failed .*disconnected.*cable"):
        cameras.read_frames()


def test_a_camera_may_be_slow_to_start_and_may_pause(monkeypatch):
    """librealsense raises for every second without a picture, and then the pictures come."""
    events = [TIMEOUT, TIMEOUT, 1, TIMEOUT, 2]
    monkeypatch.setitem(sys.modules, "pyrealsense2", fake_realsense(events))
    cameras = Cameras({"front": "1"})
    wait_for(lambda: cameras.newest["front"][1][0, 0, 0] == 2)
    assert (cameras.read_frames()[1]["front"] == 2).all()
    cameras.close()


def test_a_camera_that_never_starts_is_a_fault(monkeypatch):
    monkeypatch.setattr("robot.cameras.FIRST_FRAME", 0.2)
    monkeypatch.setitem(sys.modules, "pyrealsense2", fake_realsense([]))
    with pytest.raises(Fault, match="'front' has sent no picture for 0.2 s: check its cable"):
        Cameras({"front": "1"})


class FakeCapture:
    """OpenCV's VideoCapture of two views side by side: red left, blue right, in BGR."""

    opened = []

    def __init__(self, device):
        self.device = device
        self.opened.append(device)
        self.reads = 0
        self.released = False

    def isOpened(self):
        return self.device != 9

    def set(self, name, value):
        pass

    def read(self):
        time.sleep(0.005)
        self.reads += 1
        if self.reads == 1:
            return False, None  # as a camera that is not awake
        frame = np.zeros((4, 10, 3), np.uint8)
        frame[:, :5, 2] = 255
        frame[:, 5:, 0] = 255
        return True, frame

    def release(self):
        self.released = True


def test_opencv_cameras_and_two_views_in_one_picture(monkeypatch):
    monkeypatch.setattr(FakeCapture, "opened", [])
    monkeypatch.setattr("cv2.VideoCapture", FakeCapture)
    sources = {
        "right": "opencv:0:right",
        "left": "opencv:0:left",
        "wrist": "opencv:/dev/video2",
    }
    cameras = Cameras(sources)
    assert sorted(FakeCapture.opened, key=str) == ["/dev/video2", 0]  # the ZED once, not twice
    stamps, images = cameras.read_frames()
    assert list(images) == list(sources) and stamps["left"] == pytest.approx(stamps["right"], abs=1)
    assert images["wrist"].shape == (4, 10, 3) and images["left"].shape == (4, 5, 3)
    assert (images["left"] == [255, 0, 0]).all() and (images["right"] == [0, 0, 255]).all()
    first = stamps["wrist"]
    wait_for(lambda: cameras.read_frames()[0]["wrist"] > first)  # a thread reads on
    cameras.close()


@pytest.mark.parametrize("model", ["brown", "inverse_brown_conrady", "fisheye"])
def test_pictures_are_straightened_as_the_import_does_it(tmp_path, monkeypatch, model):
    """Both views of a device, each by its own lens; one without distortion stays as it is."""
    random = np.random.default_rng(0)
    taken = cv2.GaussianBlur(random.integers(0, 256, (48, 128, 3), np.uint8), (7, 7), 0)
    monkeypatch.setattr(FakeCapture, "read", lambda self: (True, taken))
    monkeypatch.setattr("cv2.VideoCapture", FakeCapture)
    path = tmp_path / "cameras.yaml"
    entry = {"intrinsics": [[50.0, 0, 32], [0, 50, 24], [0, 0, 1]]}
    entry["world_from_camera"] = np.eye(4).tolist()
    bent = entry | {"distortion": [0.2, -0.1, 0.0, 0.0], "distortion_model": model}
    path.write_text(json.dumps({"left": bent, "right": entry}))
    sources = ("left=opencv:0:left", "right=opencv:0:right")
    settings = Run(robot="10.0.0.1", calibration=path, cameras=sources, instruction="wipe")
    workcell = Workcell(settings)
    images = workcell.read_frames()[1]
    workcell.close()
    rgb = cv2.cvtColor(taken, cv2.COLOR_BGR2RGB)
    camera = read_calibration_file(path)["left"]
    expected = undistort(rgb[:, :64], undistortion(camera, camera.intrinsics, (48, 64)))
    assert (images["left"] == expected).all() and (images["right"] == rgb[:, 64:]).all()
    assert np.abs(images["left"].astype(int) - rgb[:, :64]).mean() > 3


def test_opencv_cameras_that_cannot_be_opened_are_one_sentence(monkeypatch):
    monkeypatch.setattr("cv2.VideoCapture", FakeCapture)
    with pytest.raises(UserError, match="OpenCV cannot open camera '9' for 'front'"):
        Cameras({"front": "opencv:9"})
    for source in ("opencv:", "usb:3"):
        with pytest.raises(UserError, match=f"'{source}' is no camera"):
            Cameras({"front": source})


def test_serial_numbers_as_names_in_a_calibration_file_are_text(tmp_path, monkeypatch):
    path = tmp_path / "cameras.yaml"
    path.write_text(
        "832112070001:\n  intrinsics: [[500, 0, 320], [0, 500, 240], [0, 0, 1]]\n"
        "  world_from_camera: [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]\n"
    )
    fake = fake_realsense([1], serials=("832112070001",))
    monkeypatch.setitem(sys.modules, "pyrealsense2", fake)
    cameras = ("832112070001=832112070001",)
    settings = Run(robot="10.0.0.1", calibration=path, cameras=cameras, instruction="wipe")
    workcell = Workcell(settings)
    workcell.close()
    assert list(workcell.calibration) == ["832112070001"]


@pytest.mark.parametrize("typed, words", [("", "Not confirmed"), ("y", "before its first step")])
def test_a_run_that_ends_at_once_is_one_sentence(tmp_path, monkeypatch, capsys, typed, words):
    """Nobody at the keyboard, or Enter typed too early: nothing was sent, nothing is left, nothing
    is a traceback."""

    def answer(_):
        if not typed:
            raise EOFError
        return typed

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("robot.session.Franka", lambda host, safety: arm)
    arm, eyes = Arm(), Eyes()
    arm.hold = lambda: arm.sent.append("held")
    vars(eyes).update(
        simulated=False,
        calibration={"front": CAMERA},
        host="",
        variation=0,
        seed=0,
        max_steps=9,
        is_over=lambda: True,
        instruction="wipe",
    )
    with pytest.raises(Fault, match=words):
        real_robot.run_episode(Run(run=tmp_path, robot="10.0.0.1"), Ramp(0.03), eyes)
    assert arm.sent == ["held"] and [path.name for path in tmp_path.glob("robot/*/*")] == [
        "first_target.png"
    ]


def test_a_policy_that_does_not_load_is_one_sentence(monkeypatch):
    monkeypatch.setattr(policy_process, "LOADING", 0.01)
    with pytest.raises(Fault, match="not loaded within"):
        PolicyProcess(partial(time.sleep, 60))


def test_bad_input_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no checkpoint .*demonstrator"):
        real_robot.run(Run(run=tmp_path))
    with pytest.raises(UserError, match="simulated scene alone"):
        real_robot.run(Run(run=tmp_path, robot="10.0.0.1", policy="demonstrator"))
    with pytest.raises(UserError, match="--episodes"):
        real_robot.run(Run(run=tmp_path, robot="10.0.0.1", episodes=2))
    with pytest.raises(UserError, match="no simulated camera 'nose'"):
        real_robot.record(Record(run=tmp_path, cameras=("nose",)))
    with pytest.raises(UserError, match="--cameras name=serial"):
        Workcell(Run(robot="10.0.0.1"))
    with pytest.raises(UserError, match="No connection to the robot at 127.0.0.99"):
        Franka("127.0.0.99", Safety())
    log = recording(tmp_path / "demo.hdf5", 2).finish(True)
    with pytest.raises(UserError, match="no painted targets"):
        real_robot.replay(Replay(log))


# ------------------------------------------------------------------ over the robot's own protocol
class Sweep:
    """Policy for tests: swings joint 1 by 0.4 rad and back in three seconds; what goes wrong
    does so after a second."""

    def __init__(self, fault, size):
        self.fault, self.size, self.first, self.begun = fault, size, None, None

    def __call__(self):  # in the policy's process
        return {
            "cameras": ("wrist", "front", "right_shoulder", "left_shoulder"),
            "image_size": (self.size,) * 2,
            "horizon": 8,
        }, self.act

    def act(self, images, qpos, instruction, step):
        self.first = qpos if self.first is None else self.first
        chunk = np.tile(np.append(self.first[:7], 1.0), (8, 1))
        chunk[:, 0] += 0.2 * (1 - np.cos(2 * np.pi / 30 * (max(step - 1, 0) + np.arange(8))))
        if step > 10:
            self.begun = step if self.begun is None else self.begun
            if self.fault == "NaN":
                chunk[3, 2] = np.nan
            elif self.fault == "limit":
                chunk[:, 6] += 0.1 * (step - self.begun + np.arange(8))
            elif self.fault == "jump":
                chunk[:, 0] += 1.0
            elif self.fault == "raises":
                raise ValueError("out of memory")
            elif self.fault == "late":
                time.sleep(5)
            elif self.fault == "gripper":
                chunk[:, 7] = 0
        return chunk, images


def hand_that_fails():
    """In the arm's process: the hand answers that it could not do what it was told."""
    from franky_sim.franka_gripper_protocol import GripperCommand, GripperCommandStatus
    from franky_sim.franka_gripper_server import BaseCommand, FrankaGripperServer

    def refuse(self, width, speed, force, inner, outer, command_id, tcp_socket):
        BaseCommand.send_response(
            tcp_socket,
            GripperCommand.kGrasp,
            command_id,
            GripperCommandStatus.kUnsuccessful,
            command_type_struct="H",
            status_type_struct="H",
        )

    FrankaGripperServer.start_grasp = refuse


def program(settings, load, workcell, output, largest):
    """The command line's process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also in a shell's background
    stop_on_signals()
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    run_stage(lambda: real_robot.run(settings, load, workcell))


class Speeds:
    """How fast the arm's fastest joint was, all the time."""

    def __init__(self, workcell):
        self.rows = []
        self.workcell = workcell
        self.over = threading.Event()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        while not self.over.wait(0.005):
            self.rows.append((time.monotonic(), self.workcell.get("speed")))

    def rest_after(self, moment, until=np.inf):
        """Seconds from a moment until the arm was at rest (below 0.05 rad/s) for good."""
        times, speeds = np.array(self.rows).T
        speeds = speeds[times < until]
        times = times[times < until]
        assert times[-1] > moment + 0.5
        return max(times[speeds > 0.05].max() - moment, 0)


FAULTS = {  # what the sentence has to say; None where the program cannot speak any more
    "NaN": "NaN or infinite",
    "limit": "joint 7 at",
    "jump": "joint 1 to jump by 1",
    "raises": "out of memory",
    "late": "late by more than",
    "gripper": "gripper did not close",
    "server killed": "silent",
    "server frozen": "silent",
    "cameras frozen": "has sent no picture",
    "Ctrl-C": "Stopped",
    "SIGTERM": "Stopped",
    "SIGHUP": "Stopped",
    "disk full": "disk is full",
    "kill -9": None,
}
FAST = ("NaN", "SIGTERM", "SIGHUP", "kill -9")
EXIT_CODES = {"kill -9": -9, "Ctrl-C": 130, "SIGTERM": 130, "SIGHUP": 130}


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=() if f in FAST else pytest.mark.slow) for f in FAULTS]
)
def test_a_fault_stops_the_arm_and_says_why(fault, tmp_path):
    from sims.franky_panda import SimulatedWorkcell

    prepare = hand_that_fails if fault == "gripper" else None
    workcell = SimulatedWorkcell("reach_target", 500_000, prepare=prepare)
    output = tmp_path / "output.txt"
    run = tmp_path / "run"
    largest = 1_500_000 if fault == "disk full" else 0  # bytes of a file
    arguments = (Run(run=run, steps=60), Sweep(fault, 64), workcell, output, largest)
    process = multiprocessing.get_context("spawn").Process(target=program, args=arguments)
    speeds = Speeds(workcell)
    try:
        process.start()
        end = time.monotonic() + 60
        while workcell.get("speed") < 0.2 and time.monotonic() < end:
            time.sleep(0.005)
        assert time.monotonic() < end, output.read_text()
        time.sleep(0.3)
        arm, cameras = [child.pid for child in workcell.processes]
        signals = {
            "server killed": (arm, signal.SIGKILL),
            "server frozen": (arm, signal.SIGSTOP),
            "cameras frozen": (cameras, signal.SIGSTOP),
            "Ctrl-C": (process.pid, signal.SIGINT),
            "SIGTERM": (process.pid, signal.SIGTERM),
            "SIGHUP": (process.pid, signal.SIGHUP),
            "kill -9": (process.pid, signal.SIGKILL),
        }
        begin = time.monotonic()
        if fault in signals:
            os.kill(*signals[fault])
        process.join(30)
        words = output.read_text()
        if fault == "server frozen":
            os.kill(arm, signal.SIGCONT)
        assert process.exitcode == EXIT_CODES.get(fault, 2), words
        if FAULTS[fault]:
            assert FAULTS[fault] in words and "Traceback" not in words
        if fault in ("kill -9", "disk full"):
            recover(run)
        (path,) = run.glob("robot/*/log.hdf5")
        episode = read_episode(path)
        assert len(episode.qpos) > 5 and not episode.success
        assert set(episode.images) == set(workcell.cameras)
        until = np.inf
        lines = bytes(episode.extras["events"]).decode().splitlines()
        last = json.loads(lines[-1])
        if fault == "disk full":
            begin = episode.extras["time"][-1] + 0.1
        elif fault not in signals:
            begin = last["time"]
            assert last["event"].startswith("stopped")
        elif fault == "cameras frozen":
            # It pauses first. Two seconds later the connection ends, and the simulated arm moves
            # by what it sags, since franky-sim's server then holds the measured position.
            assert json.loads(lines[-2])["event"].startswith("paused")
            until = last["time"]
        # Without its server the simulated arm is gone.
        if fault not in ("server killed", "server frozen"):
            time.sleep(max(begin + 0.6 - time.monotonic(), 0))
            assert speeds.rest_after(begin, until) < 0.5
    finally:
        speeds.over.set()
        process.kill()
        workcell.close()


def children_of(pid):
    """The processes that this one has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("what", ["policy", "workcell"])
def test_processes_end_when_their_parent_is_killed(what):
    from sims.franky_panda import SimulatedWorkcell

    target, arguments, count = PolicyProcess, (partial(time.sleep, 600),), 1
    if what == "workcell":
        target, arguments, count = keep, (SimulatedWorkcell, "reach_target", 500_000), 2
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    wait_for(lambda: len(children_of(process.pid)) >= count, 60)
    time.sleep(3)  # they are loading; what they load must not delay their end
    children = children_of(process.pid)
    process.kill()
    process.join()
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children), 5)


def keep(make, *arguments):
    """Make something, and keep it."""
    kept = make(*arguments)
    time.sleep(600)
    return kept


def test_hold_waits_for_a_lost_connection():
    """libfranka's thread goes on for a second; a program that ends before it dies with SIGABRT."""
    from sims.franky_panda import SimulatedWorkcell

    workcell = SimulatedWorkcell("reach_target", 500_000)
    robot = Franka(workcell.host, Safety())
    robot.send(robot.state()[1][:7] + 0.3, np.zeros(7))
    time.sleep(0.2)
    workcell.close()
    time.sleep(0.3)
    robot.hold()
    held = not robot.robot.is_in_control
    time.sleep(1.5)  # whatever was found, this process has to go on
    with contextlib.suppress(Exception):
        robot.robot.join_motion()
    assert held


def test_a_rehearsal_takes_the_cameras_under_the_policys_names():
    """Data of a lab has cameras of its own names; the simulator has four."""
    settings = Run(task="reach_target", seed=500_000, cameras=("hand_cam=wrist", "room 2=front"))
    with contextlib.closing(open_workcell(settings)) as workcell:
        assert list(workcell.calibration) == ["hand_cam", "room 2"]
        assert "last_joint_from_camera" in workcell.calibration["hand_cam"]
        assert "world_from_camera" in workcell.calibration["room 2"]
        end = time.monotonic() + 30
        while min(workcell.read_frames()[0].values()) == 0 and time.monotonic() < end:
            time.sleep(0.01)
        images = workcell.read_frames()[1]
        env = workcell.make_scene()
        for name, view in (("hand_cam", "wrist"), ("room 2", "front")):  # the arm sags a little
            difference = images[name].astype(int) - env.render_camera(view, 64, 64)
            assert np.abs(difference).mean() < 4
        assert np.abs(images["hand_cam"].astype(int) - images["room 2"]).mean() > 10


def test_the_arm_follows_a_chunk_at_a_low_speed():
    """Every command is as fast as --speed allows, in two joints, one up and one down."""
    from sims.franky_panda import SimulatedWorkcell

    workcell = SimulatedWorkcell("reach_target", 500_000)
    safety = Safety(speed=0.1, workspace=(-2, -2, -2, 2, 2, 2))
    robot = Franka(workcell.host, safety)
    try:
        start = robot.state()[1][:7]
        chunk = np.tile(np.append(start, 1.0), (8, 1))
        chunk[:, [0, 5]] += 0.03 * np.arange(1, 9)[:, None] * [1, -1]
        follower = fast_follower(safety, chunk)
        follower.previous = start
        for _ in range(8):
            command, velocity, _ = follower.next_command()
            robot.send(command, velocity)
            time.sleep(0.1)
            reached = robot.state()[1][:7]
        assert np.abs(reached - command).max() < 0.03
        assert np.abs(reached - start).max() > 0.08
    finally:
        robot.hold()
        workcell.close()


def test_a_run_over_the_protocol_and_its_film(tmp_path, capsys):
    settings = Run(run=tmp_path, task="push_button", seed=500_001, policy="demonstrator")
    real_robot.run(settings)
    (path,) = tmp_path.glob("robot/*/log.hdf5")
    episode = read_episode(path)
    assert episode.success and episode.sim and "done" in capsys.readouterr().out
    assert (path.parent / "timing.png").exists() and (path.parent / "first_target.png").exists()
    assert (
        set(episode.extras) >= {"painted_front", "late", "reached", "events"}
        and np.ptp(episode.extras["painted_front"]) > 0
    )
    real_robot.replay(Replay(path.parent, keep=True))
    assert (
        path.parent / "film.mp4"
    ).stat().st_size > 1000 and "a new target" in capsys.readouterr().out
    (kept,) = tmp_path.glob("episodes/push_button/*.hdf5")
    assert read_episode(kept).instruction == episode.instruction
    with pytest.raises(UserError, match="added before"):
        real_robot.replay(Replay(path.parent, keep=True))


def test_a_demonstration_is_recorded(tmp_path):
    path = real_robot.record(Record(run=tmp_path, task="push_button", seed=500_001, size=32))
    episode = read_episode(path)
    assert (
        episode.success
        and (np.diff(episode.extras["frame"]) > 0).all()
        and episode.images["front"].shape[1:] == (32, 32, 3)
    )
    from genima.kinematics import Chain

    chain = Chain.from_episode(episode)  # cameras and joints agree with one another
    assert set(chain.mounted) == {"wrist"} and len(chain.fixed) == 3
    assert np.abs(episode.action[:-1, :7] - episode.qpos[1:, :7]).max() < 1e-6


@pytest.mark.slow
def test_five_minutes_of_large_pictures(tmp_path):
    """Two cameras, 480x640, ten times a second: no frame is lost, and memory stays below 2 GB."""
    settings = Record(run=tmp_path, cameras=("front", "wrist"), seconds=300.0)
    path = real_robot.record(settings)
    episode = read_episode(path, images=False)
    with h5py.File(path, "r") as file:
        frames = file["extras/frame"][()]  # when its pictures were taken
    assert (np.diff(frames) > 0).all() and abs(
        frames[-1] - frames[0] - settings.seconds
    ) < 0.5  # one of each round, none left out
    assert len(episode.qpos) == settings.seconds * 10 and episode.image_sizes["front"] == (480, 640)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2e6  # kB
