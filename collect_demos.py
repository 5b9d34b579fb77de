"""Stage 0: demonstrations by a scripted expert, one HDF5 episode each.

In:   the tasks of sims/mujoco_tasks.py (their waypoints); or RLBench, alive or a dataset of it.
Out:  <run>/episodes/<task>/<seed>_<variation>.hdf5, see episodes.py; only successful attempts are kept.
Run:  python collect_demos.py                                      what `make demo` trains on
      python collect_demos.py --tasks open_drawer --scenes 20 --run runs/drawer
      python collect_demos.py --from-rlbench DATASET --run runs/rlbench     its demonstrations; needs neither RLBench nor CoppeliaSim
      python collect_demos.py --sim rlbench --tasks open_box --run runs/rlbench      new ones by RLBench's planner

Each scene (seed) is recorded once for every object that the instruction can name: the same picture, other words, another
target, so that the words decide. Demonstrations begin anywhere over the table and, every second one, near the object: a
painter that has only seen one path continues the arm's path instead of looking, and one that has never been a little off
the path never comes back to it. Stopped in the middle, the script goes on where it was.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # one process per core does the work; numpy's threads would fight

import tyro

from genima.episodes import CAMERAS, read_episode, write_episode
from genima.files import UserError, run_stage
from genima.parallel import run_in_parallel
from sims import make_env
from sims.demonstrator import record_demonstration
from sims.mujoco_tasks import TASKS, check_task
from sims.rlbench_dataset import find_demonstrations, read_demonstration
from sims.rlbench_panda import NoSceneError, import_rlbench, task_class


@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """Folder of the run; episodes go to <run>/episodes."""
    tasks: tuple[str, ...] = ()
    """Which tasks to record; none named: reach_target, push_button and pick_and_lift, or all that a dataset has."""
    scenes: int | None = None
    """Scenes per task, 300 by default. Each gives one episode per object that the instruction can name (three). With RLBench:
    demonstrations per task, 50 by default; from a dataset, at most this many of each variation."""
    image_size: int | None = None
    """Height and width of the pictures, pixels: 64 by default, 128 with RLBench, from a dataset as they were recorded."""
    sim: Literal["mujoco", "rlbench"] = "mujoco"
    """The embedded simulator, or RLBench (see requirements-rlbench.txt)."""
    from_rlbench: Path | None = None
    """Root of a dataset that RLBench recorded, to be turned into episodes."""
    cameras: tuple[str, ...] = CAMERAS
    """Which cameras of RLBench to record or import; the painter needs these four."""
    variations: tuple[int, ...] = ()
    """Which variations to import; none named: all."""
    seed: int = 1_000_000
    """Seed of the first scene; evaluation uses seeds below a million, so that its scenes are unseen."""
    workers: int = os.cpu_count()
    """Processes."""


# A job makes one episode in <run>/episodes/<task> unless it is there, and returns for each attempt None, or what went wrong.
def record_one(folder, seed, variation, image_size):
    """By the scripted expert."""
    path = folder / f"{seed:07d}_{variation:02d}.hdf5"
    if path.exists():
        return []
    env = make_env(folder.name, image_size, CAMERAS, images=True)
    env.render()  # a machine that cannot draw says so here, instead of failing in every attempt
    try:
        episode = record_demonstration(
            env, folder.name, seed, variation, ("anywhere", "near")[(seed + variation) % 2]
        )
    except UserError as error:  # a waypoint out of reach: a failed attempt, not a broken program
        return [str(error)]
    if not episode.success:
        return ["The expert failed."]
    write_episode(path, episode)
    return [None]


def record_rlbench(folder, seeds, image_size, cameras):
    """By RLBench's planner, with the first of these seeds for which it finds a scene and a way."""
    faults = []
    if any(list(folder.glob(f"{seed:07d}_*.hdf5")) for seed in seeds):
        return faults
    for seed in seeds:
        try:
            episode = make_env(folder.name, image_size, cameras, "rlbench", True).demonstrate(seed)
        except NoSceneError as error:
            faults.append(str(error))
            continue
        write_episode(folder / f"{seed:07d}_{episode.variation:02d}.hdf5", episode)
        return [*faults, None]
    return faults


def import_one(folder, source, image_size, cameras):
    """From <task>/variation<N>/episodes/episode<M> of a dataset."""
    path = (
        folder
        / f"episode{int(source.name[7:]):03d}_variation{int(source.parents[1].name[9:]):02d}.hdf5"
    )
    if path.exists():
        return []
    try:
        write_episode(
            path, read_demonstration(source, cameras, image_size and (image_size, image_size))
        )
    except UserError as error:
        return [str(error)]
    return [None]


def collect(settings):
    rlbench, scenes, size = settings.sim == "rlbench", settings.scenes, settings.image_size
    if (
        min(
            number
            for number in (scenes, size, settings.workers, settings.seed + 1)
            if number is not None
        )
        < 1
    ):
        raise UserError(
            "--scenes, --image-size and --workers must be 1 or more, and --seed 0 or more."
        )
    folder, tasks = (
        settings.run / "episodes",
        list(dict.fromkeys(settings.tasks)) or ["reach_target", "push_button", "pick_and_lift"],
    )
    if settings.from_rlbench:
        sources = find_demonstrations(
            settings.from_rlbench, settings.tasks, settings.variations, scenes
        )
        jobs = [
            (import_one, folder / source.parents[2].name, source, size, settings.cameras)
            for source in sources
        ]
    elif rlbench:
        size, scenes = size or 128, scenes or 50
        for task in tasks:
            task_class(import_rlbench().tasks, task)
        seeds = [
            range(settings.seed + i, settings.seed + i + 5 * scenes, scenes) for i in range(scenes)
        ]  # of five attempts each
        jobs = [
            (record_rlbench, folder / task, five, size, settings.cameras)
            for task in tasks
            for five in seeds
        ]
    else:
        size, seeds = size or 64, range(settings.seed, settings.seed + (scenes or 300))
        for task in tasks:
            check_task(task)
        jobs = [(record_one, folder / task, seed, variation, size)
                for seed in seeds for task in tasks for variation in range(TASKS[task].candidates)]  # fmt: skip
    for path in sorted(folder.glob("*/[!.]*.hdf5"))[
        :1
    ]:  # what a killed process left half-written begins with a dot
        if size and (sizes := set(read_episode(path, images=False).image_sizes.values())) != {
            (size, size)
        }:
            raise UserError(
                f"{path} has pictures of {', '.join(map(str, sizes))} pixels, not {(size, size)}: use another --run."
            )

    attempts, crash = (
        {target: [] for _, target, *_ in jobs},
        "A process died twice at an episode: run the same command again.",
    )
    for (_, target, *_), result in run_in_parallel(
        jobs, settings.workers, "episodes", "episode", start="spawn" if rlbench else None
    ):
        attempts[target] += [crash] if result is None else result
    for target, results in attempts.items():
        rate = (
            f"{results.count(None) / len(results):.1%} of {len(results)} attempts succeeded"
            if results
            else "nothing left to record"
        )
        print(f"{target.name}: {rate}; {len(list(target.glob('[!.]*.hdf5')))} episodes in {target}")
    wrong = {sentence for results in attempts.values() for sentence in results if sentence}
    if settings.from_rlbench and wrong:
        raise UserError("\n".join(sorted(wrong)))
    if crash in wrong:
        print(crash)


def main():
    collect(tyro.cli(Settings, description=__doc__))


if __name__ == "__main__":
    run_stage(main)
