"""The variations: what each changed against the stages is what its first lines say, and each runs from end to end on a miniature."""

import csv
import json
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_episode

sys.path.insert(0, str(ROOT / "variations"))

import loop
import train_diffusion_policy as diffusion
import train_future_frame as future
import train_points as points

from genima.episodes import CAMERAS, read_episode
from genima.files import UserError
from genima.kinematics import Chain
from genima.painter import tile
from genima.spheres import JOINTS
from train_controlnet import find_frames

HORIZON, SIZE = 3, 32
VIEWS = ["wrist", "front"]


def config_of(episode, **changes):
    return dict(size="tiny", observation="rgb", horizon=HORIZON, joints=7, cameras=VIEWS, image_size=[SIZE, 40], vocabulary=["cube", "it"],
                state_mean=episode.qpos.mean(0).tolist(), state_std=[0.3] * 8, chunk_scale=[0.5] * 7 + [1.0]) | changes  # fmt: skip


def samples_of(kind, **changes):
    """Samples of one synthetic episode, and their configuration."""
    episode, *_ = make_episode(frames=8)
    later = np.minimum(np.arange(8) + HORIZON, 7)
    episode.target = np.hstack(
        [episode.qpos[later, :-1], np.round(episode.action[later, -1:])]
    ).astype(np.float32)
    episode.chain = Chain.from_episode(episode)
    config = config_of(episode, **changes)
    return kind([episode], [episode], config, loop.Settings(batch=4)), config


# ------------------------------------------------------------------------------------------------------ Diffusion Policy
def test_diffusion_policy_ends_at_the_chunk_that_the_denoiser_sees(monkeypatch):
    samples, config = samples_of(loop.Samples)
    network, batch = diffusion.DiffusionPolicy(config).eval(), samples[0]
    seen = [batch[name] for name in ("pictures", "state", "state_given", "words")]
    chunk = torch.rand(4, HORIZON, 8) * 1.6 - 0.8
    levels = []
    monkeypatch.setattr(
        network, "denoise", lambda noisy, level, *_: levels.append(int(level[0])) or chunk
    )
    with torch.no_grad():
        joints, gripper = network(*seen)
    assert (
        len(levels) == diffusion.DENOISE
        and levels == sorted(levels, reverse=True)
        and levels[-1] == 0
    )
    torch.testing.assert_close(joints, 0.5 * chunk[..., :-1])  # chunk_scale
    assert torch.equal(gripper > 0, chunk[..., -1] > 0)


def test_diffusion_policys_chunk_depends_on_pictures_words_and_nothing_random():
    samples, config = samples_of(loop.Samples)
    torch.manual_seed(0)
    network, batch = diffusion.DiffusionPolicy(config).eval(), samples[0]
    seen = [batch[name] for name in ("pictures", "state", "state_given", "words")]
    with torch.no_grad():
        before, again = network(*seen)[0], network(*seen)[0]
        assert torch.equal(before, again) and before.shape == (4, HORIZON, 7)
        assert not torch.allclose(before, network(255 - seen[0], *seen[1:])[0], atol=1e-6)
        assert not torch.allclose(before, network(*seen[:3], 1 - seen[3])[0], atol=1e-6)


def test_diffusion_policys_loss_is_that_of_the_chunk(monkeypatch):
    samples, config = samples_of(loop.Samples)
    network, batch = diffusion.DiffusionPolicy(config), samples[0]
    truth = torch.cat(
        [batch["joints"] / 0.5, 2 * batch["gripper"][..., None] - 1], -1
    ).repeat_interleave(diffusion.DRAWS, 0)
    monkeypatch.setattr(network, "denoise", lambda *_: truth + 0.5)
    assert diffusion.loss_of(network, batch).item() == pytest.approx(0.25)


def test_diffusion_policy_learns():
    samples, config = samples_of(loop.Samples)
    torch.manual_seed(0)
    network, batch = diffusion.DiffusionPolicy(config), samples[0]
    optimizer, losses = torch.optim.AdamW(network.parameters(), 1e-3), []
    for _ in range(40):
        loss = diffusion.loss_of(network, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:3])


