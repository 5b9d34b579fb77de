"""Between the views of several cameras and the one picture that a painter sees.

Pictures are float tensors, 0..1, channels first.
"""

import math

import torch
import torch.nn.functional as F

from genima.files import UserError


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
    if H == height:
        return pictures
    size = (height, W * height // H)
    return F.interpolate(pictures, size, mode="bilinear", antialias=True).clamp(0, 1)


def composite(layer: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """Layer (B, 4, H, W) over picture (B, 3, H, W), both 0..1."""
    colour = layer[:, :3]
    alpha = layer[:, 3:]
    return alpha * colour + (1 - alpha) * picture


def view_size(sizes: dict[str, tuple], where: str) -> int:
    """{camera: (height, width)} -> the one height and width of all views.

    Raises UserError, which begins with `where`, for views that are not square or differ in size.
    """
    different = set(sizes.values())
    height, width = next(iter(different))
    if len(different) > 1 or height != width:
        listed = ", ".join(f"{camera} {h}x{w}" for camera, (h, w) in sizes.items())
        raise UserError(f"{where} must be square and of one size, not {listed}: record them so.")
    return height
