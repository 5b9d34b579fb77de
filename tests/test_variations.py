"""The variations: each does what its head says, and runs from end to end on a miniature."""

import json
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "variations"))

import train_action_tokens as tokens
import train_diffusion_policy as diffusion
import train_future_frame as future
import train_points as points

from genima import training
from genima.demonstrations import read_demonstrations
from genima.files import UserError
from genima.painter import TinyPainter
from genima.painter_data import Augmentation, find_frames
from genima.spheres import JOINTS

VARIATIONS = {
    "action_tokens": tokens,
    "diffusion_policy": diffusion,
    "points": points,
    "future_frame": future,
}
CONTROLLER_FILES = ["config.json", "model.safetensors", "losses.csv", "losses.png", "training.pt"]
OUTPUTS = {name: CONTROLLER_FILES for name in VARIATIONS}
OUTPUTS["future_frame"] = [f"controller/{file}" for file in CONTROLLER_FILES]
OUTPUTS["future_frame"] += ["painter/painter.json", "painter/validation.png"]
OUTPUTS["future_frame"] += ["painter/losses.csv", "painter/training.pt"]
INPUTS = ("images", "state", "has_state", "bag_of_words")


def call(*words, cwd=ROOT):
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True
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


def inputs_of(batch):
    return [batch[name] for name in INPUTS]


