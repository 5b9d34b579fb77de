"""The UR5e: its simulation, its spheres, its calibration, and its driver against a stand-in."""

import csv
import socketserver
import subprocess
import sys
import threading
import time
import types

import cv2
import h5py
import mujoco
import numpy as np
import pytest
import test_calibrate
import yaml
from conftest import ROOT, look_at, make_episode, random_pose
from PIL import Image
from test_calibrate import apart, photograph, project
from test_episodes import stage
from test_real_robot import Eyes, Log

import collect_demos
import real_robot
import render_spheres
from genima.calibration import load_calibration
from genima.demonstrations import describe, read_demonstrations
from genima.episodes import read_episode, write_episode
from genima.files import UserError
from genima.robots import JOINT_LIMITS, robot_chain, robot_frames, sphere_joints
from genima.spheres import SphereStyle, draw_spheres, read_spheres, target_spheres
from robot import robotiq, ur5e_arm
from robot.arm import Fault
from robot.policy_process import Answer
from robot.safety import Safety
from robot.ur5e_arm import Segment, UR5e
from robot.workcell import Workcell
from sims import Simulators, make_env
from sims.arms import find_arm
from sims.demonstrator import record_demonstration
from sims.mujoco_panda import PandaEnv
from sims.rendering import new_renderer

HOME = np.array(find_arm("ur5e").home)
STYLE = SphereStyle(sphere_joints("ur5e"))


# ------------------------------------------------------------------------------------ the simulator
def test_mujocos_links_are_where_the_table_says():
    env = make_env("reach_target", 16, (), robot="ur5e")
    chain = robot_chain("ur5e")
    random = np.random.default_rng(0)
    for joints in random.uniform(*JOINT_LIMITS["ur5e"], (20, 6)):
        env.data.qpos[:6] = joints
        mujoco.mj_forward(env.model, env.data)
        assert np.abs(chain.forward_kinematics(joints) - env.joint_poses()).max() < 1e-6


def test_the_arm_is_as_long_as_its_data_sheet_says():
    """Universal Robots: the reach is 850 mm, from the base's axis to the wrist's third joint."""
    env = make_env("reach_target", 16, (), robot="ur5e")
    env.data.qpos[:6] = 0
    mujoco.mj_forward(env.model, env.data)
    shoulder, wrist = env.joint_poses()[[1, 5], :3, 3]
    assert shoulder == pytest.approx([0, 0, 0.1625])
    assert wrist == pytest.approx([-0.425 - 0.3922, -0.1333, 0.1625 - 0.0997], abs=1e-6)
    masses = [env.model.body(name).mass[0] for name in env.arm.bodies]
    assert masses == pytest.approx([3.761, 8.058, 2.846, 1.37, 1.3, 0.365])


@pytest.mark.parametrize("camera", ["front", "left_shoulder", "right_shoulder", "wrist"])
def test_a_joints_sphere_is_where_mujoco_draws_one(camera):
    """Spheres of MuJoCo's own at the links' frames, each alone, by its segmentation."""
    height, width = 120, 160
    env = make_env("reach_target", (height, width), (camera,), robot="ur5e")
    env.reset(seed=0)
    poses, radii, colours = target_spheres(env.joint_poses(), True, camera, STYLE)
    intrinsics, world_from_camera = env.camera_parameters(camera)
    seen = 0
    for name, pose, radius, colour in zip(
        ("ur5e_link2", "ur5e_link3", "ur5e_link5", "tool"), poses, radii, colours
    ):
        spec = env.build()
        for geom in spec.geoms:
            geom.group = 5  # not drawn: nothing hides the sphere
        body = spec.body("hand") if name == "tool" else spec.body(name)
        place = spec.site("tool").pos if name == "tool" else (0, 0, 0)
        body.add_geom(
            name="ball", type=mujoco.mjtGeom.mjGEOM_SPHERE, size=[radius, 0, 0], pos=place
        )
        model = spec.compile()
        data = mujoco.MjData(model)
        data.qpos[:] = env.data.qpos
        mujoco.mj_forward(model, data)
        renderer = new_renderer(model, height, width)
        renderer.enable_segmentation_rendering()
        renderer.update_scene(data, camera)
        theirs = renderer.render()[..., 0] == model.geom("ball").id
        renderer.close()
        ours = draw_spheres(
            pose[None], [radius], [colour], intrinsics, world_from_camera, height, width
        )
        ours = ours[..., 3] > 127
        different = (ours != theirs).sum()
        assert different <= 0.04 * max(theirs.sum(), 25), (name, different, theirs.sum())
        seen += int(theirs.any())
    assert seen >= (1 if camera == "wrist" else 2)


