"""What surrounds the arm: its address, its cameras, and a person who says what to do.

`Workcell` is the real one; `SimulatedWorkcell` in sims/franky_panda.py has the same attributes
and methods. `Observer` reads arm and cameras together, so that each picture gets the joint
positions of its own moment.
"""

import select
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from genima.calibration import load_calibration
from genima.files import UserError, check_number
from robot.cameras import Cameras, resize_and_crop

LIMITS = {  # of the settings of run and record: from, to
    "seed": (0, 2**31 - 1),
    "steps": (0, 1_000_000),
    "episodes": (1, 1_000_000),
    "execution_horizon": (1, 1000),
    "watchdog": (0.01, 60),
    "size": (0, 4096),  # pixels
    "seconds": (0, 100_000),
}
STARTING = 10  # seconds that the arm's states and the first pictures may take


# --------------------------------------------------------------------------------------- a person
def prompt_user(question: str) -> str:
    """What a person types; empty where nobody can (no terminal)."""
    with suppress(EOFError):
        return input(question).strip()
    return ""


def enter_was_pressed() -> bool:
    """Whether Enter was pressed since the last call."""
    readable = select.select([sys.stdin], [], [], 0)[0]
    return bool(readable and sys.stdin.readline())


# ----------------------------------------------------------------------------------- the workcell
class Workcell(Cameras):
    """A real arm's cameras, calibration and instruction."""

    simulated = False
    variation = 0
    max_steps = 300

    def __init__(self, settings):
        calibration = {}
        if settings.calibration:
            calibration = load_calibration(settings.calibration, settings.arm)
        sources = {}
        for entry in settings.cameras:
            name, _, source = entry.partition("=")
            sources[name] = source
        if not sources or not all(sources.values()) or set(sources) - set(calibration):
            raise UserError(
                "A robot needs --cameras name=serial or name=opencv:0 ..., and a --calibration "
                "file with these names (real_robot.py calibrate)."
            )
        self.instruction = settings.instruction
        if not self.instruction:
            self.instruction = prompt_user("Instruction: ")
        if not self.instruction:
            raise UserError("There is no instruction: give one with --instruction.")
        super().__init__(sources, calibration)
        self.calibration = {camera: calibration[camera] for camera in sources}
        self.host = settings.robot
        self.seed = int(time.time())

    def start_demonstration(self, settings):
        if not settings.yes:
            prompt_user(
                "Hold the arm by the buttons at its wrist. "
                "Enter starts the recording, and Enter stops it."
            )

    def is_over(self) -> bool:
        return enter_was_pressed()

    def is_successful(self) -> bool:
        return prompt_user("Did it succeed? y Enter: ") == "y"


def check_numbers(settings):
    """Raise a UserError for settings, of those in LIMITS, that cannot be meant."""
    for name, (low, high) in LIMITS.items():
        if hasattr(settings, name):
            option = "--" + name.replace("_", "-")
            check_number(option, getattr(settings, name), low, high)


def open_workcell(settings, **options):
    """The workcell of these settings, to be closed. options: of the simulated one."""
    if settings.robot != "sim":
        return Workcell(settings)
    if settings.arm == "ur5e":
        raise UserError(
            "The simulated arm behind Franka's protocol is a Franka: give the UR5e's address with "
            "--robot, or drive a simulated UR5e with evaluate.py."
        )
    from sims.franky_panda import SimulatedWorkcell  # MuJoCo, which a real robot does not need

    views = {}  # {a name: which of the simulated cameras has it}
    for entry in settings.cameras:
        name, _, view = entry.partition("=")
        views[name] = view or name
    return SimulatedWorkcell(settings.task, settings.seed, views=views, **options)


# ----------------------------------------------------------------------------------- observations
@dataclass
class Observation:
    images: dict  # {camera: (H, W, 3) uint8}
    stamps: dict  # {camera: s of time.monotonic()}
    stamp: float  # the cameras' mean
    qpos: np.ndarray  # (D+1,) joint positions (rad) and gripper opening 0..1 at `stamp`
    qvel: np.ndarray  # (D+1,) their velocities


class Observer:
    """Arm and cameras, read together. It keeps the arm's states of the last two seconds."""

    def __init__(self, robot, workcell, safety):
        """Returns when the arm and every camera have been heard."""
        self.robot = robot
        self.workcell = workcell
        self.safety = safety
        self.states = deque(maxlen=200)  # rows of time (1), qpos (D+1), qvel (D+1)
        self.wait_for_frames(STARTING)

    def update(self) -> np.ndarray:
        """Read the arm's state. Returns joint positions and gripper opening (D+1,)."""
        now, self.qpos, qvel = self.robot.state()
        self.states.append((now, *self.qpos, *qvel))
        return self.qpos

    def check_frames(self):
        self.safety.check_frames(self.workcell.read_frames()[0], time.monotonic())

    def wait_for_frames(self, seconds: float):
        """Return when every camera's frame is new and the arm's last states are known."""
        self.states.clear()
        end = time.monotonic() + seconds
        while True:
            self.update()
            oldest = min(self.workcell.read_frames()[0].values())
            if len(self.states) >= 20 and time.monotonic() - oldest < self.safety.stale / 2:
                return
            time.sleep(0.01)
            if time.monotonic() > end:
                self.check_frames()

    def wait_until(self, moment: float):
        """Return when time.monotonic() is `moment`; check arm and cameras 100 times a second."""
        while moment - time.monotonic() > 0.015:
            self.update()
            self.check_frames()
            time.sleep(0.01)
        time.sleep(max(moment - time.monotonic(), 0))

    def observe(self, cameras: list[str], size: tuple[int, int] | None) -> Observation:
        """The newest frames of these cameras in this size (H, W), and the arm at that moment."""
        self.update()
        stamps, frames = self.workcell.read_frames()
        self.safety.check_frames(stamps, time.monotonic())
        stamp = float(np.mean([stamps[camera] for camera in cameras]))
        states = np.array(self.states)  # (N, 2D+3)
        then = np.array([np.interp(stamp, states[:, 0], column) for column in states[:, 1:].T])
        images = {camera: resize_and_crop(frames[camera], size)[0] for camera in cameras}
        qpos, qvel = np.split(then, 2)  # (D+1,) each
        return Observation(images, stamps, stamp, qpos, qvel)
