"""Which demonstrations are trained on, and which are held out to measure on.

A scene is what one layout of the table gives: every demonstration of a simulator's (task, seed),
whatever object is named in it. Recordings of a real arm have no such seed: there each file is a
scene. Held out is every 20th scene in sorted order, beginning with the 10th; of fewer than 10
scenes the last one, and nothing of a single one. Demonstrations that failed (success False) are
neither trained on nor held out, unless --failed asks for them.

Stages 2 and 3 follow this rule, so that neither has seen what the other has not.
"""

from pathlib import Path
from typing import NamedTuple

from genima.files import UserError

FIRST = 9  # the 10th scene
EVERY = 20


class Scene(NamedTuple):
    """Sorts by task, then by seed; recordings of a real arm by the file's name."""

    task: str
    seed: int
    file: str


def scene_of(path: Path, task: str, seed: int, sim: bool) -> Scene:
    """The scene of a demonstration; the arguments are its file and what the file's attrs say."""
    if sim:
        return Scene(task, seed, "")
    return Scene(task, -1, path.stem)


def name_of(path: Path) -> str:
    """A demonstration's name in a run, by which a trained network remembers it: <task>/<file>."""
    return f"{path.parent.name}/{path.name}"


def held_out_scenes(scenes) -> set[Scene]:
    """Those of the scenes that are not trained on: never all, none if there is but one."""
    ordered = sorted(set(scenes))
    held_out = ordered[FIRST::EVERY]
    if not held_out and len(ordered) > 1:
        held_out = ordered[-1:]
    return set(held_out)


def describe_split(scenes: int, held_out: int, left_out: int, used: int) -> str:
    """One sentence: how many scenes are held out, and how many failed demonstrations there are.

    left_out: of the failed ones; used: those trained on all the same.
    """
    words = f"{held_out} of {scenes} scenes held out"
    if left_out:
        words += f", {left_out} failed demonstrations left out (--failed uses them)"
    if used:
        words += f", {used} failed demonstrations among them (--failed)"
    return f"{words}."


def measured_in(held_out: int) -> str:
    """Where a training measures: what to call these scenes in a sentence."""
    if held_out:
        return "unseen scenes"
    return "the scenes trained on (none is held out)"


def check_successful(successful: int, demonstrations: int, folder: Path):
    """Raise a UserError where all demonstrations in a folder failed."""
    if not successful:
        raise UserError(
            f"All {demonstrations} demonstrations in {folder} failed: record better ones, or use "
            "them (--failed)."
        )
