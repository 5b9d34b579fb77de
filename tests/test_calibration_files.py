"""genima/calibration.py: five programs' files say the same, and what cannot be is refused."""

import json

import cv2
import numpy as np
import pytest
import yaml
from conftest import look_at, random_pose
from make_recordings import HAND_EYE, ROS

from genima.calibration import check_view, load_calibration, read_calibration, share_in_view
from genima.files import UserError
from genima.kinematics import franka_chain, rotate_z
from genima.lens import fit_size, undistort, undistortion
from genima.robots import robot_chain, robot_frames

MATRIX = [[607.0, 0, 320.5], [0, 606.0, 240.5], [0, 0, 1]]  # pixel centres at +0.5
COEFFICIENTS = [0.1, -0.2, 0.001, -0.002, 0.0]
POSE = np.array([[0.0, -1, 0, 0.05], [1, 0, 0, 0.01], [0, 0, 1, 0.1], [0, 0, 0, 1]])
REALSENSE = {
    "width": 640,
    "height": 480,
    "fx": 607.0,
    "fy": 606.0,
    "ppx": 320.0,
    "ppy": 240.0,
    "model": "brown_conrady",
    "coeffs": COEFFICIENTS,
}
PRINTED = {
    "width": 640,
    "height": 480,
    "distortion_model": "plumb_bob",
    "d": COEFFICIENTS,
    "k": [607.0, 0.0, 320.0, 0.0, 606.0, 240.0, 0.0, 0.0, 1.0],
}
KALIBR = {
    "camera_model": "pinhole",
    "intrinsics": [607.0, 606.0, 320.0, 240.0],
    "distortion_model": "radtan",
    "distortion_coeffs": COEFFICIENTS[:4],
    "resolution": [640, 480],
}


def write(path, content):
    path.write_text(
        content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    )
    return str(path)


def pose_file(path, camera="wrist", **poses):
    return write(path, {camera: {name: np.asarray(pose).tolist() for name, pose in poses.items()}})


@pytest.mark.parametrize(
    "content",
    [
        REALSENSE,
        {"wrist": REALSENSE},
        ROS,
        PRINTED,
        {"cam0": KALIBR},
        {"wrist": {"intrinsics": MATRIX, "size": [480, 640], "distortion": COEFFICIENTS}},
    ],
)
def test_all_programs_say_the_same_lens(tmp_path, content):
    lens = write(tmp_path / "lens.yaml", content)
    pose = pose_file(tmp_path / "pose.yaml", last_joint_from_camera=POSE)
    cameras, _ = read_calibration([lens, pose], ["wrist"], "panda")
    camera = cameras["wrist"]
    np.testing.assert_allclose(camera.intrinsics, MATRIX)
    assert camera.size == (480, 640)
    np.testing.assert_allclose(camera.distortion[:4], COEFFICIENTS[:4])
    assert camera.model == "brown"
    assert camera.frame == "last_joint"
    np.testing.assert_allclose(camera.pose, POSE)


def test_json_may_have_tabs(tmp_path):
    entry = {"intrinsics": MATRIX, "world_from_camera": POSE.tolist(), "serial": "0123"}
    path = tmp_path / "cams.json"
    path.write_text(json.dumps({"front": entry}, indent="\t"))
    cameras = load_calibration(path, "panda")
    assert list(cameras["front"]) == ["intrinsics", "world_from_camera"]
    np.testing.assert_array_equal(cameras["front"]["world_from_camera"], POSE)


@pytest.mark.parametrize("robot", ["panda", "ur5e"])
@pytest.mark.parametrize("frame", ["base", "flange", "hand", "link7", "last_joint", "tool"])
def test_frames_and_directions_by_name(tmp_path, robot, frame):
    random = np.random.default_rng(0)
    pose = random_pose(random)
    forth = pose_file(tmp_path / "a.yaml", intrinsics=MATRIX, **{f"{frame}_from_camera": pose})
    back = pose_file(
        tmp_path / "b.yaml", intrinsics=MATRIX, **{f"camera_from_{frame}": np.linalg.inv(pose)}
    )
    carried = "base" if frame == "base" else "last_joint"
    frames = robot_frames(robot)
    expected = pose if frame == "base" else frames.get(frame, np.eye(4)) @ pose
    for path in (forth, back):
        camera = read_calibration([path], ["wrist"], robot)[0]["wrist"]
        assert camera.frame == carried
        np.testing.assert_allclose(camera.pose, expected, atol=1e-9)


