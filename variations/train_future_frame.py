"""Variation of stages 2 and 3: paint the future camera pictures instead of spheres (SuSIE).

    In:   <run>/episodes, <run>/spheres (for the horizon K; no sphere is drawn)
    Out:  <run>/future_frame/painter/      as <run>/controlnet, and validation.png
          <run>/future_frame/controller/   as <run>/act

    python variations/train_future_frame.py
    python evaluate.py --policy variations/train_future_frame.py:policy
    diff train_act.py variations/train_future_frame.py              what changed in stage 3

After Black et al. 2023. Against GENIMA, with the same episodes, networks, base and K:

1. The painter's layer is the cameras' pictures K steps later, opaque where they differ from now.
2. The controller sees eight pictures: the present views and the painted goals.
3. It is trained on true futures, half of them softened, because painted ones are soft. There are no
   others to draw, so both ends of a motion cannot be shifted: it learns from recorded motions only.

What it gave with an earlier revision, `--base none --painter-steps 2400 --painter-learning-rate
8e-4` on 2,700 demonstrations: 40, 42 and 46 of 50 in reach_target, push_button and pick_and_lift
(GENIMA: 49, 49, 50). One step of denoising gives the mean of all futures that the painter thinks
possible: the painted arm is soft at its edges, a fog at first (painter/validation.png). After 900
steps of both networks it was 10, 0 and 3: four spheres are learned sooner than an arm with all its
edges.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import torch
import tyro
from accelerate.utils import send_to_device
from numpy.random import Generator
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.data import Dataset, default_collate
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # genima/ is one folder up

from genima import painter_data, textures, training
from genima.act import ACT, Controller, save_controller
from genima.base import FROM_SCRATCH, SHIPPED, check_base, fingerprint, load_base
from genima.checkpoints import choose_device
from genima.demonstrations import describe, read_demonstrations, split_scenes
from genima.files import check_number, run_stage
from genima.motions import Motions
from genima.painter import PROMPT, TinyPainter, load_painter
from genima.painter_data import Augmentation, PainterDataset, find_frames
from genima.painter_training import choose_precision
from genima.plots import write_grid, write_losses
from genima.policy import follow
from genima.views import composite, grid_of, tile_views

NAME = "future_frame"
DIFFERENT = 0.08  # of 1: where a pixel changes by more, the layer is opaque
CHANGE_WEIGHT = 20  # a pixel that changes counts as much as 20 others
GRIPPER_WEIGHT = 0.1
STATE_DROPOUT = 0.3
WEIGHT_DECAY = 1e-4
GRADIENT_CLIP = 1.0
VALIDATION_BATCHES = 6
COLUMNS = ("step", "loss", "held_out")


@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """Folder of the run: reads episodes/ and spheres/, writes future_frame/."""
    out: Path | None = None
    """Folder for both networks, if it is not <run>/future_frame."""
    base: str = str(SHIPPED)
    """The base that the painter starts from; none: random weights."""
    painter_steps: int = 900
    """Gradient steps of the painter."""
    steps: int = 1800
    """Gradient steps of the controller."""
    painter_batch_size: int = 8
    """Samples a step for the painter."""
    batch_size: int = 32
    """Samples a step for the controller."""
    painter_learning_rate: float = 3e-4
    """Highest learning rate of the painter; both fall as half a cosine."""
    learning_rate: float = 1e-3
    """Highest learning rate of the controller."""
    seed: int = 0
    """Seed of the weights and the samples."""
    checkpoint_every: int = 300
    """Steps between two checkpoints."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to train; auto takes a GPU if there is one."""


# -------------------------------------------------------------------------------- stage 2: futures
class Futures(PainterDataset):
    """Item i is batch i of the painter: views now, and the layer of their future."""

    def __init__(self, frames, data, settings: Settings):
        super().__init__(frames, data.cameras, None, None, settings.batch_size, settings.seed)
        self.augmentation = Augmentation(hue=0.0)  # instructions name colours
        self.horizon = data.horizon

    def __getitem__(self, i: int) -> dict:
        rngs = [np.random.default_rng((self.seed, i, place)) for place in self.samples]
        return self.read([self.draw_frame(rng) for rng in rngs], rngs)

    def read(self, frames, rngs) -> dict:
        pictures = torch.stack([self.read_frame(frame) for frame in frames])  # (B, 6, H, W)
        crop = self.augmentation.crop
        pictures = painter_data.random_crop(pictures, rngs, crop, len(self.cameras))
        now, future = pictures.split(3, dim=1)  # (B, 3, H, W) each
        change = (future - now).abs().amax(1, keepdim=True) > DIFFERENT
        prompts = []
        for frame, rng in zip(frames, rngs):
            instruction = frame.instructions[rng.integers(len(frame.instructions))]
            prompts.append(PROMPT.format(instruction))
        return {
            "condition": painter_data.colour_jitter(now, rngs, self.augmentation),
            "observation": now,
            "layer": torch.cat([future, change.float()], dim=1),  # (B, 4, H, W)
            "prompts": prompts,
        }

    def read_frame(self, frame) -> torch.Tensor:
        """The views now and K steps later, tiled: (6, H, W), 0..1."""
        views = []
        with h5py.File(frame.episode, "r") as root:
            later = min(frame.t + self.horizon, len(root["action"]) - 1)
            for camera in self.cameras:
                images = root["observations/images"][camera]
                views.append(np.concatenate([images[frame.t], images[later]], axis=-1))
        views = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)  # (V, 6, h, w)
        return tile_views(views[None])[0].float() / 255


