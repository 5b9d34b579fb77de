"""A mapping says which part of another program's file is what, and in which unit.

It is a small YAML file; mappings/act.yaml explains every line. Its values name a dataset,
`observations/qpos`, some of its columns, `observations/qpos[0:7]` or `joints[2,1,0]`, or an
attribute, `@sim`. Where a name has {camera}, it stands for every camera that the file has there.
In a file of many demonstrations a name is looked for in each one's group.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

import h5py
import numpy as np

from genima.arrays import MAX_ARRAY
from genima.documents import read_yaml
from genima.files import UserError
from genima.mapped_numbers import take_columns

FOLDER = Path(__file__).resolve().parent.parent / "mappings"
HELP = "see docs/your-data.md"
SECONDS = {"seconds": 1.0, "milliseconds": 1e-3, "microseconds": 1e-6, "nanoseconds": 1e-9}

CHOICES = {
    "timestamp_unit": tuple(SECONDS),
    "joint_unit": ("radians", "degrees"),
    "color": ("rgb", "bgr"),
    "compressed_color": ("rgb", "bgr"),
}


@dataclass
class Mapping:
    """Which part of a file is what; None: the file has no such part."""

    source: str = ""  # the mapping's own file
    demonstrations: str | None = None  # the groups that are one each, such as data/*
    joints: str | None = None  # (T, D)
    joint_names: str | None = None  # in which order they are
    joint_unit: str = "radians"  # or degrees
    gripper: str | None = None  # (T,)
    gripper_range: list | None = None  # [closed, open] in the file's unit
    action: str | None = None  # (T, D) joint positions
    gripper_command: str | None = None  # (T,)
    gripper_command_range: list | None = None  # [closed, open] where it has another unit
    images: str | None = None  # raw (T, H, W, 3), or a compressed picture a row
    color: str = "rgb"  # order of the channels of raw pictures
    compressed_color: str = "bgr"  # order in which OpenCV decodes the compressed ones
    timestamps: str | None = None  # (T,)
    image_timestamps: str | None = None  # (T',), where the pictures have their own
    timestamp_unit: str = "seconds"
    rate: float | str | None = None  # Hz, or where the file says it; without timestamps
    tool_pose: str | None = None  # (T, 4, 4), or (T, 7): x y z qx qy qz qw
    intrinsics: str | None = None  # (3, 3)
    extrinsics: str | None = None  # (T, 4, 4) world from camera
    instruction: str | None = None  # "": not read, because another is given
    success: str | None = None
    sim: str | None = None
    robot: str | None = None  # panda, fr3, ur5e, or where the file says it

    @property
    def name(self) -> str:
        return Path(self.source).stem


def read_mapping(name: str | Path) -> Mapping:
    """A ready mapping by its name ("act"), or one of your own by its path. Raises UserError."""
    path = FOLDER / f"{name}.yaml"
    if not path.exists():
        path = Path(name)
    if not path.exists():
        ready = ", ".join(sorted(entry.stem for entry in FOLDER.glob("*.yaml")))
        raise UserError(f"There is no mapping '{name}': give one of {ready}, or a file's path.")
    content = read_yaml(path)
    known = [entry.name for entry in fields(Mapping)]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping: {HELP}.")
    for key in content:
        if key not in known:
            raise UserError(f"{path}: '{key}' is not one of {', '.join(known[1:])}.")
    mapping = Mapping(**content | {"source": str(path)})
    for key in ("joints", "images"):
        if getattr(mapping, key) is None:
            raise UserError(f"{path} does not say where '{key}' is: {HELP}.")
    for key, value in content.items():
        check_line(path, key, value)
    return mapping


def ready_mappings() -> list[Mapping]:
    """Those in mappings/."""
    return [read_mapping(entry.stem) for entry in sorted(FOLDER.glob("*.yaml"))]


def check_line(path: Path, key: str, value):
    """Raise a UserError for a line of a mapping whose value cannot be meant."""
    if key in ("gripper_range", "gripper_command_range") and value is not None:
        is_range = isinstance(value, list) and len(value) == 2 and value[0] != value[1]
        if not is_range or not all(isinstance(end, int | float) for end in value):
            raise UserError(f"{path}: {key} has to be [closed, open], not {value!r}.")
    elif key == "rate" and isinstance(value, int | float):
        if not 0 < value < math.inf:
            raise UserError(f"{path}: rate is {value}, not a rate in Hz: {HELP}.")
    elif key in CHOICES:
        if value not in CHOICES[key]:
            raise UserError(f"{path}: {key} is not one of {', '.join(CHOICES[key])}.")
    elif value is not None and not isinstance(value, str):
        raise UserError(f"{path}: '{key}' has to be a name in the file, not {value!r}.")


def split_columns(name: str) -> tuple[str, slice | int | list[int] | None]:
    """A name and the columns in its bracket; no bracket: None.

    "observations/qpos[0:7]" -> ("observations/qpos", slice(0, 7)), "q[2,1,0]" -> ("q", [2, 1, 0])
    """
    match = re.fullmatch(r"(.*?)\s*\[([-\d\s,:]*)\]", name)
    if match is None:
        return name, None
    dataset, bracket = match.groups()
    try:
        if ":" in bracket:
            start, stop = [int(end) if end.strip() else None for end in bracket.split(":")]
            return dataset, slice(start, stop)
        columns = [int(column) for column in bracket.split(",")]
    except ValueError:
        raise UserError(
            f"'{name}' in the mapping names no columns: write them as [0:7], [7] or [2,1,0]."
        ) from None
    return dataset, columns[0] if len(columns) == 1 else columns


# --------------------------------------------------------- what it names in an HDF5 file
def name_of(root: h5py.Group) -> str:
    """An open file's path, with the group's in it where that is one of many demonstrations."""
    return root.file.filename + root.name.rstrip("/")


def find(root: h5py.Group, name: str | None):
    """A dataset (of some columns), an attribute's value, or None where the file has none.

    An attribute that is not there may be a dataset of the same name: writers differ. What a
    demonstration's group does not have may be said once, further up in the file.
    """
    if not name:
        return None
    if name.startswith("@"):
        value = find_attribute(root, name[1:])
        if value is None and root.name != "/":
            value = find(root.parent, name)
        return value
    dataset, columns = split_columns(name)
    node = get(root, dataset)
    if not isinstance(node, h5py.Dataset) or node.shape is None:
        return None
    check_there(node)
    if node.nbytes > MAX_ARRAY:
        raise UserError(f"{name_of(root)}: {dataset} has shape {node.shape}: name another dataset.")
    if columns is None:
        return node
    return take_columns(node[()], name, columns, name_of(root))


def find_attribute(root: h5py.Group, name: str):
    """The value of an attribute, or else of the dataset of this name; None where there is none."""
    group, _, attribute = name.rpartition("/")
    holder = root.get(group) if group else root
    if holder is not None and attribute in holder.attrs:
        value = holder.attrs[attribute]
        return None if isinstance(value, h5py.Empty) else value
    return find(root, name)


def get(root: h5py.Group, name: str):
    """What has this name in a file, None where nothing has. Raises UserError for a broken link."""
    node = root.get(name)
    if node is None:
        group, _, last = name.rpartition("/")
        holder = root.get(group) if group else root
        if isinstance(holder, h5py.Group) and last in list(holder):
            raise UserError(
                f"{name_of(root)}: {name} is a link to what is not there: copy that, too."
            )
    return node


def check_there(data: h5py.Dataset):
    """Raise a UserError for an array without its numbers, of which HDF5 makes zeros."""
    path = Path(data.file.filename)
    if data.is_virtual:
        for source in data.virtual_sources():
            if source.file_name != "." and not (path.parent / source.file_name).exists():
                raise UserError(
                    f"{path}: {data.name} is in {source.file_name}, which is not there: copy that "
                    "file, too."
                )
    elif data.nbytes and not data.id.get_storage_size() and not data.external:
        raise UserError(
            f"{path}: {data.name} of shape {data.shape} was never filled: record it again."
        )


def find_cameras(root: h5py.Group, pattern: str) -> dict[str, h5py.Dataset]:
    """{camera: its dataset} for a name with {camera} in it: rgb/{camera}, obs/{camera}_image.

    Pictures in a group of their own, rgb/arm/left, are of a camera arm_left.
    """
    before, braces, after = pattern.partition("{camera}")
    if not braces:
        node = get(root, pattern) if pattern else None
        return {Path(pattern).name: node} if isinstance(node, h5py.Dataset) else {}
    folder, _, prefix = before.rpartition("/")
    suffix = after.partition("/")[0]
    group = root.get(folder) if folder else root
    if not isinstance(group, h5py.Group):
        return {}
    if prefix or suffix:
        places = places_named(group, prefix, suffix)
    else:
        places = places_below(group, after)
    found = {}
    for place in places:
        node = get(root, before + place + after)
        if not isinstance(node, h5py.Dataset) or ("/" in place and not after and no_bytes(node)):
            continue
        camera = place.replace("/", "_")
        if camera in found:
            raise UserError(
                f"{name_of(root)}: {node.name} and {found[camera].name} would both be the camera "
                f"{camera}: leave one out by a mapping for the other alone."
            )
        check_there(node)
        found[camera] = node
    return found


def find_pictures(root: h5py.Group, pattern: str) -> dict[str, h5py.Dataset]:
    """find_cameras without what else has such a name: rgb_fps or rgb_times beside rgb_front."""
    found = {}
    for camera, dataset in find_cameras(root, pattern).items():
        in_a_group = pattern.endswith("/{camera}") or "{camera}" not in pattern
        if in_a_group or dataset.ndim >= 3 or (dataset.ndim and not no_bytes(dataset)):
            found[camera] = dataset
    return found


def places_named(group: h5py.Group, prefix: str, suffix: str) -> list[str]:
    """What stands for {camera} in a group's names such as rgb_{camera} or {camera}_image."""
    pattern = re.compile(re.escape(prefix) + "(.+)" + re.escape(suffix))
    return [match[1] for match in map(pattern.fullmatch, group) if match]


def places_below(group: h5py.Group, after: str, depth: int = 2) -> list[str]:
    """Names in a group, and in the groups in it, that may stand for {camera}."""
    places = []
    for name in group:
        places.append(name)
        inner = None if after and name + after in group else group.get(name)
        if depth and isinstance(inner, h5py.Group):
            places += [f"{name}/{place}" for place in places_below(inner, after, depth - 1)]
    return places


def no_bytes(dataset: h5py.Dataset) -> bool:
    """Whether a dataset holds numbers, such as times, beside the pictures."""
    return (h5py.check_vlen_dtype(dataset.dtype) or dataset.dtype) != np.uint8


def is_there(root: h5py.Group, name) -> bool:
    """Whether a file has what a line of a mapping names."""
    if not isinstance(name, str):
        return False
    if "{camera}" in name:
        return bool(find_cameras(root, name))
    return find(root, name) is not None
