"""What real_robot.py is made of: the arm, the cameras, and the policy in a process of its own. It decides nothing."""

import multiprocessing
import re
import select
import signal
import sys
import threading
import time
from collections import deque
from contextlib import suppress

import numpy as np
from PIL import Image, ImageOps

from genima.calibration import load_calibration
from genima.files import UserError

HZ = 10  # commands a second (paper: 10 Hz and below on the real arm)
HAND_WIDTH = 0.08  # metres between the open fingers
GRIPPER_SPEED, GRIPPER_FORCE = 0.1, 20.0  # m/s, N
LOADING = 600  # seconds that a policy may take to load


class Fault(UserError):
    """Why the arm was stopped."""


# ------------------------------------------------------------------------------------------------------------------ the arm
REFLEXES = {  # libfranka's names in words
    "cartesian_reflex": "it touched something: free it, and unlock it in Desk",
    "joint_reflex": "a joint met a force: free it, and unlock it in Desk",
    "communication_constraints": "commands came too late: connect by cable, quit other programs, use a real-time kernel",
    "velocity_violation|acceleration|jerk": "a joint was to move too fast or too suddenly: lower --speed",
    "position_limits": "a joint is at its limit: guide it away by hand",
    "self_collision": "it would have touched itself: guide it away by hand",
    "User stop": "the stop button is pressed: release it",
    "Timeout|connection": "it no longer answers: check network and power",
}  # fmt: skip


def in_words(error):
    """An error of franky's as one sentence."""
    text = one_line(error)
    advice = [words for names, words in REFLEXES.items() if re.search(names, text)]
    return (
        f"The robot stopped, {advice[0]} ({text})."
        if advice
        else f"The robot stopped ({text}): look at Desk, and start again."
    )


def one_line(error):
    return " ".join(str(error).split())


class Franka:
    """The arm and its hand, through `franky-control`."""

    def __init__(self, host, safety):
        try:
            import franky
        except ImportError as error:
            raise UserError(
                f"franky-control is not installed ({error}): pip install -r requirements.txt (Linux on x86-64 only)."
            ) from None
        self.franky, self.safety, self.moving, self.wanted, self.error = (
            franky,
            safety,
            False,
            None,
            None,
        )
        try:
            self.robot = franky.Robot(host, realtime_config=franky.RealtimeConfig.Ignore)
            soft = max(safety.speed, 0.5)  # less acceleration and jerk would leave the arm behind
            self.robot.relative_dynamics_factor = franky.RelativeDynamicsFactor(
                safety.speed, soft, soft
            )
            self.gripper = franky.Gripper(host)
            self.opening = self.gripper.width / HAND_WIDTH
        except Exception as error:
            raise UserError(
                f"No connection to the robot at {host} ({one_line(error)}): is it on, unlocked, with FCI active, "
                "and is franky-control the version for its system (README)?"
            ) from None
        self.clock, self.heard, self.closing = 0.0, time.monotonic(), threading.Event()
        threading.Thread(target=self._hand, daemon=True).start()

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
            self.robot.move(
                self.franky.JointMotion(target, return_when_finished=False), asynchronous=True
            )
        except Exception as error:
            raise Fault(in_words(error)) from None
        self.moving = True

    def grip(self, opened):
        """Open or close the hand, in its thread; `state` tells when it could not."""
        self.wanted = opened

    def hold(self):
        """Brake, then hold, and let the hand be. Never raises: whoever calls it has an error already."""
        self.closing.set()
        if not self.moving:
            return
        self.moving = False
        try:
            self.robot.move(
                self.franky.JointStopMotion(self.franky.RelativeDynamicsFactor.MAX_DYNAMICS),
                asynchronous=True,
            )
            self.robot.join_motion(
                2
            )  # it brakes in less than 0.4 s; without a connection libfranka's thread ends after one
        except Exception:
            with suppress(Exception):  # no connection: the robot stops by itself when commands end
                self.robot.stop()

    def _hand(self):
        done = doing = None  # whether it was opened, whether it is being opened
        try:
            while not self.closing.wait(0.005):
                self.opening = (
                    self.gripper.width / HAND_WIDTH
                )  # the real hand answers some thirty times a second
                if doing is None and (wanted := self.wanted) not in (None, done):
                    doing, answer = wanted, (
                        self.gripper.move_async(HAND_WIDTH, GRIPPER_SPEED) if wanted  # whatever closing fingers meet is held
                        else self.gripper.grasp_async(0.0, GRIPPER_SPEED, GRIPPER_FORCE, HAND_WIDTH, HAND_WIDTH))  # fmt: skip
                elif doing is not None and answer.wait(0):
                    if not answer.get():
                        raise RuntimeError("it reports no success")
                    done, doing = doing, None
        except Exception as error:
            what = {None: "no longer answers", True: "did not open", False: "did not close"}[doing]
            self.error = f"The gripper {what} ({one_line(error)}): free it, and home it in Desk."


