"""From a recording to an episode: see genima/recordings.py for the two ends and the measures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from genima.calibration import check_view
from genima.episodes import Episode
from genima.files import UserError
from genima.import_cameras import cameras_of, recorded_camera
from genima.lens import fit_size, undistort, undistortion
from genima.recordings import (
    MOVES,
    NEAR,
    WIDEST,
    Conversion,
    Recording,
    actions_of,
    check_actions,
    check_joints,
    check_time,
    find_gaps,
    find_gripper_range,
    halved,
    kinematics_error,
    nearest,
    opening_of,
    resampled_times,
)
from genima.robots import Robot, check_robot, find_robot, guess_robot


class ChosenImages:
    """The frames of one camera that an episode has, read and straightened when asked for.

    It looks like an array (T, H, W, 3) uint8 to whoever takes one picture after the other, and a
    long recording need not fit into memory. The recording has to stay open.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(
        self, stored: Sequence[np.ndarray], chosen: np.ndarray, shape: tuple, maps, where: str
    ):
        self.stored = stored
        self.chosen = chosen
        self.shape = (len(chosen), *shape)
        self.maps = maps
        self.where = where
        self.reader = ThreadPoolExecutor(1)
        self.reading = {}  # frame -> what the reader will have decoded

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, t: int) -> np.ndarray:
        if self.maps is None:
            return self.decode(t)
        # While this picture is straightened, a thread decodes the next.
        decoded = self.reading.pop(t, None) or self.reader.submit(self.decode, t)
        if t + 1 < len(self):
            self.reading = {t + 1: self.reader.submit(self.decode, t + 1)}
        return undistort(decoded.result(), self.maps)

    def decode(self, t: int) -> np.ndarray:
        picture = self.stored[int(self.chosen[t])]
        if picture.shape != self.shape[1:]:
            raise UserError(
                f"{self.where}: frame {self.chosen[t]} has shape {picture.shape}, the first one "
                f"{self.shape[1:]}: record it again, or leave the camera out with --cameras."
            )
        return picture


def task_name(instruction: str) -> str:
    """An instruction as the name of a folder: "Pick up the cup." -> "pick_up_the_cup"."""
    return re.sub(r"[^a-z0-9]+", "_", instruction.lower()).strip("_")[:60]


def choose_robot(recording: Recording, conversion: Conversion, notes: list[str]) -> Robot:
    """The arm: as asked for, as recorded, or by the number of its joints."""
    if isinstance(conversion.robot, Robot):
        return conversion.robot
    if conversion.robot:
        return find_robot(check_robot(conversion.robot))
    if recording.robot:
        try:
            return find_robot(check_robot(recording.robot))
        except UserError as error:
            raise UserError(f"{recording.source}: {error}") from error
    joints = recording.joints.shape[1]
    robot = guess_robot(joints)
    if robot is None:
        raise UserError(
            f"{recording.source}: {joints} joints fit no robot that is known: name the columns of "
            "one arm in the mapping, such as observations/qpos[0:7], or give --robot or --urdf."
        )
    notes.append(f"{joints} joints and no robot named: taken for a {robot}; else give --robot.")
    return find_robot(robot)


def convert(recording: Recording, conversion: Conversion) -> tuple[Episode, list[str]]:
    """The episode of a recording, and sentences on what was assumed or found. Raises UserError.

    Its pictures are read while it is written: the recording's file has to stay open until then.
    """
    where = recording.source
    notes = list(recording.notes)
    robot = choose_robot(recording, conversion, notes)
    instruction = conversion.instruction or recording.instruction
    if not instruction:
        raise UserError(f"{where} has no instruction: give --instruction 'pick up the cup'.")
    task = conversion.task or task_name(instruction)
    if not task:
        raise UserError(
            f"{where}: the instruction '{instruction}' has no Latin letters to name the task's "
            "folder by: give --task."
        )
    if not np.isfinite(recording.joints).all() or not np.isfinite(recording.gripper).all():
        raise UserError(f"{where}: joints or gripper hold NaN or infinite numbers: move it away.")
    check_time(recording.seconds, where)
    for seconds in recording.image_seconds.values():
        check_time(seconds, where)
    for when, length in find_gaps(recording.seconds):
        notes.append(f"a gap of {length:.2f} s at {when:.2f} s: the nearest frames fill it.")
    note = check_joints(recording.joints, robot, where)
    if note:
        notes.append(note)
    check_actions(recording)

    opening = normalise_gripper(recording, robot, notes)
    times = resampled_times(recording, conversion.fps)
    index = nearest(recording.seconds, times)  # (T,)
    qpos = np.concatenate([recording.joints, opening[:, None]], axis=1)[index]
    chain = robot.chain(conversion.gripper_length)
    joint_poses = chain.forward_kinematics(qpos[:, :-1])
    check_tool(recording, index, joint_poses, robot, conversion, notes)

    cameras = cameras_of(recording, robot, conversion, notes)
    extras = extras_of(recording, index)
    images = {}
    intrinsics = {}
    extrinsics = {}
    blind = []
    for name, stored in recording.images.items():
        chosen = nearest(recording.image_seconds.get(name, recording.seconds), times)
        if name in recording.image_seconds:
            extras[f"timestamps_{name}"] = recording.image_seconds[name][chosen]
        first = stored[int(chosen[0])]
        size = first.shape[:2]
        camera = cameras[name]
        if camera.pose.ndim == 2:
            note = check_view(camera, name, size, joint_poses)
        else:
            camera, note = recorded_camera(
                camera, recording, name, index, chosen, size, joint_poses
            )
        if note:
            blind.append(note)
        intrinsics[name] = fit_size(camera, name, size)
        carrier = joint_poses[:, -2] if camera.frame == "last_joint" else np.eye(4)
        extrinsics[name] = np.broadcast_to(carrier @ camera.pose, (len(index), 4, 4))
        maps = undistortion(camera, intrinsics[name], size)
        images[name] = ChosenImages(stored, chosen, first.shape, maps, f"{where}: camera '{name}'")
    notes += blind

    return Episode(
        path=Path(where),
        task=task,
        variation=0,
        instruction=instruction,
        instructions=[instruction],
        success=recording.success is not False,
        fps=float(conversion.fps),
        robot=robot.name,
        sim=recording.sim,
        seed=0,
        qpos=qpos.astype(np.float32),
        qvel=np.gradient(qpos, 1 / conversion.fps, axis=0).astype(np.float32),
        action=actions_of(recording, index, qpos[:, -1]).astype(np.float32),
        joint_poses=joint_poses.astype(np.float32),
        images=images,
        intrinsics=intrinsics,
        extrinsics=extrinsics,
        extras=extras,
    ), notes


