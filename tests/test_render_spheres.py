"""render_spheres.py: the spheres are where a renderer puts them, the chain is the robot's."""

import errno
import os
import subprocess
import sys

import h5py
import imageio.v2 as imageio
import mujoco
import numpy as np
import pytest
import yaml
from conftest import ROOT, look_at, make_episode, random_pose, turn_about_z
from PIL import Image
from test_episodes import BROKEN, contents, stage

import render_spheres
from genima.episodes import find_episodes, read_episode, write_episode
from genima.files import UserError
from genima.kinematics import Chain
from genima.spheres import (
    CYAN,
    DARK_STRIPE,
    GREEN,
    PURPLE,
    RED,
    YELLOW,
    alpha_composite,
    draw_spheres,
    read_spheres,
    target_spheres,
)
from sims.rendering import new_renderer

COLOURS = np.array([RED, GREEN, PURPLE, CYAN], np.uint8)


def pinhole(height, width, fovy):
    """MuJoCo's camera as an intrinsic matrix."""
    focal = height / 2 / np.tan(np.radians(fovy) / 2)
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])


class MuJoCo:
    """Which of S spheres does each pixel see? By MuJoCo's segmentation of finely cut spheres."""

    def __init__(self, height, width, fovy=50, spheres=4):
        bodies = "".join(
            '<body mocap="true"><geom type="sphere" size="1"/></body>' for _ in range(spheres)
        )
        self.model = mujoco.MjModel.from_xml_string(f"""
            <mujoco>
              <statistic extent="1"/>
              <visual><global offwidth="{width}" offheight="{height}"/>
                <quality numslices="128" numstacks="128" offsamples="0"/>
                <map znear="0.001" zfar="50"/></visual>
              <worldbody> <camera name="eye" fovy="{fovy}" mode="fixed"/> {bodies} </worldbody>
            </mujoco>""")
        self.data = mujoco.MjData(self.model)
        self.renderer = new_renderer(self.model, height, width)
        self.renderer.enable_segmentation_rendering()

    def seen(self, poses, radii, world_from_camera):
        """(H, W): the number of the sphere, -1 for none."""
        self.data.mocap_pos[:] = poses[:, :3, 3]
        self.model.geom_size[:, 0] = radii
        self.model.geom_rbound[:] = radii
        self.model.cam_pos[0] = world_from_camera[:3, 3]
        mujoco.mju_mat2Quat(
            self.model.cam_quat[0], (world_from_camera[:3, :3] * [1, -1, -1]).ravel()
        )  # OpenGL's axes
        mujoco.mj_forward(self.model, self.data)
        self.renderer.update_scene(self.data, camera="eye")
        return self.renderer.render()[..., 0]


def place(random, world_from_camera, intrinsics, height, width, pixels):
    """A random pose and radius of a sphere that shows with about this radius in pixels."""
    depth = random.uniform(0.3, 3)
    u, v = random.uniform(-0.05, 1.05, 2) * (width, height)
    pose = random_pose(random)
    centre = depth * np.linalg.inv(intrinsics) @ [u, v, 1]
    pose[:3, 3] = world_from_camera[:3, :3] @ centre + world_from_camera[:3, 3]
    return pose, pixels * depth / intrinsics[0, 0]


@pytest.mark.parametrize(
    "height, width, fovy",
    [(64, 64, 45), (128, 128, 60), (96, 128, 45), (480, 640, 50), (640, 360, 75)],
)
def test_a_sphere_is_where_mujoco_draws_it(height, width, fovy):
    random = np.random.default_rng(height * width)
    intrinsics, judge = pinhole(height, width, fovy), MuJoCo(height, width, fovy, spheres=1)
    compared = 0
    while compared < 12:
        camera = random_pose(random, 2)
        pose, radius = place(
            random, camera, intrinsics, height, width, random.uniform(5, height / 4)
        )
        theirs = judge.seen(pose[None], [radius], camera) == 0
        ours = (
            draw_spheres(pose[None], [radius], COLOURS[:1], intrinsics, camera, height, width)[
                ..., 3
            ]
            >= 128
        )
        if theirs.sum() < 40:
            assert ours.sum() < 60
            continue
        compared += 1
        assert (ours & theirs).sum() / (ours | theirs).sum() >= 0.95
        shift = np.argwhere(ours).mean(axis=0) - np.argwhere(theirs).mean(axis=0)
        assert np.abs(shift).max() < 0.5


