"""The printed ChArUco board: its picture to print, and its corners in the pictures of a camera."""

import warnings
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from genima.episodes import read_episode
from genima.files import UserError, write_whole
from genima.robots import robot_chain

# The board: change these three for one that you own.
SQUARES = (5, 7)  # across and down
MARKER = 22 / 30  # a marker's side as a part of a square's
DICTIONARY = cv2.aruco.DICT_5X5_50

MIN_PICTURES = 8
MIN_CORNERS = 8  # in a picture
AT_REST = 0.02  # rad/s: an episode's frames that are slower serve as pictures ...
APART = 0.05  # rad: ... if a joint has moved by this much since the last one
PAPER = (210, 297)  # A4 in mm
DOTS = 24  # per mm


def make_board(square: float, legacy: bool = False):
    """The board with squares of this side, m. legacy: as OpenCV before 4.6 printed it."""
    if not 0.002 < square < 0.2:
        raise UserError(f"--square {square} is no square's side in metres.")
    dictionary = cv2.aruco.getPredefinedDictionary(DICTIONARY)
    board = cv2.aruco.CharucoBoard(SQUARES, square, MARKER * square, dictionary)
    board.setLegacyPattern(legacy)
    return board


def print_board(path: Path, square: float):
    """Write the board at its true size, on a sheet of A4 where it fits: no printer scales it."""
    board = make_board(square)
    if path.suffix not in (".pdf", ".png"):
        raise UserError(f"{path} must end in .pdf or .png.")
    dots = round(square * 1000 * DOTS)  # of a square
    printed = Image.fromarray(board.generateImage([n * dots for n in SQUARES]))
    width = max(PAPER[0] * DOTS, printed.width + dots)
    height = max(PAPER[1] * DOTS, printed.height + dots)
    sheet = Image.new("L", (width, height), "white")
    sheet.paste(printed, ((width - printed.width) // 2, (height - printed.height) // 2))
    per_inch = 25.4 * DOTS
    with write_whole(path) as temporary:
        # PNG and PDF call the same number by two names.
        sheet.save(temporary, dpi=(per_inch, per_inch), resolution=per_inch)
    print(
        f"{path}: print it at 100 %, without fitting it to the page; "
        f"a square must measure {square * 1000:g} mm."
    )


# --------------------------------------------------------------------------------------- pictures
def read_pictures(
    source: Path, camera: str, arm: str = "fr3"
) -> tuple[list[str], list, np.ndarray]:
    """Names [T], pictures [T] of (H, W, 3) uint8, joint poses (T, J, 4, 4)."""
    if source.suffix == ".hdf5":
        return read_resting_frames(source, camera)
    table = source / "joints.csv"
    chain = robot_chain(arm)
    count = len(chain.links)
    joints = read_joints(table, count)
    paths = sorted(path for path in (source / camera).glob("*.*") if path.stem.isdigit())
    pictures = []
    for path in paths:
        if int(path.stem) not in joints:
            raise UserError(
                f"{path} has no line in {table}: move it away, "
                "or add the joint positions at which it was taken."
            )
        try:
            pictures.append(np.array(Image.open(path).convert("RGB")))
        except OSError as error:
            raise UserError(
                f"{path} cannot be read as a picture ({error}): move it away."
            ) from None
        if pictures[-1].shape != pictures[0].shape:
            raise UserError(
                f"{path} has another size than {paths[0]}: a calibration is of one size."
            )
    qpos = np.array([joints[int(path.stem)] for path in paths]).reshape(-1, count)
    return [str(path) for path in paths], pictures, chain.forward_kinematics(qpos)


def read_resting_frames(path: Path, camera: str):
    """As `read_pictures`: the frames of an episode in which the arm rests."""
    episode = read_episode(path)
    if camera not in episode.images:
        raise UserError(f"{path} has no camera '{camera}', only {', '.join(episode.images)}.")
    kept = []
    for t in range(len(episode.qpos)):
        if np.abs(episode.qvel[t, :-1]).max() >= AT_REST:
            continue
        if kept:
            moved = np.abs(episode.qpos[t, :-1] - episode.qpos[kept[-1], :-1]).max()
            if moved <= APART:
                continue
        kept.append(t)
    names = [f"{path}, frame {t}" for t in kept]
    return names, episode.images[camera][kept], episode.joint_poses[kept].astype(np.float64)


def read_joints(table: Path, count: int) -> dict[int, np.ndarray]:
    """{number of the picture: joint positions (count,)} of joints.csv."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an empty file is a warning of NumPy's
            rows = np.loadtxt(
                table, delimiter=",", comments=("#", "picture"), encoding="utf-8-sig", ndmin=2
            )
        wrong = rows
        if rows.shape[1] == 1 + count:
            in_radians = (np.abs(rows[:, 1:]) <= 2 * np.pi).all(axis=1)  # false for NaN
            wrong = rows[~in_radians]
        if len(wrong):
            raise ValueError(f"see the line of picture {wrong[0, 0]:g}")
    except (OSError, ValueError, UserWarning) as error:
        raise UserError(
            f"{table} needs a line for each picture, its number and the {count} joint positions "
            f"in radians: {error}."
        ) from None
    return {int(row[0]): row[1:] for row in rows}


# ---------------------------------------------------------------------------------------- corners
def detect_corners(board, pictures) -> tuple[dict, int]:
    """{t: (numbers (N,), pixels (N, 2))} of the pictures that show the board; mirrored ones."""
    detector = cv2.aruco.CharucoDetector(board)
    found = {}
    mirrored = 0
    for t, picture in enumerate(tqdm(pictures, desc="corners", unit="picture", leave=False)):
        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        pixels, numbers, *_ = detector.detectBoard(grey)
        if enough(numbers) and not board.checkCharucoCornersCollinear(numbers):
            # OpenCV's pixel centres are whole numbers, here they are at +0.5.
            found[t] = numbers.ravel(), pixels.reshape(-1, 2) + 0.5
        elif enough(detector.detectBoard(grey[:, ::-1].copy())[1]):
            mirrored += 1
    return found, mirrored


def enough(numbers) -> bool:
    return numbers is not None and len(numbers) >= MIN_CORNERS


def find_corners(pictures, square: float, source: Path, camera: str) -> dict:
    """The board's corners in the pictures that show it well: {t: (numbers (N,), pixels (N, 2))}.

    Raises UserError for too few pictures.
    """
    found, mirrored = detect_corners(make_board(square), pictures)
    if len(found) < MIN_PICTURES and SQUARES[1] % 2 == 0:
        # Before version 4.6 OpenCV began a board of even rows with a white square.
        legacy, legacy_mirrored = detect_corners(make_board(square, legacy=True), pictures)
        if len(legacy) + legacy_mirrored > len(found) + mirrored:
            found = legacy
            mirrored = legacy_mirrored
            print("The board has the legacy pattern of OpenCV before 4.6; it is used as it is.")
    total = f"{len(pictures)} pictures of {camera}"
    if mirrored > len(found):
        raise UserError(
            f"{source}: the board is mirrored in {mirrored} of {total}: print it, "
            "and have the camera's driver show it, the right way round."
        )
    if len(found) < MIN_PICTURES:
        raise UserError(
            f"{source}: {len(found)} of {total} show the board of --print-board well, "
            f"and {MIN_PICTURES} are needed, better 30: take more, with the arm at rest, sharp, "
            "and with most of the board in view."
        )
    return found
