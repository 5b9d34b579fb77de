"""HDF5 files of other programs -> recordings, by a mapping (genima/mapping.py).

    with open_recording(path) as root:
        recording = read_recording(root, mapping)

Pictures stay in the file until they are asked for (genima/stored_images.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from genima.files import UserError, shorten
from genima.labels import check_order, flag, read_instruction, text
from genima.mapped_numbers import (
    check_action,
    extrinsics_of,
    gripper_of,
    intrinsics_of,
    read_numbers,
    seconds_of,
    tool_poses_of,
)
from genima.mapping import (
    HELP,
    SECONDS,
    Mapping,
    find,
    find_cameras,
    find_pictures,
    get,
    is_there,
    name_of,
)
from genima.recordings import Recording
from genima.stored_images import StoredImages


# -------------------------------------------------------------------------- one HDF5 file
@contextmanager
def open_recording(path: Path, group: str = "") -> Iterator[h5py.Group]:
    """Yield an HDF5 file of any program; what is wrong with it becomes a UserError.

    group: yield this one in it, a demonstration of many.
    """
    path = Path(path)
    try:
        root = h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path}: {reason_of(path, error)}") from error
    try:
        yield get(root, group or "/")
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if getattr(error, "filename", None):  # of another file: the episode that is written
            raise
        raise UserError(f"{path}{group} is damaged: {why_not_read(error)}.") from error
    finally:
        root.close()


def reason_of(path: Path, error: OSError) -> str:
    """Why an HDF5 file does not open, in the system's words and without advice that destroys."""
    words = str(error).lower()
    if "unable to lock" in words or error.errno == 11:
        return "another program has it open: close that and run the same command again."
    if isinstance(error, PermissionError) or error.errno == 13:
        return "it may not be read: change its permissions (chmod +r)."
    if not path.exists():
        return "it does not exist."
    if "signature" in words or "truncated" in words:
        return "it is no whole HDF5 file: copy it again from where it was recorded."
    return f"it cannot be read ({' '.join(str(error).split())})."


def why_not_read(error: Exception) -> str:
    """Why something in an open HDF5 file cannot be read, and what to do."""
    words = shorten(f"{type(error).__name__}: {error}")
    if "filter returned failure" in words:
        return f"{words}: copy it again from where it was recorded"
    if "filter" in words or "plugin" in words:
        return f"its compression is not known here ({words}): rewrite it with h5repack -f GZIP=1"
    return f"{words}: copy it again from where it was recorded"


# ----------------------------------------------------------------------- a whole recording
def column(root: h5py.Group, name: str | None, what: str, frames: int | None, needed=False):
    """The numbers (T, ...) float64 that a mapping names, or None. Raises UserError."""
    values = find(root, name)
    if values is None:
        if needed:
            raise UserError(f"{name_of(root)} has no {name}, which should be its {what}: {HELP}.")
        return None
    advice = "name others in the mapping"
    if what == "timestamps":
        advice = "give --source-fps"
    values = read_numbers(values, f"{name_of(root)}: {name}", advice)
    if values.ndim == 0 or (frames is not None and len(values) != frames):
        raise UserError(
            f"{name_of(root)}: {name} has shape {values.shape}, but there are {frames} frames."
        )
    return values


