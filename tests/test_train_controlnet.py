"""Stage 2 with tiny: tiles, tokens, layers, batches, what is saved; stopped, killed and resumed."""

import csv
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time

import h5py
import numpy as np
import pytest
import torch
from conftest import call
from diffusers import ControlNetModel, EulerDiscreteScheduler, UNet2DConditionModel
from test_episodes import contents
from transformers import CLIPTextModel, CLIPTokenizer

import train_controlnet
from genima.diffusion import LatentCache
from genima.episodes import CAMERAS
from genima.files import UserError, run_stage
from genima.painter import PROMPT, TinyPainter, load_painter
from genima.painter_data import Augmentation, Frame, PainterDataset, find_frames, read_batch
from genima.tokenizer import MAX_TOKENS, train_tokenizer
from genima.views import composite, tile_views, untile_views
from train_controlnet import painting_loss

SIZE = 16  # pixels a view
INSTRUCTIONS = [
    "push the blue button",
    "push the white button",
    "touch the rose ball with the panda gripper",
    "take lid off the saucepan",
    "slide the block to the target",
    "stack 2 orange blocks",
    "close box",
]
CONFIG = {
    "size": "tiny",
    "objective": "one-step",
    "num_inference_steps": 1,
    "image_size": SIZE,
    "resolution": 2 * SIZE,
    "horizon": 8,
    "cameras": list(CAMERAS),
    "tasks": ["push_button"],
    "fps": 10.0,
}


def new_painter(**config):
    torch.manual_seed(0)
    return TinyPainter.from_scratch(INSTRUCTIONS, CONFIG | config).eval()


@pytest.fixture(scope="module")
def painter():
    """A painter that is not trained; the tests leave it so."""
    return new_painter()


