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

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import tyro
import yaml
from mujoco import minimize
from PIL import Image
from tqdm import tqdm

from episodes import UserError, read_episode, run_stage, write_whole
from render_spheres import draw_spheres, load_calibration, over, target_spheres
from robot_io import franka_chain


@dataclass
class Settings:
    images: Path | None = None
    """Folder with <camera>/000.png, ... and joints.csv; or an episode file."""
    camera: str = "front"
    """Name of the camera to calibrate."""
    on_arm: bool | None = None
    """Whether the camera sits on the hand; by default only the one called wrist does."""
    calibration: Path = Path("calibration.yaml")
    """The file to write the camera into; cameras that it holds already are kept."""
    squares: tuple[int, int] = (5, 7)
    """How many squares the board has across and down."""
    square: float = 0.030
    """Side of a square in metres: measure it on the printed board."""
    marker: float = 0.022
    """Side of a marker in metres."""
    dictionary: Literal["4X4_50", "4X4_100", "4X4_250", "5X5_50", "5X5_100", "5X5_250", "6X6_250"] = "5X5_50"
    """Which of OpenCV's sets of markers the board has."""
    print_board: Path | None = None
    """Only write the board to this .pdf or .png file, at its true size."""


VIEWS, CORNERS = 8, 8  # fewest pictures, and fewest corners in a picture
AT_REST, APART = 0.02, 0.05  # rad/s, rad: which frames of an episode serve as pictures
BENT_ERROR, LENS_ERROR, ARM_ERROR = 0.6, 3.0, 3.0  # pixels, root mean square: more than this is not noise
SQUARE_ERROR = 0.01  # how far the squares' size may be from what fits the arm's motion, as a part of it
TURN = np.radians(5)  # least turning of the hand about a second axis, root mean square
UNSURE = (0.010, np.radians(1))  # metres, radians: largest standard error of a camera's pose that is worth writing
PAPER, DOTS = (210, 297), 24  # A4 in mm, and dots per mm


def make_board(settings):
    if min(settings.squares) < 3 or not 0 < settings.marker < settings.square:
        raise UserError("The board needs at least 3 x 3 --squares, and a --marker that is smaller than the --square.")
    dictionary = cv2.aruco.getPredefinedDictionary(getattr(cv2.aruco, f"DICT_{settings.dictionary}"))
    across, down = settings.squares
    if across * down // 2 > len(dictionary.bytesList):
        raise UserError(f"A board of {across} x {down} squares needs {across * down // 2} markers, more than --dictionary has.")
    return cv2.aruco.CharucoBoard(settings.squares, settings.square, settings.marker, dictionary)


def print_board(settings):
    """Write the board's picture at its true size, on a sheet of A4 where it fits, so that no printer need scale it."""
    board, path = make_board(settings), settings.print_board
    if path.suffix not in (".pdf", ".png"):
        raise UserError(f"{path} must end in .pdf or .png.")
    dots = round(settings.square * 1000 * DOTS)  # of a square
    width, height = (n * dots for n in settings.squares)
    fits = width <= (PAPER[0] - 10) * DOTS and height <= (PAPER[1] - 10) * DOTS
    sheet = Image.new("L", tuple(round(mm * DOTS) for mm in PAPER) if fits else (width + dots, height + dots), 255)
    picture = Image.fromarray(board.generateImage((width, height)))
    sheet.paste(picture, ((sheet.width - width) // 2, (sheet.height - height) // 2))
    with write_whole(path) as temporary:
        sheet.save(temporary, dpi=(25.4 * DOTS,) * 2, **({"resolution": 25.4 * DOTS} if path.suffix == ".pdf" else {}))
    print(f"{path}: print it at 100 %, without fitting it to the page; a square must measure {settings.square * 1000:g} mm.")


# ---------------------------------------------------------------------------------------------------------- pictures
def read_pictures(settings):
    """-> names [T], pictures [T] of (H, W, 3) uint8, joint_poses (T, J, 4, 4)."""
    source = settings.images
    if source.suffix == ".hdf5":
        episode = read_episode(source)
        if settings.camera not in episode.images:
            raise UserError(f"{source} has no camera '{settings.camera}', only {', '.join(episode.images)}.")
        kept = []
        for t, (q, speed) in enumerate(zip(episode.qpos[:, :-1], episode.qvel[:, :-1])):
            if np.abs(speed).max() < AT_REST and (not kept or np.abs(q - episode.qpos[kept[-1], :-1]).max() > APART):
                kept.append(t)
        pictures = list(episode.images[settings.camera][kept])
        return [f"{source}, frame {t}" for t in kept], pictures, episode.joint_poses[kept].astype(np.float64)

    table = source / "joints.csv"
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row and not row[0].startswith(("#", "picture"))]
        joints = {int(row[0]): np.array(row[1:], float) for row in rows}
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"There is no {table}: it has a line for each picture, its number and the 7 joint positions in radians.") from None
    except ValueError as error:
        raise UserError(f"{table}: {error}: a line is a picture's number and the 7 joint positions in radians.") from None
    for number, q in joints.items():
        if q.shape != (7,) or not np.isfinite(q).all() or np.abs(q).max() > 2 * np.pi:
            raise UserError(f"{table}: the line of picture {number} must hold 7 joint positions in radians.")
    paths = sorted(path for path in (source / settings.camera).glob("*.*") if path.stem.isdigit())
    pictures = []
    for path in paths:
        if int(path.stem) not in joints:
            raise UserError(f"{path} has no line in {table}: delete it, or add the joint positions at which it was taken.")
        try:
            pictures.append(np.array(Image.open(path).convert("RGB")))
        except OSError as error:
            raise UserError(f"{path} cannot be read as a picture ({error}): delete it.") from None
    poses = franka_chain().joint_poses(np.array([joints[int(path.stem)] for path in paths]).reshape(-1, 7))
    return [str(path) for path in paths], pictures, poses


