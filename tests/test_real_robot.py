"""The real robot's loop: limits, timing and recordings without a robot; faults and a whole run over the robot's own protocol."""

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

import h5py
import numpy as np
import pytest
from robot import arm as robot_io

import real_robot
from genima.episodes import read_episode
from genima.files import UserError, run_stage
from genima.kinematics import JOINT_LIMITS, franka_chain
from real_robot import Fault, Record, Replay, Run, Safety
from robot.arm import fit
from robot.recording import Recording, recover

HOME = np.array([0.0, -0.3, 0.0, -2.2, 0.0, 1.9, 0.7853])
CAMERA = {
    "intrinsics": np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]]),
    "world_from_camera": np.eye(4),
}


# ------------------------------------------------------------------------------------------------------------- kinematics
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


# ----------------------------------------------------------------------------------------------------------------- safety
def test_speed_is_capped_and_the_rest_of_the_way_remains():
    wish = HOME + 0.1 * np.eye(7)[0]
    command, share = Safety(speed=0.2).step(HOME, wish)
    assert np.abs(command - HOME).max() == pytest.approx(
        0.2 * 2.175 / 10
    ) and share == pytest.approx(0.435)
    assert (Safety(speed=1.0).step(HOME, wish)[0] == wish).all()
    assert Safety().step(HOME, HOME)[1] == 1


@pytest.mark.parametrize(
    "joint, wish, words", [(0, 1.0, "jump by 1.00"), (0, np.nan, "jump by nan")]
)
def test_jumps_are_refused(joint, wish, words):
    target = HOME.copy()
    target[joint] += wish
    with pytest.raises(Fault, match=words):
        Safety().step(HOME, target)


def test_joint_limits_have_a_margin_and_the_way_back_is_free():
    safety = Safety(speed=1.0, workspace=(-2, -2, -2, 2, 2, 2))
    edge = HOME.copy()
    edge[6] = JOINT_LIMITS["fr3"][1][6] - 0.06
    safety.step(edge, edge + 0.005 * np.eye(7)[6])
    with pytest.raises(Fault, match="joint 7 at .*are allowed"):
        safety.step(edge, edge + 0.03 * np.eye(7)[6])
    beyond = edge + 0.04 * np.eye(7)[6]
    safety.step(beyond, beyond - 0.01 * np.eye(7)[6])
    with pytest.raises(Fault):
        safety.step(beyond, beyond + 0.001 * np.eye(7)[6])


def test_the_workspace_is_a_box_around_the_fingertips():
    tool = franka_chain().forward_kinematics(HOME)[-1, :3, 3]
    down = HOME + 0.02 * np.eye(7)[1]  # leans forward: the hand sinks
    sunk = franka_chain().forward_kinematics(down)[-1, 2, 3]
    assert sunk < tool[2] - 0.001
    box = lambda floor: (0, -1, floor, 1, 1, 1)  # noqa: E731
    Safety(workspace=box(sunk - 1e-4)).step(HOME, down)
    with pytest.raises(Fault, match="outside the --workspace"):
        Safety(speed=1.0, workspace=box(sunk + 1e-4)).step(HOME, down)
    Safety(workspace=box(sunk + 1e-4)).step(down, HOME)


def test_other_checks():
    safety = Safety()
    for bad in (np.full((8, 8), np.nan), np.full((8, 8), np.inf), np.zeros((8, 7))):
        with pytest.raises(Fault, match="NaN or infinite"):
            safety.check_chunk(bad)
    safety.check_fresh({"front": 9.8, "wrist": 9.9}, 10.0)
    with pytest.raises(Fault, match="'wrist' has sent no picture for 0.4 s"):
        safety.check_fresh({"front": 9.9, "wrist": 9.6}, 10.0)
    with pytest.raises(Fault, match="silent"):
        safety.check_heard(0.3)
    with pytest.raises(Fault, match="late by more than 0.5 s"):
        safety.check_waiting(0.51)
    with pytest.raises(Fault, match="Joint 2 moves"):
        safety.check_motion(np.array([0, -2.1, 0, 0, 0, 0, 0, 0]))
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


