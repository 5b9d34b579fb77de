"""The controller: ACT, Action Chunking with Transformers (arXiv 2304.13705).

    latent of the CVAE, one token (not in tiny) ------- (B, 1, E) --+
    joints and gripper, or "not given", one token ----- (B, 1, E) --+
    images of V views --> ImageEncoder --> N tokens --- (B, N, E) --+
                                                                    |
                                                           transformer encoder
                                                                    |  (B, 2+N, E)
    K learned queries, one per step of the chunk ----> transformer decoder
                                                                    |  (B, K, E)
                                                               action head
                                                                    |
                            joint positions of K steps (B, K, D), gripper logits (B, K)

B samples, V views, D joints, K steps of a chunk of actions, N tokens of E numbers, L numbers of the
latent, W words. train_act.py trains it. Departures from ACT are explained where they are made.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from genima.configs import check_config
from genima.documents import read_json
from genima.files import UserError, write_whole
from genima.image_encoder import ImageEncoder
from genima.views import image_sizes_of, resize_images

SIZES = {
    # For a laptop. Its training samples never repeat, so it needs no dropout. It leaves ACT's CVAE
    # out: with one, the latent carried nothing (its KL was 4e-6 after training).
    "tiny": {
        "resnet": {"embedding_size": 32, "hidden_sizes": [64], "depths": [1]},
        "tokens_per_view": 4,
        "layer": {"d_model": 128, "nhead": 4, "dim_feedforward": 512, "dropout": 0.0},
        "encoder_layers": 2,
        "decoder_layers": 2,
        "latent": 0,
        "learning_rate": 1e-3,
    },
    # The paper's: ResNet-18 and ACT's transformer.
    "sd-turbo": {
        "resnet": {
            "embedding_size": 64,
            "hidden_sizes": [64, 128, 256, 512],
            "depths": [2, 2, 2, 2],
        },
        "tokens_per_view": None,  # every cell of the features is a token
        "layer": {"d_model": 256, "nhead": 8, "dim_feedforward": 2048, "dropout": 0.1},
        "encoder_layers": 4,
        "decoder_layers": 6,
        "latent": 32,
        "learning_rate": 5e-5,
    },
}

# What config.json always has.
CONFIG_NAMES = {"size", "observation", "horizon", "joints", "cameras", "image_size", "vocabulary"}
CONFIG_NAMES |= {"state_mean", "state_std"}

# ACT normalises at the end of a layer. At its beginning, the network trains from scratch at a
# higher learning rate.
LAYER = {"batch_first": True, "norm_first": True}


class ACT(nn.Module):
    """The network in the diagram above."""

    def __init__(self, config: dict):
        """config: what train_act.py writes into config.json."""
        super().__init__()
        size = SIZES[config["size"]]
        width = size["layer"]["d_model"]
        joints = config["joints"]
        horizon = config["horizon"]

        self.image_encoder = ImageEncoder(config, size)
        self.project_state = nn.Linear(joints + 1, width)
        self.no_state = nn.Parameter(torch.zeros(width))
        self.vae = None  # then there is no latent token
        if size["latent"]:
            self.vae = ActionVAE(size, joints, horizon)

        self.encoder = make_encoder(size)
        layer = nn.TransformerDecoderLayer(**size["layer"], **LAYER)
        self.decoder = nn.TransformerDecoder(layer, size["decoder_layers"], nn.LayerNorm(width))
        self.queries = nn.Parameter(torch.randn(horizon, width) * 0.02)
        self.action_head = nn.Linear(width, 2 * joints + 1)

    def forward(
        self,
        images: torch.Tensor,  # (B, V, 3, H, W) uint8
        state: torch.Tensor,  # (B, D+1) normalised joint positions and gripper opening
        has_state: torch.Tensor,  # (B,) bool: False hides the state
        bag_of_words: torch.Tensor,  # (B, W); W = 0 for spheres
        actions: torch.Tensor | None = None,  # (B, K, D+1) demonstrated; in training
        action_is_pad: torch.Tensor | None = None,  # (B, K) bool: after the episode's end
        latent_noise: torch.Tensor | None = None,  # (B, L) standard normal
    ):
        """Predict the joint positions (B, K, D) and gripper logits (B, K) of a chunk.

        The joint positions are relative to the current ones, in standard deviations. The third
        result is the latent's posterior, mean and log variance (B, L) each; None without actions
        or without a CVAE.
        """
        batch_size = len(state)
        state_token = torch.where(has_state[:, None], self.project_state(state), self.no_state)
        state_token = state_token[:, None]  # (B, 1, E)
        tokens = [state_token, self.image_encoder(images, bag_of_words)]

        posterior = None
        if self.vae is not None:
            latent = state.new_zeros(batch_size, self.vae.latent)  # the prior's mean
            if actions is not None:
                posterior = self.vae(state_token, actions, action_is_pad)
                mean, log_variance = posterior
                latent = mean + (0.5 * log_variance).exp() * latent_noise
            latent_token = self.vae.project_latent(latent)[:, None]  # (B, 1, E)
            tokens = [latent_token, *tokens]

        encoded = self.encoder(torch.cat(tokens, 1))  # (B, 2+N, E); tiny: 1+N
        queries = self.queries.expand(batch_size, -1, -1)  # (B, K, E)
        # This is the decoder's last layer. (ACT's first release read its first layer by mistake,
        # as LeRobot documents.)
        decoded = self.decoder(queries, encoded)  # (B, K, E)
        outputs = self.action_head(decoded)  # (B, K, 2*D+1)

        # ACT predicts positions. Here step k goes a part of the straight line from the current
        # joints to a target, plus a correction. So the images alone can give the target, and the
        # network need not learn to subtract: after 200 steps the error is 0.055 rad, not 0.075.
        current = state[:, None, :-1]  # (B, 1, D)
        joints = current.shape[-1]
        horizon = len(self.queries)
        target, correction, gripper_logits = outputs.split([joints, joints, 1], -1)
        part = torch.linspace(0, 1, horizon + 1, device=outputs.device)[1:, None]  # (K, 1)
        chunk = part * (target - current) + correction  # (B, K, D)
        return chunk, gripper_logits[..., 0], posterior


class ActionVAE(nn.Module):
    """ACT's conditional VAE: in training, it reads the demonstrated actions and gives a latent.

    The latent stands for what a demonstrator chose among equally good ways. The trained controller
    uses zero instead, the prior's mean.
    """

    def __init__(self, size: dict, joints: int, horizon: int):
        super().__init__()
        width = size["layer"]["d_model"]
        self.latent = size["latent"]
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(horizon + 2, width) * 0.02)
        self.project_actions = nn.Linear(joints + 1, width)
        self.encoder = make_encoder(size)
        self.posterior_head = nn.Linear(width, 2 * self.latent)
        self.project_latent = nn.Linear(self.latent, width)

    def forward(
        self, state_token: torch.Tensor, actions: torch.Tensor, action_is_pad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """State (B, 1, E) and actions (B, K, D+1) -> the latent's mean and log variance (B, L)."""
        class_token = self.class_token.expand(len(actions), -1, -1)  # (B, 1, E)
        action_tokens = self.project_actions(actions)  # (B, K, E)
        tokens = torch.cat([class_token, state_token, action_tokens], 1)  # (B, K+2, E)
        is_pad = F.pad(action_is_pad, (2, 0))  # (B, K+2); class and state are never padding
        encoded = self.encoder(tokens + self.positions, src_key_padding_mask=is_pad)
        posterior = self.posterior_head(encoded[:, 0])  # (B, 2*L)
        mean, log_variance = posterior.chunk(2, -1)
        return mean, log_variance


