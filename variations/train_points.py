"""Variation of stages 2 and 3: paint nothing. What passes between the stages are numbers.

    In:   <run>/episodes, <run>/spheres (for the targets; no sphere is drawn)
    Out:  <run>/points/   config.json, model.safetensors, losses.csv, losses.png, training.pt

    python variations/train_points.py
    python evaluate.py --policy variations/train_points.py:policy
    diff train_act.py variations/train_points.py                    what changed

Against GENIMA (the same episodes, views, words, K, and the same shifted motions for stage 3):

1. Stage 2 predicts 25 numbers instead of four pictures: each of the four spheres' centre and the
   direction of its stripes, and the gripper. A ResNet with FiLM reads them off the plain views.
2. Stage 3 reads these numbers instead of spheres: linear layers in place of a transformer.

Neither can be looked at. And a painter marks a place *in the picture that it sees*, whereas this
stage 2 has to know where the cameras are by heart.

What it gave with an earlier revision on 2,700 demonstrations, 1,800 steps: 16, 6 and 16 of 50 in
reach_target, push_button and pick_and_lift (1,200 steps in bf16: 13, 1 and 12). Stage 3 is not what
fails: with true numbers it is 0.02 rad off. Stage 2 puts the gripper 1.0 cm off in the median and
2.7 cm in the mean (the training prints it): sometimes at another object, and too far for a button.
ACT reaches 86 to 96 % with the same eyes, so it is this head or its training, not the eyes.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from accelerate.utils import send_to_device
from numpy.random import Generator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.data import Dataset, default_collate
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # genima/ is one folder up

from genima import training
from genima.act import SIZES, Controller, make_bag_of_words, make_encoder
from genima.checkpoints import choose_device
from genima.demonstrations import describe, read_demonstrations, split_scenes
from genima.files import UserError, run_stage, write_whole
from genima.image_encoder import ImageEncoder
from genima.motions import Motions
from genima.painter_training import choose_precision
from genima.plots import write_losses
from genima.policy import ActPolicy
from genima.spheres import JOINTS
from genima.textures import jitter_and_add_noise, random_crop

NAME = "points"
SPHERES = len(JOINTS) + 1  # the joints' and the gripper's
NUMBERS = 6 * SPHERES  # P: a centre and a direction of each
UNIT = np.repeat([0.1, 0.5], 3)  # metres, and parts of a unit vector: what is 1 to the networks
# Stage 2 will be off by about this much, so stage 3 is trained with it.
NUMBER_ERROR = np.repeat([0.005, 0.05], 3)
MOTIONS_PER_IMAGE = 4  # of stage 3, for each picture of stage 2: they cost little
HIDDEN = 512
GRIPPER_WEIGHT = 0.1
STATE_DROPOUT = 0.3
WEIGHT_DECAY = 1e-4
GRADIENT_CLIP = 1.0
VALIDATION_BATCHES = 6
COLUMNS = ("step", "loss", "held_out", "gripper_median", "gripper_mean")  # metres off


@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """Folder of the run: reads episodes/ and spheres/, writes points/."""
    out: Path | None = None
    """Folder for the policy, if it is not <run>/points."""
    steps: int = 1800
    """Gradient steps; the learning rate falls to zero over them."""
    batch_size: int = 32
    """Samples a step."""
    learning_rate: float = 1e-3
    """Highest learning rate of AdamW."""
    seed: int = 0
    """Seed of the weights, the samples and the noise."""
    checkpoint_every: int = 300
    """Steps between two checkpoints."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to train; auto takes a GPU if there is one."""


# ------------------------------------------------------------------------------------------ network
class Points(nn.Module):
    """Both stages. B samples, K steps, D joints, P numbers, E the width of a token."""

    def __init__(self, config: dict):
        super().__init__()
        size = SIZES[config["size"]]
        self.joints = config["joints"]
        self.horizon = config["horizon"]
        self.image_encoder = ImageEncoder(config, size)
        self.encoder = make_encoder(size)
        self.number_head = nn.Linear(size["layer"]["d_model"], NUMBERS + 1)
        inputs = NUMBERS + 1 + self.joints + 2
        outputs = self.joints + self.horizon * (self.joints + 1)
        self.controller = nn.Sequential(
            nn.Linear(inputs, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, outputs),
        )

    def predict_numbers(self, images, bag_of_words) -> torch.Tensor:
        """Stage 2: plain views and words -> P numbers and a gripper logit, (B, P+1)."""
        tokens = self.encoder(self.image_encoder(images, bag_of_words))  # (B, N, E)
        return self.number_head(tokens.mean(1))

    def follow(self, numbers, gripper, state, has_state):
        """Stage 3: numbers (B, P), gripper (B,) 0..1, state (B, D+1) -> a chunk.

        Joints (B, K, D) relative to the current ones, and gripper logits (B, K). The head is ACT's.
        """
        given = has_state[:, None].float()
        inputs = [numbers, 2 * gripper[:, None] - 1, state * given, given]
        outputs = self.controller(torch.cat(inputs, -1))
        target = outputs[:, None, : self.joints]  # (B, 1, D)
        steps = outputs[:, self.joints :].unflatten(1, (self.horizon, self.joints + 1))
        part = torch.linspace(0, 1, self.horizon + 1, device=outputs.device)[1:, None]  # (K, 1)
        current = state[:, None, :-1]  # (B, 1, D)
        return part * (target - current) + steps[..., :-1], steps[..., -1]

    def forward(self, images, state, has_state, bag_of_words):
        """One stage after the other; as ACT.forward."""
        found = self.predict_numbers(images, bag_of_words)
        gripper = found[:, -1].sigmoid()
        joints, gripper_logits = self.follow(found[:, :-1], gripper, state, has_state)
        return joints, gripper_logits, None


