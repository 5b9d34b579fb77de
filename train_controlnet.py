"""Stage 2: a diffusion model with a ControlNet learns to paint where the robot should go.

    In:   <run>/episodes (pictures, instructions) and <run>/spheres (the targets, render_spheres.py)
    Out:  <run>/controlnet (or --out), in diffusers' layout: controlnet/, for tiny and small also
          unet/ text_encoder/ tokenizer/ scheduler/ (safetensors); painter.json, README.md (a card),
          validation.png (scenes held out), losses.csv, losses.png, training.pt

    python train_controlnet.py                                       tiny, from the shipped base
    python train_controlnet.py --rehearse runs/scenes --backgrounds  what make demo does
    python train_controlnet.py --base none --run runs/scratch        tiny, from random weights
    python train_controlnet.py --size small --run runs/small         ten times tiny, on one GPU
    python train_controlnet.py --size sd-turbo --run runs/turbo      SD-Turbo, on one GPU
    accelerate launch train_controlnet.py --size sd-turbo --run ...  the same batch, on many GPUs
    python train_controlnet.py --objective noise --run runs/noise    the paper's objective

Ctrl-C stops it; the same command resumes it, to the same losses.

The paper (section 3.1) fine-tunes SD-Turbo: a text-to-image network that reads a prompt, and a
ControlNet that reads the current views, tiled 2x2, and steers it (genima/painter.py). It paints the
layers in <run>/spheres: to predict something else, put other layers there. Two objectives:

  noise_loss (the paper's): add noise of a random strength to the target picture and predict it.
      Painting starts from noise and takes N Euler steps (published quick start 5, paper 10): N
      times as slow, and each step sees what the one before has painted.
  one_step_loss: from pure noise to the picture in one pass, as SD-Turbo itself was trained, and
      compare with the target (pix2pix-turbo, arXiv 2403.12036). Painting takes one pass, so 10 Hz
      holds, and the loss can say which pixels matter.

tiny_noise_loss and tiny_one_step_loss are the same for tiny and small, which predict an RGBA layer
over the observation: they need not learn to copy. With the layer the picture is known, and with the
picture its noise. (Predicted as noise, an error is 15 times as large in the picture.) For one step,
they start from the observation, as pix2pix-turbo does: noise would have nothing to read in it.
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
from genima.base import FROM_SCRATCH, check_base, load_base
from genima.diffusion import LatentCache, add_noise, draw_noise
from genima.files import run_stage
from genima.hub import push, write_card
from genima.micro_batch import resolve_micro_batch
from genima.painter import PROMPT, TIMESTEP, TinyPainter, TurboPainter
from genima.painter_data import Augmentation, PainterDataset, find_frames, read_batch
from genima.plots import write_grid, write_losses
from genima.scene_files import find_scenes
from genima.scenes import measured_in
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
    warmup,
)
from genima.turbo_speed import compile_for_training
from genima.views import composite

SPHERE_WEIGHT = 20  # a pixel of a sphere counts as much as 20 others; ours: spheres are small
HUE = {"tiny": 0.0, "small": 0.0, "sd-turbo": 0.05}  # published; but instructions name colours
VALIDATED = {"tiny": 48, "small": 48, "sd-turbo": 8}  # first frames that a validation paints
COLUMNS = ("step", "loss", "first_frame_iou")  # of losses.csv
PUSHED_FILES = ("painter.json", "README.md", "validation.png", "losses.csv", "losses.png")


@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """Folder of the run: reads episodes/ and spheres/."""
    out: Path | None = None
    """Folder of the trained painter; by default controlnet/ in the run."""
    size: Literal["tiny", "small", "sd-turbo"] = "tiny"
    """tiny: small networks, for a laptop; small: ten times as large, for one consumer GPU;
    sd-turbo: a ControlNet for SD-Turbo, on a large GPU."""
    objective: Literal["one-step", "noise"] = "one-step"
    """one-step: reconstruct the target in one pass; noise: predict the noise in it (the paper)."""
    base: str | None = None
    """Where training starts: sd-turbo's folder or name on the Hub (stabilityai/sd-turbo), else a
    folder of pretrain_painter.py (checkpoints/base; small: runs/base-small), or none (random)."""
    rehearse: Path | None = None
    """Folder of pretrain_painter.py --steps 0: every fourth sample is one of its random scenes."""
    backgrounds: bool = False
    """In half of the samples, random textures where a camera sees only the empty room."""
    resolution: int | None = None
    """Height of the tiled views, pixels; by default 512 for sd-turbo. Else small square views stay
    as recorded, and others become as large as the base's."""
    any_frame: bool = False
    """All frames equally often, which long tasks need; by default early ones more often."""
    steps: int | None = None
    """Gradient steps; by default 10,000 for sd-turbo (documents: up to 50,000), else 1,200 from a
    base and 4,800 from random weights."""
    batch_size: int = 8
    """Samples a step, in all processes together (documents: 8 to 16)."""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Samples computed at once; gradients add up. auto: all for tiny, else what fits."""
    learning_rate: float | None = None
    """By default 1e-5, constant, for sd-turbo (published); for tiny (small) 2e-4 (7e-5) from a base
    and 8e-4 (3e-4) from random weights, falling as a cosine."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """adafactor keeps fewer numbers for a weight than adamw: 2.3 GB less for sd-turbo."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 for small and sd-turbo on a GPU, for tiny and small on a CPU with fast bf16."""
    compile: bool = False
    """Compile the networks for this GPU: takes minutes, then each step is faster."""
    crop: int = 2
    """Pixels of the random crop (published code: 2); with 0 each target is encoded only once."""
    failed: bool = False
    """Also train on demonstrations that failed."""
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
    (TurboPainter, "one-step"): one_step_loss,
    (TurboPainter, "noise"): noise_loss,
    (TinyPainter, "one-step"): tiny_one_step_loss,
    (TinyPainter, "noise"): tiny_noise_loss,
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
def build_painter(settings, data, device):
    """The painter to train, on its device."""
    torch.manual_seed(settings.seed)
    config = {
        "size": settings.size,
        "objective": settings.objective,
        "num_inference_steps": settings.num_inference_steps,
        "resolution": settings.resolution,
        **data.describe(),
    }
    if settings.objective == "one-step":
        config["num_inference_steps"] = 1
    bf16 = settings.precision == "bf16"
    if settings.size == "sd-turbo":
        painter = TurboPainter.from_base(settings.base, config)
        return setup.prepare_turbo(painter, device, bf16, data.instructions())
    if settings.base == FROM_SCRATCH:
        painter = TinyPainter.from_scratch(data.instructions(), config)
    else:
        painter = load_base(settings.base, config)
        setup.check_prompts(painter, data)
    return setup.prepare_tiny(painter, device, bf16)


