"""The controller: ACT (Action Chunking with Transformers). Trained by train_act.py, used by evaluate.py and real_robot.py.

V views with spheres -> ResNet -> tokens
joints and gripper, or "not given" -----> transformer encoder -> decoder with K queries -> K joint positions and grippers
chunk -> CVAE encoder -> z (in training; later z = 0)
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel

from genima.files import UserError

# sd-turbo: the paper's ResNet-18 and transformer, each cell a token. tiny stops at 16x16 cells of a 64x64 picture, and reads a few
# tokens off all cells of a view at once: all that matters is where the spheres are. Its samples never repeat: it needs no dropout.
SIZES = {
    "tiny": dict(
        stem=32,
        channels=[64],
        depths=[1],
        tokens=4,
        width=128,
        encoder=2,
        decoder=2,
        heads=4,
        feedforward=512,
        dropout=0.0,
        learning_rate=1e-3,
    ),
    "sd-turbo": dict(
        stem=64,
        channels=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        tokens=0,
        width=256,
        encoder=4,
        decoder=6,
        heads=8,
        feedforward=2048,
        dropout=0.1,
        learning_rate=5e-5,
    ),
}
LATENT = 32  # of the CVAE (ACT)


def words_in(text):
    return re.findall(r"[a-z0-9]+", text.lower())


class ACT(nn.Module):
    """In the shapes: B samples, V views, K steps, D joints, C channels of the ResNet, E the transformer's width."""

    def __init__(self, config):
        super().__init__()
        joints, steps, views, words = (
            config["joints"],
            config["horizon"],
            len(config["cameras"]),
            len(config["vocabulary"]),
        )
        size = SIZES[config["size"]]
        width, channels, self.tokens = size["width"], size["channels"][-1], size["tokens"]
        self.backbone = ResNetModel(
            ResNetConfig(
                embedding_size=size["stem"],
                hidden_sizes=size["channels"],
                depths=size["depths"],
                layer_type="basic",
            )
        )
        for part in (
            self.backbone.modules()
        ):  # batch normalisation would see another batch in each of several processes
            if hasattr(
                part, "normalization"
            ):  # (Diffusion Policy, whose groups have 16 channels too)
                channels_in = part.normalization.num_features
                part.normalization = nn.GroupNorm(channels_in // 16, channels_in)
        # Language, for rgb alone: the painter has read it for us. (Published code: CLIP's embedding; here, which words occur.)
        self.film = (
            nn.Sequential(nn.Linear(words, 64), nn.ReLU(), nn.Linear(64, 2 * channels))
            if words
            else None
        )
        cells = math.prod(math.ceil(n / 4) for n in config["image_size"])
        self.cell = nn.Linear(channels, 16 if self.tokens else width)
        self.places = nn.ModuleList(
            nn.Linear(16 * cells, self.tokens * width) for _ in range(views) if self.tokens
        )
        self.state, self.no_state = nn.Linear(joints + 1, width), nn.Parameter(torch.zeros(width))
        # Layer norm comes first in a layer (ACT: last): so it trains from scratch at a higher learning rate.
        layer = dict(
            d_model=width,
            nhead=size["heads"],
            dim_feedforward=size["feedforward"],
            dropout=size["dropout"],
            batch_first=True,
            norm_first=True,
        )
        self.encoder, self.posterior_encoder = (
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(**layer),
                size["encoder"],
                nn.LayerNorm(width),
                enable_nested_tensor=False,
            )
            for _ in range(2)
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(**layer), size["decoder"], nn.LayerNorm(width)
        )
        self.queries = nn.Parameter(torch.randn(steps, width) * 0.02)
        self.action = nn.Linear(width, 2 * joints + 1)
        # The CVAE: z is what a demonstrator chose among equally good ways.
        self.action_in, self.class_token = (
            nn.Linear(joints + 1, width),
            nn.Parameter(torch.zeros(1, 1, width)),
        )
        self.chunk_position = nn.Parameter(torch.randn(steps + 2, width) * 0.02)
        self.posterior, self.latent = nn.Linear(width, 2 * LATENT), nn.Linear(LATENT, width)

    def see(self, pictures, words):
        """(B, V, 3, H, W) uint8 -> tokens (B, N, E)."""
        views = pictures.shape[:2]  # B, V
        features = self.backbone(
            pictures.flatten(0, 1).float() / 127.5 - 1
        ).last_hidden_state  # (B*V, C, h, w)
        if self.film:
            scale, offset = (
                self.film(words).repeat_interleave(views[1], 0)[..., None, None].chunk(2, 1)
            )  # (B*V, C, 1, 1)
            features = features * (1 + scale) + offset
        cells = self.cell(features.permute(0, 2, 3, 1)).unflatten(0, views)  # (B, V, h, w, 16 or E)
        if self.tokens:
            cells = F.relu(cells).flatten(2)  # (B, V, h*w*16)
            tokens = torch.stack(
                [place(cells[:, i]) for i, place in enumerate(self.places)], 1
            )  # (B, V, tokens*E)
            return tokens.unflatten(2, (self.tokens, -1)).flatten(1, 2)  # (B, V*tokens, E)
        cells = cells.transpose(1, 2).flatten(
            2, 3
        )  # (B, h, V*w, E): the views side by side in one wide picture (ACT)
        return (cells + sine_positions(*cells.shape[1:]).to(cells)).flatten(1, 2)  # (B, h*V*w, E)

    def forward(
        self, pictures, state, state_given, words, joints=None, gripper=None, valid=None, noise=None
    ):
        """-> joints (B, K, D), gripper logits (B, K); and mean and log variance (B, LATENT) of z, if the chunk is given."""
        present, z, mean, log_variance = (
            state[:, None, :-1],
            state.new_zeros(len(state), LATENT),
            None,
            None,
        )
        state = torch.where(state_given[:, None], self.state(state), self.no_state)[
            :, None
        ]  # (B, 1, E)
        if joints is not None:
            chunk = self.action_in(torch.cat([joints, gripper[..., None]], -1))  # (B, K, E)
            tokens = (
                torch.cat([self.class_token.expand(len(state), -1, -1), state, chunk], 1)
                + self.chunk_position
            )  # (B, K+2, E)
            tokens = self.posterior_encoder(tokens, src_key_padding_mask=F.pad(valid == 0, (2, 0)))
            mean, log_variance = self.posterior(tokens[:, 0]).chunk(2, -1)  # (B, LATENT) each
            z = mean + (0.5 * log_variance).exp() * noise
        memory = self.encoder(
            torch.cat([self.latent(z)[:, None], state, self.see(pictures, words)], 1)
        )  # (B, 2+N, E)
        # The decoder gives its last layer. (ACT's first release read the first by mistake, as LeRobot documents.)
        actions = self.action(
            self.decoder(self.queries.expand(len(state), -1, -1), memory)
        )  # (B, K, 2*D+1)
        # The chunk is the straight way to a goal, and something more. So the pictures alone can give the goal, and the subtraction
        # that a network learns slowly is exact: after 200 steps the error is 0.055 rad instead of 0.075. (ACT: positions.)
        goal, more, gripper = actions.split([present.shape[-1], present.shape[-1], 1], -1)
        u = torch.linspace(0, 1, actions.shape[1] + 1, device=actions.device)[1:, None]  # (K, 1)
        return u * (goal - present) + more, gripper[..., 0], mean, log_variance


