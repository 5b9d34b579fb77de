"""Stage 5: the loop on a Franka arm, or on one simulated behind the robot's own network protocol.

In:   runs/demo/controlnet/, runs/demo/act/            the trained painter and controller   (run)
Out:  runs/demo/episodes/<task>/real_<time>.hdf5       demonstrations                       (record)
      runs/demo/robot/<time>_<task>/                   log.hdf5 (an episode file that also holds painted targets, commands, timings and
                                                       events), first_target.png, timing.png (run), film.mp4, film.png (replay)

    python real_robot.py run                                       the simulated arm, tasks and cameras of sims/mujoco_panda.py
    python real_robot.py run --robot 172.16.0.2 --calibration cameras.yaml --cameras front=832112070001 wrist=832112070002 ...
    python real_robot.py record --robot 172.16.0.2 --task fold_cloth ...        guide the arm by hand; without --robot a script does
    python real_robot.py replay runs/demo/robot/<time>_<task>      the film; --keep adds the run to the demonstrations

Paper, sections 3.3 and 4.3: look, paint the target, turn it into a chunk of joint positions, follow the chunk at 10 Hz, look again.
The next picture is painted beside the motion, in a process of its own, while the last step of the present chunk is under way: action 0
of a chunk belongs to the moment of its picture, which is over when the chunk arrives, so the motion goes on with action 1 and never
pauses. Whatever goes wrong, the arm holds its position, the log is written, and one sentence says what it was.
"""

import fcntl
import json
import math
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the painter's threads would get into the sender's way

import numpy as np
import tyro
from PIL import Image

from episodes import CAMERAS, JOINT_LIMITS, Episode, UserError, read_episode, run_stage, write_episode, write_whole
from render_spheres import Chain, load_calibration, turns

HZ = 10  # commands a second (paper: 10 Hz and below on the real arm)
VELOCITY = np.array([2.175] * 4 + [2.61] * 3)  # rad/s, the lower of Panda's and FR3's (data sheets)
HAND_WIDTH = 0.08  # metres between the open fingers
GRIPPER_SPEED, GRIPPER_FORCE = 0.1, 20.0  # m/s, N


class Fault(UserError):
    """Why the arm was stopped."""


# ------------------------------------------------------------------------------------------------------------------ safety
@dataclass
class Safety:
    """All that keeps the arm from doing harm, except the robot's own reflexes. Every check raises a Fault; `drive` then holds the arm."""

    arm: str = "fr3"
    speed: float = 0.2  # share of the joints' greatest velocities
    workspace: tuple = (0.2, -0.5, 0.005, 0.8, 0.5, 0.75)  # x, y, z from, x, y, z to: where the fingertips may go, metres
    watchdog: float = 0.5  # seconds that the policy may be late
    stale: float = 0.3  # seconds that a picture, or word from the robot, may be old

    margin = 0.05  # rad that commands keep away from the joints' limits
    jump = 0.35  # rad from one command to the next wish: thrice a fast demonstration's step

    def __post_init__(self):
        if not 0 < self.speed <= 1:
            raise UserError("--speed must be above 0 and at most 1.")
        self.chain = franka_chain()
        self.low, self.high = np.array(JOINT_LIMITS[self.arm]) + [[self.margin], [-self.margin]]

    def check_chunk(self, chunk):
        """What the policy gave, (K, 8)."""
        if not np.isfinite(chunk).all():
            raise Fault("The policy gave NaN or infinite numbers: look at the pictures in the log; a camera may be covered, or training diverged.")

    def step(self, previous, wish):
        """The command (7,) on the way from the previous one to the policy's wish (7,), and how much of the way it is (0..1).

        A wish that is merely fast is approached at the speed cap, and the chunk is played more slowly. One that no demonstration
        would make, or that is out of bounds, is refused.
        """
        change = np.abs(wish - previous)
        if change.max() > self.jump:
            raise Fault(f"The policy wants joint {change.argmax() + 1} to jump by {change.max():.2f} rad (at most {self.jump} are allowed).")
        share = min(1.0, self.speed / (HZ * change / VELOCITY).max()) if change.any() else 1.0
        command = previous + share * (wish - previous)
        outside = np.maximum(self.low - command, command - self.high)
        # Back from outside is allowed, or an arm that was led there by hand could never leave.
        if outside.max() > 0 and (outside > np.maximum(self.low - previous, previous - self.high)).any():
            raise Fault(f"The policy wants joint {outside.argmax() + 1} at {command[outside.argmax()]:.2f} rad, beyond its limit less {self.margin} rad.")
        tool, before = (self.chain.joint_poses(joints)[-1, :3, 3] for joints in (command, previous))
        if self.outside_box(tool) > max(self.outside_box(before), 0):
            raise Fault(f"The policy wants the fingertips at {np.round(tool, 3).tolist()}, outside the workspace {self.workspace} (--workspace).")
        return command, share

    def outside_box(self, tool):
        return max(np.maximum(np.subtract(self.workspace[:3], tool), np.subtract(tool, self.workspace[3:])).max(), 0)

    def check_motion(self, qvel):
        if (np.abs(qvel[:7]) > 0.95 * VELOCITY).any():
            raise Fault(f"Joint {np.abs(qvel[:7] / VELOCITY).argmax() + 1} moves at more than 95 % of its greatest velocity.")

    def check_fresh(self, stamps, now):
        """stamps: camera -> when its picture was taken, s."""
        oldest = min(stamps, key=stamps.get)
        if now - stamps[oldest] > self.stale:
            raise Fault(f"Camera '{oldest}' has sent no picture for {now - stamps[oldest]:.1f} s: check its cable.")

    def check_heard(self, seconds):
        if seconds > self.stale:
            raise Fault(f"The robot has been silent for {seconds:.1f} s: check network and power.")

    def check_waiting(self, seconds):
        if seconds > self.watchdog:
            raise Fault(f"The policy is late by more than {self.watchdog} s (--watchdog): is the machine busy, or the network too large for it?")


