"""Find where a camera is: from pictures of the printed board, and the arm's joint positions.

In:   pictures/<camera>/000.png, 001.png, ...   at least 8, better 30, taken with the arm at rest
      pictures/joints.csv                       per picture its number and all joint positions, rad
      or an episode file                        the frames in which the arm rests are taken
Out:  calibration.yaml                          {camera: {intrinsics, and world_from_camera or
                                                last_joint_from_camera}}; other cameras stay
      calibration_<camera>.png                  the base's axes, the joints' spheres and the
                                                board's corners over three pictures

    python real_robot.py calibrate --print-board board.pdf    print it at 100 %, glue it to
                                                              something flat, measure a square
    python real_robot.py calibrate --camera front             a camera in the room: the gripper
                                                              holds the board
    python real_robot.py calibrate --camera wrist             a camera on the arm: the board lies
                                                              on the table
    python real_robot.py calibrate --arm ur5e                 another arm than a Franka

Between two pictures, turn the hand by 20 to 40 degrees about different axes, and fill the camera's
view with the board. The world is the robot's base; cameras have OpenCV's axes (x right, y down,
z forward) and pixel centres at +0.5.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import yaml
from PIL import Image

from genima.calibration import load_calibration
from genima.files import UserError, write_whole
from genima.robots import sphere_joints
from genima.spheres import SphereStyle, alpha_composite, draw_spheres, target_spheres
from robot.board import find_corners, make_board, print_board, read_pictures
from robot.least_squares import least_squares

# Root mean square errors in pixels; more than this is not noise.
DISTORTION_ERROR = 0.6  # for a lens without distortion
LENS_ERROR = 3.0  # for the camera alone
ARM_ERROR = 3.0  # with the arm's positions
SQUARE_ERROR = 0.01  # how far the squares' size may be from what fits, as a part of it
MAX_UNCERTAINTY = (0.010, np.radians(1))  # m, rad: standard errors of a pose worth writing


@dataclass
class CameraFit:
    intrinsics: np.ndarray  # (3, 3)
    camera: np.ndarray  # (4, 4) world from camera; on the arm: last joint from camera
    board: np.ndarray  # (4, 4) last joint from board; for a camera on the arm: world from board
    lens_error: float  # pixels, root mean square reprojection error of the camera alone
    arm_error: float  # the same with the arm's positions
    uncertainty: tuple[float, float]  # standard errors of the camera's position (m), rotation (rad)


def calibrate(settings):
    """The command: read the pictures, fit the camera, write it and a picture to check it."""
    if settings.print_board:
        print_board(settings.print_board, settings.square)
        return
    camera = settings.camera
    if not settings.images.exists():
        raise UserError(
            f"There is no {settings.images}: give --images, a folder of pictures "
            "or an episode file."
        )
    cameras = {}
    if settings.calibration.exists():
        cameras = load_calibration(settings.calibration, settings.arm)
    on_arm = settings.on_arm
    if on_arm is None:
        on_arm = camera == "wrist"
    points = make_board(settings.square).getChessboardCorners().astype(float)  # (M, 3)
    names, pictures, joint_poses = read_pictures(settings.images, camera, settings.arm)
    found = find_corners(pictures, settings.square, settings.images, camera)
    used = list(found)
    fit = fit_camera(
        [found[t] for t in used],
        points,
        joint_poses[used, -2],
        pictures[0].shape[:2],
        on_arm,
        settings.square,
        [names[t] for t in used],
    )

    pose_name = "last_joint_from_camera" if on_arm else "world_from_camera"
    cameras[camera] = {"intrinsics": fit.intrinsics, pose_name: fit.camera}
    write_calibration(settings.calibration, cameras)
    style = SphereStyle(sphere_joints(settings.arm))
    panels = []
    for t in (used[0], used[len(used) // 2], used[-1]):
        panels.append(draw_check(pictures[t], fit, joint_poses[t], on_arm, camera, points, style))
    check = settings.calibration.with_name(f"{settings.calibration.stem}_{camera}.png")
    with write_whole(check) as temporary:
        Image.fromarray(np.concatenate(panels, axis=1)).save(temporary)
    corners = sum(len(numbers) for numbers, _ in found.values())
    position, rotation = fit.uncertainty
    print(
        f"{camera}: reprojection error {fit.lens_error:.2f} pixels for the camera alone, "
        f"{fit.arm_error:.2f} with the arm, over {corners} corners in {len(used)} of "
        f"{len(pictures)} pictures; pose certain to {1000 * position:.2f} mm and "
        f"{np.degrees(rotation):.3f} degrees (standard errors)."
    )
    print(
        f"It is in {settings.calibration}; look at {check}: the spheres must sit on the joints, "
        "the marks on the board's corners."
    )


def write_calibration(path: Path, cameras: dict):
    plain = {}
    for name, entry in cameras.items():
        plain[name] = {}
        for key, value in entry.items():
            if isinstance(value, np.ndarray):
                value = np.round(value, 9).tolist()
            plain[name][key] = value  # the model of a lens is a word
    with write_whole(path) as temporary:
        temporary.write_text(
            yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=200)
        )


# -------------------------------------------------------------------------------------------- fit
def fit_camera(found, points, world_from_last, size, on_arm, square, names) -> CameraFit:
    """Find a camera from the board's corners.

    found: [T] of (numbers (N,), pixels (N, 2)); points: (M, 3) on the board, m;
    world_from_last: (T, 4, 4); size: (H, W); square: m; names: [T] of the pictures.

        carrier[t] @ camera @ camera_from_board[t] = board          for every picture t

    For a camera on the arm the carrier is the last joint in the world, where the board lies.
    For a camera in the room it is the world, seen from the last joint, which holds the board.
    """
    lens_error, intrinsics, boards = fit_lens(found, points, size)
    carrier = world_from_last if on_arm else np.linalg.inv(world_from_last)  # (T, 4, 4)

    # A first guess by Park and Martin's method, ten times less exact than the least squares.
    rotation, position = cv2.calibrateHandEye(
        carrier[:, :3, :3],
        carrier[:, :3, 3],
        boards[:, :3, :3],
        boards[:, :3, 3],
        method=cv2.CALIB_HAND_EYE_PARK,
    )
    if not np.isfinite(np.append(rotation, position)).all():  # the hand never turned
        check_uncertainty(np.inf, np.inf)
    camera = pose_from_vector(np.append(cv2.Rodrigues(rotation)[0], position))
    board = carrier[0] @ camera @ boards[0]

    lengths = [len(numbers) for numbers, _ in found]
    view = np.repeat(np.arange(len(found)), lengths)  # (N,) the picture of each corner
    corners = points[np.concatenate([numbers for numbers, _ in found])]  # (N, 3)
    seen = np.concatenate([pixels for _, pixels in found])  # (N, 2)

    def errors(x):
        """Pixel errors (2N,) of changes x: of the camera's pose (6), the board's (6),
        fx, fy (2), cx, cy (2), and of the squares' size (1)."""
        carrier_from_camera = camera @ pose_from_vector(x[:6])
        carrier_from_board = board @ pose_from_vector(x[6:12])
        camera_from_board = np.linalg.inv(carrier @ carrier_from_camera) @ carrier_from_board
        scaled = corners * (1 + x[16:].sum())  # (N, 3)
        rotations = camera_from_board[view, :3, :3]  # (N, 3, 3)
        here = (rotations @ scaled[..., None])[..., 0] + camera_from_board[view, :3, 3]
        focal = intrinsics[[0, 1], [0, 1]] + x[12:14]
        centre = intrinsics[:2, 2] + x[14:16]
        return (here[:, :2] / here[:, 2:] * focal + centre - seen).ravel()

    x, error, deviation = least_squares(errors, np.zeros(17))
    if rms(error) > ARM_ERROR:
        each = [rms(error.reshape(-1, 2)[view == t]) for t in range(len(found))]
        place = "on the arm" if on_arm else "in the room"
        raise UserError(
            f"The camera alone fits to {lens_error:.2f} pixels, but with the arm's positions to "
            f"{rms(error):.1f} (worst: {names[int(np.argmax(each))]}): see that each picture has "
            "its own joint positions, that the hand turned about different axes, that board and "
            f"camera never slipped, and that the camera sits {place} (if not: "
            f"--on-arm {not on_arm})."
        )
    # The arm's own error is the same for all corners of a picture, so that these count for less
    # than as many independent ones.
    n = len(seen)
    lens_variance = lens_error**2 / (2 * n - 6 * len(found) - 4)
    correlated = max(0, 1 - lens_variance / (rms(error) ** 2 / (2 * n - 17)))
    inflation = np.sqrt(1 + correlated * (n / len(found) - 1))
    if abs(x[16]) > max(SQUARE_ERROR, 4 * inflation * deviation[16]):
        raise UserError(
            f"The arm moved as if the squares were {1000 * square * (1 + x[16]):.1f} mm wide, not "
            f"{1000 * square:.1f}: measure a square on the printed board and give --square in "
            "metres."
        )
    x, error, deviation = least_squares(errors, x[:16])  # with the squares' size as given
    position = inflation * np.linalg.norm(deviation[3:6])
    rotation = inflation * np.linalg.norm(deviation[:3])
    check_uncertainty(position, rotation)
    change = [[x[12], 0, x[14]], [0, x[13], x[15]], [0, 0, 0]]
    return CameraFit(
        intrinsics=intrinsics + change,
        camera=camera @ pose_from_vector(x[:6]),
        board=board @ pose_from_vector(x[6:12]),
        lens_error=lens_error,
        arm_error=rms(error),
        uncertainty=(position, rotation),
    )


