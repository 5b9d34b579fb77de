"""How fast does this GPU paint and train? One command of at most eight minutes: a table, a JSON.

    python tools/benchmark_gpu.py                     SD-Turbo, from the Hugging Face Hub
    python tools/benchmark_gpu.py --base FOLDER       SD-Turbo, from this disk
    python tools/benchmark_gpu.py --random            its true size with random weights: no network
    python tools/benchmark_gpu.py --random --parts painting compiled

In:   nothing, or SD-Turbo
Out:  <out>, a JSON file, written again after every number: who stops it loses nothing

The parts, in the order of their worth; each ends after its share of --seconds at the next chance:

    painting     one picture of 512x512, one pass, bf16: eager, as a CUDA graph, with a tiny decoder
    training     samples a second and peak memory of one-step training, by samples at once
    small, tiny  the smaller painters: one picture, training by samples at once, waiting for data
    loading      the share of a training step that waits for data, read from files on this disk
    compiled     painting with compiled networks
    taesd        the tiny decoder beside SD-Turbo's: pixels between spheres' centres, milliseconds
    blocks       training with compiled networks

Without a CUDA GPU it measures very small networks, to see that all of this works. The training's
parts are in benchmark_gpu_training.py.
"""

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import AutoencoderTiny

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genima.files import UserError, run_stage
from genima.hub import load_part
from genima.micro_batch import random_batch
from genima.spheres import CYAN, GREEN, PURPLE, RED, draw_spheres
from genima.turbo_speed import GraphPainting, compile_networks, record
from genima.views import composite, fit
from tools.benchmark_gpu_training import (
    measure_blocks,
    measure_loading,
    measure_small,
    measure_tiny,
    measure_training,
)
from tools.measuring import (
    Report,
    milliseconds,
    peak_memory,
    start_counting_memory,
    synchronize,
    time_limit,
)
from tools.random_turbo import INSTRUCTION, PROMPTS, painter_to_paint_with, random_views

# Of --seconds, how much each part may take beside the others.
SHARES = {
    "painting": 3,
    "training": 4,
    "small": 3,
    "tiny": 1,
    "loading": 2,
    "compiled": 6,
    "taesd": 1,
    "blocks": 6,
}


@dataclass
class Settings:
    base: str = "stabilityai/sd-turbo"
    """SD-Turbo: its name on the Hugging Face Hub, or a folder."""
    random: bool = False
    """Random weights of SD-Turbo's size in place of the base: times and memory are the same."""
    taesd: str | None = None
    """Tiny autoencoder to compare with: a name or a folder; by default one with random weights."""
    parts: tuple[str, ...] = tuple(SHARES)
    """What to measure."""
    seconds: int = 450
    """Budget of all parts together."""
    micro_batches: tuple[int, ...] = (8, 16, 4)
    """Samples at once to train SD-Turbo with, without gradient checkpointing."""
    out: Path = Path("benchmark_gpu.json")
    """Where the numbers go."""

    @property
    def weights(self) -> str | None:
        """The base; None: random weights."""
        if self.random:
            return None
        return self.base


# ---------------------------------------------------------------------------------------- painting
def difference(picture: torch.Tensor, other: torch.Tensor) -> dict:
    """How far two pictures, 0..1, are apart, in steps of 255."""
    steps = 255 * (picture - other).abs().flatten()
    return {
        "largest_difference": round(steps.max().item(), 3),
        "in_99_9_percent_below": round(steps.cpu().quantile(0.999).item(), 3),
        "mean_difference": round(steps.mean().item(), 4),
    }