def confirm(painted, path, yes):
    """Before the first motion a person sees the painted target and says yes."""
    with write_whole(path) as temporary:
        Image.fromarray(np.concatenate(list(painted.values()), axis=1)).save(temporary, format="png")
    print(f"The painted target is in {path}.")
    if not yes and input("Is it where the gripper should go, and is the emergency stop in your hand? y Enter moves the arm: ").strip() != "y":
        raise Fault("Not confirmed, so nothing was sent.")


REFLEXES = {  # libfranka's names in words
    "cartesian_reflex": "it touched something: free it, and unlock it in Desk",
    "joint_reflex": "a joint met a force: free it, and unlock it in Desk",
    "communication_constraints": "commands came too late: connect by cable, quit other programs, use a real-time kernel",
    "velocity_violation": "a joint was to move too fast: lower --speed",
    "acceleration": "a joint was to accelerate too fast: lower --speed",
    "jerk": "a joint was to accelerate too suddenly: lower --speed",
    "position_limits": "a joint is at its limit: guide it away by hand",
    "self_collision": "it would have touched itself: guide it away by hand",
    "User stop": "the stop button is pressed: release it",
    "Timeout": "it no longer answers: check network and power",
    "connection": "it no longer answers: check network and power",
}  # fmt: skip


def in_words(error):
    text = " ".join(str(error).split())
    advice = [words for name, words in REFLEXES.items() if name in text]
    return f"The robot stopped, {advice[0]} ({text})." if advice else f"The robot stopped ({text}): look at Desk, and start again."


# ------------------------------------------------------------------------------------------------------------------ the arm
def franka_chain(cameras=None):
    """The kinematics of Panda and FR3 (Denavit and Hartenberg after Craig; data sheet) with hand, and where the cameras are."""
    a = [0, 0, 0, 0.0825, -0.0825, 0, 0.088]
    d = [0.333, 0, 0.316, 0, 0.384, 0, 0]
    alpha = np.pi / 2 * np.array([0, -1, 1, 1, -1, 1, 1])
    links = np.zeros((7, 4, 4))
    for i, (sine, cosine) in enumerate(zip(np.sin(alpha), np.cos(alpha))):
        links[i] = [[1, 0, 0, a[i]], [0, cosine, -sine, -sine * d[i]], [0, sine, cosine, cosine * d[i]], [0, 0, 0, 1]]
    tool = turns(np.array(-np.pi / 4))
    tool[2, 3] = 0.107 + 0.1034  # flange and fingertips
    poses = {key: {camera: entry[key] for camera, entry in (cameras or {}).items() if key in entry}
             for key in ("last_joint_from_camera", "world_from_camera")}
    return Chain(links.round(12), tool, *poses.values())


class Franka:
    """The arm and its hand, through `franky-control`."""

    def __init__(self, host, safety):
        try:
            import franky
        except ImportError as error:
            raise UserError(f"franky-control is not installed ({error}): pip install -r requirements-robot.txt (Linux on x86-64 alone).") from None
        self.franky, self.safety, self.moving, self.wanted, self.done, self.error = franky, safety, False, None, None, None
        try:
            self.robot = franky.Robot(host, realtime_config=franky.RealtimeConfig.Ignore)
            self.robot.relative_dynamics_factor = franky.RelativeDynamicsFactor(safety.speed, 0.5, 0.2)  # velocity, acceleration, jerk
            self.gripper = franky.Gripper(host)
            self.opening = self.gripper.width / HAND_WIDTH
        except Exception as error:
            raise UserError(f"No connection to the robot at {host} ({' '.join(str(error).split())}): is it on, unlocked, with FCI active, "
                            "and is franky-control the version for its system (README)?") from None
        self.clock, self.heard = 0.0, time.monotonic()
        self.closing = threading.Event()
        for work in (self._watch_hand, self._move_hand):
            threading.Thread(target=work, daemon=True).start()

    def state(self):
        """-> time.monotonic(), joint positions and gripper opening 0..1 (8,), their velocities (8,; the gripper's is unknown here: 0)."""
        if self.error:
            raise Fault(self.error)
        try:
            if self.moving and not self.robot.is_in_control:
                self.robot.poll_motion()  # says why
                raise RuntimeError("the motion ended by itself")
            state = self.robot.state
        except Exception as error:
            self.moving = False
            raise Fault(in_words(error)) from None
        now, clock = time.monotonic(), state.time.to_sec()
        if clock != self.clock:
            self.clock, self.heard = clock, now
        self.safety.check_heard(now - self.heard)
        return now, np.append(state.q, self.opening), np.append(state.dq, 0)

    def send(self, joints):
        """Go to joint positions (7,) and rest there. Sent again before it rests, it goes on without a stop."""
        try:
            self.robot.move(self.franky.JointMotion(joints, return_when_finished=False), asynchronous=True)
        except Exception as error:
            raise Fault(in_words(error)) from None
        self.moving = True

    def grip(self, opened):
        if self.wanted is not opened:
            self.wanted = opened

    def hold(self):
        """Brake, then hold. Never raises: whoever calls it has an error already."""
        self.wanted = None
        if not self.moving:
            return
        self.moving = False
        try:
            self.robot.move(self.franky.JointStopMotion(self.franky.RelativeDynamicsFactor.MAX_DYNAMICS), asynchronous=True)
            self.robot.join_motion(0.4)
        except Exception:
            try:
                self.robot.stop()
            except Exception:
                pass  # no connection: the robot stops by itself when commands end

    def close(self):
        self.hold()
        self.closing.set()

    def _watch_hand(self):
        while not self.closing.wait(0.01):  # the real hand answers some thirty times a second
            try:
                self.opening = self.gripper.width / HAND_WIDTH
            except Exception as error:
                self.error = self.error or f"The gripper no longer answers ({' '.join(str(error).split())}): check it in Desk."
                return

    def _move_hand(self):
        while not self.closing.wait(0.005):
            wanted = self.wanted
            if wanted is None or wanted == self.done:
                continue
            try:
                if wanted:
                    success = self.gripper.move(HAND_WIDTH, GRIPPER_SPEED)
                else:  # whatever it meets is held
                    success = self.gripper.grasp(0.0, GRIPPER_SPEED, GRIPPER_FORCE, HAND_WIDTH, HAND_WIDTH)
                reason = "it reports no success"
            except Exception as error:
                success, reason = False, " ".join(str(error).split())
            if not success:
                self.error = f"The gripper did not {'open' if wanted else 'close'} ({reason}): free it, and home it in Desk."
                return
            self.done = wanted


