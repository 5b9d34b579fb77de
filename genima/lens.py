"""What a lens does: intrinsics for pictures of another size, and pictures made straight."""

from __future__ import annotations

import cv2
import numpy as np

from genima.calibration_files import Camera
from genima.files import UserError


def fit_size(camera: Camera, name: str, size: tuple[int, int]) -> np.ndarray:
    """Intrinsics (3, 3) for pictures of this size (H, W), which may be smaller but not cut."""
    if camera.size is None:
        check_centre(camera, name, size)
        return camera.intrinsics
    if camera.size == tuple(size):
        return camera.intrinsics
    scale_y = size[0] / camera.size[0]
    scale_x = size[1] / camera.size[1]
    if abs(scale_x / scale_y - 1) > 0.01:
        raise UserError(
            f"{camera.source}: camera '{name}' was calibrated at {camera.size[1]}x{camera.size[0]} "
            f"pixels, but its pictures have {size[1]}x{size[0]}, which is another shape: "
            "calibrate it as it records."
        )
    return np.diag([scale_x, scale_y, 1]) @ camera.intrinsics


def check_centre(camera: Camera, name: str, size: tuple[int, int]):
    """Raise a UserError when the optical axis misses the middle half of pictures of this size."""
    height, width = size
    x = camera.intrinsics[0, 2] / width
    y = camera.intrinsics[1, 2] / height
    if not (0.25 < x < 0.75 and 0.25 < y < 0.75):
        raise UserError(
            f"{camera.source}: camera '{name}' has its image centre at pixel "
            f"({camera.intrinsics[0, 2]:.0f}, {camera.intrinsics[1, 2]:.0f}), far from the middle "
            f"of pictures of {width}x{height}: add size: [height, width] of the calibrated ones."
        )


def undistortion(
    camera: Camera, intrinsics: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray] | None:
    """For every pixel of a picture without distortion, where it lies in the recorded one.

    Returns two maps (H, W) for cv2.remap, or None when the lens bends nothing. The new picture
    has the same intrinsics, so a calibration file stays true of what was made with it.
    """
    if camera.distortion is None:
        return None
    height, width = size
    matrix = intrinsics - [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]  # OpenCV's pixel centres
    if camera.model == "fisheye":
        return cv2.fisheye.initUndistortRectifyMap(
            matrix, camera.distortion, np.eye(3), matrix, (width, height), cv2.CV_32FC1
        )
    if camera.model == "brown":
        return cv2.initUndistortRectifyMap(
            matrix, camera.distortion, None, matrix, (width, height), cv2.CV_32FC1
        )
    # RealSense's inverse model says how to straighten: what others call undistorting, it distorts.
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([x, y], axis=-1).reshape(-1, 1, 2).astype(np.float64)
    maps = cv2.undistortPoints(pixels, matrix, camera.distortion, P=matrix)
    maps = maps.reshape(height, width, 2).astype(np.float32)
    return maps[..., 0], maps[..., 1]


def undistort(picture: np.ndarray, maps) -> np.ndarray:
    """A picture (H, W, 3) uint8 as a lens without distortion would have made it."""
    if maps is None:
        return picture
    return cv2.remap(picture, maps[0], maps[1], cv2.INTER_LINEAR)