def test_nothing_moves_unless_a_person_confirms(tmp_path, monkeypatch, capsys):
    painted = {"front": np.zeros((8, 8, 3), np.uint8)}
    monkeypatch.setattr("builtins.input", lambda _: "n")
    with pytest.raises(Fault, match="nothing was sent"):
        Safety().confirm(painted, tmp_path / "first_target.png", False)
    assert (
        tmp_path / "first_target.png"
    ).exists() and "first_target.png" in capsys.readouterr().out
    monkeypatch.setattr("builtins.input", lambda _: "y")
    Safety().confirm(painted, tmp_path / "first_target.png", False)


def test_reflexes_are_told_in_words():
    assert "it touched something" in robot_io.in_words(
        'Move command aborted: motion aborted by reflex! ["cartesian_reflex"]'
    )
    assert "look at Desk" in robot_io.in_words("something new")


# ---------------------------------------------------------------------------------------------------- pictures and recordings
def test_fit_keeps_what_a_pixel_sees():
    picture = np.zeros((480, 640, 3), np.uint8)
    picture[200:220, 400:420] = 255
    fitted, intrinsics = fit(picture, 96, CAMERA["intrinsics"])
    x, y, _ = intrinsics @ np.linalg.solve(CAMERA["intrinsics"], [410, 210, 1])
    white = np.argwhere(fitted[..., 0] > 128) + 0.5
    assert fitted.shape == (96, 96, 3) and np.abs(white.mean(0) - [y, x]).max() < 0.01
    assert fit(picture, 0, CAMERA["intrinsics"]) == (picture, CAMERA["intrinsics"])


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
        np.abs(episode.joint_poses - franka_chain().forward_kinematics(episode.qpos[:, :7])).max() < 1e-5
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
    monkeypatch.setattr("episodes.LARGE", 100)
    episode = read_episode(recording(tmp_path / "demo.hdf5", 3).finish(True))
    assert (episode.images["front"][2] == 2).all()
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=10))
    log = recording(tmp_path / "more.hdf5", 3)
    with pytest.raises(OSError) as error:
        log.finish(True)
    assert error.value.errno == errno.ENOSPC and log.folder.exists() and not log.path.exists()


# --------------------------------------------------------------------------------------------------------- the loop's timing
class Arm:
    """Is at once where it is sent."""

    def __init__(self):
        self.joints, self.sent, self.velocities, self.opened = HOME.copy(), [], [], []

    def state(self):
        return time.monotonic(), np.append(self.joints, 1), np.zeros(8)

    def send(self, joints, velocity):
        self.joints = joints
        self.velocities.append(velocity[0])
        self.sent.append(joints[0])

    def grip(self, opened):
        self.opened.append(opened)


class Eyes:
    """Pictures of this moment, or older ones."""

    def __init__(self, age=0.0):
        self.age = age

    def read(self):
        return {"front": time.monotonic() - self.age}, {"front": np.zeros((4, 4, 3), np.uint8)}


class Ramp:
    """A policy that raises joint 1 by 0.01 rad a step and answers after `seconds`: any pause or repetition shows."""

    needs = {"cameras": ("front",), "image_size": (4, 4), "horizon": 8}

    def __init__(self, seconds):
        self.seconds, self.due, self.steps = seconds, None, []

    def ask(self, pictures, qpos, instruction, step):
        self.due = time.monotonic() + self.seconds
        self.steps.append(step)
        first = (
            qpos[0] - HOME[0] + (0.01 if step == 0 else 0)
        )  # action 0 is the one that was under way
        self.result = (
            pictures,
            np.tile(np.append(HOME, 0.0), (8, 1))
            + np.outer(first + 0.01 * np.arange(8), np.eye(8)[0]),
        )

    def answer(self, timeout=0.0):
        time.sleep(timeout and self.seconds)
        if self.due and time.monotonic() >= self.due:
            self.due = None
            return *self.result, self.seconds