def make_encoder(size: dict) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(**size["layer"], **LAYER)
    norm = nn.LayerNorm(size["layer"]["d_model"])
    return nn.TransformerEncoder(layer, size["encoder_layers"], norm, enable_nested_tensor=False)


# ------------------------------------------------------------------------------ trained controller
def save_controller(folder: Path, network: ACT, config: dict):
    """Write config.json and model.safetensors, each whole."""
    with write_whole(folder / "config.json") as path:
        path.write_text(json.dumps(config, indent=1))
    with write_whole(folder / "model.safetensors") as path:
        save_file(network.state_dict(), path)


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def make_bag_of_words(text: str, vocabulary: list[str]) -> np.ndarray:
    """Which words of the vocabulary occur in a text: (W,) of 0 and 1."""
    words = words_of(text)
    return np.array([word in words for word in vocabulary], np.float32)


@dataclass
class Controller:
    """A trained network, called with images and joint positions."""

    model: ACT
    config: dict
    device: str

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> "Controller":
        """Load what train_act.py has written. Raises UserError if it is missing or broken."""
        folder = Path(folder)
        path = folder / "config.json"
        if not path.exists():
            raise UserError(f"{folder} holds no trained controller: run train_act.py first.")
        config = read_json(path)
        check_config(config, path, CONFIG_NAMES)
        try:
            model = ACT(config)
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except Exception as error:  # missing, cut off, or of another version
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{folder} holds no trained controller ({reason}): run train_act.py first."
            ) from error
        return cls(model.to(device).eval(), config, device)

    @torch.inference_mode()
    def __call__(
        self,
        images: dict[str, np.ndarray],
        qpos: np.ndarray,
        instructions: list[str] | None = None,
        drop_state: bool = False,
    ) -> np.ndarray:
        """Predict chunks (B, K, D+1): joint positions (rad), probability of an open gripper.

        images {camera: (B, H, W, 3) uint8}, as recorded; qpos (B, D+1): joint
        positions (rad), gripper opening.
        instructions: B sentences, for the rgb baseline only.
        drop_state: do not show qpos to the network.
        """
        config = self.config
        qpos = np.asarray(qpos, np.float32)
        self.check_inputs(images, qpos, instructions)

        size = config["image_size"]
        views = [resize_images(images[camera], *size) for camera in config["cameras"]]
        views = np.stack(views, 1)  # (B, V, H, W, 3)
        state = (qpos - config["state_mean"]) / config["state_std"]  # (B, D+1)
        has_state = np.full(len(qpos), not drop_state)  # (B,)
        if instructions is None:
            instructions = [""] * len(qpos)
        words = [make_bag_of_words(text, config["vocabulary"]) for text in instructions]

        inputs = [views.transpose(0, 1, 4, 2, 3), state.astype(np.float32), has_state]
        inputs.append(np.stack(words))  # (B, W)
        tensors = [torch.from_numpy(array).to(self.device) for array in inputs]
        chunk, gripper_logits, *_ = self.model(*tensors)

        state_std = np.array(config["state_std"][:-1], np.float32)
        joints = chunk.cpu().numpy() * state_std + qpos[:, None, :-1]  # (B, K, D)
        gripper = gripper_logits.sigmoid().cpu().numpy()  # (B, K)
        return np.concatenate([joints, gripper[..., None]], -1)

    def check_inputs(self, images, qpos, instructions):
        """Raise a UserError for other cameras, image sizes or joints than in training."""
        config = self.config
        needed = image_sizes_of(config)
        given = {camera: views.shape[1:3] for camera, views in images.items()}
        if needed.items() - given.items():
            raise UserError(f"The controller was trained on images {needed}, but is given {given}.")
        joints = qpos.shape[1] - 1
        if joints != config["joints"]:
            raise UserError(
                f"The controller was trained with {config['joints']} joints, "
                f"but is given {joints} joints."
            )
        if config["vocabulary"] and instructions is None:
            raise UserError("The controller was trained with instructions, but is given none.")
