"""Stage 2: a diffusion model with a ControlNet learns to paint where the robot should go.

In:   <run>/episodes (pictures, instructions) and <run>/spheres (the targets, render_spheres.py)
Out:  <run>/controlnet, in diffusers' layout: controlnet/, and for tiny unet/ text_encoder/
      tokenizer/ scheduler/ (safetensors); painter.json, validation.png (observation, truth,
      painted; unseen scenes), losses.csv, losses.png, README.md (a model card), training.pt

    python train_controlnet.py                                       tiny, from scratch, on a laptop
    python train_controlnet.py --size sd-turbo --run runs/turbo      SD-Turbo, on one GPU
    accelerate launch train_controlnet.py --size sd-turbo --run ...  the same batch, on many GPUs
    python train_controlnet.py --objective noise --run runs/noise    the paper's objective

Ctrl-C stops it; the same command resumes it, to the same losses.

The paper (section 3.1) fine-tunes SD-Turbo: a text-to-image network that reads a prompt, and a
ControlNet that reads the current views, tiled 2x2, and steers it (genima/painter.py). There are two
objectives, each a function of a few lines below:

  noise (the paper's)  Add noise of a random strength to the target picture and predict it. Painting
      starts from noise and takes N Euler steps (5 in the published quick start, 10 in the paper):
      N times as slow, and each step sees what the one before has painted.
  one-step  Go from pure noise to the picture in one pass, as SD-Turbo itself was trained to, and
      compare with the target (pix2pix-turbo, arXiv 2403.12036). Painting takes one pass, so 10 Hz
      holds, and the loss can say which pixels matter. tiny starts from the observation in place of
      noise (as pix2pix-turbo does), for the noise tells it nothing.

tiny predicts an RGBA layer over the observation, so it need not learn to copy. With the layer the
picture is known, and with the picture its noise. (Predicted as noise, an error is 15 times as large
in the picture at t = 999, and tiny's paintings were noise after 1,500 steps.)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from tqdm import tqdm

from genima import painter_training as setup
from genima.files import UserError, run_stage
from genima.hub import check_hub, push, write_card
from genima.painter import TIMESTEP, TinyPainter, TurboPainter
from genima.painter_data import Augmentation, PainterDataset, find_frames, read_batch
from genima.painter_training import LatentCache, add_noise, draw_noise, split_batch
from genima.plots import write_grid, write_losses
from genima.training import (
    StopSignal,
    agree,
    batches,
    half_cosine,
    keep_last,
    resume,
    save,
    set_learning_rate,
    stop_training,
    trained_parameters,
    warmup,
)
from genima.views import composite, grid_of

SPHERE_WEIGHT = 20  # a pixel of a sphere counts as much as 20 others; ours, for spheres are small
COLUMNS = ("step", "loss", "first_frame_iou")  # of losses.csv
POSITIVE = "steps batch_size micro_batch_size checkpoint_every num_inference_steps resolution"
IDENTITY = (
    "size",
    "objective",
    "resolution",
    "steps",
    "batch_size",
    "learning_rate",
    "optimizer",
    "precision",
    "crop",
    "seed",
)
PUSHED_FILES = ("painter.json", "README.md", "validation.png", "losses.csv", "losses.png")


@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """Folder of the run: reads episodes/ and spheres/, writes controlnet/."""
    size: Literal["tiny", "sd-turbo"] = "tiny"
    """tiny: built small and trained from scratch; sd-turbo: a ControlNet for SD-Turbo, on a GPU."""
    objective: Literal["one-step", "noise"] = "one-step"
    """one-step: reconstruct the target in one pass; noise: predict the noise in it (the paper)."""
    base: str = "stabilityai/sd-turbo"
    """For sd-turbo: a model on the Hugging Face Hub, or a folder in its layout."""
    resolution: int | None = None
    """Height of the tiled views, pixels; by default as recorded for tiny, 512 for sd-turbo."""
    steps: int | None = None
    """Gradient steps; by default 4,800 for tiny, 10,000 for sd-turbo (documents: 10 to 50,000)."""
    batch_size: int = 8
    """Samples a step, in all processes together (documents: 8 to 16)."""
    micro_batch_size: int | None = None
    """Samples computed at once; gradients accumulate; default: all for tiny, 1 for sd-turbo."""
    learning_rate: float | None = None
    """By default 8e-4, falling as a cosine, for tiny; 1e-5, constant, for sd-turbo (published)."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """adafactor keeps fewer numbers for a weight than adamw: 2.3 GB less for sd-turbo."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 for sd-turbo on a GPU, and for tiny on a CPU with avx512_bf16 or amx_bf16."""
    crop: int = 2
    """Pixels of the random crop (published code: 2); with 0 each target is encoded only once."""
    num_inference_steps: int = 5
    """For noise: Euler steps to paint (published quick start 5, paper 10)."""
    seed: int = 0
    """Seed of initialisation, sampling and augmentation."""
    checkpoint_every: int = 300
    """Steps between checkpoints and validation pictures."""
    keep: int = 0
    """How many of the last checkpoints to keep in controlnet/step-<N>/ (the paper takes three)."""
    push_to_hub: str | None = None
    """Repository on the Hugging Face Hub (user/name) to upload the painter and its card to."""


