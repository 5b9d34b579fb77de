"""Calibration files of five programs, read into one form.

Read are JSON (also with tabs) and YAML of

    ours         {camera: {intrinsics: 3x3, world_from_camera: 4x4}}, see docs/your-data.md
    RealSense    fx, fy, ppx, ppy, model, coeffs              (no pose)
    ROS          camera_info: camera_matrix, distortion_model  (no pose)
    Kalibr       camN: intrinsics, distortion_coeffs, T_cn_cnm1 (pose from the camera before)
    easy_handeye transformation, parameters                    (pose alone)

Several files complete one another: one for the lens, one for the pose. A pose is `a_from_b`: it
takes a point's coordinates in frame b to those in frame a. Cameras have OpenCV's axes, x right,
y down, z forward. Our pixel centres are at +0.5; those of the other programs are at whole
numbers, so half a pixel is added to their image centres.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genima.documents import explain, read_yaml
from genima.episodes import check_array
from genima.files import UserError
from genima.robots import frame_name

HELP = "see docs/your-data.md"
OUR_KEYS = ("intrinsics", "size", "distortion", "distortion_model")
OUR_KEYS += ("name", "serial", "date", "rms", "comment")  # for people, not read
WITHOUT_A_NAME = ""  # a file of one camera, which its name does not say


@dataclass
class Camera:
    """What the files say of one camera; what they do not say is None."""

    source: str  # the files, for messages
    size: tuple[int, int] | None = None  # (H, W) of the calibrated pictures
    intrinsics: np.ndarray | None = None  # (3, 3), pixel centres at +0.5
    model: str = "brown"  # of the lens: brown, inverse_brown, fisheye
    distortion: np.ndarray | None = None  # (N,), None: straight lines are straight
    frame: str | None = None  # what carries it: base, last_joint, flange, ... or a camera
    pose: np.ndarray | None = None  # (4, 4) frame from camera
    named: bool = False  # in a file of ours, where a camera's name is that of the data


def read_calibration_file(path: Path) -> dict[str, Camera]:
    """{camera: Camera} of one file of any of these programs; Camera of one without a name is ''."""
    content = read_yaml(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} is no file of cameras: {HELP}.")
    with explain(path, HELP):
        return read_cameras(content, path)


def read_cameras(content: dict, path: Path) -> dict[str, Camera]:
    if "transformation" in content or "transform" in content:
        return {WITHOUT_A_NAME: read_easy_handeye(content, path)}
    if "fx" in content:
        return {WITHOUT_A_NAME: read_realsense(content, path)}
    if is_ros(content):
        name = str(content.get("camera_name", WITHOUT_A_NAME))
        return {name: read_ros(content, path)}
    cameras = {}
    before = None
    for name, entry in content.items():
        if not isinstance(entry, dict):
            raise UserError(f"{path}: {name} is no camera's entry: {HELP}.")
        where = f"{path}: {name}"
        if "fx" in entry:
            camera = read_realsense(entry, where)
        elif is_ros(entry):
            camera = read_ros(entry, where)
        elif "camera_model" in entry:
            camera = read_kalibr(entry, where, before)
            before = str(name)
        else:
            camera = read_ours(entry, where)
        cameras[str(name)] = camera
    return cameras


def numbers(values, where: str, *shape: int) -> np.ndarray:
    """An array of finite numbers of this shape; no shape: of any length."""
    try:
        array = np.array(values, np.float64)
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"{where} holds what is no number: {HELP}.") from None
    if shape and array.size == np.prod(shape):
        array = array.reshape(shape)
    if (shape and array.shape != shape) or not np.isfinite(array).all():
        raise UserError(f"{where} has to hold {shape or 'finite'} numbers: {HELP}.")
    return array


def pinhole(fx, fy, cx, cy, where: str) -> np.ndarray:
    """Intrinsics (3, 3) from numbers whose pixel centres are at whole numbers."""
    fx, fy, cx, cy = numbers([fx, fy, cx, cy], where, 4)
    matrix = np.array([[fx, 0, cx + 0.5], [0, fy, cy + 0.5], [0, 0, 1]])
    check_array(matrix, (3, 3), np.float64, where)
    return matrix


def set_lens(camera: Camera, model: str, coefficients, where: str):
    """Fill in a camera's distortion. Raises UserError for a model of lens that is not known."""
    word = str(model).lower().split(".")[-1].replace(" ", "_")
    coefficients = numbers(coefficients, f"{where}: distortion").reshape(-1)
    if not coefficients.any() or word == "none":
        return
    if word in ("inverse_brown", "inverse_brown_conrady"):
        camera.model = "inverse_brown"
    elif word in ("equidistant", "fisheye", "kannala_brandt4"):
        camera.model = "fisheye"
    elif word not in (
        "brown",
        "brown_conrady",
        "modified_brown_conrady",
        "plumb_bob",
        "radtan",
        "rational_polynomial",
    ):
        raise UserError(f"{where}: the lens model '{model}' is not known: {HELP}.")
    lengths = (4,) if camera.model == "fisheye" else (4, 5, 8, 12, 14)  # those of OpenCV
    if len(coefficients) not in lengths:
        raise UserError(f"{where}: distortion has {len(coefficients)} numbers, not {lengths}.")
    camera.distortion = coefficients