@pytest.mark.parametrize("height, width, agreement", [(64, 64, 0.98), (240, 320, 0.995)])
def test_spheres_hide_one_another_as_mujoco_says(height, width, agreement):
    """Four spheres in a heap: behind, beside and inside one another."""
    random = np.random.default_rng(1)
    intrinsics, judge = pinhole(height, width, 50), MuJoCo(height, width)
    visible = []
    for _ in range(10):
        poses = np.stack([random_pose(random, 0.15) for _ in range(4)])
        radii = random.uniform(0.08, 0.18, 4)
        camera = look_at(random.uniform(0.9, 1.2) * random_pose(random)[:3, 0], (0, 0, 0))
        theirs = judge.seen(poses, radii, camera)
        picture = draw_spheres(poses, radii, COLOURS, intrinsics, camera, height, width)
        palette = np.concatenate([COLOURS, COLOURS * DARK_STRIPE])  # (8, 3)
        difference = np.abs(picture[:, :, None, :3] - palette).sum(axis=-1)  # (H, W, 8)
        ours = np.where(picture[..., 3] >= 128, difference.argmin(axis=-1) % 4, -1)
        union = (theirs >= 0) | (ours >= 0)
        visible.append(len(np.unique(theirs[theirs >= 0])))
        assert (ours == theirs)[union].mean() > agreement
        assert (ours[theirs >= 0] >= 0).mean() > 0.998
        inside = (theirs >= 0) & (np.roll(theirs, 1, 0) >= 0) & (np.roll(theirs, -1, 0) >= 0)
        inside &= (np.roll(theirs, 1, 1) >= 0) & (np.roll(theirs, -1, 1) >= 0)
        assert (
            picture[inside][:, 3] == 255
        ).mean() > agreement  # where one sphere's edge lies over another there is no hole
    assert np.mean(visible) > 2.5


def true_sectors(pose, radius, intrinsics, camera, height, width):
    """Per pixel, in double precision: the angle of the point that is seen, in the sphere's frame.

    NaN where there is none.
    """
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    rays = (
        np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(intrinsics).T @ camera[:3, :3].T
    )
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    offset = camera[:3, 3] - pose[:3, 3]
    half = rays @ offset
    with np.errstate(invalid="ignore"):
        t = -half - np.sqrt(half**2 - offset @ offset + radius**2)
    point = (camera[:3, 3] + t[..., None] * rays - pose[:3, 3]) @ pose[:3, :3]
    return np.arctan2(point[..., 1], point[..., 0])


def is_dark(picture, colour):
    return picture[..., :3].sum(-1) < (1 + DARK_STRIPE) / 2 * sum(colour)


@pytest.mark.parametrize("seed", range(4))
def test_stripes_turn_with_the_joint(seed):
    random = np.random.default_rng(seed)
    height, width = 200, 240
    intrinsics, pose = pinhole(height, width, 40), random_pose(random, 0.02)
    camera = look_at(random_pose(random)[:3, 0] * 0.8, (0, 0, 0))
    for turn in (0, 0.4, np.pi / 3, 2 * np.pi / 3):
        turned = pose @ turn_about_z(turn)
        angle = true_sectors(turned, 0.15, intrinsics, camera, height, width)
        picture = draw_spheres(turned[None], [0.15], COLOURS[3:], intrinsics, camera, height, width)
        whole = picture[..., 3] == 255
        assert whole.sum() > 1000 and not np.isnan(angle[whole]).any()
        predicted = np.floor(angle / (np.pi / 3)) % 2 == 1
        assert 0.15 < predicted[whole].mean() < 0.85
        assert (is_dark(picture, CYAN) == predicted)[whole].mean() > 0.995
        if turn == 0:
            first = is_dark(picture, CYAN)
    assert (is_dark(picture, CYAN) == first)[
        whole
    ].mean() > 0.99  # a third of a turn brings the stripes back


def test_a_turn_of_a_sixth_swaps_light_and_dark():
    intrinsics, camera = pinhole(64, 64, 40), look_at((0.01, 0, 1), (0, 0, 0))
    views = [
        draw_spheres(turn_about_z(turn)[None], [0.2], COLOURS[:1], intrinsics, camera, 64, 64)
        for turn in (0, np.pi / 3)
    ]
    whole = (views[0][..., 3] == 255) & (views[1][..., 3] == 255)
    assert (is_dark(views[0], RED) != is_dark(views[1], RED))[whole].mean() > 0.97
    assert set(np.unique(views[0][whole][:, 0])) == {255, round(255 * DARK_STRIPE)}


