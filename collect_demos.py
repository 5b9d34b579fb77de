"""Stage 0: demonstrations by a scripted expert, one HDF5 episode each.

    In:   the tasks of sims/mujoco_tasks.py; or RLBench, live or a dataset that it recorded
    Out:  <run>/episodes/<task>/<seed>_<variation>.hdf5, see genima/episodes.py

    python collect_demos.py                                 50 demonstrations of three tasks
    python collect_demos.py --tasks open_drawer --demos 20 --run runs/drawer
    python collect_demos.py --robot ur5e --tasks reach_target push_button --run runs/ur5e
    python collect_demos.py --scenes 300                    every object of 300 scenes
    python collect_demos.py --film 3                        and three in films/<task>.mp4
    python collect_demos.py --cameras wrist front --image-size 96 128 --run runs/two
    python collect_demos.py --from-rlbench DATASET --run runs/rlbench
    python collect_demos.py --sim rlbench --tasks open_box --run runs/rlbench

Only successful attempts are kept. A dataset of RLBench is read without RLBench or CoppeliaSim;
--sim rlbench needs both, and records new demonstrations by RLBench's planner (docs/rlbench.md).

Each demonstration has a scene (seed) and an instruction of its own, as in the paper. With --scenes
each scene is recorded once for every object that the instruction can name: the same image, other
words, another target, so that the words decide. A painter that starts from random weights needs
that. Half of the demonstrations begin anywhere over the table, half near the object or on the way
there: a painter that has only seen one path continues the arm's path instead of looking, and one
that has never been a little off the path never comes back to it.

An episode that is there already is not recorded again, so a run that was stopped resumes where it
was, and two runs on one folder share the work.
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process per core; threads would compete

import tyro

from genima.episodes import CAMERAS, Episode, read_episode, write_episode
from genima.files import UserError, check_number, run_stage
from genima.parallel import run_in_parallel, usable_cores
from sims import Simulators
from sims.coppeliasim import task_class
from sims.demonstrator import record_demonstration
from sims.mujoco_panda import MAX_HEIGHT
from sims.mujoco_tasks import find_task
from sims.rendering import choose_renderer
from sims.rlbench_dataset import find_demonstrations, read_demonstration, read_notes
from sims.rlbench_folders import episode_file, identify, not_importable
from sims.rlbench_protocol import Protocol, recording_protocol, refuse_options
from sims.show import film_demonstrations

DEFAULT_TASKS = ("reach_target", "push_button", "pick_and_lift")
STARTS = ("anywhere", "near")
ATTEMPTS = 5  # scenes that RLBench tries for one demonstration: not every one has room for its task
MAX_SCENES = 100_000
MAX_SEED = 2**31 - 1
MAX_SIZE = 4096  # pixels, of RLBench's images
MAX_REASONS = 3  # for failed attempts, to print
ONLY_RLBENCH = ("protocol", "arm_velocity", "arm_acceleration", "renderer")
CRASH = "A process died twice at an episode: run the same command again."


@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """Folder of the run; episodes go to <run>/episodes."""
    tasks: tuple[str, ...] = ()
    """Which tasks to record; none named: reach_target, push_button and pick_and_lift, or all that a
    dataset has."""
    demos: int | None = None
    """Demonstrations per task, each of a scene of its own; 50 by default (paper: 20 to 50)."""
    scenes: int | None = None
    """In place of --demos: scenes per task, each recorded for every object that the instruction can
    name (three). From a dataset of RLBench: at most this many of each variation."""
    image_size: tuple[int, ...] = ()
    """Height and width of the images, pixels, or one number for both: 64 by default, 128 with
    RLBench (paper: 256), from a dataset as they were recorded."""
    sim: Literal["mujoco", "rlbench"] = "mujoco"
    """The embedded simulator, or RLBench (see requirements-rlbench.txt)."""
    robot: Literal["fr3", "ur5e"] = "fr3"
    """Whose arm the embedded simulator has (sims/arms.py)."""
    protocol: Literal["paper"] | None = None
    """For --sim rlbench: record as the paper does: variation 0, 256 pixels, velocity 2,
    acceleration 8, OpenGL."""
    arm_velocity: float | None = None
    """Of RLBench's planner, rad/s: 1 by default, 2 in the paper."""
    arm_acceleration: float | None = None
    """Of RLBench's planner, rad/s^2: 4 by default, 8 in the paper."""
    renderer: Literal["opengl", "opengl3"] | None = None
    """CoppeliaSim's: opengl3, with shadows, by default, opengl in the paper."""
    from_rlbench: Path | None = None
    """Root of a dataset that RLBench recorded, to be turned into episodes."""
    cameras: tuple[str, ...] = CAMERAS
    """Which cameras to record or import."""
    variations: tuple[int, ...] = ()
    """Which variations to import; none named: all. With --sim rlbench: the one to record; none
    named: drawn in each scene."""
    seed: int = 1_000_000
    """Seed of the first scene; evaluation uses seeds below a million, so its scenes are unseen."""
    film: int = 0
    """Film so many successes of each task, and as many failures with their reasons."""
    workers: int = usable_cores()
    """Processes."""


