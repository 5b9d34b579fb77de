"""Find where a camera is: from pictures of a printed ChArUco board, and the arm's joint positions at each of them.

In:   pictures/<camera>/000.png, 001.png, ...   at least 8, better 30, taken with the arm at rest
      pictures/joints.csv                       a line for each: its number, the 7 joint positions in radians
      or an episode file                        the frames in which the arm rests are taken
Out:  calibration.yaml                          {camera: {intrinsics, world_from_camera or last_joint_from_camera}}, for
                                                render_spheres.py --calibration; the other cameras in it stay
      calibration_<camera>.png                  the base's axes, the joints' spheres and the board's corners over three pictures

    python calibrate.py --print-board board.pdf            print it at 100 %, glue it to something flat, measure a square
    python calibrate.py --images pictures --camera front   a camera in the room: the gripper holds the board
    python calibrate.py --images pictures --camera wrist   a camera on the arm: the board lies on the table

Between two pictures, turn the hand by 20 to 40 degrees about different axes, and fill the camera's view with the board.
The world is the robot's base; cameras have OpenCV's axes, and pixel centres at +0.5.
"""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tyro
import yaml
from mujoco import minimize
from PIL import Image
from tqdm import tqdm

from genima.calibration import load_calibration
from genima.episodes import read_episode
from genima.files import UserError, run_stage, write_whole
from genima.kinematics import franka_chain
from genima.spheres import alpha_composite, draw_spheres, target_spheres


@dataclass
class Settings:
    images: Path = Path("pictures")
    """Folder with <camera>/000.png, ... and joints.csv; or an episode file."""
    camera: str = "front"
    """Name of the camera to calibrate."""
    on_arm: bool | None = None
    """Whether the camera sits on the hand; by default only the one called wrist does."""
    calibration: Path = Path("calibration.yaml")
    """The file to write the camera into; cameras that it holds already are kept."""
    square: float = 0.030
    """Side of a square in metres: measure it on the printed board."""
    print_board: Path | None = None
    """Only write the board to this .pdf or .png file, at its true size."""


# The board: squares across and down, a marker's side as a part of a square's, the set of markers. Change them for one that you own.
SQUARES, MARKER, DICTIONARY = (5, 7), 22 / 30, cv2.aruco.DICT_5X5_50
VIEWS, CORNERS = 8, 8  # fewest pictures, and fewest corners in a picture
AT_REST, APART = 0.02, 0.05  # rad/s, rad: which frames of an episode serve as pictures
BENT_ERROR, LENS_ERROR, ARM_ERROR = (
    0.6,
    3.0,
    3.0,
)  # pixels, root mean square: more than this is not noise
SQUARE_ERROR = (
    0.01  # how far the squares' size may be from what fits the arm's motion, as a part of it
)
UNSURE = (
    0.010,
    np.radians(1),
)  # metres, radians: largest standard error of a camera's pose that is worth writing
PAPER, DOTS = (210, 297), 24  # A4 in mm, and dots per mm


def make_board(square):
    if not 0.002 < square < 0.2:
        raise UserError(f"--square {square} is no square's side in metres.")
    return cv2.aruco.CharucoBoard(
        SQUARES, square, MARKER * square, cv2.aruco.getPredefinedDictionary(DICTIONARY)
    )


