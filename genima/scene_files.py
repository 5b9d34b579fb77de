"""The random scenes that the base learns from, SHARD to a file (pretrain_painter.py).

<out>/scenes/<first>.hdf5    attrs format, first, cameras
  /images                    (N, V, H, W, 3) uint8
  /layers                    (N, S, V, H, W, 4) uint8 RGBA, what each sentence asks to paint
  /sentences                 (N, S) text
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from genima.arrays import check_stored
from genima.files import UserError, read_hdf5

FORMAT = "nanogenima-scenes-1"
SHARD = 500  # scenes a file: a killed run loses at most that many
KINDS = ("A", "B", "C", "C")  # of the sentences for each scene: a quarter, a quarter, a half


def find_shards(folder: Path, first_scene: int, scenes: int) -> dict[Path, int]:
    """The scenes' files, with the number of the first scene in each."""
    starts = range(first_scene, first_scene + scenes, SHARD)
    return {folder / f"{start:07d}.hdf5": start for start in starts}


def check_shards(paths: Sequence[Path], cameras: int, size: int):
    """Raise a UserError for a file of scenes that is missing, broken, or of other pictures."""
    views = (cameras, size, size)
    wanted = {
        "images": (SHARD, *views, 3),
        "layers": (SHARD, len(KINDS), *views, 4),
        "sentences": (SHARD, len(KINDS)),
    }
    for path in paths:
        with read_hdf5(path, FORMAT) as root:
            for name, shape in wanted.items():
                data = root[name]
                check_stored(data)
                pictures = name == "sentences" or data.dtype == np.uint8
                if name == "images" and data.ndim == 5 and data.shape[2] != size:
                    there = data.shape[2]
                    raise UserError(
                        f"{path} has views of {there} pixels: give --image-size {there}, or "
                        "another --out."
                    )
                if data.shape != shape or not pictures:
                    raise UserError(
                        f"{path}: {name} has shape {data.shape} of {data.dtype}, not {shape}: use "
                        "another --out, or move this file away and run the same command again."
                    )
