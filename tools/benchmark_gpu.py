"""How fast does this GPU paint and train? One command of a few minutes, one table, one JSON.

    python tools/benchmark_gpu.py                     SD-Turbo, from the Hugging Face Hub
    python tools/benchmark_gpu.py --base FOLDER       SD-Turbo, from this disk
    python tools/benchmark_gpu.py --random            its true size with random weights: no network
    python tools/benchmark_gpu.py --random --parts painting compiled

In:   nothing, or SD-Turbo
Out:  <out>, a JSON file, written again after every number: who stops it loses nothing

The parts, in the order of their worth; each ends after --seconds at the next chance:

    painting     one picture of 512x512, one pass, bf16: eager, as a CUDA graph, with a tiny decoder
    compiled     the same with compiled networks
    training     samples a second and peak memory of one-step training, by samples at once
    loading      the share of a training step that waits for data, read from files on this disk
    tiny         the laptop's painter: one picture, and a step of 8 samples
    blocks       training with compiled networks

Without a CUDA GPU it measures a very small network, to see that all of this works.
"""

import json
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import tyro
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_controlnet
from genima.diffusion import LatentCache
from genima.episodes import CAMERAS, Episode, write_episode
from genima.files import UserError, run_stage, write_hdf5, write_whole
from genima.hub import load_part
from genima.micro_batch import random_batch, resolve_micro_batch, switch_checkpointing
from genima.painter import PROMPT, TinyPainter, TurboPainter
from genima.painter_data import find_frames
from genima.painter_training import make_optimizer, prepare_turbo
from genima.spheres import FORMAT as SPHERES_FORMAT
from genima.turbo_speed import GraphPainting, compile_networks, record

PARTS = ("painting", "compiled", "training", "loading", "tiny", "blocks")
INSTRUCTION = "push the blue button"
PROMPTS = [PROMPT.format(INSTRUCTION)]


@dataclass
class Layout:
    """Sizes of the networks; the default is SD 2.1-base's, from which SD-Turbo was distilled."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    heads: tuple[int, ...] = (5, 10, 20, 20)
    text_width: int = 1024
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    groups: int = 32
    resolution: int = 512


SMALL = Layout((8, 16, 16, 16), (1, 2, 2, 2), 16, (4, 4, 4, 4), 1, 4, 64)


@dataclass
class Settings:
    base: str = "stabilityai/sd-turbo"
    """SD-Turbo: its name on the Hugging Face Hub, or a folder."""
    random: bool = False
    """Random weights of SD-Turbo's size in place of the base: times and memory are the same."""
    taesd: str | None = None
    """Tiny autoencoder to compare with: a name or a folder; by default one with random weights."""
    parts: tuple[str, ...] = PARTS
    """What to measure."""
    seconds: int = 75
    """Budget of each part; the time to compile is twice as long."""
    micro_batches: tuple[int, ...] = (8, 16, 4)
    """Samples at once to train with, without gradient checkpointing."""
    out: Path = Path("benchmark_gpu.json")
    """Where the numbers go."""


class Report:
    """The numbers so far: printed, and written to a file, as soon as they are known."""

    def __init__(self, path: Path):
        self.path = path
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.numbers = {}

    def add(self, part: str, name: str, **values):
        self.numbers.setdefault(part, {})[name] = values
        shown = ", ".join(f"{key} {value}" for key, value in values.items())
        print(f"{part}: {name}: {shown}", flush=True)
        with write_whole(self.path) as path:
            path.write_text(json.dumps(self.numbers, indent=1))


