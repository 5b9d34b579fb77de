"""The eyes of the controller: images of several views -> tokens for a transformer.

    images (B, V, 3, H, W)
      |  ResNet, the same for all views
    features (B, V, h, w, C)  <-- FiLM, instruction (the rgb baseline only)
      |  CellTokens or PooledTokens
    tokens (B, N, E)

B samples, V views, H x W pixels, C channels of h x w cells, N tokens of E numbers.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel


class ImageEncoder(nn.Module):
    def __init__(self, config: dict, size: dict):
        """config: what train_act.py writes into config.json; size: a row of genima.act.SIZES."""
        super().__init__()
        channels = size["resnet"]["hidden_sizes"][-1]
        width = size["layer"]["d_model"]
        words = len(config["vocabulary"])

        self.backbone = ResNetModel(ResNetConfig(**size["resnet"], layer_type="basic"))
        normalise_in_groups(self.backbone)

        # FiLM: the instruction scales and shifts the features. Only the rgb baseline needs it:
        # where there are spheres, the painter has read the instruction.
        # (Published code: CLIP's embedding of the instruction. Here: the words in it.)
        self.film = None
        if words:
            self.film = nn.Sequential(
                nn.Linear(words, 64),
                nn.ReLU(),
                nn.Linear(64, 2 * channels),
            )

        if size["tokens_per_view"]:
            cells = math.prod(math.ceil(pixels / 4) for pixels in config["image_size"])  # h * w
            views = len(config["cameras"])
            self.to_tokens = PooledTokens(channels, cells, views, size["tokens_per_view"], width)
        else:
            self.to_tokens = CellTokens(channels, width)

    def forward(self, images: torch.Tensor, bag_of_words: torch.Tensor) -> torch.Tensor:
        """Images (B, V, 3, H, W) uint8, words (B, W) -> tokens (B, N, E)."""
        batch_size, views = images.shape[:2]
        pixels = images.flatten(0, 1).float() / 127.5 - 1  # (B*V, 3, H, W)
        features = self.backbone(pixels).last_hidden_state  # (B*V, C, h, w)
        if self.film is not None:
            film = self.film(bag_of_words)  # (B, 2*C)
            film = film.repeat_interleave(views, 0)[..., None, None]  # (B*V, 2*C, 1, 1)
            scale, shift = film.chunk(2, 1)
            features = features * (1 + scale) + shift
        features = features.permute(0, 2, 3, 1)  # (B*V, h, w, C)
        features = features.unflatten(0, (batch_size, views))  # (B, V, h, w, C)
        return self.to_tokens(features)


def normalise_in_groups(backbone: ResNetModel):
    """Replace batch normalisation by groups of 16 channels, as Diffusion Policy does.

    With several processes each of them would normalise over its own part of the batch.
    """
    for module in backbone.modules():
        if hasattr(module, "normalization"):
            channels = module.normalization.num_features
            module.normalization = nn.GroupNorm(channels // 16, channels)


class CellTokens(nn.Module):
    """The paper's tokens: every cell of the features is one, with its 2-D position added."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.project = nn.Linear(channels, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        cells = self.project(features)  # (B, V, h, w, E)
        # The views are side by side in one wide picture, as in ACT.
        cells = cells.transpose(1, 2).flatten(2, 3)  # (B, h, V*w, E)
        height, width, channels = cells.shape[1:]
        positions = sine_positions(height, width, channels).to(cells)  # (h, V*w, E)
        return (cells + positions).flatten(1, 2)  # (B, h*V*w, E)


class PooledTokens(nn.Module):
    """tiny's tokens: a few per view, each a linear function of all cells of its view.

    All that matters is where the spheres are, and with few tokens the transformer is fast.
    """

    def __init__(self, channels: int, cells: int, views: int, tokens: int, width: int):
        super().__init__()
        self.tokens = tokens
        self.project = nn.Linear(channels, 16)
        self.pool = nn.ModuleList()  # one per view
        for _ in range(views):
            self.pool.append(nn.Linear(16 * cells, tokens * width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        cells = F.relu(self.project(features))  # (B, V, h, w, 16)
        cells = cells.flatten(2)  # (B, V, h*w*16)
        views = []
        for v, pool in enumerate(self.pool):
            views.append(pool(cells[:, v]))  # (B, tokens*E)
        tokens = torch.stack(views, 1)  # (B, V, tokens*E)
        tokens = tokens.unflatten(2, (self.tokens, -1))  # (B, V, tokens, E)
        return tokens.flatten(1, 2)  # (B, V*tokens, E)


def sine_positions(height: int, width: int, channels: int) -> torch.Tensor:
    """2-D sine positions (height, width, channels): half of the channels for y, half for x."""
    exponents = torch.arange(0, channels // 2, 2) / (channels // 2)
    frequencies = 2 * math.pi * 10000**-exponents  # (channels/4,)
    y = (torch.arange(1, height + 1) / height)[:, None] * frequencies
    x = (torch.arange(1, width + 1) / width)[:, None] * frequencies
    y = torch.cat([y.sin(), y.cos()], -1)[:, None]  # (height, 1, channels/2)
    x = torch.cat([x.sin(), x.cos()], -1)  # (width, channels/2)
    y = y.expand(-1, width, -1)  # (height, width, channels/2)
    x = x.expand(height, -1, -1)
    return torch.cat([y, x], -1)