def test_the_named_frames_are_where_frankas_data_sheet_says():
    frames = robot_frames("panda")
    np.testing.assert_allclose(frames["flange"][:3, 3], [0, 0, 0.107])
    np.testing.assert_allclose(frames["hand"][:3, :3], rotate_z(np.array(-np.pi / 4))[:3, :3])
    np.testing.assert_allclose(frames["tool"], franka_chain().tool)


def test_easy_handeye(tmp_path):
    lens = write(tmp_path / "wrist.json", json.dumps(REALSENSE))
    half_turn = {"x": 1.0, "y": 0.2, "z": 0.5, "qx": 1.0, "qy": 0.0, "qz": 0.0, "qw": 0.0}
    in_room = {"parameters": {"eye_on_hand": False, "robot_base_frame": "panda_link0"}}
    new = {
        "parameters": {"calibration_type": "eye_on_base", "robot_base_frame": "fr3_link0"},
        "transform": {
            "translation": {"x": 1.0, "y": 0.2, "z": 0.5},
            "rotation": {"x": 1.0, "y": 0.0, "z": 0.0, "w": 0.0},
        },
    }
    for content in (in_room | {"transformation": half_turn}, new):
        pose = write(tmp_path / "pose.yaml", content)
        camera = read_calibration([lens, pose], ["wrist"], "panda")[0]["wrist"]
        expected = np.diag([1.0, -1, -1, 1])
        expected[:3, 3] = [1, 0.2, 0.5]
        assert camera.frame == "base"
        np.testing.assert_allclose(camera.pose, expected)
    on_hand = write(tmp_path / "hand.yaml", HAND_EYE)
    camera = read_calibration([lens, on_hand], ["wrist"], "panda")[0]["wrist"]
    shift = np.eye(4)
    shift[:3, 3] = [0.06, 0, -0.06]
    np.testing.assert_allclose(camera.pose, robot_frames("panda")["hand"] @ shift)


def hand_eye(path, on_hand=True, frame="panda_hand", optical="camera_optical_frame"):
    key = "robot_effector_frame" if on_hand else "robot_base_frame"
    parameters = {"eye_on_hand": on_hand, key: frame, "tracking_base_frame": optical}
    shift = {"x": 0.06, "y": 0.02, "z": -0.06, "qx": 0.0, "qy": 0.0, "qz": 0.0, "qw": 1.0}
    return write(path, {"parameters": parameters, "transformation": shift})


SHIFT = np.eye(4)
SHIFT[:3, 3] = [0.06, 0.02, -0.06]


def test_frames_of_ros_that_universal_robots_turns(tmp_path):
    """ur_description: base_link is half a turn off base; flange has x where tool0 has z."""
    lens = write(tmp_path / "lens.yaml", {"wrist": REALSENSE})
    turned = np.eye(4)
    turned[:3, 3] = [-0.06, -0.02, -0.06]
    turned[:2, :2] *= -1
    for frame, expected in (("base_link", turned), ("ur5e_base_link", turned), ("base", SHIFT)):
        path = hand_eye(tmp_path / "room.yaml", False, frame)
        camera = read_calibration([lens, path], ["wrist"], "ur5e")[0]["wrist"]
        assert camera.frame == "base"
        np.testing.assert_allclose(camera.pose, expected)
        camera = read_calibration([lens, path], ["wrist"], "panda")[0]["wrist"]
        np.testing.assert_allclose(camera.pose, SHIFT)
    flange = robot_frames("ur5e")["flange"]
    path = hand_eye(tmp_path / "tool0.yaml", True, "tool0")
    camera = read_calibration([lens, path], ["wrist"], "ur5e")[0]["wrist"]
    np.testing.assert_allclose(camera.pose, flange @ SHIFT)
    path = hand_eye(tmp_path / "flange.yaml", True, "flange")
    camera = read_calibration([lens, path], ["wrist"], "ur5e")[0]["wrist"]
    tool0_from_camera = np.linalg.inv(flange) @ camera.pose
    # 6 cm along flange's x, which is tool0's z; 2 cm along its y, tool0's x; -6 cm along tool0's y.
    np.testing.assert_allclose(tool0_from_camera[:3, 3], [0.02, -0.06, 0.06])
    np.testing.assert_allclose(tool0_from_camera[:3, 0], [0, 0, 1])
    assert np.linalg.det(tool0_from_camera[:3, :3]) == pytest.approx(1)