def picture(seed=0, batch=1):
    return torch.rand(batch, 3, 2 * SIZE, 2 * SIZE, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------- tiles
def test_tiles_are_where_the_paper_puts_them():
    views = torch.rand(2, 4, 3, 5, 7)
    tiled = tile_views(views)
    assert CAMERAS == ("wrist", "front", "right_shoulder", "left_shoulder")
    assert tiled.shape == (2, 3, 10, 14)
    assert torch.equal(tiled[:, :, :5, :7], views[:, 0])
    assert torch.equal(tiled[:, :, :5, 7:], views[:, 1])
    assert torch.equal(tiled[:, :, 5:, :7], views[:, 2])
    assert torch.equal(tiled[:, :, 5:, 7:], views[:, 3])
    assert torch.equal(untile_views(tiled, 4), views)


@pytest.mark.parametrize(
    "count, rows, columns", [(1, 1, 1), (2, 1, 2), (3, 2, 2), (5, 2, 3), (6, 2, 3), (7, 3, 3)]
)
def test_any_number_of_views_is_tiled_and_empty_cells_are_black(count, rows, columns):
    views = 0.1 + torch.rand(2, count, 3, 5, 7)
    tiled = tile_views(views)
    assert tiled.shape == (2, 3, 5 * rows, 7 * columns)
    assert torch.equal(untile_views(tiled, count), views)
    assert (tiled > 0).sum() == views.numel()
    for i in range(count):  # row by row
        y = 5 * (i // columns)
        x = 7 * (i % columns)
        assert torch.equal(tiled[:, :, y : y + 5, x : x + 7], views[:, i])


def test_painting_nothing_gives_the_views_back(painter, monkeypatch):
    random = np.random.default_rng(0)
    images = {}
    for camera in reversed(CAMERAS):
        images[camera] = random.integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    logits = torch.full((2, 4, 2 * SIZE, 2 * SIZE), -30.0)
    monkeypatch.setattr(painter, "forward", lambda condition, prompts: logits)
    painted = painter.paint(images, INSTRUCTIONS[:2])
    for camera in CAMERAS:
        np.testing.assert_array_equal(painted[camera], images[camera])

    logits[1, [0, 3], :SIZE, SIZE:] = 30  # red, opaque, upper right
    painted = painter.paint(images, INSTRUCTIONS[:2])
    assert (painted["front"][1] == [255, 0, 0]).all()
    np.testing.assert_array_equal(painted["front"][0], images["front"][0])
    np.testing.assert_array_equal(painted["wrist"], images["wrist"])


@pytest.mark.parametrize(
    "cameras, height", [(["top"], SIZE), (["a", "b", "c", "d", "e"], 2 * SIZE)]
)
def test_a_painter_of_other_cameras_paints_those(cameras, height, monkeypatch):
    painter = new_painter(cameras=cameras, resolution=height)
    random = np.random.default_rng(0)
    images = {}
    for camera in [*cameras, "not asked for"]:
        images[camera] = random.integers(0, 256, (1, SIZE, SIZE, 3), np.uint8)
    painted = painter.paint(images, INSTRUCTIONS[:1])  # the networks take the grid's shape
    assert list(painted) == cameras
    assert all(painted[camera].shape == (1, SIZE, SIZE, 3) for camera in cameras)

    nothing = torch.full((1, 4, 1, 1), -30.0)
    monkeypatch.setattr(painter, "forward", lambda condition, prompts: nothing)
    painted = painter.paint(images, INSTRUCTIONS[:1])
    for camera in cameras:
        np.testing.assert_array_equal(painted[camera], images[camera])
    del images[cameras[0]]
    with pytest.raises(UserError, match=f"needs views of {cameras[0]}"):
        painter.paint(images, INSTRUCTIONS[:1])
    images[cameras[0]] = np.zeros((1, SIZE, 2 * SIZE, 3), np.uint8)
    with pytest.raises(UserError, match=f"trained on views of {SIZE}x{SIZE} pixels"):
        painter.paint(images, INSTRUCTIONS[:1])


# ------------------------------------------------------------------------------------------ tokens
def test_every_word_of_the_instructions_is_one_token(painter):
    tokenizer = painter.tokenizer
    for text in INSTRUCTIONS:
        for word in re.findall("[a-z]+", text):
            assert len(tokenizer(word).input_ids) == 3, word  # start, word, end
        ids = tokenizer(PROMPT.format(text)).input_ids
        tokens = tokenizer.tokenize(PROMPT.format(text))
        assert len(ids) <= MAX_TOKENS and tokenizer.unk_token_id not in ids[:-1]
        later = {word + "</w>" for word in text.split()[1:]}  # CLIP cuts 'touch into 't and ouch
        assert later <= set(tokens)
    different = {tuple(tokenizer(PROMPT.format(text)).input_ids) for text in INSTRUCTIONS}
    assert len(different) == len(INSTRUCTIONS)


def test_the_same_instructions_give_the_same_numbers():
    """Or a resumed training would mix the words up."""
    vocabularies = []
    for sentences in (INSTRUCTIONS, INSTRUCTIONS[::-1]):
        for _ in range(3):
            vocabularies.append(train_tokenizer(sentences).get_vocab())
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def test_unknown_words_become_bytes(painter, tmp_path):
    tokenizer = painter.tokenizer
    text = "polish the zebra's ñandú in 1984 猫 "
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    special = {tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}
    assert not special & set(ids[1:-1])
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")

    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(again) == len(tokenizer) == painter.text_encoder.config.vocab_size
    for sentence in (text, *INSTRUCTIONS):
        assert again(sentence).input_ids == tokenizer(sentence).input_ids


# ----------------------------------------------------------------------------------------- network
def test_an_untrained_controlnet_changes_nothing(painter, monkeypatch):
    """Its zero convolutions: training starts from what the UNet alone would paint."""
    condition = picture(batch=2)
    unet = painter.unet.forward

    def alone(*inputs, down_block_additional_residuals, mid_block_additional_residual, **named):
        return unet(*inputs, **named)

    with torch.no_grad():
        painted = painter(condition, INSTRUCTIONS[:2])
        monkeypatch.setattr(painter.unet, "forward", alone)
        assert painted.shape == (2, 4, 2 * SIZE, 2 * SIZE)
        assert torch.equal(painted, painter(condition, INSTRUCTIONS[:2]))


def test_diffusers_and_transformers_load_what_is_saved(tmp_path):
    painter = new_painter()
    with torch.no_grad():
        for parameter in painter.controlnet.parameters():  # as after training: nothing is zero
            parameter += 0.01 * torch.randn_like(parameter)
    painter.save(tmp_path)
    from_parts = TinyPainter(
        painter.config,
        tokenizer=CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"),
        text_encoder=CLIPTextModel.from_pretrained(tmp_path / "text_encoder"),
        unet=UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet"),
        controlnet=ControlNetModel.from_pretrained(tmp_path, subfolder="controlnet"),
        scheduler=EulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler"),
    ).eval()
    loaded = load_painter(tmp_path)
    assert loaded.config == painter.config
    with torch.no_grad():
        expected = painter(picture(), INSTRUCTIONS[:1])
        assert torch.equal(from_parts(picture(), INSTRUCTIONS[:1]), expected)
        assert torch.equal(loaded(picture(), INSTRUCTIONS[:1]), expected)
        assert not torch.equal(loaded(picture(), INSTRUCTIONS[1:2]), expected)
    files = {path.relative_to(tmp_path).as_posix() for path in contents(tmp_path)}
    assert files >= {
        "unet/diffusion_pytorch_model.safetensors",
        "controlnet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
    }
    assert not [file for file in files if file.startswith(".") or file.endswith(".bin")]
    with pytest.raises(UserError, match="holds no painter"):
        load_painter(tmp_path / "unet")
    old = {"size": "tiny", "steps": 1, "picture": 2 * SIZE}
    (tmp_path / "painter.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="rename 'picture' to 'resolution'"):
        load_painter(tmp_path)


def test_painting_loss_by_hand():
    """One picture of two pixels: the left one is the sphere's."""
    logits = torch.zeros(1, 4, 1, 2)  # paints grey, half transparent
    layer = torch.tensor([1.0, 0.0]).expand(1, 4, 1, 2)  # white and opaque; nothing
    observation = torch.zeros(1, 3, 1, 2)
    # Painted 0.5 * 0.5 = 0.25 in both; the truth is 1 and 0. Sphere pixels count twenty times.
    by_hand = math.log(2) + (20 * (1 - 0.25) + 1 * 0.25) / 2
    assert painting_loss(logits, layer, observation).item() == pytest.approx(by_hand, rel=1e-6)
    sure = torch.tensor([30.0, -30.0]).expand(1, 4, 1, 2)
    assert painting_loss(sure, layer, observation).item() == pytest.approx(0, abs=1e-6)


def test_the_same_picture_is_painted_as_the_instruction_says():
    """Overfitting on one picture: blue is on the left, white on the right."""
    painter = new_painter().train()
    observation = picture().expand(2, -1, -1, -1)
    y, x = torch.meshgrid(torch.arange(2 * SIZE), torch.arange(2 * SIZE), indexing="ij")
    discs = [(x - centre) ** 2 + (y - 20) ** 2 < 25 for centre in (7, 24)]
    alphas = torch.stack(discs).float()  # (2, H, W)
    layer = torch.stack([0 * alphas, alphas, alphas, alphas], dim=1)  # cyan
    prompts = [PROMPT.format(text) for text in INSTRUCTIONS[:2]]
    optimizer = torch.optim.AdamW(painter.parameters(), lr=1e-3)
    losses = []
    for _ in range(70):
        loss = painting_loss(painter(observation, prompts), layer, observation)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(painter.parameters(), 1.0)
        optimizer.step()
    assert losses[0] > 1 and losses[-1] < 0.1, (losses[0], losses[-1])
    with torch.no_grad():
        painted = painter.eval()(observation, prompts)[:, 3] > 0  # (2, H, W)
    overlap = np.zeros((2, 2))
    for i in range(2):
        for j in range(2):
            disc = alphas[j] > 0
            overlap[i, j] = (painted[i] & disc).sum() / (painted[i] | disc).sum()
    assert overlap.diagonal().min() > 0.9, overlap
    assert max(overlap[0, 1], overlap[1, 0]) < 0.1, overlap
    learned = [p.abs().max() for p in painter.controlnet.controlnet_down_blocks.parameters()]
    assert max(learned) > 0


def test_noise_becomes_the_picture_with_the_layer_in_any_number_of_steps(monkeypatch):
    painter = new_painter(objective="noise", num_inference_steps=4)
    condition = torch.rand(2, 3, 2 * SIZE, 2 * SIZE)
    layer = torch.rand(2, 4, 2 * SIZE, 2 * SIZE)
    timesteps = []
    seen = []

    def knowing(condition, prompts, latents, timestep):
        timesteps.append(timestep.item())
        seen.append(latents)
        return layer.logit()

    monkeypatch.setattr(painter, "forward", knowing)
    painted = painter.paint_tiled(condition, ["", ""])
    torch.testing.assert_close(painted, composite(layer, condition), atol=1e-4, rtol=0)
    assert timesteps == [999, 749, 499, 249]
    assert 0.9 < seen[0].std() < 1.1  # from noise of unit strength
    assert not torch.equal(seen[0], seen[1])
    far = (painter.decode_latents(seen[1]) - painted).abs().mean()
    near = (painter.decode_latents(seen[3]) - painted).abs().mean()
    assert near < 0.7 * far  # step by step, it clears up


# -------------------------------------------------------------------------------------------- data
def scene_of(frame):
    return frame.episode.split("/")[-1].split("_")[0]


def test_frames_are_found_and_some_scenes_held_out(recorded):
    data = find_frames(recorded)
    assert data.horizon == 8 and data.image_size == SIZE
    assert data.cameras == list(CAMERAS)  # in the paper's order, not in the file's
    assert {scene_of(frame) for frame in data.held_out} == {"1000001"}
    assert {scene_of(frame) for frame in data.training} == {"1000000"}
    assert all(text in data.instructions() for text in data.training[0].instructions)


def test_any_frame_draws_all_frames_equally_often(recorded):
    """By default the early ones of an episode come more often."""
    data = find_frames(recorded)
    frames = [data.training[0]] * 8 + data.training[-2:]  # an episode of eight frames, one of two
    frames = [frame._replace(episode=f"{i // 8}", t=i % 8) for i, frame in enumerate(frames)]
    for any_frame, long_ones, mean in ((True, 0.8, 2.9), (False, 0.5, 1.3)):
        dataset = PainterDataset(frames, data.cameras, None, None, any_frame=any_frame)
        drawn = [dataset.draw_frame(np.random.default_rng(i)) for i in range(2000)]
        assert abs(np.mean([frame.episode == "0" for frame in drawn]) - long_ones) < 0.04
        assert abs(np.mean([frame.t for frame in drawn]) - mean) < 0.2


def test_another_way_to_draw_frames_does_not_resume(recorded, tmp_path, capsys):
    words = ["--run", recorded, "--out", tmp_path, "--batch-size", 2, "--precision", "fp32"]
    words += ["--steps", 1, "--base", "none"]
    assert call(train_controlnet, *words, "--any-frame") == 0
    assert call(train_controlnet, *words) == 2
    assert "any_frame True, not None" in capsys.readouterr().err
    assert call(train_controlnet, *words, "--any-frame") == 0


def test_batches_depend_on_seed_and_step_alone(recorded):
    data = find_frames(recorded)

    def dataset(process=0, num_processes=1):
        return PainterDataset(
            data.training,
            data.cameras,
            resolution=2 * SIZE,
            augmentation=Augmentation(),
            batch_size=4,
            seed=5,
            process=process,
            num_processes=num_processes,
        )

    batches = dataset()
    first = batches[4]
    next_one = batches[5]
    again = dataset()[4]
    halves = [dataset(process, 2)[4] for process in range(2)]  # shared between two processes
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, again[name])
            assert torch.equal(value, torch.cat([half[name] for half in halves]))
        else:
            assert value == again[name] == halves[0][name] + halves[1][name]
    assert not torch.equal(first["condition"], next_one["condition"])
    assert len(set(first["seeds"])) == 4 and len(first["prompts"]) == 4
    assert first["condition"].shape == first["observation"].shape == (4, 3, 2 * SIZE, 2 * SIZE)
    assert first["layer"].shape == (4, 4, 2 * SIZE, 2 * SIZE)
    for name in ("condition", "observation", "layer"):
        assert first[name].min() >= 0 and first[name].max() <= 1


@pytest.fixture
def frames(tmp_path):
    """Eight times the same frame; its layer has the colours of the picture."""
    pictures = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 4), np.uint8)
    path = str(tmp_path / "both.hdf5")
    with h5py.File(path, "w") as root:
        for camera in CAMERAS:
            root[f"layers/{camera}"] = pictures
            root[f"observations/images/{camera}"] = pictures[..., :3]
    return [Frame(path, path, 0, ["push"])] * 8