# ----------------------------------------------------------------------------------------------------------- future frame
def test_goals_are_the_same_views_some_steps_later(monkeypatch):
    samples, config = samples_of(future.Goals, vocabulary=[])
    monkeypatch.setattr(future, "crop", lambda random, picture: picture)
    (episode, _), soft = samples.frames[0], 0
    for seed, t in enumerate((0, 2, 6, 7)):
        pictures = samples.see(np.random.default_rng(seed), episode, t, None, None)  # (4, H, W, 3)
        assert pictures.shape == (4, SIZE, 40, 3)
        for i, camera in enumerate(VIEWS):
            np.testing.assert_array_equal(pictures[i], episode.images[camera][t])
            then = episode.images[camera][min(t + HORIZON, 7)].astype(np.float32)
            if np.array_equal(pictures[2 + i], then):
                continue
            soft += 1  # softened: each pixel the mean of nine
            np.testing.assert_allclose(
                pictures[2 + i, 5, 7], then[4:7, 6:9].mean((0, 1)), rtol=1e-5
            )
    assert 0 < soft < 8
    assert samples[0]["pictures"].shape == (4, 4, 3, SIZE, 40)


def test_the_goal_controller_sees_present_and_painted_views():
    class Stub:
        def __init__(self):
            self.config = {"cameras": ["front", "goal_front"]}

        def paint(self, images, instructions):
            return {camera: picture + 1 for camera, picture in images.items()}

        def __call__(self, images, qpos, drop_state):
            return images, qpos, drop_state

    painter = Stub()
    painter.config = {"cameras": ["front"]}
    both = future.Following(painter, Stub())
    assert both.config["cameras"] == ["front"]  # those that the simulator has
    painted = both.paint({"front": np.zeros(1)}, ["reach"])
    images, qpos, drop_state = both(painted, "joints", ["reach"], True)
    assert images == {"front": np.zeros(1), "goal_front": np.ones(1)} and (qpos, drop_state) == (
        "joints",
        True,
    )


# ----------------------------------------------------------------------------------------------------------------- points
def point_samples():
    samples, config = samples_of(points.PointSamples)
    config["numbers_mean"] = np.full((4, 6), 0.1).tolist()
    return samples, config


def test_the_numbers_are_the_spheres_centres_and_directions_at_the_target():
    samples, _ = point_samples()
    episode = samples.frames[0][0]
    for t in (0, 2, 7):
        poses = episode.joint_poses[min(t + HORIZON, 7)][[*JOINTS, -1]]  # as recorded
        numbers = samples.true_numbers(episode, episode.target[t])
        np.testing.assert_allclose(numbers[:, :3] * 0.1 + 0.1, poses[:, :3, 3], atol=1e-4)
        np.testing.assert_allclose(numbers[:, 3:] * 0.5 + 0.1, poses[:, :3, 0], atol=1e-4)


def test_pictures_and_numbers_are_of_one_moment():
    samples, _ = point_samples()
    for seed in range(10):
        sample, again = samples.sample(np.random.default_rng(seed)), np.random.default_rng(seed)
        episode, t, present, target, chunk, _ = samples.motion(again)
        np.testing.assert_allclose(
            sample["numbers"], samples.true_numbers(episode, episode.target[t]).ravel(), rtol=1e-5
        )
        np.testing.assert_allclose(
            sample["joints"], (chunk - present)[:, :-1] / 0.3, rtol=1e-4, atol=1e-5
        )
        assert sample["open"] == target[-1]


def test_each_stage_learns_from_its_own_loss_alone():
    samples, config = point_samples()
    network, batch = points.Points(config), samples[0]
    only_second = deepcopy(batch)
    points.loss_of(network, batch).backward()
    eyes = network.numbers.weight.grad.clone()
    network.zero_grad()
    for name in only_second:
        if name.startswith("move_"):
            only_second[name] = only_second[name].flip(0)  # other motions
    only_second["move_numbers"] = only_second["move_numbers"] + 1
    points.loss_of(network, only_second).backward()
    torch.testing.assert_close(network.numbers.weight.grad, eyes)  # stage 2 does not notice
    joints, gripper = network.eval()(
        *(batch[name] for name in ("pictures", "state", "state_given", "words"))
    )
    assert joints.shape == (4, HORIZON, 7) and gripper.shape == (4, HORIZON)


def test_stage_three_does_not_see_a_state_that_is_left_out():
    samples, config = point_samples()
    network, numbers, gripper = (
        points.Points(config).eval(),
        torch.randn(2, points.NUMBERS),
        torch.ones(2),
    )
    goal = [
        network.follow(numbers, gripper, state, torch.zeros(2))
        for state in (torch.zeros(2, 8), torch.ones(2, 8))
    ]
    # The goal stays; the straight way to it begins elsewhere.
    torch.testing.assert_close(goal[0][0][:, -1] - goal[1][0][:, -1], torch.ones(2, 7))
    torch.testing.assert_close(goal[0][1], goal[1][1])