# -------------------------------------------------------------------------------------------------------------- the cameras
class RealSense:
    """Intel RealSense cameras, each read by a thread; 480x640 at 30 pictures a second."""

    def __init__(self, serials):
        try:
            import pyrealsense2 as rs
        except ImportError:
            raise UserError("pyrealsense2 is not installed: pip install -r requirements-robot.txt.") from None
        present = {device.get_info(rs.camera_info.serial_number) for device in rs.context().query_devices()}
        for camera, serial in serials.items():
            if serial not in present:
                raise UserError(f"There is no RealSense camera {serial} for '{camera}'; connected are: {', '.join(sorted(present)) or 'none'}.")
        self.newest, self.errors, self.closing = {}, {}, threading.Event()
        for camera, serial in serials.items():
            config = rs.config()
            config.enable_device(serial)
            config.enable_stream(rs.stream.color, 640, 480, rs.format.rgb8, 30)
            threading.Thread(target=self._read, args=(camera, rs.pipeline(), config), daemon=True).start()
        self.cameras = list(serials)

    def _read(self, camera, pipeline, config):
        try:
            pipeline.start(config)
            while not self.closing.is_set():
                frame = pipeline.wait_for_frames(1000).get_color_frame()
                self.newest[camera] = time.monotonic(), np.array(frame.get_data())
            pipeline.stop()
        except Exception as error:
            self.errors[camera] = str(error)

    def read(self):
        """-> {camera: time.monotonic() of its newest picture}, {camera: (H, W, 3) uint8}."""
        for camera, error in self.errors.items():
            raise Fault(f"Camera '{camera}' failed ({error}): check its cable.")
        newest = dict(self.newest)
        if len(newest) < len(self.cameras):
            return dict.fromkeys(self.cameras, 0.0), {}
        return {camera: newest[camera][0] for camera in self.cameras}, {camera: newest[camera][1] for camera in self.cameras}

    def close(self):
        self.closing.set()


class BenchCameras:
    """The simulated cameras."""

    def __init__(self, bench):
        self.bench = bench

    def read(self):
        stamp, pictures = self.bench.pictures()
        return dict.fromkeys(pictures, stamp), pictures

    def close(self):
        pass


def fit(pictures, cameras, size):
    """The middle square of each picture at size x size pixels, and the cameras' entries with intrinsics to match; size 0: as it is."""
    if not size:
        return pictures, cameras
    fitted, entries = {}, {}
    for camera, picture in pictures.items():
        height, width = picture.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = Image.fromarray(picture[top:top + side, left:left + side])
        fitted[camera] = np.asarray(square if side == size else square.resize((size, size), Image.BOX))
        if cameras:
            moved = cameras[camera]["intrinsics"] - [[0, 0, left], [0, 0, top], [0, 0, 0]]
            entries[camera] = cameras[camera] | {"intrinsics": np.diag([size / side, size / side, 1]) @ moved}
    return fitted, entries


class History:
    """The joints of the last two seconds, so that they can be had at the time of a picture."""

    def __init__(self):
        self.rows = deque(maxlen=200)

    def add(self, now, qpos, qvel):
        self.rows.append((now, *qpos, *qvel))

    def at(self, moment):
        """Joint positions and velocities (8,) each, with the gripper, between the two samples around the moment."""
        rows = np.array(self.rows)
        values = np.array([np.interp(moment, rows[:, 0], column) for column in rows[:, 1:].T])
        return values[:8], values[8:]


# ------------------------------------------------------------------------------------------------------------------ the log
class Frames:
    """One field of a recording, (T, H, W, 3) uint8, read from disk a frame at a time: five minutes of pictures don't fit into memory."""

    dtype = np.dtype(np.uint8)

    def __init__(self, path, dtype, name, count):
        self.file, self.record, self.offset = open(path, "rb"), dtype.itemsize, dtype.fields[name][1]
        self.shape, self.ndim = (count, *dtype[name].shape), 4

    def __getitem__(self, t):
        self.file.seek(t * self.record + self.offset)
        return np.frombuffer(self.file.read(math.prod(self.shape[1:])), np.uint8).reshape(self.shape[1:])


