"""What real_robot.py is made of: the arm, the cameras, the log, and the policy in a process of its own.

Nothing here decides anything: the loop and every limit are in real_robot.py.
"""

import fcntl
import json
import math
import multiprocessing
import queue
import select
import shutil
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
from PIL import Image

from episodes import CAMERAS, Episode, UserError, write_episode, write_whole
from render_spheres import Chain, turns

HZ = 10  # commands a second (paper: 10 Hz and below on the real arm)
HAND_WIDTH = 0.08  # metres between the open fingers
GRIPPER_SPEED, GRIPPER_FORCE = 0.1, 20.0  # m/s, N


class Fault(UserError):
    """Why the arm was stopped."""


# ------------------------------------------------------------------------------------------------------------------ the arm
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
            raise UserError(f"franky-control is not installed ({error}): pip install -r requirements.txt (there are wheels for Linux on x86-64 alone).") from None
        self.franky, self.safety, self.moving, self.wanted, self.done, self.error = franky, safety, False, None, None, None
        try:
            self.robot = franky.Robot(host, realtime_config=franky.RealtimeConfig.Ignore)
            soft = max(safety.speed, 0.5)  # less acceleration and jerk would leave the arm behind
            self.robot.relative_dynamics_factor = franky.RelativeDynamicsFactor(safety.speed, soft, soft)
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

    def send(self, joints, velocity):
        """Go to joint positions (7,), and be there with this velocity (7,), from wherever the arm is on its way."""
        try:
            target = self.franky.JointState(joints, velocity)
            self.robot.move(self.franky.JointMotion(target, return_when_finished=False), asynchronous=True)
        except Exception as error:
            raise Fault(in_words(error)) from None
        self.moving = True

    def grip(self, opened):
        """Open or close the hand, in a thread: the hand answers when it is done."""
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
        """-> {camera: time.monotonic() of its newest picture, 0 before the first}, {camera: (H, W, 3) uint8}."""
        for camera, error in self.errors.items():
            raise Fault(f"Camera '{camera}' failed ({error}): check its cable.")
        newest = {camera: self.newest.get(camera, (0.0, np.zeros((480, 640, 3), np.uint8))) for camera in self.cameras}
        return {camera: stamp for camera, (stamp, _) in newest.items()}, {camera: picture for camera, (_, picture) in newest.items()}

    def close(self):
        self.closing.set()


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

    def __init__(self, robot):
        self.robot, self.rows = robot, deque(maxlen=200)

    def sample(self):
        now, qpos, qvel = self.robot.state()
        self.rows.append((now, *qpos, *qvel))

    def last(self):
        """Joint positions and gripper opening (8,) at the latest sample."""
        return np.array(self.rows[-1][1:9])

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
        """about: the episode's attributes, and whether actions were commanded (or follow from where the arm went); cameras: as in a calibration file; sizes {camera: (H, W)}; painted: a target beside each picture."""
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
        if self.queue.qsize() > 10 * HZ:
            raise Fault(f"The disk of {self.folder} is ten seconds behind the cameras: record fewer or smaller pictures (--size).")
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
    rows["qvel"][:, 7] = np.gradient(rows["qpos"][:, 7]) * HZ if count > 1 else 0  # the hand does not tell
    chain = franka_chain(cameras)
    poses = chain.joint_poses(rows["qpos"][:, :7].astype(np.float64))
    frames = {name: Frames(folder / "frames.bin", dtype, name, count) for name in pictures}
    events = (folder / "events.jsonl").read_text() if (folder / "events.jsonl").exists() else ""
    extras = {name: rows[name] for name in ("time", "frame", "late", "latency", "progress", "reached")}
    extras |= {name.replace("/", "_"): data for name, data in frames.items() if name.startswith("painted/")} | {"events": np.array(events.encode() or b" ")}
    action = rows["action"] if about["commanded"] else followed(rows["qpos"])
    about = {key: value for key, value in about.items() if key != "commanded"}
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
    import mujoco

    from evaluate import Oracle, environment  # before MuJoCo, which it tells how to draw

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
            number, *question = pipe.recv()
            painted, chunk = policy(*question)
            pipe.send((number, painted, np.asarray(chunk, np.float64)))
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
        self.asked, self.needs = 0, self._receive(120)

    def ask(self, pictures, qpos, instruction, step):
        self.asked += 1
        self.pipe.send((self.asked, pictures, qpos, instruction, step))

    def answer(self, timeout=0.0):
        """The painted pictures and the chunk for what was asked last; None when they are not there within `timeout` seconds."""
        while (answer := self._receive(timeout)) and answer[0] != self.asked:
            pass  # to a question of an episode that was stopped
        return answer and answer[1:]

    def _receive(self, timeout):
        try:
            answer = self.pipe.recv() if self.pipe.poll(timeout) else None
        except (EOFError, OSError):
            raise Fault("The policy's process has ended: is there enough memory?") from None
        if isinstance(answer, str):
            raise Fault(answer)
        return answer

    def close(self):
        self.process.kill()
        self.process.join()


# --------------------------------------------------------------------------------------------------------------- keyboard
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
    """Whether Enter was pressed since the last time."""
    if select.select([sys.stdin], [], [], 0)[0]:
        return bool(sys.stdin.readline())
    return False