@torch.no_grad()
def measure_painting(settings: Settings, device: str, report: Report):
    start_counting_memory()
    start = time.perf_counter()
    painter = painter_to_paint_with(settings.weights, device)
    condition = random_batch(1, painter, PROMPTS[0])["condition"]
    plain = painter.paint_tiled(condition, PROMPTS)
    seconds = round(time.perf_counter() - start, 1)
    spread = round(255 * plain.std().item(), 1)
    report.add("painting", "picture", seconds_to_make=seconds, standard_deviation=spread)
    time_eager = milliseconds(lambda: painter.paint_tiled(condition, PROMPTS))
    report.add("painting", "eager", ms=time_eager, peak_gb=peak_memory())

    measure_graph("painting", "graph", painter, condition, plain, report)
    vae = painter.vae
    painter.vae = tiny_decoder(settings.taesd, painter)
    small = painter.paint_tiled(condition, PROMPTS)
    measure_graph("painting", "graph, tiny decoder", painter, condition, small, report)
    painter.vae = vae

    painter.float()  # how much of a difference is bf16's own
    exact = painter.paint_tiled(condition, PROMPTS)
    report.add("painting", "eager beside float32", **difference(plain, exact))


@torch.no_grad()
def measure_compiled(settings: Settings, device: str, report: Report):
    painter = painter_to_paint_with(settings.weights, device)
    condition = random_batch(1, painter, PROMPTS[0])["condition"]
    plain = painter.paint_tiled(condition, PROMPTS)
    start = time.perf_counter()
    compile_networks(painter)
    painter.paint_tiled(condition, PROMPTS)
    synchronize()
    report.add("compiled", "compiling", seconds=round(time.perf_counter() - start, 1))
    measure_graph("compiled", "graph", painter, condition, plain, report)
    time_compiled = milliseconds(lambda: painter.paint_tiled(condition, PROMPTS))
    report.add("compiled", "without a graph", ms=time_compiled)


def measure_graph(part, name, painter, condition, plain, report):
    """Times of GraphPainting, and of its two halves; plain: the picture without it."""
    start = time.perf_counter()
    painting = GraphPainting(painter)
    fast = painting(condition, PROMPTS)
    seconds = round(time.perf_counter() - start, 1)
    time_fast = milliseconds(lambda: painting(condition, PROMPTS), 50)
    report.add(part, name, ms=time_fast, seconds_to_record=seconds, **difference(fast, plain))
    latents = painting.denoise_inputs()
    halves = {
        "ControlNet and UNet": painting.denoise_inputs,
        "decoder": lambda: painter.decode_latents(latents),
    }
    for half, function in halves.items():
        if painting.graph is not None:
            graph, _ = record(function)
            function = graph.replay
        report.add(part, f"{name}: {half}", ms=milliseconds(function, 50))
    views = random_views(painter)
    painter.paint_tiled = painting
    time_views = milliseconds(lambda: painter.paint(views, [INSTRUCTION]))
    del painter.paint_tiled
    report.add(part, f"{name}: from views to views", ms=time_views)


# ------------------------------------------------------------------------------------------- TAESD
def tiny_decoder(name: str | None, painter) -> AutoencoderTiny:
    """The tiny autoencoder of this name or folder, or one with random weights, as the painter's."""
    decoder = AutoencoderTiny()
    if name:
        decoder = load_part(name, AutoencoderTiny)
    unet = painter.unet
    return decoder.eval().to(unet.device, unet.dtype, memory_format=torch.channels_last)