def make_batches(settings, data, accelerator, start):
    """The batches of all steps to come; with several processes, this one's share of each."""
    room = setup.find_room(data, settings.resolution) if settings.backgrounds else None
    dataset = PainterDataset(
        data.training,
        data.cameras,
        settings.resolution,
        Augmentation(crop=settings.crop, hue=HUE[settings.size], room=room),
        settings.batch_size,
        settings.seed,
        accelerator.process_index,
        accelerator.num_processes,
        data.rehearsed,
        settings.any_frame,
    )
    on_cpu = accelerator.device.type == "cpu"  # whose cores loading would take away
    return batches(dataset, start, settings.steps, 0 if on_cpu else 8, pin_memory=not on_cpu)


def learning_rate_at(step, settings):
    """A short warm-up; then constant for sd-turbo (published), else half a cosine down to zero."""
    factor = warmup(step)
    if settings.size != "sd-turbo":
        factor = min(factor, half_cosine(step, settings.steps))
    return settings.learning_rate * factor


# -------------------------------------------------------------------------------------- validation
@torch.no_grad()
def validate(painter, data, settings, folder):
    """The overlap (IoU) of painted and true spheres, and <folder>/validation.png.

    Only the *first* frames of scenes held out count: there nothing but the prompt and the picture
    tells the target.
    """
    painter.eval()
    frames = data.held_out if data.held_out else data.training
    firsts = [frame for frame in frames if frame.t == 0]
    rng = np.random.default_rng(0)
    chosen = [firsts[i] for i in rng.permutation(len(firsts))[: VALIDATED[settings.size]]]
    batch = read_batch(chosen, data.cameras, settings.resolution, [rng] * len(chosen))
    painted = []
    for part in setup.split_batch(batch, settings.micro_batch_size, painter.unet.device):
        painted.append(painter.paint_tiled(part["observation"], part["prompts"]).cpu())
    painter.train()

    observation = batch["observation"]
    pictures = {
        "observation": observation,
        "truth": composite(batch["layer"], observation),
        "painted": torch.cat(painted),
    }
    captions = [prompt.split("'", 1)[1][:-1] for prompt in batch["prompts"][:6]]
    write_grid(folder / "validation.png", pictures, captions)
    return setup.sphere_overlap(pictures["painted"], pictures["truth"], observation)