def test_the_edge_is_antialiased():
    """The coverage adds up to the area of the disc, to a hundredth, for radii between pixels."""
    intrinsics, pose = pinhole(64, 64, 10), np.eye(4)
    for pixels in (3.2, 5.5, 9.9):
        radius = pixels / intrinsics[0, 0] * 10
        picture = draw_spheres(
            pose[None],
            [radius],
            COLOURS[:1],
            intrinsics,
            look_at((10, 0.013, 0.02), (0, 0, 0)),
            64,
            64,
        )
        assert picture[..., 3].sum() / 255 == pytest.approx(np.pi * pixels**2, rel=0.01)
        assert (
            picture[picture[..., 3] > 0][:, 0] > 100
        ).all()  # the edge has the sphere's colour, not a mixture with black


def test_an_edge_over_an_edge_keeps_the_colour():
    """Twice the same sphere, the second farther and larger: both edges on the same pixels."""
    near, far = look_at((0, 0, 0), (1, 0, 0)), look_at((0, 0, 0), (1, 0, 0))
    near[:3, 3], far[:3, 3] = (1, 0, 0), (1.2, 0, 0)
    camera = look_at((0, 0, 0), (1, 0.1, 0))
    picture = draw_spheres(
        np.stack([near, far]), [0.1, 0.12], COLOURS[[0, 0]], pinhole(64, 64, 40), camera, 64, 64
    )
    edge = (picture[..., 3] > 20) & (picture[..., 3] < 250)
    assert edge.sum() > 20 and picture[edge][:, 0].min() >= DARK_STRIPE * 255 - 3


def test_what_is_not_to_be_seen_is_not_drawn():
    intrinsics, camera = pinhole(48, 64, 60), np.eye(4)
    for centre, radius in [
        ((0, 0, -1), 0.3),
        ((0, 0, 0.1), 0.2),
        ((5, 0, 1), 0.5),
        ((0, -5, 1), 0.5),
        ((0.2, 0.1, -0.01), 0.1),
    ]:
        pose = np.eye(4)
        pose[:3, 3] = centre
        assert not draw_spheres(pose[None], [radius], COLOURS[:1], intrinsics, camera, 48, 64).any()
    assert draw_spheres(
        np.zeros((0, 4, 4)), np.zeros(0), COLOURS[:0], intrinsics, camera, 48, 64
    ).shape == (48, 64, 4)
    pose[:3, 3] = (
        0.95,
        0,
        0.32,
    )  # beside the camera, wider than 90 degrees: it covers the right of the picture, not the left
    alpha = draw_spheres(pose[None], [0.99], COLOURS[:1], intrinsics, camera, 48, 64)[..., 3]
    assert (alpha[:, 40:] == 255).all() and not alpha[:, :2].any()
    near = np.eye(4)  # a nearer one where the wide one is not
    near[:3, 3] = -0.06, 0, 0.1
    with np.errstate(all="raise"):
        both = draw_spheres(
            np.stack([pose, near]), [0.99, 0.01], COLOURS, intrinsics, camera, 48, 64
        )
    alone = draw_spheres(near[None], [0.01], COLOURS[1:], intrinsics, camera, 48, 64)
    assert alone.any()
    np.testing.assert_array_equal(both[alone[..., 3] == 255], alone[alone[..., 3] == 255])
    wall = np.eye(4)  # a far one that fills the picture's width, but not its corners
    wall[:3, 3] = 0, 0, 3
    alpha = draw_spheres(
        np.stack([pose, wall]), [0.99, 1.9], COLOURS, pinhole(36, 48, 60), camera, 36, 48
    )[..., 3]
    assert (alpha[18] == 255).all() and not alpha[[0, -1], 0].any()


def test_alpha_composite():
    picture = np.array([[[10, 20, 30], [10, 20, 30], [10, 20, 30]]], np.uint8)
    layer = np.array([[[200, 100, 0, 0], [200, 100, 0, 255], [200, 100, 0, 51]]], np.uint8)
    np.testing.assert_array_equal(
        alpha_composite(layer, picture), [[[10, 20, 30], [200, 100, 0], [48, 36, 24]]]
    )
    assert (
        alpha_composite(layer[None], picture[None]).shape == (1, 1, 3, 3)
        and alpha_composite(layer, picture).dtype == np.uint8
    )


