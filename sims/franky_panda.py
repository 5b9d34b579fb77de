"""The simulated arm behind the robot's own network protocol: what real_robot.py drives where there is no robot.

    bench = Bench("pick_and_lift", seed=0);  franky.Robot(bench.host);  bench.read();  bench.close()

Two processes share the scene of sims/mujoco_panda.py (same task, same seed: same objects, same physics, same servo):
  the arm      a `franky-sim` server on a loopback address; MuJoCo steps behind it, 1,000 times a second, in real time;
  the cameras  draw what is there, at their own pace, and stamp each round of pictures with time.monotonic().
"""

import ctypes
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from functools import partial

import franky_sim
import mujoco
import numpy as np
from franky_sim.constants import FRANKA_HAND_MAX_WIDTH
from franky_sim.mujoco_simulator import FrankaMujocoRobot

from genima.episodes import CAMERAS
from genima.files import UserError
from sims.demonstrator import expert_actions
from sims.mujoco_panda import PandaEnv

ROUNDS = 4  # rounds of pictures kept, so that a reader has time to copy one


class State(ctypes.Structure):
    """What the arm's process says in shared memory: the task's success and failure, how fast the fastest joint is (rad/s), whether the
    demonstrator guides the arm (asked for by the main program), and seconds that the simulated clock has lost."""

    _fields_ = [
        (name, ctypes.c_double) for name in ("success", "failed", "speed", "guided", "lost")
    ]


class Arm(FrankaMujocoRobot):
    """The protocol's robot, moved by the servos of sims/mujoco_panda.py instead of franky-sim's own."""

    def _joint_position_control(self, target):
        self.torque_control(
            np.zeros(7)
        )  # the protocol reports a torque; the servos make the real one
        self._data.ctrl[:7] = target

    def _torque_control(self, torques):
        self._applied_torques = self._data.actuator_force[:7].copy()

    def set_hand_goal(self, width, max_velocity, max_force):
        self._data.ctrl[7] = 255 * np.clip(width / FRANKA_HAND_MAX_WIDTH, 0, 1)


def begin(bench):
    """How both processes begin -> the scene, and a function that says whether the main program is still there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a robot does not hear Ctrl-C
    with suppress(OSError):
        os.nice(
            -10
        )  # root may ask that others on this machine do not slow the arm and its cameras down
    parent = os.getppid()
    return bench.scene(), lambda: os.getppid() == parent


def serve(bench, prepare, pipe):
    """The arm's process."""
    env, needed = begin(bench)
    data, state, qpos = env.data, bench.state, np.frombuffer(bench.qpos)
    env.model.opt.timestep = 0.001  # the protocol's tick
    arm = Arm(initial_q=data.qpos[:7])
    arm._attach_to_scene(env.model, data, "")
    if prepare:
        prepare()
    server = franky_sim.FrankaRobotServer(arm, franky_sim.LocalHostnames())
    server.init()
    pipe.send(arm.hostname)
    script = action = (
        None  # of the demonstrator, and where it wants joints and gripper (8,), whatever the network says
    )
    tick, start = 0, time.monotonic()
    while needed():
        if tick % 100 == 0:  # ten times a second, as in PandaEnv.step
            state.success = max(state.success, env.task.success(env))
            state.failed = max(state.failed, env.task.failed(env))
            if state.guided:
                script = script or expert_actions(env)
                wanted = next(script, None)
                action, state.guided = action if wanted is None else wanted, wanted is not None
        server.process_commands()
        if action is not None:
            data.ctrl[:] = *action[:7], 255 * (action[7] > 0.5)
        mujoco.mj_step(env.model, data)
        arm._post_step()
        server.send_state()
        qpos[:], state.speed = data.qpos, np.abs(data.qvel[:7]).max()
        tick += 1
        ahead = start + tick * 0.001 - time.monotonic()
        time.sleep(max(ahead, 0))
        if (
            ahead < -0.1
        ):  # too slow for real time: the robot's clock loses it, rather than hurrying afterwards
            start -= ahead
            state.lost -= ahead


def watch(bench, fps):
    """The cameras' process: each round of pictures goes into the next of ROUNDS places."""
    env, needed = begin(bench)
    stamps, pixels = bench.rounds()
    for camera in bench.cameras:
        env.render_camera(camera, *bench.size)  # the first one takes longer
    count, due = 0, time.monotonic()
    while needed():
        stamp, place = time.monotonic(), count % ROUNDS
        env.data.qpos[:] = bench.qpos
        mujoco.mj_forward(env.model, env.data)
        stamps[place] = 0
        for i, camera in enumerate(bench.cameras):
            pixels[place, i] = env.render_camera(camera, *bench.size)
        stamps[place] = stamp
        count += 1
        due = max(
            due + 1 / fps, time.monotonic() - (ROUNDS - 1) / fps
        )  # a round that was late is made up for
        time.sleep(max(due - time.monotonic(), 0))


