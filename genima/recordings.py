"""A recording as another program wrote it, and how it becomes an episode.

    a file of ACT, a vendor, LeRobot  ->  Recording  ->  Episode (genima/conversion.py)

The conversion does what every source needs: one rate, an opening of 0..1 for the gripper, a
command for every frame, velocities, poses of the joints, pictures without distortion. What it had
to assume or to mend is returned as sentences, to be said aloud. The measures of quality in here
take arrays, so that a report can use them on episodes as well.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from PIL import Image

from genima.files import UserError
from genima.robots import Robot, beyond_limits

MOST_PIXELS = 50_000_000  # of a camera's picture; a few kilobytes can stand for gigabytes
MOVES = 0.02  # an opening that changes by less, of 0..1, never changed
WIDEST = 0.14  # metres, the widest gripper that a width may be of: Robotiq 2F-140
LEAPS = 100  # copies of each frame, on average, that show a wrong clock
NEAR = 0.03  # metres between a recorded tool and forward kinematics that need no mention


@dataclass
class Recording:
    """One demonstration: T frames, D joints. Pictures are read when they are asked for."""

    source: str  # file and place in it, for messages
    seconds: np.ndarray  # (T,) when the joints were read
    joints: np.ndarray  # (T, D) radians
    gripper: np.ndarray  # (T,) in the recording's own unit
    images: dict[str, Sequence[np.ndarray]]  # {camera: [t] -> (H, W, 3) uint8 RGB}
    gripper_range: tuple[float, float] | None = None  # its closed and open values; None: find them
    action: np.ndarray | None = None  # (T, D) commanded joint positions, radians
    gripper_command: np.ndarray | None = None  # (T,) in the unit of `gripper`, or 0..1
    gripper_command_range: tuple[float, float] | None = None  # where that is in another unit
    # {"gripper" or "gripper_command": the smallest and largest value in the whole delivery}
    extremes: dict[str, tuple[float, float]] = field(default_factory=dict)
    image_seconds: dict[str, np.ndarray] = field(default_factory=dict)  # {camera: (T',)}
    timed: bool = True  # False: `seconds` follow from a rate, because no times were recorded
    tool_poses: np.ndarray | None = None  # (T, 4, 4) as the robot reported them
    intrinsics: dict[str, np.ndarray] = field(default_factory=dict)  # {camera: (3, 3)}
    extrinsics: dict[str, np.ndarray] = field(default_factory=dict)  # {camera: (T, 4, 4)}
    instruction: str = ""
    success: bool | None = None  # None: not recorded
    robot: str = ""
    sim: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass
class Conversion:
    """What the person at the keyboard decides for all recordings."""

    robot: Robot | str = ""  # or a name in genima/robots.py; "": as recorded
    fps: float = 10.0
    calibration: tuple[str, ...] = ()
    gripper_length: float | None = None  # metres, flange to fingertips
    instruction: str = ""  # "": as recorded
    task: str = ""  # "": the instruction with underscores


# -------------------------------------------------------------------------------- pictures
def decode_picture(data: bytes | None, swap: bool) -> np.ndarray | None:
    """A JPEG or PNG as (H, W, 3) uint8; None for what is no picture, or a giant one.

    swap: the file holds red, green, blue as files do. Otherwise an array of RGB was given to OpenCV
    as if it were BGR, and it comes back as it was.
    """
    how = cv2.IMREAD_COLOR_RGB if swap else cv2.IMREAD_COLOR
    try:
        with Image.open(io.BytesIO(data or b"")) as header:  # reads no more than the header
            width, height = header.size
        if width * height > MOST_PIXELS:
            return None
        return cv2.imdecode(np.frombuffer(data, np.uint8), how)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, cv2.error):
        return None


# ------------------------------------------------------------------------------------ time
def source_rate(seconds: np.ndarray) -> float:
    """Frames a second, by the median step."""
    return 1 / float(np.median(np.diff(seconds)))


def find_gaps(seconds: np.ndarray) -> list[tuple[float, float]]:
    """Where frames are missing: (when, how long), seconds, for steps above 2.5 times the median."""
    steps = np.diff(seconds)
    long = np.flatnonzero(steps > 2.5 * np.median(steps))
    return [(float(seconds[i] - seconds[0]), float(steps[i])) for i in long]


def check_time(seconds: np.ndarray, where: str):
    """Raise a UserError unless time runs forwards at a rate that a robot has."""
    if len(seconds) < 3:
        raise UserError(f"{where} has {len(seconds)} frames, fewer than 3: move it away.")
    steps = np.diff(seconds)
    if not np.isfinite(seconds).all() or steps.min() < 0:
        frame = int(np.argmin(steps)) + 1
        raise UserError(f"{where}: timestamps go back at frame {frame}: record it again.")
    step = float(np.median(steps))
    if not 1e-3 <= step <= 2:
        raise UserError(
            f"{where}: timestamps step by {step:g} seconds: "
            "set timestamp_unit in the mapping (milliseconds, nanoseconds, ...)."
        )


def nearest(seconds: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The index of the frame nearest in time to each wanted second."""
    after = np.searchsorted(seconds, wanted).clip(1, len(seconds) - 1)
    before_is_nearer = wanted - seconds[after - 1] <= seconds[after] - wanted
    return np.where(before_is_nearer, after - 1, after)