# --------------------------------------------------------------------------------------------------- cameras and a person
def ask(question):
    """What a person types; nothing where nobody can (no terminal)."""
    with suppress(EOFError):
        return input(question).strip()
    return ""


def line_was_typed():
    """Whether Enter was pressed since the last time."""
    return bool(select.select([sys.stdin], [], [], 0)[0] and sys.stdin.readline())


class RealSense:
    """Intel RealSense cameras, each read by a thread; 480x640 at 30 pictures a second."""

    def __init__(self, serials):
        try:
            import pyrealsense2 as rs
        except ImportError:
            raise UserError(
                "pyrealsense2 is not installed: pip install -r requirements-robot.txt."
            ) from None
        present = {
            device.get_info(rs.camera_info.serial_number) for device in rs.context().query_devices()
        }
        for camera, serial in serials.items():
            if serial not in present:
                others = ", ".join(sorted(present)) or "none"
                raise UserError(
                    f"There is no RealSense camera {serial} for '{camera}'; connected are: {others}."
                )
        self.closing, self.errors = threading.Event(), {}
        self.newest = {camera: (0.0, np.zeros((480, 640, 3), np.uint8)) for camera in serials}
        for camera, serial in serials.items():
            config = rs.config()
            config.enable_device(serial)
            config.enable_stream(rs.stream.color, 640, 480, rs.format.rgb8, 30)
            threading.Thread(
                target=self._read, args=(camera, rs.pipeline(), config), daemon=True
            ).start()

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
        stamps, pictures = zip(*self.newest.values())
        return dict(zip(self.newest, stamps)), dict(zip(self.newest, pictures))

    def close(self):
        self.closing.set()


def fit(picture, size, intrinsics=np.eye(3)):
    """The middle square of a picture (H, W, 3) at size x size pixels, and its camera's intrinsics (3, 3) to match; size 0: as they are."""
    if not size:
        return picture, intrinsics
    height, width = picture.shape[:2]
    side = min(height, width)
    square = intrinsics - [[0, 0, (width - side) / 2], [0, 0, (height - side) / 2], [0, 0, 0]]
    fitted = ImageOps.fit(Image.fromarray(picture), (size, size), Image.BOX)
    return np.asarray(fitted), np.diag([size / side, size / side, 1]) @ square


class Station(RealSense):
    """What the simulated Bench is, for a real arm: its cameras, and a person who says what to do and whether it was done."""

    sim, variation, max_steps, over = False, 0, 300, staticmethod(line_was_typed)

    def __init__(self, settings):
        calibration = load_calibration(settings.calibration) if settings.calibration else {}
        serials = dict(entry.partition("=")[::2] for entry in settings.cameras)
        if not serials or not all(serials.values()) or set(serials) - set(calibration):
            raise UserError(
                "A robot needs --cameras name=serial ... and a --calibration file with these names (real_robot.py calibrate)."
            )
        if not (instruction := settings.instruction or ask("Instruction: ")):
            raise UserError("There is no instruction: give one with --instruction.")
        super().__init__(serials)
        self.instruction, self.calibration = (
            instruction,
            {camera: calibration[camera] for camera in serials},
        )
        self.host, self.seed = settings.robot, int(time.time())

    def success(self):
        return ask("Did it succeed? y Enter: ") == "y"