def loop(tmp_path, policy, safety=None, steps=30, age=0.0, **settings):
    arm, log = (
        Arm(),
        types.SimpleNamespace(
            path=tmp_path / "log.hdf5", add=lambda *a, **k: None, event=lambda text: None
        ),
    )
    safety = safety or Safety(speed=1.0)
    real_robot.drive(arm, Eyes(age), policy, safety, log, Run(**settings), "", steps, lambda: False)
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
    assert np.allclose(loop(tmp_path, policy, execute=4, steps=12).sent, 0.01 * np.arange(1, 13))
    assert policy.steps[1:4] == [0, 5, 9]
    slow = Ramp(0.13)
    sent = loop(tmp_path, slow, steps=26).sent
    assert slow.steps[3] - slow.steps[2] == 6  # asked a step earlier, once it is known to be slow
    assert np.allclose(np.diff(sent), 0.01, atol=0.011)


def test_the_age_of_a_picture_is_made_up_for(tmp_path):
    sent = np.array(loop(tmp_path, Ramp(0.03), steps=20, age=0.05).sent)
    # The fake arm was a step further back when the picture was taken, and the chunk begins there: half a step later in the chunk.
    assert np.allclose(np.diff(sent), 0.01, atol=0.0055) and (np.diff(sent) > 0).all()


def test_a_slow_arm_plays_the_chunk_slowly(tmp_path):
    sent = loop(tmp_path, Ramp(0.03), Safety(speed=0.005 / 0.2175), steps=30).sent
    assert np.allclose(sent, 0.005 * np.arange(1, 31))  # half a step at a time


def test_the_watchdog_stops_a_policy_that_is_late(tmp_path):
    policy = Ramp(0.03)
    answer = policy.answer
    policy.answer = lambda timeout=0.0: answer(timeout) if len(policy.steps) < 4 else None
    with pytest.raises(Fault, match="late"):
        loop(tmp_path, policy, Safety(speed=1.0, watchdog=0.3))


def test_dry_run_sends_nothing(tmp_path):
    assert not loop(tmp_path, Ramp(0.03), steps=10, dry_run=True).sent


# ------------------------------------------------------------------------------------------------------- cameras, bad input
def test_cameras_that_are_not_there_are_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyrealsense2", None)
    with pytest.raises(UserError, match="pyrealsense2 is not installed"):
        robot_io.RealSense({"front": "1"})
    module = types.SimpleNamespace(context=lambda: types.SimpleNamespace(query_devices=list))
    monkeypatch.setitem(sys.modules, "pyrealsense2", module)
    with pytest.raises(UserError, match="no RealSense camera 1 for 'front'; connected are: none"):
        robot_io.RealSense({"front": "1"})


def fake_realsense(frames):
    """pyrealsense2 with one camera that gives these frames, then fails."""
    device = types.SimpleNamespace(get_info=lambda _: "1")
    config = types.SimpleNamespace(enable_device=lambda _: None, enable_stream=lambda *_: None)
    frame = lambda data: types.SimpleNamespace(
        get_color_frame=lambda: types.SimpleNamespace(get_data=lambda: data)
    )
    waiting = iter(frames)

    def wait(_):
        for data in waiting:
            time.sleep(0.01)
            return frame(data)
        time.sleep(0.2)
        raise RuntimeError("Frame didn't arrive within 1000")

    return types.SimpleNamespace(
        context=lambda: types.SimpleNamespace(query_devices=lambda: [device]), camera_info=types.SimpleNamespace(serial_number=0),
        config=lambda: config, stream=types.SimpleNamespace(color=0), format=types.SimpleNamespace(rgb8=0),
        pipeline=lambda: types.SimpleNamespace(start=lambda _: None, wait_for_frames=wait, stop=lambda: None),
    )  # fmt: skip


