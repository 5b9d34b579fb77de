"""Which demonstrations a delivery holds, and whether an episode of one is there already.

places = find_places(folder)        its HDF5 files and LeRobot datasets
names = name_places(places)         of their episodes, no two alike
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from genima.episodes import FORMAT, Episode, check_episode, layout_of, read_episode, write_episode
from genima.files import UserError, read_hdf5
from genima.import_groups import find_groups, groups_beside
from genima.import_hdf5 import column, open_recording
from genima.mapped_numbers import gripper_of
from genima.mapping import HELP, Mapping, split_columns

ENDINGS = (".hdf5", ".h5")  # also in capitals
MOST_SENTENCES = 20  # that are printed on what was not imported
LONGEST_NAME = 200  # letters; a file system takes 255
LITTLE = 3  # of 255: what decoding a video on another machine may change


@dataclass
class Source:
    """One demonstration to import."""

    path: Path  # an HDF5 file, or the folder of a LeRobot dataset
    name: str  # of the episode's file
    mapping: Mapping
    row: dict | None = None  # of a LeRobot dataset: what it says of the episode
    group: str = ""  # of an HDF5 file of many demonstrations: where this one is
    number: int = 0
    extremes: dict[str, tuple[float, float]] = field(default_factory=dict)  # see find_extremes


# ------------------------------------------------------------------------------- what is there
def find_places(folder: Path) -> list[Path]:
    """The HDF5 files and the LeRobot datasets in a folder, which may be one itself."""
    files = [path for path in folder.rglob("*.*") if path.suffix.lower() in ENDINGS]
    datasets = [path.parent.parent for path in folder.rglob("meta/info.json")]
    return sorted(files) + sorted(datasets)


def name_places(places: list[Path]) -> list[str]:
    """A file's or folder's own name, with as many of the folders above as tell it from the others.

    Raises UserError for two that differ in their ending alone.
    """
    parts = []
    for path in places:
        last = path.name if path.is_dir() else path.stem
        parts.append([*Path(os.path.abspath(path)).parent.parts[1:], last])
    used = [1] * len(places)  # how many parts of each make its name
    while True:
        names = ["_".join(part[-count:]) for part, count in zip(parts, used)]
        twice = {name for name, count in Counter(names).items() if count > 1}
        if not twice:
            return names
        alike = [number for number, name in enumerate(names) if name in twice]
        for number in alike:
            used[number] += 1
        if all(used[number] > len(parts[number]) for number in alike):
            first, second = alike[:2]
            raise UserError(
                f"{places[first]} and {places[second]} have the same name: rename one of them."
            )


def find_hdf5(path: Path, name: str, mapping: Mapping) -> list[Source]:
    """The demonstrations of an HDF5 file."""
    with open_recording(path) as root:
        groups = find_groups(root, mapping)
        beside = groups_beside(root, mapping)
    if beside:
        pattern = f"{beside[0].rsplit('/', 1)[0]}/*".strip("/")
        print(
            f"Note: {path} is a demonstration itself; {len(beside)} more in groups such as "
            f"{beside[0]} are left out: for those, a mapping says `demonstrations: {pattern}`."
        )
    if not groups:
        raise UserError(
            f"{path} has no demonstrations in {mapping.demonstrations}, as {mapping.source} says: "
            f"{HELP}."
        )
    shorter = [Path(group).name for group in groups]
    if len(set(shorter)) < len(groups):  # train/demo_0 and test/demo_0
        shorter = [group.strip("/").replace("/", "_") for group in groups]
    sources = []
    for group, short in zip(groups, shorter):
        own = f"{name}_{short}"[:LONGEST_NAME] if group else name
        sources.append(Source(path, own, mapping, group=group))
    return sources


def find_lerobot(folder: Path, name: str, mapping: Mapping) -> list[Source]:
    """The episodes of a LeRobot dataset."""
    from genima.import_lerobot import read_episode_rows, read_info  # pyarrow and PyAV: only here

    read_info(folder)
    sources = []
    for row in read_episode_rows(folder):
        sources.append(Source(folder, f"{name}_{row['episode_index']:06d}", mapping, row))
    return sources


def prepare(sources: list[Source]):
    """Number the demonstrations and fill in their `extremes`.

    Raises UserError for two that would become the same file.
    """
    paths: dict[str, Path] = {}
    for number, source in enumerate(sources):
        source.number = number
        if source.name in paths:
            raise UserError(
                f"{paths[source.name]} and {source.path} would both become {source.name}.hdf5: "
                "import one of them into another --run."
            )
        paths[source.name] = source.path
    find_extremes(sources)


# ---------------------------------------------------------------------- the gripper's one scale
def find_extremes(sources: list[Source]):
    """Fill in `extremes`: of all demonstrations of a mapping that does not give the range.

    A file of a gripper that stays half open says little about its unit; all together do.
    """
    places = {(source.path, source.group): source.mapping for source in sources}
    for name in ("gripper", "gripper_command"):
        found: dict[str, list[float]] = {}  # by mapping
        for place, mapping in places.items():
            if getattr(mapping, name) and not getattr(mapping, f"{name}_range"):
                with suppress(UserError, ValueError):  # importing it says so
                    values = gripper_values(*place, getattr(mapping, name))
                    finite = values[np.isfinite(values)]
                    found.setdefault(mapping.source, []).extend([finite.min(), finite.max()])
        for source in sources:
            values = found.get(source.mapping.source)
            if values:
                source.extremes[name] = (float(min(values)), float(max(values)))


def gripper_values(path: Path, group: str, name: str) -> np.ndarray:
    """What a mapping names as the gripper or its command: of a recording, or of a whole dataset."""
    if not path.is_dir():
        with open_recording(path, group) as root:
            return gripper_of(column(root, name, name, None, needed=True), str(path))
    from genima.import_lerobot import column as table_column  # pyarrow and PyAV: only here
    from genima.import_lerobot import read_table

    parts = []
    for place in sorted((path / "data").glob("*/*.parquet")):
        table = read_table(place, columns=[split_columns(name)[0]])
        parts.append(gripper_of(table_column(table, name, str(place), needed=True), str(place)))
    return np.concatenate(parts)


def shorten_list(sentences: list[str]) -> list[str]:
    """The different ones of many, and how many more there are."""
    different = sorted(set(sentences))
    more = len(different) - MOST_SENTENCES
    if more <= 0:
        return different
    return [*different[:MOST_SENTENCES], f"and {more} sentences more."]


# -------------------------------------------------------------------------------- the episodes
def keep(episode: Episode, name: str, run: Path) -> Episode | None:
    """Write an episode to run/episodes/<name>.hdf5. Returns the one that was there already.

    Raises UserError where that is of another recording, or where the run is of another robot.
    """
    check_fits(episode, run)
    path = run / "episodes" / f"{name}.hdf5"
    if not path.exists():
        write_episode(path, episode)
        return None
    known = read_episode(path, images=False)
    check_same(episode, known)
    return known


def check_fits(episode: Episode, run: Path):
    """Raise a UserError unless an episode has the robot, rate and cameras of those in the run."""
    check_episode(episode)
    episode.image_sizes = dict(sorted(episode.image_sizes.items()))  # as in a file
    for path in (run / "episodes").glob("*/[!.]*.hdf5"):
        ours = layout_of(episode)
        theirs = layout_of(read_episode(path, images=False))
        if ours != theirs:
            raise UserError(
                f"{episode.path} has {ours}, where {path} has {theirs}: give another --run."
            )
        return  # one is enough: the others are like it


def check_same(episode: Episode, known: Episode):
    """Raise a UserError unless the episode that is there is what its recording gives now.

    Otherwise it is of another recording of the same name, or was imported with other settings.
    """
    pairs = {
        "instruction": (episode.instruction, known.instruction),
        "success": (episode.success, known.success),
    }
    for name in ("qpos", "action", "joint_poses"):
        pairs[name] = (getattr(episode, name), getattr(known, name))
    for camera in episode.intrinsics:
        pairs[f"intrinsics of {camera}"] = (episode.intrinsics[camera], known.intrinsics[camera])
        pairs[f"extrinsics of {camera}"] = (episode.extrinsics[camera], known.extrinsics[camera])
    different = [name for name, pair in pairs.items() if not is_same(*pair)]
    with read_hdf5(known.path, FORMAT) as root:
        for camera, images in episode.images.items():
            stored = root[f"observations/images/{camera}"][0]
            if np.abs(images[0].astype(int) - stored).max() > LITTLE:
                different.append(f"pictures of {camera}")
    if different:
        raise UserError(
            f"{known.path} was imported from another recording than {episode.path}, or with other "
            f"settings ({', '.join(different)} differ): give another --run, or move "
            f"{known.path.parent} away."
        )


def is_same(ours, theirs) -> bool:
    if isinstance(ours, np.ndarray):
        return ours.shape == theirs.shape and np.allclose(ours, theirs, atol=1e-4)
    return ours == theirs
