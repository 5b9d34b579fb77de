"""The episode file: one demonstration, one HDF5 file. Every stage reads or writes it.

The layout is that of ACT's and ALOHA's datasets, so that their loaders read these files:

    attrs                              format, task, variation, instruction, instructions,
                                       success, fps, robot, sim, seed
    /observations/images/<camera>      (T, H, W, 3) uint8, one chunk per frame
    /observations/qpos                 (T, D+1) joint positions (rad), gripper opening 0..1
    /observations/qvel                 (T, D+1) their rates
    /observations/joint_poses          (T, D+1, 4, 4) world from joint; the last is the tool centre
    /action                            (T, D+1) commanded after observation t: joint positions
                                       (rad), gripper 0 (closed) or 1 (open)
    /cameras/<camera>/intrinsics       (3, 3) pixels
    /cameras/<camera>/extrinsics       (T, 4, 4) world from camera
    /extras/...                        in the log of a run (real_robot.py): painted targets,
                                       timings, events; from import_demos.py, where the source has
                                       them: timestamps (T,) seconds when the joints were read,
                                       timestamps_<camera> (T,), tool_pose (T, 4, 4) as recorded

T frames, D joints. The world is the robot's base, in metres, z up. A joint's z axis is the axis it
turns about, and its frame turns with it. Cameras have OpenCV's axes: x right, y down, z forward.
D, the cameras, their names and image sizes come from the data, never from a constant.
"""

import math
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from genima.arrays import check_array, check_stored, read_dataset
from genima.files import UserError, read_hdf5, shorten, write_hdf5

FORMAT = "nanogenima-episode-1"
# The paper's four cameras (section 3.1), in the order in which they are tiled, row by row.
CAMERAS = ("wrist", "front", "right_shoulder", "left_shoulder")


@dataclass
class Episode:
    """One demonstration in memory; shapes and units as in the file (see above)."""

    path: Path | None
    task: str
    variation: int  # which object the instruction names
    instruction: str
    instructions: list[str]  # ways to say it, `instruction` among them
    success: bool
    fps: float
    robot: str
    sim: bool
    seed: int
    qpos: np.ndarray
    qvel: np.ndarray
    action: np.ndarray
    joint_poses: np.ndarray
    images: dict[str, np.ndarray]  # by camera; empty when read without images
    intrinsics: dict[str, np.ndarray]
    extrinsics: dict[str, np.ndarray]
    image_sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # {camera: (H, W)}
    extras: dict[str, np.ndarray] = field(default_factory=dict)  # by dataset below /extras


ATTRIBUTES = {
    "task": str,
    "variation": int,
    "instruction": str,
    "instructions": list,
    "success": bool,
    "fps": float,
    "robot": str,
    "sim": bool,
    "seed": int,
}
# Dataset ({}: one for each camera), shape (T frames, N = D+1; None: any length) and type in the
# file of each array of an Episode.
ARRAYS = {
    "qpos": ("observations/qpos", ("T", "N"), np.float32),
    "qvel": ("observations/qvel", ("T", "N"), np.float32),
    "action": ("action", ("T", "N"), np.float32),
    "joint_poses": ("observations/joint_poses", ("T", "N", 4, 4), np.float32),
    "images": ("observations/images/{}", ("T", None, None, 3), np.uint8),
    "intrinsics": ("cameras/{}/intrinsics", (3, 3), np.float64),
    "extrinsics": ("cameras/{}/extrinsics", ("T", 4, 4), np.float64),
}


# ----------------------------------------------------------------------------------------- checking
def arrays_of(episode: Episode) -> Iterator[tuple]:
    """Each array of an episode: (its dataset in the file, the array, its shape, its type)."""
    frames, numbers = episode.qpos.shape
    lengths = {"T": frames, "N": numbers}
    for name, (dataset, letters, dtype) in ARRAYS.items():
        shape = tuple(lengths.get(letter, letter) for letter in letters)
        value = getattr(episode, name)
        if not isinstance(value, dict):
            yield dataset, value, shape, dtype
            continue
        for camera, array in value.items():
            yield dataset.format(camera), array, shape, dtype


def check_episode(episode: Episode):
    """Raise a UserError that names file and dataset unless the episode is whole.

    Fills in image_sizes.
    """
    check_array(episode.qpos, (None, None), np.float32, f"{episode.path}: observations/qpos")
    for dataset, array, shape, dtype in arrays_of(episode):
        check_array(array, shape, dtype, f"{episode.path}: {dataset}")
    gripper = episode.action[:, -1]
    if gripper.min() < 0 or gripper.max() > 1:
        raise UserError(
            f"{episode.path}: action has a gripper command outside 0 (closed) to 1 (open) "
            "in its last column."
        )
    cameras = episode.images.keys()
    same = cameras == episode.intrinsics.keys() == episode.extrinsics.keys()
    if not cameras or not same:
        raise UserError(
            f"{episode.path}: observations/images and cameras must name the same cameras, "
            "at least one."
        )
    episode.image_sizes = {camera: images.shape[1:3] for camera, images in episode.images.items()}


def check_alike(episode: Episode, first: Episode):
    """Raise a UserError unless two episodes have the same robot, rate, cameras and image sizes."""
    ours = layout_of(episode)
    theirs = layout_of(first)
    if ours != theirs:
        raise UserError(
            f"{episode.path} has {ours}, where {first.path} has {theirs}: "
            "put them into folders of their own."
        )


