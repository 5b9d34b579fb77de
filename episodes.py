"""Look at the demonstrations: a report on a folder, and the name of every file out of bounds.

    python episodes.py --check runs/demo/episodes
    python episodes.py --check runs/demo/episodes --html report.html --json report.json

Checked are smoothness, gaps in time, limits of the joints, the gripper, forward kinematics against
recorded tool poses, what the cameras see, duplicates and moved cameras; see docs/your-data.md.
Nothing is changed. Exit code 0: all is well; 1: files are out of bounds; 2: files cannot be used.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from genima.episodes import find_episodes
from genima.files import UserError, run_stage, write_whole
from genima.quality import Facts, examine
from genima.quality_page import write_page
from genima.quality_report import as_dictionary, check_folder, summarise

LEGEND = """\
step: largest turn of a joint between two frames, rad. jerk: largest, rad/s^3.
beyond: frames in which a joint is, or is sent, beyond the robot's limits."""
NAMED = 20  # files out of bounds that are named in a terminal


@dataclass
class Settings:
    check: Path
    """Folder of task folders to check, such as runs/demo/episodes."""
    json: Path | None = None
    """Write all numbers of every episode to this file."""
    html: Path | None = None
    """Write a page with pictures: the spheres over what was recorded."""


def table(tasks: dict[str, list[Facts]]) -> str:
    """One line for each task, within 80 columns for names of up to 32 letters."""
    width = max([len("task"), *map(len, tasks)])
    lines = [f"{'task':{width}s} episodes frames success   step     jerk beyond"]
    for task, facts in tasks.items():
        sums = summarise(facts)
        beyond = "?" if sums["beyond"] is None else str(sums["beyond"])
        lines.append(
            f"{task:{width}s} {sums['episodes']:8d} {sums['frames']:6d} {sums['success']:7.0%} "
            f"{sums['step']:6.3f} {sums['jerk']:8.1f} {beyond:>6s}"
        )
    return "\n".join([*lines, LEGEND])


def describe(sums: dict) -> str:
    """Time, gripper, tool and cameras of all episodes, a line each."""
    low, high = sums["gripper"]
    lines = ["timestamps: not recorded.", f"gripper: from {low:.2f} to {high:.2f}."]
    if sums["gap"] is not None:
        gap = f"longest gap {sums['gap']:.3f} s"
        lines[0] = f"timestamps: {gap}, jitter up to {sums['jitter']:.3f} s."
    if sums["tool_error"] is None:
        lines.append("tool poses: not recorded.")
    else:
        centimetres = 100 * sums["tool_error"]
        lines.append(f"tool poses: up to {centimetres:.1f} cm from forward kinematics.")
    for camera, shares in sums["visible"].items():
        seen = " ".join(f"{share:.0%}" for share in shares)
        lines.append(f"spheres in view of {camera}: {seen} (joints, then gripper).")
    return "\n".join(lines)


def check(folder: Path) -> tuple[dict[str, list[Facts]], list[str]]:
    """The facts of every usable episode by task, and a sentence for each other file."""
    tasks: dict[str, list[Facts]] = {}
    faults = []
    first = None
    for path in tqdm(find_episodes(folder), desc="checking", unit="episode", leave=False):
        try:
            facts, episode = examine(path, first)
        except UserError as error:
            faults.append(str(error))
            continue
        if first is None:
            first = episode
        tasks.setdefault(facts.task, []).append(facts)
    check_folder([one for facts in tasks.values() for one in facts])
    return tasks, faults


def name_files(facts: list[Facts]) -> list[str]:
    """A sentence for each file that is out of bounds, up to a number."""
    bad = [one for one in facts if one.out_of_bounds]
    sentences = [f"{one.path}: {'; '.join(one.out_of_bounds)}." for one in bad[:NAMED]]
    if len(bad) > NAMED:
        sentences.append(f"... and {len(bad) - NAMED} more: --json FILE names them all.")
    if bad:
        sentences.append(f"{len(bad)} of {len(facts)} episodes are out of bounds.")
    return sentences


def main():
    settings = tyro.cli(Settings, description=__doc__)
    tasks, faults = check(settings.check)
    everything = [one for facts in tasks.values() for one in facts]
    print(table(tasks))
    if everything:
        print(describe(summarise(everything)))
    if settings.json:
        with write_whole(settings.json) as temporary:
            temporary.write_text(json.dumps(as_dictionary(tasks, faults), indent=1))
    if settings.html:
        write_page(settings.html, tasks, faults)
    sentences = name_files(everything)
    if faults:
        summary = f"{len(faults)} of {len(faults) + len(everything)} files cannot be used"
        raise UserError("\n".join([*sentences, *faults, f"{summary} with the others."]))
    if sentences:
        print("\n".join(sentences), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_stage(main)
