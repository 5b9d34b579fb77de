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

import errno
import math
import os
import shutil
import signal
import sys
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import h5py
import numpy as np
import tyro
from tqdm import tqdm

FORMAT = "nanogenima-episode-1"
LARGE = 200_000_000  # bytes of pictures in an episode that is not put together in memory
CAMERAS = ("wrist", "front", "right_shoulder", "left_shoulder")  # tile order, row by row (paper, section 3.1)
JOINT_LIMITS = {  # lower and upper, radians, from the data sheets; looked up by the word that occurs in the episode's `robot`
    "panda": ((-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973),
              (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973)),
    "fr3": ((-2.7437, -1.7837, -2.9007, -3.0421, -2.8065, 0.5445, -3.0159),  # the Franka Research 3
            (2.7437, 1.7837, 2.9007, -0.1518, 2.8065, 4.5169, 3.0159)),
}  # fmt: skip


class UserError(Exception):
    """One sentence for the person at the keyboard: what is wrong, in which file, and what to do about it."""


def run_stage(main):
    """Run a stage's main() and end the process: errors that a person can mend are one sentence, without a traceback."""
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"The disk is full ({error}): make room and run the same command again; finished files are kept.", file=sys.stderr)
        sys.exit(2)


@contextmanager
def write_whole(path):
    """Yield a temporary path beside `path`, which becomes `path` when the block succeeds: a crash leaves all of a file or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")  # some writers go by the suffix
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a failed write does not know it
        raise


def keep_last(folder, names, step, keep):
    """Copy the files and folders `names` of a finished checkpoint to <folder>/step-<step>/, and remove all but the last `keep`."""
    if not keep:
        return
    target, new = folder / f"step-{step}", folder / f".step-{step}"
    for old in (new, target):
        shutil.rmtree(old, ignore_errors=True)
    new.mkdir()
    for name in names:
        (shutil.copytree if (folder / name).is_dir() else shutil.copy)(folder / name, new / name)
    new.rename(target)
    for old in sorted(folder.glob("step-*"), key=lambda path: int(path.name[5:]))[:-keep]:
        shutil.rmtree(old)


def read_checkpoint(path, identity):
    """The checkpoint at `path`, which must come from the same settings and data; None where there is none."""
    import torch  # takes seconds; the other stages need none

    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        before = checkpoint["identity"]
    except Exception as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:100]}): delete it to train anew.") from error
    for name, value in identity.items():
        if before.get(name) != value:
            raise UserError(f"{path} was trained with {name} {before.get(name)}, not {value}: delete {path.parent}, or use another --run.")
    return checkpoint


def ignore_interrupt(_worker):
    """Ctrl-C is the first process's business. (A function of the module: macOS starts workers by name.)"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def write_hdf5(path, size=0):
    """Yield an HDF5 file to fill, which is written to `path` when the block succeeds. size: bytes of pictures, if they are many.

    It grows in memory: HDF5 cannot close a file whose disk is full, a plain write can fail cleanly. A large one grows on the disk,
    which must have room for it.
    """
    with write_whole(path) as temporary:
        if size < LARGE:
            with h5py.File(str(path), "w", driver="core", backing_store=False) as root:
                yield root
                root.flush()
                temporary.write_bytes(root.id.get_file_image())
        else:
            if shutil.disk_usage(temporary.parent).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with h5py.File(temporary, "w") as root:
                yield root


