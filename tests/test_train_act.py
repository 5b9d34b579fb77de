"""Stage 3: what the controller is taught, that it learns it, that training survives a stop, and what it says to bad input."""

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
from genima.act import ACT, Controller
from genima.episodes import find_episodes, read_episode
from genima.files import UserError, run_stage, write_hdf5
from genima.kinematics import Chain
from genima.spheres import FORMAT, draw_spheres, target_spheres
from train_act import COLUMNS, Samples, Settings, losses_of

HORIZON = 3
CAMERAS = ["wrist", "front"]  # in the order of the tiles


def write_targets(run, horizon=HORIZON):
    """What the controller reads of render_spheres.py's files."""
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


def train(run, *options, steps=4):
    """Run the stage in this process; the exit code."""
    before = signal.getsignal(signal.SIGINT)
    try:
        sys.argv[1:] = [
            "--run",
            str(run),
            "--steps",
            str(steps),
            "--batch",
            "4",
            "--checkpoint-every",
            "4",
            "--device",
            "cpu",
            *options,
        ]
        run_stage(train_act.main)
    except SystemExit as stop:
        return stop.code
    finally:
        signal.signal(signal.SIGINT, before)
    return 0


def make_samples(frames=8, observation="spheres", batch=8, size="tiny"):
    """Samples of one synthetic episode, and their configuration."""
    episode, *_ = make_episode(frames=frames)
    later = np.minimum(np.arange(frames) + HORIZON, frames - 1)
    episode.target = np.hstack([episode.qpos[later, :-1], np.round(episode.action[later, -1:])])
    episode.chain = Chain.from_episode(episode)
    config = dict(
        size=size,
        observation=observation,
        horizon=HORIZON,
        joints=7,
        cameras=CAMERAS,
        image_size=[32, 40],
        vocabulary=[],
        state_mean=episode.qpos.mean(0).tolist(),
        state_std=[0.3] * 8,
    )
    return Samples([episode], [episode], config, Settings(batch=batch)), config


def test_chunks_lead_from_the_shifted_present_to_the_shifted_target():
    samples, _ = make_samples()
    moved = 0
    for seed in range(50):
        episode, t, present, target, chunk, valid = samples.motion(np.random.default_rng(seed))
        delta, epsilon = present - episode.qpos[t], target - episode.target[t]
        moved += np.abs(delta).max() > 0.01 and np.abs(epsilon).max() > 0.01
        assert delta[-1] == epsilon[-1] == 0  # the gripper is not shifted
        for k in range(1, HORIZON + 1):
            assert valid[k - 1] == (t + k - 1 < len(episode.action))
            action = episode.action[min(t + k - 1, len(episode.action) - 1)]
            np.testing.assert_allclose(
                chunk[k - 1], action + delta * (1 - k / HORIZON) + epsilon * k / HORIZON, atol=1e-5
            )
    assert moved > 10


def test_the_controller_draws_with_the_calibrated_cameras(run, tmp_path, monkeypatch, capsys):
    eye, mount = look_at((1.5, -0.5, 0.7), (0, 0, 0)), look_at((0.1, 0, 0), (0.05, 0, 0.3))
    intrinsics = [[50.0, 0, 21], [0, 50, 15], [0, 0, 1]]
    cameras = {
        "front": {"intrinsics": intrinsics, "world_from_camera": eye.tolist()},
        "wrist": {"intrinsics": intrinsics, "last_joint_from_camera": mount.tolist()},
    }
    (tmp_path / "cams.json").write_text(json.dumps(cameras))
    arguments = ("--run", run, "--horizon", 1, "--calibration", tmp_path / "cams.json")
    assert stage(monkeypatch, capsys, render_spheres.main, *arguments)[0] == 0
    for episode in train_act.read_run(Settings(run=run))[0]:
        np.testing.assert_array_equal(
            [episode.intrinsics[camera] for camera in cameras], [intrinsics, intrinsics]
        )
        np.testing.assert_allclose(episode.chain.fixed["front"], eye, atol=1e-6)
        np.testing.assert_allclose(episode.chain.mounted["wrist"], mount, atol=1e-5)


def test_without_spheres_nothing_is_shifted():
    samples, _ = make_samples(observation="rgb")
    for seed in range(10):
        episode, t, present, _, chunk, valid = samples.motion(np.random.default_rng(seed))
        assert (present == episode.qpos[t]).all() and (
            chunk[valid] == episode.action[t : t + HORIZON]
        ).all()


def test_spheres_stand_at_the_target_and_are_seen_from_the_present(monkeypatch):
    monkeypatch.setattr(train_act, "PAINTER_ERROR", 0)
    samples, _ = make_samples()
    random = np.random.default_rng(0)
    episode, _, present, target, _, _ = samples.motion(random)
    now, later = episode.chain.forward_kinematics(present[:-1]), episode.chain.forward_kinematics(target[:-1])
    tool = later[-1, :3, 3]
    episode.chain.fixed["front"] = look_at(tool + [1.2, 0.1, 0.3], tool + [0, 0.1, 0.1])
    episode.chain.mounted["wrist"] = np.linalg.inv(now[-2]) @ look_at(tool + [0.4, 0, 0.2], tool)
    wrist, front = samples.draw(random, episode, present, target)
    for camera, layer in (("wrist", wrist), ("front", front)):
        pose = (
            now[-2] @ episode.chain.mounted["wrist"]
            if camera == "wrist"
            else episode.chain.fixed["front"]
        )
        spheres = target_spheres(later, target[-1] == 1, camera)
        expected = draw_spheres(*spheres, episode.intrinsics[camera], pose, 32, 40).astype(int)
        assert np.abs(layer - expected).max() <= 1
    x, y, depth = (tool - pose[:3, 3]) @ pose[:3, :3]  # in the front camera
    column, row = 40 * x / depth + 20, 40 * y / depth + 16
    assert front[int(row), int(column), 3] == 255

    elsewhere = present + 0.2
    wrist_again, front_again = samples.draw(random, episode, elsewhere, target)
    assert (front_again == front).all() and (wrist_again != wrist).any()


