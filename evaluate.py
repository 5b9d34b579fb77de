"""Stage 4: closed loop. Does the robot do what it is told, in scenes that no network has seen?

    In:   runs/demo/controlnet/ and runs/demo/act/    (train_controlnet.py, train_act.py)
    Out:  runs/demo/evaluation/evaluation.json        per task: successes, interval, every outcome
          runs/demo/evaluation/<task>_people.mp4      a film; what the networks see: <task>.mp4
          runs/demo/evaluation/success.png, <task>.png

    python evaluate.py                                the tasks of runs/demo/episodes, 50 scenes
    python evaluate.py --tasks pick_and_lift --seed 1000      one task, other scenes
    python evaluate.py --policy oracle                true spheres: the controller's upper bound
    python evaluate.py --policy act                   ACT on plain views (runs/demo/act_rgb)
    python evaluate.py --policy variations/train_points.py:policy     a policy of your own
    python evaluate.py --perturb table                the table in colours never seen (six kinds)
    python evaluate.py --recorded --run runs/mine     held-out recordings; no simulator is needed
    python evaluate.py --sim rlbench --tasks open_box         in RLBench (requirements-rlbench.txt)
    python evaluate.py --protocol paper --run runs/rlbench    the paper's 25 tasks in RLBench

For a policy of your own, function(run, device) is called with the run's folder and "cuda", "mps" or
"cpu". It returns an object with cameras, image_size and act(images, qpos, instruction), as
genima/policy.py describes it. The results are named after the file.

The same command resumes where it was stopped; only filmed episodes run again.

Paper, sections 3.3 and 4: look, paint the target spheres, let the controller turn the painted views
into a chunk of joint positions, execute the beginning of the chunk, look again.
"""

import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process per core; threads would compete

import torch
import tyro

from genima.checkpoints import (
    MAKE_ONE,
    check_policy,
    choose_device,
    last_steps,
    load_networks,
    note_unseen_tasks,
    resolve_folders,
)
from genima.episodes import find_episodes
from genima.files import UserError, run_stage
from genima.language import check_language
from genima.parallel import run_in_parallel, usable_cores
from genima.policy import OraclePolicy, before_episode, rollout
from genima.recorded import evaluate_recorded
from genima.report import FinishedJobs, make_report, print_table, results_name, write_results
from sims import Simulators
from sims.coppeliasim import task_class
from sims.demonstrator import record_demonstration
from sims.mujoco_panda import CONTROL_HZ
from sims.mujoco_tasks import check_task
from sims.perturbed_panda import PERTURBATIONS
from sims.rlbench_dataset import HZ, find_demonstrations
from sims.rlbench_panda import NoSceneError
from sims.rlbench_protocol import PAPER_TASKS, choose_protocol, refuse_options
from sims.show import Recording, write_people_films

LANGUAGE_TASKS = ("push_button", "pick_and_lift")  # whose objects differ in colour alone
ATTEMPTS = 10  # RLBench: scenes to try for an episode, as not every scene has room for its task
LEAST = {"episodes": 1, "execution_horizon": 1, "workers": 1, "checkpoints": 1}
LEAST |= {"seed": 0, "language": 0, "videos": 0}
PAPER = """The paper (arXiv 2407.07875): better than ACT on 16 of 25 tasks and than Diffusion Policy
on all 25, 64 % of the episodes of 9 tasks of a real robot. Its 25 tasks may not all be these."""


