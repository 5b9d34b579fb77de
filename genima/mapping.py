"""A mapping says which part of another program's file is what, and in which unit.

It is a small YAML file; mappings/act.yaml explains every line. Its values name a dataset,
`observations/qpos`, some of its columns, `observations/qpos[0:7]`, or an attribute, `@sim`. Where
a name has {camera}, it stands for every camera that the file has there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path

import h5py
import yaml

from genima.files import UserError, parse_yaml

FOLDER = Path(__file__).resolve().parent.parent / "mappings"
HELP = "see docs/your-data.md"
SECONDS = {"seconds": 1.0, "milliseconds": 1e-3, "microseconds": 1e-6, "nanoseconds": 1e-9}


@dataclass
class Mapping:
    """Which part of a file is what; None: the file has no such part."""

    source: str = ""  # the mapping's own file
    joints: str | None = None  # (T, D)
    joint_unit: str = "radians"  # or degrees
    gripper: str | None = None  # (T,)
    gripper_range: list | None = None  # [closed, open] in the file's unit
    action: str | None = None  # (T, D) joint positions
    gripper_command: str | None = None  # (T,)
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
    instruction: str | None = None
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
    try:
        content = parse_yaml(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    known = [entry.name for entry in fields(Mapping)]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping: {HELP}.")
    for key in content:
        if key not in known:
            raise UserError(f"{path}: '{key}' is not one of {', '.join(known[1:])}.")
    check_values(content, path)
    mapping = Mapping(**content | {"source": str(path)})
    for key in ("joints", "images"):
        if getattr(mapping, key) is None:
            raise UserError(f"{path} does not say where '{key}' is: {HELP}.")
    if mapping.timestamp_unit not in SECONDS:
        raise UserError(f"{path}: timestamp_unit is not one of {', '.join(SECONDS)}.")
    if mapping.joint_unit not in ("radians", "degrees"):
        raise UserError(f"{path}: joint_unit is not one of radians, degrees.")
    return mapping


def check_values(content: dict, path: Path):
    """Raise a UserError for a line of a mapping that names nothing."""
    for key, value in content.items():
        if key == "gripper_range" and value is not None:
            numbers = isinstance(value, list) and len(value) == 2
            numbers = numbers and all(isinstance(entry, (int, float)) for entry in value)
            if not numbers or value[0] == value[1]:
                raise UserError(f"{path}: gripper_range has to be [closed, open], two numbers.")
        elif key == "rate" and isinstance(value, (int, float)):
            continue
        elif value is not None and key != "gripper_range" and not isinstance(value, str):
            raise UserError(f"{path}: '{key}' has to be a name, such as act.yaml's, not {value}.")


def ready_mappings() -> list[Mapping]:
    """Those in mappings/."""
    return [read_mapping(entry.stem) for entry in sorted(FOLDER.glob("*.yaml"))]


def split_columns(name: str) -> tuple[str, slice | int | None]:
    """ "observations/qpos[0:7]" -> ("observations/qpos", slice(0, 7)); no bracket: None."""
    match = re.fullmatch(r"(.*?)\s*\[\s*(-?\d*)\s*(:?)\s*(-?\d*)\s*\]", name)
    if match is None:
        return name, None
    dataset, first, colon, last = match.groups()
    if not colon:
        return dataset, int(first)
    start = int(first) if first else None
    stop = int(last) if last else None
    return dataset, slice(start, stop)


# --------------------------------------------------------- what it names in an HDF5 file
def find(root: h5py.File, name: str | None):
    """A dataset (of some columns), an attribute's value, or None where the file has none."""
    if name is None:
        return None
    if name.startswith("@"):
        group, _, attribute = name[1:].rpartition("/")
        holder = root if not group else root.get(group)
        return None if holder is None else holder.attrs.get(attribute)
    dataset, columns = split_columns(name)
    node = root.get(dataset)
    if not isinstance(node, h5py.Dataset):
        return None
    if columns is None:
        return node
    if node.ndim != 2:
        raise UserError(f"{root.filename}: {dataset} has shape {node.shape}, so '{name}' is not.")
    try:
        return node[:, columns]
    except (IndexError, ValueError):
        raise UserError(
            f"{root.filename}: {dataset} has {node.shape[1]} columns, so there is no '{name}'."
        ) from None


def find_cameras(root: h5py.File, pattern: str) -> dict[str, h5py.Dataset]:
    """{camera: its dataset} for a name with {camera} in it, such as rgb/{camera}."""
    before, braces, after = pattern.partition("{camera}")
    if not braces:
        node = root.get(pattern)
        return {} if node is None else {Path(pattern).name: node}
    group = root.get(before.rstrip("/") or "/")
    if not isinstance(group, h5py.Group):
        return {}
    found = {}
    for camera in group:
        node = root.get(before + camera + after)
        if isinstance(node, h5py.Dataset):
            found[camera] = node
    return found


def is_there(root: h5py.File, name) -> bool:
    """Whether a file has what a line of a mapping names."""
    if not isinstance(name, str):
        return False
    if "{camera}" in name:
        return bool(find_cameras(root, name))
    return find(root, name) is not None
