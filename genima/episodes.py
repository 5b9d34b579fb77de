"""The episode file: one demonstration, one HDF5 file. The one module that every stage imports.

    python episodes.py --check runs/demo/episodes

prints a table of the demonstrations in a folder, and one sentence for every file that is broken.

The layout is that of ACT's and ALOHA's datasets, so that their loaders read these files:

    attrs                              format, task, variation, instruction, instructions, success, fps, robot, sim, seed
    /observations/images/<camera>      (T, H, W, 3) uint8, one chunk per frame
    /observations/qpos                 (T, D+1)      D joint positions (rad), gripper opening 0..1
    /observations/qvel                 (T, D+1)
    /observations/joint_poses          (T, J, 4, 4)  world from joint, J = D+1: the last is the gripper's tool centre
    /action                            (T, D+1)      what was commanded after observation t: joint positions, gripper 0 or 1
    /cameras/<camera>/intrinsics       (3, 3)        pixels
    /cameras/<camera>/extrinsics       (T, 4, 4)     world from camera, OpenCV axes: x right, y down, z forward
    /extras/...                                      in the log of a run (real_robot.py): painted targets, timings, events

The world is the robot's base, in metres, z up. A joint's z axis is the axis it turns about, and its frame turns with it.
"""

import math
import zlib
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from genima.files import UserError, read_hdf5, write_hdf5

FORMAT = "nanogenima-episode-1"
CAMERAS = (
    "wrist",
    "front",
    "right_shoulder",
    "left_shoulder",
)  # tile order, row by row (paper, section 3.1)


def stored(dataset, *shape, dtype=np.float32):
    """A part of an episode that is an array: its dataset in the file ({}: one for each camera), its shape (None: any) and type."""
    return field(metadata={"dataset": dataset, "shape": shape, "dtype": dtype})


@dataclass
class Episode:
    """One demonstration in memory, and what of it lies where in the file: T frames, N = D+1 numbers (D joints, the gripper)."""

    path: Path
    task: str
    variation: int
    instruction: str
    instructions: list
    success: bool
    fps: float
    robot: str
    sim: bool
    seed: int
    qpos: np.ndarray = stored("observations/qpos", "T", "N")
    qvel: np.ndarray = stored("observations/qvel", "T", "N")
    action: np.ndarray = stored("action", "T", "N")
    joint_poses: np.ndarray = stored("observations/joint_poses", "T", "N", 4, 4)
    images: dict = stored(
        "observations/images/{}", "T", None, None, 3, dtype=np.uint8
    )  # {camera: array}; empty when read without
    intrinsics: dict = stored("cameras/{}/intrinsics", 3, 3, dtype=np.float64)
    extrinsics: dict = stored("cameras/{}/extrinsics", "T", 4, 4, dtype=np.float64)
    image_sizes: dict = field(
        default_factory=dict
    )  # {camera: (H, W)}; there even when read without images
    extras: dict = field(
        default_factory=dict
    )  # what else a log holds, by the name of its dataset below /extras; read with the images


ATTRIBUTES = {
    part.name: part.type for part in fields(Episode) if part.type in (str, int, float, bool, list)
}
DATASETS = {part.name: part.metadata for part in fields(Episode) if part.metadata}


def check_array(array, shape, dtype, where):
    """Raise a UserError unless the array has this shape (None: any length), numbers of this kind, and no NaN among them.

    Of shape (..., 4, 4) it must be poses, of shape (3, 3) a camera's intrinsics.
    """
    wrong = None
    if len(array.shape) != len(shape) or any(
        n not in (None, m) or m == 0 for n, m in zip(shape, array.shape)
    ):
        wrong = f"has shape {array.shape} where ({', '.join('any' if n is None else str(n) for n in shape)}) is needed"
    elif not np.issubdtype(array.dtype, np.uint8 if dtype == np.uint8 else np.floating):
        wrong = f"holds {array.dtype} where {np.dtype(dtype)} is needed"
    elif dtype != np.uint8 and not np.isfinite(array).all():
        wrong = "holds NaN or infinite numbers"
    elif shape[-2:] == (4, 4):
        rotation = np.asarray(array, np.float64)[..., :3, :3]
        unit = (
            np.abs(rotation @ np.swapaxes(rotation, -1, -2) - np.eye(3)).max() < 1e-3
            and np.linalg.det(rotation).min() > 0
        )
        if not unit or np.abs(array[..., 3, :] - [0, 0, 0, 1]).max() > 1e-6:
            wrong = "holds a matrix that is not a rotation and a translation"
    elif shape == (3, 3):
        fx, fy, cx, cy = array[[0, 1, 0, 1], [0, 1, 2, 2]]
        if min(fx, fy) <= 0 or not np.allclose(
            array, [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], atol=1e-6
        ):
            wrong = (
                "is not [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] with positive focal lengths in pixels"
            )
    if wrong:
        raise UserError(f"{where} {wrong}: make it again.")


