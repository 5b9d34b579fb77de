"""Between the views of several cameras and the one picture that a painter sees.

One to six cameras of any names and sizes. Square views of one size are tiled as they are. All
others are first resized, each to the square cell of the grid: stretched, without a border, so that
a camera's intrinsics scale with its view and no pixel of the cell is lost. What is painted in a
cell is resized back to its view. The controller's views become such cells where they are large or
differ in size (cell_of), so that its network does not grow with them.

Pictures are float tensors, 0..1, channels first.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from genima.files import UserError

# Height of the tiled views where they do not stay as recorded: as many pixels as the four views of
# 64x64 that tiny is made for, of 128x128 for small, and SD-Turbo's resolution.
TILED = {"tiny": 128, "small": 256, "sd-turbo": 512}


def grid_of(count: int) -> tuple[int, int]:
    """Rows and columns that hold `count` views: 1x1, 1x2, 2x2 for three and four, 2x3, ..."""
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    return rows, columns


def tile_views(views: torch.Tensor) -> torch.Tensor:
    """Views (B, V, C, h, w) -> one picture (B, C, rows h, columns w), row by row.

    The paper's four: wrist, front; right shoulder, left shoulder. A cell without a view is black.
    """
    B, V, C, h, w = views.shape
    rows, columns = grid_of(V)
    empty = views.new_zeros(B, rows * columns - V, C, h, w)
    cells = torch.cat([views, empty], dim=1).reshape(B, rows, columns, C, h, w)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(B, C, rows * h, columns * w)


def tile_any(views: list[torch.Tensor], resolution: int) -> torch.Tensor:
    """V views (B, C, h, w) of any sizes -> one picture (B, C, rows h, columns w).

    Views that are not square and of one size become square cells for a picture of height
    `resolution`.
    """
    sizes = {i: tuple(view.shape[2:]) for i, view in enumerate(views)}
    if not is_uniform(sizes):
        rows, _ = grid_of(len(views))
        cell = resolution // rows
        views = [fit(view, cell, cell) for view in views]
    return tile_views(torch.stack(views, dim=1))


def untile_views(tiled: torch.Tensor, count: int) -> torch.Tensor:
    """The inverse of tile_views: (B, C, rows h, columns w) -> the first `count` views."""
    B, C, H, W = tiled.shape
    rows, columns = grid_of(count)
    h = H // rows
    w = W // columns
    cells = tiled.reshape(B, C, rows, h, columns, w).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(B, rows * columns, C, h, w)[:, :count]


def resize(pictures: torch.Tensor, height: int) -> torch.Tensor:
    """(B, C, H, W), 0..1 -> (B, C, height, width), in the same proportions."""
    H, W = pictures.shape[2:]
    return fit(pictures, height, W * height // H)


def fit(pictures: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, C, h, w), 0..1 -> (B, C, height, width), stretched where proportions differ."""
    if pictures.shape[2:] == (height, width):
        return pictures
    size = (height, width)
    return F.interpolate(pictures, size, mode="bilinear", antialias=True).clamp(0, 1)


def composite(layer: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """Layer (B, 4, H, W) over picture (B, 3, H, W), both 0..1."""
    colour = layer[:, :3]
    alpha = layer[:, 3:]
    return alpha * colour + (1 - alpha) * picture


def cell_of(sizes: dict[str, tuple], size: str) -> int | None:
    """Pixels a side to which the controller's views are resized; None: they stay.

    Views of one size stay as they are, up to TILED; all others become square cells of the grid.
    sizes: {camera: (height, width)}; size: of a network, in TILED.
    """
    rows, _ = grid_of(len(sizes))
    different = set(sizes.values())
    if len(different) == 1 and max(different.pop()) <= TILED[size]:
        return None
    return TILED[size] // rows


def is_uniform(sizes: dict[str, tuple]) -> bool:
    """Whether views {camera: (height, width)} are square and of one size."""
    different = set(sizes.values())
    height, width = next(iter(different))
    return len(different) == 1 and height == width


def image_sizes_of(config: dict) -> dict[str, tuple[int, int]]:
    """{camera: (height, width)} of the views that a painter or a controller takes, pixels."""
    size = config["image_size"]
    if np.isscalar(size):
        size = (size, size)
    sizes = config.get("image_sizes")
    if sizes is None:
        sizes = dict.fromkeys(config["cameras"], size)
    return {camera: tuple(sizes[camera]) for camera in config["cameras"]}


def check_views(images: dict, sizes: dict[str, tuple], who: str):
    """Raise a UserError unless {camera: (B, h, w, 3)} holds the views of `sizes`, for `who`."""
    missing = [camera for camera in sizes if camera not in images]
    if missing:
        raise UserError(f"The {who} needs views of {', '.join(missing)}: add these cameras.")
    for camera, size in sizes.items():
        found = tuple(images[camera].shape[1:3])
        if found != tuple(size):
            raise UserError(
                f"The {who} was trained on views of {size[0]}x{size[1]} pixels from '{camera}', "
                f"these have {found[0]}x{found[1]}: render the observations in that size."
            )


def resize_images(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Images (T, h, w, C) uint8 -> (T, height, width, C), in any proportions."""
    if images.shape[1:3] == (height, width):
        return images
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    pictures = 255 * fit(pictures, height, width)
    return pictures.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