def fit_lens(found, points, size):
    """The camera alone -> its error (pixels), intrinsics (3, 3), camera from board (T, 4, 4).

    Spheres are drawn without lens distortion, so none is fitted; too much of it is refused.
    """
    objects = [np.float32(points[numbers]) for numbers, _ in found]
    pixels = [np.float32(seen) for _, seen in found]
    radial = cv2.CALIB_ZERO_TANGENT_DIST | cv2.CALIB_FIX_K3
    straight = radial | cv2.CALIB_FIX_K1 | cv2.CALIB_FIX_K2
    error, intrinsics, _, rotations, positions = cv2.calibrateCamera(
        objects, pixels, size[::-1], None, None, flags=straight
    )
    radial_error = cv2.calibrateCamera(objects, pixels, size[::-1], None, None, flags=radial)[0]
    if error > DISTORTION_ERROR and error > 1.3 * radial_error:
        raise UserError(
            f"The lens bends straight lines: the corners are {error:.1f} pixels from where they "
            f"would be without, and {radial_error:.1f} with distortion: undistort the pictures, "
            "here and for the demonstrations."
        )
    if error > LENS_ERROR:
        raise UserError(
            f"The corners are {error:.1f} pixels from where any camera would see them: "
            "take sharp pictures of a flat board."
        )
    boards = []
    for rotation, position in zip(rotations, positions):
        boards.append(pose_from_vector(np.append(rotation, position)))
    return error, intrinsics, np.array(boards)


