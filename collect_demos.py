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
from functools import cache
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process per core does the work; numpy's threads would fight

import numpy as np
import tyro

from episodes import CAMERAS, Episode, UserError, read_episode, run_stage, write_episode
from sims.mujoco_panda import CONTROL_HZ, PandaEnv, rotation_vector
from sims.mujoco_tasks import check_task, rotation_from
from sims.parallel import in_parallel
from sims.perturbed_panda import PERTURBATIONS, PerturbedEnv
from sims.rlbench_dataset import find_demonstrations, read_demonstration
from sims.rlbench_panda import NoSceneError, RLBenchEnv, import_rlbench, task_class

JOINT_SPEED = 1.2  # rad/s, about half of what the arm can do (Franka's data sheet: 2.2 to 2.6)


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


def demonstration(env):
    """The scripted expert from the present state: yields one action (8,) per control step.

    Straight lines of the tool between the task's waypoints, at bounded tool and joint speed, through inverse kinematics.
    Raises UserError when a waypoint is out of reach.
    """
    target = env.tool()
    joints = env.data.qpos[:7].copy()
    for move in env.task.plan(env):
        start, rotation = target, target[:3, :3] if move.rotation is None else move.rotation
        distance = np.linalg.norm(move.position - start[:3, 3])
        turn = rotation_vector(rotation @ start[:3, :3].T)
        steps = int(np.ceil(max(distance / move.speed, np.linalg.norm(turn) / 1.5) * CONTROL_HZ))
        path = [joints]
        while steps:  # more steps until no joint is too fast (inverse kinematics may turn a short line into a long turn)
            path = [joints]
            for fraction in np.arange(1, steps + 1) / steps:
                pose = rotation_from(fraction * turn) @ start[:3, :3]
                path.append(env.ik(start[:3, 3] + fraction * (move.position - start[:3, 3]), pose, path[-1]))
            fastest = np.abs(np.diff(path, axis=0)).max() * CONTROL_HZ
            if fastest <= JOINT_SPEED:
                break
            steps = max(steps + 1, int(np.ceil(steps * fastest / JOINT_SPEED)))
            if steps > 200:
                raise UserError(f"No way to {np.round(move.position, 3)} below {JOINT_SPEED} rad/s.")
        joints = path[-1]
        target = np.block([[rotation, np.reshape(move.position, (3, 1))], [0, 0, 0, 1]])
        for position in path[1:] + [joints] * move.dwell:
            yield np.append(position, move.gripper)


def record(env, task, seed, variation, start):
    """One attempt: the whole demonstration, whether or not it succeeds. Returns an Episode without a path."""
    observation, info = env.reset(seed=seed, options={"variation": variation, "start": start})
    frames = []
    for action in demonstration(env):
        frames.append((observation, action, env.joint_poses(), {camera: env.camera(camera)[1] for camera in env.cameras}))
        observation, _, _, _, info = env.step(action)
    observations, actions, joint_poses, extrinsics = zip(*frames)
    return Episode(
        path=None, task=task, variation=variation, instruction=info["instruction"], instructions=info["instructions"],
        success=info["success"], fps=float(CONTROL_HZ), robot="fr3", sim=True, seed=seed,
        qpos=np.stack([seen["qpos"] for seen in observations]), qvel=np.stack([seen["qvel"] for seen in observations]),
        action=np.array(actions, np.float32), joint_poses=np.stack(joint_poses),
        images={camera: np.stack([seen["images"][camera] for seen in observations]) for camera in env.cameras},
        intrinsics={camera: env.camera(camera)[0] for camera in env.cameras},
        extrinsics={camera: np.stack([poses[camera] for poses in extrinsics]) for camera in env.cameras},
    )  # fmt: skip


@cache
def environment(task, image_size, cameras, sim=None, images=False):
    """One environment per task and process; sim: mujoco, rlbench, or a perturbation. Without images, pictures are taken when looked at."""
    if sim in PERTURBATIONS:
        return PerturbedEnv(sim, task, image_size, cameras, images)
    return (RLBenchEnv if sim == "rlbench" else PandaEnv)(task, image_size, cameras, images)


def record_rlbench(folder, task, seeds, image_size, cameras):
    """One demonstration by RLBench's planner, of the first of these seeds for which there is one. Returns attempts, successes."""
    if any(list((folder / task).glob(f"{seed:07d}_*.hdf5")) for seed in seeds):
        return 0, 0
    for attempts, seed in enumerate(seeds, 1):
        try:
            episode = environment(task, image_size, cameras, "rlbench", True).demonstrate(seed)
        except NoSceneError:  # no place for the task, or no path: a failed attempt, not a broken program
            continue
        write_episode(folder / task / f"{seed:07d}_{episode.variation:02d}.hdf5", episode)
        return attempts, 1
    return len(seeds), 0