def painting_loss(painter, batch) -> torch.Tensor:
    """As train_controlnet.py's, with what changes in place of spheres."""
    logits = painter(batch["condition"], batch["prompts"]).float()  # (B, 4, H, W)
    change = batch["layer"][:, 3:]
    where = F.binary_cross_entropy_with_logits(logits[:, 3:], change)
    painted = composite(logits.sigmoid(), batch["observation"])
    future = composite(batch["layer"], batch["observation"])
    weight = 1 + (CHANGE_WEIGHT - 1) * change
    return where + (weight * (painted - future).abs()).mean()


@torch.no_grad()
def show_futures(painter, batch: dict, path: Path):
    """Now, true future and painted future, in unseen scenes."""
    now = batch["observation"]  # (B, 3, H, W)
    painted = painter.paint_tiled(now.to(painter.unet.device), batch["prompts"]).cpu()
    future = composite(batch["layer"], now)
    columns = {"now": now, "true future": future, "painted future": painted}
    write_grid(path, columns, [prompt.split("'", 1)[1][:-1] for prompt in batch["prompts"]])


# ---------------------------------------------------------------------------- stage 3: the goals
class Goals(Dataset):
    """Item i is batch i of the controller: present views, true future views, and the actions."""

    def __init__(self, motions: Motions, config: dict, settings: Settings):
        self.motions = motions
        self.config = config
        self.seed = settings.seed
        self.batch_size = settings.batch_size

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        rngs = [np.random.default_rng((self.seed, i, place)) for place in range(self.batch_size)]
        return default_collate([self.sample(rng) for rng in rngs])

    def sample(self, rng: Generator) -> dict[str, np.ndarray]:
        config = self.config
        motion = self.motions.draw(rng)
        recorded = motion.demonstration.images
        later = min(motion.t + config["horizon"], len(motion.demonstration.qpos) - 1)
        now = []
        goals = []
        for camera in config["cameras"][: len(recorded)]:
            both = np.concatenate([recorded[camera][motion.t], recorded[camera][later]], axis=-1)
            both = textures.random_crop(rng, both)  # (H, W, 6), both alike
            now.append(both[..., :3])
            goals.append(both[..., 3:])
        goals = np.stack(goals).astype(np.float32)
        if rng.random() < 0.5:  # painted goals are soft
            goals = blur(goals)
        images = np.concatenate([np.stack(now).astype(np.float32), goals])  # (2V, H, W, 3)
        images = textures.jitter_and_add_noise(rng, images)

        state = motion.current.copy()
        if rng.random() < 0.5:  # otherwise the gripper continues what it does
            state[-1] = rng.random()
        state = (state - config["state_mean"]) / config["state_std"]
        actions = (motion.actions - motion.current) / config["state_std"]
        actions[:, -1] = motion.actions[:, -1]
        return {
            "images": images.transpose(0, 3, 1, 2),  # (2V, 3, H, W) uint8
            "state": state.astype(np.float32),  # (D+1,)
            "has_state": np.array(rng.random() >= STATE_DROPOUT),  # ()
            "bag_of_words": np.zeros(0, np.float32),  # the painter has read the instruction
            "actions": actions.astype(np.float32),  # (K, D+1)
            "action_is_pad": motion.action_is_pad,  # (K,)
        }