def test_the_newest_picture_is_read_and_a_failing_camera_is_a_fault(monkeypatch):
    monkeypatch.setitem(
        sys.modules,
        "pyrealsense2",
        fake_realsense([np.full((480, 640, 3), i, np.uint8) for i in (1, 2)]),
    )
    cameras = robot_io.RealSense({"front": "1"})
    time.sleep(0.1)
    stamps, pictures = cameras.read()
    assert (pictures["front"] == 2).all() and 0 < time.monotonic() - stamps["front"] < 1
    time.sleep(0.3)
    with pytest.raises(Fault, match="'front' failed .*1000.*cable"):
        cameras.read()


@pytest.mark.parametrize("typed, words", [("", "Not confirmed"), ("y", "before its first step")])
def test_a_run_that_ends_at_once_is_one_sentence(tmp_path, monkeypatch, capsys, typed, words):
    """Nobody at the keyboard, or Enter typed too early: nothing was sent, nothing is left, nothing is a traceback."""

    def answer(_):
        if not typed:
            raise EOFError
        return typed

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("real_robot.Franka", lambda host, safety: arm)
    arm, eyes = Arm(), Eyes()
    arm.hold = lambda: arm.sent.append("held")
    vars(eyes).update(
        sim=False,
        calibration={"front": CAMERA},
        host="",
        variation=0,
        seed=0,
        max_steps=9,
        over=lambda: True,
        instruction="wipe",
    )
    with pytest.raises(Fault, match=words):
        real_robot.run_once(Run(run=tmp_path, robot="10.0.0.1"), Ramp(0.03), eyes)
    assert arm.sent == ["held"] and [path.name for path in tmp_path.glob("robot/*/*")] == [
        "first_target.png"
    ]


def test_a_policy_that_does_not_load_is_one_sentence(monkeypatch):
    monkeypatch.setattr(robot_io, "LOADING", 0.01)
    with pytest.raises(Fault, match="not loaded within"):
        robot_io.Policy(partial(time.sleep, 60))


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
        robot_io.Station(Run(robot="10.0.0.1"))
    with pytest.raises(UserError, match="No connection to the robot at 127.0.0.99"):
        robot_io.Franka("127.0.0.99", Safety())
    log = recording(tmp_path / "demo.hdf5", 2).finish(True)
    with pytest.raises(UserError, match="no painted targets"):
        real_robot.replay(Replay(log))


# ------------------------------------------------------------------------------------------------ over the robot's own protocol
class Sweep:
    """Policy for tests: swings joint 1 by 0.4 rad and back in three seconds; what goes wrong does so after a second."""

    def __init__(self, fault, size):
        self.fault, self.size, self.first, self.begun = fault, size, None, None

    def __call__(self):  # in the policy's process
        return {
            "cameras": ("wrist", "front", "right_shoulder", "left_shoulder"),
            "image_size": (self.size,) * 2,
            "horizon": 8,
        }, self.policy

    def policy(self, pictures, qpos, instruction, step):
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
        return pictures, chunk


def hand_that_fails():
    """In the arm's process: the hand answers that it could not do what it was told."""
    from franky_sim.franka_gripper_protocol import GripperCommand, GripperCommandStatus
    from franky_sim.franka_gripper_server import BaseCommand, FrankaGripperServer

    def refuse(self, width, speed, force, inner, outer, command_id, tcp_socket):
        BaseCommand.send_response(tcp_socket, GripperCommand.kGrasp, command_id, GripperCommandStatus.kUnsuccessful,
                                  command_type_struct="H", status_type_struct="H")  # fmt: skip

    FrankaGripperServer.start_grasp = refuse


def program(settings, load, bench, output, largest):
    """The command line's process."""
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # also where the tests run in the background of a shell
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    run_stage(lambda: real_robot.run(settings, load, bench))


class Speeds:
    """How fast the arm's fastest joint was, all the time."""

    def __init__(self, bench):
        self.rows, self.bench, self.over = [], bench, threading.Event()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        while not self.over.wait(0.005):
            self.rows.append((time.monotonic(), self.bench.get("speed")))

    def rest_after(self, moment):
        """Seconds from a moment until the arm was at rest (below 0.05 rad/s) for good."""
        times, speeds = np.array(self.rows).T
        assert times[-1] > moment + 0.5
        return max(times[speeds > 0.05].max() - moment, 0)