def read(frames, resolution=2 * SIZE, augmentation=None):
    rngs = [np.random.default_rng(i) for i in range(len(frames))]
    return read_batch(frames, list(CAMERAS), resolution, rngs, augmentation)


def test_crop_moves_picture_and_layer_together_and_jitter_the_condition_alone(frames):
    batch = read(frames, augmentation=Augmentation(hue=0.0))
    observation = batch["observation"]
    colour = batch["layer"][:, :3]
    seen = (batch["layer"][:, 3:] > 0.01).expand(-1, 3, -1, -1)  # what is transparent has no colour
    torch.testing.assert_close(observation[seen], colour[seen])
    assert not torch.equal(observation[0], observation[1])
    assert (batch["condition"] - observation).abs().mean() > 0.01
    assert batch["prompts"] == [PROMPT.format("push")] * 8

    batch = read(frames)
    with h5py.File(frames[0].spheres, "r") as root:
        plain = torch.from_numpy(root["layers/wrist"][0]).permute(2, 0, 1) / 255  # (4, h, w)
    assert torch.equal(batch["condition"], batch["observation"])
    seen = plain[3] > 0.01
    torch.testing.assert_close(untile_views(batch["layer"], 4)[3, 2][:, seen], plain[:, seen])


# ---------------------------------------------------------------------------------- target latents
class CountingPainter:
    """Its latents are the pictures, scaled by a number of its own."""

    def __init__(self, scale):
        self.scale = scale
        self.encoded = 0

    def encode_images(self, images):
        self.encoded += len(images)
        return self.scale * images