@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """Folder of the run: controlnet/ and act/ inside it are read, evaluation/ is written."""
    tasks: tuple[str, ...] = ()
    """Which tasks; none named: those that were recorded in <run>/episodes."""
    sim: Literal["mujoco", "rlbench"] | None = None
    """mujoco: the embedded simulator, the default; rlbench: RLBench, the default of the paper's
    protocol."""
    protocol: Literal["paper"] | None = None
    """paper: 25 tasks of RLBench, variation 0, OpenGL, 20 steps of each chunk, mean of the last 3
    checkpoints; with --demos in the scenes of recorded demonstrations, as the paper's."""
    demos: Path | None = None
    """For rlbench: root of a dataset whose demonstrations' scenes are laid out again."""
    variation: int | None = None
    """For rlbench: of every task; drawn in each episode by default, 0 in the paper."""
    renderer: Literal["opengl", "opengl3"] | None = None
    """For rlbench, as in training: opengl3 (shadows) by default, opengl in the paper."""
    max_steps: int | None = None
    """For rlbench: steps of an episode at most, 200 by default."""
    checkpoints: int | None = None
    """Average over the last so many step-<N>/ in controlnet/ and act/ (written with --keep). 1:
    the networks in these folders themselves, the default without a protocol."""
    episodes: int = 50
    """Episodes per task (paper: 50)."""
    seed: int = 0
    """Seed of the first scene; the next scene's is one more. Recorded scenes are refused."""
    policy: str = "genima"
    """genima: painter and controller; act: the controller on plain views; oracle: the controller
    with true spheres; or FILE:FUNCTION, which is called as function(run, device)."""
    execution_horizon: int | None = None
    """Steps of each chunk to execute before looking again: 8 by default, 20 in the paper."""
    drop_state: bool = False
    """Leave the joint state out of the controller's input."""
    recorded: bool = False
    """No simulator: measure on held-out recorded demonstrations (genima/recorded.py)."""
    perturb: Literal[PERTURBATIONS] | None = None
    """What looks different from training in every episode (sims/perturbed_panda.py)."""
    language: int = 50
    """Scenes in which each object is named once, to see where the gripper is painted; 0: none."""
    videos: int = 1
    """Episodes in each task's film."""
    trace: bool = False
    """Write each failed episode's steps to trace_<task>_<seed>.csv: look there first."""
    controller: Path | None = None
    """The controller's folder, if it is not <run>/act (for --policy act: <run>/act_rgb)."""
    painter: Path | None = None
    """The painter's folder, if it is not <run>/controlnet, or its name on the Hugging Face Hub."""
    size: Literal["tiny", "small", "sd-turbo"] | None = None
    """Refuse a painter of another size."""
    taesd: str | None = None
    """For sd-turbo: a tiny autoencoder that decodes faster than its own (madebyollin/taesd)."""
    compile: bool = False
    """For sd-turbo: compile the networks for this GPU; takes a minute, then each step is faster."""
    out: Path | None = None
    """Folder for the results, if it is not <run>/evaluation."""
    workers: int = field(default_factory=usable_cores)
    """Processes; the results do not depend on how many."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where the networks run; auto takes a GPU where there is one."""


# ---------------------------------------------------------------------------------------- episodes
class Workspace:
    """What one process keeps between its episodes: networks and environments."""

    def __init__(self, checkpoints: list[Settings]):
        torch.set_num_threads(1)  # the results must not depend on the number of processes
        self.checkpoints = checkpoints
        self.networks = {}  # of the last checkpoint, by its number
        self.simulators = Simulators()

    def policy(self, checkpoint: int, task: str):
        """The policy of a checkpoint. Its networks are loaded once; only the last ones are kept."""
        settings = self.checkpoints[checkpoint]
        if checkpoint not in self.networks:
            self.networks = {checkpoint: load_networks(settings)}
        networks = self.networks[checkpoint]
        if settings.policy == "oracle":
            return OraclePolicy(networks, partial(self.demonstrate, task), settings.drop_state)
        return networks

    def demonstrate(self, task, env):
        """The scripted demonstration of the scene in env. Raises UserError if out of reach."""
        blind = self.simulators.get(task, 0, (), robot=env.robot)
        return record_demonstration(blind, task, env.seed, env.variation, start="anywhere")