@pytest.mark.parametrize("task", ["reach_target", "push_button", "pick_and_lift", "stack_blocks"])
def test_the_expert_solves_the_tasks(task):
    env = make_env(task, 16, (), robot="ur5e")
    for seed in range(3):
        episode = record_demonstration(env, task, seed, seed % env.task.candidates, "anywhere")
        assert episode.success and episode.robot == "ur5e" and episode.qpos.shape[1] == 7
        moved = np.abs(np.diff(episode.action[:, :-1], axis=0)).max()
        assert moved < 0.35  # rad: no joint turns the long way round


def test_the_gripper_opens_and_closes():
    env = PandaEnv("reach_target", 16, (), images=False, robot="ur5e")
    env.reset(seed=0)
    for command in (0, 1, 0):
        for _ in range(10):
            observation = env.step(np.append(env.data.qpos[:6], command))[0]
        assert observation["qpos"][-1] == pytest.approx(command, abs=0.05)
    assert env.fingers().max() - env.fingers().min() < 1e-3


def test_what_the_arm_cannot_do_is_one_sentence():
    with pytest.raises(UserError, match="no simulated ur10, .*|ur10: the simulator has"):
        make_env("reach_target", 16, (), robot="ur10")
    env = make_env("reach_target", 16, (), robot="ur5e")
    env.reset(seed=0)
    with pytest.raises(UserError, match="7 finite numbers .6 joints"):
        env.step(np.zeros(8))
    with pytest.raises(UserError, match="outside the joint limits"):
        env.step(np.append(7 * np.ones(6), 0))