def sine_positions(height, width, channels):
    """2-D sine positions (h, w, E): half of the channels for y, half for x."""
    frequencies = (
        2 * math.pi * 10000 ** -(torch.arange(0, channels // 2, 2) / (channels // 2))
    )  # (E/4,)
    y, x = (
        (torch.arange(1, n + 1) / n)[:, None] * frequencies for n in (height, width)
    )  # (h, E/4), (w, E/4)
    y, x = (
        torch.cat([y.sin(), y.cos()], -1)[:, None],
        torch.cat([x.sin(), x.cos()], -1),
    )  # (h, 1, E/2), (w, E/2)
    return torch.cat([y.expand(-1, width, -1), x.expand(height, -1, -1)], -1)


@dataclass
class Controller:
    """A trained network, to be called with pictures and joints."""

    model: ACT
    config: dict
    device: str

    @classmethod
    def load(cls, folder, device="cpu"):
        try:
            config = json.loads((Path(folder) / "config.json").read_text())
            model = ACT(config)
            model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        except Exception as error:  # missing, cut off, or of another version
            raise UserError(
                f"{folder} holds no trained controller ({' '.join(str(error).split())[:200]}): run train_act.py first."
            ) from error
        return cls(model.to(device).eval(), config, device)

    @torch.inference_mode()
    def __call__(self, images, qpos, instructions=None, drop_state=False):
        """images {camera: (B, H, W, 3) uint8}, qpos (B, D+1) -> (B, K, D+1): joint positions (rad), probability of an open gripper.

        instructions: B sentences, needed by the rgb baseline only. drop_state: don't show the network qpos.
        """
        config, qpos = self.config, np.asarray(qpos, np.float32)
        wanted, given = (
            {c: tuple(config["image_size"]) for c in config["cameras"]},
            {c: i.shape[1:3] for c, i in images.items()},
        )
        if wanted.items() - given.items():
            raise UserError(
                f"The controller was trained on pictures {wanted}, but is given {given}."
            )
        if qpos.shape[1] != config["joints"] + 1 or config["vocabulary"] and instructions is None:
            raise UserError(
                f"The controller was trained with {config['joints']} joints{' and instructions' * bool(config['vocabulary'])}, "
                f"but is given {qpos.shape[1] - 1} joints."
            )
        pictures = np.stack([images[camera] for camera in config["cameras"]], 1).transpose(
            0, 1, 4, 2, 3
        )  # (B, V, 3, H, W)
        state = ((qpos - config["state_mean"]) / config["state_std"]).astype(np.float32)
        words = [
            [word in words_in(text) for word in config["vocabulary"]]
            for text in instructions or [""] * len(qpos)
        ]
        inputs = pictures, state, np.full(len(qpos), not drop_state), np.array(words, np.float32)
        joints, gripper, *_ = self.model(
            *[torch.from_numpy(array).to(self.device) for array in inputs]
        )
        joints = (
            joints.cpu().numpy() * np.array(config["state_std"][:-1], np.float32)
            + qpos[:, None, :-1]
        )  # (B, K, D)
        return np.concatenate([joints, gripper.sigmoid().cpu().numpy()[..., None]], -1)
