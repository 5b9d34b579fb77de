"""Any cameras: one, two of different sizes, five: spheres, trainings, one frame in closed loop."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import test_base
import test_train_act
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, look_at, make_episode
from PIL import Image

import render_spheres
from genima.act import ACT, Controller
from genima.checkpoints import load_policy
from genima.demonstrations import describe, read_demonstrations
from genima.episodes import write_episode
from genima.files import UserError, run_stage
from genima.painter import load_painter
from genima.painter_data import PainterData, find_frames, read_batch
from genima.plots import PANEL, painted_panel
from genima.policy import OraclePainter
from genima.spheres import alpha_composite, draw_spheres, read_spheres, target_spheres
from genima.views import cell_of, fit, image_sizes_of, tile_any, untile_views
from robot.safety import Safety
from sims import make_env

CASES = {
    "one wrist camera": {"wrist": (480, 640)},
    "two of different sizes": {"wrist": (48, 64), "ego": (40, 32)},
    "five": {
        "ego": (16, 24),
        "top": (16, 24),
        "left": (16, 24),
        "right": (16, 24),
        "arm": (16, 24),
    },
}
ON_THE_ARM = ("wrist", "arm")


def make(sizes, seed=0, frames=5):
    """An episode of these cameras: on the arm, where the names say so, otherwise in the room."""
    episode = make_episode(seed, frames=frames)[0]
    random = np.random.default_rng(seed)
    poses = {name: episode.extrinsics["wrist"] for name in ON_THE_ARM}
    episode.images = {}
    episode.intrinsics = {}
    episode.extrinsics = {}
    for i, (camera, (height, width)) in enumerate(sizes.items()):
        episode.images[camera] = random.integers(0, 256, (frames, height, width, 3), np.uint8)
        centre = [[width, 0, width / 2], [0, width, height / 2], [0, 0, 1.0]]
        episode.intrinsics[camera] = np.array(centre)
        fixed = np.repeat(look_at((2.0, 0.3 * i, 0.5), (0, 0, 0))[None], frames, 0)
        episode.extrinsics[camera] = poses.get(camera, fixed)
    return episode


def draw(run, *options):
    """Run stage 1 in this process; the exit code."""
    sys.argv = ["render_spheres.py", "--run", str(run), "--horizon", "2", *map(str, options)]
    try:
        run_stage(render_spheres.main)
        return 0
    except SystemExit as ended:
        return ended.code


def train_painter(run, *arguments, **options):
    AcceleratorState._reset_state(True)  # the two trainings differ in precision
    return test_base.train(run, *arguments, **options)


def train_controller(run, *arguments, **options):
    AcceleratorState._reset_state(True)
    return test_train_act.train(run, *arguments, **options)


def record(run, sizes, scenes=2):
    for seed in range(scenes):
        episode = make(sizes)
        episode.seed = seed
        write_episode(run / f"episodes/pick_and_lift/{seed:06d}_00.hdf5", episode)


# -------------------------------------------------------------------------- from spheres to a chunk
@pytest.mark.parametrize("case", CASES)
def test_spheres_trainings_and_one_frame(tmp_path, case, capsys):
    sizes = CASES[case]
    record(tmp_path, sizes)
    assert draw(tmp_path) == 0
    printed = capsys.readouterr().out
    for camera in sizes:
        assert f"  {camera}: joint 2 " in printed
    layers, _ = read_spheres(tmp_path / "spheres/pick_and_lift/000000_00.hdf5")
    assert {name: layer.shape[1:3] for name, layer in layers.items()} == sizes

    assert train_painter(tmp_path, "none", steps=2) == 0, capsys.readouterr().err
    assert train_controller(tmp_path, steps=2) == 0, capsys.readouterr().err
    policy = load_policy(tmp_path / "controlnet", tmp_path / "act")
    assert policy.image_sizes == sizes
    episode = make(sizes)
    images = {camera: views[0] for camera, views in episode.images.items()}
    chunk, painted = policy.act(images, episode.qpos[0], "pick up the cube")
    assert chunk.shape == (2, 8) and np.isfinite(chunk).all()
    assert {name: view.shape for name, view in painted.items()} == {
        name: (*size, 3) for name, size in sizes.items()
    }
    parameters = sum(p.numel() for p in policy.controller.model.parameters())
    assert parameters < 20e6, parameters

    camera = next(iter(sizes))
    wrong = images | {camera: images[camera][:-8]}
    with pytest.raises(UserError, match="trained on views of .* from"):
        policy.act(wrong, episode.qpos[0], "pick up the cube")


def test_the_plain_baseline_takes_other_sizes(tmp_path, capsys):
    record(tmp_path, CASES["two of different sizes"])
    assert draw(tmp_path) == 0
    assert train_controller(tmp_path, "--observation", "rgb", steps=2) == 0
    controller = Controller.load(tmp_path / "act_rgb")
    episode = make(CASES["two of different sizes"])
    images = {camera: views[:1] for camera, views in episode.images.items()}
    assert controller(images, episode.qpos[:1], ["pick up the cube"]).shape == (1, 2, 8)


# ---------------------------------------------------------------------------------------- geometry
def test_cells_keep_square_views_and_bound_all_others():
    four = ("wrist", "front", "right_shoulder", "left_shoulder")
    for side in (16, 64, 128):
        assert cell_of(dict.fromkeys(four, (side, side)), "tiny") is None
    assert cell_of(dict.fromkeys(four, (256, 256)), "sd-turbo") is None
    assert cell_of(dict.fromkeys(four, (256, 256)), "tiny") == 64
    assert cell_of({"wrist": (480, 640)}, "tiny") == 128
    assert cell_of({"wrist": (480, 640)}, "sd-turbo") == 512
    assert cell_of({"a": (64, 64), "b": (32, 32)}, "tiny") == 128
    assert cell_of({"a": (96, 128), "b": (96, 128)}, "tiny") is None


def test_views_of_any_size_come_back_from_their_cells():
    smooth = torch.linspace(0, 1, 40)[None, None, :, None].expand(1, 3, 40, 60)
    other = 1 - fit(smooth, 30, 20)
    tiled = tile_any([smooth, other], 128)
    assert tiled.shape == (1, 3, 128, 256)
    cells = untile_views(tiled, 2)
    torch.testing.assert_close(fit(cells[:, 0], 40, 60), smooth, atol=0.02, rtol=0)
    torch.testing.assert_close(fit(cells[:, 1], 30, 20), other, atol=0.03, rtol=0)


def test_spheres_of_stages_2_and_3_are_in_the_same_places(tmp_path):
    """Stage 2 resizes drawn layers; stage 3 draws with the cell's intrinsics."""
    sizes = {"wrist": (48, 64), "ego": (120, 100)}
    record(tmp_path, sizes)
    assert draw(tmp_path) == 0
    data = find_frames(tmp_path)
    batch = read_batch(data.training[:1], data.cameras, 128, [np.random.default_rng(0)])
    cells = untile_views(batch["layer"], 2)[0]  # (V, 4, 128, 128)
    demonstration = read_demonstrations(tmp_path, images=False)[0]
    assert describe([demonstration], False)["image_size"] == [128, 128]
    chain = demonstration.chain
    for i, camera in enumerate(data.cameras):
        poses = chain.forward_kinematics(demonstration.target[0, :-1])
        is_open = demonstration.target[0, -1] > 0.5
        spheres = target_spheres(poses, is_open, camera, demonstration.style)
        place = chain.camera_pose(camera, chain.forward_kinematics(demonstration.qpos[0, :-1]))
        layer = draw_spheres(*spheres, demonstration.intrinsics[camera], place, 128, 128)
        ours = cells[i, 3] > 0.5
        theirs = torch.from_numpy(layer[..., 3]) > 127
        union = (ours | theirs).sum()
        assert union > 20
        assert (ours & theirs).sum() / union > 0.85, camera


