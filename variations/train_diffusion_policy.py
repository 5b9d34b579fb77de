"""Variation of stage 3: Diffusion Policy (Chi et al. 2023). Noise becomes a chunk of actions.

    In:   <run>/episodes, <run>/spheres (for the horizon K; no sphere is drawn)
    Out:  <run>/diffusion_policy/   config.json, model.safetensors, training.pt, losses.csv, .png

    python variations/train_diffusion_policy.py
    python evaluate.py --policy variations/train_diffusion_policy.py:policy
    diff train_act.py variations/train_diffusion_policy.py          what changed

The paper's second baseline: nothing is painted, the policy reads plain views and the instruction.
Against train_act.py --observation rgb (the same episodes, views, words, ResNet and transformer):

1. There is no CVAE: where demonstrators differ, the noise chooses.
2. The decoder's queries are the noisy chunk and the level of its noise; the decoder removes it.
3. The loss is the squared error of the clean chunk, from a random level of noise.
4. To act, the policy starts from noise and removes it in ten steps (DDIM).

What it gave, `--steps 2000` on the 150 demonstrations of make demo: 7, 2 and 4 of 50 in
reach_target, push_button and pick_and_lift; in held-out scenes its joints are 0.025 rad off, which
no longer falls. From 900 demonstrations of reach_target alone 50 of 50, and 0.015 rad. And with an
earlier revision, `--steps 3000` on 2,700 demonstrations: 12, 6 and 24 (ACT: 48, 49, 49). Its chunks
ended 0.02 rad off in the median, as ACT's do, one in ten 0.1 rad. Its faults are mended here:

- Joints were divided by the largest one seen: their standard deviation was 0.18 (0.07 in a chunk's
  first step) beside a noise of 1 and a gripper of -1 or 1. Now it is DATA_STD.
- Acting began with pure noise, but called it level 90 of 99 ("leading"). Now it is level 99.
- Denoised chunks were clipped at the largest of 1,000. Predicted chunks need no clipping.

Tried with the target's joints in place of images (150 demonstrations, 800 steps, held-out scenes):
the mean error falls from 0.0194 to 0.0171 rad (three seeds, two seeds), the last step's is 0.0161
and 0.0169. So these faults alone do not explain the success rates. An average of the weights, as in
the published code, changes these errors by 0.0002 rad: the learning rate falls to zero anyway.
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
from diffusers import DDIMScheduler
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from numpy.random import Generator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import AdamW
from torch.utils.data import Dataset, default_collate
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # genima/ is one folder up

from genima import training
from genima.act import LAYER, SIZES, Controller, make_bag_of_words, make_encoder
from genima.checkpoints import choose_device
from genima.demonstrations import describe, read_demonstrations, split_scenes
from genima.files import UserError, run_stage, write_whole
from genima.image_encoder import ImageEncoder
from genima.motions import Motion, Motions
from genima.painter_training import choose_precision
from genima.plots import write_losses
from genima.policy import ActPolicy
from genima.textures import jitter_and_add_noise, random_crop

NAME = "diffusion_policy"
NOISE_LEVELS = 100  # in training (Diffusion Policy)
DATA_STD = 0.5  # standard deviation of a normalised joint; the noise has 1
DENOISING_STEPS = 10  # to act (Diffusion Policy on a real robot: 10 to 16)
# Noisy chunks for each picture in training. The ResNet is what costs; they share it.
CHUNKS_PER_IMAGE = 4
GRIPPER_SLOPE = 20  # from an opening, 0 or 1, to a logit
STATE_DROPOUT = 0.3
WEIGHT_DECAY = 1e-4
GRADIENT_CLIP = 1.0
VALIDATION_BATCHES = 6
INPUTS = ("images", "state", "has_state", "bag_of_words")  # of the network
COLUMNS = ("step", "loss", "held_out", "error")  # of the denoised joints, rad


@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """Folder of the run: reads episodes/ and spheres/, writes diffusion_policy/."""
    out: Path | None = None
    """Folder for the policy, if it is not <run>/diffusion_policy."""
    steps: int = 3000
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
class DiffusionPolicy(nn.Module):
    """ACT's eyes and transformer; the decoder reads a noisy chunk.

    B samples, K steps, D joints, A = D+1 numbers of an action, E the transformer's width.
    """

    def __init__(self, config: dict):
        super().__init__()
        size = SIZES[config["size"]]
        width = size["layer"]["d_model"]
        joints = config["joints"]
        self.horizon = config["horizon"]
        self.image_encoder = ImageEncoder(config, size)
        self.project_state = nn.Linear(joints + 1, width)
        self.no_state = nn.Parameter(torch.zeros(width))
        self.encoder = make_encoder(size)
        layer = nn.TransformerDecoderLayer(**size["layer"], **LAYER)
        self.decoder = nn.TransformerDecoder(layer, size["decoder_layers"], nn.LayerNorm(width))
        self.project_action = nn.Linear(joints + 1, width)
        self.step_position = nn.Parameter(torch.randn(self.horizon, width) * 0.02)
        self.embed_level = nn.Sequential(Timesteps(width, True, 0), TimestepEmbedding(width, width))
        self.action_head = nn.Linear(width, 2 * joints + 1)
        self.register_buffer("action_mean", torch.tensor(config["action_mean"]))  # (A,)
        self.register_buffer("action_std", torch.tensor(config["action_std"]))  # (A,)
        # The network predicts the clean chunk, so few steps suffice (as in 3D Diffusion Policy).
        self.scheduler = DDIMScheduler(
            NOISE_LEVELS,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="sample",
            clip_sample=False,
            timestep_spacing="trailing",
        )

    def normalise(self, actions) -> torch.Tensor:
        """Actions (B, K, A): joints get mean 0 and deviation DATA_STD, the gripper is -1 or 1."""
        return DATA_STD * (actions - self.action_mean) / self.action_std

    def encode(self, images, state, has_state, bag_of_words) -> torch.Tensor:
        """What the decoder attends to: (B, 1+N, E)."""
        state_token = torch.where(has_state[:, None], self.project_state(state), self.no_state)
        tokens = [state_token[:, None], self.image_encoder(images, bag_of_words)]
        return self.encoder(torch.cat(tokens, 1))

    def denoise(self, noisy, level, encoded, current) -> torch.Tensor:
        """Noisy chunks (B, K, A) at noise levels (B,) -> the clean chunks (B, K, A), normalised.

        current: the joints of the state (B, 1, D). The head is ACT's, a line plus a correction.
        """
        queries = self.project_action(noisy) + self.step_position  # (B, K, E)
        queries = queries + self.embed_level(level)[:, None]
        outputs = self.action_head(self.decoder(queries, encoded))  # (B, K, 2*D+1)
        joints = current.shape[-1]
        target, correction, gripper = outputs.split([joints, joints, 1], -1)
        part = torch.linspace(0, 1, self.horizon + 1, device=noisy.device)[1:, None]  # (K, 1)
        chunk = part * (target - current) + correction
        return self.normalise(torch.cat([chunk, gripper], -1))

    def forward(self, images, state, has_state, bag_of_words):
        """As ACT.forward: joints (B, K, D), gripper logits (B, K), and None for the posterior."""
        encoded = self.encode(images, state, has_state, bag_of_words)
        generator = torch.Generator().manual_seed(0)  # the same noise in the same situation
        shape = (self.horizon, len(self.action_mean))
        noise = torch.randn(shape, generator=generator).to(state)  # (K, A)
        chunk = noise.repeat(len(state), 1, 1)  # (B, K, A)
        self.scheduler.set_timesteps(DENOISING_STEPS)
        for timestep in self.scheduler.timesteps:
            level = timestep.expand(len(chunk)).to(state.device)
            clean = self.denoise(chunk, level, encoded, state[:, None, :-1])
            chunk = self.scheduler.step(clean, timestep, chunk).prev_sample
        actions = chunk / DATA_STD * self.action_std + self.action_mean
        return actions[..., :-1], GRIPPER_SLOPE * (actions[..., -1] - 0.5), None


def diffusion_loss(network, batch: dict) -> torch.Tensor:
    """Squared error of the clean, normalised chunk; all of its numbers count alike.

    After the episode's end its last action repeats, and counts (published code).
    """
    encoded = network.encode(*[batch[name] for name in INPUTS])
    chunk = network.normalise(batch["actions"])  # (B, K, A)

    chunk = chunk.repeat_interleave(CHUNKS_PER_IMAGE, 0)
    encoded = encoded.repeat_interleave(CHUNKS_PER_IMAGE, 0)
    current = batch["state"][:, None, :-1].repeat_interleave(CHUNKS_PER_IMAGE, 0)
    level = torch.randint(NOISE_LEVELS, (len(chunk),), device=chunk.device)
    noisy = network.scheduler.add_noise(chunk, torch.randn_like(chunk), level)
    denoised = network.denoise(noisy, level, encoded, current)
    return (denoised.float() - chunk).square().mean()


# --------------------------------------------------------------------------------------------- data
class Samples(Dataset):
    """Item i is batch i: a function of seed and i alone."""

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
        demonstration = motion.demonstration
        views = [demonstration.images[camera][motion.t] for camera in config["cameras"]]
        images = np.stack([random_crop(rng, view) for view in views]).astype(np.float32)
        images = jitter_and_add_noise(rng, images)

        state = motion.current.copy()
        if rng.random() < 0.5:  # otherwise the gripper continues what it does
            state[-1] = rng.random()
        state = (state - config["state_mean"]) / config["state_std"]
        texts = demonstration.texts()
        text = texts[rng.integers(len(texts))]
        return {
            "images": images.transpose(0, 3, 1, 2),  # (V, 3, H, W) uint8
            "state": state.astype(np.float32),  # (D+1,)
            "has_state": np.array(rng.random() >= STATE_DROPOUT),  # ()
            "bag_of_words": make_bag_of_words(text, config["vocabulary"]),  # (W,)
            "actions": relative_actions(motion, config).astype(np.float32),  # (K, D+1)
        }


def relative_actions(motion: Motion, config: dict) -> np.ndarray:
    """(K, D+1): joints relative to the current ones, in standard deviations, and the gripper."""
    actions = (motion.actions - motion.current) / config["state_std"]
    actions[:, -1] = motion.actions[:, -1]
    return actions


def prepare_data(settings: Settings):
    """The network's config, samples, and samples of held-out scenes."""
    demonstrations = read_demonstrations(settings.run, images=True, seed=settings.seed)
    training_set, held_out = split_scenes(demonstrations)
    config = {"size": "tiny", "observation": "rgb", **describe(demonstrations, with_words=True)}
    motions = Motions(training_set, demonstrations, shifted=False)
    config.update(motions.state_statistics(settings.seed))
    samples = Samples(motions, config, settings)
    unseen = Samples(Motions(held_out, demonstrations, shifted=False), config, settings)
    actions = []
    for i in range(2000):
        motion = motions.draw(np.random.default_rng((settings.seed, i)))
        actions.append(relative_actions(motion, config))
    mean = np.mean(actions, (0, 1))  # (D+1,)
    std = np.std(actions, (0, 1)) + 1e-3
    mean[-1] = 0.5  # the gripper becomes -1 or 1
    std[-1] = 0.5 * DATA_STD
    config["action_mean"] = mean.tolist()
    config["action_std"] = std.tolist()
    return config, samples, unseen


