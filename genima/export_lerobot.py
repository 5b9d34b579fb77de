"""Episodes -> a LeRobot dataset, version 3.0: see genima/import_lerobot.py for its layout.

LeRobot's own loader reads it, so that its policies train on the same demonstrations. Every episode
gets a table and videos of its own, which the format allows and which need no editing of videos.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from genima.episodes import Episode, check_alike, read_episode
from genima.files import UserError, write_whole
from genima.kinematics import Chain
from genima.lerobot_statistics import image_statistics, merge_statistics, statistics_of

VERSION = "v3.0"
CHUNK = 1000  # files in a folder
FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA_PATH = f"data/{FILE}.parquet"
VIDEO_PATH = f"videos/{{video_key}}/{FILE}.mp4"
EPISODES_PATH = f"meta/episodes/{FILE}.parquet"
IMAGES = "observation.images."
COUNTERS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
SAMPLES = 50  # pictures of an episode that count for the statistics
SAME_PLACE = 1e-3  # metres and radians by which a camera's pose may differ between episodes
SAME_LENS = 0.1  # pixels by which its intrinsics may
QUALITY = "18"  # of H.264: little can be seen of the compression


def export_dataset(paths: Sequence[Path], folder: Path, failed: bool = False) -> dict[str, int]:
    """Write episodes as a LeRobot dataset to a new folder. failed: also those without success.

    Returns {"episodes", "frames", "left_out"}. Raises UserError.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: give another folder.")
    chosen = [path for path in paths if failed or read_episode(path, images=False).success]
    if not chosen:
        raise UserError("There is no successful episode to export: give --failed to export all.")
    first = read_episode(chosen[0], images=False)
    if first.fps != round(first.fps):
        raise UserError(
            f"{first.path} has {first.fps:g} frames a second, and LeRobot needs a whole number: "
            "import again with another --fps."
        )
    cameras = cameras_of(first)
    tasks: list[str] = []
    rows = []
    frames = 0
    for number, path in enumerate(tqdm(chosen, desc="exporting", unit="episode")):
        episode = read_episode(path)
        check_alike(episode, first)
        if (episode.fps, episode.robot) != (first.fps, first.robot):
            raise UserError(
                f"{path} is of a {episode.robot} at {episode.fps:g} Hz, {first.path} of a "
                f"{first.robot} at {first.fps:g} Hz: export them to folders of their own."
            )
        check_cameras(cameras_of(episode), cameras, path, first.path)
        if episode.instruction not in tasks:
            tasks.append(episode.instruction)
        task = tasks.index(episode.instruction)
        rows.append(write_frames(folder, episode, number, frames, task))
        frames += len(episode.qpos)
    write_meta(folder, first, rows, tasks, frames, cameras)
    return {"episodes": len(rows), "frames": frames, "left_out": len(paths) - len(chosen)}