def points_loss(network, batch: dict) -> torch.Tensor:
    """L1 of numbers and joints, cross-entropy of the grippers.

    Both stages learn at once. No gradient passes from one to the other: stage 3 reads true numbers.
    """
    found = network.predict_numbers(batch["images"], batch["bag_of_words"])
    number_loss = (found[:, :-1] - batch["numbers"]).abs().mean()
    gripper_loss = F.binary_cross_entropy_with_logits(found[:, -1], batch["gripper"])
    stage_2 = number_loss + GRIPPER_WEIGHT * gripper_loss

    moves = {}
    for name, value in batch.items():
        if name.startswith("move_"):
            moves[name.removeprefix("move_")] = value.flatten(0, 1)  # (B * MOTIONS_PER_IMAGE, ...)
    joints, gripper_logits = network.follow(
        moves["numbers"], moves["gripper"], moves["state"], moves["has_state"]
    )
    joint_error = (joints - moves["actions"][..., :-1]).abs().mean(-1)  # (N, K)
    wrong = F.binary_cross_entropy_with_logits(
        gripper_logits, moves["actions"][..., -1], reduction="none"
    )
    is_action = ~moves["action_is_pad"]
    stage_3 = (joint_error + GRIPPER_WEIGHT * wrong)[is_action].mean()
    return stage_2 + stage_3


# --------------------------------------------------------------------------------------------- data
class Samples(Dataset):
    """Item i is batch i: a function of seed and i alone."""

    def __init__(self, demonstrations, all_demonstrations, config: dict, settings: Settings):
        self.motions = Motions(demonstrations, all_demonstrations, shifted=False)
        self.shifted_motions = Motions(demonstrations, all_demonstrations, shifted=True)
        self.config = config
        self.seed = settings.seed
        self.batch_size = settings.batch_size

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        rngs = [np.random.default_rng((self.seed, i, place)) for place in range(self.batch_size)]
        return default_collate([self.sample(rng) for rng in rngs])

    def sample(self, rng: Generator) -> dict[str, np.ndarray]:
        """A picture with its true numbers for stage 2, and some motions for stage 3."""
        config = self.config
        motion = self.motions.draw(rng)
        demonstration = motion.demonstration
        views = [demonstration.images[camera][motion.t] for camera in config["cameras"]]
        images = np.stack([random_crop(rng, view) for view in views]).astype(np.float32)
        images = jitter_and_add_noise(rng, images)
        texts = demonstration.texts()
        text = texts[rng.integers(len(texts))]
        sample = {
            "images": images.transpose(0, 3, 1, 2),  # (V, 3, H, W) uint8
            "bag_of_words": make_bag_of_words(text, config["vocabulary"]),  # (W,)
            "numbers": self.true_numbers(motion).ravel().astype(np.float32),  # (P,)
            "gripper": np.float32(motion.target[-1]),  # ()
        }
        moves = [self.sample_move(rng) for _ in range(MOTIONS_PER_IMAGE)]
        for name in moves[0]:
            sample[f"move_{name}"] = np.stack([move[name] for move in moves])
        return sample

    def sample_move(self, rng: Generator) -> dict[str, np.ndarray]:
        """A shifted motion, and the numbers that stage 2 might give for it."""
        config = self.config
        motion = self.shifted_motions.draw(rng)
        numbers = self.true_numbers(motion)
        numbers = numbers + rng.normal(size=numbers.shape) * NUMBER_ERROR / UNIT
        actions = (motion.actions - motion.current) / config["state_std"]
        actions[:, -1] = motion.actions[:, -1]
        state = motion.current.copy()
        if rng.random() < 0.5:  # otherwise the gripper continues what it does
            state[-1] = rng.random()
        state = (state - config["state_mean"]) / config["state_std"]
        return {
            "numbers": numbers.ravel().astype(np.float32),  # (P,)
            "gripper": np.float32(motion.target[-1]),  # ()
            "state": state.astype(np.float32),  # (D+1,)
            "has_state": np.array(rng.random() >= STATE_DROPOUT),  # ()
            "actions": actions.astype(np.float32),  # (K, D+1)
            "action_is_pad": motion.action_is_pad,  # (K,)
        }

    def true_numbers(self, motion) -> np.ndarray:
        """Where the target's spheres are in the world, and how they are turned: (SPHERES, 6)."""
        poses = motion.demonstration.chain.forward_kinematics(motion.target[:-1])  # (J, 4, 4)
        poses = poses[[*JOINTS, -1]]  # (S, 4, 4)
        numbers = np.concatenate([poses[:, :3, 3], poses[:, :3, 0]], 1)  # (S, 6)
        return (numbers - self.config["numbers_mean"]) / UNIT


