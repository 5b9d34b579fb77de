"""How fast stage 2 trains on this machine, and how much memory it takes with SD-Turbo.

Commands `step` and `memory` of tools/benchmark.py.

step: the laptop's painter, trained by train_controlnet.py and by the loop of diffusers' own
train_controlnet.py, step by step: pictures from PNG files through PIL in the same process, the text
encoder at every step, noise prediction, clipping, AdamW. Both train the same networks with the same
batch size and threads, each time in a new process, measured from the tenth step on.

memory: two steps of training run on tensors that have a shape and no content; those that exist are
counted. What a GPU's kernels take to work in comes on top (tools/benchmark_gpu.py measures all).
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, EulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from genima.diffusion import LatentCache, add_noise
from genima.episodes import CAMERAS
from genima.files import UserError
from genima.painter import TinyPainter, TurboPainter
from genima.painter_data import find_frames, read_batch
from genima.painter_training import make_optimizer
from genima.tokenizer import tokenize
from genima.views import composite, grid_of
from train_controlnet import Settings, one_step_loss

ROOT = Path(__file__).resolve().parent.parent
FIRST = 10  # steps before the clock starts
STEPS = 60
FRAMES = 64  # that diffusers' loop draws from
TWO_PROCESSES = """-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1
    --mixed_precision no --dynamo_backend no --main_process_port 0""".split()
OURS = {  # name: how Python is called, options of train_controlnet.py
    "train_controlnet.py": ([], []),
    "train_controlnet.py --objective noise": ([], ["--objective", "noise"]),
    "train_controlnet.py, two processes": (TWO_PROCESSES, []),
}
PRECISIONS = ("fp32", "bf16")


# -------------------------------------------------------------------------------------------- step
def step(turns: int = 5, run: Path = Path("runs/demo")):
    """Samples a second of training the laptop's painter, and of diffusers' own training loop.

    Args:
        turns: How often each trains, in turns; the median counts, and of the ratios within a turn
            the lowest and the highest are shown.
        run: Folder with episodes and spheres.
    """
    rates = {}  # (name, precision): samples a second, one for each turn
    with tempfile.TemporaryDirectory() as folder:
        for _ in tqdm(range(turns), desc="turns"):
            for precision in PRECISIONS:
                # In a process of its own, as ours.
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                    rate = process.submit(their_rate, run, Path(folder), precision).result()
                rates.setdefault(("diffusers' loop", precision), []).append(rate)
                for name, (launch, options) in OURS.items():
                    options = ["--precision", precision, *options]
                    rate = our_rate(run, Path(folder) / "run", launch, options)
                    rates.setdefault((name, precision), []).append(rate)
    for (name, precision), found in rates.items():
        in_fp32 = describe_ratio(found, rates["diffusers' loop", "fp32"])
        in_same = describe_ratio(found, rates["diffusers' loop", precision])
        print(
            f"{name}, {precision}: {np.median(found):.1f} samples/s, {in_fp32} times diffusers' "
            f"loop in fp32, {in_same} in the same precision"
        )


def describe_ratio(rates: list[float], others: list[float]) -> str:
    ratios = np.array(rates) / others
    return f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"


def our_rate(source: Path, run: Path, launch: list[str], options: list[str]) -> float:
    """Samples a second of train_controlnet.py, as its progress bar counts them."""
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    for name in ("episodes", "spheres"):
        (run / name).symlink_to((source / name).resolve())
    command = [sys.executable, *launch, str(ROOT / "train_controlnet.py"), "--run", str(run)]
    command += ["--base", "none", "--steps", str(STEPS), *options]
    environment = dict(os.environ)
    if launch:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 2) // 2))
        environment["ACCELERATE_USE_CPU"] = "true"
    training = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    reached = {}  # step: when the bar showed it first
    end = b""
    while True:
        text = os.read(training.stderr.fileno(), 4096)
        if not text:
            break
        end = end[-1000:] + text
        for count in re.findall(rb"(\d+)/%d " % STEPS, end):
            reached.setdefault(int(count), time.perf_counter())
    if training.wait():
        message = end[-300:].decode(errors="replace")
        raise UserError(f"train_controlnet.py failed, so there is nothing to measure: {message}")
    counted = [count for count in reached if FIRST <= count < STEPS]
    first = min(counted)
    last = max(counted)
    seconds = reached[last] - reached[first]
    return Settings.batch_size * (last - first) / seconds


def their_rate(run: Path, folder: Path, precision: str) -> float:
    """Samples a second of diffusers' loop."""
    data = find_frames(run)
    rows, _ = grid_of(len(data.cameras))
    config = {
        "size": "tiny",
        "objective": "noise",
        "num_inference_steps": 1,
        "image_size": data.image_size,
        "resolution": rows * data.image_size,
        "horizon": data.horizon,
        "cameras": data.cameras,
    }
    painter = TinyPainter.from_scratch(data.instructions(), config).train()
    optimizer = torch.optim.AdamW(painter.parameters(), lr=1e-4)
    rng = np.random.default_rng(0)
    stride = max(1, len(data.training) // FRAMES)
    files = []
    for i, frame in enumerate(data.training[::stride]):
        batch = read_batch([frame], data.cameras, config["resolution"], [rng])
        files.append(write_pair(folder, i, batch))

    for number in range(STEPS):
        if number == FIRST:
            start = time.perf_counter()
        chosen = [files[i] for i in rng.integers(len(files), size=Settings.batch_size)]
        loss = their_loss(painter, chosen, bf16=precision == "bf16")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(painter.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (STEPS - FIRST) * Settings.batch_size / (time.perf_counter() - start)


def write_pair(folder: Path, number: int, batch: dict) -> tuple[Path, Path, str]:
    """Condition and target of one frame as PNG files, as diffusers' datasets have them; prompt."""
    pictures = {
        "condition": batch["condition"][0],
        "target": composite(batch["layer"], batch["observation"])[0],
    }
    paths = []
    for name, picture in pictures.items():
        path = folder / f"{number}_{name}.png"
        pixels = (255 * picture).round().byte().permute(1, 2, 0).numpy()  # (H, W, 3)
        Image.fromarray(pixels).save(path)
        paths.append(path)
    return *paths, batch["prompts"][0]


def their_loss(painter: TinyPainter, pairs: list[tuple], bf16: bool) -> torch.Tensor:
    """The noise in the target pictures, predicted, as in diffusers' script."""
    conditions, targets, prompts = zip(*pairs)
    condition = read_png(conditions)  # (B, 3, H, W)
    latents = painter.encode_images(read_png(targets))
    token_ids = tokenize(painter.tokenizer, list(prompts))
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, 1000, (len(pairs),))
    noisy = add_noise(painter.scheduler, latents, noise, timesteps)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        text = painter.text_encoder(token_ids)
        down_residuals, mid_residual = painter.controlnet(
            noisy,
            timesteps,
            text.last_hidden_state,
            class_labels=text.pooler_output,
            controlnet_cond=painter.encode_images(condition),
            return_dict=False,
        )
        predicted = painter.unet(
            noisy,
            timesteps,
            text.last_hidden_state,
            class_labels=text.pooler_output,
            down_block_additional_residuals=down_residuals,
            mid_block_additional_residual=mid_residual,
            return_dict=False,
        )[0]
    predicted = predicted[:, : latents.shape[1]]  # the network has channels for a layer's alpha
    return F.mse_loss(predicted.float(), noise.float())


def read_png(paths: list[Path]) -> torch.Tensor:
    """PNG files -> (B, 3, H, W), 0..1."""
    pictures = []
    for path in paths:
        with Image.open(path) as picture:
            pictures.append(np.asarray(picture.convert("RGB"), np.float32))
    return torch.from_numpy(np.stack(pictures) / 255).permute(0, 3, 1, 2).contiguous()


# ------------------------------------------------------------------------------------------ memory
def memory():
    """Memory that training on SD-Turbo needs, computed without a GPU and without its weights."""
    columns = ("weights", "gradients", "optimiser", "activations", "peak")
    print(f"{'GB':<32}" + "".join(f"{column:>13}" for column in columns))
    for precision, optimizer, samples in (
        ("fp32", "adamw", 1),
        ("bf16", "adamw", 1),
        ("bf16", "adamw", 4),
        ("bf16", "adafactor", 1),
    ):
        numbers = count_bytes(precision, optimizer, samples)
        name = f"{precision}, {optimizer}, micro-batch {samples}"
        shown = "".join(f"{numbers[column] / 1e9:>13.2f}" for column in columns)
        print(f"{name:<32}{shown}", flush=True)


def count_bytes(precision: str, optimizer_name: str, samples: int) -> dict[str, int]:
    """The bytes of two training steps, by what they are for."""
    bf16 = precision == "bf16"
    with FakeTensorMode(allow_non_fake_inputs=True):
        painter = build_turbo(torch.bfloat16 if bf16 else torch.float32)
        optimizer = make_optimizer(optimizer_name, painter, 1e-5)
        batch = random_batch(samples)
        latent_cache = LatentCache(painter)
        with PeakMemory(painter.parameters()) as counted:
            weights = counted.now
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = one_step_loss(painter, painter, batch, latent_cache)
                loss.backward()
                del loss
                parameters = painter.controlnet.parameters()
                gradients = sum(parameter.grad.nbytes for parameter in parameters)
                optimizer.step()
                optimizer.zero_grad()
                states = counted.now - weights
    return {
        "weights": weights,
        "gradients": gradients,
        "optimiser": states,
        "activations": counted.peak - weights - gradients - states,
        "peak": counted.peak,
    }


def build_turbo(frozen_type: torch.dtype) -> TurboPainter:
    """A painter of SD-Turbo's size, prepared for training."""
    torch.set_default_dtype(frozen_type)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        attention_head_dim=(5, 10, 20, 20),
        cross_attention_dim=1024,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    torch.set_default_dtype(torch.float32)
    controlnet = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    config = {
        "size": "sd-turbo",
        "objective": "one-step",
        "num_inference_steps": 1,
        "image_size": 256,
        "resolution": 512,
        "horizon": 20,
        "cameras": list(CAMERAS),
    }
    scheduler = EulerDiscreteScheduler()
    painter = TurboPainter(config, None, None, vae, unet, controlnet, scheduler).train()
    unet.enable_gradient_checkpointing()
    controlnet.enable_gradient_checkpointing()
    painter.prompt_cache[""] = torch.rand(77, 1024)  # the text encoder is dropped before training
    return painter


def random_batch(samples: int) -> dict:
    """What one_step_loss takes: pictures of 512x512 pixels, the empty prompt."""
    condition = torch.rand(samples, 3, 512, 512)
    return {
        "condition": condition,
        "observation": condition,
        "layer": torch.rand(samples, 4, 512, 512),
        "prompts": [""] * samples,
        "seeds": [0] * samples,
        "keys": [None] * samples,
    }


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that exist: `now`, and at the highest point, `peak`."""

    def __init__(self, tensors):
        super().__init__()
        self.known = weakref.WeakSet()
        self.now = 0
        self.peak = 0
        for tensor in tensors:
            self.count(tensor)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if kwargs is None:
            kwargs = {}
        result = function(*args, **kwargs)
        tree_map_only(torch.Tensor, self.count, result)
        return result

    def count(self, tensor):
        storage = tensor.untyped_storage()
        if storage in self.known:
            return
        self.known.add(storage)
        self.add(storage.nbytes())
        weakref.finalize(storage, self.add, -storage.nbytes())

    def add(self, number: int):
        self.now += number
        self.peak = max(self.peak, self.now)
