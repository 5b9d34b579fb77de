"""Stage 3: what the controller is taught, that it learns it, that it resumes, and bad input."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, look_at, make_episode
from test_episodes import stage

import render_spheres
import train_act
from genima import textures
from genima.act import ACT, SIZES, Controller
from genima.demonstrations import Demonstration, read_demonstrations
from genima.episodes import find_episodes, read_episode
from genima.files import UserError, run_stage, write_hdf5
from genima.kinematics import Chain
from genima.motions import CAMERA_SHIFT, CAMERA_TURN, Motions, misplace_camera
from genima.spheres import FORMAT, draw_spheres, target_spheres
from train_act import COLUMNS, Samples, Settings, act_loss

HORIZON = 3
CAMERAS = ["wrist", "front"]  # in the order of the tiles
INPUTS = ["images", "state", "has_state", "bag_of_words"]  # of the network, after training


def write_targets(run, horizon=HORIZON):
    """What stage 3 reads of render_spheres.py's files."""
    for path in find_episodes(run / "episodes"):
        write_target(path, run / "spheres" / path.parent.name / path.name, horizon)


def write_target(source, target, horizon):
    episode = read_episode(source, images=False)
    later = np.minimum(np.arange(len(episode.qpos)) + horizon, len(episode.qpos) - 1)
    with write_hdf5(target) as root:
        root.attrs.update(format=FORMAT, horizon=horizon)
        root["target/qpos"] = np.hstack(
            [episode.qpos[later, :-1], np.round(episode.action[later, -1:])]
        )


def arguments(run, steps):
    words = ["--run", run, "--steps", steps, "--batch-size", 4, "--checkpoint-every", 4]
    return [str(word) for word in [*words, "--device", "cpu", "--precision", "fp32"]]