def fit(network, loss_of, batch, steps):
    """Train on one batch; the losses."""
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    losses = []
    for _ in range(steps):
        loss = loss_of(network, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_reads_images_and_words(network, batch):
    """Nothing about a chunk is random. It changes with images and words."""
    images, state, has_state, words = inputs_of(batch)
    network.eval()
    with torch.no_grad():
        before = network(images, state, has_state, words)[0]
        assert torch.equal(before, network(images, state, has_state, words)[0])
        other_images = network(255 - images, state, has_state, words)[0]
        other_words = network(images, state, has_state, 1 - words)[0]
    assert before.shape == (len(state), network.horizon, 7)
    assert not torch.allclose(before, other_images, atol=1e-6)
    assert not torch.allclose(before, other_words, atol=1e-6)


# -------------------------------------------------------------------------------- Diffusion Policy
def test_denoising_ends_at_the_chunk_that_the_denoiser_sees(prepared, monkeypatch):
    config, samples = prepared
    network = diffusion.DiffusionPolicy(config).eval()
    actions = samples[0]["actions"]
    levels = []

    def denoise(noisy, level, *_):
        levels.append(int(level[0]))
        return network.normalise(actions)

    monkeypatch.setattr(network, "denoise", denoise)
    with torch.no_grad():
        joints, gripper_logits, _ = network(*inputs_of(samples[0]))
    assert len(levels) == diffusion.DENOISING_STEPS
    assert levels == sorted(levels, reverse=True)
    assert levels[0] == diffusion.NOISE_LEVELS - 1  # the level of the pure noise it starts from
    torch.testing.assert_close(joints, actions[..., :-1], atol=1e-5, rtol=1e-5)
    assert torch.equal(gripper_logits > 0, actions[..., -1] > 0.5)


def test_pure_noise_is_what_the_first_level_is_trained_on(prepared):
    network = diffusion.DiffusionPolicy(prepared[0])
    chunk = torch.ones(1, 3, 8)
    level = torch.tensor([diffusion.NOISE_LEVELS - 1])
    noisy = network.scheduler.add_noise(chunk, torch.zeros_like(chunk), level)
    assert noisy.abs().max() < 0.01  # nothing of the chunk is left


def test_every_joint_is_as_wide_and_the_gripper_is_minus_one_or_one(prepared):
    config, samples = prepared
    network = diffusion.DiffusionPolicy(config)
    rngs = [np.random.default_rng((0, i)) for i in range(400)]
    actions = [diffusion.relative_actions(samples.motions.draw(rng), config) for rng in rngs]
    actions = torch.tensor(np.array(actions)).float().flatten(0, 1)  # (N, A)
    numbers = network.normalise(actions)
    joints = numbers[:, :-1]
    torch.testing.assert_close(joints.mean(0), torch.zeros(7), atol=0.1, rtol=0)
    torch.testing.assert_close(joints.std(0), torch.full((7,), 0.5), atol=0.1, rtol=0)
    torch.testing.assert_close(numbers[:, -1], 2 * actions[:, -1] - 1)


def test_diffusion_policys_chunk_depends_on_images_and_words_and_nothing_random(prepared):
    config, samples = prepared
    torch.manual_seed(0)
    assert_reads_images_and_words(diffusion.DiffusionPolicy(config), samples[0])


def test_the_diffusion_loss_is_that_of_the_clean_chunk(prepared, monkeypatch):
    config, samples = prepared
    network = diffusion.DiffusionPolicy(config)
    batch = samples[0]
    truth = network.normalise(batch["actions"])
    truth = truth.repeat_interleave(diffusion.CHUNKS_PER_IMAGE, 0)
    monkeypatch.setattr(network, "denoise", lambda *_: truth + 0.5)
    assert diffusion.diffusion_loss(network, batch).item() == pytest.approx(0.25)


def test_diffusion_policy_learns_one_batch(prepared):
    config, samples = prepared
    torch.manual_seed(0)
    losses = fit(diffusion.DiffusionPolicy(config), diffusion.diffusion_loss, samples[0], 40)
    assert np.mean(losses[-5:]) < 0.4 * np.mean(losses[:3])


# ----------------------------------------------------------------------------------- action tokens
@pytest.fixture(scope="module")
def prepared_tokens(recorded):
    config, samples, _ = tokens.prepare_data(tokens.Settings(run=recorded, batch_size=2))
    config["vocabulary"] = config["vocabulary"][:6]
    return config, samples


def test_an_action_is_within_half_a_bin_of_its_token(prepared_tokens):
    config, _ = prepared_tokens
    network = tokens.ActionTokens(config)
    width = (network.highest - network.lowest) / tokens.BINS  # (K, A)
    random = torch.Generator().manual_seed(0)
    share = torch.rand(50, *width.shape, generator=random)
    actions = network.lowest + share * (network.highest - network.lowest)
    read = network.to_tokens(actions)
    assert read.shape == (50, width.numel()) and read.min() >= 0 and read.max() < tokens.BINS
    assert ((network.to_actions(read) - actions).abs() <= 0.501 * width).all()
    assert torch.equal(network.to_tokens(network.to_actions(read)), read)
    beyond = network.to_tokens(torch.stack([network.lowest - 9, network.highest + 9]))
    assert (beyond[0] == 0).all() and (beyond[1] == tokens.BINS - 1).all()


def test_the_last_step_is_said_first(prepared_tokens):
    config, _ = prepared_tokens
    network = tokens.ActionTokens(config)
    actions = ((network.lowest + network.highest) / 2)[None].clone()
    actions[0, -1, 2] = network.lowest[-1, 2]  # joint 3 in the last step
    middle = network.to_tokens(actions)[0]
    assert middle[2] == 0
    assert (middle == 0).sum() == 1


def test_a_token_is_predicted_from_those_before_it(prepared_tokens):
    config, samples = prepared_tokens
    network = tokens.ActionTokens(config).eval()
    batch = samples[0]
    said = network.to_tokens(batch["actions"])
    changed = said.clone()
    changed[:, 5] = (changed[:, 5] + 99) % tokens.BINS
    with torch.no_grad():
        encoded = network.encode(*inputs_of(batch))
        before = network.predict(said[:, :-1], *encoded)
        after = network.predict(changed[:, :-1], *encoded)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6], after[:, 6], atol=1e-6)


def test_the_tokens_depend_on_images_and_words_and_nothing_random(prepared_tokens):
    config, samples = prepared_tokens
    torch.manual_seed(0)
    network = tokens.ActionTokens(config).eval()
    images, state, has_state, words = inputs_of(samples[0])
    said = network.to_tokens(samples[0]["actions"])[:, :-1]

    def logits(images, words):
        with torch.no_grad():
            return network.predict(said, *network.encode(images, state, has_state, words))

    before = logits(images, words)
    assert torch.equal(before, logits(images, words))
    assert not torch.allclose(before, logits(255 - images, words), atol=1e-6)
    assert not torch.allclose(before, logits(images, 1 - words), atol=1e-6)