def layout_of(episode: Episode) -> str:
    joints = episode.qpos.shape[1] - 1
    robot = f"{joints} joints of {episode.robot} at {episode.fps:g} frames a second"
    return f"{robot} and images of {episode.image_sizes}"


# ------------------------------------------------------------------------------------------ writing
def write_episode(path: Path, episode: Episode):
    """Write an episode to a new file. Raises UserError for a broken episode or an existing file."""
    path = Path(path)
    episode.path = path
    if path.exists():
        raise UserError(f"{path} exists already: write to another folder.")
    check_episode(episode)
    arrays = [(dataset, array, dtype) for dataset, array, _, dtype in arrays_of(episode)]
    for name, array in episode.extras.items():
        arrays.append((f"extras/{name}", array, array.dtype))
    size = sum(math.prod(array.shape) for _, array, _ in arrays)
    with write_hdf5(path, size) as root:
        for name, kind in ATTRIBUTES.items():
            root.attrs[name] = kind(getattr(episode, name))
        root.attrs["format"] = FORMAT
        for dataset, array, dtype in arrays:
            if dtype != np.uint8 or array.ndim != 4:
                root[dataset] = np.asarray(array, dtype)
                continue
            write_images(root, dataset, array)


def write_images(root: h5py.File, dataset: str, images: np.ndarray):
    """Write images (T, H, W, 3), one chunk per frame, each with a checksum.

    They are read one by one, because they may not fit into memory; while one is written, a second
    thread decodes the next. Noisy images, as real cameras make them, hardly shrink: zlib stores
    those as they are, and only adds its checksum.
    """
    first = images[0]
    sample = first[:: max(1, len(first) // 64)].tobytes()  # some 64 rows of it
    shrinks = len(zlib.compress(sample, 1)) < len(sample) / 2
    chunks = root.create_dataset(
        dataset, images.shape, np.uint8, chunks=(1, *images.shape[1:]), compression=1
    )
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(images.__getitem__, 0)
        for t in range(images.shape[0]):
            image = np.ascontiguousarray(following.result())
            if t + 1 < images.shape[0]:
                following = reader.submit(images.__getitem__, t + 1)
            check_array(image, images.shape[1:], np.uint8, f"{dataset}: frame {t}")
            # As HDF5 would write it, which copies an image several times.
            chunks.id.write_direct_chunk((t, 0, 0, 0), zlib.compress(image, int(shrinks)))


# ------------------------------------------------------------------------------------------ reading
def read_episode(path: Path, images: bool = True) -> Episode:
    """Read and check an episode. Without its images and extras this takes a few milliseconds.

    Raises UserError for a file that is missing, damaged, of another format, or not whole.
    """
    path = Path(path)
    with read_hdf5(path, FORMAT) as root:
        parts = {name: read_attribute(root, name) for name in ATTRIBUTES}
        for name, (dataset, _, _) in ARRAYS.items():
            parts[name] = read_arrays(root, dataset, load=name != "images")
        episode = Episode(path=path, **parts)
        check_episode(episode)  # of the images, shape and type
        if images:
            episode.images = {camera: data[()] for camera, data in episode.images.items()}
            episode.extras = {name: data[()] for name, data in root.get("extras", {}).items()}
        else:
            episode.images = {}
    return episode


def read_attribute(root: h5py.File, name: str):
    """An attribute as its type. Raises ValueError for one that cannot be."""
    value = root.attrs[name]
    kind = ATTRIBUTES[name]
    try:
        value = kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"attribute '{name}' is {shorten(repr(value))}") from error
    is_rate = name != "fps" or 0 < value < math.inf
    if not is_rate or value == []:
        raise ValueError(f"attribute '{name}' is {shorten(repr(value))}")
    return value


def order_cameras(cameras) -> list[str]:
    """The paper's four in the order of their tiles, then others as in the file."""
    names = list(cameras)  # HDF5 says that a broken link is not in it
    known = [camera for camera in CAMERAS if camera in names]
    others = [camera for camera in names if camera not in CAMERAS]
    return known + others


def read_arrays(root: h5py.File, dataset: str, load: bool):
    """An array, or {camera: array} where the dataset's name has a {}; not loaded: h5py's object."""
    if "{}" not in dataset:
        return read_dataset(root, dataset)
    group = dataset.split("/{}")[0]
    arrays = {}
    for camera in root[group]:
        name = dataset.format(camera)
        if load:
            arrays[camera] = read_dataset(root, name)
        else:
            arrays[camera] = root[name]
            check_stored(root[name])
    return arrays


def find_episodes(folder: Path, tasks: Sequence[str] | None = None) -> list[Path]:
    """The sorted paths <folder>/<task>/<name>.hdf5, of these tasks or of all.

    Raises UserError where a task has none. (A name that begins with a dot was left half-written by
    a process that was killed.)
    """
    folder = Path(folder)
    if folder.exists():
        os.listdir(folder)  # raises OSError where glob would find nothing: no permission, no folder
    paths = sorted(folder.glob("*/[!.]*.hdf5"))
    found = {path.parent.name for path in paths}
    if tasks is None:
        wanted = found or {"<task>"}
    else:
        wanted = tasks
    for task in wanted:
        if task not in found:
            raise UserError(
                f"There is no HDF5 file in {folder}/{task}: run the stage that makes it first."
            )
    return [path for path in paths if path.parent.name in wanted]