def train(run, *options, steps=4):
    """Run the stage in this process; the exit code."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        sys.argv[1:] = [*arguments(run, steps), *options]
        run_stage(train_act.main)
    except SystemExit as stop:
        return stop.code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def make_demonstration(frames=8):
    episode, *_ = make_episode(frames=frames)
    later = np.minimum(np.arange(frames) + HORIZON, frames - 1)
    gripper = np.round(episode.action[later, -1:])
    target = np.hstack([episode.qpos[later, :-1], gripper])
    chain = Chain.from_episode(episode)
    return Demonstration(**vars(episode), target=target, horizon=HORIZON, chain=chain)


def make_samples(frames=8, observation="spheres", batch_size=8, size="tiny"):
    """Samples of one synthetic demonstration, and their configuration."""
    demonstration = make_demonstration(frames)
    config = {
        "size": size,
        "observation": observation,
        "horizon": HORIZON,
        "joints": 7,
        "cameras": CAMERAS,
        "image_size": [32, 40],
        "vocabulary": [],
        "state_mean": demonstration.qpos.mean(0).tolist(),
        "state_std": [0.3] * 8,
    }
    motions = Motions([demonstration], [demonstration], shifted=observation == "spheres")
    scenes = [demonstration.images]
    return Samples(motions, scenes, config, Settings(batch_size=batch_size)), config


def test_actions_lead_from_the_shifted_current_joints_to_the_shifted_target():
    samples, _ = make_samples()
    moved = 0
    for seed in range(50):
        motion = samples.motions.draw(np.random.default_rng(seed))
        episode, t = motion.demonstration, motion.t
        delta = motion.current - episode.qpos[t]
        epsilon = motion.target - episode.target[t]
        moved += np.abs(delta).max() > 0.01 and np.abs(epsilon).max() > 0.01
        assert delta[-1] == epsilon[-1] == 0  # the gripper is not shifted
        for k in range(1, HORIZON + 1):
            assert motion.action_is_pad[k - 1] == (t + k - 1 >= len(episode.action))
            action = episode.action[min(t + k - 1, len(episode.action) - 1)]
            expected = action + delta * (1 - k / HORIZON) + epsilon * k / HORIZON
            np.testing.assert_allclose(motion.actions[k - 1], expected, atol=1e-5)
    assert moved > 10


def test_the_controller_draws_with_the_calibrated_cameras(run, tmp_path, monkeypatch, capsys):
    eye, mount = look_at((1.5, -0.5, 0.7), (0, 0, 0)), look_at((0.1, 0, 0), (0.05, 0, 0.3))
    intrinsics = [[50.0, 0, 21], [0, 50, 15], [0, 0, 1]]
    cameras = {
        "front": {"intrinsics": intrinsics, "world_from_camera": eye.tolist()},
        "wrist": {"intrinsics": intrinsics, "last_joint_from_camera": mount.tolist()},
    }
    (tmp_path / "cams.json").write_text(json.dumps(cameras))
    options = ("--run", run, "--horizon", 1, "--calibration", tmp_path / "cams.json")
    assert stage(monkeypatch, capsys, render_spheres.main, *options)[0] == 0
    for episode in read_demonstrations(run, images=False):
        np.testing.assert_array_equal(
            [episode.intrinsics[camera] for camera in cameras], [intrinsics, intrinsics]
        )
        np.testing.assert_allclose(episode.chain.fixed["front"], eye, atol=1e-6)
        np.testing.assert_allclose(episode.chain.mounted["wrist"], mount, atol=1e-5)


def test_one_frame_of_a_demonstration_is_kept_as_background(run):
    write_targets(run)
    for demonstration in read_demonstrations(run, images=False):
        recorded = read_episode(demonstration.path).images
        for camera, images in demonstration.images.items():
            assert images.shape == (1, 32, 40, 3)
            assert (images == recorded[camera]).all((1, 2, 3)).any()
    for demonstration in read_demonstrations(run, images=True):
        assert demonstration.images["front"].shape[0] == len(demonstration.qpos)


def test_without_spheres_nothing_is_shifted():
    samples, _ = make_samples(observation="rgb")
    for seed in range(10):
        motion = samples.motions.draw(np.random.default_rng(seed))
        episode, t = motion.demonstration, motion.t
        assert (motion.current == episode.qpos[t]).all()
        actions = motion.actions[~motion.action_is_pad]
        assert (actions == episode.action[t : t + HORIZON]).all()


def test_spheres_stand_at_the_target_and_are_seen_from_the_current_joints(monkeypatch):
    monkeypatch.setattr(train_act, "PAINTER_ERROR", 0)
    monkeypatch.setattr(train_act, "PAINTER_LAG", 0)
    monkeypatch.setattr(train_act, "CAMERAS_MOVED", 0)
    samples, _ = make_samples()
    rng = np.random.default_rng(0)
    motion = samples.motions.draw(rng)
    episode, chain = motion.demonstration, motion.demonstration.chain
    now = chain.forward_kinematics(motion.current[:-1])
    later = chain.forward_kinematics(motion.target[:-1])
    tool = later[-1, :3, 3]
    chain.fixed["front"] = look_at(tool + [1.2, 0.1, 0.3], tool + [0, 0.1, 0.1])
    chain.mounted["wrist"] = np.linalg.inv(now[-2]) @ look_at(tool + [0.4, 0, 0.2], tool)
    wrist, front = samples.draw_target(rng, motion)
    cameras = {"wrist": now[-2] @ chain.mounted["wrist"], "front": chain.fixed["front"]}
    for camera, layer in (("wrist", wrist), ("front", front)):
        spheres = target_spheres(later, motion.target[-1] == 1, camera)
        intrinsics = episode.intrinsics[camera]
        expected = draw_spheres(*spheres, intrinsics, cameras[camera], 32, 40).astype(int)
        assert np.abs(layer - expected).max() <= 1
    pose = cameras["front"]
    x, y, depth = (tool - pose[:3, 3]) @ pose[:3, :3]
    column, row = 40 * x / depth + 20, 40 * y / depth + 16
    assert front[int(row), int(column), 3] == 255

    motion.current = motion.current + 0.2
    wrist_again, front_again = samples.draw_target(rng, motion)
    assert (front_again == front).all() and (wrist_again != wrist).any()


def test_painters_errors_are_about_half_a_pixel_and_differ_between_views(monkeypatch):
    seen = []

    def record(poses, radii, colours, intrinsics, camera, height, width):
        seen.append(intrinsics @ ((poses[:, :3, 3] - camera[:3, 3]) @ camera[:3, :3]).T)
        return np.zeros((height, width, 4), np.uint8)

    monkeypatch.setattr(train_act, "draw_spheres", record)
    monkeypatch.setattr(train_act, "PAINTER_LAG", 0)
    monkeypatch.setattr(train_act, "CAMERAS_MOVED", 0)
    samples, _ = make_samples()
    rng = np.random.default_rng(0)
    motion = samples.motions.draw(rng)
    for _ in range(200):
        samples.draw_target(rng, motion)
    pixels = np.array([points[:2] / points[2] for points in seen[1::2]])  # (200, 2, S) in front
    assert 0.4 < pixels.std(0).mean() < 0.6
    other = np.array([points[:2] / points[2] for points in seen[0::2]])
    assert abs(np.corrcoef(pixels[:, 0, -1], other[:, 0, -1])[0, 1]) < 0.3


def draw_tools(monkeypatch, samples, motion, draws):
    """Where each view's last sphere was drawn, if painters made no errors: (draws, V, 3) metres."""
    drawn = []

    def record(poses, radii, colours, intrinsics, camera, height, width):
        drawn.append(poses[-1, :3, 3].copy())
        return np.zeros((height, width, 4), np.uint8)

    monkeypatch.setattr(train_act, "draw_spheres", record)
    monkeypatch.setattr(train_act, "PAINTER_ERROR", 0)
    monkeypatch.setattr(train_act, "CAMERAS_MOVED", 0)
    for seed in range(draws):
        samples.draw_target(np.random.default_rng(seed), motion)
    return np.reshape(drawn, (draws, -1, 3))