# -------------------------------------------------------------------------------------- objectives
# Each is a function of the painter (its encoder and noise schedule), the model (the same network as
# `accelerate` wraps it: bf16, several processes), a batch, and the cache of target latents.
def one_step_loss(painter, model, batch, latent_cache):
    """sd-turbo: from pure noise to the target picture in one pass (pix2pix-turbo)."""
    target = latent_cache.encode(batch)  # (B, 4, h, w)
    noise, _ = draw_noise(batch["seeds"], target)
    predicted_noise = model(batch["condition"], batch["prompts"], noise, TIMESTEP)
    a = painter.scheduler.alphas_cumprod[TIMESTEP]
    predicted = (noise - (1 - a).sqrt() * predicted_noise) / a.sqrt()
    spheres = F.adaptive_avg_pool2d(batch["layer"][:, 3:], target.shape[2:])  # (B, 1, h, w)
    weight = 1 + (SPHERE_WEIGHT - 1) * spheres
    return (weight * (predicted - target).abs()).mean()


def noise_loss(painter, model, batch, latent_cache):
    """sd-turbo: predict the noise that was added to the target picture (paper)."""
    target = latent_cache.encode(batch)  # (B, 4, h, w)
    noise, timesteps = draw_noise(batch["seeds"], target)
    noisy = add_noise(painter.scheduler, target, noise, timesteps)
    predicted_noise = model(batch["condition"], batch["prompts"], noisy, timesteps)
    return F.mse_loss(predicted_noise.float(), noise)


def tiny_one_step_loss(painter, model, batch, latent_cache):
    """tiny: from the observation to the layer in one pass."""
    logits = model(batch["condition"], batch["prompts"])  # (B, 4, H, W)
    return painting_loss(logits, batch["layer"], batch["observation"])


def tiny_noise_loss(painter, model, batch, latent_cache):
    """tiny: from the target picture with noise to the layer."""
    target = latent_cache.encode(batch)  # (B, 48, h, w)
    noise, timesteps = draw_noise(batch["seeds"], target)
    noisy = add_noise(painter.scheduler, target, noise, timesteps)
    logits = model(batch["condition"], batch["prompts"], noisy, timesteps)  # (B, 4, H, W)
    return painting_loss(logits, batch["layer"], batch["observation"])


OBJECTIVES = {
    ("sd-turbo", "one-step"): one_step_loss,
    ("sd-turbo", "noise"): noise_loss,
    ("tiny", "one-step"): tiny_one_step_loss,
    ("tiny", "noise"): tiny_noise_loss,
}


def painting_loss(logits, layer, observation):
    """Where to paint (cross-entropy of alpha), and what it looks like (L1 of the picture)."""
    alpha = layer[:, 3:]
    where = F.binary_cross_entropy_with_logits(logits[:, 3:], alpha)
    painted = composite(logits.sigmoid(), observation)
    target = composite(layer, observation)
    weight = 1 + (SPHERE_WEIGHT - 1) * alpha
    return where + (weight * (painted - target).abs()).mean()


