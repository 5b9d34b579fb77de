"""The quality of demonstrations: what a buyer of data wants to know before training on it.

    facts, episode = examine(path, first)   numbers of one episode, and what is out of bounds

Limits are those of the arm, of a data sheet, or of what stage 1 can draw; each constant says which.
An episode is read without its pictures, but for a few. genima/quality_report.py puts the facts of a
folder together, genima/quality_page.py shows pictures.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from genima.calibration import share_in_view
from genima.episodes import FORMAT, Episode, check_alike, read_episode
from genima.files import UserError, read_hdf5
from genima.kinematics import Chain, is_in_room
from genima.recordings import MOVES, NEAR, kinematics_error
from genima.robots import FLANGES, JOINT_LIMITS, beyond_limits, robot_frames
from genima.spheres import JOINTS, SphereStyle
from genima.visibility import is_visible

# rad/s and rad/s^2 of each joint, from the data sheets. The UR5e's acceleration is 800 degrees/s^2.
MAX_VELOCITIES = {
    "panda": (2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61),
    "fr3": (2.62, 2.62, 2.62, 2.62, 5.26, 4.18, 5.26),
    "ur5e": (np.pi,) * 6,
}
MAX_ACCELERATIONS = {
    "panda": (15.0, 7.5, 10.0, 12.5, 15.0, 20.0, 20.0),
    "fr3": (10.0,) * 7,
    "ur5e": (14.0,) * 6,
}
OVERSHOOT = 1.25  # of a velocity: servos overshoot, and frames are not exactly 1/fps apart
GAP = 2.1  # frames between two timestamps that are a gap; two may be one of a slower source
JITTER = 0.7  # frames that a timestamp may be off its place; half a one of a slower source is
DARK = 8  # mean of a picture, 0..255, below which it shows nothing
FARTHEST = 10  # metres from the arm's base to a camera that can show how it moves
SAMPLES = 5  # pairs of pictures that are read of each camera


@dataclass
class Facts:
    """One episode in numbers. None: the file does not say it."""

    path: str
    task: str
    frames: int = 0
    success: bool = True
    step: float = 0.0  # rad, the largest turn of a joint between two frames
    jerk: float = 0.0  # rad/s^3, the largest of any joint
    beyond: int | None = None  # frames in which a joint is, or is sent, beyond the arm's limits
    gap: float | None = None  # seconds, the longest between two timestamps
    jitter: float | None = None  # seconds that a frame is off its place in time, the worst
    gripper: tuple[float, float] = (0.0, 1.0)  # its smallest and largest opening
    tool_error: float | None = None  # metres from the recorded tool to forward kinematics
    tool_frame: str = ""  # the frame of the arm that the recorded tool is
    visible: dict = field(default_factory=dict)  # {camera: share of frames of each sphere}
    axis: dict = field(default_factory=dict)  # {camera: metres from the optical axis to the arm}
    joints: str = ""  # a fingerprint of the motion: two episodes that share it are duplicates
    places: dict = field(default_factory=dict)  # {camera in the room: (x, y, z)}
    out_of_bounds: list[str] = field(default_factory=list)


def robot_name(episode: Episode) -> str | None:
    """The arm by its name in our tables; None for another one."""
    for name, (low, _) in JOINT_LIMITS.items():
        if name in episode.robot.lower() and len(low) == episode.qpos.shape[1] - 1:
            return name
    return None


def examine(path: Path, first: Episode | None) -> tuple[Facts, Episode]:
    """The facts of one file, and its episode without pictures.

    Raises UserError for a file that is broken or not like the first one.
    """
    episode = read_episode(path, images=False)
    if first is not None:
        check_alike(episode, first)
    facts = Facts(str(path), path.parent.name, len(episode.qpos), episode.success)
    facts.joints = hashlib.sha256(episode.qpos.round(4).tobytes()).hexdigest()[:16]
    with read_hdf5(path, FORMAT) as root:
        extras = root.get("extras", {})
        # In what real_robot.py records it is the frame's stamp.
        seconds = extras.get("timestamps", extras.get("frame"))
        if seconds is not None:
            check_timestamps(seconds[()], episode, facts)
            for camera in episode.image_sizes:
                if f"timestamps_{camera}" in extras:
                    check_lag(extras[f"timestamps_{camera}"] - seconds[()], camera, episode, facts)
        if "tool_pose" in extras:
            check_tool(extras["tool_pose"][()], episode, facts)
        for camera in episode.image_sizes:
            check_pictures(root[f"observations/images/{camera}"], camera, episode, facts)
    check_motion(episode, facts)
    check_gripper(episode, facts)
    check_cameras(episode, facts)
    return facts, episode


def check_motion(episode: Episode, facts: Facts):
    """Steps, jerk and limits of the joints, and whether the poses follow them."""
    name = robot_name(episode)
    joints = episode.qpos[:, :-1].astype(np.float64)  # (T, D)
    steps = np.abs(np.diff(joints, axis=0))  # (T-1, D)
    jerks = np.abs(np.diff(joints, n=3, axis=0)) * episode.fps**3  # (T-3, D)
    facts.step = float(steps.max(initial=0))
    facts.jerk = float(jerks.max(initial=0))
    try:
        Chain.from_episode(episode)
    except UserError as error:
        facts.out_of_bounds.append(str(error).removeprefix(f"{episode.path}: ").rstrip("."))
    if name is None:
        return
    fastest = OVERSHOOT * np.array(MAX_VELOCITIES[name]) / episode.fps  # rad a frame
    describe_worst(steps, fastest, "turns by {:.2f} rad, faster than a {} can", name, facts)
    # Between two frames an acceleration can at most go from one limit to the other.
    most = 2 * np.array(MAX_ACCELERATIONS[name]) * episode.fps
    describe_worst(jerks, most, "jerks by {:.0f} rad/s^3, more than a {} can", name, facts)
    outside = beyond_limits(joints, name) | beyond_limits(episode.action[:, :-1], name)
    facts.beyond = int(outside.sum())
    if facts.beyond:
        facts.out_of_bounds.append(
            f"joints are, or are sent, beyond a {name}'s limits in {facts.beyond} frames, "
            f"first in frame {int(outside.argmax())}"
        )


def describe_worst(values: np.ndarray, limits: np.ndarray, words: str, name: str, facts: Facts):
    """Add a sentence on the frame and joint that exceed their limit the most. values (T, D)."""
    if not len(values):
        return
    t, joint = np.unravel_index((values / limits).argmax(), values.shape)
    if values[t, joint] > limits[joint]:
        found = words.format(values[t, joint], name)
        facts.out_of_bounds.append(f"joint {joint + 1} {found}, at frame {t}")


def check_timestamps(seconds: np.ndarray, episode: Episode, facts: Facts):
    """Gaps and jitter of when the frames were recorded, seconds (T,)."""
    if seconds.shape != (len(episode.qpos),) or len(seconds) < 2:
        return
    period = 1 / episode.fps
    off = seconds - seconds[0] - period * np.arange(len(seconds))
    facts.gap = float(np.diff(seconds).max())
    facts.jitter = float(np.abs(off - np.median(off)).max())
    if facts.gap > GAP * period:
        when = int(np.diff(seconds).argmax())
        facts.out_of_bounds.append(f"a gap of {facts.gap:.2f} s after frame {when}")
    elif facts.jitter > JITTER * period:
        when = int(np.abs(off - np.median(off)).argmax())
        facts.out_of_bounds.append(f"frame {when} is {facts.jitter:.2f} s off its time")


def check_lag(lag: np.ndarray, camera: str, episode: Episode, facts: Facts):
    """By how many seconds (T,) the pictures of a camera are later than the joints."""
    worst = int(np.abs(lag).argmax())
    if abs(lag[worst]) > JITTER / episode.fps:
        facts.out_of_bounds.append(
            f"camera '{camera}' is {lag[worst]:+.2f} s off the joints in frame {worst}"
        )


def check_tool(tool_poses: np.ndarray, episode: Episode, facts: Facts):
    """Recorded poses of the tool (T, 4, 4) against forward kinematics."""
    last_joint = episode.joint_poses[:, -2].astype(np.float64)
    if tool_poses.shape != last_joint.shape:
        return
    frames = {"last joint": np.eye(4)}
    name = robot_name(episode)
    if name in FLANGES:
        frames = robot_frames(name)
    frames["tool"] = np.linalg.inv(last_joint[0]) @ episode.joint_poses[0, -1]
    error, frame = kinematics_error(tool_poses, last_joint, frames)
    if np.isnan(error):
        facts.out_of_bounds.append("the recorded tool poses are all NaN")
        return
    facts.tool_error = error
    facts.tool_frame = frame
    if facts.tool_error > NEAR:
        facts.out_of_bounds.append(
            f"the recorded tool is up to {100 * facts.tool_error:.1f} cm from forward kinematics "
            f"(nearest: the {facts.tool_frame})"
        )


def check_gripper(episode: Episode, facts: Facts):
    """The opening is 0..1, and follows what was commanded."""
    opening = episode.qpos[:, -1]
    facts.gripper = (float(opening.min()), float(opening.max()))
    low, high = facts.gripper
    if low < -0.05 or high > 1.05:
        facts.out_of_bounds.append(f"the gripper's opening goes from {low:.2f} to {high:.2f}")
    commanded = np.ptp(episode.action[:, -1]) > 0.5
    if commanded and high - low < MOVES and len(opening) > 3:
        facts.out_of_bounds.append(f"the gripper is commanded, but stays at {high:.2f}")
    elif commanded and high < 0.15:
        facts.out_of_bounds.append(f"the gripper opens to {high:.3f} only: is that a width?")


def check_cameras(episode: Episode, facts: Facts):
    """Whether each camera sees the arm, and the spheres."""
    style = SphereStyle(tuple(joint for joint in JOINTS if joint < episode.qpos.shape[1] - 1))
    now = np.arange(len(episode.qpos))
    points = episode.joint_poses[..., :3, 3].astype(np.float64)  # (T, D+1, 3)
    for camera, size in episode.image_sizes.items():
        poses = episode.extrinsics[camera]
        away = float(np.linalg.norm(poses[:, :3, 3], axis=1).max())
        if away > FARTHEST:
            facts.out_of_bounds.append(
                f"camera '{camera}' is {away:.0f} m from the base: its pose may be in millimetres"
            )
        seen = is_visible(episode, camera, now, style)  # (T, S)
        facts.visible[camera] = seen.mean(axis=0).round(3).tolist()
        facts.axis[camera] = distance_to_axis(points, poses)
        if is_in_room(episode, camera):
            facts.places[camera] = poses[0, :3, 3].tolist()
        if share_in_view(points, episode.intrinsics[camera], poses, size).max() == 0:
            facts.out_of_bounds.append(
                f"camera '{camera}' never has the arm in its picture: is its pose inverted?"
            )
        elif not seen.any():
            facts.out_of_bounds.append(f"camera '{camera}' never has a sphere in its picture")


def distance_to_axis(points: np.ndarray, poses: np.ndarray) -> float:
    """Metres from a camera's optical axis to the nearest joint before it; infinite for none.

    points (T, J, 3) in the world, poses (T, 4, 4) world from camera.
    """
    offsets = points - poses[:, None, :3, 3]
    here = offsets @ poses[:, :3, :3]  # (T, J, 3) in the camera's frame
    apart = np.linalg.norm(here[..., :2], axis=-1)
    return float(np.where(here[..., 2] > 0, apart, np.inf).min())


def check_pictures(stored, camera: str, episode: Episode, facts: Facts):
    """Read a few pairs of pictures (T, H, W, 3): dark ones, and a camera that has stopped."""
    frames = len(stored)
    pairs = np.linspace(0, frames - 2, SAMPLES).round().astype(int) if frames > 1 else [0]
    pictures = [stored[t] for t in sorted({*pairs, frames - 1})]
    if max(picture.mean() for picture in pictures) < DARK:
        facts.out_of_bounds.append(f"camera '{camera}' is dark")
    arm_moves = np.ptp(episode.qpos[:, :-1], axis=0).max() > 0.05
    same = all((picture == pictures[0]).all() for picture in pictures)
    if len(pictures) > 2 and arm_moves and same:
        facts.out_of_bounds.append(f"camera '{camera}' shows the same picture throughout")
