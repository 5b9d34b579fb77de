"""Recordings of real_robot.py: frames go to disk as they come, become an episode file, survive a crash, and are played again."""

import fcntl
import json
import queue
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image

from genima.episodes import Episode, read_episode, write_episode
from genima.files import UserError, write_whole
from genima.kinematics import franka_chain
from genima.plots import PANEL, painted_panel, write_film
from robot.arm import HZ, Fault

FILES = ("about.json", "events.jsonl", "frames.bin")  # of a recording that is not finished


class Frames:
    """The pictures of one field, (T, H, W, 3) uint8, mapped anew for every frame: five minutes of them don't fit into memory."""

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, path, record, count, name):
        self.path, self.record, self.name, self.shape = (
            path,
            record,
            name,
            (count, *record[name].shape),
        )

    def __getitem__(self, t):
        return np.array(np.memmap(self.path, self.record, "r", shape=self.shape[:1])[self.name][t])


class Recording:
    """Frames go to disk as they come, into <name>.recording/, and become <name>.hdf5 at the end. After a crash `recover` does that."""

    def __init__(self, path, about, cameras):
        """about: the episode's attributes; cameras: as in a calibration file."""
        self.path, self.folder = Path(path), Path(path).with_suffix(".recording")
        if self.path.exists() or self.folder.exists():
            raise UserError(f"{self.path} exists already: delete it, or write to another folder.")
        self.folder.mkdir(parents=True)
        self.header, self.events, self.frames = (
            open(self.folder / name, "ab", buffering=0) for name in FILES
        )
        fcntl.flock(
            self.frames, fcntl.LOCK_EX
        )  # held while this program lives: what is not held was left behind
        self.about, self.count, self.error, self.queue = (
            {"about": about, "cameras": cameras},
            0,
            None,
            queue.Queue(),
        )
        self.writer = threading.Thread(target=self._write, daemon=True)
        self.writer.start()

    def _write(self):  # the disk may be slow: its own thread
        while (item := self.queue.get()) is not None:
            file, data = item
            try:
                while data and not self.error:
                    data = data[file.write(data) :]
            except OSError as error:
                self.error = OSError(error.errno, error.strerror, str(self.folder))

    def add(self, pictures, painted=None, **values):
        """One frame, always of the same fields. Raises the OSError of an earlier one that could not be written."""
        if self.error:
            raise self.error
        if self.queue.qsize() > 10 * HZ:
            raise Fault(
                f"The disk of {self.folder} is ten seconds behind the cameras: record fewer or smaller pictures (--size)."
            )
        values |= {f"images/{camera}": picture for camera, picture in pictures.items()}
        values |= {f"painted/{camera}": picture for camera, picture in (painted or {}).items()}
        arrays = {name: np.asarray(value) for name, value in values.items()}
        fields = {
            "names": list(arrays),
            "formats": [f"{array.shape}{array.dtype.str}" for array in arrays.values()],
        }
        if not self.count:
            self.queue.put(
                (
                    self.header,
                    json.dumps(self.about | {"fields": fields}, default=np.ndarray.tolist).encode(),
                )
            )
        self.queue.put((self.frames, np.array(tuple(arrays.values()), fields).tobytes()))
        self.count += 1

    def event(self, text):
        self.queue.put(
            (self.events, json.dumps({"time": time.monotonic(), "event": text}).encode() + b"\n")
        )

    def finish(self, success):
        """Write the episode file and remove the scratch folder. Returns the path, or None when there is no frame."""
        self.queue.put(None)
        self.writer.join()
        self.frames.close()
        if self.error:
            raise self.error
        return finish(self.folder, success)


def finish(folder, success):
    """Make the episode file of a recording's folder, and remove the folder. A last frame that was cut off is left out."""
    path, (about, events, frames) = folder.with_suffix(".hdf5"), (folder / name for name in FILES)
    if (
        frames.stat().st_size and not path.exists()
    ):  # killed before the first frame, or between writing the file and removing the folder
        saved = json.loads(about.read_text())
        record = np.dtype(saved["fields"])
        if count := frames.stat().st_size // record.itemsize:
            rows = np.memmap(frames, record, "r", shape=(count,))
            fields = {
                name: Frames(frames, record, count, name) if "/" in name else np.array(rows[name])
                for name in record.names
            }
            write_episode(path, as_episode(saved, fields, events.read_bytes(), success))
    shutil.rmtree(folder)
    return path if path.exists() else None