def record_scene(folder, task, seed, image_size):
    """All variations of one scene that are not on disk yet. Returns attempts, successes."""
    env, attempts, successes = environment(task, image_size, CAMERAS, images=True), 0, 0
    env.render()  # a machine that cannot draw says so here, instead of failing in every attempt
    for variation in range(env.task.candidates):
        path = folder / task / f"{seed:07d}_{variation:02d}.hdf5"
        if path.exists():
            continue
        attempts += 1
        try:
            episode = record(env, task, seed, variation, ("anywhere", "near")[(seed + variation) % 2])
        except UserError:  # a waypoint out of reach: a failed attempt, not a broken program
            continue
        if episode.success:
            successes += 1
            write_episode(path, episode)
    return attempts, successes


def import_episode(source, path, cameras, size):
    """One demonstration of a dataset. Returns (is it new, what is wrong with it)."""
    if path.exists():
        return False, None
    try:
        write_episode(path, read_demonstration(source, cameras, size))
    except UserError as error:
        return False, str(error)
    return True, None


def import_dataset(settings, folder, size):
    """Turn a dataset of RLBench into episodes."""
    jobs, counts, broken = [], {}, set()
    for source in find_demonstrations(settings.from_rlbench, settings.tasks, settings.variations, settings.scenes):
        task, variation, number = source.parents[2].name, int(source.parents[1].name[9:]), int(source.name[7:])
        path = folder / task / f"episode{number:03d}_variation{variation:02d}.hdf5"
        jobs.append((import_episode, source, path, settings.cameras, size))
    for (_, _, path, *_), result in in_parallel(jobs, settings.workers, "importing", "demonstration"):
        new, error = result or (False, "A process of the import died: run the same command again.")
        counts[path.parent] = counts.get(path.parent, 0) + new
        broken |= {error} - {None}
    for target, new in sorted(counts.items()):
        print(f"{target.name}: {new} new episodes; {len(list(target.glob('[!.]*.hdf5')))} in {target}")
    if broken:
        raise UserError("\n".join(sorted(broken)))


def main():
    settings = tyro.cli(Settings, description=__doc__)
    rlbench, scenes = settings.sim == "rlbench", settings.scenes
    if min(number for number in (scenes, settings.image_size, settings.workers, settings.seed + 1) if number is not None) < 1:
        raise UserError("--scenes, --image-size and --workers must be 1 or more, and --seed 0 or more.")
    folder, size = settings.run / "episodes", settings.image_size or (None if settings.from_rlbench else 128 if rlbench else 64)
    for path in sorted(folder.glob("*/[!.]*.hdf5"))[:1]:  # what a killed process left half-written begins with a dot
        if size and set(sizes := read_episode(path, images=False).image_sizes.values()) != {(size, size)}:
            raise UserError(f"{path} has pictures of {', '.join(map(str, set(sizes)))} pixels, not {(size, size)}: use another --run.")
    if settings.from_rlbench:
        return import_dataset(settings, folder, size and (size, size))
    tasks = tuple(dict.fromkeys(settings.tasks or ("reach_target", "push_button", "pick_and_lift")))
    if rlbench:
        for task in tasks:
            task_class(import_rlbench().tasks, task)
        count = scenes or 50
        seeds = lambda i: tuple(settings.seed + i + attempt * count for attempt in range(5))  # noqa: E731
        jobs = [(record_rlbench, folder, task, seeds(i), size, settings.cameras) for task in tasks for i in range(count)]
    else:
        for task in tasks:
            check_task(task)
        jobs = [(record_scene, folder, task, settings.seed + i, size) for i in range(scenes or 300) for task in tasks]
    for task in tasks:
        (folder / task).mkdir(parents=True, exist_ok=True)
    counts, crashes = {task: np.zeros(2, int) for task in tasks}, 0
    for (_, _, task, *_), result in in_parallel(jobs, settings.workers, "scenes", "scene", "spawn" if rlbench else None):
        counts[task] += result or (0, 0)
        crashes += result is None
    for task, (attempts, successes) in counts.items():
        rate = f"{successes / attempts:.1%} of {attempts} attempts succeeded" if attempts else "nothing left to record"
        print(f"{task}: {rate}; {len(list((folder / task).glob('[!.]*.hdf5')))} episodes in {folder / task}")
    if crashes:
        print(f"In {crashes} scenes the simulator crashed twice; run the same command again to try them once more.")


if __name__ == "__main__":
    run_stage(main)