@pytest.mark.parametrize("joints", [6, 7])
def test_the_papers_spheres(joints):
    poses = make_episode(0, joints)[0].joint_poses[0]
    shown, radii, colours = target_spheres(poses, True, "wrist")
    np.testing.assert_array_equal(shown, poses[[1, 3, 5, joints]])
    np.testing.assert_allclose(radii, 0.03)
    np.testing.assert_array_equal(colours, [RED, GREEN, PURPLE, CYAN])
    assert tuple(target_spheres(poses, False, "wrist")[2][3]) == YELLOW
    for camera, radius in [
        ("front", 0.08),
        ("left_shoulder", 0.065),
        ("overhead", 0.065),
        ("mine", 0.065),
    ]:
        np.testing.assert_allclose(target_spheres(poses, True, camera)[1], radius)


@pytest.mark.parametrize("joints", [6, 7])
def test_the_chain_is_found_in_an_episode(joints):
    episode, links, tool, mount = make_episode(11, joints)
    chain = Chain.from_episode(episode)
    np.testing.assert_allclose(chain.links, links, atol=1e-5)
    np.testing.assert_allclose(chain.tool, tool, atol=1e-5)
    np.testing.assert_allclose(chain.mounted["wrist"], mount, atol=1e-5)
    np.testing.assert_array_equal(chain.fixed["front"], episode.extrinsics["front"][0])

    other = make_episode(11, joints, frames=12)[0]  # the same robot, elsewhere
    q = other.qpos[:, :-1].reshape(3, 4, joints)
    poses = chain.forward_kinematics(q)
    assert poses.shape == (3, 4, joints + 1, 4, 4)
    np.testing.assert_allclose(poses.reshape(12, joints + 1, 4, 4), other.joint_poses, atol=1e-5)
    np.testing.assert_allclose(
        chain.camera_pose("wrist", poses).reshape(12, 4, 4), other.extrinsics["wrist"], atol=1e-5
    )
    np.testing.assert_allclose(
        chain.camera_pose("front", poses),
        np.broadcast_to(other.extrinsics["front"][0], (3, 4, 4, 4)),
    )
    np.testing.assert_allclose(chain.forward_kinematics(q[0, 0]), poses[0, 0])


def test_a_single_frame_gives_a_chain_too():
    chain = Chain.from_episode(make_episode(frames=1)[0])
    assert set(chain.mounted) == {"wrist"} and set(chain.fixed) == {"front"}


def drop_turn(episode):
    episode.joint_poses[3, 2] = episode.joint_poses[3, 2] @ turn_about_z(0.1)


def slide_tool(episode):
    episode.joint_poses[3, -1, 0, 3] += 0.01


def push_camera(episode):
    episode.extrinsics["front"][2, 0, 3] += 0.01


def swing_wrist(episode):
    episode.extrinsics["wrist"][3] = episode.extrinsics["wrist"][3] @ turn_about_z(0.01)


@pytest.mark.parametrize(
    "change, words",
    [
        (drop_turn, "qpos"),
        (slide_tool, "tool"),
        (push_camera, "cameras/front"),
        (swing_wrist, "cameras/wrist"),
    ],
)
def test_a_chain_that_changes_is_refused(tmp_path, change, words):
    episode = make_episode()[0]
    change(episode)
    write_episode(tmp_path / "a.hdf5", episode)
    with pytest.raises(UserError) as caught:
        Chain.from_episode(read_episode(tmp_path / "a.hdf5"))
    assert words in str(caught.value) and "a.hdf5" in str(caught.value)


def test_the_stage_draws_the_target_frame(run, monkeypatch, capsys):
    code, out, err = stage(monkeypatch, capsys, render_spheres.main, "--run", run, "--horizon", 2)
    assert code == 0 and "2 files" in out
    for path in find_episodes(run / "episodes"):
        episode, target = read_episode(path), run / "spheres" / path.parent.name / path.name
        layers, qpos = read_spheres(target)
        later = [2, 3, 4, 5, 5, 5]
        np.testing.assert_array_equal(qpos[:, :-1], episode.qpos[later, :-1])
        np.testing.assert_array_equal(qpos[:, -1], episode.action[later, -1])
        assert set(layers) == {"front", "wrist"} and layers["front"].shape == (6, 32, 40, 4)
        for camera in layers:
            for t in range(6):
                spheres = target_spheres(
                    episode.joint_poses[later[t]], bool(episode.action[later[t], -1]), camera
                )
                expected = draw_spheres(
                    *spheres, episode.intrinsics[camera], episode.extrinsics[camera][t], 32, 40
                )
                np.testing.assert_array_equal(layers[camera][t], expected)
        assert all(layer.any() for camera in layers for layer in layers[camera])
        with h5py.File(target) as root:
            assert (
                root.attrs["horizon"] == 2 and root.attrs["episode"] == f"pick_and_lift/{path.name}"
            )

    before = {path: path.stat().st_mtime_ns for path in contents(run / "spheres")}
    late = run / "episodes/pick_and_lift/000002_00.hdf5"
    write_episode(late, make_episode(2)[0])
    assert stage(monkeypatch, capsys, render_spheres.main, "--run", run, "--horizon", 2)[0] == 0
    assert before == {
        path: path.stat().st_mtime_ns for path in before
    }  # what was there is kept, what was missing is made
    assert len(contents(run / "spheres")) == 3