def test_the_stages_know_the_robot(tmp_path, monkeypatch, capsys):
    record = ["--run", tmp_path, "--tasks", "reach_target", "--demos", "2", "--image-size", "32"]
    command = [sys.executable, "collect_demos.py", *record]
    done = subprocess.run([*command, "--robot", "ur5e"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code, out, err = stage(monkeypatch, capsys, collect_demos.main, *record)
    assert code == 2 and "is of ur5e, not fr3: use another --run" in err
    code, out, err = stage(monkeypatch, capsys, render_spheres.main, "--run", tmp_path)
    assert code == 0 and "joint 2" in out and "joint 3" in out and "joint 5" in out
    path = next(tmp_path.glob("episodes/*/*.hdf5"))
    layers, _ = read_spheres(tmp_path / "spheres" / path.parent.name / path.name)
    episode = read_episode(path)
    later = min(8, len(episode.qpos) - 1)
    spheres = target_spheres(episode.joint_poses[later], True, "front", STYLE)
    intrinsics = episode.intrinsics["front"]
    expected = draw_spheres(*spheres, intrinsics, episode.extrinsics["front"][0], 32, 32)
    np.testing.assert_array_equal(layers["front"][0], expected)
    config = describe(read_demonstrations(tmp_path, images=False), with_words=False)
    assert config["robot"] == "ur5e" and config["style"]["joints"] == (1, 2, 4)
    assert config["joints"] == 6


def test_a_policy_acts_with_its_own_arm():
    simulators = Simulators()
    policy = types.SimpleNamespace(cameras=("front",), image_size=[16, 16], robot="ur5e")
    env = simulators.of_policy(policy, "reach_target")
    assert env.robot == "ur5e" and env.action_space.shape == (7,)
    assert simulators.of_policy(policy, "reach_target", "light").robot == "ur5e"
    del policy.robot
    assert simulators.of_policy(policy, "reach_target").action_space.shape == (8,)


# ------------------------------------------------------------------------------------- calibration
def test_a_camera_is_calibrated_with_a_ur5e(tmp_path, monkeypatch, capsys):
    """The flange holds the board; the camera stands in the room."""
    random = np.random.default_rng(0)
    chain = robot_chain("ur5e")
    points = test_calibrate.POINTS
    rest = chain.forward_kinematics(HOME)[-2]
    camera = look_at((1.1, 0.1, 0.6), rest[:3, 3])
    board = np.linalg.inv(rest) @ camera
    board = board @ test_calibrate.pose_from_vector([0.1, -0.1, 0, 0, 0, 0.45])
    board = board @ test_calibrate.pose_from_vector(np.append([0, 0, 0], -points.mean(0)))
    folder = tmp_path / "pictures"
    (folder / "front").mkdir(parents=True)
    lines = []
    while len(lines) < 12:
        q = HOME + random.uniform(-0.4, 0.4, 6)
        to_camera = np.linalg.inv(camera) @ chain.forward_kinematics(q)[-2] @ board
        pixels = project(to_camera, points)
        inside = pixels.min() > 20 and (pixels < np.array([640, 480]) - 20).all()
        facing = -to_camera[:3, 2] @ to_camera[:3, 3] / np.linalg.norm(to_camera[:3, 3])
        if not inside or facing > -0.6:
            continue
        picture = Image.fromarray(photograph(random, to_camera))
        picture.save(folder / "front" / f"{len(lines):03d}.png", compress_level=1)
        lines.append([len(lines), *q])
    with open(folder / "joints.csv", "w", newline="") as file:
        csv.writer(file).writerows(lines)
    out_file = tmp_path / "cameras.yaml"
    options = ("calibrate", "--images", folder, "--camera", "front", "--calibration", out_file)
    code, out, err = stage(monkeypatch, capsys, real_robot.main, *options, "--robot", "ur5e")
    assert code == 0, err
    metres, degrees = apart(
        camera, load_calibration(out_file, "ur5e")["front"]["world_from_camera"]
    )
    assert metres < 2e-3 and degrees < 0.3
    drawn = cv2.imread(str(tmp_path / "cameras_front.png"))
    assert drawn.shape == (480, 3 * 640, 3)
    code, out, err = stage(monkeypatch, capsys, real_robot.main, *options)
    assert code == 2 and "7 joint positions" in err

    # The file's other cameras stay where they are: their frames are a UR5e's.
    pose = random_pose(random)
    entry = {"intrinsics": test_calibrate.INTRINSICS.tolist(), "hand_from_camera": pose.tolist()}
    out_file.write_text(yaml.safe_dump({"wrist": entry}))
    expected = robot_frames("ur5e")["hand"] @ pose
    settings = real_robot.Run(robot="10.0.0.1", arm="ur5e", calibration=out_file)
    settings.cameras = ("wrist=opencv:0",)
    settings.instruction = "wipe"
    monkeypatch.setattr("robot.workcell.Cameras.__init__", lambda self, sources, calibration: None)
    read = Workcell(settings).calibration["wrist"]["last_joint_from_camera"]
    np.testing.assert_allclose(read, expected, atol=1e-9)
    assert stage(monkeypatch, capsys, real_robot.main, *options, "--arm", "ur5e")[0] == 0
    kept = yaml.safe_load(out_file.read_text())["wrist"]["last_joint_from_camera"]
    np.testing.assert_allclose(kept, expected, atol=1e-8)


@pytest.mark.parametrize("robot, code", [("ur5e", 0), ("lab_arm", 2)])
def test_spheres_are_drawn_with_the_frames_of_the_episodes_arm(
    tmp_path, monkeypatch, capsys, robot, code
):
    """A calibration to the hand: a UR5e's is not where a Franka's is, another arm's is unknown."""
    episode = make_episode(joints=6)[0]
    episode.robot = robot
    write_episode(tmp_path / "episodes/a/a.hdf5", episode)
    pose = random_pose(np.random.default_rng(0))
    entry = {"intrinsics": [[50.0, 0, 21], [0, 50, 15], [0, 0, 1]]}
    entry["hand_from_camera"] = pose.tolist()
    path = tmp_path / "cams.yaml"
    path.write_text(yaml.safe_dump({"wrist": entry}))
    arguments = ("--run", tmp_path, "--calibration", path)
    assert stage(monkeypatch, capsys, render_spheres.main, *arguments)[0] == code
    if code == 0:
        with h5py.File(tmp_path / "spheres/a/a.hdf5") as root:
            drawn = root["cameras/wrist/extrinsics"][:]
        expected = episode.joint_poses[:, -2] @ robot_frames("ur5e")["hand"] @ pose
        np.testing.assert_allclose(drawn, expected, atol=1e-4)
    else:
        with pytest.raises(UserError, match="where 'hand' is on this arm is not known"):
            load_calibration(path, robot)


# ------------------------------------------------------------------------- a stand-in of ur_rtde
class Robot:
    """What the stand-ins of ur_rtde's two interfaces share: an arm that is at once where it is
    sent, and a list of all calls."""

    def __init__(self):
        self.joints = HOME.copy()
        self.calls = []  # (name, arguments) of whatever moves or stops the arm
        self.positions = []  # that servoJ was given
        self.emergency = False
        self.protective = False
        self.connected = True
        self.running = True
        self.accepts = True
        self.frozen = None  # the robot's clock, if it stands still


def make_modules(robot):
    """Modules rtde_control and rtde_receive with the calls that the driver uses."""

    class RTDEReceiveInterface:
        def __init__(self, hostname, frequency=-1.0):
            if hostname == "10.255.255.1":
                raise RuntimeError("Timeout connecting to UR dashboard server.")

        def getActualQ(self):
            return robot.joints.tolist()

        def getActualQd(self):
            return [0.0] * 6

        def getTimestamp(self):
            return time.monotonic() if robot.frozen is None else robot.frozen

        def isConnected(self):
            return robot.connected

        def isEmergencyStopped(self):
            return robot.emergency

        def isProtectiveStopped(self):
            return robot.protective

    class RTDEControlInterface:
        def __init__(self, hostname, frequency=-1.0):
            robot.calls.append(("control", frequency))

        def setWatchdog(self, min_frequency=10.0):
            robot.calls.append(("watchdog", min_frequency))
            return True

        def kickWatchdog(self):
            return True

        def initPeriod(self):
            return time.monotonic()

        def waitPeriod(self, begun):
            time.sleep(max(begun + 1 / 125 - time.monotonic(), 0))

        def isProgramRunning(self):
            return robot.running

        def servoJ(self, q, speed, acceleration, time_, lookahead_time, gain):
            assert isinstance(q, list) and len(q) == 6 and np.isfinite(q).all()
            assert time_ > 0 and 0.03 <= lookahead_time <= 0.2 and 100 <= gain <= 2000
            robot.positions.append(np.array(q))
            robot.joints = np.array(q)
            return robot.accepts

        def servoStop(self, a=10.0):
            robot.calls.append(("servoStop", a))
            return True

        def stopScript(self):
            robot.calls.append(("stopScript", None))

    control = types.ModuleType("rtde_control")
    control.RTDEControlInterface = RTDEControlInterface
    receive = types.ModuleType("rtde_receive")
    receive.RTDEReceiveInterface = RTDEReceiveInterface
    return {"rtde_control": control, "rtde_receive": receive}


class GripperSocket(socketserver.StreamRequestHandler):
    """The URCap's socket: lines of text."""

    def handle(self):
        for line in self.rfile:
            word, *rest = line.decode().split()
            if self.server.silent:
                return
            if word == "GET":
                name = rest[0]
                answer = f"{name} {self.server.variables[name]}\n"
            else:
                pairs = zip(rest[::2], rest[1::2])
                self.server.variables.update({name: int(value) for name, value in pairs})
                answer = "ack\n"
            self.wfile.write(answer.encode())


@pytest.fixture
def gripper(monkeypatch):
    socketserver.ThreadingTCPServer.allow_reuse_address = True
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), GripperSocket)
    server.daemon_threads = True
    server.variables = {"STA": 3, "POS": 3}
    server.silent = False
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    port = server.server_address[1]
    monkeypatch.setattr(ur5e_arm, "Robotiq", lambda host: robotiq.Robotiq("127.0.0.1", port))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def robot(monkeypatch, gripper):
    robot = Robot()
    for name, module in make_modules(robot).items():
        monkeypatch.setitem(sys.modules, name, module)
    return robot


