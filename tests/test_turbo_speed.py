"""Painting and training with SD-Turbo at a GPU's speed, as far as a CPU can tell.

A CUDA graph needs a GPU: `python tools/benchmark_gpu.py` compares its picture with the plain one.
"""

import json
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderTiny
from test_sd_turbo import PROMPTS, RESOLUTION, disturb, new_painter, random_condition
from turbo import make_turbo

from genima import micro_batch
from genima.files import UserError
from genima.micro_batch import Peak, choose_micro_batch, largest_that_fits, resolve_micro_batch
from genima.turbo_speed import speed_up
from tools import benchmark_gpu
from train_controlnet import Settings, one_step_loss


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_turbo(tmp_path_factory.mktemp("base") / "sd-turbo")


def two_conditions(resolution=RESOLUTION):
    return torch.cat([random_condition(resolution), random_condition(resolution)])


@pytest.mark.parametrize("steps", [1, 3])
def test_the_same_pictures_as_one_by_one(base, steps):
    painter = new_painter(base, num_inference_steps=steps).eval()
    disturb(painter.controlnet)
    condition = two_conditions()
    prompts = PROMPTS + ["another sentence"]
    plain = [painter.paint_tiled(condition, prompts, seed) for seed in (0, 1)]
    assert (plain[0] - plain[1]).abs().max() > 0.01
    sentence = speed_up(painter, compiled=False)
    assert "no CUDA GPU" in sentence and "without a CUDA graph" in sentence
    for seed in (0, 1, 0):
        fast = painter.paint_tiled(condition, prompts, seed)
        torch.testing.assert_close(fast, plain[seed], atol=1e-5, rtol=0)


def test_another_resolution_is_painted_without_it(base):
    painter = new_painter(base).eval()
    small = random_condition(RESOLUTION // 2)
    plain = painter.paint_tiled(small, PROMPTS)
    speed_up(painter, compiled=False)
    assert torch.equal(painter.paint_tiled(small, PROMPTS), plain)


def test_two_views_side_by_side(base):
    painter = new_painter(base, cameras=["a", "b"]).eval()
    condition = torch.rand(1, 3, RESOLUTION, 2 * RESOLUTION)
    plain = painter.paint_tiled(condition, PROMPTS)
    speed_up(painter, compiled=False)
    assert painter.paint_tiled.condition.shape == condition.shape
    fast = painter.paint_tiled(condition, PROMPTS)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=0)


def test_text_is_encoded_once_and_the_encoder_can_be_dropped(base):
    painter = new_painter(base).eval()
    speed_up(painter, compiled=False)
    condition = random_condition()
    first = painter.paint_tiled(condition, PROMPTS)
    painter.encode_text = None
    assert torch.equal(painter.paint_tiled(condition, PROMPTS), first)


def test_pictures_of_one_call_are_not_written_over_by_the_next(base):
    painter = new_painter(base).eval()
    speed_up(painter, compiled=False)
    first = painter.paint_tiled(random_condition(), PROMPTS)
    before = first.clone()
    painter.paint_tiled(random_condition(), PROMPTS)
    assert torch.equal(first, before)


def test_with_a_tiny_autoencoder(base):
    torch.manual_seed(0)
    painter = new_painter(base).eval()
    painter.vae = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    condition = random_condition()
    plain = painter.paint_tiled(condition, PROMPTS)
    speed_up(painter, compiled=False)
    fast = painter.paint_tiled(condition, PROMPTS)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------- how many samples at once
GB = 10**9


@pytest.mark.parametrize(
    "available, share, fits",
    [
        (100, 8, 8),
        (17, 8, 8),  # 10 for one, and 7 more
        (16, 8, 4),  # 7 would fit, but do not divide 8
        (13, 8, 4),
        (12, 8, 2),
        (10, 8, 1),
        (9, 8, 0),
        (16, 6, 6),
        (15, 7, 1),
    ],
)
def test_the_largest_part_of_a_batch_that_fits(available, share, fits):
    peak = Peak(one=10 * GB, further=GB)
    assert largest_that_fits(peak, share, available * GB) == fits
    assert largest_that_fits(None, share, available * GB) == 0