def test_frankas_end_effector_is_at_the_fingertips(tmp_path):
    lens = write(tmp_path / "lens.yaml", {"wrist": REALSENSE})
    path = hand_eye(tmp_path / "pose.yaml", True, "panda_EE")
    camera = read_calibration([lens, path], ["wrist"], "panda")[0]["wrist"]
    np.testing.assert_allclose(camera.pose, robot_frames("panda")["tool"] @ SHIFT)


def test_easy_handeye_gives_the_optical_frame_or_is_refused(tmp_path):
    lens = write(tmp_path / "lens.yaml", {"wrist": REALSENSE})
    for name in ("camera_link", "camera", "tracking_origin"):
        path = hand_eye(tmp_path / "pose.yaml", optical=name)
        with pytest.raises(UserError, match=f"pose.yaml: tracking_base_frame '{name}' is not"):
            read_calibration([lens, path], ["wrist"], "panda")
    path = hand_eye(tmp_path / "pose.yaml", optical="optical_origin")
    assert read_calibration([lens, path], ["wrist"], "panda")[0]["wrist"].pose is not None


@pytest.mark.parametrize("word, frame", [("false", "base"), ("True", "last_joint"), ("no", None)])
def test_eye_on_hand_may_be_text(tmp_path, word, frame):
    lens = write(tmp_path / "lens.yaml", {"wrist": REALSENSE})
    path = hand_eye(tmp_path / "pose.yaml", on_hand=word, frame="panda_hand")
    if frame is None:
        with pytest.raises(UserError, match="eye_on_hand is 'no': write true or false"):
            read_calibration([lens, path], ["wrist"], "panda")
    else:
        camera = read_calibration([lens, path], ["wrist"], "panda")[0]["wrist"]
        assert camera.frame == frame


def test_kalibr_finds_the_second_camera_from_the_first(tmp_path):
    random = np.random.default_rng(1)
    first = random_pose(random)
    second_from_first = random_pose(random)
    chain = {"wrist": KALIBR, "front": KALIBR | {"T_cn_cnm1": second_from_first.tolist()}}
    lens = write(tmp_path / "camchain.yaml", chain)
    pose = pose_file(tmp_path / "pose.yaml", world_from_camera=first)
    cameras, _ = read_calibration([lens, pose], ["wrist", "front"], "panda")
    np.testing.assert_allclose(cameras["front"].pose, first @ np.linalg.inv(second_from_first))


def test_which_camera_a_file_is_of(tmp_path):
    lens = write(tmp_path / "anything.json", json.dumps(REALSENSE))
    poses = {name: {"world_from_camera": POSE.tolist()} for name in ("front", "side", "unused")}
    poses["side"]["intrinsics"] = MATRIX
    pose = write(tmp_path / "poses.yaml", poses)
    with pytest.raises(UserError, match="anything.json does not say which camera"):
        read_calibration([lens, pose], ["front", "side"], "panda")
    cameras, notes = read_calibration([f"front={lens}", pose], ["front", "side"], "panda")
    assert list(cameras) == ["front", "side"]
    assert len(notes) == 1 and "'unused'" in notes[0] and "poses.yaml" in notes[0]


COMPLETE = {"intrinsics": MATRIX, "world_from_camera": POSE.tolist()}
STRETCHED = np.diag([1.0, 2, 1, 1]).tolist()


