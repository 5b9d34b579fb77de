"""Look at the demonstrations: a table of those in a folder, and a sentence for every bad file.

python episodes.py --check runs/demo/episodes
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from genima.episodes import Episode, check_alike, find_episodes, read_episode
from genima.files import UserError, run_stage
from genima.kinematics import JOINT_LIMITS

LEGEND = """\
step: largest turn of a joint between two frames, rad. jerk: largest, rad/s^3.
beyond: frames in which a joint is, or is sent, beyond the robot's limits."""


@dataclass
class Settings:
    check: Path
    """Folder of task folders to check, such as runs/demo/episodes."""


@dataclass
class Facts:
    """What the table says about one episode."""

    frames: int
    success: bool
    step: float  # rad, the largest of any joint
    jerk: float  # rad/s^3, the largest of any joint
    beyond: int | None  # frames beyond the joint limits; None: unknown limits


def examine(episode: Episode) -> Facts:
    joints = episode.qpos[:, :-1]  # (T, D)
    steps = np.abs(np.diff(joints, axis=0))
    jerks = np.abs(np.diff(joints, n=3, axis=0)) * episode.fps**3
    return Facts(
        frames=len(joints),
        success=episode.success,
        step=steps.max(initial=0),
        jerk=jerks.max(initial=0),
        beyond=frames_beyond_limits(episode),
    )


def frames_beyond_limits(episode: Episode) -> int | None:
    """In how many frames a joint is, or is sent, beyond its limits; None if they are not known."""
    joints = np.stack([episode.qpos, episode.action])[:, :, :-1]  # (2, T, D)
    for word, (low, high) in JOINT_LIMITS.items():
        if word in episode.robot.lower() and len(low) == joints.shape[2]:
            below = joints < np.subtract(low, 1e-3)
            above = joints > np.add(high, 1e-3)
            return int((below | above).any(axis=(0, 2)).sum())
    return None


def table(tasks: dict[str, list[Facts]]) -> str:
    """One line for each task, within 80 columns for names of up to 32 letters."""
    width = max([len("task"), *map(len, tasks)])
    lines = [f"{'task':{width}s} episodes frames success   step     jerk beyond"]
    for task, facts in tasks.items():
        frames = sum(one.frames for one in facts)
        success = sum(one.success for one in facts) / len(facts)
        step = max(one.step for one in facts)
        jerk = max(one.jerk for one in facts)
        beyond = "?"
        if all(one.beyond is not None for one in facts):
            beyond = str(sum(one.beyond for one in facts))
        lines.append(
            f"{task:{width}s} {len(facts):8d} {frames:6d} {success:7.0%} "
            f"{step:6.3f} {jerk:8.1f} {beyond:>6s}"
        )
    return "\n".join([*lines, LEGEND])


def main():
    settings = tyro.cli(Settings, description=__doc__)
    paths = find_episodes(settings.check)
    tasks = {}
    faults = []
    first = None
    for path in tqdm(paths, desc="checking", unit="episode", leave=False):
        try:
            episode = read_episode(path)
            if first is None:
                first = episode
            check_alike(episode, first)
        except UserError as error:
            faults.append(str(error))
            continue
        tasks.setdefault(path.parent.name, []).append(examine(episode))

    print(table(tasks))
    if faults:
        summary = f"{len(faults)} of {len(paths)} files cannot be used with the others."
        raise UserError("\n".join([*faults, summary]))


if __name__ == "__main__":
    run_stage(main)