# ----------------------------------------------------------------------------------------- training
@torch.no_grad()
def validate(network: DiffusionPolicy, batches: list[dict], state_std: list) -> list[float]:
    """In held-out scenes, from the same noise: the loss, and the mean error of the joints, rad."""
    network.eval()
    torch.manual_seed(0)
    scale = torch.tensor(state_std[:-1], device=network.action_std.device)  # (D,) rad
    losses = []
    errors = []
    for batch in batches:
        losses.append(diffusion_loss(network, batch).item())
        joints, _, _ = network(*[batch[name] for name in INPUTS])
        error = (joints - batch["actions"][..., :-1]).abs()  # (B, K, D)
        errors.append((error * scale).mean().item())
    network.train()
    return [float(np.mean(losses)), float(np.mean(errors))]


def save_policy(folder: Path, network: nn.Module, config: dict, log: list):
    with write_whole(folder / "config.json") as path:
        path.write_text(json.dumps(config, indent=1))
    with write_whole(folder / "model.safetensors") as path:
        save_file(network.state_dict(), path)
    write_losses(folder, COLUMNS, log, ["loss"], ["held_out"], "loss")


def policy(run: Path, device: str) -> ActPolicy:
    """For evaluate.py --policy: what was trained in <run>/diffusion_policy."""
    folder = Path(run) / NAME
    if not (folder / "model.safetensors").exists():
        raise UserError(f"{folder} holds no policy: run variations/train_{NAME}.py first.")
    config = json.loads((folder / "config.json").read_text())
    network = DiffusionPolicy(config)
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
    network = DiffusionPolicy(config).to(device)
    optimizer = AdamW(network.parameters(), settings.learning_rate, weight_decay=WEIGHT_DECAY)
    identity = {
        **config,
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "seed": settings.seed,
        "bf16": bf16,
    }
    start, log = training.resume(folder, network, optimizer, identity)

    stopping = training.StopSignal()
    batches = training.batches(samples, start, settings.steps, num_workers=2)
    bar = tqdm(batches, NAME, settings.steps, initial=start)
    for step, batch in enumerate(bar, start + 1):
        factor = training.warmup(step) * training.half_cosine(step, settings.steps)
        training.set_learning_rate(optimizer, settings.learning_rate * factor)
        noise_seed = np.random.SeedSequence((settings.seed, step))
        torch.manual_seed(int(noise_seed.generate_state(1)[0]))
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = diffusion_loss(network, send_to_device(batch, device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), GRADIENT_CLIP)
        optimizer.step()

        log.append([step, loss.item(), "", ""])
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        is_last = step == settings.steps
        due = step % settings.checkpoint_every == 0 or is_last
        if due:
            log[-1][2:] = validate(network, held_out, config["state_std"])
        if due or stopping.requested:
            save_policy(folder, network, config, log)
            training.save(folder, network, optimizer, identity, step, log)
        if stopping.requested and not is_last:
            training.stop_training(step, say=True)
    print(f"{folder}: in held-out scenes, joints are {log[-1][3]:.4f} rad off.")


if __name__ == "__main__":
    run_stage(main)