def test_another_size_robot_and_preview(tmp_path, monkeypatch, capsys):
    episode = make_episode(1, joints=6, size=(48, 64))[0]
    episode.extrinsics["side"] = np.repeat(look_at((0.1, 2, 0.4), (0, 0, 0))[None], 6, 0)
    episode.images["side"], episode.intrinsics["side"] = (
        episode.images["front"][:, :, :50],
        episode.intrinsics["front"],
    )
    write_episode(tmp_path / "episodes/a/a.hdf5", episode)
    assert (
        stage(
            monkeypatch, capsys, render_spheres.main, "--run", tmp_path, "--size", 96, "--preview"
        )[0]
        == 0
    )
    layers, qpos = read_spheres(tmp_path / "spheres/a/a.hdf5")
    assert (
        layers["front"].shape == (6, 96, 128, 4)
        and layers["side"].shape == (6, 96, 100, 4)
        and qpos.shape == (6, 7)
    )
    spheres = target_spheres(episode.joint_poses[5], False, "front")
    small = draw_spheres(
        *spheres, episode.intrinsics["front"], episode.extrinsics["front"][0], 48, 64
    )
    assert small.any()
    large = np.array(Image.fromarray(layers["front"][0, ..., 3]).resize((64, 48), Image.BOX))
    assert np.abs(large - 1.0 * small[..., 3]).mean() < 2  # the same picture, twice as large
    assert np.array(Image.open(tmp_path / "spheres/preview.png")).shape[2] == 3
    film = imageio.get_reader(tmp_path / "spheres/preview.mp4")
    assert (
        film.get_meta_data()["codec"] == "h264"
        and film.get_meta_data()["fps"] == 10
        and film.count_frames() == 6
    )


def test_a_calibration_replaces_the_cameras(run, monkeypatch, capsys):
    episode = read_episode(find_episodes(run / "episodes")[0])
    eye, mount = look_at((1.5, -0.5, 0.7), (0, 0, 0)), random_pose(np.random.default_rng(0), 0.1)
    intrinsics = [[50.0, 0, 21], [0, 50, 15], [0, 0, 1]]
    (run / "cams.yaml").write_text(
        yaml.dump(
            {
                "front": {"intrinsics": intrinsics, "world_from_camera": eye.tolist()},
                "wrist": {"intrinsics": intrinsics, "last_joint_from_camera": mount.tolist()},
            }
        )
    )
    assert (
        stage(
            monkeypatch,
            capsys,
            render_spheres.main,
            "--run",
            run,
            "--horizon",
            1,
            "--calibration",
            run / "cams.yaml",
        )[0]
        == 0
    )
    layers, _ = read_spheres(run / "spheres/pick_and_lift/000000_00.hdf5")
    for camera, pose in [("front", eye), ("wrist", episode.joint_poses[2, -2] @ mount)]:
        spheres = target_spheres(episode.joint_poses[3], False, camera)
        np.testing.assert_array_equal(
            layers[camera][2], draw_spheres(*spheres, np.array(intrinsics), pose, 32, 40)
        )


def refused(run, monkeypatch, capsys, *arguments):
    """Run the stage, which has to fail in one sentence and leave every file. Returns it."""
    before = contents(run)
    code, out, sentence = stage(monkeypatch, capsys, render_spheres.main, "--run", run, *arguments)
    assert code == 2 and out == "" and sentence.endswith(".") and "Traceback" not in sentence
    after = contents(run)
    for path in set(after) - set(before):
        read_spheres(path)  # a file that is new is whole
    assert before == {path: after[path] for path in before}
    return sentence


@pytest.mark.parametrize(
    "what",
    ["cut in half", "nan in qpos", "images as masks", "camera scaled", "images of one camera"],
)
def test_a_broken_episode_is_refused(run, monkeypatch, capsys, what):
    BROKEN[what][0](run / "episodes/pick_and_lift/000001_00.hdf5")
    assert "000001_00.hdf5" in refused(run, monkeypatch, capsys)