@pytest.fixture
def arm(robot):
    arm = UR5e("127.0.0.1", Safety("ur5e", 1.0))
    yield arm
    arm.hold()


def named(robot, name):
    return [call for call in robot.calls if call[0] == name]


def wait_for(condition, seconds=3.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_way_between_commands_is_smooth():
    start, end = np.zeros(6), 0.05 * np.ones(6)
    segment = Segment(0.0, start, 0.2 * np.ones(6), end, 0.4 * np.ones(6))
    for now, position, velocity in ((0, start, 0.2), (0.1, end, 0.4)):
        np.testing.assert_allclose(segment.at(now)[0], position, atol=1e-12)
        np.testing.assert_allclose(segment.at(now)[1], velocity)
    times = np.linspace(0, 0.0999, 200)
    positions = np.array([segment.at(now)[0][0] for now in times])
    velocities = np.array([segment.at(now)[1][0] for now in times])
    np.testing.assert_allclose(np.gradient(positions, times)[1:-1], velocities[1:-1], atol=2e-3)
    assert segment.at(5.0)[0][0] <= 0.05 + 0.03 * 0.4 + 1e-12  # it does not roll on for ever


def test_positions_are_streamed_between_commands(robot, arm):
    target = HOME + 0.05 * np.eye(6)[0]
    arm.send(target, np.zeros(6))
    wait_for(lambda: robot.positions and np.allclose(robot.positions[-1], target))
    first = np.array(robot.positions)[:, 0]
    assert len(first) > 2 and (np.diff(first) > -1e-12).all()  # several, on the way there
    assert first[0] < target[0]
    assert ("control", 125.0) in robot.calls and ("watchdog", 10.0) in robot.calls


def test_without_another_command_the_arm_stops_by_itself(robot, arm):
    arm.send(HOME + 0.05 * np.eye(6)[0], 0.5 * np.eye(6)[0])
    wait_for(lambda: named(robot, "servoStop"), 1.0)
    sent = len(robot.positions)
    time.sleep(0.1)
    assert len(robot.positions) == sent
    assert robot.joints[0] <= HOME[0] + 0.05 + 0.03 * 0.5 + 1e-9


@pytest.mark.parametrize(
    "change, words", [(0.5, "jump by 0.50"), (np.nan, "jump by nan"), (0.1, "joint 2 at")]
)
def test_what_is_outside_the_limits_is_refused_before_anything_is_sent(robot, arm, change, words):
    robot.joints = HOME.copy()
    if change == 0.1:
        robot.joints[1] = -2 * np.pi + 0.1
    target = robot.joints - change * np.eye(6)[1]
    with pytest.raises(Fault, match=words):
        arm.send(target, np.zeros(6))
    time.sleep(0.05)
    assert not robot.positions


def test_the_state_is_the_arms_and_the_grippers(robot, arm, gripper):
    gripper.variables["POS"] = 230
    wait_for(lambda: arm.state()[1][-1] == 0)
    now, qpos, qvel = arm.state()
    np.testing.assert_allclose(qpos[:-1], HOME)
    assert qpos.shape == qvel.shape == (7,) and abs(now - time.monotonic()) < 1


@pytest.mark.parametrize(
    "attribute, value, words",
    [
        ("emergency", True, "emergency stop"),
        ("protective", True, "protective stop"),
        ("connected", False, "connection"),
        ("running", False, "program has ended"),
    ],
)
def test_what_the_robot_reports_is_one_sentence(robot, arm, attribute, value, words):
    arm.state()
    setattr(robot, attribute, value)
    with pytest.raises(Fault, match=words):
        arm.state()


def test_a_silent_robot_and_a_refused_command_are_faults(robot, arm):
    robot.frozen = 5.0
    arm.state()
    time.sleep(0.3)
    with pytest.raises(Fault, match="silent"):
        arm.state()
    robot.frozen = None
    robot.accepts = False
    arm.send(HOME, np.zeros(6))
    wait_for(lambda: arm.error)
    with pytest.raises(Fault, match="servoJ was refused"):
        arm.state()
    with pytest.raises(Fault, match="servoJ was refused"):
        arm.send(HOME, np.zeros(6))


def test_brake_and_hold_stop_the_arm(robot, arm):
    arm.send(HOME + 0.05 * np.eye(6)[0], np.zeros(6))
    wait_for(lambda: robot.positions)
    arm.brake()
    assert len(named(robot, "servoStop")) == 1
    sent = len(robot.positions)
    arm.send(HOME, np.zeros(6))  # it may continue
    wait_for(lambda: len(robot.positions) > sent)
    arm.hold()
    assert named(robot, "stopScript") and robot.calls.index(("stopScript", None)) > 0
    sent = len(robot.positions)
    time.sleep(0.05)
    assert len(robot.positions) == sent


def test_the_gripper_moves_and_a_failure_is_reported(robot, arm, gripper):
    arm.grip(opened=False)
    wait_for(lambda: gripper.variables["POS"] == 255)
    arm.grip(opened=True)
    wait_for(lambda: gripper.variables["POS"] == 0)
    assert gripper.variables["GTO"] == 1 and gripper.variables["FOR"] < 255
    gripper.silent = True
    wait_for(lambda: arm.error)
    with pytest.raises(Fault, match="gripper no longer answers"):
        arm.state()


def test_a_gripper_is_never_activated_by_itself(robot, gripper):
    gripper.variables["STA"] = 0
    with pytest.raises(UserError, match="activate it on the teach pendant"):
        UR5e("127.0.0.1", Safety("ur5e"))
    assert "ACT" not in gripper.variables


def test_a_demonstration_and_a_dry_run_take_no_control(robot):
    arm = UR5e("127.0.0.1", Safety("ur5e"), moves=False)
    assert arm.state()[1].shape == (7,)
    arm.hold()
    assert not robot.calls and not robot.positions


def test_no_connection_and_no_package_are_one_sentence(robot, monkeypatch):
    with pytest.raises(UserError, match="No connection to the robot at 10.255.255.1"):
        UR5e("10.255.255.1", Safety("ur5e"))
    monkeypatch.setitem(sys.modules, "rtde_control", None)
    with pytest.raises(UserError, match="ur_rtde is not installed .*requirements-robot.txt"):
        UR5e("127.0.0.1", Safety("ur5e"))
    with pytest.raises(UserError, match="is a Franka"):
        real_robot.run(real_robot.Run(arm="ur5e", policy="demonstrator"))


class Swing:
    """A policy that turns joint 1 by 0.02 rad a step."""

    config = {"cameras": ("front",), "image_size": (4, 4), "horizon": 8}

    def request(self, images, qpos, instruction, progress):
        chunk = np.tile(np.append(HOME, 0.0), (8, 1))
        chunk[:, 0] = qpos[0] + 0.02 * np.arange(8)
        self.answer = Answer(chunk, images, 0.01)

    def receive(self, timeout=0.0):
        return self.answer


def test_the_control_loop_drives_it(robot, arm, tmp_path):
    log = Log(tmp_path / "log.hdf5")
    safety = Safety("ur5e", 1.0, (-2, -2, -2, 2, 2, 2))
    settings = real_robot.Run(arm="ur5e", yes=True)
    drive = (arm, Eyes(), Swing(), safety, log, settings, "", 12, real_robot.never)
    assert len(real_robot.drive(*drive)) == 12
    turned = np.array(robot.positions)[:, 0]
    assert turned[-1] > HOME[0] + 0.05
    assert np.median(np.abs(np.diff(turned))) < 0.01  # half a step: also between the commands


def test_ur_rtde_has_the_calls_of_the_stand_in():
    """Where ur_rtde is installed: the names and the documented arguments."""
    control = pytest.importorskip("rtde_control")
    receive = pytest.importorskip("rtde_receive")
    stand_in = make_modules(Robot())
    for theirs, ours in ((control, "rtde_control"), (receive, "rtde_receive")):
        name = next(name for name in vars(stand_in[ours]) if name.startswith("RTDE"))
        for call in vars(getattr(stand_in[ours], name)):
            if call.startswith("__"):
                continue
            assert hasattr(getattr(theirs, name), call), call
    words = control.RTDEControlInterface.servoJ.__doc__
    for argument in ("q", "speed", "acceleration", "time", "lookahead_time", "gain"):
        assert f"``{argument}``" in words