def run_episode(workspace, checkpoint, task, seed):
    """One episode in closed loop -> its outcome and log, as rollout gives them."""
    settings = workspace.checkpoints[checkpoint]
    policy = workspace.policy(checkpoint, task)
    protocol = choose_protocol(settings)
    sim = settings.perturb or settings.sim
    env = workspace.simulators.of_policy(policy, task, sim, protocol)
    number = seed - settings.seed
    film = number < settings.videos
    watch = Recording() if film and settings.sim == "mujoco" else None
    attempts = 1
    options = {}
    if settings.demos:  # their scenes, spread over all variations
        scenes = find_demonstrations(settings.demos, (task,), protocol.variations)
        options["demonstration"] = scenes[number * len(scenes) // settings.episodes]
    elif settings.sim == "rlbench":
        attempts = ATTEMPTS
    for attempt in range(attempts):
        scene = seed + attempt * settings.episodes
        outcome, log = rollout(env, policy, scene, options, settings.execution_horizon, film, watch)
        if watch is not None:
            log["moments"] = watch.moments
        if not outcome.get("error", "").startswith(NoSceneError.__name__):
            if attempt:
                outcome["failed_resets"] = attempt
            return outcome, log
    outcome["failed_resets"] = attempts
    return outcome | {"seed": seed}, log


def run_language_check(workspace, checkpoint, task, seed):
    """One scene -> for each of its objects, whether naming it moves the painted gripper there."""
    policy = workspace.policy(checkpoint, task)
    env = workspace.simulators.of_policy(policy, task)
    demonstrate = partial(workspace.demonstrate, task)
    horizon = policy.controller.config["horizon"]
    return check_language(env, policy.painter, demonstrate, horizon, seed)


# ----------------------------------------------------------------------------------------- settings
def resolve_settings(settings: Settings) -> list[Settings]:
    """Fill in the settings that follow from others -> one Settings for each checkpoint.

    The last checkpoint comes first; painter and controller are paired from there backwards. Raises
    UserError for what cannot be evaluated.
    """
    is_paper = settings.protocol == "paper"
    if settings.sim is None:
        settings.sim = "rlbench" if is_paper else "mujoco"
    if settings.checkpoints is None:
        settings.checkpoints = 3 if is_paper else 1
    settings.execution_horizon = choose_protocol(settings).execution_horizon
    if settings.policy != "genima" or settings.sim == "rlbench" or settings.perturb:
        settings.language = 0  # nothing is painted, or nobody knows where it belongs
    check_options(settings)
    resolve_tasks(settings)
    settings.device = choose_device(settings.device)
    folders = resolve_folders(settings)
    note_unseen_tasks(settings.tasks, folders, settings.run)
    checkpoints = [settings]
    checkpoints += [replace(settings, videos=0)] * (settings.checkpoints - 1)
    if settings.checkpoints > 1:
        for name, folder in folders.items():
            steps = last_steps(folder, settings.checkpoints)
            checkpoints = [replace(one, **{name: step}) for one, step in zip(checkpoints, steps)]
    return checkpoints


def check_options(settings):
    """Raises UserError for an option that nothing can be done with."""
    for name, least in LEAST.items():
        most = {"seed": 2**31, "workers": 1024}.get(name, 10**6)
        if not least <= getattr(settings, name) <= most:
            raise UserError(f"--{name.replace('_', '-')} must be {least} or more, up to {most}.")
    check_policy(settings.policy)
    rlbench = settings.sim == "rlbench"
    if rlbench and (settings.policy == "oracle" or settings.perturb):
        raise UserError("--policy oracle and --perturb are for the embedded simulator.")
    if not rlbench:
        refuse_options(settings, ("demos", "variation", "renderer", "max_steps"))
    elif settings.protocol and not settings.demos:
        print("Note: these scenes are new; the paper's are those of demonstrations (--demos).")


def resolve_tasks(settings):
    """Fill in the tasks if none are named. Raises UserError for unknown tasks, seen scenes."""
    rlbench = settings.sim == "rlbench"
    folder = settings.run / "episodes"
    if settings.protocol and rlbench and not settings.tasks:
        settings.tasks = PAPER_TASKS
    if not settings.tasks and not folder.is_dir():
        raise UserError(f"There is no {folder} to take the tasks from: name --tasks. {MAKE_ONE}")
    recorded = []
    if folder.is_dir():
        recorded = find_episodes(folder)
    known = [path.parent.name for path in recorded]
    if not settings.tasks:
        settings.tasks = tuple(known)
    settings.tasks = tuple(dict.fromkeys(settings.tasks))  # each one once
    for task in settings.tasks:
        if rlbench:
            task_class(task)  # raises UserError if there is none
        else:
            check_task(task)
        if settings.demos:
            find_demonstrations(settings.demos, (task,), choose_protocol(settings).variations)
    last = settings.seed + max(settings.episodes, settings.language) - 1
    for path in recorded:
        seed = path.name.split("_")[0]
        if path.parent.name not in settings.tasks or not seed.isdigit():
            continue
        if settings.seed <= int(seed) <= last:
            raise UserError(
                f"Seed {int(seed)} was recorded in {path}, so its scene is not unseen: choose "
                "another --seed."
            )


# ------------------------------------------------------------------------------------------ results
def run_jobs(checkpoints, finished: FinishedJobs) -> tuple[dict, list]:
    """All episodes and language checks -> {task: [(outcome, log), ...]}, [is correct, ...].

    The episodes of a task come from one checkpoint after the other.
    """
    settings = checkpoints[0]
    seeds = range(settings.seed, settings.seed + settings.episodes)
    jobs = []
    for number in range(len(checkpoints)):
        jobs += [(run_episode, number, task, seed) for task in settings.tasks for seed in seeds]
    for seed in range(settings.seed, settings.seed + settings.language):
        tasks = [task for task in LANGUAGE_TASKS if task in settings.tasks]
        jobs += [(run_language_check, 0, task, seed) for task in tasks]

    start = "spawn"  # neither CUDA nor CoppeliaSim survives a fork
    if settings.device == "cpu" and settings.sim == "mujoco":
        start = None
    todo = [job for job in jobs if job not in finished]
    make_context = partial(Workspace, checkpoints)
    for job, result in run_in_parallel(
        todo, settings.workers, "evaluating", "episode", make_context, start
    ):
        is_film = job[0] is run_episode and result and result[1]["frames"]
        finished.add(job, result, keep=result is not None and not is_film)

    episodes = {task: [] for task in settings.tasks}
    language = []
    for job in jobs:
        function, _, task, seed = job
        result = finished.result(job)
        if function is run_language_check:
            language += result or []
        elif result is None:
            outcome, log = before_episode(seed)
            outcome["error"] = "the simulator crashed"
            episodes[task].append((outcome, log))
        else:
            episodes[task].append(result)
    return episodes, language


def evaluate(checkpoints: list[Settings]):
    """Drive everything, write and print the results. checkpoints: from resolve_settings."""
    settings = checkpoints[0]
    name = results_name(settings)
    finished = FinishedJobs(settings.out / name, checkpoints)
    episodes, language = run_jobs(checkpoints, finished)
    report = make_report(checkpoints, episodes, language)
    fps = HZ if settings.sim == "rlbench" else CONTROL_HZ
    write_results(settings, name, report, episodes, fps)
    write_people_films(settings, name, episodes)
    finished.remove()
    print_table(report)
    if settings.protocol:
        print(PAPER)
    print(f"Everything is in {settings.out}.")


def main():
    settings = tyro.cli(Settings, description=__doc__)
    if settings.recorded:
        evaluate_recorded(settings)
    else:
        evaluate(resolve_settings(settings))


if __name__ == "__main__":
    run_stage(main)