def find_corners(board, pictures, settings):
    """The board's corners in each picture: [T] of (numbers (N,), pixels (N, 2)); too few are none."""
    detector, markers, mirrored, found = cv2.aruco.CharucoDetector(board), 0, 0, []
    for picture in tqdm(pictures, desc="corners", unit="picture", leave=False):
        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        pixels, numbers, _, seen = detector.detectBoard(grey)
        if numbers is None or len(numbers) < CORNERS or board.checkCharucoCornersCollinear(numbers):
            numbers = pixels = np.empty(0)
            flipped = detector.detectBoard(grey[:, ::-1].copy())[1]
            mirrored += flipped is not None and len(flipped) >= CORNERS
        markers += seen is not None
        found.append((numbers.ravel().astype(int), pixels.reshape(-1, 2).astype(float) + 0.5))  # OpenCV counts from pixel centres
    used, of_all = sum(len(numbers) > 0 for numbers, _ in found), f"of {len(pictures)} pictures of {settings.camera}"
    if mirrored > used:
        raise UserError(f"{settings.images}: the board is mirrored in {mirrored} {of_all}: print it, and have the camera's driver show "
                        "it, the right way round.")
    if used < VIEWS:
        what = f"{settings.squares[0]} x {settings.squares[1]} --squares" if markers else f"markers of --dictionary {settings.dictionary}"
        raise UserError(f"{settings.images}: {used} {of_all} show the board well, and {VIEWS} are needed, better 30: take more, sharp and "
                        f"with most of the board in view, and see that it has {what}.")
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
    views = [t for t, (numbers, _) in enumerate(found) if len(numbers)]
    carrier = world_from_last[views] if on_arm else np.linalg.inv(world_from_last[views])  # (T, 4, 4)
    on_board, pixels = [points[found[t][0]] for t in views], [found[t][1] for t in views]
    view, P, seen = np.repeat(np.arange(len(views)), list(map(len, pixels))), np.concatenate(on_board), np.concatenate(pixels)

    # The camera alone. Spheres are drawn without lens distortion, so none is fitted, but looked for.
    planes = [np.asarray(p, np.float32) for p in on_board], [np.asarray(p, np.float32) for p in pixels], size[::-1], None, None
    bent = cv2.CALIB_ZERO_TANGENT_DIST | cv2.CALIB_FIX_K3
    lens_error, intrinsics, _, turns, shifts = cv2.calibrateCamera(*planes, flags=bent | cv2.CALIB_FIX_K1 | cv2.CALIB_FIX_K2)
    bent_error = cv2.calibrateCamera(*planes, flags=bent)[0]
    if lens_error > BENT_ERROR and lens_error > 1.3 * bent_error:
        raise UserError(f"The lens bends straight lines: the corners are {lens_error:.1f} pixels from where they would be without, and "
                        f"{bent_error:.1f} with distortion: undistort the pictures, here and for the demonstrations.")
    if lens_error > LENS_ERROR:
        raise UserError(f"The corners are {lens_error:.1f} pixels from where any camera would see them: take sharp pictures of a flat "
                        "board, and give its true --squares.")

    turns_of_hand = [cv2.Rodrigues(carrier[0, :3, :3].T @ pose[:3, :3])[0].ravel() for pose in carrier]  # rotation vectors
    second = np.linalg.svd(turns_of_hand, compute_uv=False)[1] / np.sqrt(len(views))
    if second < TURN:
        raise UserError(f"The hand turned about one axis only, by {np.degrees(second):.1f} degrees about any second one: turn it by 20 "
                        "to 40 degrees about different axes between pictures.")

    # With the arm: a first guess by Park and Martin's method, then the least squares of all pixels.
    boards = [pose_of(np.append(turn, shift)) for turn, shift in zip(turns, shifts)]
    rotation, position = cv2.calibrateHandEye(carrier[:, :3, :3], carrier[:, :3, 3], [pose[:3, :3] for pose in boards],
                                              [pose[:3, 3] for pose in boards], method=cv2.CALIB_HAND_EYE_PARK)
    camera = pose_of(np.append(cv2.Rodrigues(rotation)[0], position))
    board = carrier[0] @ camera @ boards[0]

    def errors(x):
        """x: the camera's turn and shift (6), the board's (6), changes of fx, fy, cx, cy (4), of the squares' size (1) -> (2N,)."""
        to_camera = np.linalg.inv(carrier @ camera @ pose_of(x[:6])) @ board @ pose_of(x[6:12])  # (T, 4, 4)
        scaled = P * (1 + (x[16] if len(x) > 16 else 0))  # (N, 3)
        here = (to_camera[view, :3, :3] @ scaled[..., None])[..., 0] + to_camera[view, :3, 3]
        return (here[:, :2] / here[:, 2:] * (intrinsics[[0, 1], [0, 1]] + x[12:14]) + intrinsics[:2, 2] + x[14:16] - seen).ravel()

    x, error, deviation = least_squares(errors, np.zeros(17))
    # The arm's own errors are the same for all corners of a picture, so that these count less than as many independent ones.
    share = max(0, 1 - lens_error**2 / (2 * len(P) - 6 * len(views) - 4) / (rms(error)**2 / (2 * len(P) - 17)))
    less = np.sqrt(1 + share * (len(P) / len(views) - 1))
    if rms(error) > ARM_ERROR:
        worst = views[np.argmax([rms(error.reshape(-1, 2)[view == i]) for i in range(len(views))])]
        raise UserError(f"The camera alone fits to {lens_error:.2f} pixels, but with the arm's positions to {rms(error):.1f} (worst: "
                        f"{names[worst]}): see that each picture has its own joint positions, that board and camera never slipped, and "
                        f"that the camera sits {'on the arm' if on_arm else 'in the room'} (if not: --on-arm {not on_arm}).")
    if abs(x[16]) > max(SQUARE_ERROR, 4 * less * deviation[16]):
        raise UserError(f"The arm moved as if the squares were {1000 * square * (1 + x[16]):.1f} mm wide, not {1000 * square:.1f}: "
                        "measure a square on the printed board and give --square (and --marker) in metres.")
    x, error, deviation = least_squares(errors, x[:16])
    unsure = less * np.linalg.norm(deviation[3:6]), less * np.linalg.norm(deviation[:3])
    if not (unsure[0] < UNSURE[0] and unsure[1] < UNSURE[1]):
        raise UserError(f"The camera's pose is uncertain by {1000 * unsure[0]:.0f} mm and {np.degrees(unsure[1]):.1f} degrees: take more "
                        "pictures, and turn the hand by 20 to 40 degrees about different axes between them.")
    intrinsics = intrinsics + [[x[12], 0, x[14]], [0, x[13], x[15]], [0, 0, 0]]
    return Fit(intrinsics, camera @ pose_of(x[:6]), board @ pose_of(x[6:12]), lens_error, rms(error), unsure)


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
    slopes = lambda x: np.stack([(errors(x + step) - errors(x)) / 1e-6 for step in 1e-6 * np.eye(len(x))], axis=1)  # noqa: E731  (N, P)
    unit = 1 / (np.linalg.norm(slopes(x), axis=0) + 1e-6)  # so that pixels and radians compare
    many = lambda columns: np.stack([errors(unit * column) for column in columns.T], axis=1)  # noqa: E731  (P, M) -> (N, M)
    x = unit * minimize.least_squares(x / unit, many, verbose=0)[0].ravel()
    error, scaled = errors(x), slopes(x) * unit
    values, vectors = np.linalg.eigh(scaled.T @ scaled)
    variance = (vectors**2 / np.maximum(values, 1e-15)).sum(1) * unit**2 * (error @ error) / (len(error) - len(x))
    return x, error, np.sqrt(variance)