def test_a_single_camera_in_the_room_stays_behind_the_one_on_the_arm(monkeypatch):
    samples, _ = make_samples()
    motion = samples.motions.draw(np.random.default_rng(0))
    motion.target[:-1] = motion.current[:-1] + 0.3
    chain = motion.demonstration.chain
    target = chain.forward_kinematics(motion.target[:-1])[-1, :3, 3]
    wrist, front = draw_tools(monkeypatch, samples, motion, 200).transpose(1, 0, 2)
    np.testing.assert_allclose(wrist, np.tile(target, (200, 1)))
    lags = np.abs(front - target).max(1) > 1e-6
    assert 0.4 < lags.mean() < 0.6
    part = np.linspace(0, 1, 200)[:, None]
    between = motion.current[:-1] + part * (motion.target - motion.current)[:-1]
    path = chain.forward_kinematics(between)[:, -1, :3, 3]  # (200, 3)
    for tool in front[lags]:
        assert np.linalg.norm(path - tool, axis=1).min() < 0.003
    spread = np.linalg.norm(front[lags] - target, axis=1) / np.linalg.norm(path[0] - target)
    assert spread.min() < 0.2 and spread.max() > 0.8


@pytest.mark.parametrize("cameras", [["front"], ["wrist"], ["wrist", "front", "other"]])
def test_other_cameras_never_stay_behind(monkeypatch, cameras):
    samples, config = make_samples()
    motion = samples.motions.draw(np.random.default_rng(0))
    demonstration = motion.demonstration
    motion.target[:-1] = motion.current[:-1] + 0.3
    demonstration.chain.fixed["other"] = demonstration.chain.fixed["front"]
    demonstration.intrinsics["other"] = demonstration.intrinsics["front"]
    config["cameras"] = cameras
    target = demonstration.chain.forward_kinematics(motion.target[:-1])[-1, :3, 3]
    tools = draw_tools(monkeypatch, samples, motion, 20)
    np.testing.assert_allclose(tools, np.broadcast_to(target, tools.shape))


def test_a_batch_is_a_function_of_its_step():
    samples, _ = make_samples(batch_size=2)
    first, again, other = samples[5], samples[5], samples[6]
    assert all((first[key] == again[key]).all() for key in first)
    assert (first["images"] != other["images"]).any()
    assert first["images"].shape == (2, 2, 3, 32, 40) and first["images"].dtype == torch.uint8


def test_processes_share_a_batch():
    samples, config = make_samples(batch_size=4)
    whole = samples[5]
    for process in (0, 1):
        settings = Settings(batch_size=4)
        part = Samples(samples.motions, samples.scenes, config, settings, process, 2)[5]
        for name, values in part.items():
            assert (values == whole[name][2 * process : 2 * process + 2]).all()


def test_colour_jitter_keeps_what_it_should(monkeypatch):
    monkeypatch.setattr(textures, "NOISE", 0)
    monkeypatch.setattr(textures, "JITTER", np.zeros(4))
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.float32)
    unchanged = textures.jitter_and_add_noise(np.random.default_rng(0), images)
    assert (unchanged == images).all()
    # Neither saturation nor hue turns a grey into a colour.
    monkeypatch.setattr(textures, "JITTER", np.array([0, 0, 0.1, 0.05]))
    grey = np.full((1, 4, 4, 3), 100, np.float32)
    changed = textures.jitter_and_add_noise(np.random.default_rng(1), grey)
    assert np.abs(changed.astype(int) - 100).max() <= 1


