"""The variations: each does what its head says, and runs from end to end on a miniature."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "variations"))

import train_diffusion_policy as diffusion
import train_future_frame as future
import train_points as points

from genima.demonstrations import read_demonstrations
from genima.painter import TinyPainter
from genima.painter_data import find_frames
from genima.spheres import JOINTS

OUTPUTS = {
    "diffusion_policy": ["config.json", "model.safetensors", "losses.csv", "training.pt"],
    "points": ["config.json", "model.safetensors", "losses.csv", "training.pt"],
    "future_frame": ["painter/painter.json", "painter/validation.png", "controller/config.json"],
}


def call(*words):
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def base(recorded, tmp_path_factory):
    """A base for views of 16x16."""
    data = find_frames(recorded)
    config = {
        "size": "tiny",
        "objective": "one-step",
        "num_inference_steps": 1,
        "image_size": 16,
        "resolution": 32,
        "horizon": 0,
        "cameras": data.cameras,
    }
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    TinyPainter.from_scratch(data.instructions(), config).save(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(recorded):
    """Config and samples of Diffusion Policy on the recorded run."""
    settings = diffusion.Settings(run=recorded, batch_size=4)
    config, samples, _ = diffusion.prepare_data(settings)
    return config, samples


# -------------------------------------------------------------------------------- Diffusion Policy
def inputs_of(batch):
    return [batch[name] for name in ("images", "state", "has_state", "bag_of_words")]


def test_denoising_ends_at_the_chunk_that_the_denoiser_sees(prepared, monkeypatch):
    config, samples = prepared
    network = diffusion.DiffusionPolicy(config).eval()
    chunk = torch.rand(4, config["horizon"], 8) * 1.6 - 0.8
    levels = []

    def denoise(noisy, level, *_):
        levels.append(int(level[0]))
        return chunk

    monkeypatch.setattr(network, "denoise", denoise)
    with torch.no_grad():
        joints, gripper_logits, _ = network(*inputs_of(samples[0]))
    assert len(levels) == diffusion.DENOISING_STEPS
    assert levels == sorted(levels, reverse=True) and levels[-1] == 0
    torch.testing.assert_close(joints, chunk[..., :-1] * network.action_scale[:-1])
    assert torch.equal(gripper_logits > 0, chunk[..., -1] > 0)


def test_a_chunk_depends_on_images_and_words_and_nothing_random(prepared):
    config, samples = prepared
    torch.manual_seed(0)
    network = diffusion.DiffusionPolicy(config).eval()
    images, state, has_state, words = inputs_of(samples[0])
    with torch.no_grad():
        before = network(images, state, has_state, words)[0]
        assert before.shape == (4, config["horizon"], 7)
        assert torch.equal(before, network(images, state, has_state, words)[0])
        other_images = network(255 - images, state, has_state, words)[0]
        other_words = network(images, state, has_state, 1 - words)[0]
    assert not torch.allclose(before, other_images, atol=1e-6)
    assert not torch.allclose(before, other_words, atol=1e-6)


def test_the_diffusion_loss_is_that_of_the_clean_chunk(prepared, monkeypatch):
    config, samples = prepared
    network = diffusion.DiffusionPolicy(config)
    batch = samples[0]
    joints = batch["actions"][..., :-1] / network.action_scale[:-1]
    truth = torch.cat([joints, 2 * batch["actions"][..., -1:] - 1], -1)
    truth = truth.repeat_interleave(diffusion.CHUNKS_PER_IMAGE, 0)
    assert truth[..., :-1].abs().max() <= 1.5  # what the noise expects
    monkeypatch.setattr(network, "denoise", lambda *_: truth + 0.5)
    assert diffusion.diffusion_loss(network, batch).item() == pytest.approx(0.25)


def test_diffusion_policy_learns_one_batch(prepared):
    config, samples = prepared
    torch.manual_seed(0)
    network = diffusion.DiffusionPolicy(config)
    batch = samples[0]
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    losses = []
    for _ in range(40):
        loss = diffusion.diffusion_loss(network, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.4 * np.mean(losses[:3])


# ------------------------------------------------------------------------------------ future frame
def test_the_layer_is_the_future_where_it_differs(recorded):
    data = find_frames(recorded)
    settings = future.Settings(run=recorded, painter_batch_size=3)
    futures = future.Futures(data, settings)
    frame = data.training[0]
    batch = futures.read([frame], [np.random.default_rng(0)])
    later = frame._replace(t=frame.t + data.horizon)
    then = futures.read([later], [np.random.default_rng(0)])["observation"]
    composed = future.composite(batch["layer"], batch["observation"])
    change = (then - batch["observation"]).abs().amax(1, keepdim=True) > future.DIFFERENT
    torch.testing.assert_close(composed, torch.where(change, then, batch["observation"]))
    assert 0 < change.float().mean() < 0.9


def test_goals_are_the_same_views_some_steps_later(recorded, monkeypatch):
    demonstrations = read_demonstrations(recorded, images=True, seed=0)
    motions = future.Motions(demonstrations, demonstrations, shifted=False)
    config = future.describe(demonstrations, with_words=False)
    cameras = config["cameras"]
    config["cameras"] = [*cameras, *[f"goal_{name}" for name in cameras]]
    config.update(motions.state_statistics(0))
    goals = future.Goals(motions, config, future.Settings(batch_size=2))
    monkeypatch.setattr(future.textures, "random_crop", lambda rng, image: image)
    monkeypatch.setattr(future.textures, "jitter_and_add_noise", lambda rng, images: images)
    soft = 0
    for seed in range(8):
        motion = motions.draw(np.random.default_rng(seed))
        images = goals.sample(np.random.default_rng(seed))["images"].transpose(0, 2, 3, 1)
        recorded_images = motion.demonstration.images
        later = min(motion.t + config["horizon"], len(motion.demonstration.qpos) - 1)
        for i, camera in enumerate(cameras):
            np.testing.assert_array_equal(images[i], recorded_images[camera][motion.t])
            then = recorded_images[camera][later].astype(np.float32)
            if np.array_equal(images[len(cameras) + i], then):
                continue
            soft += 1  # each pixel is the mean of nine
            pixel = images[len(cameras) + i, 5, 7]
            np.testing.assert_allclose(pixel, then[4:7, 6:9].mean((0, 1)), rtol=1e-5)
    assert 0 < soft < 8 * len(cameras)


# ------------------------------------------------------------------------------------------ points
def test_the_numbers_are_where_the_spheres_would_be(recorded):
    settings = points.Settings(run=recorded, batch_size=2)
    config, samples, _ = points.prepare_data(settings)
    motion = samples.motions.draw(np.random.default_rng(3))
    numbers = samples.true_numbers(motion) * points.UNIT + config["numbers_mean"]  # (S, 6)
    demonstration = motion.demonstration
    last = len(demonstration.qpos) - 1
    later = min(motion.t + config["horizon"], last)
    poses = demonstration.joint_poses[later][[*JOINTS, -1]]
    np.testing.assert_allclose(numbers[:, :3], poses[:, :3, 3], atol=2e-4)
    np.testing.assert_allclose(numbers[:, 3:], poses[:, :3, 0], atol=2e-3)


def test_no_gradient_passes_between_the_two_stages(recorded):
    settings = points.Settings(run=recorded, batch_size=2)
    config, samples, _ = points.prepare_data(settings)
    network = points.Points(config)
    batch = samples[0]
    found = network.predict_numbers(batch["images"], batch["bag_of_words"])
    found.sum().backward()
    assert network.controller[0].weight.grad is None
    points.points_loss(network, batch).backward()
    assert network.controller[0].weight.grad.abs().max() > 0


# ---------------------------------------------------------------------------------------- all three
@pytest.mark.parametrize("name", OUTPUTS)
def test_each_variation_trains_and_drives(recorded, base, tmp_path, name):
    run = tmp_path / "run"
    run.mkdir()
    (run / "episodes").symlink_to(recorded / "episodes")
    (run / "spheres").symlink_to(recorded / "spheres")
    options = ["--run", run, "--steps", 2, "--batch-size", 2, "--device", "cpu"]
    if name == "future_frame":
        options += ["--painter-steps", 2, "--painter-batch-size", 2, "--base", base]
    call(f"variations/train_{name}.py", *options)
    for file in OUTPUTS[name]:
        assert (run / name / file).exists(), file
    policy = f"variations/train_{name}.py:policy"
    out = tmp_path / "out"
    drive = ["--tasks", "push_button", "--episodes", 1, "--videos", 0, "--out", out]
    call("evaluate.py", "--run", run, "--policy", policy, *drive)
    report = json.loads((out / f"evaluation_{name}.json").read_text())
    assert report["tasks"]["push_button"]["episodes"] == 1
