"""The SD-Turbo rung on a small folder of its layout (slow: of its true size).

What is trained, what is frozen, what is saved; and that it paints what diffusers' pipeline paints.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderTiny, ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from turbo import SMALL, TRUE, make_turbo

import train_controlnet
from genima.diffusion import LatentCache, draw_noise
from genima.episodes import CAMERAS
from genima.files import UserError
from genima.hub import check_hub
from genima.painter import PROMPT, TurboPainter, load_painter
from genima.painter_data import Augmentation, find_frames, read_batch
from genima.painter_training import advise_when_out_of_memory, check_settings, choose_precision
from train_controlnet import Settings, noise_loss, one_step_loss

RESOLUTION = 64
CONFIG = {
    "size": "sd-turbo",
    "objective": "one-step",
    "num_inference_steps": 1,
    "image_size": 16,
    "resolution": RESOLUTION,
    "horizon": 8,
    "cameras": list(CAMERAS),
}
PROMPTS = [PROMPT.format("push the blue button")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_turbo(tmp_path_factory.mktemp("base") / "sd-turbo")


def new_painter(base, **config):
    return TurboPainter.from_base(str(base), CONFIG | config)


def random_condition(resolution=RESOLUTION):
    return torch.rand(1, 3, resolution, resolution)


def stock_pipeline(base, controlnet, condition, steps=1, scale=1.0, **parts):
    """What diffusers' own pipeline paints: (B, 3, H, W) in 0..1."""
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        base, controlnet=controlnet, safety_checker=None, **parts
    )
    pipeline.set_progress_bar_config(disable=True)
    shape = (1, 4, condition.shape[2] // 8, condition.shape[3] // 8)
    return pipeline(
        PROMPTS[0],
        image=condition,
        num_inference_steps=steps,
        guidance_scale=0.0,
        latents=torch.randn(shape, generator=torch.Generator().manual_seed(0)),
        output_type="pt",
        controlnet_conditioning_scale=scale,
    ).images


def disturb(controlnet):
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter += 0.05 * torch.randn_like(parameter)


@pytest.mark.parametrize("steps", [1, 3])
def test_paints_what_diffusers_own_pipeline_paints(base, steps):
    painter = new_painter(base, num_inference_steps=steps).eval()
    condition = random_condition()
    before = painter.paint_tiled(condition, PROMPTS)
    stock = stock_pipeline(base, painter.controlnet, condition, steps)
    torch.testing.assert_close(before, stock, atol=1e-4, rtol=0)
    disturb(painter.controlnet)
    after = painter.paint_tiled(condition, PROMPTS)
    assert (after - before).abs().max() > 1e-3
    stock = stock_pipeline(base, painter.controlnet, condition, steps)
    torch.testing.assert_close(after, stock, atol=1e-4, rtol=0)


def test_before_the_first_step_the_controlnet_changes_nothing(base):
    painter = new_painter(base).eval()
    condition = random_condition()
    with_it = stock_pipeline(base, painter.controlnet, condition, scale=1.0)
    without = stock_pipeline(base, painter.controlnet, condition, scale=0.0)
    assert torch.equal(with_it, without)


def test_two_views_are_painted_side_by_side(base):
    """The networks take a picture that is not square."""
    painter = new_painter(base, cameras=["a", "b"]).eval()
    random = np.random.default_rng(0)
    images = {camera: random.integers(0, 256, (1, 16, 16, 3), np.uint8) for camera in "ab"}
    painted = painter.paint(images, ["push the blue button"])
    assert {camera: views.shape for camera, views in painted.items()} == {
        "a": (1, 16, 16, 3),
        "b": (1, 16, 16, 3),
    }
    condition = torch.rand(1, 3, RESOLUTION, 2 * RESOLUTION)
    stock = stock_pipeline(base, painter.controlnet, condition)
    torch.testing.assert_close(painter.paint_tiled(condition, PROMPTS), stock, atol=1e-4, rtol=0)


def batch_of(run, crop=2, count=2):
    data = find_frames(run)
    rngs = [np.random.default_rng(i) for i in range(count)]
    frames = data.training[:count]
    return read_batch(frames, data.cameras, RESOLUTION, rngs, Augmentation(crop=crop))


@pytest.mark.parametrize("objective, loss_of", [("one-step", one_step_loss), ("noise", noise_loss)])
def test_nothing_but_the_controlnet_learns(base, recorded, objective, loss_of):
    painter = new_painter(base, objective=objective)
    frozen = {}
    for name, value in painter.state_dict().items():
        if not name.startswith("controlnet."):
            frozen[name] = value.clone()
    assert {name.split(".")[0] for name in frozen} == {"unet", "vae", "text_encoder"}
    batch = batch_of(recorded)
    cache = LatentCache(painter)
    optimizer = torch.optim.AdamW([p for p in painter.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        loss = loss_of(painter, painter, batch, cache)
        losses.append(loss.item())
        loss.backward()
        gradients = {name: p.grad for name, p in painter.controlnet.named_parameters()}
        if step == 0:  # zero convolutions let no gradient past them at first, but learn themselves
            for name, gradient in gradients.items():
                if "controlnet_down_blocks" in name or "controlnet_mid_block" in name:
                    assert gradient.abs().max() > 0, name
        optimizer.step()
    for name, gradient in gradients.items():
        assert gradient is not None and torch.isfinite(gradient).all(), name
        if name.endswith("weight") and "conv" in name:
            assert gradient.abs().max() > 0, name
    assert losses[-1] < losses[0]
    state = painter.state_dict()
    assert all(torch.equal(state[name], value) for name, value in frozen.items())


def test_the_losses_are_zero_for_the_true_noise(base, recorded):
    painter = new_painter(base)
    batch = batch_of(recorded)
    cache = LatentCache(painter)
    target = cache.encode(batch)
    noise, timesteps = draw_noise(batch["seeds"], target)
    assert ((0 <= timesteps) & (timesteps < 1000)).all()
    assert not torch.equal(noise[0], noise[1])
    a = painter.scheduler.alphas_cumprod[999]

    def knows_the_target(condition, prompts, latents, timestep):
        return (latents - a.sqrt() * target) / (1 - a).sqrt()

    def knows_the_noise(condition, prompts, latents, timestep):
        return noise

    assert one_step_loss(painter, knows_the_target, batch, cache) < 1e-4
    assert noise_loss(painter, knows_the_noise, batch, cache) == 0


def test_target_latents_are_computed_once_where_no_crop_changes_them(base, recorded, monkeypatch):
    painter = new_painter(base)
    batch = batch_of(recorded, crop=0)
    cache = LatentCache(painter)
    first = cache.encode(batch)
    assert len(cache.latents) == 2
    assert torch.equal(first, cache.encode(batch | {"keys": [None, None]}))
    monkeypatch.setattr(painter, "encode_images", None)
    assert torch.equal(first, cache.encode(batch))


def test_a_prompt_is_encoded_once(base):
    painter = new_painter(base)
    hidden_states, _ = painter.encode_text(PROMPTS * 2)
    painter.text_encoder = None
    assert hidden_states.shape == (2, 77, SMALL["width"])
    assert torch.equal(painter.encode_text(PROMPTS)[0], hidden_states[:1])


# ------------------------------------------------------------------------------------- the command
def command(run, *words):
    return subprocess.run(
        [sys.executable, "train_controlnet.py", "--run", run, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def linked(recorded, run):
    """A run of its own, with the recorded episodes and spheres."""
    run.mkdir()
    for folder in ("episodes", "spheres"):
        (run / folder).symlink_to(recorded / folder)
    return run


def test_train_load_and_paint(base, recorded, tmp_path):
    run = linked(recorded, tmp_path / "run")
    words = ["--size", "sd-turbo", "--base", base, "--resolution", RESOLUTION, "--steps", 3]
    words += ["--batch-size", 2, "--crop", 0, "--keep", 1, "--checkpoint-every", 2]
    done = command(run, *words)
    assert done.returncode == 0, done.stderr
    folder = run / "controlnet"
    kept = {path.name for path in (folder / "step-3").iterdir()}
    assert kept == {"controlnet", "painter.json"} and not (folder / "step-2").exists()
    assert (folder / "validation.png").exists()
    facts = {"base": str(base), "tasks": ["push_button"], "fps": 10.0}
    config = json.loads((folder / "painter.json").read_text())
    assert len(config.pop("held_out")) == 3
    assert config == CONFIG | facts
    card = (folder / "README.md").read_text()
    assert "stability-ai-community" in card and "| objective | one-step |" in card

    random = np.random.default_rng(0)
    images = {camera: random.integers(0, 256, (1, 16, 16, 3), np.uint8) for camera in CAMERAS}
    painter = load_painter(folder)
    painted = painter.paint(images, ["push the blue button"])
    again = load_painter(folder).paint(images, ["push the blue button"])
    for camera in CAMERAS:
        assert painted[camera].shape == (1, 16, 16, 3)
        assert (painted[camera] == again[camera]).all()
    controlnet = ControlNetModel.from_pretrained(folder / "controlnet")
    learned = [p.abs().max() for p in controlnet.controlnet_mid_block.parameters()]
    assert max(learned) > 0
    condition = random_condition()
    stock = stock_pipeline(base, controlnet, condition)
    torch.testing.assert_close(painter.paint_tiled(condition, PROMPTS), stock, atol=1e-4, rtol=0)

    other = command(run, *words, "--objective", "noise")
    assert other.returncode == 2
    assert "was trained with objective one-step, not noise" in other.stderr
    assert len(other.stderr.splitlines()) == 1


def no_unet(base):
    (base / "unet/config.json").unlink()


def other_width(base):
    """A UNet of width 32 beside a text encoder of width 16."""
    make_turbo(base, SMALL | {"width": 32})
    narrow = make_turbo(base.with_name("narrow"))
    for file in (narrow / "text_encoder").iterdir():
        (base / "text_encoder" / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize(
    "damage, words",
    [
        (no_unet, "base/unet is no whole UNet2DConditionModel"),
        (other_width, "the UNet reads text of width 32, the text encoder gives 16"),
    ],
)
def test_a_base_that_is_none(tmp_path, damage, words):
    base = make_turbo(tmp_path / "base")
    damage(base)
    with pytest.raises(UserError, match=words):
        TurboPainter.from_base(str(base), CONFIG)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--base", "nobody/nothing-of-this-name"], "neither a folder here nor can it be fetched"),
        (["--resolution", 60], "is no multiple of 8"),
        (
            ["--batch-size", 3, "--micro-batch-size", 2],
            "is no multiple of 1 processes times --micro-batch-size 2",
        ),
    ],
)
def test_bad_settings_are_one_sentence(recorded, words, sentence, monkeypatch):
    script = ["train_controlnet.py", "--run", str(recorded), "--size", "sd-turbo"]
    monkeypatch.setattr(sys, "argv", script + [str(word) for word in words])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=sentence):
        train_controlnet.main()


@pytest.mark.parametrize(
    "able, size, precision, chosen",
    [
        ({"avx512_bf16": True}, "tiny", "auto", "bf16"),
        ({"amx_bf16": True}, "tiny", "auto", "bf16"),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, "tiny", "auto", "fp32"),
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, "tiny", "auto", "bf16"),
        ({}, "tiny", "auto", "fp32"),
        ({"avx512_bf16": True}, "sd-turbo", "auto", "fp32"),
        ({"avx512_bf16": True}, "tiny", "fp32", "fp32"),
        ({}, "sd-turbo", "bf16", "bf16"),
    ],
)
def test_bf16_where_the_machine_has_it(monkeypatch, able, size, precision, chosen):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_precision(size, precision) == chosen


def test_more_processes_than_samples():
    settings = Settings(batch_size=4, micro_batch_size=0)
    with pytest.raises(UserError, match="more processes \\(8\\) than samples a step \\(4\\)"):
        check_settings(settings, 8, list(CAMERAS))


def test_a_grid_of_views_that_the_networks_cannot_halve():
    settings = Settings(
        size="sd-turbo", steps=1, micro_batch_size=1, resolution=72, learning_rate=1e-5
    )
    check_settings(settings, 1, list(CAMERAS))
    with pytest.raises(UserError, match="72x108 pixels, which is no multiple of 8"):
        check_settings(settings, 1, ["a", "b", "c", "d", "e"])


def test_a_tiny_autoencoder_decodes_as_in_diffusers_own_pipeline(base, tmp_path):
    torch.manual_seed(0)
    taesd = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    taesd.save_pretrained(tmp_path / "taesd")
    new_painter(base).save(tmp_path)
    condition = random_condition()
    painter = load_painter(tmp_path, taesd=tmp_path / "taesd")
    painted = painter.paint_tiled(condition, PROMPTS)
    other = load_painter(tmp_path).paint_tiled(condition, PROMPTS)
    assert (painted - other).abs().max() > 0.01
    stock = stock_pipeline(base, painter.controlnet, condition, vae=taesd)
    torch.testing.assert_close(painted, stock, atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="nothing is no whole AutoencoderTiny"):
        load_painter(tmp_path, taesd=tmp_path / "nothing")


@pytest.mark.slow
def test_compiled_networks_paint_the_same(base, tmp_path):
    painter = new_painter(base)
    disturb(painter.controlnet)
    painter.save(tmp_path)
    condition = random_condition()
    plain = load_painter(tmp_path).paint_tiled(condition, PROMPTS)
    compiled = load_painter(tmp_path, compile=True).paint_tiled(condition, PROMPTS)
    torch.testing.assert_close(compiled, plain, atol=1e-3, rtol=0)


def test_out_of_memory_says_which_flag_to_lower():
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def fail_otherwise():
        raise RuntimeError("something else")

    with pytest.raises(UserError, match="lower --micro-batch-size"):
        advise_when_out_of_memory(fail)()
    with pytest.raises(RuntimeError, match="something else"):
        advise_when_out_of_memory(fail_otherwise)()


def test_without_a_network_nothing_is_uploaded_and_nothing_lost(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="cannot work .*without the flag everything stays"):
        check_hub("somebody/painter")
    with pytest.raises(UserError, match="cannot work"):
        check_hub("no such name")


@pytest.mark.slow
def test_true_size(tmp_path, recorded):
    """1.3 G parameters: load, a float32 step at 512x512, save, paint in diffusers' pipeline."""
    base = make_turbo(tmp_path / "base", TRUE)
    painter = new_painter(base, resolution=512)
    parameters = sum(p.numel() for p in painter.parameters()) / 1e9
    trained = sum(p.numel() for p in painter.parameters() if p.requires_grad) / 1e9
    assert 1.6 < parameters < 1.75 and 0.35 < trained < 0.37, (parameters, trained)
    del painter
    run = linked(recorded, tmp_path / "run")
    words = ["--size", "sd-turbo", "--base", base, "--steps", 1, "--batch-size", 1]
    done = command(run, *words, "--optimizer", "adafactor")
    assert done.returncode == 0, done.stderr
    controlnet = ControlNetModel.from_pretrained(run / "controlnet/controlnet")
    picture = stock_pipeline(base, controlnet, random_condition(512))[0]
    assert picture.shape == (3, 512, 512) and torch.isfinite(picture).all()
    pixels = (picture.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "painted.png")