@contextmanager
def read_hdf5(path, file_format):
    """Yield the HDF5 file at `path`; whatever is wrong with it becomes a UserError that names it."""
    try:
        with h5py.File(path, "r") as root:
            if root.attrs.get("format") != file_format:
                raise UserError(f"{path}: attribute 'format' is not '{file_format}': another program or version wrote this file.")
            yield root
    except (UserError, MemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except Exception as error:  # HDF5 reports a damaged file in many ways: OSError, KeyError, RuntimeError, ...
        reason = str(error.args[0] if error.args else error).strip("'\"")
        raise UserError(f"{path} cannot be read ({reason}): delete it and make it again.") from error


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
    images: dict = stored("observations/images/{}", "T", None, None, 3, dtype=np.uint8)  # {camera: array}; empty when read without
    intrinsics: dict = stored("cameras/{}/intrinsics", 3, 3, dtype=np.float64)
    extrinsics: dict = stored("cameras/{}/extrinsics", "T", 4, 4, dtype=np.float64)
    image_sizes: dict = field(default_factory=dict)  # {camera: (H, W)}; there even when read without images
    extras: dict = field(default_factory=dict)  # what else a log holds, by the name of its dataset below /extras; read with the images


ATTRIBUTES = {part.name: part.type for part in fields(Episode) if part.type in (str, int, float, bool, list)}
DATASETS = {part.name: part.metadata for part in fields(Episode) if part.metadata}


def check_array(array, shape, dtype, where):
    """Raise a UserError unless the array has this shape (None: any length), numbers of this kind, and no NaN among them.

    Of shape (..., 4, 4) it must be poses, of shape (3, 3) a camera's intrinsics.
    """
    wrong = None
    if len(array.shape) != len(shape) or any(n not in (None, m) or m == 0 for n, m in zip(shape, array.shape)):
        wrong = f"has shape {array.shape} where ({', '.join('any' if n is None else str(n) for n in shape)}) is needed"
    elif not np.issubdtype(array.dtype, np.uint8 if dtype == np.uint8 else np.floating):
        wrong = f"holds {array.dtype} where {np.dtype(dtype)} is needed"
    elif dtype != np.uint8 and not np.isfinite(array).all():
        wrong = "holds NaN or infinite numbers"
    elif shape[-2:] == (4, 4):
        rotation = np.asarray(array, np.float64)[..., :3, :3]
        unit = np.abs(rotation @ np.swapaxes(rotation, -1, -2) - np.eye(3)).max() < 1e-3 and np.linalg.det(rotation).min() > 0
        if not unit or np.abs(array[..., 3, :] - [0, 0, 0, 1]).max() > 1e-6:
            wrong = "holds a matrix that is not a rotation and a translation"
    elif shape == (3, 3):
        fx, fy, cx, cy = array[[0, 1, 0, 1], [0, 1, 2, 2]]
        if min(fx, fy) <= 0 or not np.allclose(array, [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], atol=1e-6):
            wrong = "is not [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] with positive focal lengths in pixels"
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
        raise UserError(f"{episode.path}: action has a gripper command outside 0 (closed) to 1 (open) in its last column.")
    if not episode.images.keys() == episode.intrinsics.keys() == episode.extrinsics.keys() or not episode.images:
        raise UserError(f"{episode.path}: observations/images and cameras must name the same cameras, at least one.")
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
        root.attrs.update({name: kind(getattr(episode, name)) for name, kind in ATTRIBUTES.items()}, format=FORMAT)
        for dataset, array, dtype in arrays:
            if dtype != np.uint8 or array.ndim != 4:
                root[dataset] = np.asarray(array, dtype)
                continue
            # Compressing takes twice as long as decoding a PNG: not worth it for noisy pictures, which hardly shrink.
            shrinks = len(zlib.compress(array[0].tobytes(), 1)) < array[0].size / 2
            pictures = root.create_dataset(dataset, array.shape, np.uint8, chunks=(1, *array.shape[1:]),
                                           compression=1 if shrinks else None, fletcher32=not shrinks)  # a checksum either way; fmt: skip
            for t in range(array.shape[0]):  # one by one: they may not fit into memory
                pictures[t] = array[t]


def read_episode(path, images=True):
    """Read and check an episode; without its images this takes a few milliseconds."""
    path = Path(path)
    with read_hdf5(path, FORMAT) as root:
        parts = {name: kind(root.attrs[name]) for name, kind in ATTRIBUTES.items()}
        for name, part in DATASETS.items():
            group, each, _ = part["dataset"].partition("/{}")
            found = {camera: root[part["dataset"].format(camera)] for camera in (root[group] if each else [""])}
            if name != "images":  # of those, shape and type are enough for now
                found = {camera: data[()] for camera, data in found.items()}
            parts[name] = found if each else found[""]
        episode = Episode(path=path, **parts)
        check_episode(episode)
        episode.extras = {name: data[()] for name, data in root.get("extras", {}).items()} if images else {}
        episode.images = {camera: data[()] for camera, data in episode.images.items()} if images else {}
    return episode


def find_episodes(folder, tasks=None):
    """The sorted paths <folder>/<task>/<name>.hdf5, of these tasks or of all."""
    paths = sorted(Path(folder).glob("*/[!.]*.hdf5"))  # what begins with a dot was left half-written by a killed process
    found = {path.parent.name for path in paths}
    for task in (found or ["<task>"]) if tasks is None else tasks:
        if task not in found:
            raise UserError(f"There is no HDF5 file in {folder}/{task}: run the stage that makes it first.")
    return [path for path in paths if tasks is None or path.parent.name in tasks]


def check_alike(episode, first):
    """Raise a UserError unless two episodes can be trained on together: same joints, same cameras, same image sizes."""
    ours, theirs = (f"{one.qpos.shape[1] - 1} joints and images of {one.image_sizes}" for one in (episode, first))
    if ours != theirs:
        raise UserError(f"{episode.path} has {ours}, where {first.path} has {theirs}: put them into folders of their own.")


def beyond_limits(episode):
    """In how many frames a joint is, or is sent, beyond its limits; None for a robot whose limits we don't know."""
    for word, (low, high) in JOINT_LIMITS.items():
        if word in episode.robot.lower() and len(low) == episode.qpos.shape[1] - 1:
            joints = np.stack([episode.qpos, episode.action])[:, :, :-1]  # (2, T, D)
            return ((joints < np.subtract(low, 1e-3)) | (joints > np.add(high, 1e-3))).any(axis=(0, 2)).sum()


@dataclass
class Settings:
    check: Path
    """Folder of task folders to check, such as runs/demo/episodes."""


def main():
    settings = tyro.cli(Settings, description=__doc__)
    groups, broken, first = {}, [], None  # task: [(frames, success, largest step, largest jerk, frames beyond the limits)]
    paths = find_episodes(settings.check)
    for path in tqdm(paths, desc="checking", unit="episode", leave=False):
        try:
            episode = read_episode(path)
            first = first or episode
            check_alike(episode, first)
        except UserError as error:
            broken.append(str(error))
            continue
        joints = episode.qpos[:, :-1]
        step = np.abs(np.diff(joints, axis=0)).max(initial=0)
        jerk = np.abs(np.diff(joints, n=3, axis=0)).max(initial=0) * episode.fps**3
        groups.setdefault(path.parent.name, []).append((len(joints), episode.success, step, jerk, beyond_limits(episode)))

    print(f"{'task':28s} episodes  frames success step rad jerk rad/s³ beyond limits")
    for task, rows in groups.items():
        frames, success, step, jerk, beyond = zip(*rows)
        beyond = "unknown" if None in beyond else f"{sum(beyond)} frames"
        print(f"{task:28s} {len(rows):8d} {sum(frames):7d} {sum(success) / len(rows):7.0%} "
              f"{max(step):8.3f} {max(jerk):11.1f} {beyond:>13s}")
    if broken:
        raise UserError("\n".join([*broken, f"{len(broken)} of {len(paths)} files are broken."]))


if __name__ == "__main__":
    run_stage(main)
