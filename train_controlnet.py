"""Stage 2: a diffusion model with a ControlNet learns to paint where the robot should go.

In:   <run>/episodes (pictures, instructions) and <run>/spheres (the targets, render_spheres.py)
Out:  <run>/controlnet, in diffusers' layout: controlnet/, and for tiny unet/ text_encoder/ tokenizer/ scheduler/ (safetensors);
      painter.json, validation.png (observation, truth, painted; unseen scenes), losses.csv, losses.png, training.pt (to resume),
      README.md (a model card)

    python train_controlnet.py                                       the laptop rung: tiny, trained from nothing
    python train_controlnet.py --size sd-turbo --run runs/turbo      SD-Turbo, on one GPU
    accelerate launch train_controlnet.py --size sd-turbo --run ...  the same on many: the same batch, shared among them
    python train_controlnet.py --objective noise --run runs/noise    the paper's objective
      Stop it with Ctrl-C; the same command goes on where it was, to the same losses.

The paper (section 3.1) fine-tunes SD-Turbo: a text-to-image network that reads a prompt, and a ControlNet that reads the
current views, tiled 2x2, and steers it. Two objectives, `one_step_loss` and `noise_loss` below, a few lines each:
  - noise (the paper's): add noise of a random strength to the target picture and predict it. To paint is to begin with noise and
    to take N Euler steps (5 in the published quick start, 10 in the paper): N times as slow, and each step sees what it has painted.
  - one-step: go from pure noise to the picture in one pass, as SD-Turbo itself was taught to, and compare with the target
    (pix2pix-turbo, arXiv 2403.12036). One pass to paint, so 10 Hz holds; and the loss can say which pixels matter.
    tiny starts from the observation instead of noise (as pix2pix-turbo does), in which there is nothing to read.
For both, tiny gives an RGBA layer over the observation: it need not learn to copy. With the layer the picture is known, and with the
picture its noise; predicted as such, an error in the noise is 15 times as large in the picture at t = 999, and tiny's paintings
were noise after 1,500 steps.
"""

import math
import signal
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from diffusers.models.attention_processor import AttnProcessor
from tqdm import tqdm
from transformers.optimization import Adafactor

from genima.episodes import CAMERAS, find_episodes, read_episode
from genima.episodes import FORMAT as EPISODE_FORMAT
from genima.files import UserError, read_hdf5, run_stage, write_whole
from genima.hub import check_hub, push, write_card
from genima.painter import (
    PROMPT,
    TIMESTEP,
    Painter,
    build_tiny,
    composite,
    load_turbo,
    resize,
    tile,
    untile,
)
from genima.parallel import ignore_interrupt
from genima.plots import write_grid, write_losses
from genima.spheres import FORMAT as SPHERES_FORMAT
from genima.training import keep_last, read_checkpoint


@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """Folder of the run: reads episodes/ and spheres/, writes controlnet/."""
    size: Literal["tiny", "sd-turbo"] = "tiny"
    """tiny: the laptop rung, built small and trained from nothing; sd-turbo: a ControlNet for SD-Turbo, on a GPU."""
    objective: Literal["one-step", "noise"] = "one-step"
    """one-step: reconstruct the target in one pass; noise: predict the noise in it, and paint in several steps (the paper)."""
    base: str = "stabilityai/sd-turbo"
    """For sd-turbo: a model on the Hugging Face Hub, or a folder in its layout."""
    picture: int | None = None
    """Height and width of the four views, tiled; by default as recorded for tiny, and 512 for sd-turbo (what it was made for)."""
    steps: int | None = None
    """Gradient steps; by default 4,800 for tiny, 10,000 for sd-turbo (documents: 10,000 to 50,000)."""
    batch: int = 8
    """Samples a step, over all processes and --at-once together (documents: 8 to 16)."""
    at_once: int | None = None
    """Samples that a device computes at once, and accumulates the gradients of; by default all for tiny, 1 for sd-turbo."""
    learning_rate: float | None = None
    """Of AdamW; by default 8e-4, falling as a cosine, for tiny; 1e-5, constant, for sd-turbo (published code)."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """adafactor keeps a row and a column of statistics instead of two numbers per weight: 2.3 GB less for sd-turbo."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where it saves time: for sd-turbo on a GPU, for tiny on a CPU that multiplies in it (lscpu: avx512_bf16, amx_bf16)."""
    crop: int = 2
    """Pixels of padding for the random crop (published code: 2); 0 for none, and then target latents are computed once and kept."""
    paint_steps: int = 5
    """For noise: Euler steps to paint (published quick start 5, paper 10)."""
    seed: int = 0
    """Seed of initialisation, sampling and augmentation."""
    checkpoint_every: int = 300
    """Steps between checkpoints and validation pictures."""
    keep: int = 0
    """How many of the last checkpoints to keep in controlnet/step-<N>/ (the paper evaluates the last three)."""
    push_to_hub: str | None = None
    """Name of a repository on the Hugging Face Hub (user/name) to which the trained painter is uploaded, with its model card."""


