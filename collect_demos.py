"""Stage 0: demonstrations by a scripted expert, one HDF5 episode each.

In:   the tasks of sims/mujoco_panda.py (their waypoints).
Out:  <run>/episodes/<task>/<seed>_<variation>.hdf5, see episodes.py; only successful attempts are kept.
Run:  python collect_demos.py                                      what `make demo` trains on
      python collect_demos.py --tasks open_drawer --scenes 20 --run runs/drawer

Each scene (seed) is recorded once for every object that the instruction can name: the same picture, other words, another
target, so that the words decide. Demonstrations begin anywhere over the table and, every second one, near the object: a
painter that has only seen one path continues the arm's path instead of looking, and one that has never been a little off
the path never comes back to it. Stopped in the middle, the script goes on where it was.
"""

import os
import signal
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process per core does the work; numpy's threads would fight

import numpy as np
import tyro
from tqdm import tqdm

from episodes import CAMERAS, Episode, UserError, find_episodes, read_episode, run_stage, write_episode
from sims.mujoco_panda import CONTROL_HZ, TASKS, PandaEnv, rotation_from, rotation_vector

JOINT_SPEED = 1.2  # rad/s, about half of what the arm can do (Franka's data sheet: 2.2 to 2.6)


@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """Folder of the run; episodes go to <run>/episodes."""
    tasks: tuple[str, ...] = ("reach_target", "push_button", "pick_and_lift")
    """Which tasks to record."""
    scenes: int = 300
    """Scenes per task. Each gives one episode per object that the instruction can name (three)."""
    image_size: int = 64
    """Height and width of the pictures, pixels."""
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
        while steps:  # more steps until no joint is too fast (inverse kinematics may turn a short line into a long turn)
            path, previous = [], joints
            for fraction in np.arange(1, steps + 1) / steps:
                pose = rotation_from(fraction * turn) @ start[:3, :3]
                path.append(env.ik(start[:3, 3] + fraction * (move.position - start[:3, 3]), pose, previous))
                previous = path[-1]
            fastest = np.abs(np.diff([joints, *path], axis=0)).max() * CONTROL_HZ
            if fastest <= JOINT_SPEED:
                break
            steps = max(steps + 1, int(np.ceil(steps * fastest / JOINT_SPEED)))
            if steps > 200:
                raise UserError(f"No way to {np.round(move.position, 3)} below {JOINT_SPEED} rad/s.")
        else:
            path = []
        joints = path[-1] if path else joints
        target = np.block([[rotation, np.reshape(move.position, (3, 1))], [0, 0, 0, 1]])
        for position in path + [joints] * move.dwell:
            yield np.append(position, move.gripper)


def record(env, task, seed, variation, start):
    """One attempt: the whole demonstration, whether or not it succeeds. Returns an Episode without a path."""
    observation, info = env.reset(seed=seed, options={"variation": variation, "start": start})
    rows = {"qpos": [], "qvel": [], "action": [], "joint_poses": []}
    images, extrinsics = {c: [] for c in env.cameras}, {c: [] for c in env.cameras}
    for action in demonstration(env):
        rows["qpos"].append(observation["qpos"])
        rows["qvel"].append(observation["qvel"])
        rows["action"].append(action)
        rows["joint_poses"].append(env.joint_poses())
        for camera in env.cameras:
            images[camera].append(observation["images"][camera])
            extrinsics[camera].append(env.camera(camera)[1])
        observation, _, _, _, info = env.step(action)
    return Episode(
        path=None, task=task, variation=variation, instruction=info["instruction"], instructions=info["instructions"],
        success=info["success"], fps=float(CONTROL_HZ), robot="fr3", sim=True, seed=seed,
        **{name: np.asarray(values, dtype=np.float32) for name, values in rows.items()},
        images={camera: np.stack(pictures) for camera, pictures in images.items()},
        intrinsics={camera: env.camera(camera)[0] for camera in env.cameras},
        extrinsics={camera: np.stack(poses) for camera, poses in extrinsics.items()},
    )  # fmt: skip


_env = {}  # one environment per task and process


def record_scene(folder, task, seed, image_size):
    """All variations of one scene that are not on disk yet. Returns (task, attempts, successes)."""
    if task not in _env:
        _env[task] = PandaEnv(task, image_size, CAMERAS)
        _env[task].render()  # a machine that cannot draw says so here, instead of failing in every attempt
    attempts = successes = 0
    for variation in range(_env[task].task.candidates):
        path = folder / task / f"{seed:07d}_{variation:02d}.hdf5"
        if path.exists():
            continue
        attempts += 1
        try:
            episode = record(_env[task], task, seed, variation, ("anywhere", "near")[(seed + variation) % 2])
        except UserError:  # a waypoint out of reach: a failed attempt, not a broken program
            continue
        if episode.success:
            successes += 1
            write_episode(path, episode)
    return task, attempts, successes


def main():
    settings = tyro.cli(Settings, description=__doc__)
    unknown = [task for task in settings.tasks if task not in TASKS]
    if unknown:
        raise UserError(f"There is no task '{unknown[0]}'; choose from {', '.join(TASKS)}.")
    if min(settings.scenes, settings.image_size, settings.workers) < 1:
        raise UserError("--scenes, --image-size and --workers must be 1 or more.")
    folder, size = settings.run / "episodes", (settings.image_size, settings.image_size)
    for path in find_episodes(folder)[:1] if any(folder.glob("*/*.hdf5")) else ():
        if set(sizes := read_episode(path, images=False).image_sizes.values()) != {size}:
            raise UserError(f"{path} has pictures of {', '.join(map(str, set(sizes)))} pixels, not {size}: use another --run.")
    for task in settings.tasks:
        (folder / task).mkdir(parents=True, exist_ok=True)
    scenes = [(task, settings.seed + i) for i in range(settings.scenes) for task in settings.tasks]
    counts = {task: np.zeros(2, int) for task in settings.tasks}
    ignore_interrupt = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is this process's business, not the workers'
    with ProcessPoolExecutor(settings.workers, initializer=signal.signal, initargs=ignore_interrupt) as pool:
        jobs = [pool.submit(record_scene, folder, task, seed, settings.image_size) for task, seed in scenes]
        try:
            for job in tqdm(as_completed(jobs), total=len(jobs), desc="scenes", unit="scene"):
                task, attempts, successes = job.result()
                counts[task] += attempts, successes
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for task, (attempts, successes) in counts.items():
        rate = f"{successes / attempts:.1%} of {attempts} attempts succeeded" if attempts else "nothing left to record"
        print(f"{task}: {rate}; {len(list((folder / task).glob('*.hdf5')))} episodes in {folder / task}")


if __name__ == "__main__":
    run_stage(main)