def test_a_word_that_is_not_said_is_not_read(prepared_tokens):
    config, samples = prepared_tokens
    network = tokens.ActionTokens(config).eval()
    images, state, has_state, words = inputs_of(samples[0])
    words = torch.zeros_like(words)
    words[:, 0] = 1
    with torch.no_grad():
        before, _ = network.encode(images, state, has_state, words)
        network.embed_words[1:] += torch.randn(len(words[0]) - 1, network.start.shape[-1])
        after, _ = network.encode(images, state, has_state, words)
        network.embed_words[0] += torch.randn(network.start.shape[-1])
        spoken, _ = network.encode(images, state, has_state, words)
    torch.testing.assert_close(before[:, 0], after[:, 0])
    assert not torch.allclose(after[:, 0], spoken[:, 0], atol=1e-4)


def test_action_tokens_learn_one_batch_by_heart(prepared_tokens):
    config, samples = prepared_tokens
    torch.manual_seed(0)
    network = tokens.ActionTokens(config)
    batch = samples[0]
    losses = fit(network, tokens.token_loss, batch, 220)
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        joints, gripper_logits, _ = network.eval()(*inputs_of(batch))
        said = network.decode(*network.encode(*inputs_of(batch)))
    assert torch.equal(said, network.to_tokens(batch["actions"]))
    width = (network.highest - network.lowest) / tokens.BINS
    assert ((joints - batch["actions"][..., :-1]).abs() <= 0.501 * width[:, :-1]).all()
    assert torch.equal(gripper_logits > 0, batch["actions"][..., -1] > 0.5)


# ------------------------------------------------------------------------------------ future frame
def test_the_layer_is_the_future_where_it_differs(recorded):
    data = find_frames(recorded)
    settings = future.Settings(run=recorded, batch_size=3)
    futures = future.Futures(data.training, data, settings)
    futures.augmentation = Augmentation(0, 0, 0, 0, 0)
    frame = data.training[0]
    batch = futures.read([frame], [np.random.default_rng(0)])
    later = frame._replace(t=frame.t + data.horizon)
    then = futures.read([later], [np.random.default_rng(0)])["observation"]
    torch.testing.assert_close(batch["layer"][:, :3], then)
    composed = future.composite(batch["layer"], batch["observation"])
    change = (then - batch["observation"]).abs().amax(1, keepdim=True) > future.DIFFERENT
    torch.testing.assert_close(composed, torch.where(change, then, batch["observation"]))
    assert 0 < change.float().mean() < 0.9
    last = [other for other in data.training if other.episode == frame.episode][-1]
    alpha = futures.read([last], [np.random.default_rng(0)])["layer"][:, 3]
    assert not alpha.any()  # the last frame is its own future


def test_early_frames_are_painted_more_often(recorded):
    data = find_frames(recorded)
    futures = future.Futures(data.training, data, future.Settings(run=recorded))
    drawn = [futures.draw_frame(np.random.default_rng(i)).t for i in range(300)]
    everything = [frame.t for frame in data.training]
    assert np.mean(drawn) < 0.8 * np.mean(everything)
    assert futures[0]["layer"].shape == (32, 4, 32, 32)


def test_the_controller_sees_present_and_painted_views():
    class Painter:
        config = {"cameras": ["front"]}

        def paint(self, images, instructions):
            assert instructions == ["reach"]
            return {camera: image + 1 for camera, image in images.items()}

    class Controller:
        config = {"cameras": ["front", "goal_front"], "image_size": [2, 2]}

        def __call__(self, images, qpos, instructions, drop_state):
            self.seen = images
            return qpos[:, None]

    following = future.FuturePolicy(Painter(), Controller())
    assert following.cameras == ("front",)  # those that the simulator has
    chunk, painted = following.act({"front": np.zeros((2, 2, 3))}, np.arange(8), "reach")
    assert list(following.controller.seen) == ["front", "goal_front"]
    np.testing.assert_array_equal(following.controller.seen["front"], np.zeros((1, 2, 2, 3)))
    np.testing.assert_array_equal(following.controller.seen["goal_front"], np.ones((1, 2, 2, 3)))
    np.testing.assert_array_equal(painted["front"], np.ones((2, 2, 3)))
    np.testing.assert_array_equal(chunk, np.arange(8)[None])


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


