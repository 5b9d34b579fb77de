"""Random changes to stage 2's samples: other rooms, views moved, colours of the condition jittered.

All that is random comes from the generators, one for each sample.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from genima.textures import random_texture
from genima.views import grid_of, tile_views, untile_views

OTHER_ROOMS = 0.5  # of the samples, where there is a room to replace
MOVED = 0.08  # of 1: by how much a pixel differs from the room's, where something is before it


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
    room: torch.Tensor | None = None
    """What the cameras see when nothing is before them, tiled (3, H, W); nothing: it stays."""


def replace_room(picture: torch.Tensor, room: torch.Tensor, rng, views: int) -> torch.Tensor:
    """Random textures where the views (C, H, W) show nothing but the room (3, H, W).

    A pixel's neighbours stay with what is before the room, and of a camera on the arm everything,
    for which the room is infinite.
    """
    if rng.random() >= OTHER_ROOMS:
        return picture
    difference = (picture[:3] - room).abs().amax(0)  # (H, W)
    before = F.max_pool2d((difference > MOVED).float()[None, None], 3, 1, 1)[0, 0]
    rows, columns = grid_of(views)
    height, width = picture.shape[1] // rows, picture.shape[2] // columns
    textures = np.stack([random_texture(rng, height, width) for _ in range(views)])
    textures = torch.from_numpy(textures / 255).float().permute(0, 3, 1, 2)  # (V, 3, h, w)
    replaced = torch.where(before > 0, picture[:3], tile_views(textures[None])[0])
    return torch.cat([replaced, picture[3:]])


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