def prepare_data(settings: Settings):
    """The network's config, samples, and samples of held-out scenes."""
    demonstrations = read_demonstrations(settings.run, images=True, seed=settings.seed)
    training_set, held_out = split_scenes(demonstrations)
    config = {"size": "tiny", "observation": "rgb", **describe(demonstrations, with_words=True)}
    config["numbers_mean"] = np.zeros((SPHERES, 6)).tolist()
    samples = Samples(training_set, demonstrations, config, settings)
    config.update(samples.motions.state_statistics(settings.seed))
    numbers = []
    for i in range(1000):
        motion = samples.motions.draw(np.random.default_rng((settings.seed, i)))
        numbers.append(samples.true_numbers(motion) * UNIT)
    config["numbers_mean"] = np.mean(numbers, 0).tolist()
    return config, samples, Samples(held_out, demonstrations, config, settings)


# ----------------------------------------------------------------------------------------- training
@torch.no_grad()
def validate(network, batches: list[dict]) -> list[float]:
    """In held-out scenes: the loss, and how far off the gripper's place is (metres)."""
    network.eval()
    losses = []
    distances = []
    for batch in batches:
        losses.append(points_loss(network, batch).item())
        found = network.predict_numbers(batch["images"], batch["bag_of_words"])[:, :-1]
        error = (found - batch["numbers"]).unflatten(1, (SPHERES, 6))
        distances.append(UNIT[0] * error[:, -1, :3].norm(dim=-1))  # (B,) of the last sphere
    network.train()
    distances = torch.cat(distances)
    return [float(np.mean(losses)), distances.median().item(), distances.mean().item()]


def save_policy(folder: Path, network: nn.Module, config: dict, log: list):
    with write_whole(folder / "config.json") as path:
        path.write_text(json.dumps(config, indent=1))
    with write_whole(folder / "model.safetensors") as path:
        save_file(network.state_dict(), path)
    write_losses(folder, COLUMNS, log, ["loss"], ["held_out"], "loss")


def policy(run: Path, device: str) -> ActPolicy:
    """For evaluate.py --policy: what was trained in <run>/points."""
    folder = Path(run) / NAME
    if not (folder / "model.safetensors").exists():
        raise UserError(f"{folder} holds no policy: run variations/train_{NAME}.py first.")
    config = json.loads((folder / "config.json").read_text())
    network = Points(config)
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return ActPolicy(Controller(network.to(device).eval(), config, device))


def main():
    settings = tyro.cli(Settings, description=__doc__)
    training.check_numbers(settings)
    folder = settings.run / NAME if settings.out is None else settings.out
    device = choose_device(settings.device)
    bf16 = choose_precision("tiny", "auto") == "bf16"  # where this CPU is faster in it
    config, samples, unseen = prepare_data(settings)
    held_out = [unseen[settings.steps + i] for i in range(VALIDATION_BATCHES)]
    held_out = send_to_device(held_out, device)

    torch.manual_seed(settings.seed)
    network = Points(config).to(device)
    optimizer = AdamW(network.parameters(), settings.learning_rate, weight_decay=WEIGHT_DECAY)
    identity = {**config, "steps": settings.steps, "batch_size": settings.batch_size}
    identity |= {"learning_rate": settings.learning_rate, "seed": settings.seed, "bf16": bf16}
    start, log = training.resume(folder, network, optimizer, identity)

    stopping = training.StopSignal()
    batches = training.batches(samples, start, settings.steps, num_workers=2)
    bar = tqdm(batches, NAME, settings.steps, initial=start)
    for step, batch in enumerate(bar, start + 1):
        factor = training.warmup(step) * training.half_cosine(step, settings.steps)
        training.set_learning_rate(optimizer, settings.learning_rate * factor)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = points_loss(network, send_to_device(batch, device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), GRADIENT_CLIP)
        optimizer.step()

        log.append([step, loss.item(), "", "", ""])
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        is_last = step == settings.steps
        due = step % settings.checkpoint_every == 0 or is_last
        if due:
            log[-1][2:] = validate(network, held_out)
        if due or stopping.requested:
            save_policy(folder, network, config, log)
            training.save(folder, network, optimizer, identity, step, log)
        if stopping.requested and not is_last:
            training.stop_training(step, say=True)
    _, _, _, median, mean = log[-1]
    print(
        f"{folder}: in held-out scenes the gripper's place is {100 * median:.1f} cm off in the "
        f"median, {100 * mean:.1f} cm in the mean."
    )


if __name__ == "__main__":
    run_stage(main)