def write_frames(folder: Path, episode: Episode, number: int, before: int, task: int) -> dict:
    """Write an episode's table and videos, files of their own. Returns its row in meta/episodes."""
    count = len(episode.qpos)
    numbers = episode.qpos.shape[1]
    vector = pa.list_(pa.float32(), numbers)
    success = np.zeros(count, bool)
    success[-1] = episode.success
    seconds = (np.arange(count) / round(episode.fps)).astype(np.float32)
    columns = {
        "observation.state": pa.array(list(episode.qpos), vector),
        "action": pa.array(list(episode.action), vector),
        "next.success": pa.array(success),
        "timestamp": pa.array(seconds),
        "frame_index": pa.array(np.arange(count)),
        "episode_index": pa.array(np.full(count, number)),
        "index": pa.array(before + np.arange(count)),
        "task_index": pa.array(np.full(count, task)),
    }
    place = {"chunk_index": number // CHUNK, "file_index": number % CHUNK}
    with write_whole(folder / DATA_PATH.format(**place)) as temporary:
        pq.write_table(pa.table(columns), temporary)
    row = {
        "episode_index": number,
        "tasks": [episode.instruction],
        "length": count,
        "data/chunk_index": place["chunk_index"],
        "data/file_index": place["file_index"],
        "dataset_from_index": before,
        "dataset_to_index": before + count,
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
    }
    statistics = {
        "observation.state": statistics_of(episode.qpos),
        "action": statistics_of(episode.action),
        "next.success": statistics_of(success[:, None]),
    }
    for name in COUNTERS:
        statistics[name] = statistics_of(columns[name].to_numpy()[:, None])
    for camera, pictures in episode.images.items():
        key = IMAGES + camera
        path = folder / VIDEO_PATH.format(video_key=key, **place)
        write_video(path, pictures, round(episode.fps))
        row[f"videos/{key}/chunk_index"] = place["chunk_index"]
        row[f"videos/{key}/file_index"] = place["file_index"]
        row[f"videos/{key}/from_timestamp"] = 0.0
        row[f"videos/{key}/to_timestamp"] = count / round(episode.fps)
        some = pictures[:: max(1, count // SAMPLES)]
        statistics[key] = image_statistics(some)
    for key, values in statistics.items():
        for name, value in values.items():
            row[f"stats/{key}/{name}"] = value
    return row


def write_video(path: Path, pictures: np.ndarray, fps: int):
    """Pictures (T, H, W, 3) uint8 as H.264. Every second frame stands alone, for fast access."""
    height, width = pictures.shape[1:3]
    with write_whole(path) as temporary, av.open(str(temporary), "w") as container:
        options = {"crf": QUALITY, "g": "2", "bf": "0"}
        stream = container.add_stream("h264", rate=fps, options=options)
        stream.height = height
        stream.width = width
        stream.pix_fmt = pixel_format(height, width)
        for t, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = t
            frame.time_base = Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def pixel_format(height: int, width: int) -> str:
    """The usual format shares colours among four pixels, which needs even sizes."""
    return "yuv444p" if height % 2 or width % 2 else "yuv420p"


# ----------------------------------------------------------------------------------- meta
def features_of(episode: Episode) -> dict[str, dict]:
    """The features of a dataset: the type, the shape and the names of every column."""
    joints = [f"joint_{i + 1}.pos" for i in range(episode.qpos.shape[1] - 1)]
    vector = {"dtype": "float32", "shape": [len(joints) + 1], "names": [*joints, "gripper.pos"]}
    features = {"observation.state": vector, "action": vector}
    fps = round(episode.fps)
    for camera, (height, width) in episode.image_sizes.items():
        features[IMAGES + camera] = {
            "dtype": "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": height,
                "video.width": width,
                "video.codec": "h264",
                "video.pix_fmt": pixel_format(height, width),
                "video.is_depth_map": False,
                "video.fps": fps,
                "video.channels": 3,
                "has_audio": False,
            },
        }
    features["next.success"] = {"dtype": "bool", "shape": [1], "names": None}
    for name in COUNTERS:
        dtype = "float32" if name == "timestamp" else "int64"
        features[name] = {"dtype": dtype, "shape": [1], "names": None}
    return features


def write_meta(
    folder: Path,
    first: Episode,
    rows: list[dict],
    tasks: list[str],
    frames: int,
    cameras: dict,
):
    """Write meta/: the dataset is whole once info.json is there."""
    path = folder / EPISODES_PATH.format(chunk_index=0, file_index=0)
    with write_whole(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)
    with write_whole(folder / "meta" / "tasks.parquet") as temporary:
        pq.write_table(task_table(tasks), temporary)

    features = features_of(first)
    statistics = {}
    for key in features:
        parts = []
        for row in rows:
            prefix = f"stats/{key}/"
            stored = {name: row[name] for name in row if name.startswith(prefix)}
            parts.append({name.removeprefix(prefix): value for name, value in stored.items()})
        statistics[key] = merge_statistics(parts)
    info = {
        "codebase_version": VERSION,
        "robot_type": first.robot,
        "total_episodes": len(rows),
        "total_frames": frames,
        "total_tasks": len(tasks),
        "chunks_size": CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": round(first.fps),
        "splits": {"train": f"0:{len(rows)}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "features": features,
    }
    files = {"stats.json": statistics, "cameras.json": cameras, "info.json": info}
    for name, content in files.items():
        with write_whole(folder / "meta" / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1))


def task_table(tasks: list[str]) -> pa.Table:
    """The instructions as pandas stores a table with an index of text, which LeRobot expects."""
    table = pa.table({"task_index": pa.array(range(len(tasks))), "task": pa.array(tasks)})
    number = {"name": "task_index", "field_name": "task_index", "metadata": None}
    name = {"name": "task", "field_name": "task", "metadata": None}
    about = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            number | {"pandas_type": "int64", "numpy_type": "int64"},
            name | {"pandas_type": "unicode", "numpy_type": "object"},
        ],
        "pandas_version": "2.0.0",
    }
    return table.replace_schema_metadata({"pandas": json.dumps(about)})


def cameras_of(episode: Episode) -> dict[str, dict[str, list]]:
    """Where an episode's cameras are, in our calibration file's layout."""
    chain = Chain.from_episode(episode)
    cameras = {}
    for camera, intrinsics in episode.intrinsics.items():
        height, width = episode.image_sizes[camera]
        cameras[camera] = {"size": [height, width], "intrinsics": intrinsics.tolist()}
        if camera in chain.mounted:
            cameras[camera]["last_joint_from_camera"] = chain.mounted[camera].tolist()
        else:
            cameras[camera]["world_from_camera"] = chain.fixed[camera].tolist()
    return cameras


def check_cameras(cameras: dict, first: dict, path: Path, first_path: Path):
    """Raise a UserError where a camera stood elsewhere: a dataset has one place for each."""
    for camera, ours in cameras.items():
        theirs = first[camera]
        alike = ours.keys() == theirs.keys()
        for name in ours:
            tolerance = SAME_LENS if name == "intrinsics" else SAME_PLACE
            alike = alike and np.allclose(ours[name], theirs[name], rtol=0, atol=tolerance)
        if not alike:
            raise UserError(
                f"{path}: camera {camera} is not where or what it is in {first_path}, and a "
                "dataset has one place for each camera: export them to folders of their own."
            )