class Bench:
    """Starts both processes and waits until the arm listens. size: (height, width) of the pictures; fps: rounds of pictures a second;
    prepare: called first in the arm's process (tests break things there)."""

    sim = True

    def __init__(
        self, task, seed=0, variation=None, size=(64, 64), cameras=CAMERAS, fps=20, prepare=None
    ):
        if unknown := set(cameras) - set(CAMERAS):
            raise UserError(
                f"There is no simulated camera '{unknown.pop()}', only {', '.join(CAMERAS)}; a robot's need --robot too."
            )
        self.task, self.seed, self.variation, self.size, self.cameras = (
            task,
            seed,
            variation,
            size,
            cameras,
        )
        env = self.scene()
        self.variation, self.instruction, self.max_steps = (
            env.variation,
            env.instruction,
            env.task.max_steps,
        )
        self.policy, self.calibration = partial(demonstrator, task, seed, self.variation), {}
        for camera in cameras:
            intrinsics, pose = env.camera_parameters(camera)
            mounted = {"last_joint_from_camera": np.linalg.inv(env.joint_poses()[-2]) @ pose}
            self.calibration[camera] = {"intrinsics": intrinsics} | (
                mounted if camera == "wrist" else {"world_from_camera": pose}
            )
        context = multiprocessing.get_context("spawn")
        self.state, self.qpos = (
            context.RawValue(State),
            context.RawArray(ctypes.c_double, env.data.qpos.tolist()),
        )
        self.stamps = context.RawArray(ctypes.c_double, ROUNDS)
        self.pixels = context.RawArray(
            ctypes.c_uint8, ROUNDS * len(cameras) * size[0] * size[1] * 3
        )
        here, there = context.Pipe()
        self.processes = []
        for target, arguments in ((serve, (self, prepare, there)), (watch, (self, fps))):
            self.processes.append(context.Process(target=target, args=arguments, daemon=True))
            self.processes[-1].start()
        there.close()
        try:
            self.host = here.recv()
        except EOFError:
            self.close()
            raise UserError(
                "The simulated robot did not start: its own message is above."
            ) from None

    def __getstate__(self):  # what another process can be given
        return vars(self) | {"processes": []}

    def scene(self):
        """The environment at the beginning of the episode."""
        env = PandaEnv(self.task, self.size, self.cameras, images=False)
        env.reset(seed=self.seed, options={"variation": self.variation})
        return env

    def rounds(self):
        """The shared memory of stamps (ROUNDS,), s of time.monotonic(), and pictures (ROUNDS, cameras, H, W, 3)."""
        return np.frombuffer(self.stamps), np.frombuffer(self.pixels, np.uint8).reshape(
            ROUNDS, len(self.cameras), *self.size, 3
        )

    def read(self):
        """The newest whole round of pictures -> {camera: stamp (s, time.monotonic()), 0 before the first}, {camera: (H, W, 3) uint8}."""
        stamps, pixels = self.rounds()
        newest = int(stamps.argmax())
        return dict.fromkeys(self.cameras, float(stamps[newest])), dict(
            zip(self.cameras, pixels[newest].copy())
        )

    def get(self, name):
        return getattr(self.state, name)

    def success(self):
        return bool(self.state.success)

    def alpha_composite(self):
        """Whether there is nothing left to do."""
        return self.state.success or self.state.failed

    def demonstrate(self):
        """Lets the scripted demonstrator move the arm, until it is done and state.guided is 0."""
        self.state.guided = 1

    def close(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def demonstrator(task, seed, variation, size=64, horizon=8):
    """A policy as `trained` in robot_io.py makes one, without networks: a scripted demonstration. For trying out everything else."""
    from genima.policy import OraclePainter
    from sims import make_env
    from sims.demonstrator import record_oracle

    oracle, env = (
        OraclePainter(record_oracle(task, seed, variation), horizon),
        make_env(task, (size, size), CAMERAS),
    )

    def policy(pictures, qpos, instruction, step):
        env.data.qpos[:7] = qpos[:7]  # the wrist's camera is where the arm is
        mujoco.mj_forward(env.model, env.data)
        steps = np.minimum(
            max(round(step) - 1, 0) + np.arange(horizon), len(oracle.demo.action) - 1
        )
        return oracle.paint(env, pictures, steps[0]), oracle.demo.action[steps]

    return {"cameras": CAMERAS, "image_size": (size, size), "horizon": horizon}, policy