# -------------------------------------------------------------------------------------------- jobs
# A job makes one episode in <run>/episodes/<task> unless it is there. It returns a list with one
# entry for each attempt: None, or what went wrong.
def record_one(
    simulators: Simulators, folder: Path, seed: int, variation: int, size, cameras, robot: str
) -> list[str | None]:
    """One episode by the scripted expert. size: (height, width) of the images of these cameras."""
    path = folder / f"{seed:07d}_{variation:02d}.hdf5"
    if path.exists():
        return []
    task = folder.name
    env = simulators.get(task, size, cameras, images=True, robot=robot)
    env.render()  # a machine that cannot draw says so here, instead of failing in every attempt
    try:
        episode = record_demonstration(env, *attempt_of(task, seed, variation))
    except UserError as error:  # a waypoint out of reach: a failed attempt, not a broken program
        return [str(error)]
    if not episode.success:
        return ["The expert failed."]
    write_new(path, episode)
    return [None]


def attempt_of(task: str, seed: int, variation: int) -> tuple[str, int, int, str]:
    """Task, seed, variation and start: half of each variation's begin near the object."""
    rounds, turn = divmod(seed, find_task(task).candidates)  # --demos names object `turn`
    return task, seed, variation, STARTS[(rounds + turn + variation) % 2]


def record_rlbench(
    simulators: Simulators,
    folder: Path,
    seeds: range,
    cameras: tuple[str, ...],
    protocol: Protocol,
) -> list[str | None]:
    """One episode by RLBench's planner, of the first of these seeds that has a scene and a way."""
    for seed in seeds:
        if list(folder.glob(f"{seed:07d}_*.hdf5")):
            return []
    env = simulators.get(folder.name, protocol.image_size, cameras, "rlbench", True, protocol)
    results = []
    for seed in seeds:
        try:
            episode = env.demonstrate(seed)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # of RLBench, PyRep or CoppeliaSim: the next seed is tried
            words = " ".join(str(error).split())
            results.append(f"{type(error).__name__}: {words}")
            continue
        write_new(folder / f"{seed:07d}_{episode.variation:02d}.hdf5", episode)
        results.append(None)
        break
    return results


def import_one(
    folder: Path, source: Path, size: tuple[int, ...], cameras: tuple[str, ...]
) -> list[str | None]:
    """One episode from a folder episode<M> of a dataset. size: () as it was recorded."""
    path = folder / episode_file(source)
    if path.exists():
        return []
    try:
        write_new(path, read_demonstration(source, cameras, size or None))
    except UserError as error:
        return [str(error)]
    return [None]


def write_new(path: Path, episode: Episode):
    """Write an episode, unless another run on this folder was faster."""
    if not path.exists():
        write_episode(path, episode)


# --------------------------------------------------------------------------------- which jobs to do
def embedded_jobs(settings: Settings, folder: Path) -> list[tuple]:
    tasks = chosen_tasks(settings)
    for task in tasks:
        find_task(task)  # raises UserError if there is none
    recorded = (settings.image_size, settings.cameras, settings.robot)
    jobs = []
    count = settings.demos if settings.scenes is None else settings.scenes
    for seed in range(settings.seed, settings.seed + count):
        for task in tasks:
            variations = range(find_task(task).candidates)
            if settings.scenes is None:
                variations = [seed % len(variations)]  # each object equally often
            for variation in variations:
                jobs.append((record_one, folder / task, seed, variation, *recorded))
    return jobs


def rlbench_jobs(settings: Settings, folder: Path) -> list[tuple]:
    tasks = chosen_tasks(settings)
    for task in tasks:
        task_class(task)  # raises UserError if there is none
    protocol = recording_protocol(settings)
    scenes = settings.demos
    jobs = []
    for task in tasks:
        for seed in range(settings.seed, settings.seed + scenes):
            seeds = range(seed, seed + ATTEMPTS * scenes, scenes)
            jobs.append((record_rlbench, folder / task, seeds, settings.cameras, protocol))
    return jobs


def dataset_jobs(settings: Settings, folder: Path) -> list[tuple]:
    sources = find_demonstrations(
        settings.from_rlbench, settings.tasks, settings.variations, settings.scenes
    )
    for note in read_notes(sources):
        print(f"Note: {note}")
    jobs = []
    for source in sources:
        task, _, _ = identify(source)
        job = (import_one, folder / task, source, settings.image_size, settings.cameras)
        jobs.append(job)
    return jobs


def chosen_tasks(settings: Settings) -> list[str]:
    """The tasks by name, each once."""
    return list(dict.fromkeys(settings.tasks or DEFAULT_TASKS))