def read_recording(
    root: h5py.Group,
    mapping: Mapping,
    source_fps: float | None = None,
    cameras: Sequence[str] = (),
) -> Recording:
    """The recording in an open file. Its pictures are read while the file is open.

    source_fps: its rate, instead of its timestamps. cameras: those to read; none named: all.
    """
    path = name_of(root)
    joints = column(root, mapping.joints, "joints", None, needed=True)
    if joints.ndim != 2:
        raise UserError(f"{path}: {mapping.joints} has shape {joints.shape}, not (frames, joints).")
    frames = len(joints)
    if frames == 0:
        raise UserError(f"{path}: {mapping.joints} has no frames: leave it out.")
    names = find(root, mapping.joint_names)
    if names is not None:
        check_order(names, mapping.joints, joints.shape[1], f"{path}: {mapping.joint_names}")
    to_radians = np.pi / 180 if mapping.joint_unit == "degrees" else 1.0
    notes = []
    gripper = column(root, mapping.gripper, "gripper", frames)
    if gripper is None:
        gripper = np.ones(frames)
        notes.append("no gripper was recorded: it counts as open.")
    action = column(root, mapping.action, "action", frames)
    if action is not None:
        action = action * to_radians
        check_action(action, joints, f"{path}: {mapping.action}")
    command = column(root, mapping.gripper_command, "gripper command", frames)
    if command is not None:
        command = gripper_of(command, f"{path}: {mapping.gripper_command}")
    tool_poses = column(root, mapping.tool_pose, "tool poses", frames)
    if tool_poses is not None:
        tool_poses = tool_poses_of(tool_poses, f"{path}: {mapping.tool_pose}")
    images = {}
    for camera, dataset in find_pictures(root, mapping.images).items():
        if not cameras or camera in cameras:
            images[camera] = StoredImages(dataset, mapping)
    if not images:
        named = f" of {', '.join(cameras)}" if cameras else ""
        raise UserError(f"{path} has no pictures{named} at {mapping.images}: {HELP}.")
    seconds, image_seconds = read_times(root, mapping, source_fps, frames, images, notes)
    intrinsics, extrinsics = read_cameras(root, mapping, frames, images)
    span = mapping.gripper_range
    success = flag(find(root, mapping.success), f"{path}: {mapping.success}")
    if success is None:
        notes.append("no label of success: it counts as successful.")
    instruction = find(root, mapping.instruction)
    return Recording(
        source=path,
        seconds=seconds,
        joints=joints * to_radians,
        gripper=gripper_of(gripper, f"{path}: {mapping.gripper}"),
        gripper_range=None if span is None else (float(span[0]), float(span[1])),
        action=action,
        gripper_command=command,
        images=images,
        image_seconds=image_seconds,
        timed=source_fps is None and is_there(root, mapping.timestamps),
        tool_poses=tool_poses,
        intrinsics=intrinsics,
        extrinsics=extrinsics,
        instruction=read_instruction(instruction, f"{path}: {mapping.instruction}", frames, notes),
        success=success,
        sim=bool(flag(find(root, mapping.sim), f"{path}: {mapping.sim}")),
        robot=read_robot(root, mapping),
        notes=notes,
    )


def read_times(
    root: h5py.Group, mapping: Mapping, source_fps: float | None, frames: int, images: dict, notes
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Seconds of the joints (T,), and of those cameras that have their own {camera: (T',)}."""
    unit = SECONDS[mapping.timestamp_unit]
    seconds = None
    if source_fps is None:
        seconds = column(root, mapping.timestamps, "timestamps", frames)
    if seconds is not None:
        seconds = seconds_of(seconds, unit, f"{name_of(root)}: {mapping.timestamps}")
    else:
        rate = source_fps or read_rate(root, mapping, notes)
        seconds = np.arange(frames) / rate
    image_seconds = {}
    for camera, stored in images.items():
        if mapping.image_timestamps is None:
            if len(stored) != frames:
                raise UserError(
                    f"{stored.where} has {len(stored)} pictures for {frames} frames: "
                    "name their times with image_timestamps in the mapping."
                )
            continue
        name = mapping.image_timestamps.replace("{camera}", camera)
        own = column(root, name, "timestamps of pictures", len(stored), needed=True)
        image_seconds[camera] = seconds_of(own, unit, f"{name_of(root)}: {name}")
    return seconds, image_seconds


def read_rate(root: h5py.Group, mapping: Mapping, notes: list[str]) -> float:
    """Frames a second of a file without timestamps."""
    rate = mapping.rate
    if isinstance(rate, str):
        found = find(root, rate)
        try:
            rate = None if found is None else float(text(found))
        except ValueError:
            raise UserError(f"{name_of(root)}: {rate} is no rate: give --source-fps.") from None
    elif rate is not None:
        notes.append(
            f"no timestamps: {rate:g} Hz, as mapping {mapping.name} says; else --source-fps."
        )
    if rate is None or not rate > 0:
        raise UserError(f"{name_of(root)} has neither timestamps nor a rate: give --source-fps.")
    return float(rate)


def read_cameras(
    root: h5py.Group, mapping: Mapping, frames: int, images: dict
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Intrinsics and extrinsics {camera: matrices} where the file says where its cameras are."""
    intrinsics = {}
    extrinsics = {}
    lenses = find_cameras(root, mapping.intrinsics or "")
    poses = find_cameras(root, mapping.extrinsics or "")
    for camera, stored in images.items():
        if camera in lenses:
            where = f"{name_of(root)}: {lenses[camera].name}"
            intrinsics[camera] = intrinsics_of(lenses[camera], where)
        if camera in poses:
            where = f"{name_of(root)}: {poses[camera].name}"
            extrinsics[camera] = extrinsics_of(poses[camera], frames, len(stored), where)
    return intrinsics, extrinsics


def read_robot(root: h5py.Group, mapping: Mapping) -> str:
    """The robot's name in the file or in the mapping; "" where neither says it."""
    name = mapping.robot or ""
    if name.startswith("@") or "/" in name:
        return text(find(root, name))
    return name
