"""Where the cameras of a recording are: calibration files say it, or the recording itself does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from genima.arrays import check_array
from genima.calibration import check_distance, check_view, read_calibration
from genima.calibration_files import Camera
from genima.files import UserError
from genima.lens import fit_size
from genima.recordings import Conversion, Recording
from genima.robots import Robot


def cameras_of(
    recording: Recording, robot: Robot, conversion: Conversion, notes: list[str]
) -> dict[str, Camera]:
    """Each camera as the calibration files say it, and where they do not, as the recording does.

    A pose that was recorded is one for each frame, (T, 4, 4). Raises UserError for what nothing
    says.
    """
    recorded = {}
    for name in recording.images:
        recorded[name] = Camera(
            recording.source,
            intrinsics=recording.intrinsics.get(name),
            frame="base",
            pose=recording.extrinsics.get(name),
        )
    if conversion.calibration:
        names = list(recording.images)
        files = conversion.calibration
        cameras, words = read_calibration(files, names, robot, conversion.gripper_length, recorded)
        notes += words
        return cameras
    for name, camera in recorded.items():
        if camera.intrinsics is None or camera.pose is None:
            raise UserError(
                f"{recording.source} does not say where camera '{name}' is: "
                "give --calibration; see docs/your-data.md."
            )
        check_distance(camera, name)
    return recorded


def recorded_camera(
    camera: Camera,
    recording: Recording,
    name: str,
    index: np.ndarray,
    chosen: np.ndarray,
    size: tuple[int, int],
    joint_poses: np.ndarray,
) -> tuple[Camera, str | None]:
    """The camera with its recorded poses in the frames of the episode, and check_view's sentence.

    Its poses are recorded with its pictures, of which the episode has those in `chosen`, or with
    the joints (`index`).
    """
    where = f"{recording.source}: camera '{name}'"
    at_pictures = len(camera.pose) == len(recording.images[name])
    poses = camera.pose[chosen if at_pictures else index]
    check_array(camera.intrinsics, (3, 3), np.float64, f"{where}: its intrinsics")
    check_array(poses, (None, 4, 4), np.float64, f"{where}: its extrinsics")
    if camera.source != recording.source:  # a file says what its lens does
        fit_size(camera, name, size)
    camera = replace(camera, source=recording.source, pose=poses)
    try:
        return camera, check_view(camera, name, size, joint_poses)
    except UserError as error:  # its advice is for a calibration file
        problem = str(error).removeprefix(f"{recording.source}: ").partition(": ")[0]
        raise UserError(f"{recording.source}: {problem}: give --calibration.") from error