def sphere_pictures(resolution: int, count: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (B, 3, H, H), 0..1, without and with one sphere each, somewhere in it."""
    random = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    observation = fit(coarse, resolution, resolution)
    half = resolution / 2
    intrinsics = np.array([[resolution, 0, half], [0, resolution, half], [0, 0, 1.0]])
    colours = (RED, GREEN, PURPLE, CYAN)
    layers = []
    for i in range(count):
        pose = np.eye(4)
        pose[:3, 3] = [*random.uniform(-0.35, 0.35, 2), 1.0]  # before a camera at the origin
        radius = random.uniform(0.03, 0.08)
        colour = np.array([colours[i % 4]], np.uint8)
        camera = (intrinsics, np.eye(4), resolution, resolution)
        layers.append(draw_spheres(pose[None], [radius], colour, *camera))
    layer = torch.from_numpy(np.stack(layers)).permute(0, 3, 1, 2).float() / 255  # (B, 4, H, H)
    return observation, composite(layer, observation)


def centres(pictures: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
    """Where the spheres are: the mean place (B, 2) of the pixels that differ by a fifth.

    pictures and without: (B, 3, H, W), 0..1, with and without spheres. No such pixel: not a number.
    """
    differs = ((pictures - without).abs().amax(1) > 0.2).float()  # (B, H, W)
    H, W = differs.shape[1:]
    rows = torch.arange(H, device=differs.device)[:, None]
    columns = torch.arange(W, device=differs.device)
    count = differs.sum((1, 2))
    y = (differs * rows).sum((1, 2)) / count
    x = (differs * columns).sum((1, 2)) / count
    return torch.stack([x, y], dim=1)


@torch.no_grad()
def measure_taesd(settings: Settings, device: str, report: Report):
    """Each decoder's own error: the picture is encoded by SD-Turbo's encoder and decoded again."""
    painter = painter_to_paint_with(settings.weights, device)
    observation, target = sphere_pictures(painter.config["resolution"])
    true_centres = centres(target, observation)
    latents = []
    for pictures in (observation, target):
        parts = [painter.encode_images(part.to(device)) for part in pictures.split(1)]
        latents.append(torch.cat(parts))
    for name, vae in (("SD-Turbo's", painter.vae), ("tiny", tiny_decoder(settings.taesd, painter))):
        painter.vae = vae
        decoded = []
        for encoded in latents:
            parts = [painter.decode_latents(part).cpu() for part in encoded.split(1)]
            decoded.append(torch.cat(parts))
        errors = (centres(decoded[1], decoded[0]) - true_centres).norm(dim=1)
        found = errors[errors.isfinite()]
        pixels = {"spheres_found": f"{len(found)} of {len(errors)}"}
        if len(found):
            pixels["mean_pixels_off"] = round(found.mean().item(), 2)
            pixels["most_pixels_off"] = round(found.max().item(), 2)
        time_one = milliseconds(partial(painter.decode_latents, latents[1][:1]))
        report.add("taesd", f"{name} decoder", ms_eager=time_one, **pixels)
    if settings.random or settings.taesd is None or device == "cpu":
        report.add("taesd", "note", text="random weights: only the milliseconds mean something")


MEASURE = {
    "painting": measure_painting,
    "training": measure_training,
    "small": measure_small,
    "tiny": measure_tiny,
    "loading": measure_loading,
    "compiled": measure_compiled,
    "taesd": measure_taesd,
    "blocks": measure_blocks,
}


def main():
    settings = tyro.cli(Settings, description=__doc__)
    unknown = set(settings.parts) - set(SHARES)
    if unknown:
        names = " ".join(SHARES)
        raise UserError(f"There is no part {', '.join(sorted(unknown))}: --parts {names}")
    device = "cpu"
    gpu = "none: very small networks on the CPU"
    if torch.cuda.is_available():
        device = "cuda"
        gpu = torch.cuda.get_device_name()
    report = Report(settings.out)
    report.add("machine", "versions", gpu=gpu, torch=torch.__version__, cuda=torch.version.cuda)
    all_shares = sum(SHARES[part] for part in settings.parts)
    for part in settings.parts:
        seconds = settings.seconds * SHARES[part] / all_shares
        start = time.perf_counter()
        try:
            with time_limit(max(1, int(seconds))):
                MEASURE[part](settings, device, report)
        except Exception as error:  # the next part may still work
            message = " ".join(str(error).split())[:500]
            report.add(part, "error", kind=type(error).__name__, message=message)
        report.add(part, "whole", seconds=round(time.perf_counter() - start, 1))
        if device == "cuda":
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    report.print_table()


if __name__ == "__main__":
    run_stage(main)
