"""Random changes to stage 2's samples: views moved by pixels, colours of the condition jittered.

All that is random comes from the generators, one for each sample.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from genima.views import tile_views, untile_views


@dataclass
class Augmentation:
    """Random changes to a training sample; the values are the published code's."""

    crop: int = 2
    """Pixels by which each view is moved at most, condition and target alike."""
    brightness: float = 0.2
    """Of the condition alone, as all that follow: a factor within 1 - 0.2 and 1 + 0.2."""
    contrast: float = 0.2
    saturation: float = 0.1
    hue: float = 0.05
    """A turn of the colours, as a part of the full circle."""


def random_crop(pictures: torch.Tensor, rngs: list, crop: int, views: int) -> torch.Tensor:
    """Each sample's views (B, C, H, W), moved alike by up to `crop` pixels."""
    moved = []
    for picture, rng in zip(pictures, rngs):
        dy, dx = rng.integers(-crop, crop + 1, size=2)
        moved.append(shift_views(picture, dy, dx, views))
    return torch.stack(moved)


def shift_views(picture: torch.Tensor, dy: int, dx: int, views: int) -> torch.Tensor:
    """Every view within (C, H, W) moved by (dy, dx) pixels; its edge is filled by reflection."""
    tiles = untile_views(picture[None], views)[0]  # (V, C, h, w)
    height, width = tiles.shape[2:]
    pad = max(abs(dy), abs(dx))
    padded = F.pad(tiles, (pad, pad, pad, pad), mode="reflect")
    rows = slice(pad + dy, pad + dy + height)
    columns = slice(pad + dx, pad + dx + width)
    return tile_views(padded[None, :, :, rows, columns])[0]


def colour_jitter(pictures: torch.Tensor, rngs: list, strength: Augmentation) -> torch.Tensor:
    """Random brightness, contrast, saturation and hue for each of (B, 3, H, W), 0..1."""
    drawn = []
    for rng in rngs:
        numbers = []
        for limit in (strength.brightness, strength.contrast, strength.saturation):
            numbers.append(rng.uniform(1 - limit, 1 + limit))
        if strength.hue:
            numbers.append(rng.uniform(-strength.hue, strength.hue))
        else:
            numbers.append(0.0)
        drawn.append(numbers)
    drawn = torch.tensor(drawn, dtype=torch.float32, device=pictures.device)
    drawn = drawn[:, :, None, None, None]  # (B, 4, 1, 1, 1)
    brightness, contrast, saturation, turn = drawn.unbind(1)

    pictures = pictures * brightness
    mean = pictures.mean((1, 2, 3), keepdim=True)
    pictures = mean + contrast * (pictures - mean)
    grey = pictures.mean(1, keepdim=True)
    colour = pictures - grey
    if strength.hue:  # turn the colours about the axis of greys
        angle = 2 * math.pi * turn
        across = colour.roll(1, 1) - colour.roll(-1, 1)
        colour = angle.cos() * colour + angle.sin() / math.sqrt(3) * across
    return (grey + saturation * colour).clamp(0, 1)
