"""The simulated arm behind the robot's own network protocol: for real_robot.py without a robot.

    workcell = SimulatedWorkcell("pick_and_lift", seed=0)
    franky.Robot(workcell.host)                    as a real one
    stamps, images = workcell.read_frames()        {camera: s}, {camera: (H, W, 3)}
    workcell.close()

Two processes share the scene of sims/mujoco_panda.py (same task, same seed: same objects, same
physics, same servo):
  the arm      a `franky-sim` server on a loopback address; MuJoCo steps behind it, 1,000 times a
               second, in real time;
  the cameras  draw what is there, at their own pace, and stamp each round of pictures with
               time.monotonic().
"""

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress
from functools import partial

import numpy as np

from genima.episodes import CAMERAS
from genima.files import UserError
from sims.demonstrator import expert_actions
from sims.mujoco_panda import PandaEnv, mujoco  # before franky_sim: it chooses how MuJoCo draws

# isort: split
import franky_sim
from franky_sim.constants import FRANKA_HAND_MAX_WIDTH
from franky_sim.mujoco_simulator import FrankaMujocoRobot

ROUNDS = 4  # rounds of pictures kept, so that a reader has time to copy one
TICK = 0.001  # seconds of the protocol's control cycle


class SharedState(ctypes.Structure):
    """What the arm's process reports in shared memory."""

    _fields_ = [
        ("success", ctypes.c_double),  # of the task, so far
        ("failed", ctypes.c_double),
        ("speed", ctypes.c_double),  # rad/s of the fastest joint
        ("guided", ctypes.c_double),  # whether the demonstrator moves the arm; set by the program
        ("lost", ctypes.c_double),  # seconds that the simulated clock has lost
    ]


class ProtocolArm(FrankaMujocoRobot):
    """The protocol's robot, moved by the servos of sims/mujoco_panda.py, not franky-sim's own."""

    def _joint_position_control(self, target):
        self.torque_control(np.zeros(7))  # the protocol reports a torque; the servos make it
        self._data.ctrl[:7] = target

    def _torque_control(self, torques):
        self._applied_torques = self._data.actuator_force[:7].copy()

    def set_hand_goal(self, width, max_velocity, max_force):
        self._data.ctrl[7] = 255 * np.clip(width / FRANKA_HAND_MAX_WIDTH, 0, 1)


# ------------------------------------------------------------------------------ the two processes
def end_with_parent():
    """End this process when the one that started it is gone, however it ended."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def start_process():
    """What both processes do first."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a robot hears no signals
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    with suppress(OSError):
        os.nice(-10)  # root may ask that other programs do not slow down the arm and its cameras


def serve_arm(workcell, prepare, pipe):
    """The arm's process: one step of the physics and of the protocol per millisecond."""
    start_process()
    env = workcell.make_scene()
    data = env.data
    state = workcell.state
    shared_qpos = np.frombuffer(workcell.qpos)
    env.model.opt.timestep = TICK
    arm = ProtocolArm(initial_q=data.qpos[:7])
    arm._attach_to_scene(env.model, data, "")
    if prepare:
        prepare()
    server = franky_sim.FrankaRobotServer(arm, franky_sim.LocalHostnames())
    server.init()
    pipe.send(arm.hostname)
    script = None  # the demonstrator's actions
    action = None  # its present one (8,), which overrides the network's commands
    tick = 0
    start = time.monotonic()
    while True:
        if tick % 100 == 0:  # ten times a second, as in PandaEnv.step
            state.success = max(state.success, env.task.success(env))
            state.failed = max(state.failed, env.task.failed(env))
            if state.guided:
                if script is None:
                    script = expert_actions(env)
                following = next(script, None)
                if following is None:
                    state.guided = False
                else:
                    action = following
        server.process_commands()
        if action is not None:
            data.ctrl[:] = *action[:7], 255 * (action[7] > 0.5)
        mujoco.mj_step(env.model, data)
        arm._post_step()
        server.send_state()
        shared_qpos[:] = data.qpos
        state.speed = np.abs(data.qvel[:7]).max()
        tick += 1
        ahead = start + tick * TICK - time.monotonic()
        time.sleep(max(ahead, 0))
        if ahead < -0.1:  # too slow: the robot's clock loses the time, and does not hurry
            start -= ahead
            state.lost -= ahead


def draw_cameras(workcell, fps):
    """The cameras' process: each round of pictures goes into the next of ROUNDS places."""
    start_process()
    env = workcell.make_scene()
    stamps, pixels = workcell.shared_rounds()
    height, width = workcell.size
    for camera in workcell.cameras:
        env.render_camera(camera, height, width)  # the first one takes longer
    count = 0
    due = time.monotonic()
    while True:
        stamp = time.monotonic()
        place = count % ROUNDS
        env.data.qpos[:] = workcell.qpos
        mujoco.mj_forward(env.model, env.data)
        stamps[place] = 0  # not to be read while it is drawn
        for i, camera in enumerate(workcell.cameras):
            pixels[place, i] = env.render_camera(camera, height, width)
        stamps[place] = stamp
        count += 1
        # A round that was late is made up for, up to as many as there are places.
        due = max(due + 1 / fps, time.monotonic() - (ROUNDS - 1) / fps)
        time.sleep(max(due - time.monotonic(), 0))


