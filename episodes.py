"""Look at the demonstrations: a table of those in a folder, and one sentence for every file that is broken.

python episodes.py --check runs/demo/episodes
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from genima.episodes import check_alike, find_episodes, read_episode
from genima.files import UserError, run_stage
from genima.kinematics import JOINT_LIMITS


def beyond_limits(episode):
    """In how many frames a joint is, or is sent, beyond its limits; None for a robot whose limits we don't know."""
    for word, (low, high) in JOINT_LIMITS.items():
        if word in episode.robot.lower() and len(low) == episode.qpos.shape[1] - 1:
            joints = np.stack([episode.qpos, episode.action])[:, :, :-1]  # (2, T, D)
            return (
                ((joints < np.subtract(low, 1e-3)) | (joints > np.add(high, 1e-3)))
                .any(axis=(0, 2))
                .sum()
            )


@dataclass
class Settings:
    check: Path
    """Folder of task folders to check, such as runs/demo/episodes."""


def main():
    settings = tyro.cli(Settings, description=__doc__)
    groups, broken, first = (
        {},
        [],
        None,
    )  # task: [(frames, success, largest step, largest jerk, frames beyond the limits)]
    paths = find_episodes(settings.check)
    for path in tqdm(paths, desc="checking", unit="episode", leave=False):
        try:
            episode = read_episode(path)
            first = first or episode
            check_alike(episode, first)
        except UserError as error:
            broken.append(str(error))
            continue
        joints = episode.qpos[:, :-1]
        step = np.abs(np.diff(joints, axis=0)).max(initial=0)
        jerk = np.abs(np.diff(joints, n=3, axis=0)).max(initial=0) * episode.fps**3
        groups.setdefault(path.parent.name, []).append(
            (len(joints), episode.success, step, jerk, beyond_limits(episode))
        )

    print(f"{'task':28s} episodes  frames success step rad jerk rad/s³ beyond limits")
    for task, rows in groups.items():
        frames, success, step, jerk, beyond = zip(*rows)
        beyond = "unknown" if None in beyond else f"{sum(beyond)} frames"
        print(
            f"{task:28s} {len(rows):8d} {sum(frames):7d} {sum(success) / len(rows):7.0%} "
            f"{max(step):8.3f} {max(jerk):11.1f} {beyond:>13s}"
        )
    if broken:
        raise UserError("\n".join([*broken, f"{len(broken)} of {len(paths)} files are broken."]))


if __name__ == "__main__":
    run_stage(main)
