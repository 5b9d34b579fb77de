"""Stage 2: a diffusion model with a ControlNet learns to paint where the robot should go.

In:   <run>/episodes (pictures, instructions) and <run>/spheres (the targets, render_spheres.py)
Out:  <run>/controlnet, in diffusers' layout: unet/ controlnet/ text_encoder/ tokenizer/ scheduler/ (safetensors);
      painter.json, validation.png (observation, truth, painted; unseen scenes), losses.csv, losses.png, training.pt (to resume)
Run:  python train_controlnet.py                       the laptop rung: trained from nothing
      Stop it with Ctrl-C; the same command goes on where it was, to the same losses.

The paper (section 3.1) fine-tunes SD-Turbo: a text-to-image network that reads a prompt, and a ControlNet that reads the
current views, tiled 2x2, and steers it. The laptop rung keeps the parts (CLIP text model, UNet, ControlNet with its zero
convolutions, one step at t = 999) and builds them small, with three simplifications that a network trained from nothing needs:
  - no VAE: a latent is a 4x4 patch of pixels (pixel unshuffle), which loses nothing and need not be trained;
  - the UNet starts from the observation instead of noise (as pix2pix-turbo does, arXiv 2403.12036, section 3.1): with one
    step there is nothing in the noise to read;
  - the output is an RGBA layer over the observation instead of the whole picture: the network need not learn to copy.
"""

import csv
import math
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import h5py
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from tqdm import tqdm

from episodes import CAMERAS, UserError, find_episodes, read_episode, read_hdf5, run_stage, write_whole
from episodes import FORMAT as EPISODE_FORMAT
from painter import PROMPT, Painter, build_tiny, compose, tile
from render_spheres import FORMAT as SPHERES_FORMAT

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """Folder of the run: reads episodes/ and spheres/, writes controlnet/."""
    size: Literal["tiny"] = "tiny"
    """tiny: the laptop rung, built small and trained from nothing."""
    steps: int = 3600
    """Gradient steps."""
    batch: int = 8
    """Samples a step."""
    learning_rate: float = 8e-4
    """Peak of the cosine schedule (AdamW)."""
    seed: int = 0
    """Seed of initialisation, sampling and augmentation."""
    checkpoint_every: int = 300
    """Steps between checkpoints and validation pictures."""
    workers: int = 1
    """Processes that read episodes beside the training."""


# -------------------------------------------------------------------------------------------------------------- data
class Batches(torch.utils.data.Dataset):
    """Item `step` is this process's share of that step's batch. Sample i is a function of (seed, step, i) alone: to resume, or to
    share a batch among other processes, nothing need be remembered."""

    def __init__(self, frames, settings, process=0, processes=1, augment=True):
        self.settings, self.augment, share, episodes = settings, augment, settings.batch // processes, {}
        self.mine = range(process * share, (process + 1) * share)
        for frame in frames:  # (episode, spheres, t, instructions)
            episodes.setdefault(frame[0], []).append(frame)
        self.episodes = list(episodes.values())

    def __len__(self):
        return self.settings.steps

    def __getitem__(self, step):
        rngs = [np.random.default_rng([self.settings.seed, step, i]) for i in self.mine]
        chosen = [self.episodes[rng.integers(len(self.episodes))] for rng in rngs]
        # Early frames come more often: there nothing but the words tells the target; later the arm's place gives it away.
        chosen = [frames[int(len(frames) * rng.random() ** 2)] for frames, rng in zip(chosen, rngs)]
        return load(chosen, rngs, self.augment)