def target_of(batch):
    return composite(batch["layer"], batch["observation"])


def test_painters_resolutions_and_crops_do_not_share_latents(frames):
    """Whatever was encoded before, the latents are those of this painter and of this picture."""
    small = read(frames[:1])
    large = read(frames[:1], resolution=4 * SIZE)
    caches = [LatentCache(CountingPainter(scale)) for scale in (1.0, 2.0)]
    for scale, cache in zip((1.0, 2.0), caches):
        for batch in (small, large, small):
            assert torch.equal(cache.encode(batch), scale * target_of(batch))
        assert cache.painter.encoded == 2  # each picture once

    for _ in range(2):
        cropped = read(frames, augmentation=Augmentation(crop=2))
        assert torch.equal(caches[0].encode(cropped), target_of(cropped))
    assert caches[0].painter.encoded == 2 + 2 * len(frames)  # never kept
    jittered = read(frames[:1], augmentation=Augmentation(crop=0))
    assert torch.equal(caches[0].encode(jittered), target_of(small))
    assert caches[0].painter.encoded == 2 + 2 * len(frames)  # the condition's colours alone differ


def test_a_batch_may_hold_old_and_new_pictures(frames):
    one = read(frames[:1])
    other = read(frames[:1])
    other["keys"] = ["another frame"]
    other["layer"] = 1 - one["layer"]
    both = {name: torch.cat([one[name], other[name]]) for name in ("layer", "observation")}
    both["keys"] = one["keys"] + other["keys"]
    cache = LatentCache(CountingPainter(1.0))
    cache.encode(other)
    assert torch.equal(cache.encode(both), target_of(both))
    assert cache.painter.encoded == 2