def read_realsense(entry: dict, where) -> Camera:
    """What librealsense prints as a stream's intrinsics."""
    missing = [key for key in ("fx", "fy", "ppx", "ppy") if key not in entry]
    if missing:
        raise UserError(f"{where} has no '{missing[0]}', which RealSense's intrinsics have.")
    camera = Camera(str(where))
    camera.intrinsics = pinhole(entry["fx"], entry["fy"], entry["ppx"], entry["ppy"], str(where))
    if "width" in entry and "height" in entry:
        camera.size = (int(entry["height"]), int(entry["width"]))
    set_lens(camera, entry.get("model", "brown"), entry.get("coeffs", []), str(where))
    return camera


def is_ros(entry: dict) -> bool:
    return any(key in entry for key in ("camera_matrix", "K", "k"))


def read_ros(entry: dict, where) -> Camera:
    """ROS's camera_info, as camera_calibration writes it or as the topic is printed."""
    printed = {"K": "camera_matrix", "D": "distortion_coefficients"}
    printed |= {"width": "image_width", "height": "image_height"}
    for key, name in printed.items():
        for spelling in (key, key.lower()):
            if spelling in entry:
                entry = entry | {name: entry[spelling]}
    matrix = entry["camera_matrix"]
    if isinstance(matrix, dict):
        matrix = matrix.get("data")
    matrix = numbers(matrix, f"{where}: camera_matrix", 3, 3)
    camera = Camera(str(where))
    camera.intrinsics = pinhole(
        matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2], f"{where}: camera_matrix"
    )
    if "image_width" in entry and "image_height" in entry:
        camera.size = (int(entry["image_height"]), int(entry["image_width"]))
    if "roi" in entry:
        crop(camera, entry["roi"], f"{where}: roi")
    coefficients = entry.get("distortion_coefficients", [])
    if isinstance(coefficients, dict):
        coefficients = coefficients.get("data")
    set_lens(camera, entry.get("distortion_model", "plumb_bob"), coefficients, str(where))
    return camera


def crop(camera: Camera, roi: dict, where: str):
    """Only a part of the sensor is recorded, while size and intrinsics are of the whole one."""
    keys = ("x_offset", "y_offset", "width", "height")
    x, y, width, height = numbers([roi.get(key, 0) for key in keys], where, 4)
    if not any((x, y, width, height)):  # so ROS says: the whole picture
        return
    whole_height, whole_width = camera.size or (0, 0)
    inside = x + width <= whole_width and y + height <= whole_height
    if not inside or min(x, y) < 0 or min(width, height) < 1:
        raise UserError(
            f"{where} is no part of the picture of image_width and image_height: "
            "give those of the whole sensor."
        )
    camera.intrinsics[:2, 2] -= [x, y]
    camera.size = (int(height), int(width))


def read_kalibr(entry: dict, where, before: str | None) -> Camera:
    """A camera of Kalibr's camchain. Its pose is known once that of the camera before it is."""
    if entry["camera_model"] != "pinhole":
        raise UserError(f"{where}: camera_model is '{entry['camera_model']}', not pinhole: {HELP}.")
    fx, fy, cx, cy = numbers(entry.get("intrinsics"), f"{where}: intrinsics", 4)
    camera = Camera(str(where))
    camera.intrinsics = pinhole(fx, fy, cx, cy, f"{where}: intrinsics")
    if "resolution" in entry:
        width, height = numbers(entry["resolution"], f"{where}: resolution", 2)
        camera.size = (int(height), int(width))
    coefficients = entry.get("distortion_coeffs", [])
    set_lens(camera, entry.get("distortion_model", "radtan"), coefficients, str(where))
    if before and "T_cn_cnm1" in entry:  # this camera from the one before
        pose = numbers(entry["T_cn_cnm1"], f"{where}: T_cn_cnm1", 4, 4)
        camera.pose = inverse(pose, f"{where}: T_cn_cnm1")
        camera.frame = before
    return camera