def load(frames, rngs, augment):
    """Reads frames -> condition, observation (B, 3, 2H, 2W) and layer (B, 4, 2H, 2W) as floats 0..1, and prompts."""
    conditions, observations, layers, prompts = [], [], [], []
    for (episode, spheres, t, instructions), rng in zip(frames, rngs):
        with h5py.File(episode, "r") as images, h5py.File(spheres, "r") as drawn:
            observation = np.stack([images[f"observations/images/{camera}"][t] for camera in CAMERAS])
            layer = np.stack([drawn[f"layers/{camera}"][t] for camera in CAMERAS])
        both = np.concatenate([observation, layer], axis=-1)  # (4, H, W, 7)
        if augment:  # the same random crop for condition and target: 2 pixels of reflect padding (published code)
            dy, dx = rng.integers(0, 5, size=2)
            H, W = both.shape[1:3]
            both = np.pad(both, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")[:, dy : dy + H, dx : dx + W]
        both = tile(torch.from_numpy(both).permute(0, 3, 1, 2).float()[None] / 255)[0]  # (7, 2H, 2W)
        observations.append(both[:3])
        layers.append(both[3:])
        conditions.append(colour_jitter(both[:3], rng) if augment else both[:3])
        prompts.append(PROMPT.format(instructions[rng.integers(len(instructions))]))
    return torch.stack(conditions), torch.stack(observations), torch.stack(layers), prompts


def colour_jitter(picture, rng):
    """Brightness 0.2, contrast 0.2, saturation 0.1 (published code), of the condition alone: (3, H, W) in 0..1.

    Its hue jitter of 0.05 is left out: here the colour's name is what the instruction says.
    """
    brightness, contrast, saturation = (float(rng.uniform(1 - strength, 1 + strength)) for strength in (0.2, 0.2, 0.1))
    picture = picture * brightness
    picture = picture.mean() + contrast * (picture - picture.mean())
    grey = picture.mean(dim=0, keepdim=True)
    return (grey + saturation * (picture - grey)).clamp(0, 1)


def find_frames(run):
    """Every frame on disk as (episode file, spheres file, t, instructions), a twentieth of the scenes kept apart; and K."""
    training, held_out, horizons = [], [], set()
    for path in find_episodes(run / "episodes"):
        spheres = run / "spheres" / path.relative_to(run / "episodes")
        if not spheres.exists():
            raise UserError(f"{spheres} is missing: draw the spheres first (python render_spheres.py --run {run}).")
        with read_hdf5(path, EPISODE_FORMAT) as root:
            instructions, length, seed = [str(text) for text in root.attrs["instructions"]], len(root["action"]), root.attrs["seed"]
        with read_hdf5(spheres, SPHERES_FORMAT) as root:
            horizons.add(int(root.attrs["horizon"]))
        frames = [(str(path), str(spheres), t, instructions) for t in range(length)]
        (held_out if seed % 20 == 0 else training).extend(frames)
    if not training:
        raise UserError(f"{run / 'episodes'} has no scene to train on: record more (python collect_demos.py --run {run}).")
    if len(horizons) > 1:
        raise UserError(f"{run / 'spheres'} was drawn with different horizons {sorted(horizons)}: delete it and draw it again.")
    return training, held_out, horizons.pop()


def painting_loss(logits, layer, observation):
    """Where to paint (cross-entropy of alpha) and what it looks like (L1 of the composed picture, spheres 20 to 1)."""
    alpha = layer[:, 3:]
    where = F.binary_cross_entropy_with_logits(logits[:, 3:], alpha)
    difference = (compose(logits.sigmoid(), observation) - compose(layer, observation)).abs()
    weight = 1 + 19 * alpha
    return where + (weight * difference).mean()


# --------------------------------------------------------------------------------------------------------- training
def main():
    settings = tyro.cli(Settings, description=__doc__)
    if min(settings.steps, settings.batch, settings.checkpoint_every) < 1:
        raise UserError("--steps, --batch and --checkpoint-every must be 1 or more.")
    folder = settings.run / "controlnet"
    accelerator = Accelerator()
    training, held_out, horizon = find_frames(settings.run)
    image_size = read_episode(training[0][0]).images[CAMERAS[0]].shape[1]
    instructions = sorted({sentence for frame in training for sentence in frame[3]})
    identity = {"image_size": image_size, "horizon": horizon, "frames": len(training), "steps": settings.steps,
                "batch": settings.batch, "learning_rate": settings.learning_rate, "seed": settings.seed}  # fmt: skip

    torch.manual_seed(settings.seed)
    painter = Painter(*build_tiny(instructions, image_size), {"image_size": image_size, "horizon": horizon, "cameras": CAMERAS})
    optimizer = torch.optim.AdamW(painter.parameters(), lr=settings.learning_rate, weight_decay=1e-2)
    step, log = resume(folder, painter, optimizer, identity)
    if step == settings.steps:
        print(f"{folder} is trained already: {step} steps.")
        return
    model, optimizer = accelerator.prepare(painter, optimizer)
    batches = torch.utils.data.DataLoader(
        Batches(training, settings), batch_size=None, sampler=range(step, settings.steps), num_workers=settings.workers,
        worker_init_fn=ignore_interrupt,
    )  # fmt: skip
    stopping = []
    signal.signal(signal.SIGINT, lambda *_: stopping.append(True))
    bar = tqdm(batches, desc="painter", unit="step", initial=step, total=settings.steps, disable=not accelerator.is_main_process)
    for condition, observation, layer, prompts in bar:
        condition, observation, layer = (x.to(accelerator.device) for x in (condition, observation, layer))
        for group in optimizer.param_groups:  # a short warm-up, then half a cosine down to zero
            group["lr"] = settings.learning_rate * min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / settings.steps)))
        loss = painting_loss(model(condition, prompts), layer, observation)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        step += 1
        log.append([step, loss.item(), ""])
        bar.set_postfix(loss=f"{np.mean([row[1] for row in log[-50:]]):.4f}", refresh=False)
        due = step % settings.checkpoint_every == 0 or step == settings.steps
        if accelerator.is_main_process and (due or stopping):
            if due:
                log[-1][2] = validate(painter, held_out or training, folder)
            save(folder, painter, optimizer, step, log, identity)
        if stopping:
            print(f"\nStopped after step {step}: run the same command again to go on.", file=sys.stderr)
            sys.exit(130)
    print(f"{folder}: overlap (IoU) of painted and true spheres at the first frames of unseen scenes {log[-1][2]:.3f}.")