class Recording:
    """Frames go to disk as they come, into <name>.recording/, and become <name>.hdf5 at the end. After a crash `recover` does that."""

    def __init__(self, path, about, cameras, sizes, painted=False):
        """about: the episode's attributes; cameras: as in a calibration file; sizes {camera: (H, W)}; painted: a target beside each picture."""
        self.path, self.folder = Path(path), Path(path).with_suffix(".recording")
        if self.path.exists() or self.folder.exists():
            raise UserError(f"{self.path} exists already: delete it, or write to another folder.")
        fields = [(name, "f8") for name in ("time", "frame", "late", "latency", "progress")]
        fields += [(name, "f4", (8,)) for name in ("qpos", "qvel", "action", "reached")]
        fields += [(f"{kind}/{camera}", "u1", (*size, 3)) for kind in ("images", "painted")[: 1 + painted] for camera, size in sizes.items()]
        self.dtype = np.dtype(fields)
        self.folder.mkdir(parents=True)
        entries = {camera: {key: np.asarray(value).tolist() for key, value in entry.items()} for camera, entry in cameras.items()}
        with write_whole(self.folder / "about.json") as temporary:
            temporary.write_text(json.dumps({"about": about, "cameras": entries, "fields": fields}))
        self.frames, self.events = (open(self.folder / name, "ab", buffering=0) for name in ("frames.bin", "events.jsonl"))
        fcntl.flock(self.frames, fcntl.LOCK_EX)  # held while this program lives: what is not held was left behind
        self.count, self.error, self.queue = 0, None, queue.Queue()
        self.writer = threading.Thread(target=self._write, daemon=True)
        self.writer.start()

    def _write(self):  # the disk may be slow: its own thread
        while (item := self.queue.get()) is not None:
            file, data = item
            try:
                while data and not self.error:
                    data = data[file.write(data):]
            except OSError as error:
                self.error = OSError(error.errno, error.strerror, str(self.folder))

    def add(self, pictures, painted=None, **values):
        """One frame. Raises the OSError of an earlier one that could not be written."""
        if self.error:
            raise self.error
        record = np.zeros((), self.dtype)
        for name, value in values.items():
            record[name] = value
        for kind, group in (("images", pictures), ("painted", painted or {})):
            for camera, picture in group.items():
                record[f"{kind}/{camera}"] = picture
        self.queue.put((self.frames, record.tobytes()))
        self.count += 1

    def event(self, text):
        self.queue.put((self.events, json.dumps({"time": time.monotonic(), "event": text}).encode() + b"\n"))

    def finish(self, success):
        """Write the episode file and remove the scratch folder. Returns the path, or None when there is no frame."""
        self.queue.put(None)
        self.writer.join()
        self.frames.close(), self.events.close()
        if self.error:
            raise self.error
        return finish(self.folder, success)


def finish(folder, success):
    """Make the episode file of a recording's folder, and remove the folder. A last frame that was cut off is left out."""
    path = folder.with_suffix(".hdf5")
    if path.exists():  # killed between writing the file and removing the folder
        shutil.rmtree(folder)
        return path
    try:
        saved = json.loads((folder / "about.json").read_text())
        about, cameras = saved["about"], {c: {k: np.array(v) for k, v in entry.items()} for c, entry in saved["cameras"].items()}
        dtype = np.dtype([(name, kind, *map(tuple, shape)) for name, kind, *shape in saved["fields"]])
        count = (folder / "frames.bin").stat().st_size // dtype.itemsize
    except FileNotFoundError:  # killed before the first frame
        count = 0
    if not count:
        shutil.rmtree(folder)
        return None
    pictures = [name for name in dtype.names if "/" in name]
    head = np.dtype([(name, dtype[name]) for name in dtype.names if name not in pictures])
    rows = np.zeros(count, head)
    with open(folder / "frames.bin", "rb") as file:
        for t in range(count):
            file.seek(t * dtype.itemsize)
            rows[t] = np.frombuffer(file.read(head.itemsize), head)[0]
    chain = franka_chain(cameras)
    poses = chain.joint_poses(rows["qpos"][:, :7].astype(np.float64))
    frames = {name: Frames(folder / "frames.bin", dtype, name, count) for name in pictures}
    events = (folder / "events.jsonl").read_text() if (folder / "events.jsonl").exists() else ""
    extras = {name: rows[name] for name in ("time", "frame", "late", "latency", "progress", "reached")}
    extras |= {name.replace("/", "_"): data for name, data in frames.items() if name.startswith("painted/")} | {"events": np.array(events.encode() or b" ")}
    action = rows["action"] if about["task_is_run"] else followed(rows["qpos"])
    about = {key: value for key, value in about.items() if key != "task_is_run"}
    write_episode(path, Episode(
        path=path, **about, success=success, fps=float(HZ), qpos=rows["qpos"], qvel=rows["qvel"], action=action,
        joint_poses=poses.astype(np.float32), extras=extras,
        images={camera: frames[f"images/{camera}"] for camera in cameras},
        intrinsics={camera: entry["intrinsics"] for camera, entry in cameras.items()},
        extrinsics={camera: np.array(chain.camera_pose(camera, poses)) for camera in cameras},
    ))  # fmt: skip
    shutil.rmtree(folder)
    return path


def followed(qpos):
    """What must have been commanded for the arm to be where it was a step later: (T, 8) -> (T, 8). A gripper that opens was told to."""
    action = np.concatenate([qpos[1:], qpos[-1:]])
    command, change = qpos[0, -1] > 0.5, np.diff(qpos[:, -1], append=qpos[-1, -1])
    for t, moved in enumerate(change):
        command = moved > 0 if abs(moved) > 0.02 else command
        action[t, -1] = command
    return action


