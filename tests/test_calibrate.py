"""real_robot.py calibrate: cameras are found where they are, files are kept, and what a person can
get wrong is one sentence."""

import csv
import os
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
import yaml
from conftest import ROOT, look_at, make_episode
from PIL import Image
from test_episodes import stage

import real_robot
from genima.calibration import load_calibration
from genima.episodes import write_episode
from genima.files import UserError
from genima.kinematics import franka_chain
from robot import board as printed_board
from robot.board import find_corners, make_board
from robot.calibrate import fit_camera, pose_from_vector, write_calibration

INTRINSICS = np.array([[615.0, 0, 322], [0, 613, 237], [0, 0, 1]])
SIZE = (480, 640)
REST = np.array([0.0, -0.3, 0.0, -2.2, 0.0, 1.9, 0.7853])
CHAIN = franka_chain()
POINTS = make_board(0.03).getChessboardCorners().astype(float)  # (M, 3)


def scene(random, on_arm, views=20):
    """Random arm positions in which the whole board is in view.

    -> q (T, 7), world_from_last (T, 4, 4), camera, board, to_camera.

    camera and board as in `fit_camera`; to_camera (T, 4, 4) is camera from board.
    """
    middle = POINTS.mean(0)
    rest = CHAIN.forward_kinematics(REST)[-2]
    if on_arm:  # beside the hand, looking along it; the board lies on the table
        camera = look_at((0.08, 0.02, 0.03), (0.03, 0, 0.6)) @ pose_from_vector(
            random.normal(0, 0.1, 6) * [1, 1, 1, 0.1, 0.1, 0.1]
        )
        board = pose_from_vector(
            np.append([np.pi, 0, 0], rest[:3, 3] * [1, 1, 0])
        )  # its z axis points down
        board = board @ pose_from_vector(np.append(random.normal(0, 0.1, 3), -middle))
    else:  # in front of the arm; the gripper holds the board towards it
        camera = look_at(random.normal((1.1, 0, 0.6), 0.05), rest[:3, 3]) @ pose_from_vector(
            [*random.normal(0, 0.1, 3), 0, 0, 0]
        )
        board = (
            np.linalg.inv(rest)
            @ camera
            @ pose_from_vector(np.append(random.normal(0, 0.1, 3), [0, 0, 0.45]))
        )
        board = board @ pose_from_vector(np.append([0, 0, 0], -middle))
    kept = []
    while len(kept) < views:
        q = REST + random.uniform(-0.5, 0.5, 7)
        last = CHAIN.forward_kinematics(q)[-2]
        to_camera = (
            np.linalg.inv(last @ camera) @ board if on_arm else np.linalg.inv(camera) @ last @ board
        )
        here = np.c_[POINTS, np.ones(len(POINTS))] @ to_camera[:3].T
        pixels = project(to_camera, POINTS)
        facing = -to_camera[:3, 2] @ to_camera[:3, 3] / np.linalg.norm(to_camera[:3, 3])
        if (
            here[:, 2].min() > 0.15
            and facing < -0.6
            and pixels.min() > 25
            and (pixels < np.array(SIZE[::-1]) - 25).all()
        ):
            kept.append((q, last, to_camera))
    q, last, to_camera = map(np.array, zip(*kept))
    return q, last, camera, board, to_camera


def project(to_camera, points):
    here = points @ to_camera[:3, :3].T + to_camera[:3, 3]
    return here[:, :2] / here[:, 2:] * INTRINSICS[[0, 1], [0, 1]] + INTRINSICS[:2, 2]


def apart(pose, other):
    """Metres and degrees between two poses."""
    difference = np.linalg.inv(pose) @ other
    return np.linalg.norm(difference[:3, 3]), np.degrees(
        np.linalg.norm(cv2.Rodrigues(difference[:3, :3])[0])
    )


def test_the_arm_is_the_data_sheets():
    """Franka's published Denavit-Hartenberg parameters (Craig's convention)."""
    q, pose, right = np.random.default_rng(0).uniform(-1, 1, 7), np.eye(4), np.pi / 2
    parameters = [  # a, alpha, d of each joint
        (0, 0, 0.333),
        (0, -right, 0),
        (0, right, 0.316),
        (0.0825, right, 0),
        (-0.0825, -right, 0.384),
        (0, right, 0),
        (0.088, right, 0),
    ]
    for i, (a, alpha, d) in enumerate(parameters):
        pose = (
            pose
            @ pose_from_vector([alpha, 0, 0, a, 0, 0])
            @ pose_from_vector([0, 0, q[i], 0, 0, d])
        )
        np.testing.assert_allclose(CHAIN.forward_kinematics(q)[i], pose, atol=1e-5)
    np.testing.assert_allclose(
        CHAIN.forward_kinematics(q)[7, :3, 3], (pose @ [0, 0, 0.107 + 0.1034, 1])[:3], atol=1e-5
    )


