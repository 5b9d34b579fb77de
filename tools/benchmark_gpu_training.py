"""How fast this GPU trains: parts training, small, tiny, loading and blocks of benchmark_gpu.py.

All of them take train_controlnet.py's own step: objective, clipping, AdamW, micro-batches.
"""

import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import train_controlnet
from genima.diffusion import LatentCache
from genima.episodes import CAMERAS, Episode, write_episode
from genima.files import write_hdf5
from genima.micro_batch import random_batch, resolve_micro_batch, switch_checkpointing
from genima.painter import TinyPainter
from genima.painter_data import find_frames
from genima.painter_training import make_optimizer, prepare_tiny, prepare_turbo, split_batch
from genima.spheres import FORMAT as SPHERES_FORMAT
from genima.turbo_speed import compile_for_training
from genima.views import TILED
from tools.measuring import Report, milliseconds, peak_memory, start_counting_memory
from tools.random_turbo import INSTRUCTION, PROMPTS, make_painter, random_views


class Training:
    """A painter on its device with an optimiser, and train_controlnet.py's step."""

    def __init__(self, settings, device: str, size: str = "sd-turbo"):
        """settings: of benchmark_gpu.py."""
        self.device = torch.device(device)
        self.size = size
        bf16 = device == "cuda" and size != "tiny"
        if size == "sd-turbo":
            painter = make_painter(settings.weights, device)
            prepare_turbo(painter, self.device, bf16, [INSTRUCTION])
        else:
            painter = make_small_painter(size, device)
            prepare_tiny(painter, self.device, bf16)
        self.painter = painter.train()
        self.objective = train_controlnet.OBJECTIVES[type(painter), "one-step"]
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
            loss = self.objective(self.painter, self.model, batch, self.latent_cache)
            (loss / parts).backward()
        torch.nn.utils.clip_grad_norm_(self.painter.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def measure(self, count: int, batch_size: int, steps: int = 6) -> dict:
        """Samples a second, and peak memory, with `count` of them at once."""
        batch = random_batch(count, self.painter, PROMPTS[0])
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
            micro_batch_size="auto", size=self.size, batch_size=share, optimizer="adamw"
        )
        resolve_micro_batch(settings, self.painter, self.objective, accelerator, PROMPTS[0])
        return settings.micro_batch_size


def make_small_painter(size: str, device: str) -> TinyPainter:
    """tiny or small, with random weights; on a CPU tiny's networks and views of 16x16 for both."""
    resolution = TILED[size]
    if device == "cpu":
        size = "tiny"
        resolution = 32
    config = {
        "size": size,
        "objective": "one-step",
        "num_inference_steps": 1,
        "image_size": resolution // 2,
        "resolution": resolution,
        "horizon": 20,
        "cameras": list(CAMERAS),
    }
    torch.manual_seed(0)
    return TinyPainter.from_scratch([INSTRUCTION], config).to(device)


def measure_training(settings, device: str, report: Report):
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


def measure_blocks(settings, device: str, report: Report):
    training = Training(settings, device)
    switch_checkpointing(training.painter, False)
    report.add("blocks", "compile", text=compile_for_training(training.painter))
    start = time.perf_counter()
    training.step(random_batch(8, training.painter, PROMPTS[0]))
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


def measure_loading(settings, device: str, report: Report):
    training = Training(settings, device)
    switch_checkpointing(training.painter, False)
    report.add("loading", "sd-turbo", **waiting(training))


def waiting(training: Training, batch_size: int = 8, steps: int = 24) -> dict:
    """The share of a step that waits for data, with files of this painter's views on this disk."""
    resolution = training.painter.config["resolution"]
    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder), training.painter.config["image_size"])
        data = find_frames(Path(folder))
        stage = train_controlnet.Settings(size=training.size, resolution=resolution, steps=steps)
        stage.batch_size = batch_size
        accelerator = SimpleNamespace(process_index=0, num_processes=1, device=training.device)
        loader = train_controlnet.make_batches(stage, data, accelerator, 0)
        waited = []
        times = []
        begin = time.perf_counter()
        for batch in loader:
            waited.append(time.perf_counter() - begin)
            for part in split_batch(batch, batch_size, training.device):
                training.step(part)
            times.append(time.perf_counter() - begin)
            begin = time.perf_counter()
    late = slice(steps // 2, None)  # at the start, workers fill their queues
    step_time = float(np.mean(times[late]))
    return {
        "workers": loader.num_workers,
        "step_ms": round(1000 * step_time, 1),
        "samples_per_second": round(batch_size / step_time, 2),
        "waiting_percent": round(100 * sum(waited[late]) / sum(times[late]), 2),
    }


# ---------------------------------------------------------------------------------- small and tiny
def measure_small(settings, device: str, report: Report):
    measure_size("small", (8, 32, 64), settings, device, report)


def measure_tiny(settings, device: str, report: Report):
    measure_size("tiny", (8, 64), settings, device, report)


def measure_size(size: str, batches: tuple[int, ...], settings, device: str, report: Report):
    """One picture, training by batch, and the share of waiting in a run's batch of 8."""
    training = Training(settings, device, size)
    painter = training.painter.eval()
    views = random_views(painter)
    time_paint = milliseconds(lambda: painter.paint(views, [INSTRUCTION]))
    pixels = painter.config["resolution"]
    report.add(size, f"one picture of {pixels}x{pixels}, eager", ms=time_paint)
    painter.train()
    for batch_size in batches:
        try:
            measured = training.measure(batch_size, batch_size)
        except torch.OutOfMemoryError:
            measured = {"error": "out of memory"}
        report.add(size, f"training, {batch_size} at once", **measured)
    report.add(size, "loading", **waiting(training))