# ----------------------------------------------------------------------------------- the workcell
class SimulatedWorkcell:
    """The simulated arm, its cameras and its task; used as robot/workcell.py's Workcell."""

    simulated = True

    def __init__(
        self, task, seed=0, variation=None, size=(64, 64), views=None, fps=20, prepare=None
    ):
        """Starts both processes and waits until the arm listens.

        size: (height, width) of the pictures; views: {a name: the simulated camera that goes by
        it}, by default each by its own; fps: rounds of pictures a second; prepare: called first in
        the arm's process (tests break things there).
        """
        views = views or dict(zip(CAMERAS, CAMERAS))
        unknown = set(views.values()) - set(CAMERAS)
        if unknown:
            raise UserError(
                f"There is no simulated camera '{unknown.pop()}', only {', '.join(CAMERAS)}; "
                "a robot's need --robot too. Other names: --cameras hand_cam=wrist room=front."
            )
        self.task = task
        self.seed = seed
        self.variation = variation
        self.size = size
        self.names = tuple(views)
        self.cameras = tuple(views.values())
        self.demonstrating = False
        env = self.make_scene()
        self.variation = env.variation
        self.instruction = env.instruction
        self.max_steps = env.task.max_steps
        self.load_demonstrator = partial(load_demonstrator, task, seed, env.variation)
        self.calibration = dict(zip(self.names, calibration_of(env)))
        context = multiprocessing.get_context("spawn")
        self.state = context.RawValue(SharedState)
        self.qpos = context.RawArray(ctypes.c_double, env.data.qpos.tolist())
        self.stamps = context.RawArray(ctypes.c_double, ROUNDS)
        bytes_of_round = len(views) * size[0] * size[1] * 3
        self.pixels = context.RawArray(ctypes.c_uint8, ROUNDS * bytes_of_round)
        pipe, child_pipe = context.Pipe()
        self.processes = []
        jobs = [(serve_arm, (self, prepare, child_pipe)), (draw_cameras, (self, fps))]
        for target, arguments in jobs:
            process = context.Process(target=target, args=arguments, daemon=True)
            process.start()
            self.processes.append(process)
        child_pipe.close()
        try:
            self.host = pipe.recv()
        except EOFError:
            self.close()
            raise UserError(
                "The simulated robot did not start: its own message is above."
            ) from None
        except BaseException:  # Ctrl-C
            self.close()
            raise

    def __getstate__(self):  # what another process can be given
        return vars(self) | {"processes": []}

    def make_scene(self):
        """The environment at the beginning of the episode."""
        env = PandaEnv(self.task, self.size, self.cameras, images=False)
        env.reset(seed=self.seed, options={"variation": self.variation})
        return env

    def shared_rounds(self):
        """The shared memory of stamps (ROUNDS,), s, and pictures (ROUNDS, cameras, H, W, 3)."""
        pixels = np.frombuffer(self.pixels, np.uint8)
        shape = (ROUNDS, len(self.cameras), *self.size, 3)
        return np.frombuffer(self.stamps), pixels.reshape(shape)

    def read_frames(self):
        """The newest whole round of pictures: {camera: stamp (s of time.monotonic(), 0 before the
        first)}, {camera: (H, W, 3) uint8}."""
        stamps, pixels = self.shared_rounds()
        newest = int(stamps.argmax())
        images = dict(zip(self.names, pixels[newest].copy()))
        return dict.fromkeys(self.names, float(stamps[newest])), images

    def get(self, name):
        """A field of SharedState."""
        return getattr(self.state, name)

    def is_successful(self):
        return bool(self.state.success)

    def is_over(self):
        """Whether there is nothing left to do, or the demonstration has ended."""
        if self.demonstrating:
            return not self.state.guided
        return bool(self.state.success or self.state.failed)

    def start_demonstration(self, settings):
        """Lets the scripted demonstrator move the arm."""
        self.demonstrating = True
        self.state.guided = True

    def close(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def calibration_of(env):
    """Where each of the cameras is, as its entry in a calibration file says it."""
    entries = []
    for camera in env.cameras:
        intrinsics, pose = env.camera_parameters(camera)
        entry = {"intrinsics": intrinsics}
        if camera == "wrist":
            entry["last_joint_from_camera"] = np.linalg.inv(env.joint_poses()[-2]) @ pose
        else:
            entry["world_from_camera"] = pose
        entries.append(entry)
    return entries


def load_demonstrator(task, seed, variation, size=64, horizon=8):
    """A scripted demonstration in the place of a policy, for trying out everything else.

    Returns config and act, as robot/policy_process.py's load_policy.
    """
    from genima.policy import OraclePainter
    from sims import make_env
    from sims.demonstrator import record_oracle

    oracle = OraclePainter(record_oracle(task, seed, variation), horizon)
    env = make_env(task, (size, size), CAMERAS)

    def act(images, qpos, instruction, progress):
        env.data.qpos[:7] = qpos[:7]  # the wrist's camera is where the arm is
        mujoco.mj_forward(env.model, env.data)
        first = max(round(progress) - 1, 0)
        frames = np.minimum(first + np.arange(horizon), len(oracle.demo.action) - 1)
        return oracle.demo.action[frames], oracle.paint(env, images, frames[0])

    return {"cameras": CAMERAS, "image_size": (size, size), "horizon": horizon}, act