def blur(images: np.ndarray) -> np.ndarray:
    """The mean of 3x3 pixels of images (V, H, W, 3)."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3
    return (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 3


def act_loss(network: ACT, batch: dict) -> torch.Tensor:
    """L1 of the joints and cross-entropy of the gripper; padded steps count as zeros."""
    joints, gripper_logits, _ = network(
        batch["images"], batch["state"], batch["has_state"], batch["bag_of_words"]
    )
    is_action = ~batch["action_is_pad"]  # (B, K)
    l1 = (joints - batch["actions"][..., :-1]).abs().mean(-1)
    wrong = F.binary_cross_entropy_with_logits(
        gripper_logits, batch["actions"][..., -1], reduction="none"
    )
    return ((l1 + GRIPPER_WEIGHT * wrong) * is_action).mean()


# ----------------------------------------------------------------------------------------- training
def fit(folder, network, loss_of, dataset, unseen, config, settings, save):
    """Minimise loss_of(network, batch): the loop of both stages. unseen: held-out scenes."""
    device = settings.device
    bf16 = choose_precision("tiny", "auto") == "bf16"  # where this CPU is faster in it
    held_out = [unseen[settings.steps + i] for i in range(VALIDATION_BATCHES)]
    held_out = send_to_device(held_out, device)
    optimizer = AdamW(network.parameters(), settings.learning_rate, weight_decay=WEIGHT_DECAY)
    identity = {**config, "steps": settings.steps, "batch_size": settings.batch_size}
    identity |= {"learning_rate": settings.learning_rate, "seed": settings.seed, "bf16": bf16}
    start, log = training.resume(folder, network, optimizer, identity)

    stopping = training.StopSignal()
    batches = training.batches(dataset, start, settings.steps, num_workers=2)
    bar = tqdm(batches, folder.name, settings.steps, initial=start)
    for step, batch in enumerate(bar, start + 1):
        factor = training.warmup(step) * training.half_cosine(step, settings.steps)
        training.set_learning_rate(optimizer, settings.learning_rate * factor)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = loss_of(network, send_to_device(batch, device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), GRADIENT_CLIP)
        optimizer.step()

        log.append([step, loss.item(), ""])
        is_last = step == settings.steps
        due = step % settings.checkpoint_every == 0 or is_last
        if due:
            with torch.no_grad():
                losses = [loss_of(network, batch).item() for batch in held_out]
            log[-1][2] = float(np.mean(losses))
        if due or stopping.requested:
            save()
            write_losses(folder, COLUMNS, log, ["loss"], ["held_out"], "loss")
            training.save(folder, network, optimizer, identity, step, log)
        if stopping.requested and not is_last:
            training.stop_training(step, say=True)
    print(f"{folder}: loss in held-out scenes {log[-1][2]:.4f}.")


def train_painter(settings: Settings, folder: Path):
    check_base("tiny", settings.base, folder)
    data = find_frames(settings.run)
    rows, _ = grid_of(len(data.cameras))
    config = {"size": "tiny", "objective": "one-step", "num_inference_steps": 1}
    config |= {"resolution": rows * data.small_square_size(), **data.describe()}
    torch.manual_seed(settings.seed)
    if settings.base == FROM_SCRATCH:
        painter = TinyPainter.from_scratch(data.instructions(), config)
    else:
        painter = load_base(settings.base, config)
    painter.to(settings.device)
    futures = Futures(data.training, data, settings)
    unseen = Futures(data.held_out if data.held_out else data.training, data, settings)
    save = partial(painter.save, folder)
    base = {"base": fingerprint(settings.base)}
    fit(folder, painter, painting_loss, futures, unseen, config | base, settings, save)
    show_futures(painter.eval(), unseen[settings.steps], folder / "validation.png")


def train_controller(settings: Settings, folder: Path):
    demonstrations = read_demonstrations(settings.run, images=True, seed=settings.seed)
    training_set, held_out = split_scenes(demonstrations)
    config = {"size": "tiny", "observation": "rgb", **describe(demonstrations, with_words=False)}
    config["cameras"] = [*config["cameras"], *[f"goal_{name}" for name in config["cameras"]]]
    motions = Motions(training_set, demonstrations, shifted=False)
    config.update(motions.state_statistics(settings.seed))
    goals = Goals(motions, config, settings)
    unseen = Goals(Motions(held_out, demonstrations, shifted=False), config, settings)
    torch.manual_seed(settings.seed)
    network = ACT(config).to(settings.device)
    save = partial(save_controller, folder, network, config)
    fit(folder, network, act_loss, goals, unseen, config, settings, save)


# ------------------------------------------------------------------------------------------- policy
class FuturePolicy:
    """Paints the future views, and follows them beside the present ones."""

    def __init__(self, painter, controller: Controller):
        self.painter = painter
        self.controller = controller
        self.cameras = tuple(painter.config["cameras"])
        self.image_size = tuple(controller.config["image_size"])

    def act(self, images, qpos, instruction):
        batch = {camera: image[None] for camera, image in images.items()}
        painted = self.painter.paint(batch, [instruction])
        painted = {camera: image[0] for camera, image in painted.items()}
        goals = {f"goal_{camera}": image for camera, image in painted.items()}
        return follow(self.controller, images | goals, qpos, instruction, False), painted


def policy(run: Path, device: str) -> FuturePolicy:
    """For evaluate.py --policy: what was trained in <run>/future_frame."""
    folder = Path(run) / NAME
    painter = load_painter(folder / "painter", device)
    return FuturePolicy(painter, Controller.load(folder / "controller", device))


def main():
    settings = tyro.cli(Settings, description=__doc__)
    training.check_numbers(settings)
    check_number("--painter-steps", settings.painter_steps, 1)
    check_number("--painter-batch-size", settings.painter_batch_size, 1)
    folder = settings.run / NAME if settings.out is None else settings.out
    settings.device = choose_device(settings.device)
    painter_settings = replace(
        settings,
        steps=settings.painter_steps,
        batch_size=settings.painter_batch_size,
        learning_rate=settings.painter_learning_rate,
    )
    train_painter(painter_settings, folder / "painter")
    train_controller(settings, folder / "controller")


if __name__ == "__main__":
    run_stage(main)