def resampled_times(recording: Recording, fps: float) -> np.ndarray:
    """The seconds of the episode's frames, 1/fps apart, where joints and all pictures exist."""
    streams = [recording.seconds, *recording.image_seconds.values()]
    start = max(stream[0] for stream in streams)
    end = min(stream[-1] for stream in streams)
    for camera, stream in recording.image_seconds.items():
        if stream[0] > recording.seconds[-1] or stream[-1] < recording.seconds[0]:
            raise UserError(
                f"{recording.source}: the times of camera '{camera}' ({stream[0]:.1f} to "
                f"{stream[-1]:.1f} s) and of the joints ({recording.seconds[0]:.1f} to "
                f"{recording.seconds[-1]:.1f} s) do not overlap: write both by the same "
                "clock, or set image_timestamps: null where each picture has its joints."
            )
    slowest = min(source_rate(stream) for stream in streams)
    if fps > 1.2 * slowest:
        raise UserError(
            f"{recording.source} was recorded at {slowest:.3g} Hz: at --fps {fps:g} most frames "
            f"would be copies; give --fps {int(slowest * 1.05)} or less, or --source-fps where its "
            "timestamps only count the frames."
        )
    count = int((end - start) * fps + 1e-3) + 1
    if count < 3:
        raise UserError(
            f"{recording.source} lasts {end - start:.2f} seconds, {count} frames at --fps {fps:g}: "
            "move it away, or give a higher --fps."
        )
    if count > LEAPS * len(recording.seconds):
        raise UserError(
            f"{recording.source} lasts {end - start:.0f} seconds with {len(recording.seconds)} "
            "frames: its timestamps leap; record it again, or give --source-fps."
        )
    return start + np.arange(count) / fps


# --------------------------------------------------------------------------------- gripper
def find_gripper_range(
    values: np.ndarray, robot: Robot, where: str, name: str = "gripper"
) -> tuple[float, float]:
    """The values of a closed and of an open gripper, by the numbers that were recorded.

    0..1 is an opening already, a few centimetres are a width in metres. Raises UserError else.
    name: the field's in a mapping, gripper or gripper_command.
    """
    low = float(values.min())
    high = float(values.max())
    found = f"{where}: {name} goes from {low:.3g} to {high:.3g}"
    advice = f"set {name}_range: [closed, open] in the mapping."
    if robot.gripper_width is None and low >= -0.005 and high <= WIDEST:
        raise UserError(
            f"{found}, metres perhaps, and how far that of a {robot.name} opens is not known: "
            f"{advice}"
        )
    for width in (robot.gripper_width or WIDEST, WIDEST):
        if low >= -0.005 and high <= 1.1 * width:
            return 0.0, width
    if low >= -0.05 and high <= 1.05:
        return 0.0, 1.0
    raise UserError(f"{found}, which is neither 0..1 nor metres: {advice}")


def opening_of(values: np.ndarray, gripper_range: tuple[float, float]) -> np.ndarray:
    """Recorded values (T,) as an opening from 0, closed, to 1, open."""
    closed, opened = gripper_range
    return ((values - closed) / (opened - closed)).clip(0, 1)


