"""Recordings: frames go to disk as they come, become an episode file, and survive a crash.

    log = Recording(Path("runs/demo/robot/now/log.hdf5"), attributes, cameras)
    log.add(images, painted, qpos=qpos, qvel=qvel, time=now)   # returns at once
    log.event("the first target was confirmed")
    log.finish(success=True)                                   # writes log.hdf5

While it runs, everything is in <name>.recording/: about.json, events.jsonl and frames.bin.
"""

import fcntl
import json
import queue
import shutil
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

from genima.documents import explain
from genima.episodes import Episode, read_episode, write_episode
from genima.files import UserError, write_whole
from genima.plots import PANEL, painted_panel, write_film
from genima.robots import robot_chain
from robot.arm import CONTROL_HZ, Fault

FILES = ("about.json", "events.jsonl", "frames.bin")  # of a recording that is not finished
BACKLOG = 10  # seconds that the disk may be behind the cameras


class StoredFrames:
    """The images of one field, (T, H, W, 3) uint8, in a file: five minutes exceed the memory.

    The file is mapped again for every frame, so that the frames read before leave the memory.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, path: Path, record: np.dtype, count: int, name: str):
        self.path = path
        self.record = record
        self.name = name
        self.shape = (count, *record[name].shape)

    def __getitem__(self, t):
        rows = np.memmap(self.path, self.record, "r", shape=self.shape[:1])
        return np.array(rows[self.name][t])


class Recording:
    """One episode that is being recorded. A thread writes, since the disk may be slow."""

    def __init__(self, path: Path, attributes: dict, cameras: dict):
        """attributes: the episode's; cameras: as in a calibration file."""
        self.path = Path(path)
        self.folder = self.path.with_suffix(".recording")
        if self.path.exists() or self.folder.exists():
            raise UserError(f"{self.path} exists already: record to another --run or --task.")
        self.folder.mkdir(parents=True)
        self.header, self.events, self.frames = (
            open(self.folder / name, "ab", buffering=0) for name in FILES
        )
        # The lock is held while this program lives: a recording without one was left behind.
        fcntl.flock(self.frames, fcntl.LOCK_EX)
        self.about = {"about": attributes, "cameras": cameras}
        self.count = 0
        self.error = None
        self.queue = queue.Queue()
        self.writer = threading.Thread(target=self._write, daemon=True)
        self.writer.start()

    def _write(self):
        while True:
            item = self.queue.get()
            if item is None:
                return
            file, data = item
            try:
                while data and not self.error:
                    written = file.write(data)
                    data = data[written:]
            except OSError as error:
                self.error = OSError(error.errno, error.strerror, str(self.folder))

    def add(self, images: dict, painted: dict | None = None, **values):
        """Add one frame, always of the same fields.

        Raises the OSError of an earlier frame that could not be written.
        """
        if self.error:
            raise self.error
        if self.queue.qsize() > BACKLOG * CONTROL_HZ:
            raise Fault(
                f"The disk of {self.folder} is {BACKLOG} seconds behind the cameras: "
                "record fewer or smaller pictures (--size)."
            )
        arrays = {name: np.asarray(value) for name, value in values.items()}
        for camera, image in images.items():
            arrays[f"images/{camera}"] = np.asarray(image)
        if painted:
            for camera, image in painted.items():
                arrays[f"painted/{camera}"] = np.asarray(image)
        formats = [f"{array.shape}{array.dtype.str}" for array in arrays.values()]
        fields = {"names": list(arrays), "formats": formats}
        if self.count == 0:
            header = json.dumps(self.about | {"fields": fields}, default=np.ndarray.tolist)
            self.queue.put((self.header, header.encode()))
        row = np.array(tuple(arrays.values()), fields)
        self.queue.put((self.frames, row.tobytes()))
        self.count += 1

    def event(self, text: str):
        line = json.dumps({"time": time.monotonic(), "event": text})
        self.queue.put((self.events, line.encode() + b"\n"))

    def finish(self, success: bool) -> Path | None:
        """Write the episode file, remove the folder. Returns the path; None without a frame."""
        self.queue.put(None)
        self.writer.join()
        self.frames.close()
        if self.error:
            raise self.error
        return make_episode(self.folder, success)


# ---------------------------------------------------------------------------------- episode files
def make_episode(folder: Path, success: bool) -> Path | None:
    """Make the episode file of a recording's folder, and remove the folder.

    A last frame that was cut off is left out. Returns None when there is no frame.
    """
    path = folder.with_suffix(".hdf5")
    about, events, frames = (folder / name for name in FILES)
    # A program may be killed before the first frame, or after writing the episode file.
    if frames.stat().st_size and not path.exists():
        saved = json.loads(about.read_text())
        record = np.dtype(saved["fields"])
        count = frames.stat().st_size // record.itemsize
        if count:
            rows = np.memmap(frames, record, "r", shape=(count,))
            fields = {}
            for name in record.names:
                if "/" in name:
                    fields[name] = StoredFrames(frames, record, count, name)
                else:
                    fields[name] = np.array(rows[name])
            write_episode(path, as_episode(saved, fields, events.read_bytes(), success))
    shutil.rmtree(folder)
    if path.exists():
        return path
    return None