def recover(run):
    """Turn what a killed program left behind into episode files, marked as not successful."""
    for frames in sorted(Path(run).glob("*/*/*.recording/frames.bin")):
        with open(frames, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # being recorded right now
            if path := finish(frames.parent, False):
                print(f"A recording that was cut off is now in {path}, marked as not successful.")


# --------------------------------------------------------------------------------------------------------------- the policy
def trained(run, device):
    """The painter and the controller of a run -> what they need; pictures, joints, instruction, steps done -> painted pictures, chunk (K, 8)."""
    import torch

    from act import Controller
    from painter import Painter

    torch.set_num_threads(1)
    controller, painter = Controller.load(run / "act", device), Painter.load(run / "controlnet", device)
    needs = {name: controller.config[name] for name in ("cameras", "image_size", "horizon")}

    def policy(pictures, qpos, instruction, step):
        painted = painter.paint({camera: picture[None] for camera, picture in pictures.items()}, [instruction])
        return {camera: picture[0] for camera, picture in painted.items()}, controller(painted, qpos[None], [instruction])[0]

    return needs, policy


def demonstrator(task, seed, variation, size=64, horizon=8):
    """No network: a scripted demonstration of the simulated scene. For trying out everything else."""
    from evaluate import Oracle, environment  # before MuJoCo, which it tells how to draw
    import mujoco

    oracle, env = Oracle(task, seed, variation, horizon), environment(task, (size, size), CAMERAS)

    def policy(pictures, qpos, instruction, step):
        env.data.qpos[:7] = qpos[:7]  # the wrist's camera is where the arm is
        mujoco.mj_forward(env.model, env.data)
        steps = np.minimum(max(round(step) - 1, 0) + np.arange(horizon), len(oracle.demo.action) - 1)
        return oracle.paint(env, pictures, steps[0]), oracle.demo.action[steps]

    return {"cameras": CAMERAS, "image_size": (size, size), "horizon": horizon}, policy


def think(load, pipe):
    """The policy's process: it answers one picture at a time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        needs, policy = load()
        pipe.send(needs)
        while True:
            question, begin = pipe.recv(), time.monotonic()
            painted, chunk = policy(*question)
            pipe.send((painted, np.asarray(chunk, np.float64), time.monotonic() - begin))
    except EOFError:  # the main program is gone
        pass
    except Exception as error:
        pipe.send(str(error) if isinstance(error, UserError) else f"The policy failed ({type(error).__name__}: {error}).")


class Policy:
    """The policy in a process of its own, so that neither its threads nor Python's lock delay a command."""

    def __init__(self, load):
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=think, args=(load, there), daemon=True)
        self.process.start()
        there.close()
        self.needs = self.answer(120)

    def ask(self, *question):
        self.pipe.send(question)

    def answer(self, timeout=0.0):
        """The answer, or None when there is none yet."""
        try:
            if not self.pipe.poll(timeout):
                return None
            answer = self.pipe.recv()
        except (EOFError, OSError):
            raise Fault("The policy's process has ended: is there enough memory?") from None
        if isinstance(answer, str):
            raise Fault(answer)
        return answer

    def close(self):
        self.process.kill()
        self.process.join()


# --------------------------------------------------------------------------------------------------------------------- run
@dataclass
class Run:
    run: Path = Path("runs/demo")
    """Folder of the run; controlnet/ and act/ inside it are read, robot/ is written."""
    robot: str = "sim"
    """Host name or address of the robot; sim: simulated, over the robot's own protocol on this machine."""
    arm: Literal["fr3", "panda"] = "fr3"
    """Which arm it is: its joints' limits."""
    task: str = "pick_and_lift"
    """The task's name; in the simulator one of sims/mujoco_panda.py."""
    instruction: str = ""
    """What to do; empty: the simulated scene's own, or asked for."""
    policy: Literal["trained", "demonstrator"] = "trained"
    """trained: painter and controller; demonstrator: a script that knows the simulated scene."""
    calibration: Path | None = None
    """JSON or YAML file of the cameras (real_robot.py calibrate): {camera: {intrinsics, world_from_camera or last_joint_from_camera}}."""
    cameras: tuple[str, ...] = ()
    """RealSense cameras as name=serial, with the names of the calibration file."""
    speed: float | None = None
    """Share of the joints' greatest velocities; unset: 0.2, and 1 in the simulator, where nobody can be hit."""
    workspace: tuple[float, float, float, float, float, float] = Safety.workspace
    """Where the fingertips may go: x, y, z from and x, y, z to, metres from the robot's base."""
    watchdog: float = Safety.watchdog
    """Seconds that the policy may be late before the arm is stopped."""
    execute: int = 7
    """Steps of a chunk to go before the next one takes over (one of 8 passes while it is computed)."""
    steps: int = 0
    """Stop after so many steps; 0: the simulated task's number, or 300."""
    episodes: int = 1
    """In the simulator: how many scenes, one after the other."""
    seed: int = 0
    """In the simulator: the first scene."""
    yes: bool = False
    """Don't ask before the first motion (nobody is asked in the simulator)."""
    dry_run: bool = False
    """Compute and show everything, send nothing."""
    device: str = "cpu"
    """Where the networks run: cpu, cuda, mps."""


def sleep_until(deadline, meanwhile):
    """Sleeps until time.monotonic() is `deadline`, with meanwhile() a hundred times a second; the last half millisecond is waited for awake."""
    while (left := deadline - time.monotonic()) > 0:
        if left > 0.015:
            meanwhile()
            time.sleep(0.01)
        elif left > 0.0005:
            time.sleep(left - 0.0005)