def test_layers_of_another_size_fit_the_views(tmp_path):
    record(tmp_path, {"wrist": (32, 32), "front": (32, 32)})
    assert draw(tmp_path, "--size", 64) == 0
    data = find_frames(tmp_path)
    batch = read_batch(data.training[:1], data.cameras, 32, [np.random.default_rng(0)])
    assert batch["layer"].shape == (1, 4, 32, 64)


def test_the_controller_does_not_grow_with_the_picture():
    def parameters(sizes):
        demonstration = make(sizes)
        cell = cell_of(sizes, "tiny")
        config = {"size": "tiny", "observation": "spheres", "horizon": 8, "joints": 7}
        config |= {"cameras": list(demonstration.images), "vocabulary": []}
        config["image_size"] = [cell, cell]
        return sum(p.numel() for p in ACT(config).parameters())

    assert parameters({"wrist": (480, 640)}) == parameters({"wrist": (120, 160)}) < 20e6


# ------------------------------------------------------------------------- radius, joints, warnings
def test_radius_by_name_by_mounting_and_by_option(tmp_path, capsys):
    sizes = {"arm": (16, 24), "ego": (16, 24), "front": (16, 24)}
    record(tmp_path / "plain", sizes)
    assert draw(tmp_path / "plain") == 0
    style = read_demonstrations(tmp_path / "plain", images=False)[0].style
    assert [style.factor(camera) for camera in sizes] == [3, 6.5, 8]

    record(tmp_path / "own", sizes)
    assert draw(tmp_path / "own", "--radius", "arm=4", "ego=5", "--joints", 3, 7) == 0
    style = read_demonstrations(tmp_path / "own", images=False)[0].style
    assert [style.factor(camera) for camera in sizes] == [4, 5, 8]
    assert style.joints == (2, 6)
    assert "joint 3 " in capsys.readouterr().out
    assert draw(tmp_path / "own") == 2  # drawn already, otherwise
    assert "with other spheres" in capsys.readouterr().err
    assert train_controller(tmp_path / "own", steps=1) == 0
    config = json.loads((tmp_path / "own/act/config.json").read_text())
    assert config["style"] == {"joints": [2, 6], "factors": {"arm": 4.0, "ego": 5.0}}