def as_episode(saved: dict, fields: dict, events: bytes, success: bool) -> Episode:
    """The Episode of a recording's header, fields {name: (T, ...)} and events."""
    cameras = {}
    for camera, entry in saved["cameras"].items():
        cameras[camera] = {key: np.array(value) for key, value in entry.items()}
    qpos = fields.pop("qpos")
    qvel = fields.pop("qvel")
    qvel[:, -1] = 0  # the hand does not report its velocity
    if len(qpos) > 1:
        qvel[:, -1] = np.gradient(qpos[:, -1]) * CONTROL_HZ
    images = {camera: fields.pop(f"images/{camera}") for camera in cameras}
    action = fields.pop("action", None)
    if action is None:
        action = commands_from_motion(qpos)
    chain = robot_chain(saved["about"]["robot"], cameras=cameras)
    joint_poses = chain.forward_kinematics(qpos[:, :-1])
    extras = {name.replace("/", "_"): data for name, data in fields.items()}
    extras["events"] = np.array(events or b" ")
    return Episode(
        path=None,
        **saved["about"],
        success=success,
        fps=float(CONTROL_HZ),
        qpos=qpos,
        qvel=qvel,
        action=action,
        joint_poses=joint_poses,
        images=images,
        intrinsics={camera: entry["intrinsics"] for camera, entry in cameras.items()},
        extrinsics={camera: np.array(chain.camera_pose(camera, joint_poses)) for camera in cameras},
        extras=extras,
    )


def commands_from_motion(qpos: np.ndarray) -> np.ndarray:
    """The commands that make an arm move as it did: (T, D+1) -> (T, D+1).

    A command is where the arm is a step later. A gripper that opens was told to open.
    """
    action = np.concatenate([qpos[1:], qpos[-1:]])
    change = np.diff(qpos[:, -1], append=qpos[-1, -1])
    opened = qpos[0, -1] > 0.5
    for t in range(len(qpos)):
        if abs(change[t]) > 0.02:
            opened = change[t] > 0
        action[t, -1] = opened
    return action


def recover(run: Path):
    """Turn what a killed program left behind into episode files, marked as not successful."""
    for frames in sorted(Path(run).glob("*/*/*.recording/frames.bin")):
        with open(frames, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # being recorded right now
            with explain(frames.parent, "move this folder away and run the same command again"):
                path = make_episode(frames.parent, success=False)
        if path:
            print(f"A recording that was cut off is now in {path}, marked as not successful.")


# ------------------------------------------------------------------------------------- afterwards
def write_timing(path: Path, lateness: list[float]):
    """Plot how far from their time the commands were sent, and print how many within 5 ms."""
    from matplotlib.figure import Figure

    milliseconds = 1000 * np.array(lateness)
    punctual = np.mean(np.abs(milliseconds) <= 5)
    title = f"{punctual:.1%} of {len(lateness)} commands were within 5 ms of their time"
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(len(lateness)) / CONTROL_HZ, milliseconds, ".", markersize=3)
    axes.set(xlabel="time, s", ylabel="late by, ms", title=title)
    with write_whole(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    print(f"{title} (99 % within {np.percentile(milliseconds, 99):.1f} ms).")


def replay(settings):
    """Film a run: observation, painted target and motion side by side. Print its events."""
    path = settings.log
    if path.is_dir():
        path = path / "log.hdf5"
    episode = read_episode(path)
    painted = {}
    for name, data in episode.extras.items():
        if name.startswith("painted_"):
            painted[name.removeprefix("painted_")] = data
    if not painted:
        raise UserError(
            f"{path} has no painted targets: it is a demonstration, not the log of a run."
        )
    outcome = {"success": episode.success, "instruction": episode.instruction}
    write_film(path.parent, "film", [(outcome, film_frames(episode, painted))], "painted target")
    print(f"The film is {path.parent / 'film.mp4'}.")
    for line in bytes(episode.extras["events"]).decode().splitlines():
        event = json.loads(line)
        print(f"{event['time'] - episode.extras['time'][0]:8.2f} s  {event['event']}")
    if settings.keep:
        add_to_demonstrations(path.resolve(), episode)


def film_frames(episode: Episode, painted: dict) -> list[np.ndarray]:
    """A film's frames (PANEL, 3 PANEL, 3): what the painter saw, what it painted, the motion."""
    camera = next(iter(painted))
    if "front" in painted:
        camera = "front"
    frames = []
    observed = 0
    for t in range(len(episode.qpos)):
        views = {name: images[t] for name, images in painted.items()}
        changed = t > 0 and any(
            (painted[name][t - 1] != view).any() for name, view in views.items()
        )
        if changed:
            observed = t - 1  # the target was painted from this picture, or one just before
        panels = [enlarge(episode.images[camera][observed]), painted_panel(views)]
        panels.append(enlarge(episode.images[camera][t]))
        frames.append(np.concatenate(panels, axis=1))
    return frames


def enlarge(image: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) as a panel of the film."""
    return np.array(Image.fromarray(image).resize((PANEL, PANEL), Image.BICUBIC))


def add_to_demonstrations(path: Path, episode: Episode):
    """Copy the log of a successful run to <run>/episodes/<task>/."""
    if not episode.success:
        raise UserError(
            f"{path} was not successful: a policy learns from successes, so it was not added."
        )
    run = path.parent.parent.parent
    target = run / "episodes" / episode.task / f"real_{path.parent.name}.hdf5"
    if target.exists():
        raise UserError(f"{target} exists already: this run was added before.")
    with write_whole(target) as temporary:
        shutil.copyfile(path, temporary)
    print(f"Added as {target}.")
