"""The SD-Turbo rung on a small folder of its layout (and, slow, one of its true size): what is trained, what is frozen, what is saved."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderTiny, ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from test_train_controlnet import recorded  # noqa: F401  (a fixture)
from turbo import SMALL, TRUE, make_turbo

import train_controlnet
from genima.episodes import CAMERAS
from genima.files import UserError
from genima.painter import PROMPT, Painter, load_turbo
from train_controlnet import (
    Settings,
    draw_noise,
    find_frames,
    load,
    noise_loss,
    one_step_loss,
    targets,
)

PICTURE = 64
CONFIG = {
    "size": "sd-turbo",
    "objective": "one-step",
    "steps": 1,
    "image_size": 16,
    "picture": PICTURE,
    "horizon": 8,
    "cameras": list(CAMERAS),
}
PROMPTS = [PROMPT.format("push the blue button")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_turbo(tmp_path_factory.mktemp("base") / "sd-turbo")


def new_painter(base, **config):
    return Painter(load_turbo(str(base)), CONFIG | {"base": str(base)} | config)


def stock_pipeline(base, controlnet, condition, steps=1, scale=1.0):
    """What diffusers' own pipeline paints: (B, 3, H, W) in 0..1."""
    return paint(
        StableDiffusionControlNetPipeline.from_pretrained(
            base, controlnet=controlnet, safety_checker=None
        ),
        condition,
        steps,
        scale,
    )