def as_episode(saved, fields, events, success):
    cameras = {
        camera: {key: np.array(value) for key, value in entry.items()}
        for camera, entry in saved["cameras"].items()
    }
    qpos, qvel, images = (
        fields.pop("qpos"),
        fields.pop("qvel"),
        {camera: fields.pop(f"images/{camera}") for camera in cameras},
    )
    qvel[:, 7] = np.gradient(qpos[:, 7]) * HZ if len(qpos) > 1 else 0  # the hand does not tell
    chain = franka_chain(cameras)
    poses = chain.forward_kinematics(qpos[:, :7])
    return Episode(
        path=None, **saved["about"], success=success, fps=float(HZ), qpos=qpos, qvel=qvel, joint_poses=poses, images=images,
        action=fields.pop("action") if "action" in fields else followed(qpos),
        intrinsics={camera: entry["intrinsics"] for camera, entry in cameras.items()},
        extrinsics={camera: np.array(chain.camera_pose(camera, poses)) for camera in cameras},
        extras={name.replace("/", "_"): data for name, data in fields.items()} | {"events": np.array(events or b" ")},
    )  # fmt: skip


def followed(qpos):
    """What must have been commanded for the arm to be where it was a step later: (T, 8) -> (T, 8). A gripper that opens was told to."""
    action = np.concatenate([qpos[1:], qpos[-1:]])
    command, change = qpos[0, -1] > 0.5, np.diff(qpos[:, -1], append=qpos[-1, -1])
    for t, moved in enumerate(change):
        command = moved > 0 if abs(moved) > 0.02 else command
        action[t, -1] = command
    return action


def recover(run):
    """Turn what a killed program left behind into episode files, marked as not successful."""
    for frames in sorted(Path(run).glob("*/*/*.recording/frames.bin")):
        with open(frames, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # being recorded right now
            if path := finish(frames.parent, False):
                print(f"A recording that was cut off is now in {path}, marked as not successful.")


# -------------------------------------------------------------------------------------------------------------- afterwards
def write_timing(path, lateness):
    """How far from their time the commands were sent, as a picture; says the share that was within 5 ms."""
    from matplotlib.figure import Figure

    milliseconds = 1000 * np.array(lateness)
    words = f"{np.mean(np.abs(milliseconds) <= 5):.1%} of {len(lateness)} commands were within 5 ms of their time"
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(len(lateness)) / HZ, milliseconds, ".", markersize=3)
    axes.set(xlabel="time, s", ylabel="late by, ms", title=words)
    with write_whole(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    print(f"{words} (99 % within {np.percentile(milliseconds, 99):.1f} ms).")


@dataclass
class Replay:
    log: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, or its log.hdf5."""
    keep: bool = False
    """Add the run to the demonstrations, <run>/episodes/<task>, for the next policy."""


def replay(settings):
    """Observation, painted target and motion side by side."""
    path = settings.log / "log.hdf5" if settings.log.is_dir() else settings.log
    episode = read_episode(path)
    painted = {
        name.removeprefix("painted_"): data
        for name, data in episode.extras.items()
        if name.startswith("painted_")
    }
    if not painted:
        raise UserError(
            f"{path} has no painted targets: it is a demonstration, not the log of a run."
        )
    front = "front" if "front" in painted else next(iter(painted))
    frames, seen = [], 0
    for t in range(len(episode.qpos)):
        if t and any((painted[camera][t] != painted[camera][t - 1]).any() for camera in painted):
            seen = t - 1  # the target came from this picture, or one just before
        large = [
            np.array(
                Image.fromarray(episode.images[front][moment]).resize((PANEL, PANEL), Image.BICUBIC)
            )
            for moment in (seen, t)
        ]
        frames.append(
            np.concatenate(
                [large[0], painted_panel({camera: painted[camera][t] for camera in painted}), large[1]],
                axis=1,
            )
        )
    outcome = {"success": episode.success, "instruction": episode.instruction}
    write_film(path.parent, "film", [(outcome, frames)], "painted target")
    print(f"The film is {path.parent / 'film.mp4'}.")
    for line in bytes(episode.extras["events"]).decode().splitlines():
        event = json.loads(line)
        print(f"{event['time'] - episode.extras['time'][0]:8.2f} s  {event['event']}")
    if settings.keep:
        if not episode.success:
            raise UserError(
                f"{path} was not successful: a policy learns from successes, so it was not added."
            )
        target = (
            path.resolve().parent.parent.parent
            / "episodes"
            / episode.task
            / f"real_{path.resolve().parent.name}.hdf5"
        )
        if target.exists():
            raise UserError(f"{target} exists already: this run was added before.")
        with write_whole(target) as temporary:
            shutil.copyfile(path, temporary)
        print(f"Added as {target}.")