# ------------------------------------------------------------------------------------------------------------- the loop
def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path):
    samples, config = samples_of(loop.Samples)
    settings = loop.Settings(steps=4, batch=4, checkpoint_every=2, device="cpu")

    def run(folder, fail=False):
        torch.manual_seed(0)
        network, calls = diffusion.DiffusionPolicy(config), []

        def loss_of(network, batch):
            calls.append(1)
            if (
                fail and network.training and len(calls) > 9
            ):  # after two steps and the check that follows
                raise RuntimeError("power cut")
            return diffusion.loss_of(network, batch)

        loop.train(network, loss_of, samples, samples, settings, folder, config)
        return loop.load(diffusion.DiffusionPolicy, folder, "cpu")[0]

    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", fail=True)
    for name, value in run(tmp_path / "cut").state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], atol=1e-6, rtol=1e-4)
    rows = list(csv.DictReader((tmp_path / "cut/losses.csv").open()))
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3] and all(
        rows[i]["held_out"] for i in (1, 3)
    )
    settings.steps = 5
    with pytest.raises(UserError, match="steps 4, not 5"):
        run(tmp_path / "cut")


def test_what_is_not_trained_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="without --evaluate first"):
        loop.load(diffusion.DiffusionPolicy, tmp_path, "cpu")


# ---------------------------------------------------------------------------------------------------------- end to end
def command(*words):
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    run = tmp_path_factory.mktemp("variations") / "run"
    command(
        "collect_demos.py",
        "--run",
        run,
        "--tasks",
        "reach_target",
        "--scenes",
        2,
        "--image-size",
        SIZE,
    )
    command("render_spheres.py", "--run", run)
    return run


def test_the_painted_layer_is_the_future_where_it_differs(miniature):
    training, _, horizon = find_frames(miniature)
    settings = replace(future.Settings(), batch=5, painter_batch=5)
    futures = future.Futures(training, horizon, settings, augment=False)
    frames = futures.episodes[0]
    episode = read_episode(frames[0][0])
    chosen = [frames[0], frames[-1]]
    batch = futures.load(chosen, [np.random.default_rng(0)] * 2)
    for i, t in enumerate((0, len(frames) - 1)):
        now, then = (tile(torch.from_numpy(np.stack([episode.images[camera][k] for camera in CAMERAS])[None]).permute(0, 1, 4, 2, 3) / 255)[0]
                     for k in (t, min(t + horizon, len(frames) - 1)))  # fmt: skip
        torch.testing.assert_close(batch["observation"][i], now)
        torch.testing.assert_close(batch["layer"][i, :3], then)
        assert torch.equal(
            batch["layer"][i, 3] == 1, ((now - then).abs() > future.DIFFERENT).any(0)
        )
    assert (
        batch["layer"][0, 3].any() and not batch["layer"][1, 3].any()
    )  # the last frame is its own future
    assert futures[0]["layer"].shape == (5, 4, 2 * SIZE, 2 * SIZE)


@pytest.mark.parametrize("name, options, networks", [
    ("diffusion_policy", [], ["."]),
    ("future_frame", ["--painter-steps", 2, "--painter-batch", 2], ["painter", "controller"]),
    ("points", [], ["."]),
])  # fmt: skip
def test_each_variation_trains_and_drives(miniature, name, options, networks):
    script = ["variations/train_" + name + ".py", "--run", miniature, "--device", "cpu"]
    command(*script, "--steps", 2, "--batch", 2, *options)
    printed = command(*script, "--evaluate", "--scenes", 1, "--first-scene", 500000)
    folder = miniature / name
    for network in networks:
        for file in ("config.json", "model.safetensors", "losses.csv", "losses.png", "training.pt"):
            assert (folder / network / file).exists(), file
    report = json.loads((folder / f"evaluation_{name}.json").read_text())
    assert (
        report["policy"] == name
        and report["tasks"]["reach_target"]["episodes"] == 1
        and "reach_target" in printed
    )
    assert (
        report["seeds"] == {"first": 500000, "last": 500000}
        and (folder / f"reach_target_{name}.mp4").exists()
    )