# -------------------------------------------------------------------------------------------------------------- data
class Batches(torch.utils.data.Dataset):
    """Item `step` is this process's share of that step's batch. Sample i is a function of (seed, step, i) alone: to resume, or to
    share a batch among other processes, nothing need be remembered."""

    def __init__(self, frames, settings, process=0, processes=1, augment=True):
        self.settings, self.augment, share, episodes = (
            settings,
            augment,
            settings.batch // processes,
            {},
        )
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
        return load(chosen, rngs, self.settings, self.augment)


def load(frames, rngs, settings, augment):
    """Reads frames -> a batch: condition, observation (B, 3, H, W), layer (B, 4, H, W) as floats 0..1, all four views tiled;
    B prompts, seeds (of the noise) and keys (of the target, the same for the same picture)."""
    pictures = (
        tile(
            torch.from_numpy(np.stack([read_views(*frame[:3]) for frame in frames])).permute(
                0, 1, 4, 2, 3
            )
        ).float()
        / 255
    )
    pictures[:, 3:6] *= pictures[
        :, 6:
    ]  # colour times alpha, so that resizing does not mix in what is transparent
    pictures = resize(pictures, settings.picture)  # (B, 7, H, W)
    if (
        augment and settings.crop
    ):  # the same random crop, of each view, for condition and target (published code)
        moves = [rng.integers(-settings.crop, settings.crop + 1, size=2) for rng in rngs]
        pictures = torch.stack(
            [shift_views(picture, dy, dx) for picture, (dy, dx) in zip(pictures, moves)]
        )
    observation, colour, alpha = pictures.split((3, 3, 1), dim=1)
    hue = 0.05 if settings.size == "sd-turbo" else 0
    condition = colour_jitter(observation, rngs, hue) if augment else observation
    words = [
        (PROMPT.format(instructions[rng.integers(len(instructions))]), int(rng.integers(2**31)))
        for (*_, instructions), rng in zip(frames, rngs)
    ]
    return {"condition": condition, "observation": observation, "layer": torch.cat([colour / alpha.clamp(min=1e-3), alpha], dim=1),
            "prompts": [prompt for prompt, _ in words], "seeds": [seed for _, seed in words], "keys": [f"{frame[0]} {frame[2]}" for frame in frames]}  # fmt: skip


def read_views(episode, spheres, t):
    """The views of one frame and what is painted on them: (4, h, w, 7) uint8."""
    with h5py.File(episode, "r") as recorded, h5py.File(spheres, "r") as drawn:
        images, layers = recorded["observations/images"], drawn["layers"]
        return np.stack(
            [np.concatenate([images[camera][t], layers[camera][t]], axis=-1) for camera in CAMERAS]
        )


