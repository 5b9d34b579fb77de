"""Pictures in an open HDF5 file of another program, read when they are asked for.

They may be raw or compressed one by one (JPEG, PNG, with zeros after the end, as ACT's).
"""

from __future__ import annotations

import math

import h5py
import numpy as np

from genima.files import UserError
from genima.mapping import Mapping
from genima.recordings import MOST_PIXELS, decode_picture


class StoredImages:
    """One camera's pictures in an open HDF5 file, read when asked for: [t] -> (H, W, 3) RGB."""

    def __init__(self, dataset: h5py.Dataset, mapping: Mapping):
        self.dataset = dataset
        self.where = f"{dataset.file.filename}: {dataset.name}"
        self.raw = dataset.ndim == 4
        self.order = mapping.color if self.raw else mapping.compressed_color
        shape = dataset.shape
        self.channels_first = self.raw and shape[1] == 3 and shape[3] > 4  # as PyTorch has them
        in_colour = self.raw and (self.channels_first or shape[3] in (3, 4))
        if self.raw and not (in_colour and dataset.dtype == np.uint8):
            raise UserError(
                f"{self.where} has shape {dataset.shape} of {dataset.dtype}, "
                "where (frames, height, width, 3) of uint8 is needed: leave it out with --cameras."
            )
        if dataset.ndim not in (1, 2, 4) or (self.raw and is_giant(dataset)):
            raise UserError(
                f"{self.where} has shape {dataset.shape}, which is no pictures of a camera: "
                "leave it out with --cameras."
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, t: int) -> np.ndarray:
        stored = self.dataset[t]
        if self.raw:
            if self.channels_first:
                stored = stored.transpose(1, 2, 0)
            colours = stored[..., :3]  # a fourth channel is transparency
            return np.ascontiguousarray(colours[..., ::-1] if self.order == "bgr" else colours)
        # A JPEG or PNG, perhaps with zeros after its end.
        picture = decode_picture(bytes(stored), swap=self.order == "bgr")
        if picture is None:
            raise UserError(f"{self.where}: frame {t} is no JPEG or PNG picture.")
        return picture


def is_giant(dataset: h5py.Dataset) -> bool:
    """Whether a picture of (T, H, W, 3) is larger than any camera's."""
    return math.prod(dataset.shape[1:]) > 3 * MOST_PIXELS
