"""Variation of stage 3: actions are tokens, as in RT-2 (Brohan et al. 2023).

    In:   <run>/episodes, <run>/spheres (for the horizon K; no sphere is drawn)
    Out:  <run>/action_tokens/   config.json, model.safetensors, losses.csv, losses.png, training.pt

    python variations/train_action_tokens.py
    python evaluate.py --policy variations/train_action_tokens.py:policy
    diff train_act.py variations/train_action_tokens.py             what changed

RT-2 fine-tunes a vision-language model of up to 55 G parameters so that it answers a picture and an
instruction with numbers: each dimension of an action in one of 256 bins, one after the other. That
model cannot be had. This is its way to act, with a small network from random weights; what the
paper is about, knowledge of the web in a robot's hands, is not here.

Against train_act.py --observation rgb (the same episodes, views, words, ResNet and encoder):

1. Joints and gripper of each step are tokens: one of 256 bins each. The last step comes first: it
   says where to go, and the other steps are on the way.
2. The decoder reads the tokens so far and predicts the next one: a language model of actions.
3. The loss is the cross-entropy of the bins, in place of L1.
4. To act, it takes the likeliest token, one after the other (greedy decoding).
5. Each word of the instruction is a token that the encoder reads, beside FiLM.

Departures from RT-2: it predicts one step at a time and sees no joint positions. And neighbouring
bins share the target here (NEIGHBOURS): RT-2's network has read numbers before.

What it gave, `--steps 2000` on the 150 demonstrations of make demo: 7, 1 and 4 of 50 in
reach_target, push_button and pick_and_lift. In held-out scenes its joints are 0.023 rad off, and
its loss is flat from step 1,200 on: it does not learn from 150 sentences which thing a word means.
From 900 demonstrations of reach_target alone: 42 of 50, and 0.020 rad.
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

NAME = "action_tokens"
BINS = 256  # RT-2
NEIGHBOURS = 1.5  # bins: standard deviation of the target about the true bin
GRIPPER_SLOPE = 20  # from an opening, 0 or 1, to a logit
STATE_DROPOUT = 0.3
WEIGHT_DECAY = 1e-4
GRADIENT_CLIP = 1.0
VALIDATION_BATCHES = 6
INPUTS = ("images", "state", "has_state", "bag_of_words")  # of the network
COLUMNS = ("step", "loss", "held_out", "error")  # of the decoded joints, rad


@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """Folder of the run: reads episodes/ and spheres/, writes action_tokens/."""
    out: Path | None = None
    """Folder for the policy, if it is not <run>/action_tokens."""
    steps: int = 3000
    """Gradient steps; the learning rate falls to zero over them."""
    batch_size: int = 32
    """Samples a step."""
    learning_rate: float = 1e-3
    """Highest learning rate of AdamW."""
    seed: int = 0
    """Seed of the weights and the samples."""
    checkpoint_every: int = 300
    """Steps between two checkpoints."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to train; auto takes a GPU if there is one."""