def drive(robot, cameras, policy, safety, log, settings, instruction, folder, steps, finished):
    """The loop. Ends when finished() says so or after `steps` commands; raises the Fault that stopped the arm. -> commands' lateness (s)."""
    history, size = History(), policy.needs["image_size"][0]
    K, names = policy.needs["horizon"], policy.needs["cameras"]
    answers, painted, latency = [], {}, 0.0

    def meanwhile():
        history.add(*robot.state())
        if answer := policy.answer():
            answers.append(answer)

    def look():
        """-> pictures for the policy; joints and their velocities at the time of the pictures, and that time."""
        stamps, pictures = cameras.read()
        safety.check_fresh(stamps, time.monotonic())
        frame = float(np.mean([stamps[name] for name in names]))
        qpos, qvel = history.at(frame)
        safety.check_motion(qvel)
        return fit({name: pictures[name] for name in names}, None, size)[0], qpos, qvel, frame

    begin = time.monotonic()
    while len(history.rows) < 20 or 0.0 in cameras.read()[0].values():  # everything has to be awake
        meanwhile()
        time.sleep(0.01)
        if time.monotonic() > begin + 10:
            raise Fault("A camera has sent no picture for 10 s: check its cable.")
    pictures, qpos, *_ = look()
    policy.ask(pictures, qpos, instruction, 0)
    painted, chunk, _ = policy.answer(60) or safety.check_waiting(60)
    safety.check_chunk(chunk)
    confirm(painted, folder / "first_target.png", settings.yes or settings.robot == "sim" or settings.dry_run)
    log.event("the first target was confirmed")

    chunk, position, progress, travelled, asked, sent, lateness = None, 0.0, 0.0, 0.0, None, 0, []
    previous, opened = robot.state()[1][:7], history.rows[-1][8] > 0.5
    start = time.monotonic() + 1 / HZ
    tick = 0
    while sent < steps and not finished():
        sleep_until(start + tick / HZ, meanwhile)
        late, share = time.monotonic() - start - tick / HZ, 0.0
        # 1. Send: nothing comes before that.
        if chunk is not None and position < K - 1:
            wished = min(position + 1, K - 1)
            low = int(wished)
            wish = chunk[low] + (wished - low) * (chunk[min(low + 1, K - 1)] - chunk[low])  # between two steps, when played slowly
            command, share = safety.step(previous, wish[:7])
            if not settings.dry_run:
                robot.send(command)
                opened = bool(chunk[math.ceil(wished), 7] > 0.5)
                robot.grip(opened)
            lateness.append(late)
            previous, position, progress, sent = command, position + share, progress + share, sent + 1
            travelled += share
        # 2. See, and write down.
        reached = history.rows[-1][1:9]
        pictures, qpos, qvel, frame = look()
        log.add(pictures, painted, time=time.monotonic(), frame=frame, late=late, latency=latency, progress=share, qpos=qpos, qvel=qvel,
                action=np.append(previous, opened), reached=reached)
        # 3. Think: ask for the next chunk, so early that it is there when this one ends.
        ahead = max(math.ceil(latency * HZ), 1) - 1
        if asked is None and (chunk is None or position >= min(settings.execute, K - 1 - ahead)):
            policy.ask(pictures, qpos, instruction, travelled)
            asked, progress = time.monotonic(), share
        tick += 1
        sleep_until(start + tick / HZ - 0.012, meanwhile)
        if answers:
            painted, chunk, seconds = answers.pop()
            safety.check_chunk(chunk)
            latency, asked = time.monotonic() - asked, None
            log.event(f"a new target, {1000 * seconds:.0f} ms of computing")
            position = progress - 1  # the steps that have passed since its picture
            if settings.dry_run:
                previous = history.rows[-1][1:8]
        elif asked is not None:
            safety.check_waiting(time.monotonic() - asked - 1 / HZ)
    return lateness


def write_timing(path, lateness):
    """How far from their time the commands were sent, as a picture; says the share that was within 5 ms."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    milliseconds = 1000 * np.array(lateness)
    within = np.mean(np.abs(milliseconds) <= 5)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    axes[0].hist(milliseconds, bins=np.linspace(0, max(6, milliseconds.max()), 61), color="#4c78a8")
    axes[0].set(xlabel="late by, ms", ylabel="commands", yscale="log", title=f"{within:.1%} of {len(lateness)} commands within 5 ms")
    axes[1].plot(np.arange(len(lateness)) / HZ, milliseconds, ".", markersize=3)
    axes[1].set(xlabel="time, s", ylabel="late by, ms")
    with write_whole(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    print(f"{within:.1%} of {len(lateness)} commands were within 5 ms of their time (99 % within {np.percentile(milliseconds, 99):.1f} ms).")


def connect(settings, safety, bench):
    """The arm, the cameras, and the cameras' calibration."""
    if bench:
        return Franka(bench.host, safety), BenchCameras(bench), bench.calibration
    calibration = load_calibration(settings.calibration) if settings.calibration else {}
    serials = dict(entry.partition("=")[::2] for entry in settings.cameras)
    if not serials or not all(serials.values()) or set(serials) - set(calibration):
        raise UserError("A robot needs --cameras name=serial ... and a --calibration file with the same names (real_robot.py calibrate).")
    cameras = RealSense(serials)
    return Franka(settings.robot, safety), cameras, {camera: calibration[camera] for camera in serials}


def simulate(settings, **options):
    """The simulated arm of these settings, or None for a real one."""
    if settings.robot != "sim":
        return None
    from sims.franky_panda import Bench

    return Bench(settings.task, settings.seed, **options)