def halved(command: np.ndarray) -> np.ndarray:
    """Recorded commands (T,), 0..1, as 1 (open) and 0 (closed): halved within their own range."""
    low = command.min()
    high = command.max()
    middle = (low + high) / 2 if high - low > 0.1 else 0.5
    return (command > middle).astype(np.float32)


def commands_from_motion(opening: np.ndarray) -> np.ndarray:
    """What a gripper must have been told to move as it did: opening (T,) -> 0 or 1 (T,).

    A gripper that opens was told to open; one that stands still, what it was told before. So
    fingers that stop at a cup, half open, are still told to close.
    """
    commands = np.zeros(len(opening), np.float32)
    command = opening[0] > 0.5
    for t, change in enumerate(np.diff(opening, append=opening[-1])):
        if abs(change) > MOVES:
            command = change > 0
        commands[t] = command
    return commands


# ------------------------------------------------------------------------------ the actions
def actions_of(recording: Recording, index: np.ndarray, opening: np.ndarray) -> np.ndarray:
    """What was commanded between each frame of the episode and the next: (T, D+1).

    index (T,): the recorded frame of each frame of the episode; opening (T,) of the gripper.
    Where no command was recorded, it is what the next frame shows.
    """
    last = len(recording.joints) - 1
    following = np.append(index[1:], min(index[-1] + 1, last))
    final = np.maximum(following - 1, index)  # the last command before the next frame
    if recording.action is None:
        joints = recording.joints[following]
    else:
        joints = recording.action[final]
    if recording.gripper_command is None:
        gripper = commands_from_motion(opening)
    else:
        gripper = recording.gripper_command[final]
    return np.concatenate([joints, gripper[:, None]], axis=1)


def check_actions(recording: Recording):
    """Raise a UserError when the actions are no positions of the joints."""
    if recording.action is None:
        return
    apart = float(np.median(np.abs(recording.action - recording.joints).max(axis=1)))
    if not apart < 0.5:
        raise UserError(
            f"{recording.source}: action is {apart:.2g} rad from the joints, so it holds no joint "
            "positions: set action: null in the mapping, and the next frame's joints are taken."
        )


# ------------------------------------------------------------------------------ kinematics
def kinematics_error(
    tool_poses: np.ndarray, last_joint: np.ndarray, frames: dict[str, np.ndarray]
) -> tuple[float, str]:
    """Largest distance, metres, of recorded tool positions from the frame that fits them best.

    tool_poses (T, 4, 4) as recorded, last_joint (T, 4, 4) by forward kinematics, frames from
    robots.robot_frames. Returns (distance, name of the frame). Frames without a recorded position
    are left out; where none has one, the distance is NaN.
    """
    errors = {}
    for name, last_joint_from_frame in frames.items():
        positions = (last_joint @ last_joint_from_frame)[:, :3, 3]
        distances = np.linalg.norm(positions - tool_poses[:, :3, 3], axis=1)  # (T,)
        errors[name] = float(np.fmax.reduce(distances))  # NaN only where all are
    best = min(errors, key=errors.get)
    return errors[best], best


def check_joints(joints: np.ndarray, robot: Robot, where: str) -> str | None:
    """A sentence on joints (T, D) beyond the robot's limits. Raises UserError for other units."""
    expected = len(robot.links)
    if joints.shape[1] != expected:
        raise UserError(
            f"{where}: {joints.shape[1]} joints, but a {robot.name} has {expected}: "
            "name the columns of one arm in the mapping, such as observations/qpos[0:7]."
        )
    farthest = np.abs(joints).max(axis=0)  # (D,)
    if (farthest > 10).sum() > 1:
        raise UserError(
            f"{where}: joints go up to {farthest.max():.3g} rad: "
            "set joint_unit: degrees in the mapping."
        )
    if farthest.max() > 2.2 * np.pi:
        raise UserError(
            f"{where}: joint {farthest.argmax() + 1} goes up to {farthest.max():.3g} rad, beyond "
            f"the limits of a {robot.name}: name the column of that joint in the mapping, or "
            "record it again."
        )
    beyond = int(beyond_limits(joints, robot, 0.01).sum())
    if beyond:
        return f"joints beyond the limits of a {robot.name} in {beyond} of {len(joints)} frames."
    return None