def read_easy_handeye(content: dict, where) -> Camera:
    """The pose that easy_handeye and easy_handeye2 write: of the camera in the hand or base."""
    parameters = content.get("parameters", content)
    transform = content.get("transformation", content.get("transform"))
    if "translation" in transform:  # easy_handeye2
        position = [transform["translation"][axis] for axis in "xyz"]
        quaternion = [transform["rotation"][axis] for axis in "xyzw"]
    else:
        missing = [key for key in ("x", "y", "z", "qx", "qy", "qz", "qw") if key not in transform]
        if missing:
            raise UserError(f"{where}: transformation has no '{missing[0]}': {HELP}.")
        position = [transform[axis] for axis in "xyz"]
        quaternion = [transform[f"q{axis}"] for axis in "xyzw"]
    on_hand = parameters.get("eye_on_hand")
    if on_hand is None:
        on_hand = parameters.get("calibration_type") == "eye_in_hand"
    if str(on_hand).lower() not in ("true", "false"):
        raise UserError(f"{where}: eye_on_hand is '{on_hand}': write true or false.")
    on_hand = str(on_hand).lower() == "true"
    tracking = str(parameters.get("tracking_base_frame", "optical"))
    if "optical" not in tracking.lower():  # in ROS, a camera_link has x forward
        raise UserError(
            f"{where}: tracking_base_frame '{tracking}' is not the camera's optical frame, z "
            "forward: calibrate to that one (if it only has another name, write optical here)."
        )
    key = "robot_effector_frame" if on_hand else "robot_base_frame"
    name = str(parameters.get(key, "tool0" if on_hand else "base"))
    frame = frame_name(name, ros=True)
    if frame is None:
        raise UserError(f"{where}: {key} '{name}' is not a frame of the arm: {HELP}.")
    pose = pose_of(position, quaternion, f"{where}: transformation")
    return Camera(str(where), frame=frame, pose=pose)


def read_ours(entry: dict, where: str) -> Camera:
    """Intrinsics, and a pose by its name: world_from_camera, camera_from_flange, ..."""
    camera = Camera(where, named=True)
    unknown = [key for key in entry if key not in OUR_KEYS and "_from_" not in str(key)]
    if unknown:
        raise UserError(
            f"{where}: '{unknown[0]}' is not one of {', '.join(OUR_KEYS)}, nor a pose such as "
            f"world_from_camera: correct its name, or call it comment; {HELP}."
        )
    if "intrinsics" in entry:
        camera.intrinsics = np.array(numbers(entry["intrinsics"], f"{where}/intrinsics"))
        check_array(camera.intrinsics, (3, 3), np.float64, f"{where}/intrinsics")
    if "size" in entry:
        height, width = numbers(entry["size"], f"{where}/size", 2)
        camera.size = (int(height), int(width))
    if "distortion" in entry:
        set_lens(camera, entry.get("distortion_model", "brown"), entry["distortion"], where)
    poses = [key for key in entry if "_from_" in str(key)]
    if len(poses) > 1:
        raise UserError(f"{where} has both {poses[0]} and {poses[1]}: keep one.")
    for key in poses:
        left, right = key.split("_from_")
        name = left if right == "camera" else right
        camera.frame = frame_name(name)
        if "camera" not in (left, right) or camera.frame is None:
            raise UserError(f"{where}: '{key}' names no frame of the arm: {HELP}.")
        pose = numbers(entry[key], f"{where}/{key}")
        check_array(pose, (4, 4), np.float64, f"{where}/{key}")
        camera.pose = pose if right == "camera" else inverse(pose, f"{where}/{key}")
    return camera


# ------------------------------------------------------------------------------- matrices
def pose_of(position, quaternion, where: str) -> np.ndarray:
    """A pose (4, 4) from a position in metres and a quaternion x y z w."""
    position = numbers(position, where, 3)
    quaternion = numbers(quaternion, where, 4)
    length = np.linalg.norm(quaternion)
    if abs(length - 1) > 0.01:
        raise UserError(f"{where}: the quaternion's length is {length:.3f}, not 1: {HELP}.")
    x, y, z, w = quaternion / length
    pose = np.eye(4)
    pose[0, :3] = [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)]
    pose[1, :3] = [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)]
    pose[2, :3] = [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]
    pose[:3, 3] = position
    return pose


def inverse(pose: np.ndarray, where: str) -> np.ndarray:
    """The inverse of a pose (4, 4). Raises UserError unless it is a rotation and a translation."""
    check_array(pose, (4, 4), np.float64, where)
    return np.linalg.inv(pose)