def run_once(settings, policy, bench):
    """One episode. -> whether it succeeded, path of the log."""
    speed = settings.speed or (1.0 if bench else 0.2)
    safety = Safety(settings.arm, speed, settings.workspace, settings.watchdog)
    instruction = settings.instruction or (bench.instruction if bench else input("Instruction: ").strip())
    robot, cameras, calibration = connect(settings, safety, bench)
    folder = fresh(settings.run / "robot", settings.task)
    about = dict(task=settings.task, variation=bench.variation if bench else 0, instruction=instruction, instructions=[instruction],
                 robot=settings.arm, sim=bool(bench), seed=settings.seed if bench else int(time.time()), task_is_run=True)
    size = tuple(policy.needs["image_size"])
    sizes = {camera: size for camera in policy.needs["cameras"]}
    if missing := set(sizes) - set(calibration):
        raise UserError(f"The policy was trained with camera '{missing.pop()}', which the calibration file does not have.")
    entries = {camera: calibration[camera] for camera in sizes}
    if not bench:
        entries = fit({camera: np.zeros((480, 640, 3), np.uint8) for camera in sizes}, entries, size[0])[1]
    log = Recording(folder / "log.hdf5", about, entries, sizes, painted=True)
    success, lateness, error = False, [], None
    steps = settings.steps or (bench.max_steps if bench else 300)
    finished = (lambda: bench.get("success") or bench.get("failed")) if bench else line_was_typed()
    try:
        lateness = drive(robot, cameras, policy, safety, log, settings, instruction, folder, steps, finished)
    except BaseException as problem:  # first the arm, then the log, then the words
        error = problem
    finally:
        robot.hold()
        with uninterrupted():
            success = bool(bench.get("success")) if bench else error is None and not settings.yes and input("Did it succeed? y Enter: ").strip() == "y"
            log.event(f"stopped: {error or type(error).__name__}" if error else "finished")
            robot.close(), cameras.close()
            try:
                path = log.finish(success)
            except OSError:
                print(f"What was recorded is kept in {log.folder}; the next start makes a log of it.", file=sys.stderr)
                raise
    if error:
        print(f"The arm holds its position; the log is {path}.", file=sys.stderr)
        raise error
    if lateness:
        write_timing(folder / "timing.png", lateness)
    print(f"{instruction}: {'done' if success else 'not done'}; the log is {path}.")
    return success, path


def fresh(folder, name):
    """A new folder, named after the time."""
    folder = Path(folder) / f"{time.strftime('%Y%m%d-%H%M%S')}_{name}"
    folder = next(path for path in [folder, *(folder.with_name(f"{folder.name}_{i}") for i in range(1, 1000))] if not path.exists())
    folder.mkdir(parents=True)
    return folder


class uninterrupted:
    """A block that Ctrl-C does not break: a log that is half written helps nobody."""

    def __enter__(self):
        self.before = signal.signal(signal.SIGINT, signal.SIG_IGN) if threading.current_thread() is threading.main_thread() else None

    def __exit__(self, *_):
        if self.before:
            signal.signal(signal.SIGINT, self.before)


def line_was_typed():
    """A function that says whether Enter was pressed since."""
    lines = []
    threading.Thread(target=lambda: lines.append(sys.stdin.readline()), daemon=True).start()
    return lambda: bool(lines)


def run(settings, load=None, bench=None):
    """load: makes the policy, in its process; bench: a simulated arm that runs already (tests)."""
    if settings.robot != "sim" and settings.policy == "demonstrator":
        raise UserError("--policy demonstrator knows the simulated scene alone: use a trained policy on a robot.")
    recover(settings.run)
    if settings.policy == "trained" and not load:
        for folder in (settings.run / "act", settings.run / "controlnet"):
            if not folder.is_dir():
                raise UserError(f"There is no checkpoint {folder}: train it first, or try --policy demonstrator.")
    successes, policy, first = 0, None, settings.seed
    try:
        for settings.seed in range(first, first + settings.episodes):
            scene = bench or simulate(settings)
            try:
                if policy is None or settings.policy == "demonstrator":
                    make = load or (partial(trained, settings.run, settings.device) if settings.policy == "trained" else
                                    partial(demonstrator, settings.task, settings.seed, scene.variation))
                    policy = policy and policy.close() or Policy(make)
                successes += run_once(settings, policy, scene)[0]
            finally:
                if scene and not bench:
                    scene.close()
    finally:
        policy and policy.close()
    if settings.episodes > 1:
        print(f"{successes} of {settings.episodes} episodes of {settings.task} succeeded (seeds {first} to {settings.seed}).")
    return successes


# ------------------------------------------------------------------------------------------------------------------ record
@dataclass
class Record:
    run: Path = Path("runs/demo")
    """Folder of the run; the demonstration goes to <run>/episodes/<task>."""
    robot: str = "sim"
    """Host name or address of the robot; sim: simulated, and a script does the task."""
    arm: Literal["fr3", "panda"] = "fr3"
    """Which arm it is."""
    task: str = "pick_and_lift"
    """The task's name; in the simulator one of sims/mujoco_panda.py."""
    instruction: str = ""
    """What is done; empty: the simulated scene's own, or asked for."""
    calibration: Path | None = None
    """JSON or YAML file of the cameras."""
    cameras: tuple[str, ...] = ()
    """RealSense cameras as name=serial; in the simulator the cameras to draw, all four if none is named."""
    size: int = 0
    """Keep the middle square of the pictures at so many pixels; 0: as they are, 480x640. Train with one size."""
    seconds: float = 0.0
    """Stop by itself after so long; 0: at Enter (in the simulator, when the script is done)."""
    seed: int = 500_000
    """In the simulator: the scene."""
    yes: bool = False
    """Ask nothing: begin at once, and call it a success (in the simulator the scene knows)."""


