"""Where the cameras are and what their lenses do, put together from one or more calibration files.

    cameras, notes = read_calibration(["wrist=intrinsics.json", "handeye.yaml"], ["wrist"], "panda")

A camera on the arm is given from the last joint, any other from the robot's base; a file may say
it from the flange, the hand or the tool, or the other way round. Geometry tells what a name
cannot: a camera has to see the arm, so extrinsics that are inverted are found and refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from genima.calibration_files import HELP, WITHOUT_A_NAME, Camera, read_calibration_file
from genima.files import UserError
from genima.lens import fit_size
from genima.robots import ROS_FRAMES, Robot, robot_frames, turn_from_ros

POSE_NAMES = {"base": "world_from_camera", "last_joint": "last_joint_from_camera"}
SEEN = 0.25  # share of the arm's points in the picture that leaves no doubt
FARTHEST = 10  # metres of a camera from the base or from the last joint
UNSEEN = 0.02  # share below which a camera looks somewhere else


def load_calibration(path: Path, robot: str) -> dict[str, dict[str, np.ndarray]]:
    """The cameras of one complete file, under the names in it. robot: whose frames it names.

    {camera: {"intrinsics": (3, 3), and "world_from_camera" or "last_joint_from_camera": (4, 4)}};
    with "distortion" (N,) where the lens bends straight lines, and "distortion_model" where that
    is not OpenCV's usual one.
    """
    names = [name or Path(path).stem for name in read_calibration_file(path)]
    cameras, _ = read_calibration([path], names, robot)
    entries = {}
    for name, camera in cameras.items():
        entries[name] = {"intrinsics": camera.intrinsics, POSE_NAMES[camera.frame]: camera.pose}
        if camera.distortion is not None:
            entries[name]["distortion"] = camera.distortion
            if camera.model != "brown":
                entries[name]["distortion_model"] = camera.model
    return entries


def read_calibration(
    paths: Sequence[str | Path],
    names: Sequence[str],
    robot: Robot | str,
    gripper_length: float | None = None,
    recorded: dict[str, Camera] | None = None,
) -> tuple[dict[str, Camera], list[str]]:
    """The cameras `names` of a dataset, from files that complete one another, and what to tell.

    paths: files, or NAME=FILE for a file of one camera that does not say its name. recorded: what
    the dataset says, where no file does. Each camera returned has intrinsics and a pose, from
    "base" or from "last_joint"; a recorded one may have a pose for each frame.
    """
    cameras: dict[str, Camera] = {}
    notes: list[str] = []
    for entry in paths:
        for name, camera in named_cameras(str(entry), list(names), notes).items():
            merge(cameras, name, camera)
    for name in names:
        fill_in(cameras, name, (recorded or {}).get(name, Camera("")), paths)
    frames = robot_frames(robot, gripper_length)
    for camera in cameras.values():
        if camera.frame in ROS_FRAMES:
            camera.pose = turn_from_ros(robot, camera.frame) @ camera.pose
            camera.frame = ROS_FRAMES[camera.frame]
    resolved = {name: resolve_pose(name, cameras, frames) for name in names}
    return resolved, notes


def fill_in(cameras: dict[str, Camera], name: str, recorded: Camera, paths: Sequence[str | Path]):
    """Take from the dataset what no file says of a camera. Raises UserError for what is missing."""
    if name not in cameras and (recorded.intrinsics is None or recorded.pose is None):
        files = ", ".join(map(str, paths))
        raise UserError(f"Camera '{name}' is not in {files}: add its entry; {HELP}.")
    camera = cameras.setdefault(name, recorded)
    if camera.intrinsics is None:
        camera.intrinsics = recorded.intrinsics
        camera.size = recorded.size  # a file's own is not that of the recorded matrix
    if camera.pose is None:
        camera.pose = recorded.pose
        camera.frame = recorded.frame
    if camera.intrinsics is None:
        advice = f"add them, or a second file that has them; {HELP}."
        raise UserError(f"{camera.source} has no intrinsics of camera '{name}': {advice}")


def split_name(entry: str) -> tuple[str | None, Path]:
    """NAME=FILE -> (NAME, FILE); FILE -> (None, FILE)."""
    name, equals, path = entry.partition("=")
    if not equals or Path(entry).exists():
        return None, Path(entry)
    return name, Path(path)


def named_cameras(entry: str, names: list[str], notes: list[str]) -> dict[str, Camera]:
    """A file's cameras under the dataset's names; notes get a sentence on each that is left out."""
    given, path = split_name(entry)
    found = read_calibration_file(path)
    if given and len(found) > 1:
        raise UserError(f"{path} is of {len(found)} cameras: give it without '{given}='.")
    renamed = {}
    for name in found:
        if given:
            renamed[name] = given
        elif name in names:
            renamed[name] = name
        elif len(found) == 1 and path.stem in names:
            renamed[name] = path.stem
        elif len(found) == 1 and len(names) == 1 and not found[name].named:
            renamed[name] = names[0]
            notes.append(f"{path} is taken for camera '{names[0]}'.")
        elif name == WITHOUT_A_NAME:
            raise UserError(f"{path} does not say which camera it is of: give NAME={path}.")
        else:
            notes.append(f"{path}: camera '{name}' is in no episode and left out.")
            renamed[name] = name
    for camera in found.values():
        camera.frame = renamed.get(camera.frame, camera.frame)  # Kalibr's, from another camera
    return {renamed[name]: camera for name, camera in found.items()}


def merge(cameras: dict[str, Camera], name: str, camera: Camera):
    """Add what a file says of a camera to what the files before it said. The last one counts."""
    if name not in cameras:
        cameras[name] = camera
        return
    known = cameras[name]
    known.source = f"{known.source} and {camera.source}"
    if camera.intrinsics is not None:
        known.size = camera.size
        known.intrinsics = camera.intrinsics
    if camera.intrinsics is not None or camera.distortion is not None:  # a lens is one thing
        known.model = camera.model
        known.distortion = camera.distortion
    if camera.pose is not None:
        known.frame = camera.frame
        known.pose = camera.pose


def resolve_pose(name: str, cameras: dict[str, Camera], frames: dict) -> Camera:
    """The camera with its pose from the base or from the last joint."""
    camera = cameras[name]
    if np.ndim(camera.pose) == 3:  # recorded, in each frame
        check_distance(camera, name)
        return camera
    pose = np.eye(4)
    frame = name
    visited = set()
    while frame in cameras and frame not in visited:  # a camera that is known from another one
        visited.add(frame)
        if cameras[frame].pose is None:
            raise UserError(
                f"{camera.source} does not say where camera '{name}' is: add its pose, "
                f"such as world_from_camera, or the file of a hand-eye calibration; {HELP}."
            )
        carrier = cameras[frame].pose
        if carrier.ndim == 3:
            if not np.allclose(carrier, carrier[0], atol=1e-4):
                raise UserError(
                    f"{camera.source}: camera '{name}' is given from '{frame}', which was recorded "
                    f"moving: give '{name}' from the last joint; {HELP}."
                )
            carrier = carrier[0]
        pose = carrier @ pose
        frame = cameras[frame].frame
    if frame != "base":
        if frame not in frames:
            raise UserError(
                f"{camera.source}: where '{frame}' is on this arm is not known: give camera "
                f"'{name}' from the last joint or from the base; {HELP}."
            )
        pose = frames[frame] @ pose
        frame = "last_joint"
    camera = replace(camera, frame=frame, pose=pose)
    check_distance(camera, name)
    return camera


def check_distance(camera: Camera, name: str):
    """Raise a UserError for a camera, with one pose or many, that is too far away to be true."""
    away = np.linalg.norm(camera.pose[..., :3, 3], axis=-1).max()
    if away > FARTHEST:
        raise UserError(
            f"{camera.source}: camera '{name}' is {away:.0f} m from the arm: is it in millimetres? "
            "Poses are in metres: divide the position by 1000."
        )


# ------------------------------------------------------------------------------ the view
def share_in_view(
    points: np.ndarray, intrinsics: np.ndarray, world_from_camera: np.ndarray, size: tuple
) -> np.ndarray:
    """The share of the frames in which a camera has each point in its picture: (J,).

    points (T, J, 3) in the world, world_from_camera (T, 4, 4), size (H, W).
    """
    camera_from_world = np.linalg.inv(world_from_camera)  # (T, 4, 4)
    turned = np.einsum("tij,tkj->tki", camera_from_world[:, :3, :3], points)
    seen = turned + camera_from_world[:, None, :3, 3]  # (T, J, 3)
    depth = seen[..., 2]
    in_front = depth > 0.02
    pixels = seen @ intrinsics.T
    pixels = pixels[..., :2] / np.where(in_front, depth, 1)[..., None]  # (T, J, 2)
    inside = (pixels >= 0).all(axis=-1) & (pixels <= [size[1], size[0]]).all(axis=-1)
    return (in_front & inside).mean(axis=0)


def camera_poses(pose: np.ndarray, frame: str, joint_poses: np.ndarray) -> np.ndarray:
    """World from camera (T, 4, 4) of a pose from the base or the last joint."""
    carrier = joint_poses[:, -2] if frame == "last_joint" else np.eye(4)
    return np.broadcast_to(carrier @ pose, (len(joint_poses), 4, 4))


def check_view(
    camera: Camera, name: str, size: tuple[int, int], joint_poses: np.ndarray
) -> str | None:
    """A sentence when the camera has the arm out of its picture. joint_poses (T, D+1, 4, 4).

    Raises UserError when that shows that the pose is inverted: the other way round the arm is in
    the picture. A camera on the arm may well miss the fingertips; that they are behind it counts.
    """
    points = joint_poses[..., :3, 3]
    intrinsics = fit_size(camera, name, size)
    given = camera_poses(camera.pose, camera.frame, joint_poses)
    inverted = camera_poses(np.linalg.inv(camera.pose), camera.frame, joint_poses)
    if share_in_view(points, intrinsics, given, size).max() >= UNSEEN:
        return None
    if camera.frame == "last_joint":
        tool_in_camera = np.linalg.inv(given[0]) @ joint_poses[0, -1]
        suspect = tool_in_camera[2, 3] < 0
    else:
        suspect = True
    if suspect and share_in_view(points, intrinsics, inverted, size).max() >= SEEN:
        right = POSE_NAMES[camera.frame]
        carrier = right.removesuffix("_from_camera")
        raise UserError(
            f"{camera.source}: the pose of camera '{name}' is inverted: as {right} no joint of the "
            f"arm is in its picture, the other way round it is; call it camera_from_{carrier}, or "
            "invert the matrix."
        )
    return f"{camera.source}: camera '{name}' never has a joint of the arm in its picture."