def print_board(settings):
    """Write the board's picture at its true size, on a sheet of A4 where it fits, so that no printer need scale it."""
    board, path = make_board(settings.square), settings.print_board
    if path.suffix not in (".pdf", ".png"):
        raise UserError(f"{path} must end in .pdf or .png.")
    dots = round(settings.square * 1000 * DOTS)  # of a square
    printed = Image.fromarray(board.generateImage([n * dots for n in SQUARES]))
    sheet = Image.new(
        "L", [max(mm * DOTS, side + dots) for mm, side in zip(PAPER, printed.size)], 255
    )
    sheet.paste(printed, [(whole - part) // 2 for whole, part in zip(sheet.size, printed.size)])
    with write_whole(path) as temporary:
        sheet.save(
            temporary, dpi=(25.4 * DOTS,) * 2, resolution=25.4 * DOTS
        )  # as PNG and PDF call it
    print(
        f"{path}: print it at 100 %, without fitting it to the page; a square must measure {settings.square * 1000:g} mm."
    )


# ---------------------------------------------------------------------------------------------------------- pictures
def read_pictures(source, camera):
    """-> names [T], pictures [T] of (H, W, 3) uint8, joint_poses (T, J, 4, 4)."""
    if source.suffix == ".hdf5":
        episode = read_episode(source)
        if camera not in episode.images:
            raise UserError(f"{source} has no camera '{camera}', only {', '.join(episode.images)}.")
        kept = []
        for t, (q, speed) in enumerate(zip(episode.qpos[:, :-1], episode.qvel[:, :-1])):
            if np.abs(speed).max() < AT_REST and (
                not kept or np.abs(q - episode.qpos[kept[-1], :-1]).max() > APART
            ):
                kept.append(t)
        return (
            [f"{source}, frame {t}" for t in kept],
            episode.images[camera][kept],
            episode.joint_poses[kept].astype(np.float64),
        )

    table = source / "joints.csv"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of an empty file
            rows = np.loadtxt(
                table, delimiter=",", comments=("#", "picture"), encoding="utf-8-sig", ndmin=2
            )
        if len(
            wrong := rows
            if rows.shape[1] != 8
            else rows[~(np.abs(rows[:, 1:]) <= 2 * np.pi).all(axis=1)]
        ):
            raise ValueError(f"look at the line of picture {wrong[0, 0]:g}")
    except (OSError, ValueError, UserWarning) as error:
        raise UserError(
            f"{table} needs a line for each picture, its number and the 7 joint positions in radians: {error}."
        ) from None
    joints = {int(row[0]): row[1:] for row in rows}
    paths = sorted(path for path in (source / camera).glob("*.*") if path.stem.isdigit())
    pictures = []
    for path in paths:
        if int(path.stem) not in joints:
            raise UserError(
                f"{path} has no line in {table}: delete it, or add the joint positions at which it was taken."
            )
        try:
            pictures.append(np.array(Image.open(path).convert("RGB")))
        except OSError as error:
            raise UserError(f"{path} cannot be read as a picture ({error}): delete it.") from None
        if pictures[-1].shape != pictures[0].shape:
            raise UserError(
                f"{path} has another size than {paths[0]}: a calibration is of one size."
            )
    poses = franka_chain().forward_kinematics(
        np.array([joints[int(path.stem)] for path in paths]).reshape(-1, 7)
    )
    return list(map(str, paths)), pictures, poses


def find_corners(board, pictures, settings):
    """The board's corners in the pictures that show it well: {t: (numbers (N,), pixels (N, 2))}."""
    detector, found, mirrored = cv2.aruco.CharucoDetector(board), {}, 0
    for t, picture in enumerate(tqdm(pictures, desc="corners", unit="picture", leave=False)):
        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        pixels, numbers, *_ = detector.detectBoard(grey)
        if (
            numbers is not None
            and len(numbers) >= CORNERS
            and not board.checkCharucoCornersCollinear(numbers)
        ):
            found[t] = (
                numbers.ravel(),
                pixels.reshape(-1, 2) + 0.5,
            )  # OpenCV counts from pixel centres
        else:
            flipped = detector.detectBoard(grey[:, ::-1].copy())[1]
            mirrored += flipped is not None and len(flipped) >= CORNERS
    of_all = f"of {len(pictures)} pictures of {settings.camera}"
    if mirrored > len(found):
        raise UserError(
            f"{settings.images}: the board is mirrored in {mirrored} {of_all}: print it, and have the camera's driver show "
            "it, the right way round."
        )
    if len(found) < VIEWS:
        raise UserError(
            f"{settings.images}: {len(found)} {of_all} show the board of --print-board well, and {VIEWS} are needed, better "
            "30: take more, with the arm at rest, sharp, and with most of the board in view."
        )
    return found


# --------------------------------------------------------------------------------------------------------------- fit
@dataclass
class Fit:
    intrinsics: np.ndarray  # (3, 3)
    camera: np.ndarray  # (4, 4) world from camera; for a camera on the arm, last joint from camera
    board: np.ndarray  # (4, 4) last joint from board; for a camera on the arm, world from board
    lens_error: float  # pixels, root mean square: how far the corners are from where they would be, for the camera alone,
    arm_error: float  # and with the arm's positions
    unsure: tuple[float, float]  # standard errors of the camera's position (m) and rotation (rad)


def fit_camera(found, points, world_from_last, size, on_arm, square, names):
    """Find a camera from corners [T] of (numbers, pixels), points (M, 3) on the board, poses (T, 4, 4), size (H, W) -> Fit.

    carrier[t] @ camera @ camera_from_board[t] = board, for every picture t: for a camera on the arm the carrier is the last
    joint, in the world where the board lies. For a camera in the room it is the world, seen from the last joint.
    """
    carrier = world_from_last if on_arm else np.linalg.inv(world_from_last)  # (T, 4, 4)
    numbers, pixels = zip(*found)
    view, P, seen = (
        np.repeat(np.arange(len(found)), list(map(len, numbers))),
        points[np.concatenate(numbers)],
        np.concatenate(pixels),
    )

    # The camera alone. Spheres are drawn without lens distortion, so none is fitted, but looked for.
    planes = (
        [np.float32(points[n]) for n in numbers],
        [np.float32(p) for p in pixels],
        size[::-1],
        None,
        None,
    )
    bent = cv2.CALIB_ZERO_TANGENT_DIST | cv2.CALIB_FIX_K3
    lens_error, intrinsics, _, turns, shifts = cv2.calibrateCamera(
        *planes, flags=bent | cv2.CALIB_FIX_K1 | cv2.CALIB_FIX_K2
    )
    bent_error = cv2.calibrateCamera(*planes, flags=bent)[0]
    if lens_error > BENT_ERROR and lens_error > 1.3 * bent_error:
        raise UserError(
            f"The lens bends straight lines: the corners are {lens_error:.1f} pixels from where they would be without, and "
            f"{bent_error:.1f} with distortion: undistort the pictures, here and for the demonstrations."
        )
    if lens_error > LENS_ERROR:
        raise UserError(
            f"The corners are {lens_error:.1f} pixels from where any camera would see them: take sharp pictures of a flat "
            "board."
        )

    # With the arm: a first guess by Park and Martin's method (ten times less exact), then the least squares of all pixels.
    boards = np.array([pose_of(np.append(turn, shift)) for turn, shift in zip(turns, shifts)])
    rotation, position = cv2.calibrateHandEye(
        carrier[:, :3, :3],
        carrier[:, :3, 3],
        boards[:, :3, :3],
        boards[:, :3, 3],
        method=cv2.CALIB_HAND_EYE_PARK,
    )
    camera = pose_of(np.append(cv2.Rodrigues(rotation)[0], position))
    board = carrier[0] @ camera @ boards[0]

    def errors(x):
        """x: the camera's turn and shift (6), the board's (6), changes of fx, fy, cx, cy (4), of the squares' size (1) -> (2N,)."""
        to_camera = (
            np.linalg.inv(carrier @ camera @ pose_of(x[:6])) @ board @ pose_of(x[6:12])
        )  # (T, 4, 4)
        scaled = P * (1 + x[16:].sum())  # (N, 3)
        here = (to_camera[view, :3, :3] @ scaled[..., None])[..., 0] + to_camera[view, :3, 3]
        return (
            here[:, :2] / here[:, 2:] * (intrinsics[[0, 1], [0, 1]] + x[12:14])
            + intrinsics[:2, 2]
            + x[14:16]
            - seen
        ).ravel()

    x, error, deviation = least_squares(errors, np.zeros(17))
    # The arm's own errors are the same for all corners of a picture, so that these count less than as many independent ones.
    share = max(
        0,
        1
        - lens_error**2 / (2 * len(P) - 6 * len(found) - 4) / (rms(error) ** 2 / (2 * len(P) - 17)),
    )
    less = np.sqrt(1 + share * (len(P) / len(found) - 1))
    if rms(error) > ARM_ERROR:
        worst = max(range(len(found)), key=lambda t: rms(error.reshape(-1, 2)[view == t]))
        raise UserError(
            f"The camera alone fits to {lens_error:.2f} pixels, but with the arm's positions to {rms(error):.1f} (worst: "
            f"{names[worst]}): see that each picture has its own joint positions, that the hand turned about different "
            f"axes, that board and camera never slipped, and that the camera sits {'on the arm' if on_arm else 'in the room'} "
            f"(if not: --on-arm {not on_arm})."
        )
    if abs(x[16]) > max(SQUARE_ERROR, 4 * less * deviation[16]):
        raise UserError(
            f"The arm moved as if the squares were {1000 * square * (1 + x[16]):.1f} mm wide, not {1000 * square:.1f}: "
            "measure a square on the printed board and give --square in metres."
        )
    x, error, deviation = least_squares(errors, x[:16])
    unsure = less * np.linalg.norm(deviation[3:6]), less * np.linalg.norm(deviation[:3])
    if not (unsure[0] < UNSURE[0] and unsure[1] < UNSURE[1]):
        much = (
            f"uncertain by {1000 * unsure[0]:.0f} mm and {np.degrees(unsure[1]):.1f} degrees"
            if np.isfinite(unsure).all()
            else "undetermined"
        )
        raise UserError(
            f"The camera's pose is {much}: take more pictures, and turn the hand by 20 to 40 degrees about different axes between them."
        )
    intrinsics = intrinsics + [[x[12], 0, x[14]], [0, x[13], x[15]], [0, 0, 0]]
    return Fit(
        intrinsics,
        camera @ pose_of(x[:6]),
        board @ pose_of(x[6:12]),
        lens_error,
        rms(error),
        unsure,
    )


def pose_of(vector):
    """A rotation vector and a position (6,) as a matrix (4, 4)."""
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = cv2.Rodrigues(np.asarray(vector[:3], float))[0], vector[3:]
    return pose


def rms(errors):
    """Root mean square length of errors (..., x and y alternating)."""
    return float(np.sqrt(2 * np.mean(np.square(errors))))


def least_squares(errors, x):
    """Levenberg and Marquardt's method: the x (P,) of least sum of errors(x) (N,)² -> x, errors, standard errors of x (P,)."""
    many = lambda columns: np.stack([errors(column) for column in columns.T], axis=1)  # noqa: E731  (P, M) -> (N, M)
    x, trace = minimize.least_squares(
        x, many, x_scale="jac", verbose=3, output=io.StringIO()
    )  # 3: with the slopes, (N, P)
    error = trace[-1].residual.ravel()
    variance = (
        (np.linalg.inv(np.linalg.qr(trace[-1].jacobian, mode="r")) ** 2).sum(1)
        * (error @ error)
        / (len(error) - len(x))
    )
    return x, error, np.sqrt(variance)


# ------------------------------------------------------------------------------------------------------------ output
def draw_check(picture, fit, joint_poses, on_arm, camera, points):
    """A picture (H, W, 3) with the joints' spheres, the base's axes (20 cm; x red, y green, z blue) and the board's corners."""
    world_from_camera = joint_poses[-2] @ fit.camera if on_arm else fit.camera
    world_from_board = fit.board if on_arm else joint_poses[-2] @ fit.board
    layer = draw_spheres(
        *target_spheres(joint_poses, True, camera),
        fit.intrinsics,
        world_from_camera,
        *picture.shape[:2],
    )
    picture = np.ascontiguousarray(
        alpha_composite(layer, picture)[..., ::-1]
    )  # OpenCV draws in blue, green, red, from pixel centres
    intrinsics = fit.intrinsics - [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]

    def from_camera(pose):  # as rotation vector and position
        here = np.linalg.inv(world_from_camera) @ pose
        return cv2.Rodrigues(here[:3, :3])[0], here[:3, 3]

    cv2.drawFrameAxes(picture, intrinsics, None, *from_camera(np.eye(4)), 0.2, 2)
    corners = cv2.projectPoints(points, *from_camera(world_from_board), intrinsics, None)[0]
    cv2.aruco.drawDetectedCornersCharuco(
        picture, corners.astype(np.float32), cornerColor=(255, 0, 255)
    )
    return picture[..., ::-1]


def calibrate(settings):
    if settings.print_board:
        return print_board(settings)
    if not settings.images.exists():
        raise UserError(
            f"There is no {settings.images}: give --images, a folder of pictures or an episode file."
        )
    cameras = load_calibration(settings.calibration) if settings.calibration.exists() else {}
    on_arm = settings.camera == "wrist" if settings.on_arm is None else settings.on_arm
    board = make_board(settings.square)
    names, pictures, joint_poses = read_pictures(settings.images, settings.camera)
    found, points = (
        find_corners(board, pictures, settings),
        board.getChessboardCorners().astype(float),
    )  # (M, 3)
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

    cameras[settings.camera] = {
        "intrinsics": fit.intrinsics,
        "last_joint_from_camera" if on_arm else "world_from_camera": fit.camera,
    }
    plain = {
        name: {key: np.round(value, 9).tolist() for key, value in entry.items()}
        for name, entry in cameras.items()
    }
    with write_whole(settings.calibration) as temporary:
        temporary.write_text(
            yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=200)
        )
    sheet = [
        draw_check(pictures[t], fit, joint_poses[t], on_arm, settings.camera, points)
        for t in (used[0], used[len(used) // 2], used[-1])
    ]
    check = settings.calibration.with_name(f"{settings.calibration.stem}_{settings.camera}.png")
    with write_whole(check) as temporary:
        Image.fromarray(np.concatenate(sheet, axis=1)).save(temporary)
    print(
        f"{settings.camera}: reprojection error {fit.lens_error:.2f} pixels for the camera alone, {fit.arm_error:.2f} with the arm, "
        f"over {sum(len(numbers) for numbers, _ in found.values())} corners in {len(used)} of {len(pictures)} pictures; "
        f"pose certain to {1000 * fit.unsure[0]:.2f} mm and {np.degrees(fit.unsure[1]):.3f} degrees (standard errors)."
    )
    print(
        f"It is in {settings.calibration}; look at {check}: the spheres must sit on the joints, the marks on the board's corners."
    )


def main():
    calibrate(tyro.cli(Settings, description=__doc__))


if __name__ == "__main__":
    run_stage(main)