def test_images_and_numbers_are_of_one_moment(recorded):
    config, samples, _ = points.prepare_data(points.Settings(run=recorded, batch_size=2))
    for seed in range(10):
        sample = samples.sample(np.random.default_rng(seed))
        motion = samples.motions.draw(np.random.default_rng(seed))
        numbers = samples.true_numbers(motion).ravel()
        np.testing.assert_allclose(sample["numbers"], numbers, rtol=1e-4, atol=1e-5)
        assert sample["gripper"] == motion.target[-1]
        now = motion.demonstration.images[config["cameras"][0]][motion.t]
        shown = sample["images"][0].transpose(1, 2, 0).astype(float)
        correlation = np.corrcoef(now[2:-2, 2:-2].ravel(), shown[2:-2, 2:-2].ravel())[0, 1]
        assert correlation > 0.2  # cropped, its colours changed


def test_each_stage_learns_from_its_own_loss_alone(recorded):
    config, samples, _ = points.prepare_data(points.Settings(run=recorded, batch_size=2))
    network = points.Points(config)
    batch = samples[0]
    found = network.predict_numbers(batch["images"], batch["bag_of_words"])
    found.sum().backward()
    assert network.controller[0].weight.grad is None
    network.zero_grad()

    points.points_loss(network, batch).backward()
    head = network.number_head.weight.grad.clone()
    assert network.controller[0].weight.grad.abs().max() > 0
    network.zero_grad()
    for name in batch:
        if name.startswith("move_"):
            batch[name] = batch[name].flip(0)  # other motions
    batch["move_numbers"] = batch["move_numbers"] + 1
    points.points_loss(network, batch).backward()
    torch.testing.assert_close(network.number_head.weight.grad, head)  # stage 2 does not notice


def test_stage_3_does_not_see_a_state_that_is_left_out(recorded):
    config, _, _ = points.prepare_data(points.Settings(run=recorded, batch_size=2))
    network = points.Points(config).eval()
    numbers = torch.randn(2, points.NUMBERS)
    gripper = torch.ones(2)
    hidden = torch.zeros(2)
    chunk, logits = network.follow(numbers, gripper, torch.zeros(2, 8), hidden)
    moved, moved_logits = network.follow(numbers, gripper, torch.ones(2, 8), hidden)
    # The target stays; the straight way to it begins elsewhere.
    torch.testing.assert_close(chunk[:, -1] - moved[:, -1], torch.ones(2, 7))
    torch.testing.assert_close(logits, moved_logits)