@pytest.mark.parametrize(
    "content, words",
    [
        ({"wrist": {"intrinsics": MATRIX}}, "does not say where camera 'wrist' is"),
        ({"wrist": {"world_from_camera": POSE.tolist()}}, "no intrinsics"),
        ({"front": COMPLETE, "back": COMPLETE}, "'wrist' is not in"),
        ({"wrist": COMPLETE | {"hand_from_camera": POSE.tolist()}}, "keep one"),
        ({"wrist": {"intrinsics": MATRIX, "elbow_from_camera": POSE.tolist()}}, "names no frame"),
        ({"wrist": COMPLETE | {"intrinsics": [[1, 2], [3, 4]]}}, "intrinsics"),
        ({"wrist": COMPLETE | {"world_from_camera": STRETCHED}}, "not a rotation"),
        ({"wrist": COMPLETE | {"distortion": [1, 2, 3]}}, "distortion has 3 numbers"),
        (
            {"wrist": COMPLETE | {"distortion": [1, 2, 3, 4], "distortion_model": "ftheta"}},
            "'ftheta'",
        ),
        ({"wrist": {"fx": 1.0, "fy": 1.0, "ppx": 1.0}}, "'ppy'"),
        ({"wrist": {"fx": "wide", "fy": 1.0, "ppx": 1.0, "ppy": 1.0}}, "no number"),
        ({"cam0": KALIBR | {"camera_model": "omni"}}, "'omni'"),
        ({"cam0": KALIBR | {"intrinsics": [1.0, 2.0]}}, "intrinsics"),
        ({"transformation": {"x": 0.0, "y": 0.0}}, "'z'"),
        (
            {
                "transformation": {
                    "x": 0.0,
                    "y": 0.0,
                    "z": 0.0,
                    "qx": 2.0,
                    "qy": 0.0,
                    "qz": 0.0,
                    "qw": 0.0,
                }
            },
            "quaternion",
        ),
        ("wrist: {", "neither JSON nor YAML"),
        ("", "no file of cameras"),
        ("wrist: 3", "no camera's entry"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path, content, words):
    path = write(tmp_path / "cams.yaml", content)
    with pytest.raises(UserError) as caught:
        read_calibration([path], ["wrist"], "panda")
    sentence = str(caught.value)
    assert words in sentence and "cams.yaml" in sentence
    assert "\n" not in sentence and "delete" not in sentence


def distorted(point, coefficients, model):
    """Where a lens puts the ray (x, y, 1), by the definition of the model: (2,) slopes."""
    k1, k2, p1, p2, k3 = [*coefficients, 0][:5]
    x, y = point
    r2 = x * x + y * y
    if model == "fisheye":
        angle = np.arctan(np.sqrt(r2))
        k1, k2, k3, k4 = coefficients
        bent = angle * (1 + k1 * angle**2 + k2 * angle**4 + k3 * angle**6 + k4 * angle**8)
        return np.array([x, y]) * bent / np.sqrt(r2)
    radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
    return np.array(
        [
            x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
            y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
        ]
    )


@pytest.mark.parametrize(
    "name, model",
    [
        ("plumb_bob", "brown"),
        ("inverse_brown_conrady", "inverse_brown"),
        ("equidistant", "fisheye"),
    ],
)
def test_a_bent_picture_is_straightened(tmp_path, name, model):
    coefficients = [0.1, -0.05, 0.01, 0.02] if model == "fisheye" else COEFFICIENTS
    entry = COMPLETE | {"distortion": coefficients, "distortion_model": name}
    path = write(tmp_path / "cams.yaml", {"wrist": entry})
    camera = read_calibration([path], ["wrist"], "panda")[0]["wrist"]
    intrinsics = fit_size(camera, "wrist", (480, 640))
    maps = undistortion(camera, intrinsics, (480, 640))
    for slopes in ([0.3, 0.2], [-0.35, 0.1], [0.05, -0.25]):
        bent = distorted(slopes, coefficients, model)
        seen, straight = (bent, slopes) if model != "inverse_brown" else (slopes, bent)
        # A spot where the lens puts the ray; it has to be where a pinhole would have put it.
        spot = intrinsics @ [*seen, 1]
        y, x = np.mgrid[:480, :640] + 0.5
        gauss = np.exp(-((x - spot[0]) ** 2 + (y - spot[1]) ** 2) / 18)
        picture = np.repeat((255 * gauss)[..., None], 3, axis=2).astype(np.uint8)
        flat = undistort(picture, maps)[..., 0].astype(np.float64)
        found = [(flat * x).sum() / flat.sum(), (flat * y).sum() / flat.sum()]
        np.testing.assert_allclose(found, (intrinsics @ [*straight, 1])[:2], atol=0.15)


ROI = {"x_offset": 160, "y_offset": 60, "height": 240, "width": 320, "do_rectify": False}


def test_a_region_of_the_sensor_has_its_own_image_centre(tmp_path):
    """ROS's matrix is of the whole sensor; the pictures begin at the region's corner."""
    pose = pose_file(tmp_path / "pose.yaml", world_from_camera=POSE)
    lens = write(tmp_path / "lens.yaml", PRINTED | {"roi": ROI})
    camera = read_calibration([lens, pose], ["wrist"], "panda")[0]["wrist"]
    assert camera.size == (240, 320)
    expected = [[607, 0, 160.5], [0, 606, 180.5], [0, 0, 1]]
    np.testing.assert_allclose(fit_size(camera, "wrist", (240, 320)), expected)
    lens = write(tmp_path / "lens.yaml", PRINTED | {"roi": dict.fromkeys(ROI, 0)})
    camera = read_calibration([lens, pose], ["wrist"], "panda")[0]["wrist"]
    np.testing.assert_allclose(fit_size(camera, "wrist", (480, 640)), MATRIX)
    for change in ({"width": 600}, {"height": 0}, {"x_offset": -1}):
        lens = write(tmp_path / "lens.yaml", PRINTED | {"roi": ROI | change})
        with pytest.raises(UserError, match="roi is no part of the picture"):
            read_calibration([lens, pose], ["wrist"], "panda")


def test_the_last_lens_counts_as_a_whole(tmp_path):
    """An older file's distortion does not stay with a newer file's straight lens."""
    bent = COMPLETE | {"distortion": [0.1, -0.2, 0.01, 0.02], "distortion_model": "fisheye"}
    old = write(tmp_path / "old.yaml", {"wrist": bent})
    new = write(tmp_path / "wrist.json", json.dumps(REALSENSE | {"coeffs": [0.0] * 5}))
    pose = pose_file(tmp_path / "pose.yaml", world_from_camera=POSE)
    camera = read_calibration([old, new, pose], ["wrist"], "panda")[0]["wrist"]
    assert camera.distortion is None and camera.model == "brown"
    camera = read_calibration([new, old], ["wrist"], "panda")[0]["wrist"]
    assert len(camera.distortion) == 4 and camera.model == "fisheye"


@pytest.mark.parametrize("key", ["coeffs", "dist_coeffs", "D", "distorsion", "model", "camera"])
def test_a_word_that_we_do_not_read_is_not_dropped(tmp_path, key):
    path = write(tmp_path / "cams.yaml", {"wrist": COMPLETE | {key: [0.3, -0.2, 0, 0, 0]}})
    with pytest.raises(UserError) as caught:
        read_calibration([path], ["wrist"], "panda")
    sentence = str(caught.value)
    assert f"cams.yaml: wrist: '{key}' is not one of intrinsics, size, distortion" in sentence


def test_a_camera_of_ours_is_only_taken_by_its_name(tmp_path):
    path = write(tmp_path / "cams.yaml", {"front": COMPLETE})
    with pytest.raises(UserError, match="Camera 'side' is not in .*cams.yaml"):
        read_calibration([path], ["side"], "panda")
    assert read_calibration([f"side={path}"], ["side"], "panda")[0]["side"].intrinsics is not None
    other = write(tmp_path / "info.yaml", {"narrow_stereo": REALSENSE})  # a program's name for it
    pose = pose_file(tmp_path / "pose.yaml", "side", world_from_camera=POSE)
    cameras, notes = read_calibration([other, pose], ["side"], "panda")
    assert list(cameras) == ["side"] and "is taken for camera 'side'" in notes[0]


@pytest.mark.parametrize("name", ["world_from_camera", "hand_from_camera"])
def test_millimetres_are_refused(tmp_path, name):
    pose = np.eye(4)
    pose[:3, 3] = [1300.0, 400, 700] if name.startswith("world") else [60.0, 0, -60]
    path = pose_file(tmp_path / "cams.yaml", intrinsics=MATRIX, **{name: pose})
    with pytest.raises(UserError) as caught:
        read_calibration([path], ["wrist"], "panda")
    sentence = str(caught.value)
    assert "cams.yaml: wrist: camera 'wrist' is " in sentence and "millimetres" in sentence


def test_no_distortion_costs_nothing(tmp_path):
    entry = COMPLETE | {"distortion": [0, 0, 0, 0, 0]}
    camera = read_calibration([write(tmp_path / "c.yaml", {"wrist": entry})], ["wrist"], "panda")[0]
    assert undistortion(camera["wrist"], np.array(MATRIX), (480, 640)) is None


def test_smaller_pictures_have_smaller_intrinsics(tmp_path):
    path = write(tmp_path / "c.yaml", {"wrist": COMPLETE | {"size": [480, 640]}})
    camera = read_calibration([path], ["wrist"], "panda")[0]["wrist"]
    half = fit_size(camera, "wrist", (240, 320))
    np.testing.assert_allclose(half[:2], np.array(MATRIX)[:2] / 2)
    with pytest.raises(UserError, match="another shape"):
        fit_size(camera, "wrist", (480, 480))
    path = write(tmp_path / "c.yaml", {"wrist": COMPLETE})
    camera = read_calibration([path], ["wrist"], "panda")[0]["wrist"]
    with pytest.raises(UserError, match="image centre"):
        fit_size(camera, "wrist", (64, 64))


# -------------------------------------------------------------------------------- the view
def arm(frames=10):
    joints = np.array([0.0, -0.2, 0.0, -2.2, 0.0, 2.0, 0.8]) + np.linspace(0, 0.5, frames)[:, None]
    return robot_chain("panda").forward_kinematics(joints)


@pytest.mark.parametrize(
    "name, pose",
    [
        ("world_from_camera", look_at([1.3, 0.4, 0.7], [0.2, 0, 0.4])),
        ("hand_from_camera", look_at([0.3, 0.1, -0.2], [0.0, 0.0, 0.1])),
    ],
)
def test_an_inverted_pose_is_refused(tmp_path, name, pose):
    size = (480, 640)
    right = pose_file(tmp_path / "right.yaml", intrinsics=MATRIX, **{name: pose})
    wrong = pose_file(tmp_path / "wrong.yaml", intrinsics=MATRIX, **{name: np.linalg.inv(pose)})
    camera = read_calibration([right], ["wrist"], "panda")[0]["wrist"]
    assert check_view(camera, "wrist", size, arm()) is None
    camera = read_calibration([wrong], ["wrist"], "panda")[0]["wrist"]
    with pytest.raises(UserError) as caught:
        check_view(camera, "wrist", size, arm())
    sentence = str(caught.value)
    assert "wrong.yaml" in sentence and "'wrist'" in sentence and "inverted" in sentence


def test_a_camera_that_looks_away_is_said(tmp_path):
    pose = look_at([1.3, 0.4, 0.7], [5.0, 5.0, 0.7])
    path = pose_file(tmp_path / "away.yaml", intrinsics=MATRIX, world_from_camera=pose)
    camera = read_calibration([path], ["wrist"], "panda")[0]["wrist"]
    assert "never has a joint" in check_view(camera, "wrist", (480, 640), arm())


def test_share_in_view_is_what_opencv_projects():
    random = np.random.default_rng(2)
    points = random.uniform(-1, 1, (50, 4, 3))
    pose = look_at([1.5, 0.2, 0.6], [0, 0, 0])
    shares = share_in_view(points, np.array(MATRIX), np.broadcast_to(pose, (50, 4, 4)), (480, 640))
    inverse = np.linalg.inv(pose)
    rotation = cv2.Rodrigues(inverse[:3, :3])[0]
    for j in range(4):
        mine = np.ascontiguousarray(points[:, j])
        pixels = cv2.projectPoints(mine, rotation, inverse[:3, 3], np.array(MATRIX), None)
        pixels = pixels[0].reshape(-1, 2)
        depth = (points[:, j] @ inverse[2, :3]) + inverse[2, 3]
        inside = (depth > 0.02) & (pixels >= 0).all(axis=1) & (pixels <= [640, 480]).all(axis=1)
        assert shares[j] == inside.mean()