def extras_of(recording: Recording, index: np.ndarray) -> dict[str, np.ndarray]:
    """What training does not need, but a report on the data does: times and tool poses."""
    extras = {}
    if recording.timed:
        extras["timestamps"] = recording.seconds[index]
    if recording.tool_poses is not None:
        extras["tool_pose"] = recording.tool_poses[index]
    return extras


def normalise_gripper(recording: Recording, robot: Robot, notes: list[str]) -> np.ndarray:
    """The gripper's opening (T,), 0..1; the recorded command becomes 0 or 1 in place."""
    span = recording.gripper_range
    if span is None:
        span = guess_range(recording, "gripper", robot)
        if span[1] < 1 and recording.gripper.max() > 0:
            notes.append(
                f"the gripper is a width in metres: divided by {span[1]:g} m; set gripper_range "
                "in the mapping for another gripper."
            )
            if recording.gripper.max() < 0.55 * span[1]:
                notes.append(
                    "the gripper never opens more than half: if one finger's way was recorded, "
                    "set gripper_range: [0, 0.04]."
                )
    opening = opening_of(recording.gripper, span)
    if np.ptp(opening) < MOVES:
        notes.append(f"the gripper never moves: its opening is always {opening.mean():.2f}.")
    if recording.gripper_command is not None:
        recording.gripper_command = normalise_command(recording, span, opening, robot)
    return opening


def guess_range(recording: Recording, name: str, robot: Robot) -> tuple[float, float]:
    """What closed and open are in the unit of `gripper` or `gripper_command`. Raises UserError.

    The whole delivery's values count, where they are known: it has one scale. Where that goes
    to 1, a gripper that moves within a few centimetres may be another's, in metres.
    """
    values = getattr(recording, name)
    where = recording.source
    extremes = recording.extremes.get(name, (values.min(), values.max()))
    if extremes != (values.min(), values.max()):
        where = f"{where} and the other recordings"
    span = find_gripper_range(np.array(extremes), robot, where, name)
    if span[1] == 1 and values.max() <= 1.1 * WIDEST and np.ptp(values) > 0.01:
        raise UserError(
            f"{recording.source}: {name} goes from {values.min():.3g} to {values.max():.3g}, "
            f"perhaps metres, in other recordings up to {extremes[1]:.3g}: import them one by one, "
            f"each with {name}_range: [closed, open] in its mapping."
        )
    return span


def normalise_command(
    recording: Recording, span: tuple[float, float], opening: np.ndarray, robot: Robot
) -> np.ndarray:
    """The gripper's command (T,) as 0 or 1. span: closed and open in the unit of the gripper."""
    command = recording.gripper_command
    if not np.isfinite(command).all():
        frame = int(np.isfinite(command).argmin())
        raise UserError(
            f"{recording.source}: gripper_command is NaN or infinite in frame {frame}: "
            "set gripper_command: null in the mapping, and it is found from the gripper's motion."
        )
    if recording.gripper_command_range is not None:
        span = recording.gripper_command_range
    elif recording.gripper_range is None or np.ptp(command) > 1.5 * abs(span[1] - span[0]):
        span = guess_range(recording, "gripper_command", robot)
    commands = halved(opening_of(command, span))
    if np.ptp(opening) > 0.1 and np.ptp(command) > 0 and np.ptp(commands) == 0:
        raise UserError(
            f"{recording.source}: gripper_command goes from {command.min():.3g} to "
            f"{command.max():.3g}, which would be one command all along, but the gripper moves: "
            "set gripper_command_range: [closed, open] in the mapping."
        )
    return commands


def check_tool(
    recording: Recording,
    index: np.ndarray,
    joint_poses: np.ndarray,
    robot: Robot,
    conversion: Conversion,
    notes: list[str],
):
    """Add a sentence when forward kinematics and the recorded tool poses disagree."""
    if recording.tool_poses is None:
        return
    frames = robot.frames(conversion.gripper_length)
    recorded = recording.tool_poses[index]
    error, frame = kinematics_error(recorded, joint_poses[:, -2], frames)
    if np.isnan(error):
        notes.append("the recorded tool poses are all NaN: not compared with forward kinematics.")
    elif error > NEAR:
        notes.append(
            f"the recorded tool pose is up to {100 * error:.1f} cm from forward kinematics "
            f"(nearest: the {frame}): check --robot and --gripper-length."
        )