# -------------------------------------------------------------------- processes that run the stage
# The server imports the stage once, which takes seconds, and forks a process per run.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train_controlnet"])
STEPS, CHECKPOINT = 24, 8


def child(main, log, arguments):
    sys.argv = ["train_controlnet.py", *map(str, arguments)]
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as on the command line
    run_stage(main)


def start(run, *arguments, main=train_controlnet.main):
    """The stage in a process of its own; what it prints goes to <run>.out and <run>.err."""
    settings = ["--steps", STEPS, "--batch-size", 2, "--checkpoint-every", CHECKPOINT]
    if "--base" not in arguments:
        settings += ["--base", "none"]
    process = FORKS.Process(target=child, args=(main, run, ["--run", run, *settings, *arguments]))
    process.start()
    return process


def end(process, timeout=300):
    process.join(timeout)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def wait_until(condition, process):
    while not condition():
        assert process.is_alive(), "it ended too early"
        time.sleep(0.01)


def printed(run, name="err"):
    log = run.with_name(f"{run.name}.{name}")
    return log.read_text() if log.exists() else ""


@pytest.fixture(scope="module")
def trained(recorded):
    """A run in training, without a break, and a copy of the recorded one for a training with."""
    run, broken = (recorded.with_name(name) for name in ("trained", "broken"))
    shutil.copytree(recorded, run)
    shutil.copytree(recorded, broken)
    process = start(run)
    yield run, broken, process
    process.kill()