def test_a_sphere_that_is_nowhere_is_a_warning(tmp_path, capsys):
    episode = make({"ego": (16, 24)})
    episode.extrinsics["ego"] = np.repeat(look_at((2, 0, 0), (4, 0, 0))[None], 5, 0)  # looks away
    write_episode(tmp_path / "episodes/pick_and_lift/000000_00.hdf5", episode)
    assert draw(tmp_path) == 0
    printed = capsys.readouterr().out
    assert "joint 2 0%, joint 4 0%, joint 6 0%, gripper 0%" in printed
    assert "Warning: no camera sees joint 2, joint 4, joint 6, gripper" in printed


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--joints", 2, 9], "has 7 joints, but --joints asks for 2 9"),
        (["--joints", 1, 2, 3, 4], "give one to three different joints"),
        (["--radius", "top=3"], "the cameras are ego"),
        (["--radius", "ego"], "write it as ego=3"),
        (["--radius", "ego=0"], "--radius ego must be from 0.1 to 100"),
    ],
)
def test_bad_options_are_one_sentence(tmp_path, capsys, options, sentence):
    record(tmp_path, {"ego": (16, 24)})
    assert draw(tmp_path, *options) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and sentence in said[0], said


def test_the_shipped_painter_still_paints():
    painter = load_painter(ROOT / "checkpoints/demo/controlnet")
    assert set(image_sizes_of(painter.config).values()) == {(64, 64)}


def test_the_oracle_paints_views_that_differ_in_size():
    """The spheres are where a camera of that size sees them, whatever the environment's size is."""
    env = make_env("reach_target", (64, 64), ("front", "wrist"))
    env.reset(seed=0)
    wide = make_env("reach_target", (96, 160), ("front", "wrist"))
    wide.reset(seed=0)
    demo = SimpleNamespace(qpos=np.zeros((1, 8)), action=np.ones((1, 8)))
    demo.joint_poses = env.joint_poses()[None]
    images = {"front": np.zeros((96, 160, 3), np.uint8), "wrist": np.zeros((64, 64, 3), np.uint8)}
    painted = OraclePainter(demo, 8).paint(env, images, 0)
    for camera, from_env in (("front", wide), ("wrist", env)):
        spheres = target_spheres(demo.joint_poses[0], True, camera)
        size = images[camera].shape[:2]
        layer = draw_spheres(*spheres, *from_env.camera_parameters(camera), *size)
        assert layer[..., 3].any()
        np.testing.assert_array_equal(painted[camera], alpha_composite(layer, images[camera]))


def test_pictures_for_people_take_views_that_differ_in_size(tmp_path):
    views = {"front": np.full((96, 128, 3), 50, np.uint8), "side": np.full((120, 90, 3), 90)}
    views["side"] = views["side"].astype(np.uint8)
    assert painted_panel(views).shape == (PANEL, PANEL, 3)
    Safety("fr3").confirm(views, tmp_path / "target.png", None)
    assert Image.open(tmp_path / "target.png").size == (256, 120)


def test_what_paints_futures_refuses_other_views(tmp_path):
    sizes = {"front": (96, 128), "side": (120, 90)}
    data = PainterData([], [], 8, list(sizes), sizes, ["push"], 10.0, 1, 0, 0)
    with pytest.raises(UserError, match="square views of one size, up to 128 pixels"):
        data.small_square_size()
    data.image_sizes = dict.fromkeys(sizes, (64, 64))
    assert data.small_square_size() == 64
    data.image_sizes = dict.fromkeys(sizes, (256, 256))
    with pytest.raises(UserError, match="256"):
        data.small_square_size()