def ignore_interrupt(_worker):
    """Ctrl-C is the trainer's business. (A function of the module: macOS starts workers by name.)"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@torch.no_grad()
def validate(painter, frames, folder, count=48):
    """Overlap (IoU) of painted and true layers on unseen scenes, at their *first* frames, where nothing but the picture and
    the words tell the target; and a picture of some."""
    painter.eval()
    firsts = [frame for frame in frames if frame[2] == 0]
    rng = np.random.default_rng(0)
    chosen = [firsts[i] for i in rng.permutation(len(firsts))[:count]]
    _, observation, layer, prompts = load(chosen, [rng] * len(chosen), augment=False)
    device = next(painter.parameters()).device
    painted = torch.cat([painter(o.to(device), p).sigmoid().cpu() for o, p in
                         ((observation[i : i + 8], prompts[i : i + 8]) for i in range(0, len(chosen), 8))])  # fmt: skip
    painter.train()
    a, b = painted[:, 3] > 0.5, layer[:, 3] > 0.5
    overlap = ((a & b).sum() / (a | b).sum()).item()
    show = slice(0, 6)
    rows = [observation[show], compose(layer, observation)[show], compose(painted, observation)[show]]
    height, width = rows[0].shape[-2:]
    figure, axes = plt.subplots(len(rows[0]), 3, figsize=(9, 3.3 * len(rows[0])), squeeze=False)
    for j, (title, pictures) in enumerate(zip(("observation", "truth", "painted"), rows)):
        for i, picture in enumerate(pictures):
            axes[i, j].imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes[i, j].axis("off")
            axes[i, j].set_title(title if j else prompts[i].split("'")[1], fontsize=9)
    figure.tight_layout()
    with write_whole(folder / "validation.png") as path:
        figure.savefig(path, dpi=70, format="png")
    plt.close(figure)
    return overlap


def save(folder, painter, optimizer, step, log, identity):
    """The checkpoint, the parts for inference, the log and its plot: each file whole."""
    painter.save(folder)
    with write_whole(folder / "losses.csv") as path, open(path, "w", newline="") as file:
        csv.writer(file).writerows([("step", "loss", "first_frame_iou"), *log])
    figure, left = plt.subplots(figsize=(7, 4), layout="constrained")
    losses, window = np.array([row[1] for row in log]), min(50, len(log))
    left.plot(range(window, len(losses) + 1), np.convolve(losses, np.ones(window) / window, "valid"))
    left.set(xlabel="step", ylabel="training loss (mean of 50 steps)", yscale="log", title="The painter learns")
    right = left.twinx()
    marks = [(row[0], row[2]) for row in log if row[2] != ""]
    right.plot([step for step, _ in marks], [overlap for _, overlap in marks], "o-", color="tab:orange")
    right.set(ylim=(0, 1))
    right.set_ylabel("overlap (IoU), first frames of unseen scenes", color="tab:orange")
    with write_whole(folder / "losses.png") as path:
        figure.savefig(path, dpi=100, format="png")
    plt.close(figure)
    with write_whole(folder / "training.pt") as path:  # last: after a kill before this, these steps are done and all is written again
        torch.save({"step": step, "identity": identity, "log": log, "model": painter.state_dict(), "optimizer": optimizer.state_dict()}, path)


def resume(folder, painter, optimizer, identity):
    """Loads the last checkpoint, if there is one. Returns the step to go on from and the log so far."""
    path = folder / "training.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        return 0, []
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        before = saved["identity"]
    except Exception as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:100]}): delete it to train anew.") from error
    for name, value in identity.items():
        if before.get(name) != value:
            raise UserError(f"{path} was trained with {name} {before.get(name)}, not {value}: delete {folder}, or use another --run.")
    try:
        painter.load_state_dict(saved["model"])
    except RuntimeError:
        raise UserError(f"{path} is of a network of another size or vocabulary: delete {folder}, or use another --run.") from None
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"], saved["log"]


if __name__ == "__main__":
    run_stage(main)