def check_settings(settings: Settings):
    """Fill in what depends on the simulator. Raises UserError for what cannot be recorded."""
    embedded = settings.from_rlbench is None and settings.sim == "mujoco"
    if settings.demos is not None and settings.scenes is not None:
        raise UserError("Give --demos or --scenes, not both.")
    if settings.demos is not None and settings.from_rlbench is not None:
        raise UserError("--from-rlbench takes --scenes, for each variation, in place of --demos.")
    if len(settings.image_size) == 1:
        settings.image_size *= 2
    if settings.from_rlbench is not None:
        refuse_options(settings, ONLY_RLBENCH)
    elif settings.sim == "rlbench":
        settings.image_size = recording_protocol(settings).image_size
        if settings.demos is None:
            settings.demos = settings.scenes  # here a scene has one demonstration anyway
    else:
        refuse_options(settings, (*ONLY_RLBENCH, "variations"))
        settings.image_size = settings.image_size or (64, 64)
        if not set(settings.cameras) <= set(CAMERAS):
            raise UserError(f"The embedded simulator's cameras are {', '.join(CAMERAS)}.")
    if settings.demos is None and settings.scenes is None:
        settings.demos = 50
    check_number("--film", settings.film, 0, 100)
    if settings.film and not embedded:
        raise UserError("--film is for the embedded simulator.")
    for name, count in (("--demos", settings.demos), ("--scenes", settings.scenes)):
        if count is not None:
            check_number(name, count, 1, MAX_SCENES)
    if len(settings.image_size) > 2 or not settings.cameras:
        raise UserError("--image-size takes one or two numbers, --cameras at least one name.")
    for pixels in settings.image_size:
        check_number("--image-size", pixels, 1, MAX_HEIGHT if embedded else MAX_SIZE)
    check_number("--seed", settings.seed, 0, MAX_SEED)
    check_number("--workers", settings.workers, 1, 1024)


def check_recorded(folder: Path, settings: Settings, robot: str | None):
    """Raise a UserError if an episode that is there has other images, or is of another robot.

    robot: None: any.
    """
    recorded = sorted(folder.glob("*/[!.]*.hdf5"))
    if not recorded:
        return
    episode = read_episode(recorded[0], images=False)
    if robot is not None and episode.robot != robot:
        raise UserError(f"{recorded[0]} is of {episode.robot}, not {robot}: use another --run.")
    wanted = dict.fromkeys(settings.cameras, settings.image_size)
    if settings.image_size and episode.image_sizes != wanted:
        theirs = f"{recorded[0]} has images of {episode.image_sizes} pixels"
        raise UserError(f"{theirs}, not {wanted}: use another --run.")


# -------------------------------------------------------------------------------------------- main
def collect(settings: Settings):
    """Make the episodes, and print what became of the attempts at each task."""
    check_settings(settings)
    folder = settings.run / "episodes"
    make_context = Simulators
    start = None
    robot = None
    if settings.from_rlbench is not None:
        jobs = dataset_jobs(settings, folder)
        make_context = None
    elif settings.sim == "rlbench":
        jobs = rlbench_jobs(settings, folder)
        start = "spawn"  # CoppeliaSim does not survive a fork
    else:
        jobs = embedded_jobs(settings, folder)
        robot = settings.robot
        choose_renderer()  # once, for all workers
    check_recorded(folder, settings, robot)

    attempts = {job[1]: [] for job in jobs}
    results = run_in_parallel(
        jobs, settings.workers, "episodes", "episode", make_context=make_context, start=start
    )
    failed = []
    for job, result in results:
        outcomes = [CRASH] if result is None else result
        attempts[job[1]] += outcomes
        if any(outcomes):
            failed.append(job)

    faults = Counter()
    for task_folder, outcomes in attempts.items():
        print(summary(task_folder, outcomes))
        faults.update(outcome for outcome in outcomes if outcome is not None)
    if settings.from_rlbench is not None:
        faults.update(not_importable(settings.from_rlbench, settings.tasks))
        if faults:
            raise UserError("\n".join(sorted(faults)))
    for reason, count in faults.most_common(MAX_REASONS):
        print(f"{count} times: {reason}")
    if settings.film:
        tried = [(*attempt_of(job[1].name, *job[2:4]), job in failed) for job in jobs]
        film_demonstrations(settings.run / "films", tried, settings.film, settings.workers, robot)


def summary(folder: Path, outcomes: list[str | None]) -> str:
    """One line about the attempts at a task."""
    count = len(list(folder.glob("[!.]*.hdf5")))
    result = "nothing left to record"
    if outcomes:
        rate = outcomes.count(None) / len(outcomes)
        result = f"{rate:.1%} of {len(outcomes)} attempts succeeded"
    return f"{folder.name}: {result}; {count} episodes in {folder}"


def main():
    settings = tyro.cli(Settings, description=__doc__)
    collect(settings)


if __name__ == "__main__":
    run_stage(main)