# ------------------------------------------------------------------------------------------ set-up
def check_settings(settings, num_processes, cameras, image_size):
    """Fill in the defaults that depend on others. Raises UserError for what cannot be trained."""
    if settings.batch_size < num_processes:
        raise UserError(
            f"There are more processes ({num_processes}) than samples a step "
            f"({settings.batch_size}): raise --batch-size."
        )
    share = settings.batch_size // num_processes
    rows, columns = grid_of(len(cameras))
    defaults = {"steps": 10_000, "learning_rate": 1e-5, "resolution": 512, "micro_batch_size": 1}
    unit = 8  # pixels of one latent
    if settings.size == "tiny":
        defaults = {"steps": 4800, "learning_rate": 8e-4, "resolution": rows * image_size}
        defaults["micro_batch_size"] = share
        unit = 16  # pixels of one latent, halved twice in the UNet
    for name, value in defaults.items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)

    for name in POSITIVE.split():
        if getattr(settings, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more.")
    if settings.keep < 0 or settings.crop < 0:
        raise UserError("--keep and --crop must be 0 or more.")
    height = settings.resolution
    width = height * columns // rows
    if height % unit or width % unit:
        raise UserError(
            f"The tiled views have {height}x{width} pixels, which is no multiple of {unit}: "
            "give another --resolution."
        )
    if settings.batch_size % num_processes or share % settings.micro_batch_size:
        raise UserError(
            f"--batch-size {settings.batch_size} is no multiple of {num_processes} processes times "
            f"--micro-batch-size {settings.micro_batch_size}: change one."
        )
    if settings.push_to_hub:
        check_hub(settings.push_to_hub)


def build_painter(settings, data, device):
    """The painter to train, on its device."""
    torch.manual_seed(settings.seed)
    config = {
        "size": settings.size,
        "objective": settings.objective,
        "num_inference_steps": settings.num_inference_steps,
        "image_size": data.image_size,
        "resolution": settings.resolution,
        "horizon": data.horizon,
        "cameras": data.cameras,
    }
    if settings.objective == "one-step":
        config["num_inference_steps"] = 1
    bf16 = settings.precision == "bf16"
    if settings.size == "tiny":
        painter = TinyPainter.from_scratch(data.instructions(), config)
        return setup.prepare_tiny(painter, device, bf16)
    painter = TurboPainter.from_base(settings.base, config)
    return setup.prepare_turbo(painter, device, bf16, data.instructions())


def make_batches(settings, data, accelerator, start):
    """The batches of all steps to come; with several processes, this one's share of each."""
    hue = Augmentation.hue
    if settings.size == "tiny":
        hue = 0.0  # the instruction names colours, and tiny has seen no others
    dataset = PainterDataset(
        data.training,
        data.cameras,
        settings.resolution,
        Augmentation(crop=settings.crop, hue=hue),
        settings.batch_size,
        settings.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    on_cpu = accelerator.device.type == "cpu"  # whose cores loading would take away
    return batches(dataset, start, settings.steps, num_workers=0 if on_cpu else 2)


def learning_rate_at(step, settings):
    """A short warm-up; then constant for sd-turbo, half a cosine down to zero for tiny."""
    factor = warmup(step)
    if settings.size == "tiny":
        factor = min(factor, half_cosine(step, settings.steps))
    return settings.learning_rate * factor


# -------------------------------------------------------------------------------------- validation
@torch.no_grad()
def validate(painter, data, settings, folder):
    """The overlap (IoU) of painted and true spheres, and <folder>/validation.png.

    Only the *first* frames of unseen scenes count: there nothing but the prompt and the picture
    tells the target. A sphere is where a picture differs from the observation by a fifth.
    """
    painter.eval()
    frames = data.held_out
    if not frames:
        frames = data.training
    firsts = [frame for frame in frames if frame.t == 0]
    count = 48 if settings.size == "tiny" else 8
    rng = np.random.default_rng(0)
    chosen = [firsts[i] for i in rng.permutation(len(firsts))[:count]]
    batch = read_batch(chosen, data.cameras, settings.resolution, [rng] * len(chosen))
    painted = []
    for part in split_batch(batch, settings.micro_batch_size, painter.unet.device):
        painted.append(painter.paint_tiled(part["observation"], part["prompts"]).cpu())
    painter.train()

    observation = batch["observation"]
    pictures = {
        "observation": observation,
        "truth": composite(batch["layer"], observation),
        "painted": torch.cat(painted),
    }
    captions = [prompt.split("'")[1] for prompt in batch["prompts"][:6]]
    write_grid(folder / "validation.png", pictures, captions)
    painted_spheres = (pictures["painted"] - observation).abs().amax(1) > 0.2  # (B, H, W)
    true_spheres = (pictures["truth"] - observation).abs().amax(1) > 0.2
    intersection = (painted_spheres & true_spheres).sum()
    union = (painted_spheres | true_spheres).sum()
    return (intersection / union.clamp(min=1)).item()


# ---------------------------------------------------------------------------------------- training
def main():
    settings = tyro.cli(Settings, description=__doc__)
    settings.precision = setup.choose_precision(settings.size, settings.precision)
    accelerator = Accelerator(mixed_precision="bf16" if settings.precision == "bf16" else "no")
    is_main_process = accelerator.is_main_process  # the one that writes and prints
    folder = settings.run / "controlnet"

    data = find_frames(settings.run)
    check_settings(settings, accelerator.num_processes, data.cameras, data.image_size)
    parts = settings.batch_size // accelerator.num_processes // settings.micro_batch_size
    accelerator.gradient_accumulation_steps = parts
    painter = build_painter(settings, data, accelerator.device)
    optimizer = setup.make_optimizer(settings.optimizer, painter, settings.learning_rate)

    identity = {name: getattr(settings, name) for name in IDENTITY}
    identity |= {"image_size": data.image_size, "horizon": data.horizon}
    identity |= {"cameras": data.cameras, "frames": len(data.training)}
    start, log = resume(folder, painter, optimizer, identity)  # log: rows as in losses.csv
    model, optimizer = accelerator.prepare(painter, optimizer)
    loader = make_batches(settings, data, accelerator, start)
    objective = OBJECTIVES[settings.size, settings.objective]
    latent_cache = LatentCache(painter)
    stopping = StopSignal()
    quiet = not is_main_process or start == settings.steps
    if not quiet:
        trained = sum(parameter.numel() for parameter in trained_parameters(painter).values())
        print(
            f"{len(data.training)} frames to train on, {len(data.held_out)} held out, "
            f"{trained / 1e6:.1f} M parameters to train, on {accelerator.num_processes} processes "
            f"({accelerator.device.type})."
        )

    bar = tqdm(loader, "painter", settings.steps, disable=quiet, unit="step", initial=start)
    for step, batch in enumerate(bar, start + 1):
        set_learning_rate(optimizer, learning_rate_at(step, settings))
        loss = 0.0
        for part in split_batch(batch, settings.micro_batch_size, accelerator.device):
            with accelerator.accumulate(model):
                part_loss = objective(painter, model, part, latent_cache)
                accelerator.backward(part_loss)
            loss += part_loss.detach() / parts
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        loss, stop = agree(accelerator, loss, stopping.requested)
        log.append([step, loss, ""])
        recent = [row[1] for row in log[-50:]]
        bar.set_postfix(loss=f"{np.mean(recent):.4f}", refresh=False)
        due = step % settings.checkpoint_every == 0 or step == settings.steps
        if is_main_process and due:
            log[-1][2] = validate(painter, data, settings, folder)
        if is_main_process and (due or stop):
            painter.save(folder)
            write_losses(folder, COLUMNS, log, COLUMNS[1:2], COLUMNS[2:], "overlap of spheres")
            write_card(folder, settings, log, len(data.training), data.horizon)
            if due:
                keep_last(folder, [*painter.saved_parts, "painter.json"], step, settings.keep)
            save(folder, painter, optimizer, identity, step, log)
        if stop and step < settings.steps:
            stop_training(step, say=is_main_process)

    if is_main_process:
        already = "trained already; " if start == settings.steps else ""
        print(
            f"{folder}: {already}overlap (IoU) of painted and true spheres at the first frames of "
            f"unseen scenes {log[-1][2]:.3f}."
        )
        if settings.push_to_hub:
            push(folder, [*painter.saved_parts, *PUSHED_FILES], settings.push_to_hub)


if __name__ == "__main__":
    run_stage(setup.advise_when_out_of_memory(main))
