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
from franky_sim.base_simulator import BaseSimulator
from franky_sim.constants import FRANKA_HAND_MAX_WIDTH
from franky_sim.mujoco_simulator import FrankaMujocoRobot

from episodes import CAMERAS, UserError
from sims.mujoco_panda import PandaEnv

STATE = ("time", "success", "failed", "speed", "guided", "lost")  # what precedes qpos and the mocap poses in shared memory
ROUNDS = 4  # rounds of pictures kept, so that a reader has time to copy one


class Arm(FrankaMujocoRobot):
    """The protocol's robot, moved by the servos of sims/mujoco_panda.py instead of franky-sim's own."""

    guided = None  # (8,) joints and gripper that a demonstrator wants, whatever the network says; None: the network decides

    def _joint_position_control(self, target):
        self.torque_control(np.zeros(7))  # the protocol reports a torque; the servos make the real one
        self._data.ctrl[:7] = target if self.guided is None else self.guided[:7]

    def _torque_control(self, torques):
        self._applied_torques = self._data.actuator_force[:7].copy()

    def set_hand_goal(self, width, max_velocity, max_force):
        self._data.ctrl[7] = 255 * np.clip(width / FRANKA_HAND_MAX_WIDTH, 0, 1)

    def _pre_step(self):
        if self.guided is not None:
            self._data.ctrl[7] = 255 * (self.guided[7] > 0.5)


class Scene(BaseSimulator):
    """A PandaEnv that has been reset, as franky-sim wants a simulator."""

    def __init__(self, env):
        super().__init__()
        self.env, self.arm = env, Arm(initial_q=env.data.qpos[:7])
        env.model.opt.timestep = 0.001  # the protocol's tick
        self.arm._attach_to_scene(env.model, env.data, "")

    def _get_robots(self):
        return [self.arm]

    def _step(self):
        mujoco.mj_step(self.env.model, self.env.data)


def scene(task, seed, variation, size, cameras):
    """The environment at the beginning of an episode -> env, info."""
    env = PandaEnv(task, size, cameras, images=False)
    _, info = env.reset(seed=seed, options={"variation": variation})
    return env, info


def first_of_all():
    """What others do on this machine is not to slow the arm and its cameras down: root may ask for that."""
    with suppress(OSError):
        os.nice(-10)


def serve(task, seed, variation, size, cameras, guided, prepare, state, pipe):
    """The arm's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a robot does not hear Ctrl-C
    parent, view = os.getppid(), np.frombuffer(state)
    env, info = scene(task, seed, variation, size, cameras)
    simulation = Scene(env)
    if prepare:
        prepare()
    first_of_all()
    with simulation, franky_sim.SimulationServer(simulation) as server:
        calibration, last = {}, env.joint_poses()[-2]
        for camera in cameras:
            intrinsics, pose = env.camera(camera)
            seen = {"last_joint_from_camera": np.linalg.inv(last) @ pose} if camera == "wrist" else {"world_from_camera": pose}
            calibration[camera] = {"intrinsics": intrinsics} | seen
        about = {"max_steps": env.task.max_steps} | {key: info[key] for key in ("variation", "instruction")}
        pipe.send({"host": simulation.arm.hostname, "calibration": calibration} | about)
        demonstration, tick, begin = None, 0, time.monotonic()
        while os.getppid() == parent:
            if tick % 100 == 0:  # ten times a second, as in PandaEnv.step
                view[1:3] = np.maximum(view[1:3], [env.task.success(env), env.task.failed(env)])
                if guided and pipe.poll():
                    pipe.recv()
                    from collect_demos import demonstration as demonstrate

                    demonstration, simulation.arm.guided = demonstrate(env), np.append(env.data.ctrl[:7], env.data.ctrl[7] / 255)
                if demonstration:
                    action = next(demonstration, None)
                    simulation.arm.guided = simulation.arm.guided if action is None else action
                    view[STATE.index("guided")] = action is not None
            for robot_server in server.robot_servers:  # franky-sim's run_once, less its sleep
                robot_server.process_commands()
            simulation.step()
            for robot_server in server.robot_servers:
                robot_server.send_state()
            poses = np.concatenate([env.data.mocap_pos, env.data.mocap_quat], axis=1)
            view[len(STATE):] = np.concatenate([env.data.qpos, poses.ravel()])
            view[STATE.index("speed")] = np.abs(env.data.qvel[:7]).max()
            view[0] = time.monotonic()
            tick += 1
            ahead = begin + tick * 0.001 - time.monotonic()
            if ahead > 0:
                time.sleep(ahead)
            elif ahead < -0.1:  # too slow for real time: the robot's clock loses it, rather than hurrying afterwards
                begin -= ahead
                view[STATE.index("lost")] -= ahead


def watch(task, seed, variation, size, cameras, fps, state, stamps, pixels):
    """The cameras' process: each round of pictures goes into the next of ROUNDS places."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent, view = os.getppid(), np.frombuffer(state)
    stamps, pixels = np.frombuffer(stamps), np.frombuffer(pixels, np.uint8).reshape(ROUNDS, len(cameras), *size, 3)
    env, _ = scene(task, seed, variation, size, cameras)
    count, data = 0, env.data
    first_of_all()
    for camera in cameras:
        env.picture(camera, *size)  # the first one takes longer
    due = time.monotonic()
    while os.getppid() == parent:
        if view[0]:
            stamp = time.monotonic()
            data.qpos[:] = view[len(STATE):][: env.model.nq]
            poses = view[len(STATE) + env.model.nq:].reshape(-1, 7)
            data.mocap_pos[:], data.mocap_quat[:] = poses[:, :3], poses[:, 3:]
            mujoco.mj_kinematics(env.model, data)
            mujoco.mj_comPos(env.model, data)
            mujoco.mj_camlight(env.model, data)
            place = count % ROUNDS
            stamps[place] = 0
            for i, camera in enumerate(cameras):
                pixels[place, i] = env.picture(camera, *size)
            stamps[place] = stamp
            count += 1
        due = max(due + 1 / fps, time.monotonic() - (ROUNDS - 1) / fps)  # a round that was late is made up for
        time.sleep(max(due - time.monotonic(), 0))