def test_folders_that_do_not_fit_are_refused(run, tmp_path, monkeypatch, capsys):
    assert "nowhere" in refused(tmp_path / "nowhere", monkeypatch, capsys)
    write_episode(run / "episodes/pick_and_lift/000009_00.hdf5", make_episode(2, joints=6)[0])
    sentence = refused(run, monkeypatch, capsys)
    assert "000009_00.hdf5" in sentence and "6 joints" in sentence
    (run / "episodes/pick_and_lift/000009_00.hdf5").unlink()
    assert stage(monkeypatch, capsys, render_spheres.main, "--run", run)[0] == 0
    assert "horizon 8, not 4" in refused(run, monkeypatch, capsys, "--horizon", 4)
    assert "size" in refused(run, monkeypatch, capsys, "--size", 64)
    assert "--horizon" in refused(run, monkeypatch, capsys, "--horizon", 0)
    assert "--horizon" in refused(run, monkeypatch, capsys, "--horizon", 10**18)
    assert "--size" in refused(run, monkeypatch, capsys, "--size", 10**7)
    for path in find_episodes(run / "episodes"):
        path.unlink()
    assert "episodes" in refused(run, monkeypatch, capsys)


def test_too_few_joints_for_the_spheres(tmp_path, monkeypatch, capsys):
    write_episode(tmp_path / "episodes/a/a.hdf5", make_episode(joints=5)[0])
    assert "5 joints" in refused(tmp_path, monkeypatch, capsys)


def calibration(camera="front", **entries):
    intrinsics = [[9.0, 0, 1], [0, 9, 1], [0, 0, 1]]
    return yaml.dump(
        {camera: {"intrinsics": intrinsics, "world_from_camera": np.eye(4).tolist(), **entries}}
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "front: {",
        "front: {intrinsics: [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}",
        calibration("back"),
        calibration(intrinsics=[[1, 0], [0, 1]]),
        calibration(intrinsics=[[1], [0, 1]]),
        calibration(intrinsics=[[-9.0, 0, 1], [0, 9, 1], [0, 0, 1]]),
        calibration(intrinsics=[[9.0, 0, np.nan], [0, 9, 1], [0, 0, 1]]),
        calibration(world_from_camera=np.diag([1.0, 2, 1, 1]).tolist()),
        calibration(last_joint_from_camera=np.eye(4).tolist()),
    ],
)
def test_a_bad_calibration_is_refused(run, monkeypatch, capsys, text):
    (run / "cams.yaml").write_text(text)
    sentence = refused(run, monkeypatch, capsys, "--calibration", run / "cams.yaml")
    assert "cams.yaml" in sentence or "'back'" in sentence


def test_a_full_disk(run, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)

    # in this process, for a patch does not reach another one everywhere
    def one_by_one(jobs, *_):
        for job in jobs:
            yield job, job[0](*job[1:])

    monkeypatch.setattr(render_spheres, "run_in_parallel", one_by_one)
    assert "disk is full" in refused(run, monkeypatch, capsys)
    assert len(contents(run)) == 2


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "truncated"),
        (BROKEN["foreign"][0], "format"),
        (lambda path: shorten(path, "layers/front"), "layers/front"),
        (lambda path: shorten(path, "target/qpos"), "layers/"),
    ],
)
def test_broken_spheres_are_refused(run, monkeypatch, capsys, damage, words):
    assert stage(monkeypatch, capsys, render_spheres.main, "--run", run)[0] == 0
    path = run / "spheres/pick_and_lift/000000_00.hdf5"
    damage(path)
    with pytest.raises(UserError) as caught:
        read_spheres(path)
    assert words in str(caught.value) and path.name in str(caught.value)


def shorten(path, dataset):
    with h5py.File(path, "r+") as root:
        data = root[dataset][:-1]
        del root[dataset]
        root[dataset] = data


def test_the_command_line(run):
    """From outside, as a person runs it: a sentence and code 2, then the files."""
    ask = [sys.executable, "render_spheres.py", "--run", run]
    wrong = subprocess.run([*ask, "--size", "-1"], cwd=ROOT, capture_output=True, text=True)
    assert (
        wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1 and "--size" in wrong.stderr
    )
    right = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True)
    assert right.returncode == 0 and "2 files of spheres, 8 steps ahead" in right.stdout