class History:
    """What the arm said in the last two seconds, so that its joints can be had at the time of a picture."""

    def __init__(self, robot, cameras, safety):
        """Waits until the arm and every camera have been heard of."""
        self.robot, self.cameras, self.safety, self.rows = robot, cameras, safety, deque(maxlen=200)
        end = time.monotonic() + 10
        while (
            len(self.rows) < 20
            or time.monotonic() - min(cameras.read()[0].values()) > safety.stale / 2
        ):
            self.listen()
            time.sleep(0.01)
            if time.monotonic() > end:
                safety.check_fresh(cameras.read()[0], time.monotonic())

    def listen(self):
        """-> joint positions and gripper opening (8,) now."""
        now, self.last, qvel = self.robot.state()
        self.rows.append((now, *self.last, *qvel))
        return self.last

    def wait(self, until):
        """Return when time.monotonic() is `until`; a hundred times a second see that arm and cameras are alive."""
        while (left := until - time.monotonic()) > 0.015:
            self.listen()
            self.safety.check_fresh(self.cameras.read()[0], time.monotonic())
            time.sleep(0.01)
        time.sleep(max(left, 0))

    def look(self, names, size):
        """-> pictures {camera: (H, W, 3)} as `fit` makes them, their stamps, the mean stamp; joints (8,) and their velocities (8,) then."""
        self.listen()
        stamps, pictures = self.cameras.read()
        self.safety.check_fresh(stamps, time.monotonic())
        frame, rows = float(np.mean([stamps[name] for name in names])), np.array(self.rows)
        values = np.array([np.interp(frame, rows[:, 0], column) for column in rows[:, 1:].T])
        return (
            {name: fit(pictures[name], size)[0] for name in names},
            stamps,
            frame,
            values[:8],
            values[8:],
        )


# --------------------------------------------------------------------------------------------------------------- the policy
def trained(run, device):
    """A run's painter and controller -> what they need; pictures, joints, instruction, steps done -> painted pictures, chunk (K, 8)."""
    import torch  # in this process alone: it takes seconds

    from genima.checkpoints import load_policy

    torch.set_num_threads(1)
    trained = load_policy(run / "controlnet", run / "act", device)

    def policy(pictures, qpos, instruction, step):
        chunk, painted = trained.act(pictures, qpos, instruction)
        return painted, chunk

    config = trained.controller.config
    return {name: config[name] for name in ("cameras", "image_size", "horizon")}, policy


def think(load, pipe):
    """The policy's process: says what it needs, then answers one question at a time, and how many seconds that took."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        needs, policy = load()
        pipe.send(needs)
        while True:
            asked, *question = pipe.recv()
            painted, chunk = policy(*question)
            pipe.send((painted, np.asarray(chunk, np.float64), time.monotonic() - asked))
    except (EOFError, BrokenPipeError):  # the main program is gone
        pass
    except Exception as error:
        words = (
            str(error)
            if isinstance(error, UserError)
            else f"The policy failed ({type(error).__name__}: {one_line(error)})."
        )
        pipe.send(Fault(words))


class Policy:
    """The policy in a process of its own, so that neither its threads nor Python's lock delay a command."""

    def __init__(self, load):
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=think, args=(load, there), daemon=True)
        self.process.start()
        there.close()
        if not (needs := self.answer(LOADING)):
            self.close()
            raise Fault(
                f"The policy was not loaded within {LOADING} s: is the machine busy, or the disk slow? Start it again."
            )
        self.needs = needs

    def ask(self, pictures, qpos, instruction, step):
        with suppress(OSError):  # that its process has ended is what `answer` says
            self.pipe.send((time.monotonic(), pictures, qpos, instruction, step))

    def answer(self, timeout=0.0):
        """For what was asked: painted pictures, chunk, after how many seconds; None when it is not there within `timeout` seconds."""
        try:
            answer = self.pipe.recv() if self.pipe.poll(timeout) else None
        except (EOFError, OSError):
            raise Fault("The policy's process has ended: is there enough memory?") from None
        if isinstance(answer, Fault):
            raise answer
        return answer

    def close(self):
        self.process.kill()
        self.process.join()