# ---------------------------------------------------------------------------------------- training
def save_painter(folder, painter, settings, data, log):
    """Everything in <folder> but training.pt."""
    painter.save(folder)
    write_losses(folder, COLUMNS, log, ["loss"], ["first_frame_iou"], "overlap of spheres")
    where = measured_in(data.scenes_held_out)
    write_card(folder, settings, log, len(data.training), data.horizon, where)


def main():
    settings = tyro.cli(Settings, description=__doc__)
    settings.precision = setup.choose_precision(settings.size, settings.precision)
    accelerator = Accelerator(mixed_precision="bf16" if settings.precision == "bf16" else "no")
    is_main_process = accelerator.is_main_process  # the one that writes and prints
    data = find_frames(settings.run, settings.failed)
    data.rehearsed = find_scenes(settings.rehearse, data.cameras, data.image_size)
    setup.fill_in_defaults(settings, data)
    setup.check_settings(settings, accelerator.num_processes, data.cameras)
    folder = settings.out
    check_base(settings.size, settings.base, folder)

    painter = build_painter(settings, data, accelerator.device)
    objective = OBJECTIVES[type(painter), settings.objective]
    prompt = PROMPT.format(data.instructions()[0])
    resolve_micro_batch(settings, painter, objective, accelerator, prompt)
    if settings.compile:
        print(compile_for_training(painter))
    parts = settings.batch_size // accelerator.num_processes // settings.micro_batch_size
    accelerator.gradient_accumulation_steps = parts
    latent_cache = LatentCache(painter)
    optimizer = setup.make_optimizer(settings.optimizer, painter, settings.learning_rate)
    identity = setup.identity_of(settings, data)
    start, log = resume(folder, painter, optimizer, identity)  # log: rows of losses.csv
    model, optimizer = accelerator.prepare(painter, optimizer)
    loader = make_batches(settings, data, accelerator, start)
    quiet = not is_main_process or start == settings.steps
    if not quiet:
        print(setup.describe_training(painter, accelerator, data, settings.failed))

    stopping = StopSignal()
    bar = tqdm(loader, "painter", settings.steps, unit="step", initial=start, disable=quiet)
    for step, batch in enumerate(bar, start + 1):
        set_learning_rate(optimizer, learning_rate_at(step, settings))
        loss = 0.0
        for part in setup.split_batch(batch, settings.micro_batch_size, accelerator.device):
            with accelerator.accumulate(model):  # processes exchange gradients at the last part
                part_loss = objective(painter, model, part, latent_cache)
                accelerator.backward(part_loss)  # divides by the number of parts
            loss += part_loss.detach() / parts
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        loss, stop = agree(accelerator, loss, stopping.requested)
        log.append([step, loss, ""])
        bar.set_postfix(loss=f"{np.mean([row[1] for row in log[-50:]]):.4f}", refresh=False)
        due = step % settings.checkpoint_every == 0 or step == settings.steps
        if is_main_process and due:
            log[-1][2] = validate(painter, data, settings, folder)
        if is_main_process and (due or stop):
            save_painter(folder, painter, settings, data, log)
            if due:
                keep_last(folder, [*painter.saved_parts, "painter.json"], step, settings.keep)
            save(folder, painter, optimizer, identity, step, log)
        if stop and step < settings.steps:
            stop_training(step, say=is_main_process)

    if is_main_process:
        already = "trained already; " if start == settings.steps else ""
        where = measured_in(data.scenes_held_out)
        overlap = f"overlap (IoU) of painted and true spheres at the first frames of {where}"
        print(f"{folder}: {already}{overlap} {log[-1][2]:.3f}.")
        if settings.push_to_hub:
            push(folder, [*painter.saved_parts, *PUSHED_FILES], settings.push_to_hub)


if __name__ == "__main__":
    run_stage(setup.advise_when_out_of_memory(main))
