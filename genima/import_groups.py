"""Which groups of an HDF5 file are demonstrations, and which mapping fits them.

One file may hold many: data/demo_0, data/demo_1. A mapping's `demonstrations` is a pattern of
their names, data/*, and without one a file is one demonstration.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import h5py

from genima.files import UserError
from genima.import_hdf5 import open_recording
from genima.mapping import HELP, Mapping, is_there

ANYWHERE = ("*", "*/*", "*/*/*")  # where groups are looked for if no mapping says it


def find_groups(root: h5py.File, mapping: Mapping) -> list[str]:
    """The demonstrations' groups, demo_2 before demo_10; [""]: the file is one demonstration.

    One that is empty, or a dead link, is among them if it is named like the others, so that
    importing it says what is wrong.
    """
    if mapping.demonstrations is None:
        return [""]
    places = list(walk(root, mapping.demonstrations.strip("/").split("/")))
    kinds = {without_numbers(place) for place in places if may_be(root, place, mapping)}
    return sorted((place for place in places if without_numbers(place) in kinds), key=in_order)


def groups_beside(root: h5py.File, mapping: Mapping) -> list[str]:
    """Groups that are demonstrations too, in a file that is taken for one as a whole.

    None for a mapping with /joints, which are at the top from wherever one looks.
    """
    if mapping.demonstrations is not None or mapping.joints.startswith("/"):
        return []
    beside = []
    for pattern in ANYWHERE:
        groups = find_groups(root, replace(mapping, demonstrations=pattern))
        beside += [place for place in groups if is_whole(root.get(place), mapping)]
    return beside


def walk(group: h5py.Group, pattern: Sequence[str], before: str = "") -> Iterator[str]:
    """Groups, and links to nothing, whose names fit the parts of a pattern."""
    for name in group:
        if not fnmatchcase(name, pattern[0]):
            continue
        inner = group.get(name)
        if len(pattern) == 1 and (inner is None or isinstance(inner, h5py.Group)):
            yield f"{before}/{name}"
        elif isinstance(inner, h5py.Group):
            yield from walk(inner, pattern[1:], f"{before}/{name}")


def without_numbers(place: str) -> str:
    return re.sub(r"\d+", "0", place)


def in_order(place: str) -> list:
    """A key to sort by: numbers as numbers."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", place)]


def may_be(root: h5py.File, place: str, mapping: Mapping) -> bool:
    """Whether a group is a demonstration, perhaps a broken one."""
    group = root.get(place)
    if group is None:
        return False
    try:
        return is_there(group, mapping.joints) or is_there(group, mapping.images)
    except UserError:
        return True


def is_whole(group: h5py.Group | None, mapping: Mapping) -> bool:
    """Whether a group has the joints and the pictures that a mapping names."""
    if group is None:
        return False
    try:
        return is_there(group, mapping.joints) and is_there(group, mapping.images)
    except UserError:
        return False


def detect_mapping(path: Path, mappings: Sequence[Mapping]) -> Mapping:
    """The one that finds most of its parts in this file, or else in each group of it.

    Where none fits, a single one is returned as it is, for read_recording to say what is missing;
    for several this raises a UserError.
    """
    with open_recording(path) as root:
        best = best_mapping(root, mappings)
        if best is None and len(mappings) == 1 and mappings[0].demonstrations:
            return mappings[0]
        for pattern in ANYWHERE:
            if best is None:
                others = [replace(mapping, demonstrations=pattern) for mapping in mappings]
                best = best_mapping(root, others)
        if best is None and len(mappings) == 1:
            return mappings[0]
        if best is None:
            names: list[str] = []
            root.visit(names.append)
            raise UserError(
                f"{path}: no ready mapping fits its datasets ({', '.join(names[:12])}): "
                f"write one and give it with --mapping; {HELP}."
            )
    return best


def best_mapping(root: h5py.File, mappings: Sequence[Mapping]) -> Mapping | None:
    """The one that finds most of its parts in a file's first demonstration; None: none fits."""
    best = None
    most = 0
    for mapping in mappings:
        for place in find_groups(root, mapping):
            group = root.get(place or "/")
            if is_whole(group, mapping):
                found = sum(is_there(group, name) for name in vars(mapping).values())
                if found > most:
                    best = mapping
                    most = found
                break
    return best