def test_painters_errors_are_about_half_a_pixel_and_differ_between_views(monkeypatch):
    seen = []
    monkeypatch.setattr(
        train_act,
        "draw_spheres",
        lambda poses, radii, colours, intrinsics, camera, height, width: (
            seen.append(intrinsics @ ((poses[:, :3, 3] - camera[:3, 3]) @ camera[:3, :3]).T)
            or np.zeros((height, width, 4), np.uint8)
        ),
    )
    samples, _ = make_samples()
    random = np.random.default_rng(0)
    episode, _, present, target, _, _ = samples.motion(random)
    for _ in range(200):
        samples.draw(random, episode, present, target)
    pixels = np.array(
        [points[:2] / points[2] for points in seen[1::2]]
    )  # (200, 2, S) in the front view
    assert 0.4 < pixels.std(0).mean() < 0.6
    other = np.array([points[:2] / points[2] for points in seen[0::2]])
    assert abs(np.corrcoef(pixels[:, 0, -1], other[:, 0, -1])[0, 1]) < 0.3


def test_a_batch_is_a_function_of_its_step():
    samples, _ = make_samples(batch=2)
    first, again, other = samples[5], samples[5], samples[6]
    assert all((first[key] == again[key]).all() for key in first)
    assert (first["pictures"] != other["pictures"]).any()
    assert first["pictures"].shape == (2, 2, 3, 32, 40) and first["pictures"].dtype == torch.uint8


def test_colour_jitter_keeps_what_it_should(monkeypatch):
    monkeypatch.setattr(train_act, "NOISE", 0)
    monkeypatch.setattr(train_act, "JITTER", np.zeros(4))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.float32)
    assert (train_act.jitter(np.random.default_rng(0), pictures) == pictures).all()
    monkeypatch.setattr(
        train_act, "JITTER", np.array([0, 0, 0.1, 0.05])
    )  # neither turns a grey into a colour
    grey = np.full((1, 4, 4, 3), 100, np.float32)
    assert np.abs(train_act.jitter(np.random.default_rng(1), grey).astype(int) - 100).max() <= 1


def test_the_network_learns_one_batch_by_heart():
    torch.manual_seed(0)
    samples, config = make_samples()
    batch, model = samples[0], ACT(config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    before = losses_of(model, batch)[1]
    for _ in range(40):
        loss, parts = losses_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert parts["joints"] < 0.3 * before["joints"] and parts["gripper"] < 0.9 * before["gripper"]


@pytest.mark.parametrize("size", ["tiny", "sd-turbo"])
def test_every_layer_of_the_decoder_is_used(size):
    torch.manual_seed(0)
    samples, config = make_samples(batch=2, size=size)
    model, batch = ACT(config).eval(), samples[0]
    inputs = [batch[key] for key in ("pictures", "state", "state_given", "words")]
    with torch.inference_mode():
        joints, gripper, mean, _ = model(*inputs)
        assert joints.shape == (2, HORIZON, 7) and gripper.shape == (2, HORIZON) and mean is None
        for layer in (model.decoder.layers[0], model.decoder.layers[-1]):
            layer.linear2.weight.normal_()
            changed, *_ = model(*inputs)
            assert (changed - joints).abs().max() > 1e-3
            joints = changed


def test_the_state_can_be_left_out():
    samples, config = make_samples(batch=2)
    model, batch = ACT(config).eval(), samples[0]
    with torch.inference_mode():
        batch["state_given"][:] = False
        one, *_ = model(batch["pictures"], batch["state"], batch["state_given"], batch["words"])
        shift = torch.full_like(batch["state"], 0.5)
        other, *_ = model(
            batch["pictures"], batch["state"] + shift, batch["state_given"], batch["words"]
        )
    u = torch.arange(1, HORIZON + 1)[:, None] / HORIZON
    torch.testing.assert_close(
        other, one - 0.5 * u, atol=1e-5, rtol=0
    )  # the goal is the same: relative to now, it is nearer


def test_training_stopped_twice_gives_the_losses_of_an_uninterrupted_one(run):
    write_targets(run)
    assert train(run, steps=16) == 0
    expected = (run / "act/losses.csv").read_text()
    rows = list(csv.DictReader(expected.splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(16)) and tuple(rows[0]) == COLUMNS
    assert float(rows[-1]["error"]) > 0 and rows[0]["error"] is None
    assert (run / "act/losses.png").stat().st_size > 10_000
    (run / "act").rename(run / "uninterrupted")

    command = [
        sys.executable,
        "train_act.py",
        "--run",
        str(run),
        "--steps",
        "16",
        "--batch",
        "4",
        "--checkpoint-every",
        "4",
        "--device",
        "cpu",
    ]
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
    assert "the same command goes on" in said and "Traceback" not in said
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
    with pytest.raises(UserError, match="pictures"):
        controller({camera: pictures[:, :16] for camera, pictures in images.items()}, qpos)
    with pytest.raises(UserError, match="pictures"):
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