def paint(pipeline, condition, steps, scale):
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(
        (1, 4, condition.shape[2] // 8, condition.shape[3] // 8),
        generator=torch.Generator().manual_seed(0),
    )
    return pipeline(PROMPTS[0], image=condition, num_inference_steps=steps, guidance_scale=0.0, latents=noise, output_type="pt",
                    controlnet_conditioning_scale=scale).images  # fmt: skip


def disturb(controlnet):
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter += 0.05 * torch.randn_like(parameter)


@pytest.mark.parametrize("steps", [1, 3])
def test_paints_what_diffusers_own_pipeline_paints(base, steps):
    painter = new_painter(base, steps=steps).eval()
    condition = torch.rand(1, 3, PICTURE, PICTURE)
    before = painter.paint_tiles(condition, PROMPTS)
    torch.testing.assert_close(
        before, stock_pipeline(base, painter.controlnet, condition, steps), atol=1e-4, rtol=0
    )
    disturb(painter.controlnet)
    after = painter.paint_tiles(condition, PROMPTS)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(
        after, stock_pipeline(base, painter.controlnet, condition, steps), atol=1e-4, rtol=0
    )


def test_before_the_first_step_the_controlnet_changes_nothing(base):
    painter = new_painter(base).eval()
    condition = torch.rand(1, 3, PICTURE, PICTURE)
    with_it, without = (
        stock_pipeline(base, painter.controlnet, condition, scale=scale) for scale in (1.0, 0.0)
    )
    assert torch.equal(with_it, without)


def batch_of(run, settings, count=2):
    training, _, _ = find_frames(run)
    return load(
        training[:count], [np.random.default_rng(i) for i in range(count)], settings, augment=True
    )


@pytest.mark.parametrize("objective, loss", [("one-step", one_step_loss), ("noise", noise_loss)])
def test_nothing_but_the_controlnet_learns(base, recorded, objective, loss):  # noqa: F811
    painter = new_painter(base, objective=objective)
    frozen = {
        name: value.clone()
        for name, value in painter.state_dict().items()
        if not name.startswith("controlnet.")
    }
    batch = batch_of(recorded, Settings(size="sd-turbo", picture=PICTURE)) | {"keys": None}
    optimizer = torch.optim.AdamW([p for p in painter.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        losses.append(loss(painter, painter, batch))
        losses[-1].backward()
        gradients = {
            name: parameter.grad for name, parameter in painter.controlnet.named_parameters()
        }
        if step == 0:  # zero convolutions let no gradient past them at first, but learn themselves
            outer = [
                g
                for name, g in gradients.items()
                if "controlnet_down_blocks" in name or "controlnet_mid_block" in name
            ]
            assert all(g.abs().max() > 0 for g in outer)
        optimizer.step()
    assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
    assert all(
        gradients[name].abs().max() > 0
        for name in gradients
        if name.endswith("weight") and "conv" in name
    )
    assert losses[-1] < losses[0]
    state = painter.state_dict()
    assert all(torch.equal(state[name], value) for name, value in frozen.items())
    assert {name.split(".")[0] for name in frozen} == {"unet", "vae", "text_encoder"}


def test_the_one_step_loss_is_zero_for_the_true_noise(base, recorded):  # noqa: F811
    painter = new_painter(base)
    batch = batch_of(recorded, Settings(size="sd-turbo", picture=PICTURE)) | {"keys": None}
    target = targets(painter, batch)
    noise, timesteps = draw_noise(batch["seeds"], target)
    assert ((0 <= timesteps) & (timesteps < 1000)).all() and not torch.equal(noise[0], noise[1])
    a = painter.scheduler.alphas_cumprod[999]
    knowing = lambda condition, prompts, latent, timestep: (
        (latent - a.sqrt() * target) / (1 - a).sqrt()
    )  # noqa: E731
    assert one_step_loss(painter, knowing, batch) < 1e-4
    assert noise_loss(painter, lambda *inputs: noise, batch) == 0


def test_target_latents_are_computed_once_where_no_crop_changes_them(base, recorded, monkeypatch):  # noqa: F811
    painter, kept = new_painter(base), {}
    batch = batch_of(recorded, Settings(size="sd-turbo", picture=PICTURE, crop=0))
    first = targets(painter, batch, kept)
    assert len(kept) == 2 and torch.equal(first, targets(painter, batch | {"keys": None}))
    monkeypatch.setattr(painter, "encode", None)
    assert torch.equal(first, targets(painter, batch, kept))


def test_a_prompt_is_read_once(base):
    painter = new_painter(base)
    words, _ = painter.read(PROMPTS * 2)
    painter.text_encoder = None
    assert words.shape == (2, 77, SMALL["width"]) and torch.equal(
        painter.read(PROMPTS)[0], words[:1]
    )


# --------------------------------------------------------------------------------------------------------- the command
def command(run, *words):
    return subprocess.run(
        [sys.executable, "train_controlnet.py", "--run", run, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_train_load_and_paint(base, recorded, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    run.mkdir()
    for folder in ("episodes", "spheres"):
        (run / folder).symlink_to(recorded / folder)
    words = [
        "--size",
        "sd-turbo",
        "--base",
        base,
        "--picture",
        PICTURE,
        "--steps",
        3,
        "--batch",
        2,
        "--crop",
        0,
        "--keep",
        1,
        "--checkpoint-every",
        2,
    ]
    done = command(run, *words)
    assert done.returncode == 0, done.stderr
    folder = run / "controlnet"
    assert {path.name for path in (folder / "step-3").iterdir()} == {
        "controlnet",
        "painter.json",
    } and (folder / "validation.png").exists()
    config, card = (
        json.loads((folder / "painter.json").read_text()),
        (folder / "README.md").read_text(),
    )
    assert (
        config == CONFIG | {"base": str(base)}
        and "stability-ai-community" in card
        and "| objective | one-step |" in card
    )

    images = {
        camera: np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
        for camera in CAMERAS
    }
    painter = Painter.load(folder)
    painted, again = (
        painter.paint(images, ["push the blue button"]),
        Painter.load(folder).paint(images, ["push the blue button"]),
    )
    assert all(
        (painted[camera] == again[camera]).all() and painted[camera].shape == (1, 16, 16, 3)
        for camera in CAMERAS
    )
    controlnet = ControlNetModel.from_pretrained(folder / "controlnet")
    assert (
        max(p.abs().max() for p in controlnet.controlnet_mid_block.parameters()) > 0
    )  # it has learned something
    condition = torch.rand(1, 3, PICTURE, PICTURE)
    torch.testing.assert_close(
        painter.paint_tiles(condition, PROMPTS),
        stock_pipeline(base, controlnet, condition),
        atol=1e-4,
        rtol=0,
    )

    other = command(run, *words[:-2], "--objective", "noise")
    assert (
        other.returncode == 2
        and "was trained with objective one-step, not noise" in other.stderr
        and len(other.stderr.splitlines()) == 1
    )


def no_unet(base):
    (base / "unet/config.json").unlink()


def other_width(base):
    config = json.loads((base / "unet/config.json").read_text())
    make_turbo(base, SMALL | {"width": 32})
    (base / "text_encoder/config.json").write_text(
        json.dumps(json.loads((base / "text_encoder/config.json").read_text()))
    )
    make_turbo(base.with_name("narrow"))
    for file in (base.with_name("narrow") / "text_encoder").iterdir():
        (base / "text_encoder" / file.name).write_bytes(file.read_bytes())
    assert config["cross_attention_dim"] == 16


@pytest.mark.parametrize(
    "damage, words",
    [
        (no_unet, "has no whole unet/"),
        (other_width, "the UNet reads words of width 32, the text encoder gives 16"),
    ],
)
def test_a_base_that_is_none(tmp_path, damage, words):
    base = make_turbo(tmp_path / "base")
    damage(base)
    with pytest.raises(UserError, match=words):
        load_turbo(str(base))


@pytest.mark.parametrize("words, sentence", [
    (["--base", "nobody/nothing-of-this-name"], "neither a folder here nor can it be fetched"),
    (["--picture", 60], "is no multiple of 8"),
    (["--batch", 3, "--at-once", 2], "is no multiple of 1 processes times 2 samples"),
])  # fmt: skip
def test_bad_settings_are_one_sentence(recorded, words, sentence, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(
        sys,
        "argv",
        ["train_controlnet.py", "--run", str(recorded), "--size", "sd-turbo", *map(str, words)],
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=sentence):
        train_controlnet.main()


@pytest.mark.parametrize("able, size, precision, bf16", [
    ({"avx512_bf16": True}, "tiny", "auto", True), ({"amx_bf16": True}, "tiny", "auto", True), ({}, "tiny", "auto", False),
    ({"avx512_bf16": True}, "sd-turbo", "auto", False), ({"avx512_bf16": True}, "tiny", "fp32", False), ({}, "sd-turbo", "bf16", True)])  # fmt: skip
def test_bf16_where_the_machine_has_it(monkeypatch, able, size, precision, bf16):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (
        train_controlnet.in_bf16(train_controlnet.Settings(size=size, precision=precision)) is bf16
    )


def test_more_processes_than_samples():
    class Accelerator:
        num_processes, device = 8, torch.device("cpu")

    with pytest.raises(UserError, match="more processes \\(8\\) than samples a step \\(4\\)"):
        train_controlnet.check_settings(Settings(batch=4), Accelerator, 16)


def test_a_tiny_autoencoder_decodes_as_in_diffusers_own_pipeline(base, tmp_path):
    torch.manual_seed(0)
    AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4,
                    num_decoder_blocks=(1,) * 4).save_pretrained(tmp_path / "taesd")  # fmt: skip
    new_painter(base).save(tmp_path)
    condition, painter = (
        torch.rand(1, 3, PICTURE, PICTURE),
        Painter.load(tmp_path, taesd=tmp_path / "taesd"),
    )
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        base, controlnet=painter.controlnet, vae=AutoencoderTiny.from_pretrained(tmp_path / "taesd"), safety_checker=None)  # fmt: skip
    assert (
        painter.paint_tiles(condition, PROMPTS)
        - Painter.load(tmp_path).paint_tiles(condition, PROMPTS)
    ).abs().max() > 0.01
    torch.testing.assert_close(
        painter.paint_tiles(condition, PROMPTS),
        paint(pipeline, condition, 1, 1.0),
        atol=1e-4,
        rtol=0,
    )
    with pytest.raises(UserError, match="is no tiny autoencoder"):
        Painter.load(tmp_path, taesd=tmp_path / "nothing")


@pytest.mark.slow
def test_compiled_networks_paint_the_same(base, tmp_path):
    painter = new_painter(base)
    disturb(painter.controlnet)
    painter.save(tmp_path)
    condition = torch.rand(1, 3, PICTURE, PICTURE)
    plain, compiled = (
        Painter.load(tmp_path, compile=compiled).paint_tiles(condition, PROMPTS)
        for compiled in (False, True)
    )
    torch.testing.assert_close(compiled, plain, atol=1e-3, rtol=0)


def test_out_of_memory_says_which_flag_to_lower(monkeypatch):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train_controlnet, "main", fail)
    with pytest.raises(UserError, match="lower --at-once"):
        train_controlnet.main_within_memory()


def test_without_a_network_nothing_is_uploaded_and_nothing_lost(monkeypatch):
    from genima.hub import check_hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="cannot work .*without the flag everything stays"):
        check_hub("somebody/painter")
    with pytest.raises(UserError, match="cannot work"):
        check_hub("no such name")


@pytest.mark.slow
def test_true_size(tmp_path, recorded):  # noqa: F811
    """1.3 G parameters: load, ControlNet from the UNet, a float32 step at 512x512, save, diffusers' pipeline, one picture."""
    base = make_turbo(tmp_path / "base", TRUE)
    painter = new_painter(base, picture=512)
    parameters = sum(p.numel() for p in painter.parameters()) / 1e9
    trained = sum(p.numel() for p in painter.parameters() if p.requires_grad) / 1e9
    assert 1.6 < parameters < 1.75 and 0.35 < trained < 0.37, (parameters, trained)
    del painter
    run = tmp_path / "run"
    run.mkdir()
    for folder in ("episodes", "spheres"):
        (run / folder).symlink_to(recorded / folder)
    done = command(
        run,
        "--size",
        "sd-turbo",
        "--base",
        base,
        "--steps",
        1,
        "--batch",
        1,
        "--optimizer",
        "adafactor",
    )
    assert done.returncode == 0, done.stderr
    controlnet = ControlNetModel.from_pretrained(run / "controlnet/controlnet")
    picture = stock_pipeline(base, controlnet, torch.rand(1, 3, 512, 512))[0]
    assert picture.shape == (3, 512, 512) and torch.isfinite(picture).all()
    Image.fromarray((picture.permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(
        tmp_path / "painted.png"
    )