def test_a_stopped_training_resumes_to_the_same_losses(trained):
    run, broken, process = trained
    log = broken / "controlnet/losses.csv"

    stopped = start(broken)
    begun = re.compile(r"\| [1-9]\d*/")  # the progress bar counts
    wait_until(lambda: begun.search(printed(broken)), stopped)
    os.kill(stopped.pid, signal.SIGINT)  # Ctrl-C
    assert end(stopped) == 130
    said = re.search(
        r"Stopped after step (\d+): run the same command again to resume\.", printed(broken)
    )
    step = int(said[1])
    assert 0 < step < STEPS and len(log.read_text().splitlines()) == 1 + step

    before = log.stat().st_mtime_ns
    killed = start(broken)
    wait_until(lambda: log.stat().st_mtime_ns != before, killed)
    killed.kill()
    assert end(killed) == -signal.SIGKILL
    rows = list(csv.reader(log.open()))
    assert step < len(rows) - 1 < STEPS and (len(rows) - 1) % CHECKPOINT == 0  # a checkpoint, whole

    assert end(start(broken)) == 0 and end(process) == 0, printed(run)
    assert log.read_text() == (run / "controlnet/losses.csv").read_text()
    rows = list(csv.DictReader(log.open()))
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert [int(row["step"]) for row in rows if row["first_frame_iou"]] == [8, 16, 24]
    one, two = (load_painter(folder / "controlnet") for folder in (run, broken))
    assert torch.equal(one(picture(), INSTRUCTIONS[:1]), two(picture(), INSTRUCTIONS[:1]))
    assert "painter" in printed(run) and f"{STEPS}/{STEPS}" in printed(run)
    assert "IoU" in printed(run, "out")

    def all_but_the_lock():
        files = contents(run / "controlnet")
        return {path: content for path, content in files.items() if path.suffix != ".lock"}

    untouched = all_but_the_lock()
    assert end(start(run)) == 0
    assert "trained already" in printed(run, "out")
    assert all_but_the_lock() == untouched


def paint_larger_pictures():
    images = {camera: np.zeros((1, 2 * SIZE, 2 * SIZE, 3), np.uint8) for camera in CAMERAS}
    load_painter(sys.argv[2] + "/controlnet").paint(images, ["push the blue button"])