# ------------------------------------------------------------------------------------------ timing
@contextmanager
def time_limit(seconds: int):
    """Raise TimeoutError inside after so many seconds."""

    def stop(number, frame):
        raise TimeoutError(f"stopped after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(function, count: int = 20) -> float:
    """The median time of function(), from its call to the end of the GPU's work."""
    times = []
    for _ in range(count + 3):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return round(float(np.median(times[3:])), 3)


def peak_memory() -> float | None:
    """GB since the last start of counting."""
    if not torch.cuda.is_available():
        return None
    return round(torch.cuda.max_memory_allocated() / 1e9, 2)


def start_counting_memory():
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---------------------------------------------------------------------------------------- painters
def random_painter(layout: Layout, config: dict, device: str) -> TurboPainter:
    """A painter of this size, its weights drawn on the device. Text: random, encoded already."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=layout.channels,
            attention_head_dim=layout.heads,
            cross_attention_dim=layout.text_width,
            layers_per_block=layout.layers,
            norm_num_groups=layout.groups,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            use_linear_projection=True,
        )
        vae = AutoencoderKL(
            block_out_channels=layout.vae_channels,
            layers_per_block=layout.layers,
            norm_num_groups=layout.groups,
            latent_channels=4,
            sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        controlnet = ControlNetModel.from_unet(unet)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        steps_offset=1,
    )
    painter = TurboPainter(config, None, None, vae, unet, controlnet, scheduler)
    painter.prompt_cache[PROMPTS[0]] = torch.randn(77, layout.text_width)
    return painter


def make_painter(settings: Settings, device: str) -> TurboPainter:
    """The painter, float32; its ControlNet changes the picture, as after a training."""
    layout = Layout()
    if device == "cpu":
        layout = SMALL
    config = {
        "size": "sd-turbo",
        "objective": "one-step",
        "num_inference_steps": 1,
        "image_size": layout.resolution // 2,
        "resolution": layout.resolution,
        "horizon": 20,
        "cameras": list(CAMERAS),
    }
    if settings.random or device == "cpu":
        painter = random_painter(layout, config, device)
    else:
        painter = TurboPainter.from_base(settings.base, config).to(device)
    controlnet = painter.controlnet
    zero_convolutions = [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]
    zero_convolutions.append(controlnet.controlnet_cond_embedding.conv_out)
    for convolution in zero_convolutions:
        torch.nn.init.normal_(convolution.weight, std=0.02)
    return painter


def painter_to_paint_with(settings: Settings, device: str) -> TurboPainter:
    """As load_painter leaves it: in bf16 and channels last on a GPU."""
    painter = make_painter(settings, device).eval()
    painter.encode_text(PROMPTS)
    painter.text_encoder = None  # the prompt is in the cache
    if device == "cuda":
        painter.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    return painter


def random_views(painter: TurboPainter | TinyPainter) -> dict:
    """{camera: (1, h, w, 3) uint8}"""
    size = painter.config["image_size"]
    random = np.random.default_rng(0)
    views = {}
    for camera in painter.config["cameras"]:
        views[camera] = random.integers(0, 256, (1, size, size, 3), np.uint8)
    return views


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
    painter = painter_to_paint_with(settings, device)
    condition = random_batch(1, painter)["condition"]
    plain = painter.paint_tiled(condition, PROMPTS)
    seconds = round(time.perf_counter() - start, 1)
    spread = round(255 * plain.std().item(), 1)
    report.add("painting", "picture", seconds_to_make=seconds, standard_deviation=spread)
    time_eager = milliseconds(lambda: painter.paint_tiled(condition, PROMPTS))
    report.add("painting", "eager", ms=time_eager, peak_gb=peak_memory())

    measure_graph("painting", "graph", painter, condition, plain, report)
    vae = painter.vae
    if settings.taesd:
        painter.vae = load_part(settings.taesd, AutoencoderTiny)
    else:
        painter.vae = AutoencoderTiny()
    painter.vae.eval().to(device, painter.unet.dtype, memory_format=torch.channels_last)
    small = painter.paint_tiled(condition, PROMPTS)
    measure_graph("painting", "graph, tiny decoder", painter, condition, small, report)
    painter.vae = vae

    painter.float()  # how much of a difference is bf16's own
    exact = painter.paint_tiled(condition, PROMPTS)
    report.add("painting", "eager beside float32", **difference(plain, exact))


@torch.no_grad()
def measure_compiled(settings: Settings, device: str, report: Report):
    painter = painter_to_paint_with(settings, device)
    condition = random_batch(1, painter)["condition"]
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


# ---------------------------------------------------------------------------------------- training
class Training:
    """A painter on its device with an optimiser, and train_controlnet.py's step."""

    def __init__(self, settings: Settings, device: str):
        painter = make_painter(settings, device)
        bf16 = device == "cuda"
        self.device = torch.device(device)
        self.painter = prepare_turbo(painter, self.device, bf16, [INSTRUCTION]).train()
        self.latent_cache = LatentCache(painter)
        self.precision = torch.autocast(device, torch.bfloat16, enabled=bf16)
        self.optimizer = None

    def model(self, *inputs) -> torch.Tensor:
        with self.precision:
            return self.painter(*inputs).float()

    def step(self, batch: dict, parts: int = 1):
        """One gradient step; every part is the same batch."""
        if self.optimizer is None:
            self.optimizer = make_optimizer("adamw", self.painter, 1e-5)
        for _ in range(parts):
            loss = train_controlnet.one_step_loss(
                self.painter, self.model, batch, self.latent_cache
            )
            (loss / parts).backward()
        torch.nn.utils.clip_grad_norm_(self.painter.controlnet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def measure(self, count: int, batch_size: int, steps: int = 6) -> dict:
        """Samples a second, and peak memory, with `count` of them at once."""
        batch = random_batch(count, self.painter)
        parts = max(1, batch_size // count)
        start_counting_memory()
        self.step(batch)
        time_step = milliseconds(lambda: self.step(batch, parts), steps)
        rate = round(1000 * count * parts / time_step, 2)
        return {"samples_per_second": rate, "step_ms": time_step, "peak_gb": peak_memory()}

    def resolve_auto(self, share: int) -> int:
        """What --micro-batch-size auto takes."""
        accelerator = SimpleNamespace(
            num_processes=1,
            is_main_process=True,
            device=self.device,
            autocast=lambda: self.precision,
            gather=lambda tensor: tensor,
        )
        settings = SimpleNamespace(
            micro_batch_size="auto", size="sd-turbo", batch_size=share, optimizer="adamw"
        )
        objective = train_controlnet.one_step_loss
        resolve_micro_batch(settings, self.painter, objective, accelerator)
        return settings.micro_batch_size


def measure_training(settings: Settings, device: str, report: Report):
    training = Training(settings, device)
    start = time.perf_counter()
    count = training.resolve_auto(8)
    seconds = round(time.perf_counter() - start, 1)
    checkpointed = training.painter.controlnet.is_gradient_checkpointing
    report.add("training", "auto", at_once=count, checkpointing=checkpointed, seconds=seconds)
    tries = [(count, False) for count in settings.micro_batches] + [(4, True), (1, True)]
    for count, checkpointing in tries:
        name = f"{count} at once"
        if checkpointing:
            name += ", checkpointing"
        switch_checkpointing(training.painter, checkpointing)
        try:
            report.add("training", name, **training.measure(count, 8))
        except torch.OutOfMemoryError:
            report.add("training", name, error="out of memory")

    switch_checkpointing(training.painter, False)
    torch.backends.cudnn.benchmark = True
    report.add("training", "8 at once, cuDNN's benchmark", **training.measure(8, 8))
    torch.backends.cudnn.benchmark = False
    training.painter.to(memory_format=torch.contiguous_format)
    training.optimizer = None
    report.add("training", "8 at once, channels first", **training.measure(8, 8))


def measure_blocks(settings: Settings, device: str, report: Report):
    training = Training(settings, device)
    switch_checkpointing(training.painter, False)
    training.painter.unet.compile(dynamic=False)
    training.painter.controlnet.compile(dynamic=False)
    start = time.perf_counter()
    training.step(random_batch(8, training.painter))
    report.add("blocks", "compiling", seconds=round(time.perf_counter() - start, 1))
    report.add("blocks", "8 at once", **training.measure(8, 8))


# ----------------------------------------------------------------------------------------- loading
def write_run(run: Path, size: int, frames: int = 40):
    """An episode of four cameras, of coarse pictures, and a square in place of its spheres."""
    random = np.random.default_rng(0)
    joint_poses = np.tile(np.eye(4, dtype=np.float32), (frames, 8, 1, 1))
    joint_poses[..., :3, 3] = random.uniform(-0.3, 0.3, (1, 8, 3))
    world_from_camera = np.eye(4)
    world_from_camera[2, 3] = -1.5  # it looks along the world's z
    intrinsics = np.array([[size, 0, size / 2], [0, size, size / 2], [0, 0, 1.0]])
    coarse = random.integers(0, 256, (frames, size // 8, size // 8, 3), np.uint8)
    images = coarse.repeat(8, axis=1).repeat(8, axis=2)
    motion = random.uniform(-1, 1, (frames, 8)).astype(np.float32)
    motion[:, -1] = 1  # the gripper is open
    episode = Episode(
        path=None,
        task="push_button",
        variation=0,
        instruction=INSTRUCTION,
        instructions=[INSTRUCTION],
        success=True,
        fps=10.0,
        robot="panda",
        sim=True,
        seed=1,
        qpos=motion,
        qvel=np.zeros_like(motion),
        action=motion,
        joint_poses=joint_poses,
        images={camera: images for camera in CAMERAS},
        intrinsics={camera: intrinsics for camera in CAMERAS},
        extrinsics={camera: np.tile(world_from_camera, (frames, 1, 1)) for camera in CAMERAS},
    )
    source = run / "episodes/push_button/1.hdf5"
    target = run / "spheres/push_button/1.hdf5"
    source.parent.mkdir(parents=True)
    target.parent.mkdir(parents=True)
    write_episode(source, episode)
    layers = np.zeros((frames, size, size, 4), np.uint8)
    layers[:, size // 4 : size // 2, size // 4 : size // 2] = 255
    with write_hdf5(target) as root:
        root.attrs["format"] = SPHERES_FORMAT
        root.attrs["horizon"] = 20
        for camera in CAMERAS:
            dataset = f"layers/{camera}"
            root.create_dataset(dataset, data=layers, chunks=(1, size, size, 4), compression=1)


def measure_loading(settings: Settings, device: str, report: Report, steps: int = 24):
    training = Training(settings, device)
    switch_checkpointing(training.painter, False)
    resolution = training.painter.config["resolution"]
    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder), training.painter.config["image_size"])
        data = find_frames(Path(folder))
        stage = train_controlnet.Settings(size="sd-turbo", resolution=resolution, steps=steps)
        stage.batch_size = 8
        accelerator = SimpleNamespace(process_index=0, num_processes=1, device=training.device)
        loader = train_controlnet.make_batches(stage, data, accelerator, 0)
        waited = []
        times = []
        begin = time.perf_counter()
        for batch in loader:
            waited.append(time.perf_counter() - begin)
            for part in train_controlnet.split_batch(batch, 8, training.device):
                training.step(part)
            times.append(time.perf_counter() - begin)
            begin = time.perf_counter()
    late = slice(steps // 2, None)  # at the start, workers fill their queues
    report.add(
        "loading",
        f"{loader.num_workers} workers",
        step_ms=round(1000 * float(np.mean(times[late])), 1),
        samples_per_second=round(8 / float(np.mean(times[late])), 2),
        waiting_percent=round(100 * sum(waited[late]) / sum(times[late]), 2),
    )


# -------------------------------------------------------------------------------------------- tiny
def measure_tiny(settings: Settings, device: str, report: Report):
    config = {
        "size": "tiny",
        "objective": "one-step",
        "num_inference_steps": 1,
        "image_size": 64,
        "resolution": 128,
        "horizon": 20,
        "cameras": list(CAMERAS),
    }
    painter = TinyPainter.from_scratch([INSTRUCTION], config).to(device)
    views = random_views(painter)
    time_paint = milliseconds(lambda: painter.paint(views, [INSTRUCTION]))
    report.add("tiny", "one picture of 128x128", ms=time_paint)
    painter.prompt_cache = {PROMPTS[0]: None}
    batch = random_batch(8, painter)
    optimizer = make_optimizer("adamw", painter, 1e-4)

    def step():
        loss = train_controlnet.tiny_one_step_loss(painter, painter, batch, None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    time_step = milliseconds(step, 10)
    rate = round(8000 / time_step, 1)
    report.add("tiny", "a step of 8 samples", ms=time_step, samples_per_second=rate)


MEASURE = {
    "painting": measure_painting,
    "compiled": measure_compiled,
    "training": measure_training,
    "loading": measure_loading,
    "tiny": measure_tiny,
    "blocks": measure_blocks,
}


def main():
    settings = tyro.cli(Settings, description=__doc__)
    unknown = set(settings.parts) - set(PARTS)
    if unknown:
        raise UserError(f"There is no part {', '.join(sorted(unknown))}: --parts {' '.join(PARTS)}")
    device = "cpu"
    gpu = "none: a very small network on the CPU"
    if torch.cuda.is_available():
        device = "cuda"
        gpu = torch.cuda.get_device_name()
    report = Report(settings.out)
    report.add("machine", "versions", gpu=gpu, torch=torch.__version__, cuda=torch.version.cuda)
    for part in settings.parts:
        seconds = settings.seconds
        if part in ("compiled", "blocks"):
            seconds *= 2
        start = time.perf_counter()
        try:
            with time_limit(seconds):
                MEASURE[part](settings, device, report)
        except Exception as error:  # the next part may still work
            message = " ".join(str(error).split())[:500]
            report.add(part, "error", kind=type(error).__name__, message=message)
        report.add(part, "whole", seconds=round(time.perf_counter() - start, 1))
        if device == "cuda":
            torch._dynamo.reset()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    run_stage(main)