def arrays_of(episode):
    """Each array of an episode: (its dataset in the file, the array, the shape that it must have, the type that it is stored in)."""
    lengths = dict(zip("TN", episode.qpos.shape))
    for name, part in DATASETS.items():
        arrays, shape = getattr(episode, name), tuple(lengths.get(n, n) for n in part["shape"])
        for camera, array in arrays.items() if isinstance(arrays, dict) else [("", arrays)]:
            yield part["dataset"].format(camera), array, shape, part["dtype"]


def check_episode(episode):
    """Raise a UserError that names file and dataset unless the episode is whole. Fills in image_sizes."""
    for dataset, array, shape, dtype in arrays_of(episode):
        check_array(array, shape, dtype, f"{episode.path}: {dataset}")
    if episode.action[:, -1].min() < 0 or episode.action[:, -1].max() > 1:
        raise UserError(
            f"{episode.path}: action has a gripper command outside 0 (closed) to 1 (open) in its last column."
        )
    if (
        not episode.images.keys() == episode.intrinsics.keys() == episode.extrinsics.keys()
        or not episode.images
    ):
        raise UserError(
            f"{episode.path}: observations/images and cameras must name the same cameras, at least one."
        )
    episode.image_sizes = {camera: images.shape[1:3] for camera, images in episode.images.items()}


def write_episode(path, episode):
    """Write a whole episode to a new file."""
    episode.path = path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists already: delete it, or write to another folder.")
    check_episode(episode)
    arrays = [(dataset, array, dtype) for dataset, array, _, dtype in arrays_of(episode)]
    arrays += [(f"extras/{name}", array, array.dtype) for name, array in episode.extras.items()]
    with write_hdf5(path, sum(math.prod(array.shape) for _, array, _ in arrays)) as root:
        root.attrs.update(
            {name: kind(getattr(episode, name)) for name, kind in ATTRIBUTES.items()}, format=FORMAT
        )
        for dataset, array, dtype in arrays:
            if dtype != np.uint8 or array.ndim != 4:
                root[dataset] = np.asarray(array, dtype)
                continue
            # Compressing takes twice as long as decoding a PNG: not worth it for noisy pictures, which hardly shrink.
            shrinks = len(zlib.compress(array[0].tobytes(), 1)) < array[0].size / 2
            pictures = root.create_dataset(
                dataset,
                array.shape,
                np.uint8,
                chunks=(1, *array.shape[1:]),
                compression=1 if shrinks else None,
                fletcher32=not shrinks,
            )  # a checksum either way; fmt: skip
            for t in range(array.shape[0]):  # one by one: they may not fit into memory
                pictures[t] = array[t]


def read_episode(path, images=True):
    """Read and check an episode; without its images this takes a few milliseconds."""
    path = Path(path)
    with read_hdf5(path, FORMAT) as root:
        parts = {name: kind(root.attrs[name]) for name, kind in ATTRIBUTES.items()}
        for name, part in DATASETS.items():
            group, each, _ = part["dataset"].partition("/{}")
            found = {
                camera: root[part["dataset"].format(camera)]
                for camera in (root[group] if each else [""])
            }
            if name != "images":  # of those, shape and type are enough for now
                found = {camera: data[()] for camera, data in found.items()}
            parts[name] = found if each else found[""]
        episode = Episode(path=path, **parts)
        check_episode(episode)
        episode.extras = (
            {name: data[()] for name, data in root.get("extras", {}).items()} if images else {}
        )
        episode.images = (
            {camera: data[()] for camera, data in episode.images.items()} if images else {}
        )
    return episode


def find_episodes(folder, tasks=None):
    """The sorted paths <folder>/<task>/<name>.hdf5, of these tasks or of all."""
    paths = sorted(
        Path(folder).glob("*/[!.]*.hdf5")
    )  # what begins with a dot was left half-written by a killed process
    found = {path.parent.name for path in paths}
    for task in (found or ["<task>"]) if tasks is None else tasks:
        if task not in found:
            raise UserError(
                f"There is no HDF5 file in {folder}/{task}: run the stage that makes it first."
            )
    return [path for path in paths if tasks is None or path.parent.name in tasks]


def check_alike(episode, first):
    """Raise a UserError unless two episodes can be trained on together: same joints, same cameras, same image sizes."""
    ours, theirs = (
        f"{one.qpos.shape[1] - 1} joints and images of {one.image_sizes}"
        for one in (episode, first)
    )
    if ours != theirs:
        raise UserError(
            f"{episode.path} has {ours}, where {first.path} has {theirs}: put them into folders of their own."
        )