# -------------------------------------------------------------------------------------- all of them
def train(name, run, *options):
    """The variation's main in this process; its exit code."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    words = ["--run", run, "--batch-size", 2, "--device", "cpu", *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"train_{name}.py", *map(str, words)])
        try:
            VARIATIONS[name].main()
        except SystemExit as stop:
            return stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return 0


def train_and_stop(monkeypatch, after, name, run, *options):
    """The same, and Ctrl-C in this step of this call."""
    stopping = SimpleNamespace(requested=False)
    seen = []
    make_batches = training.batches

    def batches(*arguments, **named):
        for batch in make_batches(*arguments, **named):
            seen.append(batch)
            stopping.requested = len(seen) == after
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(training, "batches", batches)
        patch.setattr(training, "StopSignal", lambda: stopping)
        return train(name, run, *options)


@pytest.mark.parametrize("name", VARIATIONS)
def test_each_variation_trains_resumes_and_drives(recorded, base, tmp_path, monkeypatch, name):
    run = tmp_path / "run"
    run.mkdir()
    (run / "episodes").symlink_to(recorded / "episodes")
    (run / "spheres").symlink_to(recorded / "spheres")
    options = ["--steps", 3, "--checkpoint-every", 2]
    stops = (1, 1)
    if name == "future_frame":
        options = ["--steps", 2, "--painter-steps", 2, "--painter-batch-size", 2, "--base", base]
        stops = (1, 2)  # in the painter's first step; then in the controller's first one
    for stop in stops:
        assert train_and_stop(monkeypatch, stop, name, run, *options) == 130
    assert train(name, run, *options) == 0
    for file in OUTPUTS[name]:
        assert (run / name / file).exists(), file

    whole = tmp_path / "whole"
    assert train(name, run, *options, "--out", whole) == 0
    for path in whole.rglob("losses.csv"):
        assert path.read_text() == (run / name / path.relative_to(whole)).read_text()
    longer = ["--painter-steps" if name == "future_frame" else "--steps", 4]
    with pytest.raises(UserError, match="steps"):
        train(name, run, *options, *longer)

    out = tmp_path / "out"
    drive = ["--tasks", "push_button", "--episodes", 1, "--videos", 0, "--out", out]
    call("evaluate.py", "--run", run, "--policy", f"variations/train_{name}.py:policy", *drive)
    report = json.loads((out / f"evaluation_{name}.json").read_text())
    assert report["policy"] == name
    assert report["tasks"]["push_button"]["episodes"] == 1


@pytest.mark.parametrize("name", VARIATIONS)
def test_what_is_not_trained_is_one_sentence(tmp_path, name):
    with pytest.raises(UserError, match=str(tmp_path)):
        VARIATIONS[name].policy(tmp_path, "cpu")


# ----------------------------------------------------------------------------- docs/fork-it.md
def fork_it(language):
    """The blocks of this language in docs/fork-it.md."""
    text = (ROOT / "docs/fork-it.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def fork_the_repository(folder):
    """A copy of the code with both diffs and both files of docs/fork-it.md."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    for diff in fork_it("diff"):
        done = subprocess.run(
            ["git", "apply", "-"], input=diff, cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    for code in fork_it("python"):
        name = code.splitlines()[0].removeprefix("# ")
        (folder / name).write_text(code)


def test_the_diffs_of_fork_it_fit_todays_code(tmp_path):
    fork_the_repository(tmp_path)
    assert "HoverOver" in (tmp_path / "sims/mujoco_tasks.py").read_text()
    assert "tool_vectors" in (tmp_path / "train_act.py").read_text()
    added = [line for line in fork_it("diff")[1].splitlines() if line.startswith("+class")]
    assert added == ["+class HoverOver(Task):"]


def test_half_way_the_sentence_names_another_button():
    heard = []

    class Genima:
        cameras = ("front",)
        image_size = (16, 16)

        def act(self, images, qpos, instruction):
            heard.append(instruction)
            return qpos, images

    module = {}
    exec(fork_it("python")[0], module)
    half_way = module["HalfWay"](Genima())
    task = SimpleNamespace(names=["rose", "white", "black"])
    for _ in range(2):
        half_way.reset(SimpleNamespace(task=task))
        for _ in range(3):
            half_way.act({}, None, "push the rose button")
    assert heard == 2 * ["push the rose button", *2 * ["push the white button"]]


@pytest.mark.slow
def test_the_forks_of_fork_it_run(recorded, tmp_path):
    folder = tmp_path / "fork"
    folder.mkdir()
    fork_the_repository(folder)
    run = ["--run", recorded]
    out = recorded / "act_tool"
    short = ["--steps", 2, "--batch-size", 2]
    call(folder / "train_act.py", *run, *short, "--observation", "rgb", "--out", out, cwd=folder)
    drive = ["--policy", "tool_policy.py:policy", "--episodes", 1, "--videos", 0]
    call(folder / "evaluate.py", *run, *drive, "--out", tmp_path / "out", cwd=folder)
    report = json.loads((tmp_path / "out/evaluation_tool_policy.json").read_text())
    assert report["tasks"]["push_button"]["episodes"] == 1

    hover = ["--tasks", "hover_over", "--scenes", 2, "--image-size", 16, "--run", tmp_path / "run"]
    printed = call(folder / "collect_demos.py", *hover, cwd=folder)
    assert "hover_over" in printed
    assert len(list((tmp_path / "run/episodes/hover_over").glob("*.hdf5"))) == 6

    solve = """
import sys
import numpy as np
from genima.kinematics import franka_chain
from tool_policy import inverse_kinematics
from train_act import tool_vectors
chain = franka_chain()
rng = np.random.default_rng(0)
start = np.array([0, -0.3, 0, -2.2, 0, 2.0, 0.8, 1])
for _ in range(20):
    there = start + np.append(rng.uniform(-0.2, 0.2, 7), 0)
    goal = tool_vectors(chain, there[None])[0, :-1]
    found = inverse_kinematics(chain, goal, start[:-1])
    reached = tool_vectors(chain, np.append(found, 1)[None])[0, :-1]
    assert np.abs(reached - goal).max() < 1e-4, np.abs(reached - goal).max()
"""
    call("-c", solve, cwd=folder)