FAULTS = {  # what the sentence has to say; None where the program cannot speak any more
    "NaN": "NaN or infinite", "limit": "joint 7 at", "jump": "joint 1 to jump by 1", "raises": "out of memory", "late": "late by more than",
    "gripper": "gripper did not close", "server killed": "silent", "server frozen": "silent", "cameras frozen": "has sent no picture",
    "Ctrl-C": "Stopped", "disk full": "disk is full", "kill -9": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(f, marks=() if f in ("NaN", "Ctrl-C", "kill -9") else pytest.mark.slow)
        for f in FAULTS
    ],
)
def test_a_fault_stops_the_arm_and_says_why(fault, tmp_path):
    from sims.franky_panda import Bench

    bench = Bench("reach_target", 500_000, prepare=hand_that_fails if fault == "gripper" else None)
    output, run = tmp_path / "output.txt", tmp_path / "run"
    arguments = (
        Run(run=run, steps=60),
        Sweep(fault, 64),
        bench,
        output,
        1_500_000 if fault == "disk full" else 0,
    )
    process, speeds = (
        multiprocessing.get_context("spawn").Process(target=program, args=arguments),
        Speeds(bench),
    )
    try:
        process.start()
        end = time.monotonic() + 60
        while bench.get("speed") < 0.2 and time.monotonic() < end:
            time.sleep(0.005)
        assert time.monotonic() < end, output.read_text()
        time.sleep(0.3)
        outside = {"server killed": (bench.processes[0].pid, signal.SIGKILL), "server frozen": (bench.processes[0].pid, signal.SIGSTOP),
                   "cameras frozen": (bench.processes[1].pid, signal.SIGSTOP), "Ctrl-C": (process.pid, signal.SIGINT),
                   "kill -9": (process.pid, signal.SIGKILL)}  # fmt: skip
        begin = time.monotonic()
        if fault in outside:
            os.kill(*outside[fault])
        process.join(30)
        words = output.read_text()
        if fault == "server frozen":
            os.kill(bench.processes[0].pid, signal.SIGCONT)
        assert process.exitcode == {"kill -9": -9, "Ctrl-C": 130}.get(fault, 2), words
        assert FAULTS[fault] is None or FAULTS[fault] in words and "Traceback" not in words
        if fault in ("kill -9", "disk full"):
            recover(run)
        (path,) = run.glob("robot/*/log.hdf5")
        episode = read_episode(path)
        assert (
            len(episode.qpos) > 5
            and not episode.success
            and set(episode.images) == set(bench.cameras)
        )
        if fault not in outside:
            events = [
                json.loads(line) for line in bytes(episode.extras["events"]).decode().splitlines()
            ]
            begin = events[-1]["time"] if fault != "disk full" else episode.extras["time"][-1] + 0.1
            assert fault == "disk full" or events[-1]["event"].startswith("stopped")
        if fault not in (
            "server killed",
            "server frozen",
        ):  # an arm without its controller: the simulated one is gone with it
            time.sleep(max(begin + 0.6 - time.monotonic(), 0))
            assert speeds.rest_after(begin) < 0.5
    finally:
        speeds.over.set()
        process.kill()
        bench.close()


def test_hold_waits_for_a_lost_connection():
    """libfranka's thread goes on for a second; a program that ends before it dies with SIGABRT."""
    from sims.franky_panda import Bench

    bench = Bench("reach_target", 500_000)
    robot = robot_io.Franka(bench.host, Safety())
    robot.send(robot.state()[1][:7] + 0.3, np.zeros(7))
    time.sleep(0.2)
    bench.close()
    time.sleep(0.3)
    robot.hold()
    held = not robot.robot.is_in_control
    time.sleep(1.5)  # whatever was found, this process has to go on
    with contextlib.suppress(Exception):
        robot.robot.join_motion()
    assert held


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
