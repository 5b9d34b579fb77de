"""Episodes -> a folder that ACT's own loader reads: episode_0.hdf5, episode_1.hdf5, ...

Our files hold ACT's fields already, but its loader numbers the files and stacks them, so it needs
one folder, equal lengths and pictures of one size. Shorter episodes are padded at their end: the
arm stands still, and is told to. ACT's `sim` says how action and picture are aligned; ours is the
command after the picture, as in ACT's simulator, so it is always true here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from genima.episodes import check_alike, read_episode
from genima.files import UserError, write_hdf5


def pad(array: np.ndarray, length: int) -> np.ndarray:
    """An array (T, ...) with its last row repeated until it has this length."""
    missing = np.repeat(array[-1:], length - len(array), axis=0)
    return np.concatenate([array, missing])


def export_act(paths: Sequence[Path], folder: Path, failed: bool = False) -> dict[str, int]:
    """Write episodes for ACT to a new folder. failed: also those without success.

    Returns {"episodes", "frames" of each, "left_out"}. Raises UserError.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: give another folder.")
    chosen = []
    length = 0
    first = None
    for path in paths:
        episode = read_episode(path, images=False)
        if not episode.success and not failed:
            continue
        first = first or episode
        check_alike(episode, first)
        length = max(length, len(episode.qpos))
        chosen.append(path)
    if first is None:
        raise UserError("There is no successful episode to export: give --failed to export all.")
    sizes = set(first.image_sizes.values())
    if len(sizes) > 1:
        raise UserError(
            f"{first.path} has cameras of different sizes {first.image_sizes}, which ACT cannot "
            "stack: import again with --cameras, of one size."
        )
    for number, path in enumerate(tqdm(chosen, desc="exporting", unit="episode")):
        episode = read_episode(path)
        with write_hdf5(folder / f"episode_{number}.hdf5") as root:
            root.attrs["sim"] = True
            root["observations/qpos"] = pad(episode.qpos, length)
            root["observations/qvel"] = pad(episode.qvel, length)
            root["action"] = pad(episode.action, length)
            for camera, pictures in episode.images.items():
                root.create_dataset(
                    f"observations/images/{camera}",
                    data=pad(pictures, length),
                    chunks=(1, *pictures.shape[1:]),
                )
    return {"episodes": len(chosen), "frames": length, "left_out": len(paths) - len(chosen)}
