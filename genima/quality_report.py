"""The quality of a folder of demonstrations: the facts of its episodes, put together.

check_folder(all_facts)                 what only several can tell: duplicates, moved cameras
summarise(all_facts)                    the numbers of a task, or of all
as_dictionary(facts_by_task, faults)    everything, for a JSON file
"""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from genima.quality import Facts

MOVED = 0.01  # metres that a camera in the room may differ between episodes, as in stage 1


def check_folder(facts: list[Facts]):
    """What only several episodes can tell: duplicates, and cameras that were moved."""
    motions: dict[str, Facts] = {}
    places: dict[str, tuple[Facts, np.ndarray]] = {}
    for one in facts:
        twin = motions.setdefault(one.joints, one)
        if twin is not one:
            one.out_of_bounds.append(f"the same motion as in {twin.path}")
        for camera, place in one.places.items():
            before, there = places.setdefault(camera, (one, np.array(place)))
            moved = np.linalg.norm(place - there)
            if moved > MOVED:
                one.out_of_bounds.append(
                    f"camera '{camera}' is {100 * moved:.0f} cm from where it is in {before.path}"
                )


def summarise(facts: list[Facts]) -> dict:
    """The numbers of one task, or of all: what a table or a JSON file says of them."""
    known = [one.beyond for one in facts if one.beyond is not None]
    visible = {}
    for camera in facts[0].visible:
        visible[camera] = np.mean([one.visible[camera] for one in facts], axis=0).round(3).tolist()
    return {
        "episodes": len(facts),
        "frames": sum(one.frames for one in facts),
        "success": sum(one.success for one in facts) / len(facts),
        "step": max(one.step for one in facts),
        "jerk": max(one.jerk for one in facts),
        "beyond": sum(known) if len(known) == len(facts) else None,
        "gap": largest(one.gap for one in facts),
        "jitter": largest(one.jitter for one in facts),
        "gripper": [min(one.gripper[0] for one in facts), max(one.gripper[1] for one in facts)],
        "tool_error": largest(one.tool_error for one in facts),
        "visible": visible,
        "out_of_bounds": sum(bool(one.out_of_bounds) for one in facts),
    }


def largest(values) -> float | None:
    """The largest of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return max(known, default=None)


def as_dictionary(tasks: dict[str, list[Facts]], faults: list[str]) -> dict:
    """Everything, for a JSON file. unusable: a sentence for each file that cannot be read."""
    everything = [one for facts in tasks.values() for one in facts]
    return {
        "summary": summarise(everything) if everything else None,
        "tasks": {task: summarise(facts) for task, facts in tasks.items()},
        "episodes": [finite(asdict(one)) for one in everything],
        "unusable": faults,
    }


def finite(facts: dict) -> dict:
    """JSON knows no infinite numbers: a camera with nothing before it has no distance."""
    for camera, distance in facts["axis"].items():
        if not np.isfinite(distance):
            facts["axis"][camera] = None
    return facts