def test_the_network_learns_one_batch_by_heart():
    torch.manual_seed(0)
    samples, config = make_samples()
    batch, model = samples[0], ACT(config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    before = act_loss(model, batch)[1]
    for _ in range(160):
        loss, parts = act_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert parts["joints"] < 0.3 * before["joints"] and parts["gripper"] < 0.5 * before["gripper"]


@pytest.mark.parametrize("size", ["tiny", "sd-turbo"])
def test_every_layer_of_the_decoder_is_used(size):
    torch.manual_seed(0)
    samples, config = make_samples(batch_size=2, size=size)
    model, batch = ACT(config).eval(), samples[0]
    inputs = [batch[key] for key in INPUTS]
    with torch.inference_mode():
        joints, gripper, posterior = model(*inputs)
        assert joints.shape == (2, HORIZON, 7) and gripper.shape == (2, HORIZON)
        assert posterior is None
        for layer in (model.decoder.layers[0], model.decoder.layers[-1]):
            layer.linear2.weight.normal_()
            changed, *_ = model(*inputs)
            assert (changed - joints).abs().max() > 1e-3
            joints = changed


def test_the_state_can_be_left_out():
    samples, config = make_samples(batch_size=2)
    model, batch = ACT(config).eval(), samples[0]
    with torch.inference_mode():
        batch["has_state"][:] = False
        one, *_ = model(*[batch[key] for key in INPUTS])
        batch["state"] += 0.5
        other, *_ = model(*[batch[key] for key in INPUTS])
    u = torch.arange(1, HORIZON + 1)[:, None] / HORIZON
    # The target is the same: relative to the current joints, it is nearer.
    torch.testing.assert_close(other, one - 0.5 * u, atol=1e-5, rtol=0)


def test_the_latent_is_used_in_training_and_can_be_left_out(monkeypatch):
    monkeypatch.setitem(SIZES["tiny"], "latent", 32)
    samples, config = make_samples(batch_size=2)
    batch, model = samples[0], ACT(config).eval()
    _, parts = act_loss(model, batch)
    assert parts["kl"] > 0
    joints, *_ = model(**batch)
    batch["latent_noise"] += 1
    assert (model(**batch)[0] - joints).abs().max() > 0

    monkeypatch.setitem(SIZES["tiny"], "latent", 0)
    batch, model = samples[0], ACT(config).eval()
    assert model.vae is None and batch["latent_noise"].shape == (2, 0)
    loss, parts = act_loss(model, batch)
    loss.backward()
    assert parts["kl"] == 0 and model.queries.grad.abs().max() > 0
    assert torch.equal(model(**batch)[0], model(*[batch[key] for key in INPUTS])[0])


def test_padded_actions_do_not_count():
    samples, config = make_samples(batch_size=2)
    batch, model = samples[0], ACT(config).eval()
    batch["action_is_pad"][:, 1:] = True
    before, _ = act_loss(model, batch)
    batch["actions"][:, 1:] += 1
    after, _ = act_loss(model, batch)
    assert before == after


def test_training_stopped_twice_gives_the_losses_of_an_uninterrupted_one(run):
    write_targets(run)
    assert train(run, steps=16) == 0
    expected = (run / "act/losses.csv").read_text()
    rows = list(csv.DictReader(expected.splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, 17))
    assert list(rows[0]) == COLUMNS
    assert float(rows[-1]["error"]) > 0 and rows[0]["error"] is None
    assert (run / "act/losses.png").stat().st_size > 10_000
    (run / "act").rename(run / "uninterrupted")

    command = [sys.executable, "train_act.py", *arguments(run, 16)]
    checkpoint, seen = run / "act/training.pt", 0
    for stop, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        while process.poll() is None and (
            not checkpoint.exists() or checkpoint.stat().st_mtime_ns == seen
        ):
            time.sleep(0.01)
        process.send_signal(stop)
        _, said = process.communicate()
        assert process.returncode == code, said
        seen = checkpoint.stat().st_mtime_ns
    assert "run the same command again to resume" in said and "Traceback" not in said
    assert 4 < torch.load(checkpoint, weights_only=True)["step"] < 16
    assert train(run, steps=16) == 0
    assert (run / "act/losses.csv").read_text() == expected


def test_a_trained_controller_is_loaded_and_says_what_it_cannot_do(run, capsys):
    write_targets(run)
    assert train(run) == 0
    assert train(run) == 0 and "trained already" in capsys.readouterr().out
    controller = Controller.load(run / "act")
    images = {
        camera: np.random.default_rng(0).integers(0, 256, (2, 32, 40, 3), np.uint8)
        for camera in (*CAMERAS, "overhead")
    }
    qpos = np.random.default_rng(1).normal(size=(2, 8)).astype(np.float32)
    chunks = controller(images, qpos)
    assert (
        chunks.shape == (2, HORIZON, 8) and ((chunks[..., -1] >= 0) & (chunks[..., -1] <= 1)).all()
    )
    single = controller({camera: pictures[1:] for camera, pictures in images.items()}, qpos[1:])
    np.testing.assert_allclose(single, chunks[1:], atol=1e-4)
    assert np.abs(controller(images, qpos, drop_state=True) - chunks).max() > 0
    with pytest.raises(UserError, match="images"):
        controller({camera: pictures[:, :16] for camera, pictures in images.items()}, qpos)
    with pytest.raises(UserError, match="images"):
        controller({"wrist": images["wrist"]}, qpos)
    with pytest.raises(UserError, match="7 joints"):
        controller(images, qpos[:, 1:])

    (run / "act/model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="no trained controller"):
        Controller.load(run / "act")


def test_the_baseline_reads_the_instruction(run):
    write_targets(run)
    assert train(run, "--observation", "rgb") == 0
    controller = Controller.load(run / "act_rgb")
    assert {"pick", "up", "cube", "lift"} <= set(controller.config["vocabulary"])
    images, qpos = (
        {camera: np.full((1, 32, 40, 3), 99, np.uint8) for camera in CAMERAS},
        np.zeros((1, 8)),
    )
    assert (
        np.abs(
            controller(images, qpos, ["lift it"]) - controller(images, qpos, ["pick up the cube"])
        ).max()
        > 0
    )
    with pytest.raises(UserError, match="instructions"):
        controller(images, qpos)


def test_bad_input_is_one_sentence(run, capsys):
    def sentence(*options, **settings):
        assert train(run, *options, **settings) == 2
        text = capsys.readouterr().err.strip().splitlines()[-1]
        return text[text.rfind("\r") + 1 :]

    assert "render_spheres.py" in sentence()  # no spheres yet
    write_targets(run)
    assert "1 or more" in sentence(steps=0)
    assert train(run) == 0
    assert "size tiny, not sd-turbo" in sentence("--size", "sd-turbo")
    assert "steps 4, not 5" in sentence(steps=5)
    (run / "act/training.pt").rename(run / "whole.pt")
    (run / "act/training.pt").write_bytes((run / "whole.pt").read_bytes()[:1000])
    assert "cannot be read" in sentence()
    (run / "whole.pt").replace(run / "act/training.pt")

    spheres = find_episodes(run / "spheres")
    spheres[1].unlink()
    path = find_episodes(run / "episodes")[1]
    write_target(path, spheres[1], HORIZON + 1)
    assert "horizon" in sentence()  # not all the same
    spheres[0].unlink()
    write_target(find_episodes(run / "episodes")[0], spheres[0], HORIZON + 1)
    assert "horizon 3, not 4" in sentence()  # not the checkpoint's
    spheres[0].write_bytes(b"")
    assert "cannot be read" in sentence()
    assert (
        json.loads((run / "act/config.json").read_text())["horizon"] == HORIZON
    )  # nothing is lost


def test_a_misplaced_camera_is_a_little_off_and_still_a_camera():
    pose = np.linalg.inv(look_at(np.array([1.0, 0.2, 0.5]), np.zeros(3)))
    for seed in range(20):
        moved = misplace_camera(np.random.default_rng(seed), pose)
        rotation = moved[:3, :3]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
        assert np.linalg.det(rotation) > 0
        assert 0 < np.abs(moved[:3, 3] - pose[:3, 3]).max() <= CAMERA_SHIFT
        cosine = (np.trace(pose[:3, :3].T @ rotation) - 1) / 2
        assert 0 < np.arccos(cosine) <= 1.75 * CAMERA_TURN  # about three axes at once