def first(run, folder):
    return sorted((run / folder).glob("*/*.hdf5"))[-1]


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_horizon(run):
    with h5py.File(first(run, "spheres"), "r+") as root:
        root.attrs["horizon"] = 20


def half_a_checkpoint(run):
    (run / "controlnet").mkdir()
    torch.save({"identity": {}, "step": 3}, run / "controlnet/training.pt")
    halve(run / "controlnet/training.pt")


def remove_episodes(run):
    shutil.rmtree(run / "episodes")


def remove_spheres(run):
    first(run, "spheres").unlink()


def halve_episode(run):
    halve(first(run, "episodes"))


def halve_spheres(run):
    halve(first(run, "spheres"))


def fail_everywhere(run):
    for path in run.glob("episodes/*/*.hdf5"):
        with h5py.File(path, "r+") as root:
            root.attrs["success"] = False


def add_a_camera(run):
    with h5py.File(first(run, "episodes"), "r+") as root:
        root["observations/images/top"] = root["observations/images/front"][()]


def change_nothing(run):
    pass


BAD = {  # what is damaged, further arguments, what is said
    "no episodes": (remove_episodes, [], "There is no HDF5 file in"),
    "no spheres": (remove_spheres, [], "is missing: draw the spheres first"),
    "two horizons": (change_horizon, [], "different horizons"),
    "half an episode": (halve_episode, [], "cannot be read"),
    "half a file of spheres": (halve_spheres, [], "cannot be read"),
    "nothing but failures": (fail_everywhere, [], "failed: record better ones, or use them"),
    "other cameras": (add_a_camera, [], "put them into different runs"),
    "half a checkpoint": (half_a_checkpoint, [], "training.pt cannot be read"),
    "no step": (change_nothing, ["--steps", "0"], "--steps must be 1 or more"),
}


@pytest.fixture(scope="module")
def bad_runs(recorded):
    """All of them, one process each, at once."""
    runs = {}
    for i, (what, (damage, arguments, _)) in enumerate(BAD.items()):
        run = recorded.with_name(f"bad{i}")
        shutil.copytree(recorded, run)
        damage(run)
        runs[what] = run, contents(run), start(run, *arguments)
    return runs


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence(bad_runs, what):
    run, before, process = bad_runs[what]
    assert end(process) == 2, printed(run)
    assert BAD[what][2] in printed(run) and (str(run) in printed(run) or what == "no step")
    assert len(printed(run).splitlines()) == 1
    assert contents(run) == before


def test_pictures_of_another_size_are_one_sentence(trained):
    run, _, process = trained
    assert end(process) == 0
    before = contents(run)
    assert end(start(run, main=paint_larger_pictures)) == 2
    sentence = (
        f"The painter was trained on views of {SIZE}x{SIZE} pixels from 'wrist', "
        f"these have {2 * SIZE}x{2 * SIZE}: render the observations in that size."
    )
    assert printed(run).splitlines()[-1] == sentence and "Traceback" not in printed(run)
    assert contents(run) == before


def test_a_checkpoint_is_refused_with_other_settings(trained):
    run, _, process = trained
    assert end(process) == 0
    before = contents(run)
    assert end(start(run, "--batch-size", "3")) == 2
    assert (
        "was trained with batch_size 2, not 3" in printed(run)
        and len(printed(run).splitlines()) == 1
    )
    checkpoint = torch.load(run / "controlnet/training.pt", weights_only=True)
    this = checkpoint["identity"]["precision"]  # bf16 where the CPU has it
    other = {"bf16": "fp32", "fp32": "bf16"}[this]
    assert end(start(run, "--precision", other)) == 2
    assert f"was trained with precision {this}, not {other}" in printed(run)
    assert contents(run) == before
    config = json.loads((run / "controlnet/painter.json").read_text())
    held_out = config.pop("held_out")
    assert held_out == [f"push_button/1000001_{variation:02d}.hdf5" for variation in range(3)]
    assert config == CONFIG