def check_uncertainty(position: float, rotation: float):
    """Refuse a camera's pose whose standard errors (m, rad) are too large."""
    if position < MAX_UNCERTAINTY[0] and rotation < MAX_UNCERTAINTY[1]:
        return
    amount = "undetermined"
    if np.isfinite([position, rotation]).all():
        amount = f"uncertain by {1000 * position:.0f} mm and {np.degrees(rotation):.1f} degrees"
    raise UserError(
        f"The camera's pose is {amount}: take more pictures, and turn the hand by 20 to 40 "
        "degrees about different axes between them."
    )


def pose_from_vector(vector) -> np.ndarray:
    """A rotation vector and a position (6,) as a matrix (4, 4)."""
    pose = np.eye(4)
    pose[:3, :3] = cv2.Rodrigues(np.asarray(vector[:3], float))[0]
    pose[:3, 3] = vector[3:]
    return pose


def rms(errors: np.ndarray) -> float:
    """Root mean square length of errors (..., x and y alternating)."""
    return float(np.sqrt(2 * np.mean(np.square(errors))))


# ----------------------------------------------------------------------------------------- output
def draw_check(picture, fit, joint_poses, on_arm, camera, points, style) -> np.ndarray:
    """A picture (H, W, 3) with the joints' spheres, the base's axes (20 cm; x red, y green,
    z blue) and the board's corners."""
    world_from_camera = fit.camera
    world_from_board = joint_poses[-2] @ fit.board
    if on_arm:
        world_from_camera = joint_poses[-2] @ fit.camera
        world_from_board = fit.board
    spheres = target_spheres(joint_poses, True, camera, style)
    layer = draw_spheres(*spheres, fit.intrinsics, world_from_camera, *picture.shape[:2])
    # OpenCV draws in blue, green, red, and its pixel centres are whole numbers.
    picture = np.ascontiguousarray(alpha_composite(layer, picture)[..., ::-1])
    intrinsics = fit.intrinsics - [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]

    def vectors(pose):
        """A pose in the world as the camera sees it: rotation vector and position."""
        here = np.linalg.inv(world_from_camera) @ pose
        return cv2.Rodrigues(here[:3, :3])[0], here[:3, 3]

    cv2.drawFrameAxes(picture, intrinsics, None, *vectors(np.eye(4)), 0.2, 2)
    corners = cv2.projectPoints(points, *vectors(world_from_board), intrinsics, None)[0]
    corners = corners.astype(np.float32)
    cv2.aruco.drawDetectedCornersCharuco(picture, corners, cornerColor=(255, 0, 255))
    return picture[..., ::-1]