def record(settings, bench=None):
    """One demonstration -> its path, and how many frames held a picture that the frame before held too."""
    recover(settings.run)
    sim = settings.robot == "sim"
    # A larger picture takes the simulated cameras longer than a twentieth of a second.
    options = dict(size=(480, 640), cameras=settings.cameras or CAMERAS, fps=HZ) if not settings.size else dict(size=(settings.size,) * 2)
    bench = bench or simulate(settings, guided=True, **options)
    robot = cameras = log = error = path = None
    try:
        robot, cameras, calibration = connect(settings, Safety(settings.arm), bench)
        ask = not (settings.yes or sim)
        instruction = settings.instruction or (bench.instruction if sim else input("Instruction: ").strip())
        history, begin = History(), time.monotonic()
        meanwhile = lambda: history.add(*robot.state())  # noqa: E731
        while not (pictures := cameras.read()[1]) or 0.0 in cameras.read()[0].values():
            meanwhile()
            time.sleep(0.01)
            if time.monotonic() > begin + 10:
                raise Fault("A camera has sent no picture for 10 s: check its cable.")
        size = 0 if sim else settings.size
        _, calibration = fit(pictures, calibration, size)
        pictures, _ = fit(pictures, None, size)
        folder = settings.run / "episodes" / settings.task
        name = time.strftime("real_%Y%m%d-%H%M%S")
        path = next(p for p in (folder / f"{name}_{i:02d}.hdf5" for i in range(1000)) if not p.exists() and not p.with_suffix(".recording").exists())
        about = dict(task=settings.task, variation=bench.variation if sim else 0, instruction=instruction, instructions=[instruction],
                     robot=settings.arm, sim=sim, seed=settings.seed if sim else int(time.time()), task_is_run=False)
        if ask:
            input("Hold the arm by the buttons at its wrist. Enter starts the recording, and Enter stops it.")
        log = Recording(path, about, calibration, {camera: picture.shape[:2] for camera, picture in pictures.items()})
        stop = line_was_typed() if ask else (lambda: False)
        if sim:
            bench.demonstrate()
        repeated, newest = 0, cameras.read()[0]
        while (stamps := cameras.read()[0]) == newest:  # frames are taken midway between two pictures: neither twice nor never
            meanwhile()
            time.sleep(0.005)
        start = time.monotonic() + 0.5 / HZ
        while not stop() and (not settings.seconds or log.count < settings.seconds * HZ):
            sleep_until(start + log.count / HZ, meanwhile)
            newest, (stamps, pictures) = stamps, cameras.read()
            now = time.monotonic()
            Safety.check_fresh(Safety, stamps, now)
            repeated += log.count > 0 and any(stamps[camera] == newest[camera] for camera in stamps)
            frame = float(np.mean(list(stamps.values())))
            qpos, qvel = history.at(frame)
            log.add(fit(pictures, None, size)[0], time=now, frame=frame, late=now - start - log.count / HZ, qpos=qpos, qvel=qvel)
            print(f"\rrecording, {log.count / HZ:.1f} s ", end="", flush=True)
            if sim and not settings.seconds and log.count > 2 * HZ and not bench.get("guided"):
                break
    except BaseException as problem:
        error = problem
    finally:
        with uninterrupted():
            if log:
                print()
                if error:
                    success = False
                else:
                    success = bool(bench.get("success")) if sim else settings.yes or input("Did it succeed? y Enter: ").strip() == "y"
                try:
                    log.finish(success)
                except OSError:
                    print(f"What was recorded is kept in {log.folder}; the next start makes an episode of it.", file=sys.stderr)
                    raise
            for thing in (robot, cameras, bench):
                thing and thing.close()
    if error:
        log and print(f"{log.count} frames are in {path}, marked as not successful.", file=sys.stderr)
        raise error
    print(f"{log.count} frames are in {path}" + (f"; in {repeated} a camera had no new picture." if repeated else "."))
    return path, repeated


# ------------------------------------------------------------------------------------------------------------------ replay
@dataclass
class Replay:
    log: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, or its log.hdf5."""
    keep: bool = False
    """Add the run to the demonstrations, <run>/episodes/<task>, for the next policy."""


def replay(settings):
    """Observation, painted target and motion side by side."""
    from evaluate import PANEL, tile, write_film

    path = settings.log / "log.hdf5" if settings.log.is_dir() else settings.log
    episode = read_episode(path)
    painted = {name.removeprefix("painted_"): data for name, data in episode.extras.items() if name.startswith("painted_")}
    if not painted:
        raise UserError(f"{path} has no painted targets: it is a demonstration, not the log of a run.")
    front = "front" if "front" in painted else next(iter(painted))
    frames, seen = [], 0
    for t in range(len(episode.qpos)):
        if t and any((painted[camera][t] != painted[camera][t - 1]).any() for camera in painted):
            seen = t - 1  # the target came from this picture, or one just before
        large = [np.array(Image.fromarray(episode.images[front][moment]).resize((PANEL, PANEL), Image.BICUBIC)) for moment in (seen, t)]
        frames.append(np.concatenate([large[0], tile({camera: painted[camera][t] for camera in painted}), large[1]], axis=1))
    outcome = {"success": episode.success, "instruction": episode.instruction}
    write_film(path.parent, "film", [(outcome, frames)], "painted target")
    print(f"The film is {path.parent / 'film.mp4'}.")
    for line in bytes(episode.extras["events"]).decode().splitlines():
        event = json.loads(line)
        print(f"{event['time'] - episode.extras['time'][0]:8.2f} s  {event['event']}")
    if settings.keep:
        if not episode.success:
            raise UserError(f"{path} was not successful: a policy learns from successes, so it was not added.")
        target = path.parent.parent.parent / "episodes" / episode.task / f"real_{path.parent.name}.hdf5"
        if target.exists():
            raise UserError(f"{target} exists already: this run was added before.")
        with write_whole(target) as temporary:
            shutil.copyfile(path, temporary)
        print(f"Added as {target}.")


# `calibrate` is the fourth command: from calibrate import Settings as Calibrate, main as calibrate


def main():
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    commands = {"run": (Run, run), "record": (Record, record), "replay": (Replay, replay)}
    settings = tyro.extras.subcommand_cli_from_dict({name: kind for name, (kind, _) in commands.items()}, description=__doc__)
    next(command for kind, command in commands.values() if isinstance(settings, kind))(settings)


if __name__ == "__main__":
    run_stage(main)
