"""Where the cameras of a recording are: calibration files say it, or the recording itself does."""

from __future__ import annotations

import numpy as np

from genima.arrays import check_array
from genima.calibration import check_view, read_calibration
from genima.calibration_files import Camera
from genima.files import UserError
from genima.recordings import Conversion, Recording
from genima.robots import Robot


def cameras_of(
    recording: Recording, robot: Robot, conversion: Conversion, notes: list[str]
) -> dict[str, Camera]:
    """The cameras of the calibration files; those of the recording itself need none."""
    names = list(recording.images)
    known = [name for name in names if name in recording.intrinsics]
    known = [name for name in known if name in recording.extrinsics]
    if conversion.calibration:
        cameras, words = read_calibration(
            conversion.calibration, names, robot, conversion.gripper_length, known
        )
        notes += words
        return cameras
    for name in names:
        if name not in known:
            raise UserError(
                f"{recording.source} does not say where camera '{name}' is: "
                "give --calibration; see docs/your-data.md."
            )
    return {}


def recorded_camera(
    recording: Recording,
    name: str,
    index: np.ndarray,
    chosen: np.ndarray,
    size: tuple[int, int],
    joint_poses: np.ndarray,
) -> tuple[Camera, str | None]:
    """A camera that the recording itself describes, with a pose for each frame of the episode.

    Its poses are recorded with its pictures, of which the episode has those in `chosen`, or with
    the joints (`index`). Returns check_view's sentence, too.
    """
    where = f"{recording.source}: camera '{name}'"
    matrix = recording.intrinsics[name]
    poses = recording.extrinsics[name]
    check_array(matrix, (3, 3), np.float64, f"{where}: its intrinsics")
    at_pictures = len(poses) == len(recording.images[name])
    poses = poses[chosen if at_pictures else index]
    check_array(poses, (None, 4, 4), np.float64, f"{where}: its extrinsics")
    camera = Camera(recording.source, intrinsics=matrix, frame="base", pose=poses)
    try:
        return camera, check_view(camera, name, size, joint_poses)
    except UserError as error:  # its advice is for a calibration file
        problem = str(error).removeprefix(f"{recording.source}: ").partition(": ")[0]
        raise UserError(f"{recording.source}: {problem}: give --calibration.") from error