class Bench:
    """Starts both processes and waits until the arm listens. size: (height, width) of the pictures; fps: rounds of pictures a second;
    guided: the scripted demonstrator moves the arm, once `demonstrate` is called; prepare: called first in the arm's process (tests
    break things there)."""

    sim = True

    def __init__(self, task, seed=0, variation=None, size=(64, 64), cameras=CAMERAS, fps=20, guided=False, prepare=None):
        if unknown := set(cameras) - set(CAMERAS):
            raise UserError(f"There is no simulated camera '{unknown.pop()}', only {', '.join(CAMERAS)}; a robot's need --robot too.")
        env, info = scene(task, seed, variation, size, cameras)
        variation, self.cameras, self.size, self.seed = info["variation"], cameras, size, seed
        self.policy = partial(demonstrator, task, seed, variation)
        context = multiprocessing.get_context("spawn")
        self.state = context.RawArray(ctypes.c_double, len(STATE) + env.model.nq + 7 * env.model.nmocap)
        self.stamps = context.RawArray(ctypes.c_double, ROUNDS)
        self.pixels = context.RawArray(ctypes.c_uint8, ROUNDS * len(cameras) * size[0] * size[1] * 3)
        self.pipe, there = context.Pipe()
        scene_of = (task, seed, variation, size, cameras)
        self.processes = [context.Process(target=serve, args=(*scene_of, guided, prepare, self.state, there), daemon=True),
                          context.Process(target=watch, args=(*scene_of, fps, self.state, self.stamps, self.pixels), daemon=True)]
        for process in self.processes:
            process.start()
        there.close()
        try:
            self.__dict__.update(self.pipe.recv())  # host, calibration, variation, max_steps, instruction
        except EOFError:
            self.close()
            raise UserError("The simulated robot did not start: its own message is above.") from None

    def __getstate__(self):  # what another process can be given: the shared memory and where the arm listens
        return {name: value for name, value in self.__dict__.items() if name not in ("pipe", "processes")} | {"processes": []}

    def read(self):
        """The newest whole round of pictures -> {camera: stamp (s, time.monotonic()), 0 before the first}, {camera: (H, W, 3) uint8}."""
        stamps = np.frombuffer(self.stamps)
        pixels = np.frombuffer(self.pixels, np.uint8).reshape(ROUNDS, len(self.cameras), *self.size, 3)
        newest = int(stamps.argmax())
        stamp, pictures = float(stamps[newest]), pixels[newest].copy()
        return dict.fromkeys(self.cameras, stamp), dict(zip(self.cameras, pictures))

    def get(self, name):
        return np.frombuffer(self.state)[STATE.index(name)]

    def success(self):
        return bool(self.get("success"))

    def over(self):
        """Whether there is nothing left to do."""
        return self.get("success") or self.get("failed")

    def demonstrate(self):
        self.pipe.send("go")

    def close(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def demonstrator(task, seed, variation, size=64, horizon=8):
    """A policy as `trained` in robot_io.py makes one, without networks: a scripted demonstration. For trying out everything else."""
    from evaluate import Oracle, environment

    oracle, env = Oracle(task, seed, variation, horizon), environment(task, (size, size), CAMERAS)

    def policy(pictures, qpos, instruction, step):
        env.data.qpos[:7] = qpos[:7]  # the wrist's camera is where the arm is
        mujoco.mj_forward(env.model, env.data)
        steps = np.minimum(max(round(step) - 1, 0) + np.arange(horizon), len(oracle.demo.action) - 1)
        return oracle.paint(env, pictures, steps[0]), oracle.demo.action[steps]

    return {"cameras": CAMERAS, "image_size": (size, size), "horizon": horizon}, policy