# ------------------------------------------------------------------------------------------------------------ output
def draw_check(picture, fit, joint_poses, on_arm, camera, points):
    """A picture (H, W, 3) with the joints' spheres, the base's axes (20 cm; x red, y green, z blue) and the board's corners."""
    world_from_camera = joint_poses[-2] @ fit.camera if on_arm else fit.camera
    world_from_board = fit.board if on_arm else joint_poses[-2] @ fit.board
    layer = draw_spheres(*target_spheres(joint_poses, True, camera), fit.intrinsics, world_from_camera, *picture.shape[:2])
    picture = np.ascontiguousarray(over(layer, picture))

    def dots(world, colour, radius):
        here = (world - world_from_camera[:3, 3]) @ world_from_camera[:3, :3]  # (N, 3)
        here = here[here[:, 2] > 0.01]
        for x, y in here[:, :2] / here[:, 2:] * fit.intrinsics[[0, 1], [0, 1]] + fit.intrinsics[:2, 2]:
            if abs(x) < 1e4 and abs(y) < 1e4:
                cv2.circle(picture, (round(16 * (x - 0.5)), round(16 * (y - 0.5))), round(16 * radius), colour, -1, cv2.LINE_AA, 4)

    for axis, colour in zip(np.eye(3), ((255, 0, 0), (0, 200, 0), (0, 80, 255))):
        dots(np.linspace(0, 0.2, 400)[:, None] * axis, colour, 1.5)
    dots(points @ world_from_board[:3, :3].T + world_from_board[:3, 3], (255, 0, 255), 2)
    return picture


