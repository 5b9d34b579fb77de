"""What the numbers are that a mapping names, whichever file they come from.

Every function takes an array as it was stored and returns it as a Recording has it, or raises a
UserError. `where` names the file and the place in it.
"""

from __future__ import annotations

import h5py
import numpy as np

from genima.files import UserError

BESIDE_ZERO = 0.005  # metres; a finger that is closed may be this far on the other side


def read_numbers(values, where: str, advice: str = "name others in the mapping") -> np.ndarray:
    """Values (...) as float64."""
    try:
        if isinstance(values, h5py.Dataset) and values.dtype.kind not in "biuf":
            raise TypeError(f"{values.dtype} is text or a structure")
        return np.asarray(values, np.float64)
    except (ValueError, TypeError):
        raise UserError(f"{where} holds no numbers: {advice}.") from None


def take_columns(
    values: np.ndarray, name: str, columns: slice | int | list[int] | None, where: str
) -> np.ndarray:
    """The columns of values (T, N) that a name has in its bracket; None: all."""
    if columns is None:
        return values
    whole = name.partition("[")[0].rstrip()
    if values.ndim != 2:
        raise UserError(
            f"{where}: {whole} has shape {values.shape}, so there is no '{name}': name it without "
            "[] in the mapping."
        )
    try:
        taken = values[:, columns]
    except IndexError:
        taken = None
    if taken is None or 0 in taken.shape[1:]:
        raise UserError(
            f"{where}: {whole} has {values.shape[1]} columns, so there is no '{name}': name others "
            "in the mapping."
        )
    return taken


def check_action(action: np.ndarray, joints: np.ndarray, where: str):
    """Raise a UserError when the actions are no positions of the joints by their number."""
    if action.shape != joints.shape:
        raise UserError(
            f"{where} has shape {action.shape}, but the joints {joints.shape}, so it holds no "
            "joint positions: set action: null in the mapping, and the next frame's joints are "
            "taken."
        )


def gripper_of(values: np.ndarray, where: str) -> np.ndarray:
    """A gripper (T,). Several columns are fingers, and their ways from 0 are added up.

    MuJoCo and robosuite record +0.04 m and -0.04 m for the two fingers of an open Franka Hand.
    """
    fingers = values.reshape(len(values), -1)
    if fingers.shape[1] == 1:
        return fingers[:, 0]
    both_sides = (fingers.min(axis=0) < -BESIDE_ZERO) & (fingers.max(axis=0) > BESIDE_ZERO)
    if both_sides.any() or not fingers.size:
        raise UserError(
            f"{where} has {fingers.shape[1]} columns that are no widths of fingers: name one of "
            "them, such as gripper[0]."
        )
    return np.abs(fingers).sum(axis=1)


def seconds_of(values: np.ndarray, unit: float, where: str) -> np.ndarray:
    """Times (T,) in seconds, from (T,) in the unit or from seconds and nanoseconds (T, 2)."""
    times = values.reshape(len(values), -1)
    if times.shape[1] == 1:
        return times[:, 0] * unit
    if times.shape[1] == 2 and unit == 1.0:
        nanoseconds = times[:, 1]
        whole = (nanoseconds == np.round(nanoseconds)) & (nanoseconds >= 0) & (nanoseconds < 1e9)
        if whole.all():
            return times[:, 0] + 1e-9 * nanoseconds
    raise UserError(
        f"{where} has shape {values.shape}, where a number a frame is needed, or its seconds and "
        "nanoseconds: name a column in the mapping, or give --source-fps."
    )


def tool_poses_of(values: np.ndarray, where: str) -> np.ndarray:
    """Poses (T, 4, 4) of the tool, from matrices or from positions with angles."""
    frames = len(values)
    values = values.reshape(frames, -1)
    numbers = values.shape[1]
    if numbers == 16:
        return values.reshape(frames, 4, 4)
    if numbers in (3, 6, 7):  # the position comes first, and is all that is compared
        poses = np.tile(np.eye(4), (frames, 1, 1))
        poses[:, :3, 3] = values[:, :3]
        return poses
    raise UserError(f"{where} has {numbers} numbers a frame, no poses: set tool_pose: null.")


def intrinsics_of(values, where: str) -> np.ndarray:
    """A matrix (3, 3), which may be repeated in each frame."""
    matrix = read_numbers(values, where)
    if matrix.ndim == 3 and len(matrix) and (matrix == matrix[0]).all():
        matrix = matrix[0]
    if matrix.shape != (3, 3):
        raise UserError(
            f"{where} has shape {matrix.shape}, where (3, 3) is needed: set intrinsics: null, and "
            "give --calibration."
        )
    return matrix


def extrinsics_of(values, frames: int, pictures: int, where: str) -> np.ndarray:
    """Poses of a camera for each frame or each of its pictures (T, 4, 4).

    A pose that was recorded once holds for every frame; the last row, 0 0 0 1, may be missing.
    """
    poses = read_numbers(values, where)
    if poses.shape[-2:] == (3, 4):
        last_row = np.broadcast_to([0.0, 0.0, 0.0, 1.0], (*poses.shape[:-2], 1, 4))
        poses = np.concatenate([poses, last_row], axis=-2)
    if poses.shape == (4, 4):
        return np.tile(poses, (frames, 1, 1))
    if poses.shape[1:] != (4, 4) or len(poses) not in (frames, pictures):
        raise UserError(
            f"{where} has shape {poses.shape}, where ({frames}, 4, 4) is needed: set extrinsics: "
            "null, and give --calibration."
        )
    return poses
