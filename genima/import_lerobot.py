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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genima.documents import explain, read_json
from genima.files import UserError, shorten
from genima.labels import check_order, flag, read_instruction, text
from genima.lerobot_images import ImageRows, VideoFrames
from genima.mapped_numbers import (
    check_action,
    gripper_of,
    read_numbers,
    seconds_of,
    take_columns,
    tool_poses_of,
)
from genima.mapping import SECONDS, Mapping, split_columns
from genima.recordings import Recording

AGAIN = "copy the dataset again"
# Lines of a mapping that mean nothing here, and what to do instead.
NOT_READ = {
    "demonstrations": "",
    "joint_names": "",  # those in meta/info.json are
    "rate": " and give --source-fps",
    "image_timestamps": "",
    "color": "",
    "compressed_color": "",
    "intrinsics": " and give --calibration",
    "extrinsics": " and give --calibration",
}


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


def column(
    table: pa.Table, name: str | None, where: str, needed: bool = False
) -> np.ndarray | None:
    """The numbers (T, ...) of a mapped column, or None."""
    if name is None:
        return None
    key, columns = split_columns(name)
    if key not in table.column_names:
        if needed:
            raise UserError(f"{where} has no '{key}': name another column with --mapping.")
        return None
    values = read_numbers(table[key].to_pylist(), f"{where}: {key}")
    return take_columns(values, name, columns, where)


def words(table: pa.Table, info: dict, name: str | None):
    """What a line of the mapping names: a column, or with @ a line of meta/info.json; or None."""
    if not name:
        return None
    if name.startswith("@"):
        return info.get(name[1:])
    return table[name].to_pylist() if name in table.column_names else None


def find_cameras(features: dict, pattern: str) -> dict[str, str]:
    """{camera: its feature} for a name with {camera} in it, such as observation.images.{camera}."""
    before, braces, after = pattern.partition("{camera}")
    found = {}
    for key, feature in features.items():
        if feature["dtype"] not in ("video", "image"):
            continue
        if not braces and key == pattern:
            found[key.rpartition(".")[2]] = key
        inside = key.startswith(before) and key.endswith(after)
        if braces and inside and len(key) > len(before) + len(after):
            found[key[len(before) : len(key) - len(after)]] = key
    return found


def check_mapping(mapping: Mapping):
    """Raise a UserError for a line that means nothing in a dataset of LeRobot."""
    for key, instead in NOT_READ.items():
        if getattr(mapping, key) != getattr(Mapping, key):
            raise UserError(
                f"{mapping.source}: '{key}' is not read from a dataset of LeRobot: leave the line "
                f"out{instead}."
            )


def read_lerobot(
    folder: Path, row: dict, mapping: Mapping, source_fps: float | None = None
) -> Recording:
    """The recording of one episode, a row of read_episode_rows.

    source_fps: its rate, instead of its timestamps.
    """
    check_mapping(mapping)
    info = read_info(folder)
    with explain(f"{folder}: episode {row['episode_index']}", AGAIN):
        return read_row(Path(folder), info, row, mapping, source_fps)


def read_row(
    folder: Path, info: dict, row: dict, mapping: Mapping, source_fps: float | None
) -> Recording:
    number = row["episode_index"]
    where = f"{folder}: episode {number}"
    place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
    path = folder / info["data_path"].format(**place)
    table = read_table(path, filters=[("episode_index", "=", number)]).sort_by("frame_index")
    frames = len(table)
    if frames == 0:
        raise UserError(f"{where} has no frames in {path}: nothing of it can be imported.")
    joints = column(table, mapping.joints, where, needed=True)
    if joints.ndim != 2:
        raise UserError(
            f"{where}: {mapping.joints} has shape {joints.shape}, not (frames, joints): name "
            "another column in the mapping."
        )
    feature = info["features"].get(split_columns(mapping.joints)[0], {})
    check_order(feature.get("names") or [], mapping.joints, joints.shape[1], where)
    gripper = column(table, mapping.gripper, where, needed=True)
    notes = []
    if gripper is None:
        gripper = np.ones(frames)
        notes.append("no gripper was recorded: it counts as open.")
    action = column(table, mapping.action, where)
    if action is not None:
        check_action(action, joints, f"{where}: {mapping.action}")
    if mapping.joint_unit == "degrees":
        joints = np.radians(joints)
        action = None if action is None else np.radians(action)
    command = column(table, mapping.gripper_command, where)
    if command is not None:
        command = gripper_of(command, f"{where}: {mapping.gripper_command}")
    tool_poses = column(table, mapping.tool_pose, where)
    if tool_poses is not None:
        tool_poses = tool_poses_of(tool_poses, f"{where}: {mapping.tool_pose}")

    images = {}
    for camera, key in find_cameras(info["features"], mapping.images).items():
        if info["features"][key]["dtype"] == "video":
            place = {
                "video_key": key,
                "chunk_index": row[f"videos/{key}/chunk_index"],
                "file_index": row[f"videos/{key}/file_index"],
            }
            video = folder / info["video_path"].format(**place)
            start = row[f"videos/{key}/from_timestamp"]
            images[camera] = VideoFrames(video, start, info["fps"], frames)
        else:
            images[camera] = ImageRows(table[key].to_pylist(), f"{path}: {key}")
    if not images:
        raise UserError(f"{where} has no pictures at {mapping.images}: give a --mapping.")

    if source_fps is None:
        name = mapping.timestamps or "timestamp"
        seconds = column(table, name, where, needed=True)
        seconds = seconds_of(seconds, SECONDS[mapping.timestamp_unit], f"{where}: {name}")
    else:
        seconds = np.arange(frames) / source_fps
    success = flag(words(table, info, mapping.success), f"{where}: {mapping.success}")
    if success is None:
        notes.append("no label of success: it counts as successful.")
    span = mapping.gripper_range
    robot = mapping.robot or ""
    if robot.startswith("@"):
        robot = text(words(table, info, robot))
    return Recording(
        source=where,
        seconds=seconds,
        joints=joints,
        gripper=gripper_of(gripper, f"{where}: {mapping.gripper}"),
        gripper_range=None if span is None else (float(span[0]), float(span[1])),
        action=action,
        gripper_command=command,
        images=images,
        timed=source_fps is None,
        tool_poses=tool_poses,
        instruction=instruction_of(table, info, row, mapping, where, notes),
        success=success,
        sim=bool(flag(words(table, info, mapping.sim), f"{where}: {mapping.sim}")),
        robot=robot,
        notes=notes,
    )


def instruction_of(
    table: pa.Table, info: dict, row: dict, mapping: Mapping, where: str, notes: list[str]
) -> str:
    """The episode's task, or what the mapping names. Raises UserError where it changes."""
    if mapping.instruction == "":
        return ""
    if mapping.instruction is not None:
        sentences = words(table, info, mapping.instruction)
        return read_instruction(sentences, f"{where}: {mapping.instruction}", len(table), notes)
    tasks = list(dict.fromkeys(str(task) for task in row["tasks"]))
    if len(tasks) > 1:
        raise UserError(
            f"{where} has the tasks '{shorten(tasks[0])}' and '{shorten(tasks[1])}': cut it into "
            "one episode for each, or give --instruction for all of it."
        )
    return read_instruction(tasks, f"{where}: tasks", len(table), notes)