# ------------------------------------------------------------------------------------------ network
class ActionTokens(nn.Module):
    """ACT's eyes; a decoder that speaks actions.

    B samples, K steps, D joints, A = D+1 numbers of an action, P = K*A tokens, E the width of a
    token, W words.
    """

    def __init__(self, config: dict):
        super().__init__()
        size = SIZES[config["size"]]
        width = size["layer"]["d_model"]
        joints = config["joints"]
        self.length = config["horizon"] * (joints + 1)  # P
        self.image_encoder = ImageEncoder(config, size)
        self.project_state = nn.Linear(joints + 1, width)
        self.no_state = nn.Parameter(torch.zeros(width))
        self.embed_words = nn.Parameter(torch.randn(len(config["vocabulary"]), width) * 0.02)
        self.encoder = make_encoder(size)
        self.start = nn.Parameter(torch.zeros(1, 1, width))
        self.embed_tokens = nn.Embedding(BINS, width)
        self.positions = nn.Parameter(torch.randn(self.length, width) * 0.02)
        layer = nn.TransformerDecoderLayer(**size["layer"], **LAYER)
        self.decoder = nn.TransformerDecoder(layer, size["decoder_layers"], nn.LayerNorm(width))
        self.token_head = nn.Linear(width, BINS)
        # The first bin begins at `lowest`, the last one ends at `highest`: (K, A).
        self.register_buffer("lowest", torch.tensor(config["lowest"]))
        self.register_buffer("highest", torch.tensor(config["highest"]))

    def to_tokens(self, actions) -> torch.Tensor:
        """Actions (B, K, A) -> tokens (B, P), 0..BINS-1, the last step's first."""
        bins = BINS * (actions - self.lowest) / (self.highest - self.lowest)
        tokens = bins.floor().long().clamp(0, BINS - 1)  # (B, K, A)
        return tokens.flip(1).flatten(1)

    def to_actions(self, tokens) -> torch.Tensor:
        """Tokens (B, P) -> actions (B, K, A): the middles of the bins."""
        bins = tokens.unflatten(1, self.lowest.shape).flip(1)  # (B, K, A)
        return self.lowest + (bins + 0.5) / BINS * (self.highest - self.lowest)

    def encode(self, images, state, has_state, bag_of_words):
        """What the decoder attends to, (B, 1+N+W, E), and which of it is no token, (B, 1+N+W)."""
        state_token = torch.where(has_state[:, None], self.project_state(state), self.no_state)
        image_tokens = self.image_encoder(images, bag_of_words)  # (B, N, E)
        word_tokens = self.embed_words.expand(len(state), -1, -1)  # (B, W, E)
        tokens = torch.cat([state_token[:, None], image_tokens, word_tokens], 1)
        is_absent = F.pad(bag_of_words == 0, (1 + image_tokens.shape[1], 0))
        return self.encoder(tokens, src_key_padding_mask=is_absent), is_absent

    def predict(self, tokens, encoded, is_absent) -> torch.Tensor:
        """The first n tokens (B, n) -> logits of the first n+1 tokens (B, n+1, BINS)."""
        start = self.start.expand(len(tokens), -1, -1)  # (B, 1, E)
        queries = torch.cat([start, self.embed_tokens(tokens)], 1)  # (B, n+1, E)
        queries = queries + self.positions[: queries.shape[1]]
        # A token sees itself and those before it.
        mask = tokens.new_ones(queries.shape[1], queries.shape[1]).triu(1).bool()
        decoded = self.decoder(queries, encoded, mask, memory_key_padding_mask=is_absent)
        return self.token_head(decoded)

    def decode(self, encoded, is_absent) -> torch.Tensor:
        """Greedy decoding: the likeliest token, P times -> (B, P)."""
        tokens = torch.zeros(len(encoded), 0, dtype=torch.long, device=encoded.device)
        for _ in range(self.length):
            logits = self.predict(tokens, encoded, is_absent)[:, -1]  # (B, BINS)
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
        return tokens

    def forward(self, images, state, has_state, bag_of_words):
        """As ACT.forward: joints (B, K, D), gripper logits (B, K), and None for the posterior."""
        tokens = self.decode(*self.encode(images, state, has_state, bag_of_words))
        actions = self.to_actions(tokens)
        return actions[..., :-1], GRIPPER_SLOPE * (actions[..., -1] - 0.5), None


def token_loss(network: ActionTokens, batch: dict) -> torch.Tensor:
    """Cross-entropy of every token, given the true ones before it."""
    encoded, is_absent = network.encode(*[batch[name] for name in INPUTS])
    tokens = network.to_tokens(batch["actions"])  # (B, P)
    logits = network.predict(tokens[:, :-1], encoded, is_absent)  # (B, P, BINS)
    bins = torch.arange(BINS, device=tokens.device)
    distance = (bins - tokens[..., None]) / NEIGHBOURS  # (B, P, BINS)
    target = (-0.5 * distance**2).softmax(-1)
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten(0, 1))


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
    """(K, D+1): joints relative to the current ones, in standard deviations, and the gripper.

    After the episode's end its last action repeats, and counts: RT-2 says "terminate" there.
    """
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
    actions = []
    for i in range(2000):
        motion = motions.draw(np.random.default_rng((settings.seed, i)))
        actions.append(relative_actions(motion, config))
    config["lowest"] = (np.min(actions, 0) - 1e-3).tolist()  # (K, D+1)
    config["highest"] = (np.max(actions, 0) + 1e-3).tolist()
    unseen = Motions(held_out, demonstrations, shifted=False)
    return config, Samples(motions, config, settings), Samples(unseen, config, settings)


# ----------------------------------------------------------------------------------------- training
@torch.no_grad()
def validate(network: ActionTokens, batches: list[dict], state_std: list) -> list[float]:
    """In held-out scenes: the loss, and the mean error of the decoded joints, rad."""
    network.eval()
    scale = torch.tensor(state_std[:-1], device=network.lowest.device)  # (D,) rad
    losses = []
    errors = []
    for batch in batches:
        losses.append(token_loss(network, batch).item())
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
    """For evaluate.py --policy: what was trained in <run>/action_tokens."""
    folder = Path(run) / NAME
    if not (folder / "model.safetensors").exists():
        raise UserError(f"{folder} holds no policy: run variations/train_{NAME}.py first.")
    config = json.loads((folder / "config.json").read_text())
    network = ActionTokens(config)
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
    network = ActionTokens(config).to(device)
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
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = token_loss(network, send_to_device(batch, device))
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
