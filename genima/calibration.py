"""Calibration files: where the cameras are."""

from pathlib import Path

import numpy as np
import yaml

from genima.episodes import check_array
from genima.files import UserError


def load_calibration(path):
    """Read the cameras measured anew: {camera: {"intrinsics": (3, 3), and one pose (4, 4) by its name}}."""
    try:
        cameras = yaml.safe_load(Path(path).read_text())  # YAML reads JSON too
        cameras = {
            camera: {key: np.array(value, float) for key, value in entries.items()}
            for camera, entries in cameras.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} is no file of cameras ({' '.join(str(error).split())}): see --calibration in --help."
        ) from error
    for camera, entries in cameras.items():
        if (
            set(entries) - {"intrinsics"} not in ({"world_from_camera"}, {"last_joint_from_camera"})
            or "intrinsics" not in entries
        ):
            raise UserError(
                f"{path}: {camera} needs intrinsics, and either world_from_camera or last_joint_from_camera."
            )
        for key, value in entries.items():
            check_array(
                value,
                (3, 3) if key == "intrinsics" else (4, 4),
                np.float64,
                f"{path}: {camera}/{key}",
            )
    return cameras