def shift_views(picture, dy, dx):
    """Each of the four tiles of (C, H, W) moved by (dy, dx) pixels; what comes in is reflected at its edge."""
    pad, (height, width) = max(abs(dy), abs(dx)), (n // 2 for n in picture.shape[1:])
    views = F.pad(
        untile(picture[None])[0], (pad, pad, pad, pad), mode="reflect"
    )  # (4, C, h + 2 pad, w + 2 pad)
    return tile(views[None, :, :, pad + dy : pad + dy + height, pad + dx : pad + dx + width])[0]


def colour_jitter(pictures, rngs, hue):
    """Brightness 0.2, contrast 0.2, saturation 0.1, and hue (published code), of the condition alone: (B, 3, H, W) in 0..1.

    tiny leaves out the published hue of 0.05: there the colour's name is what the instruction says.
    """
    drawn = [
        [
            *(rng.uniform(1 - strength, 1 + strength) for strength in (0.2, 0.2, 0.1)),
            rng.uniform(-hue, hue) if hue else 0,
        ]
        for rng in rngs
    ]
    brightness, contrast, saturation, turn = torch.tensor(drawn, dtype=torch.float32).T[
        :, :, None, None, None
    ]  # (B, 1, 1, 1) each
    pictures = pictures * brightness
    mean = pictures.mean((1, 2, 3), keepdim=True)
    pictures = mean + contrast * (pictures - mean)
    grey = pictures.mean(1, keepdim=True)
    colour = pictures - grey
    if hue:  # a turn of the colours about the axis of greys
        angle = 2 * math.pi * turn
        colour = angle.cos() * colour + angle.sin() / math.sqrt(3) * (
            colour.roll(1, 1) - colour.roll(-1, 1)
        )
    return (grey + saturation * colour).clamp(0, 1)


def find_frames(run):
    """Every frame on disk as (episode file, spheres file, t, instructions), a twentieth of the scenes kept apart; and K."""
    training, held_out, horizons = [], [], set()
    for path in find_episodes(run / "episodes"):
        spheres = run / "spheres" / path.relative_to(run / "episodes")
        if not spheres.exists():
            raise UserError(
                f"{spheres} is missing: draw the spheres first (python render_spheres.py --run {run})."
            )
        with read_hdf5(path, EPISODE_FORMAT) as root:
            instructions, length, seed = (
                [str(text) for text in root.attrs["instructions"]],
                len(root["action"]),
                root.attrs["seed"],
            )
        with read_hdf5(spheres, SPHERES_FORMAT) as root:
            horizons.add(int(root.attrs["horizon"]))
        frames = [(str(path), str(spheres), t, instructions) for t in range(length)]
        (held_out if seed % 20 == 0 else training).extend(frames)
    if not training:
        raise UserError(
            f"{run / 'episodes'} has no scene to train on: record more (python collect_demos.py --run {run})."
        )
    if len(horizons) > 1:
        raise UserError(
            f"{run / 'spheres'} was drawn with different horizons {sorted(horizons)}: delete it and draw it again."
        )
    return training, held_out, horizons.pop()


# ------------------------------------------------------------------------------------------------------- objectives
def one_step_loss(painter, model, batch):
    """From pure noise (tiny: from the observation) to the picture in one pass at t = 999; sphere pixels count 20 to 1."""
    if painter.vae is None:
        return painting_loss(
            model(batch["condition"], batch["prompts"]), batch["layer"], batch["observation"]
        )
    target = targets(painter, batch)  # (B, 4, h, w)
    noise, _ = draw_noise(batch["seeds"], target)
    a = painter.scheduler.alphas_cumprod[TIMESTEP]
    predicted = model(batch["condition"], batch["prompts"], noise, TIMESTEP)
    reached = (noise - (1 - a).sqrt() * predicted) / a.sqrt()  # the latent without its noise
    weight = 1 + 19 * F.adaptive_avg_pool2d(batch["layer"][:, 3:], target.shape[2:])  # (B, 1, h, w)
    return (weight * (reached - target).abs()).mean()


def noise_loss(painter, model, batch):
    """Predict the noise that was added to the target picture, at a random strength (paper). tiny: predict the picture without it."""
    target = targets(painter, batch)
    noise, timesteps = draw_noise(batch["seeds"], target)
    a = painter.scheduler.alphas_cumprod.to(target.device)[timesteps][:, None, None, None]
    noisy = a.sqrt() * target + (1 - a).sqrt() * noise
    predicted = model(batch["condition"], batch["prompts"], noisy, timesteps)
    if painter.vae is None:
        return painting_loss(predicted, batch["layer"], batch["observation"])
    return F.mse_loss(predicted.float(), noise)


def painting_loss(logits, layer, observation):
    """Where to paint (cross-entropy of alpha) and what it looks like (L1 of the composed picture, spheres 20 to 1)."""
    alpha = layer[:, 3:]
    where = F.binary_cross_entropy_with_logits(logits[:, 3:], alpha)
    difference = (composite(logits.sigmoid(), observation) - composite(layer, observation)).abs()
    weight = 1 + 19 * alpha
    return where + (weight * difference).mean()


def targets(painter, batch, kept={}):  # noqa: B006
    """The latents of the target pictures; where no crop changes them (batch["keys"]), each is computed once."""
    keys, pictures = batch["keys"], composite(batch["layer"], batch["observation"])
    if keys is None:
        return painter.encode(pictures).float()
    if new := [i for i, key in enumerate(keys) if key not in kept]:
        kept.update(zip([keys[i] for i in new], painter.encode(pictures[new]).cpu()))
    return torch.stack([kept[key] for key in keys]).to(pictures.device).float()


def draw_noise(seeds, like):
    """Per sample: noise (B, C, h, w) and a timestep (B,) that depend on its seed alone, on every device and in every process."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack(
        [torch.randn(like.shape[1:], generator=generator) for generator in generators]
    )
    timesteps = torch.cat(
        [torch.randint(TIMESTEP + 1, (1,), generator=generator) for generator in generators]
    )
    return noise.to(like.device), timesteps.to(like.device)


# --------------------------------------------------------------------------------------------------------- training
def build(settings, accelerator, instructions, image_size, horizon):
    """The painter to train, on its device, and its optimiser."""
    torch.manual_seed(settings.seed)
    config = {"size": settings.size, "objective": settings.objective, "steps": 1 if settings.objective == "one-step" else settings.paint_steps,
              "image_size": image_size, "picture": settings.picture, "horizon": horizon, "cameras": CAMERAS}  # fmt: skip
    if settings.size == "tiny":
        painter = Painter(build_tiny(instructions, settings.picture // 2), config)
        if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
            # Three plain operations: the backward of PyTorch's fused attention is slow there, a fifth of the step.
            (
                painter.unet.set_attn_processor(AttnProcessor()),
                painter.controlnet.set_attn_processor(AttnProcessor()),
            )
    else:
        painter = Painter(load_turbo(settings.base), config | {"base": settings.base})
        if accelerator.mixed_precision == "bf16":  # what is frozen needs no float32
            painter.unet.to(torch.bfloat16), painter.vae.to(torch.bfloat16)
        painter.to(accelerator.device)
        with torch.no_grad():
            painter.read([PROMPT.format(instruction) for instruction in instructions])
        painter.text_encoder = None  # it has said all that it will be asked
        (
            painter.unet.enable_gradient_checkpointing(),
            painter.controlnet.enable_gradient_checkpointing(),
        )
    return painter, make_optimizer(settings.optimizer, painter, settings.learning_rate)


def make_optimizer(name, painter, learning_rate):
    """Of what is trained; AdamW with the published code's values."""
    trained = [parameter for parameter in painter.parameters() if parameter.requires_grad]
    if name == "adafactor":
        return Adafactor(
            trained, lr=learning_rate, relative_step=False, scale_parameter=False, weight_decay=1e-2
        )
    return torch.optim.AdamW(
        trained, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, fused=True
    )


def in_bf16(settings):
    """Whether to multiply in bf16; weights and sums stay float32."""
    able, choice = torch.cpu.get_capabilities(), settings.precision
    on_cpu = not torch.accelerator.is_available() and bool(
        able.get("avx512_bf16") or able.get("amx_bf16")
    )
    return (
        choice == "bf16"
        or choice == "auto"
        and (torch.cuda.is_available() if settings.size == "sd-turbo" else on_cpu)
    )


def check_settings(settings, accelerator, view):
    """Fill in what follows from others. Raises UserError for what cannot be trained. view: height of a recorded picture."""
    processes, tiny = accelerator.num_processes, settings.size == "tiny"
    if settings.batch < processes:
        raise UserError(
            f"There are more processes ({processes}) than samples a step ({settings.batch}): raise --batch."
        )
    share = settings.batch // processes
    defaults = (
        dict(steps=4800, learning_rate=8e-4, picture=2 * view, at_once=share)
        if tiny
        else dict(steps=10_000, learning_rate=1e-5, picture=512, at_once=1)
    )
    for name, value in defaults.items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    if (
        min(
            settings.steps,
            settings.checkpoint_every,
            settings.paint_steps,
            settings.picture,
            settings.at_once,
        )
        < 1
        or min(settings.keep, settings.crop) < 0
    ):
        raise UserError(
            "--steps, --batch, --at-once, --checkpoint-every, --paint-steps and --picture must be 1 or more, --keep and --crop 0 or more."
        )
    unit = 16 if tiny else 8
    if settings.picture % unit:
        raise UserError(
            f"The tiled picture has {settings.picture} pixels a side, which is no multiple of {unit}: give another --picture."
        )
    if settings.batch % processes or share % settings.at_once:
        raise UserError(
            f"--batch {settings.batch} is no multiple of {processes} processes times {settings.at_once} samples at once: change one."
        )
    if settings.push_to_hub:
        check_hub(settings.push_to_hub)


@torch.no_grad()
def validate(painter, frames, settings, folder):
    """Overlap (IoU) of painted and true spheres on unseen scenes, at their *first* frames, where nothing but the picture and the
    words tell the target; and a picture of some. A sphere is where a picture differs from the observation by a fifth."""
    painter.eval()
    firsts = [frame for frame in frames if frame[2] == 0]
    rng, count = np.random.default_rng(0), 48 if settings.size == "tiny" else 8
    chosen = [firsts[i] for i in rng.permutation(len(firsts))[:count]]
    batch = load(chosen, [rng] * len(chosen), settings, augment=False)
    observation, prompts, truth = (
        batch["observation"],
        batch["prompts"],
        composite(batch["layer"], batch["observation"]),
    )
    at_once = max(1, settings.at_once)
    painted = torch.cat([painter.paint_tiles(observation[i : i + at_once].to(painter.unet.device), prompts[i : i + at_once]).cpu()
                         for i in range(0, len(chosen), at_once)])  # fmt: skip
    painter.train()
    a, b = (((picture - observation).abs().amax(1) > 0.2) for picture in (painted, truth))
    overlap = ((a & b).sum() / (a | b).sum().clamp(min=1)).item()
    columns = {"observation": observation, "truth": truth, "painted": painted}
    write_grid(folder / "validation.png", columns, [prompt.split("'")[1] for prompt in prompts[:6]])
    return overlap


COLUMNS = ("step", "loss", "first_frame_iou")


def save(folder, painter, optimizer, step, log, identity):
    """The checkpoint, the parts for inference, the log and its plot: each file whole."""
    painter.save(folder)
    write_losses(
        folder, COLUMNS, log, ["loss"], ["first_frame_iou"], "overlap of painted and true spheres"
    )
    model = {
        name: parameter for name, parameter in painter.named_parameters() if parameter.requires_grad
    }  # the rest is frozen
    with write_whole(
        folder / "training.pt"
    ) as path:  # last: after a kill before this, these steps are done and all is written again
        torch.save(
            {
                "step": step,
                "identity": identity,
                "log": log,
                "model": model,
                "optimizer": optimizer.state_dict(),
            },
            path,
        )


def resume(folder, painter, optimizer, identity):
    """Loads the last checkpoint, if there is one. Returns the step to go on from and the log so far."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (saved := read_checkpoint(folder / "training.pt", identity)):
        return 0, []
    try:  # what is frozen is not in it
        missing, unexpected = painter.load_state_dict(saved["model"], strict=False)
        if unexpected or {
            name for name, parameter in painter.named_parameters() if parameter.requires_grad
        } & set(missing):
            raise RuntimeError
    except RuntimeError:
        raise UserError(
            f"{folder / 'training.pt'} is of a network of another size or vocabulary: delete {folder}, or use another --run."
        ) from None
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"], saved["log"]


def main():
    settings = tyro.cli(Settings, description=__doc__)
    folder = settings.run / "controlnet"
    settings.precision = "bf16" if in_bf16(settings) else "fp32"
    accelerator = Accelerator(mixed_precision="bf16" if settings.precision == "bf16" else "no")
    training, held_out, horizon = find_frames(settings.run)
    image_size = read_episode(training[0][0], images=False).image_sizes[CAMERAS[0]][0]
    check_settings(settings, accelerator, image_size)
    instructions = sorted({sentence for frame in training + held_out for sentence in frame[3]})
    identity = {
        name: getattr(settings, name)
        for name in (
            "size",
            "objective",
            "picture",
            "steps",
            "batch",
            "learning_rate",
            "optimizer",
            "precision",
            "crop",
            "seed",
        )
    }
    identity |= {"image_size": image_size, "horizon": horizon, "frames": len(training)}

    painter, optimizer = build(settings, accelerator, instructions, image_size, horizon)
    begin, log = resume(
        folder, painter, optimizer, identity
    )  # log: a row (step, loss, IoU or "") a step
    model, optimizer = accelerator.prepare(painter, optimizer)
    first = accelerator.is_main_process  # the one that writes and prints
    if first and begin < settings.steps:
        trained = sum(
            parameter.numel() for parameter in painter.parameters() if parameter.requires_grad
        )
        print(f"{len(training)} frames to train on, {len(held_out)} held out, {trained / 1e6:.1f} M parameters to train, on "
              f"{accelerator.num_processes} processes ({accelerator.device.type}).")  # fmt: skip
    batches = torch.utils.data.DataLoader(
        Batches(training, settings, accelerator.process_index, accelerator.num_processes), batch_size=None,
        sampler=range(begin, settings.steps), worker_init_fn=ignore_interrupt,
        num_workers=0 if accelerator.device.type == "cpu" else 2,  # none on a CPU, whose cores they would take
    )  # fmt: skip
    loss_of = {"one-step": one_step_loss, "noise": noise_loss}[settings.objective]
    stopping = []
    signal.signal(signal.SIGINT, lambda *_: stopping.append(True))
    bar = tqdm(
        batches,
        desc="painter",
        unit="step",
        initial=begin,
        total=settings.steps,
        disable=not first or begin == settings.steps,
    )
    for step, batch in enumerate(bar, begin + 1):
        for group in (
            optimizer.param_groups
        ):  # a short warm-up; then constant for sd-turbo, half a cosine down to zero for tiny
            fall = (
                0.5 * (1 + math.cos(math.pi * (step - 1) / settings.steps))
                if settings.size == "tiny"
                else 1
            )
            group["lr"] = settings.learning_rate * min(step / 100, fall)
        share, loss = len(batch["prompts"]), torch.zeros((), device=accelerator.device)
        for i in range(0, share, settings.at_once):  # gradient accumulation
            part = {name: values[i : i + settings.at_once] for name, values in batch.items()}
            part = {
                name: x.to(accelerator.device) if isinstance(x, torch.Tensor) else x
                for name, x in part.items()
            }
            part["keys"] = None if settings.crop else part["keys"]
            last = i + settings.at_once == share
            with (
                nullcontext() if last else accelerator.no_sync(model)
            ):  # processes exchange gradients once a step
                part_loss = loss_of(painter, model, part) * (settings.at_once / share)
                accelerator.backward(part_loss)
            loss += part_loss.detach()
        accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()

        stop = len(stopping)
        if (
            accelerator.num_processes > 1
        ):  # the loss is of the whole batch, and all stop at the same step
            loss, stop = accelerator.reduce(
                torch.stack([loss, torch.full_like(loss, stop)]), "mean"
            )
        log.append([step, loss.item(), ""])
        bar.set_postfix(loss=f"{np.mean([row[1] for row in log[-50:]]):.4f}", refresh=False)
        due = step % settings.checkpoint_every == 0 or step == settings.steps
        if first and due:
            log[-1][2] = validate(painter, held_out or training, settings, folder)
        if first and (due or stop > 0):
            save(folder, painter, optimizer, step, log, identity)
            write_card(folder, settings, log, identity["frames"], horizon)
            keep_last(folder, [*painter.saved, "painter.json"], step, settings.keep * due)
        if stop > 0 and step < settings.steps:
            if first:
                print(
                    f"\nStopped after step {step}: run the same command again to go on.",
                    file=sys.stderr,
                )
            sys.exit(130)
    if first:
        print(f"{folder}: {f'trained already, {begin} steps; ' * (begin == settings.steps)}overlap (IoU) of painted and true spheres at the first "
              f"frames of unseen scenes {log[-1][2]:.3f}.")  # fmt: skip
        if settings.push_to_hub:
            push(
                folder,
                [
                    *painter.saved,
                    "painter.json",
                    "README.md",
                    "validation.png",
                    "losses.csv",
                    "losses.png",
                ],
                settings.push_to_hub,
            )


def main_within_memory():
    try:
        main()
    except RuntimeError as error:  # CUDA and MPS say it in the same words
        if "out of memory" not in str(error):
            raise
        raise UserError(
            "The GPU is out of memory: lower --at-once, then --picture, or take --optimizer adafactor "
            "(the same command goes on from the last checkpoint)."
        ) from error


if __name__ == "__main__":
    run_stage(main_within_memory)
