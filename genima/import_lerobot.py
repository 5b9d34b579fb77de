"""LeRobot datasets, version 3.0 -> recordings, without LeRobot itself.

meta/info.json                              rate, robot, features, where the files are
meta/tasks.parquet                          the instructions
meta/episodes/chunk-000/file-000.parquet    an episode a row: its frames, its place in the videos
meta/stats.json                             mean, spread and range of every feature
meta/cameras.json                           ours: where the cameras are, as for --calibration
data/chunk-000/file-000.parquet             a frame a row: observation.state, action, timestamp
videos/<camera>/chunk-000/file-000.mp4      the pictures

"""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genima.documents import explain, read_json
from genima.files import UserError
from genima.mapping import Mapping, split_columns
from genima.recordings import Recording, decode_picture

AGAIN = "copy the dataset again"


def is_lerobot(folder: Path) -> bool:
    return (Path(folder) / "meta" / "info.json").exists()


def read_info(folder: Path) -> dict:
    """meta/info.json of a dataset. Raises UserError for another version than 3."""
    path = Path(folder) / "meta" / "info.json"
    info = read_json(path)
    with explain(path, AGAIN):
        version = str(info["codebase_version"])
        for feature in info["features"].values():
            feature["dtype"]  # every feature has one
        is_rate = 0 < info["fps"] < 1e6
        if not is_rate:
            raise ValueError(f"fps is {info['fps']}")
    if not version.startswith("v3."):
        raise UserError(
            f"{path}: version {version}, where v3.0 is read: convert it with LeRobot "
            "(python -m lerobot.datasets.v30.convert_dataset_v21_to_v30)."
        )
    return info


def read_table(path: Path, **options) -> pa.Table:
    """A parquet file. What is wrong with it becomes a UserError that names it."""
    try:
        return pq.read_table(path, **options)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read ({reason}): copy the dataset again.") from error


def read_episode_rows(folder: Path) -> list[dict]:
    """What the dataset says of each episode, in order."""
    rows = []
    for path in sorted((Path(folder) / "meta" / "episodes").glob("*/*.parquet")):
        table = read_table(path)
        wanted = [name for name in table.column_names if not name.startswith("stats/")]
        rows += table.select(wanted).to_pylist()
    if not rows:
        raise UserError(f"{folder}/meta/episodes has no episodes: copy the dataset again.")
    with explain(f"{folder}/meta/episodes", AGAIN):
        return sorted(rows, key=lambda row: int(row["episode_index"]))


class VideoFrames:
    """An episode's pictures in a video: [t] -> (H, W, 3) uint8 RGB, fastest in rising order."""

    def __init__(self, path: Path, start: float, fps: float, length: int):
        self.path = path
        self.start = start  # seconds into the video
        self.fps = fps
        self.length = length
        self.number = -1
        self.picture = None
        self.frames = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, t: int) -> np.ndarray:
        try:
            if self.frames is None or t < self.number:
                self.frames = self.decode()
                self.number = -1
            while self.number < t:
                self.number, frame = next(self.frames)
                if self.number >= t:
                    self.picture = frame.to_ndarray(format="rgb24")
        except Exception as error:  # FFmpeg fails in many ways, and so do tables with wrong numbers
            raise UserError(
                f"{self.path} ends or breaks before frame {t} of the episode: copy it again."
            ) from error
        return self.picture

    def decode(self):
        """Yield (number in the episode, frame), beginning at or shortly before its first one."""
        with av.open(str(self.path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            container.seek(int(self.start / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                yield round((frame.time - self.start) * self.fps), frame


class ImageRows:
    """Pictures that stand as files in a table's rows: [t] -> (H, W, 3) uint8 RGB."""

    def __init__(self, rows: list[dict], where: str):
        self.rows = rows
        self.where = where

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, t: int) -> np.ndarray:
        picture = decode_picture(self.rows[t]["bytes"], swap=True)
        if picture is None:
            raise UserError(f"{self.where}: frame {t} is no picture: {AGAIN}.")
        return picture


def column(table: pa.Table, name: str | None, where: str, needed: bool = False):
    """The numbers (T, ...) of a mapped column, or None."""
    if name is None:
        return None
    key, columns = split_columns(name)
    if key not in table.column_names:
        if needed:
            raise UserError(f"{where} has no '{key}': name another column with --mapping.")
        return None
    values = np.array(table[key].to_pylist(), np.float64)
    return values if columns is None else values[:, columns]


def read_lerobot(folder: Path, row: dict, mapping: Mapping) -> Recording:
    """The recording of one episode, a row of read_episode_rows."""
    info = read_info(folder)
    with explain(f"{folder}: episode {row['episode_index']}", AGAIN):
        return read_row(Path(folder), info, row, mapping)


def read_row(folder: Path, info: dict, row: dict, mapping: Mapping) -> Recording:
    number = row["episode_index"]
    where = f"{folder}: episode {number}"
    place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
    path = folder / info["data_path"].format(**place)
    table = read_table(path, filters=[("episode_index", "=", number)]).sort_by("frame_index")
    joints = column(table, mapping.joints, where, needed=True)
    gripper = column(table, mapping.gripper, where, needed=True)
    if mapping.joint_unit == "degrees":
        joints = np.radians(joints)
    action = column(table, mapping.action, where)
    if action is not None and mapping.joint_unit == "degrees":
        action = np.radians(action)

    images = {}
    before = mapping.images.partition("{camera}")[0]
    for key, feature in info["features"].items():
        if not key.startswith(before):
            continue
        camera = key.removeprefix(before)
        if feature["dtype"] == "video":
            place = {
                "video_key": key,
                "chunk_index": row[f"videos/{key}/chunk_index"],
                "file_index": row[f"videos/{key}/file_index"],
            }
            video = folder / info["video_path"].format(**place)
            start = row[f"videos/{key}/from_timestamp"]
            images[camera] = VideoFrames(video, start, info["fps"], len(joints))
        elif feature["dtype"] == "image":
            images[camera] = ImageRows(table[key].to_pylist(), f"{path}: {key}")
    if not images:
        raise UserError(f"{where} has no pictures at {mapping.images}: give a --mapping.")

    success = column(table, mapping.success, where)
    span = mapping.gripper_range
    robot = mapping.robot or ""
    if robot.startswith("@"):
        robot = str(info.get(robot[1:]) or "")
    return Recording(
        source=where,
        seconds=np.array(table["timestamp"].to_pylist(), np.float64).reshape(-1),
        joints=joints,
        gripper=gripper,
        gripper_range=None if span is None else (float(span[0]), float(span[1])),
        action=action,
        gripper_command=column(table, mapping.gripper_command, where),
        images=images,
        instruction=str(row["tasks"][0]),
        success=None if success is None else bool(success.any()),
        robot=robot,
        notes=["no label of success: it counts as successful."] if success is None else [],
    )