def write_calibration(path, camera, entries):
    """Write the camera's entries into the file of cameras, whole; the other cameras in it stay."""
    cameras = load_calibration(path) if path.exists() else {}
    cameras[camera] = entries
    plain = {name: {key: np.asarray(value).round(9).tolist() for key, value in values.items()} for name, values in cameras.items()}
    with write_whole(path) as temporary:
        temporary.write_text(yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=200))


def calibrate(settings):
    if settings.print_board:
        return print_board(settings)
    if settings.images is None or not settings.images.exists():
        raise UserError(f"There is no {settings.images}: give --images, a folder or an episode file." if settings.images
                        else "Give --images, a folder of pictures or an episode file, or --print-board.")
    if settings.calibration.exists():
        load_calibration(settings.calibration)  # a broken file is noticed before the work
    on_arm = settings.camera == "wrist" if settings.on_arm is None else settings.on_arm
    board = make_board(settings)
    names, pictures, joint_poses = read_pictures(settings)
    if len(pictures) < VIEWS:
        raise UserError(f"{settings.images} has {len(pictures)} pictures of {settings.camera} with the arm at rest, and {VIEWS} are "
                        "needed, better 30.")
    if len({picture.shape for picture in pictures}) > 1:
        raise UserError(f"{settings.images}: the pictures of {settings.camera} are of different sizes: a calibration is of one size.")
    found = find_corners(board, pictures, settings)
    points = board.getChessboardCorners().astype(float)  # (M, 3)
    fit = fit_camera(found, points, joint_poses[:, -2], pictures[0].shape[:2], on_arm, settings.square, names)

    pose = "last_joint_from_camera" if on_arm else "world_from_camera"
    write_calibration(settings.calibration, settings.camera, {"intrinsics": fit.intrinsics, pose: fit.camera})
    used = [t for t, (numbers, _) in enumerate(found) if len(numbers)]
    sheet = [draw_check(pictures[t], fit, joint_poses[t], on_arm, settings.camera, points)
             for t in (used[0], used[len(used) // 2], used[-1])]
    check = settings.calibration.with_name(f"{settings.calibration.stem}_{settings.camera}.png")
    with write_whole(check) as temporary:
        Image.fromarray(np.concatenate(sheet, axis=1)).save(temporary)
    print(f"{settings.camera}: reprojection error {fit.lens_error:.2f} pixels for the camera alone, {fit.arm_error:.2f} with the arm, "
          f"over {sum(len(numbers) for numbers, _ in found)} corners in {len(used)} of {len(pictures)} pictures; "
          f"pose certain to {1000 * fit.unsure[0]:.2f} mm and {np.degrees(fit.unsure[1]):.3f} degrees (standard errors).")
    print(f"It is in {settings.calibration}; look at {check}: the spheres must sit on the joints, the dots on the board's corners.")


def main():
    calibrate(tyro.cli(Settings, description=__doc__))


if __name__ == "__main__":
    run_stage(main)
