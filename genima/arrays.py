"""Arrays of a file: whether they are there, and of the shape, type and kind that is needed.

array = read_dataset(root, "observations/qpos")               from an open HDF5 file
check_array(array, (None, 8), np.float32, "file: qpos")       UserError that names the file
"""

from collections.abc import Sequence

import h5py
import numpy as np

from genima.files import UserError

MAX_ARRAY = 1_000_000_000  # bytes of an array that is read at once; an hour of poses has 20 million
MAX_DENSITY = 2_000  # bytes for one in the file; gzip makes at most 1,032 of one


def check_array(array, shape: Sequence, dtype, where: str):
    """Raise a UserError that begins with `where` unless the array is of this shape and kind.

    shape: None stands for any length. Numbers must be finite. An array of shape (..., 4, 4) must
    hold poses, one of shape (3, 3) a camera's intrinsics.
    """
    fault = find_fault(array, shape, dtype)
    if fault is not None:
        raise UserError(f"{where} {fault}.")


def find_fault(array, shape: Sequence, dtype) -> str | None:
    """What is wrong with an array, as the end of a sentence, or None."""
    if not has_shape(array, shape):
        wanted = ", ".join(str(length) for length in shape).replace("None", "any")
        return f"has shape {array.shape} where ({wanted}) is needed"
    kind = np.uint8 if dtype == np.uint8 else np.floating
    if not np.issubdtype(array.dtype, kind):
        return f"holds {array.dtype} where {np.dtype(dtype)} is needed"
    if dtype == np.uint8:
        return None
    if not np.isfinite(array).all():
        return "holds NaN or infinite numbers"
    if tuple(shape[-2:]) == (4, 4) and not are_poses(array):
        return "holds a matrix that is not a rotation and a translation"
    if tuple(shape) == (3, 3) and not are_intrinsics(array):
        return "is not [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] with positive focal lengths in pixels"
    return None


def has_shape(array, shape: Sequence) -> bool:
    """Whether an array has this shape and is not empty; None stands for any length."""
    if len(array.shape) != len(shape):
        return False
    for length, wanted in zip(array.shape, shape):
        if length == 0:
            return False
        if wanted is not None and length != wanted:
            return False
    return True


def are_poses(matrices: np.ndarray) -> bool:
    """Whether matrices (..., 4, 4) are rotations and translations."""
    rotations = np.asarray(matrices, np.float64)[..., :3, :3]
    product = rotations @ np.swapaxes(rotations, -1, -2)
    orthonormal = np.abs(product - np.eye(3)).max() < 1e-3
    mirrored = np.linalg.det(rotations).min() <= 0
    last_row = np.abs(matrices[..., 3, :] - [0, 0, 0, 1]).max() <= 1e-6
    return bool(orthonormal and not mirrored and last_row)


def are_intrinsics(matrix: np.ndarray) -> bool:
    """Whether a matrix (3, 3) is that of a pinhole camera without skew."""
    fx, fy, cx, cy = matrix[[0, 1, 0, 1], [0, 1, 2, 2]]
    pinhole = [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]
    return bool(fx > 0 and fy > 0 and np.allclose(matrix, pinhole, atol=1e-6))


# ---------------------------------------------------------------------------------------- HDF5
def check_stored(data: h5py.Dataset):
    """Raise a ValueError unless the numbers of an array are in its file.

    HDF5 gives zeros for what was never written, or lies in another file that is gone.
    """
    if not isinstance(data, h5py.Dataset):
        raise ValueError(f"{data.name} is no array")
    if data.is_virtual or data.external:
        raise ValueError(f"{data.name} refers to another file, and holds nothing itself")
    stored = data.id.get_storage_size()
    if data.nbytes > MAX_DENSITY * stored:
        raise ValueError(
            f"{data.name} has shape {data.shape}, but only {stored} bytes of it were written"
        )


def read_dataset(root: h5py.Group, name: str):
    """The array of this name. Raises ValueError for one that is not there, or too large."""
    data = root[name]
    check_stored(data)
    if data.nbytes > MAX_ARRAY:
        raise ValueError(f"{data.name} has shape {data.shape}: it is too large")
    return data[()]


def check_pictures(data: h5py.Dataset, frames: int, channels: int):
    """Raise a ValueError unless a dataset has so many frames (T, h, w, channels) of uint8."""
    check_stored(data)
    is_right = data.ndim == 4 and data.dtype == np.uint8 and data.size > 0
    if not is_right or data.shape[0] != frames or data.shape[3] != channels:
        raise ValueError(
            f"{data.name} has shape {data.shape} of {data.dtype}, "
            f"not ({frames}, height, width, {channels}) of uint8"
        )