@pytest.mark.parametrize(
    "available, count, checkpointing",
    [
        (80, 8, False),
        (40, 4, False),  # 4 keep a GPU busy, so nothing is computed twice
        (30, 8, True),  # without checkpointing only 2
        (15, 8, True),
        (9, 4, True),
        (8, 1, True),
    ],
)
def test_checkpointing_only_where_memory_asks_for_it(monkeypatch, available, count, checkpointing):
    """A sample's activations take 8 GB, or 0.2 GB with checkpointing; weights and so on 8 GB."""
    switched = []

    def measure_peak(compute):
        if switched[-1]:
            return Peak(8 * GB, GB // 5)
        return Peak(12 * GB, 8 * GB)

    monkeypatch.setattr(micro_batch, "available_bytes", lambda: (available + 3) * GB)
    monkeypatch.setattr(micro_batch, "measure_peak", measure_peak)
    found, sentence = choose_micro_batch(None, switched.append, 8, optimizer_bytes=3 * GB)
    assert (found, switched[-1]) == (count, checkpointing)
    word = "with" if checkpointing else "without"
    assert sentence.startswith(f"{count} samples at once {word} gradient checkpointing")


def test_a_gpu_too_small_for_one_sample(monkeypatch):
    monkeypatch.setattr(micro_batch, "available_bytes", lambda: GB)
    monkeypatch.setattr(micro_batch, "measure_peak", lambda compute: None)
    with pytest.raises(UserError, match="lower --resolution"):
        choose_micro_batch(None, lambda on: None, 8, 0)


def test_auto_without_a_gpu(base, capsys):
    painter = new_painter(base)
    accelerator = Accelerator(cpu=True)
    settings = Settings(size="sd-turbo", batch_size=8)
    assert settings.micro_batch_size == "auto"
    resolve_micro_batch(settings, painter, one_step_loss, accelerator, PROMPTS[0])
    assert settings.micro_batch_size == 1
    assert "no CUDA GPU" in capsys.readouterr().out
    settings = Settings(size="tiny", batch_size=8)
    resolve_micro_batch(settings, None, None, accelerator, PROMPTS[0])
    assert settings.micro_batch_size == 8
    settings = Settings(size="sd-turbo", micro_batch_size=2)
    resolve_micro_batch(settings, painter, one_step_loss, accelerator, PROMPTS[0])
    assert settings.micro_batch_size == 2


def test_the_trial_computes_what_training_does_and_keeps_the_weights(base, monkeypatch):
    """As on a GPU, with made-up memory: gradients flow, nothing learns, no gradient stays."""
    painter = new_painter(base)
    painter.encode_text(PROMPTS)
    before = {name: value.clone() for name, value in painter.state_dict().items()}
    peaks = []

    def measure_peak(compute):
        compute(2)
        gradients = [parameter.grad for parameter in painter.controlnet.parameters()]
        assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
        peaks.append(painter.unet.is_gradient_checkpointing)
        return Peak(GB, GB)

    monkeypatch.setattr(micro_batch, "available_bytes", lambda: 8 * GB)
    monkeypatch.setattr(micro_batch, "measure_peak", measure_peak)
    accelerator = SimpleNamespace(
        num_processes=1,
        is_main_process=True,
        device=SimpleNamespace(type="cuda"),
        autocast=nullcontext,
        gather=lambda counts: counts,
    )
    settings = Settings(size="sd-turbo", batch_size=8)
    resolve_micro_batch(settings, painter, one_step_loss, accelerator, PROMPTS[0])
    assert settings.micro_batch_size == 4  # 8 would take 8 GB beside the optimiser
    assert peaks == [False]
    assert all(parameter.grad is None for parameter in painter.parameters())
    assert all(torch.equal(before[name], value) for name, value in painter.state_dict().items())


# --------------------------------------------------------------------------------------- benchmark
def test_the_benchmark_ends_and_keeps_every_number(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new/numbers.json"
    parts = ["painting", "training", "small", "loading", "taesd"]
    words = ["--random", "--parts", *parts, "--micro-batches", "2", "--seconds", "3600"]
    words += ["--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmark_gpu.py", *words])
    benchmark_gpu.main()
    numbers = json.loads(out.read_text())
    assert set(numbers) == {"machine", *parts}
    assert numbers["machine"]["versions"]["torch"] == torch.__version__
    assert numbers["painting"]["graph"]["largest_difference"] < 0.1
    assert numbers["painting"]["picture"]["standard_deviation"] > 5  # not grey
    assert not [part for part in parts if "error" in numbers[part]]
    assert numbers["loading"]["sd-turbo"]["samples_per_second"] > 0
    assert 0 <= numbers["loading"]["sd-turbo"]["waiting_percent"] <= 100
    assert numbers["training"]["2 at once"]["samples_per_second"] > 0
    assert numbers["small"]["training, 8 at once"]["samples_per_second"] > 0
    assert numbers["small"]["loading"]["step_ms"] > 0
    assert "random weights" in numbers["taesd"]["note"]["text"]
    table = capsys.readouterr().out.splitlines()
    assert any(line.startswith("painting  graph ") for line in table)


def test_how_far_a_decoder_moves_spheres():
    without, target = benchmark_gpu.sphere_pictures(128)
    places = benchmark_gpu.centres(target, without)
    assert places.isfinite().all() and (places > 10).all() and (places < 118).all()
    moved = target.roll((3, 4), dims=(2, 3))  # down, right
    moved_without = without.roll((3, 4), dims=(2, 3))
    difference = benchmark_gpu.centres(moved, moved_without) - places
    torch.testing.assert_close(difference, torch.tensor([[4.0, 3.0]]).expand(16, 2))
    assert benchmark_gpu.centres(without, without).isnan().all()


def test_a_part_that_fails_or_takes_too_long_does_not_end_the_others(tmp_path, monkeypatch):
    def fail(settings, device, report):
        raise RuntimeError("no such kernel")

    def wait(settings, device, report):
        report.add("training", "first", ms=1)
        time.sleep(60)

    def work(settings, device, report):
        report.add("tiny", "first", ms=2)

    measures = {"painting": fail, "training": wait, "tiny": work}
    monkeypatch.setattr(benchmark_gpu, "MEASURE", measures)
    out = tmp_path / "numbers.json"
    words = ["--parts", *measures, "--seconds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmark_gpu.py", *words])
    benchmark_gpu.main()
    numbers = json.loads(out.read_text())
    assert numbers["painting"]["error"]["message"] == "no such kernel"
    assert numbers["training"]["error"]["kind"] == "TimeoutError"
    assert numbers["training"]["first"] == {"ms": 1}
    assert numbers["tiny"]["first"] == {"ms": 2}