@pytest.mark.parametrize("on_arm", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_within_a_millimetre_with_noise_of_a_third_of_a_pixel(on_arm, seed):
    random = np.random.default_rng(seed)
    _, last, camera, board, to_camera = scene(random, on_arm)
    found = [
        (np.arange(len(POINTS)), project(pose, POINTS) + random.normal(0, 0.3, (len(POINTS), 2)))
        for pose in to_camera
    ]
    fit = fit_camera(found, POINTS, last, SIZE, on_arm, 0.03, list(range(20)))
    metres, degrees = apart(camera, fit.camera)
    assert metres < 1e-3 and degrees < 0.2
    assert (
        0.35 < fit.lens_error < 0.45 and 0.35 < fit.arm_error < 0.45
    )  # 0.3 in x and in y, less what the fit takes up
    assert metres < 4 * fit.uncertainty[0] < 4e-3 and np.radians(degrees) < 4 * fit.uncertainty[1]


def photograph(random, to_camera, noise=3, legacy=False):
    """A picture (480, 640, 3) of the board on a table, slightly blurred and noisy."""
    across, down = printed_board.SQUARES
    dots = 60  # of a square
    printed = make_board(0.03, legacy).generateImage((across * dots, down * dots))
    printed = cv2.copyMakeBorder(
        printed, dots // 2, dots // 2, dots // 2, dots // 2, cv2.BORDER_CONSTANT, value=255
    )
    metres = np.diag([0.03 / dots, 0.03 / dots, 1]) @ [
        [1, 0, 0.5 - dots // 2],
        [0, 1, 0.5 - dots // 2],
        [0, 0, 1],
    ]  # from dots
    plane = INTRINSICS @ to_camera[:3, [0, 1, 3]] @ metres
    fine = (
        np.array([[3, 0, -0.5], [0, 3, -0.5], [0, 0, 1]]) @ plane
    )  # OpenCV's pixel centres are whole numbers
    picture = cv2.warpPerspective(
        printed, fine, (3 * SIZE[1], 3 * SIZE[0]), flags=cv2.INTER_AREA, borderValue=110
    )
    picture = cv2.GaussianBlur(
        cv2.resize(picture, SIZE[::-1], interpolation=cv2.INTER_AREA), (0, 0), 0.6
    )
    picture = np.clip(
        picture[..., None] * [0.9, 0.85, 0.8] + 10 + random.normal(0, noise, (*SIZE, 3)), 0, 255
    )
    return picture.astype(np.uint8)


@pytest.fixture(scope="module")
def taken():
    """camera: q (T, 7), camera, pictures [T], to_camera (T, 4, 4)."""
    random, cameras = np.random.default_rng(0), {}
    for name in ("front", "wrist"):
        q, _, camera, _, to_camera = scene(random, name == "wrist")
        cameras[name] = q, camera, [photograph(random, pose) for pose in to_camera], to_camera
    return cameras


def lay_out(folder, taken, mend=lambda picture: picture, count=20):
    """The folder of pictures that the calibration reads; the wrist's are numbered from 100."""
    lines = [["picture", *(f"q{i}" for i in range(1, 8))]]
    for name, first in (("front", 0), ("wrist", 100)):
        (folder / name).mkdir(parents=True)
        q, _, pictures, _ = taken[name]
        for i in range(count):
            Image.fromarray(mend(pictures[i])).save(
                folder / name / f"{first + i:03d}.png", compress_level=1
            )
            lines.append([f"{first + i:03d}", *q[i]])
    with open(folder / "joints.csv", "w", newline="") as file:
        csv.writer(file).writerows(lines)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, taken):
    return lay_out(tmp_path_factory.mktemp("pictures") / "pictures", taken)


def test_corners_are_found_where_they_are(taken):
    _, _, pictures, to_camera = taken["front"]
    found = find_corners(pictures, 0.03, "pictures", "front")
    off = np.concatenate(
        [pixels - project(to_camera[t], POINTS)[numbers] for t, (numbers, pixels) in found.items()]
    )
    assert len(off) > 0.8 * len(POINTS) * len(pictures)
    assert np.abs(off.mean(0)).max() < 0.03 and off.std() < 0.3  # and not half a pixel beside


def test_both_cameras_from_pictures(taken, pictures, tmp_path, monkeypatch, capsys):
    path = tmp_path / "cams.yaml"
    other = {"intrinsics": np.diag([9.0, 9, 1]).tolist(), "world_from_camera": np.eye(4).tolist()}
    path.write_text(yaml.dump({"overhead": other, "front": other}))
    for camera, pose in (("front", "world_from_camera"), ("wrist", "last_joint_from_camera")):
        code, out, _ = stage(
            monkeypatch,
            capsys,
            real_robot.main,
            "calibrate",
            "--images",
            pictures,
            "--camera",
            camera,
            "--calibration",
            path,
        )
        metres, degrees = apart(taken[camera][1], load_calibration(path, "fr3")[camera][pose])
        assert code == 0 and metres < 1e-3 and degrees < 0.2
        error = float(re.search(r"([0-9.]+) with the arm", out)[1])
        assert 0.02 < error < 0.3 and "20 of 20 pictures" in out
        drawn = np.array(Image.open(tmp_path / f"cams_{camera}.png"))
        assert drawn.shape == (480, 3 * 640, 3)
        photo = taken[camera][2][0]
        dots = (np.abs(drawn[:, :640].astype(int) - (255, 0, 255)).max(-1) < 60) & (
            np.abs(photo.astype(int) - (255, 0, 255)).max(-1) > 60
        )
        assert dots.sum() > 200  # the corners of the board
    assert list(load_calibration(path, "fr3")) == ["front", "overhead", "wrist"]
    np.testing.assert_array_equal(
        load_calibration(path, "fr3")["overhead"]["world_from_camera"], np.eye(4)
    )


def test_frames_of_an_episode_at_rest(taken, tmp_path, monkeypatch, capsys):
    q, camera, pictures, _ = taken["wrist"]
    episode, *_ = make_episode(frames=40, size=SIZE)
    episode.qpos = np.hstack([np.repeat(q, 2, 0), np.ones((40, 1))]).astype(
        np.float32
    )  # each posture twice, first in motion
    episode.qvel = np.where(np.arange(40)[:, None] % 2, 0, 0.5) * np.ones((1, 8), np.float32)
    episode.joint_poses = CHAIN.forward_kinematics(episode.qpos[:, :7]).astype(np.float32)
    blurred = [cv2.GaussianBlur(picture, (0, 0), 2) for picture in pictures]
    episode.images = {
        "wrist": np.stack([picture for pair in zip(blurred, pictures) for picture in pair])
    }
    episode.intrinsics, episode.extrinsics = (
        {"wrist": np.diag([99.0, 99, 1])},
        {"wrist": np.repeat(np.eye(4)[None], 40, 0)},
    )
    episode.action = episode.qpos
    write_episode(tmp_path / "000.hdf5", episode)
    options = ("--images", tmp_path / "000.hdf5", "--camera", "wrist")
    options += ("--calibration", tmp_path / "cams.yaml")
    code, out, _ = stage(monkeypatch, capsys, real_robot.main, "calibrate", *options)
    metres, degrees = apart(
        camera, load_calibration(tmp_path / "cams.yaml", "fr3")["wrist"]["last_joint_from_camera"]
    )
    assert code == 0 and "20 of 20" in out and metres < 1e-3 and degrees < 0.2


def refused(folder, monkeypatch, capsys, *arguments, camera="front"):
    """The calibration has to fail in one sentence and to write nothing. Returns the sentence."""
    path = folder.parent / "unwritten.yaml"
    options = ("--images", folder, "--camera", camera, "--calibration", path, *arguments)
    code, out, sentence = stage(monkeypatch, capsys, real_robot.main, "calibrate", *options)
    assert (
        code == 2
        and out == ""
        and sentence.endswith(".")
        and sentence.count("\n") == 0
        and not path.exists()
    )
    return sentence


@pytest.mark.parametrize("camera", ["front", "wrist"])
def test_a_wrong_size_of_the_squares(pictures, monkeypatch, capsys, camera):
    sentence = refused(pictures, monkeypatch, capsys, "--square", 0.028, camera=camera)
    assert "30.0 mm" in sentence and "not 28.0" in sentence and "--square" in sentence
    assert "30.0 mm" in refused(pictures, monkeypatch, capsys, "--square", 0.032, camera=camera)


def test_too_few_pictures(taken, pictures, tmp_path, monkeypatch, capsys):
    assert "4 pictures of front" in refused(
        lay_out(tmp_path / "few", taken, count=4), monkeypatch, capsys
    )
    assert "0 pictures of overhead" in refused(pictures, monkeypatch, capsys, camera="overhead")
    hidden = lay_out(tmp_path / "hidden", taken, count=12)
    for i in range(5):
        Image.new("RGB", SIZE[::-1]).save(hidden / f"front/{i:03d}.png")
    assert "7 of 12 pictures of front" in refused(hidden, monkeypatch, capsys)


def test_mirrored_boards_and_other_boards(taken, pictures, tmp_path, monkeypatch, capsys):
    mirrored = lay_out(
        tmp_path / "mirrored", taken, mend=lambda picture: picture[:, ::-1], count=10
    )
    assert "mirrored in 10 of 10 pictures of front" in refused(mirrored, monkeypatch, capsys)
    assert "no square's side" in refused(
        pictures, monkeypatch, capsys, "--square", 30
    )  # millimetres
    for name, other in (("DICTIONARY", cv2.aruco.DICT_4X4_50), ("SQUARES", (6, 7))):
        with monkeypatch.context() as patch:
            patch.setattr(printed_board, name, other)
            assert "0 of 20 pictures of front show the board" in refused(pictures, patch, capsys)


def test_boards_printed_by_an_older_opencv(monkeypatch, capsys):
    """Before version 4.6, a board with an even number of rows began with a white square."""
    monkeypatch.setattr(printed_board, "SQUARES", (5, 6))
    points = make_board(0.03).getChessboardCorners().astype(float)
    random = np.random.default_rng(0)
    to_camera = scene(random, False, views=8)[-1]
    pictures = [photograph(random, pose, legacy=True) for pose in to_camera]
    found = find_corners(pictures, 0.03, "pictures", "front")
    assert len(found) == 8 and "legacy pattern" in capsys.readouterr().out
    for t, (numbers, pixels) in found.items():
        assert np.abs(pixels - project(to_camera[t], points)[numbers]).max() < 1.5
    pictures = [photograph(random, pose) for pose in to_camera]
    assert len(find_corners(pictures, 0.03, "pictures", "front")) == 8
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("mujoco", ["wrong MUJOCO_GL", "absent"])
@pytest.mark.parametrize("command", [["--help"], ["calibrate", "--print-board", "board.png"]])
def test_calibration_needs_no_mujoco(mujoco, command, tmp_path):
    environment = os.environ | {"MUJOCO_GL": "cgl"}
    if mujoco == "absent":
        (tmp_path / "mujoco.py").write_text("raise ImportError('no MuJoCo here')")
        environment["PYTHONPATH"] = str(tmp_path)
    result = subprocess.run(
        [sys.executable, ROOT / "real_robot.py", *command],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_a_real_robot_needs_no_mujoco(tmp_path):
    """It gets as far as the connection, and says so."""
    (tmp_path / "mujoco.py").write_text("raise ImportError('no MuJoCo here')")
    text = (
        "import real_robot, robot.board, robot.calibrate\n"
        "from robot.arm import Franka; from robot.safety import Safety\n"
        "Franka('127.0.0.99', Safety())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", text],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "MUJOCO_GL": "cgl"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "UserError: No connection to the robot at 127.0.0.99" in result.stderr


def test_hands_that_did_not_turn_and_joints_of_other_pictures():
    random = np.random.default_rng(0)
    for on_arm in (False, True):
        _, last, camera, board, to_camera = scene(random, on_arm)
        found = [(np.arange(len(POINTS)), project(pose, POINTS)) for pose in to_camera]
        names = [f"picture {i}" for i in range(20)]
        swapped = last[[0, 1, 2, 4, 3, *range(5, 20)]]
        with pytest.raises(UserError, match="worst: picture [34]"):
            fit_camera(found, POINTS, swapped, SIZE, on_arm, 0.03, names)
        with pytest.raises(UserError, match="joint positions"):
            fit_camera(found, POINTS, last, SIZE, not on_arm, 0.03, names)
        turned = last[0] @ np.array(
            [pose_from_vector([0, 0, angle, 0, 0, 0]) for angle in np.linspace(-0.5, 0.5, 20)]
        )
        seen = (
            np.linalg.inv(turned @ camera) @ board
            if on_arm
            else np.linalg.inv(camera) @ turned @ board
        )
        about_one_axis = [
            (
                np.arange(len(POINTS)),
                project(pose, POINTS) + random.normal(0, 0.3, (len(POINTS), 2)),
            )
            for pose in seen
        ]
        with pytest.raises(UserError, match="different axes"):
            fit_camera(about_one_axis, POINTS, turned, SIZE, on_arm, 0.03, names)


def test_a_lens_that_bends_lines():
    random = np.random.default_rng(0)
    _, last, _, _, to_camera = scene(random, False)
    bent = [project(pose, POINTS) for pose in to_camera]
    for pixels in bent:
        away = (pixels - INTRINSICS[:2, 2]) / 615
        pixels += (
            615
            * away
            * (-0.4 * (away**2).sum(1, keepdims=True) + 0.5 * (away**2).sum(1, keepdims=True) ** 2)
        )
    with pytest.raises(UserError, match="distortion"):
        fit_camera(
            [(np.arange(len(POINTS)), pixels) for pixels in bent],
            POINTS,
            last,
            SIZE,
            False,
            0.03,
            list(range(20)),
        )


@pytest.mark.parametrize(
    "text, word",
    [
        (None, "joints.csv"),
        ("", "joints.csv"),
        ("1,0,0,0,0,0,0,0\n", "no line in"),
        ("0,1,2\n", "picture 0"),
        ("0,a,b,c,d,e,f,g\n", "joints.csv"),
        ("0,nan,0,0,0,0,0,0\n", "picture 0"),
        ("0,0,-17,0,-126,0,108,45\n", "radians"),
        ("0,0,0,0,0,0,0,0\n", "000.png cannot be read"),
    ],
)
def test_bad_folders(tmp_path, monkeypatch, capsys, text, word):
    (tmp_path / "pictures/front").mkdir(parents=True)
    (tmp_path / "pictures/front/000.png").write_bytes(b"no picture")
    if text is not None:
        (tmp_path / "pictures/joints.csv").write_text(text)
    assert word in refused(tmp_path / "pictures", monkeypatch, capsys)


def test_a_broken_calibration_file_stays(pictures, tmp_path, monkeypatch, capsys):
    (tmp_path / "cams.yaml").write_text("front: {")
    code, _, sentence = stage(
        monkeypatch,
        capsys,
        real_robot.main,
        "calibrate",
        "--images",
        pictures,
        "--calibration",
        tmp_path / "cams.yaml",
    )
    assert (
        code == 2 and "cams.yaml" in sentence and (tmp_path / "cams.yaml").read_text() == "front: {"
    )
    assert "nowhere" in refused(tmp_path / "nowhere", monkeypatch, capsys)


def test_the_printed_board_has_its_true_size(tmp_path, monkeypatch, capsys):
    for name in ("board.png", "board.pdf"):
        assert (
            stage(
                monkeypatch, capsys, real_robot.main, "calibrate", "--print-board", tmp_path / name
            )[0]
            == 0
        )
    sheet = Image.open(tmp_path / "board.png")
    assert np.allclose(sheet.info["dpi"], 609.6, atol=0.1)
    grey = np.array(sheet.convert("L"))
    ink = np.argwhere(grey < 128)
    assert np.allclose((np.ptp(ink, axis=0) + 1) / 24, (210, 150), atol=0.05)  # mm
    pixels, numbers, *_ = cv2.aruco.CharucoDetector(make_board(0.03)).detectBoard(
        cv2.resize(grey, None, fx=0.2, fy=0.2)
    )
    assert len(numbers) == 24
    page = re.search(
        rb"/MediaBox \[ ?0 0 ([0-9.]+) ([0-9.]+)", (tmp_path / "board.pdf").read_bytes()
    )
    assert np.allclose(
        [float(page[1]) / 72 * 25.4, float(page[2]) / 72 * 25.4], (210, 297), atol=0.1
    )
    assert (
        stage(
            monkeypatch,
            capsys,
            real_robot.main,
            "calibrate",
            "--print-board",
            tmp_path / "board.doc",
        )[0]
        == 2
    )


@pytest.mark.parametrize("model", ["inverse_brown_conrady", "fisheye", "plumb_bob"])
def test_a_camera_with_a_lens_stays_in_the_file(tmp_path, model):
    """Another camera is calibrated into a file: the model of this one's lens is a word."""
    path = tmp_path / "calibration.yaml"
    entry = {"intrinsics": INTRINSICS.tolist(), "world_from_camera": np.eye(4).tolist()}
    entry |= {"distortion": [0.1, -0.2, 0.0, 0.01], "distortion_model": model}
    path.write_text(yaml.safe_dump({"front": entry}))
    before = load_calibration(path, "fr3")
    side = {"intrinsics": INTRINSICS, "world_from_camera": np.eye(4)}
    write_calibration(path, before | {"side": side})
    after = load_calibration(path, "fr3")
    assert list(after) == ["front", "side"]
    for key, value in before["front"].items():
        np.testing.assert_array_equal(after["front"][key], value)
