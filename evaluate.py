"""Stage 4: closed loop. Does the robot do what the instruction says, in scenes that no network has seen?

In:   runs/demo/controlnet/ and runs/demo/act/        (train_controlnet.py, train_act.py)
Out:  runs/demo/evaluation/evaluation.json            per task: successes, interval, steps, milliseconds, every outcome
      runs/demo/evaluation/success.png, <task>.mp4, <task>.png

    python evaluate.py                                          the tasks of runs/demo/episodes, 50 episodes each
    python evaluate.py --tasks pick_and_lift --seed 1000        one task, other scenes
    python evaluate.py --policy oracle                          spheres from a demonstration: the controller's upper bound
    python evaluate.py --perturb table                          the table's top in colours that training never showed (six kinds)
    python evaluate.py --policy act                             no spheres: ACT on the plain pictures (runs/demo/act_rgb)
    python evaluate.py --sim rlbench --tasks open_box           in RLBench (requirements-rlbench.txt)
    python evaluate.py --protocol paper --run runs/rlbench      in RLBench as the paper does: 25 tasks, the last three checkpoints

Paper, sections 3.3 and 4: look, paint the target spheres, let the controller turn the painted picture into a chunk of joint
positions, run the beginning of the chunk, look again.
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # one process per core does the work; threads would fight

import numpy as np
import torch
import tyro

from genima.act import Controller
from genima.episodes import find_episodes
from genima.files import UserError, run_stage, write_whole
from genima.painter import load_painter
from genima.parallel import run_in_parallel
from genima.plots import PANEL, tile, write_bars, write_film
from genima.policy import Oracle
from sims import make_env
from sims.demonstrator import record_oracle
from sims.mujoco_panda import CONTROL_HZ, render_cameras
from sims.mujoco_tasks import check_task
from sims.perturbed_panda import PERTURBATIONS
from sims.rlbench_dataset import HZ, find_demonstrations
from sims.rlbench_panda import PAPER_TASKS, NoSceneError, import_rlbench, task_class

LANGUAGE_TASKS = (
    "push_button",
    "pick_and_lift",
)  # where several objects differ in nothing but colour
ATTEMPTS = 10  # scenes to try in RLBench before an episode counts as failed: not every one has room for its task
TRACE = "step,tool x,tool y,tool z,object x,object y,object z,gripper,painted"  # columns of a trace
PAPER = """The paper (arXiv 2407.07875): GENIMA is better than ACT on 16 of 25 tasks and than Diffusion Policy on all 25, and
succeeds in 64 % of the episodes of 9 tasks of a real robot. Its 25 tasks may not all be these."""


@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """Folder of the run; controlnet/ and act/ inside it are read, evaluation/ is written."""
    tasks: tuple[str, ...] = ()
    """Which tasks; none named: those that were recorded in <run>/episodes."""
    sim: Literal["mujoco", "rlbench"] | None = None
    """mujoco: the embedded simulator, which is the default; rlbench: RLBench in CoppeliaSim, the default of the paper's protocol."""
    protocol: Literal["paper"] | None = None
    """paper: its 25 tasks, 50 episodes each of at most 200 steps, mean over the last three checkpoints."""
    demos: Path | None = None
    """Root of an RLBench dataset, whose demonstrations' scenes are laid out again (the paper's way); for --sim rlbench."""
    checkpoints: int | None = None
    """Over how many checkpoints to average, 3 for the paper's protocol, otherwise 1: <run>/controlnet and <run>/act themselves,
    or for more than one the last of the folders step-<N>/ inside them (--keep)."""
    episodes: int = 50
    """Episodes per task (paper: 50)."""
    seed: int = 0
    """Seed of the first episode's scene; the next one's is one more. Recorded scenes are refused."""
    policy: Literal["genima", "act", "oracle"] = "genima"
    """genima: painter and controller; act: the controller alone on plain pictures; oracle: the controller with true spheres."""
    execute: int = 8
    """Steps of each chunk to run before looking again."""
    drop_state: bool = False
    """Leave the joint state out of the controller's input."""
    perturb: Literal[PERTURBATIONS] | None = None
    """In the embedded simulator: what looks different in every episode, and was never seen in training (sims/perturbed_panda.py)."""
    language: int = 50
    """Scenes in which every object is named once, to see where the painted gripper goes; 0: no language check."""
    videos: int = 1
    """Episodes in each task's video."""
    trace: bool = False
    """Write a table of every failed episode's steps, trace_<task>_<seed>.csv: the first thing to look at when a policy fails."""
    controller: Path | None = None
    """The controller's folder, if it is not <run>/act (or <run>/act_rgb for --policy act)."""
    painter: Path | None = None
    """The painter's folder, if it is not <run>/controlnet, or its name on the Hugging Face Hub (user/name)."""
    size: Literal["tiny", "sd-turbo"] | None = None
    """Refuse a painter of another size; none named: whichever was trained."""
    taesd: str | None = None
    """For sd-turbo: folder or name of a tiny autoencoder that decodes faster than its own (madebyollin/taesd)."""
    compile: bool = False
    """For sd-turbo: have PyTorch compile the networks for this GPU, which takes a minute and makes each step faster."""
    out: Path | None = None
    """Folder for the results, if it is not <run>/evaluation."""
    workers: int = os.cpu_count()
    """Processes; the results do not depend on how many."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where the networks run; auto takes a GPU where there is one."""


@cache
def networks(policy, run, painting, folder, device, size=None, taesd=None, compile=False):
    """The painter (None without painting) and the controller of a policy, loaded once per process."""
    torch.set_num_threads(
        1
    )  # one process per core does the work, and the results do not depend on how many there are
    if callable(policy):  # a variation brings its own
        return policy(run, device)
    controller = Controller.load(folder, device)
    needed = "rgb" if policy == "act" else "spheres"
    if controller.config["observation"] != needed:
        raise UserError(
            f"{folder} was not trained with --observation {needed}, which --policy {policy} needs: give another --controller."
        )
    if policy != "genima":
        return None, controller
    painter = load_painter(painting, device, taesd, compile)
    theirs = painter.config | {"image_size": [painter.config["image_size"]] * 2}
    wanted = {what: controller.config[what] for what in ("cameras", "horizon", "image_size")} | (
        {"size": size} if size else {}
    )
    for what, value in wanted.items():
        if theirs[what] != value:
            raise UserError(
                f"{painting} was trained with {what} {theirs[what]}, where {folder} or --size wants {value}: train one again."
            )
    return painter, controller


def load_networks(settings):
    names = ("policy", "run", "painter", "controller", "device", "size", "taesd", "compile")
    return networks(*(getattr(settings, name) for name in names))


def nothing(seed):
    """Outcome and log of an episode that has not begun."""
    return ({"seed": seed, "variation": None, "instruction": None, "success": False, "steps": 0},
            {"paint": [], "control": [], "trace": [], "frames": []})  # fmt: skip


def drive(task, seed, settings):
    """One episode in closed loop. Returns its outcome, and a log: seconds, a row per step, frames of a film if one is wanted."""
    painter, controller = load_networks(settings)
    env = make_env(
        task,
        tuple(controller.config["image_size"]),
        tuple(controller.config["cameras"]),
        settings.perturb or settings.sim,
    )
    (outcome, log), options = nothing(seed), {}
    if settings.demos:  # spread over all variations
        scenes = find_demonstrations(settings.demos, (task,))
        options["demonstration"] = scenes[(seed - settings.seed) * len(scenes) // settings.episodes]
    for attempt in range(
        1 if settings.demos else ATTEMPTS
    ):  # a recorded scene has no other to try instead
        try:
            observation, info = env.reset(seed=seed + attempt * settings.episodes, options=options)
            break
        except NoSceneError as error:
            outcome["failed_resets"], reason = attempt + 1, str(error)
    else:
        return outcome | {"error": reason}, log
    outcome |= {
        "seed": env.seed,
        "variation": info["variation"],
        "instruction": info["instruction"],
    }
    try:
        oracle = (
            Oracle(record_oracle(task, seed, info["variation"]), controller.config["horizon"])
            if settings.policy == "oracle"
            else None
        )
    except UserError:  # out of the demonstrator's reach: counts as a failure
        return outcome, log

    film, done = seed < settings.seed + settings.videos, False
    while not done:
        images = painted = render_cameras(env)
        start = time.perf_counter()
        if painter:
            painted = painter.paint(
                {camera: image[None] for camera, image in images.items()}, [info["instruction"]]
            )
            painted = {camera: image[0] for camera, image in painted.items()}
        elif oracle:
            painted = oracle.paint(env, images, oracle.progress(observation["qpos"][:-1]))
        middle = time.perf_counter()
        seen = {camera: image[None] for camera, image in painted.items()}
        chunk = controller(
            seen, observation["qpos"][None], [info["instruction"]], settings.drop_state
        )[0]  # (K, D+1)
        log["paint"].append(middle - start)
        log["control"].append(time.perf_counter() - middle)
        chunk[:, -1] = chunk[:, -1] > 0.5
        chunk = np.clip(
            chunk, env.action_space.low, env.action_space.high
        )  # a network may overshoot a joint's limit by a hair
        panels = (
            np.concatenate([env.render_camera("front", PANEL, PANEL), tile(painted)], axis=1)
            if film
            else None
        )
        for i, action in enumerate(chunk[: settings.execute]):
            if film:
                log["frames"].append(
                    np.concatenate([panels, env.render_camera("front", PANEL, PANEL)], axis=1)
                )
            log["trace"].append(
                [env.steps, *env.tool_pose()[:3, 3], *env.task.focus(env), action[-1], int(i == 0)]
            )
            observation, _, terminated, truncated, info = env.step(action)
            if done := terminated or truncated:
                break
    if film:
        log["frames"].append(np.concatenate([panels, env.render_camera("front", PANEL, PANEL)], axis=1))
    return outcome | {"steps": env.steps} | {
        key: info[key] for key in ("success", "error") if key in info
    }, log


# ---------------------------------------------------------------------------------------------------- does language matter?
def gripper_spots(painted, images):
    """Where the painted gripper sphere is: the mean pixel (x, y) of what is cyan or yellow and was not there before.

    {camera: (H, W, 3)} twice -> (cameras without the wrist's, 2), NaN where nothing was painted.
    """
    spots = []
    for camera in painted:
        if camera == "wrist":  # the sphere is always near its middle
            continue
        now, before = painted[camera].astype(float), images[camera].astype(float)
        red, green, blue = np.moveaxis(now, -1, 0)
        gripper = np.maximum(np.minimum(green, blue) - red, np.minimum(red, green) - blue) > 80
        y, x = np.nonzero(gripper & (np.linalg.norm(now - before, axis=-1) > 60))
        spots.append([x.mean(), y.mean()] if len(x) else [np.nan, np.nan])
    return np.array(spots)


def listen(task, seed, settings):
    """One picture, every object named once. Returns, per instruction, whether the gripper was painted towards the named one."""
    painter, controller = load_networks(settings)
    env = make_env(
        task, tuple(controller.config["image_size"]), tuple(controller.config["cameras"])
    )
    instructions, truth = [], []
    for variation in range(env.task.candidates):
        _, info = env.reset(seed=seed, options={"variation": variation})
        images = render_cameras(env)
        try:
            oracle = Oracle(record_oracle(task, seed, variation), controller.config["horizon"])
        except UserError:
            return []  # without a demonstration there is no knowing where the sphere belongs
        instructions.append(info["instruction"])
        truth.append(gripper_spots(oracle.paint(env, images, 0), images))  # (cameras, 2)
    painted = painter.paint(
        {camera: np.repeat(image[None], len(truth), 0) for camera, image in images.items()},
        instructions,
    )
    correct = []
    for variation in range(len(truth)):
        spots = gripper_spots(
            {camera: batch[variation] for camera, batch in painted.items()}, images
        )
        distance = np.nan_to_num(np.linalg.norm(truth - spots, axis=-1), nan=env.width).mean(
            axis=1
        )  # (variations,) pixels
        correct.append(bool(np.isfinite(spots).any() and distance.argmin() == variation))
    return correct


# ------------------------------------------------------------------------------------------------------------- results
def rate(successes, episodes):
    """The rate and its 95 % interval (Wilson 1927): unlike the textbook's, right for few episodes and for rates near 0 and 1."""
    z, share = 1.959964, successes / episodes
    middle = (share + z**2 / (2 * episodes)) / (1 + z**2 / episodes)
    half = (
        z
        / (1 + z**2 / episodes)
        * np.sqrt(share * (1 - share) / episodes + z**2 / (4 * episodes**2))
    )
    return {
        "rate": share,
        "wilson_95": [
            round(float(max(middle - half, 0)), 4),
            round(float(min(middle + half, 1)), 4),
        ],
    }


def summary(outcomes, logs):
    """What evaluation.json says about one task."""
    failed, errors = (
        sum(outcome.get("failed_resets", 0) for outcome in outcomes),
        sum("error" in outcome for outcome in outcomes),
    )
    trouble = {"failed_resets": failed, "episodes_with_errors": errors} if failed or errors else {}
    steps = [outcome["steps"] for outcome in outcomes if outcome["success"]]
    milliseconds = lambda name: round(
        1000 * float(np.median(sum((log[name] for log in logs), []) or [0])), 2
    )  # noqa: E731
    return {
        "successes": len(steps), "episodes": len(outcomes), **rate(len(steps), len(outcomes)),
        "mean_steps": float(np.mean(steps)) if steps else None,
        "paint_ms": milliseconds("paint"), "control_ms": milliseconds("control"), **trouble, "outcomes": outcomes,
    }  # fmt: skip


def print_table(report):
    print(
        f"\n{'task':<24}{'success':>10}{'rate':>7}{'95 % interval':>16}{'steps':>7}{'paint':>10}{'control':>10}"
    )
    for name, task in report["tasks"].items():
        (low, high), steps = (
            task["wilson_95"],
            "-" if task["mean_steps"] is None else f"{task['mean_steps']:.0f}",
        )
        print(
            f"{name:<24}{task['successes']:>4} of {task['episodes']:<3}{task['rate']:>6.0%}{f'{low:.0%} to {high:.0%}':>16}{steps:>7}"
            f"{task['paint_ms']:>7.1f} ms{task['control_ms']:>7.1f} ms"
        )
        if "failed_resets" in task:
            print(
                f"{'':<24}{task['failed_resets']} scenes without room for it, {task['episodes_with_errors']} episodes with an error"
            )
    print(
        f"{'mean over the tasks':<24}{np.mean([task['rate'] for task in report['tasks'].values()]):>16.1%}"
    )
    if "language" in report:
        correct, cases, share, (low, high) = report["language"].values()
        print(
            f"The gripper was painted towards the named object in {correct} of {cases} cases ({share:.0%}, {low:.0%} to {high:.0%})."
        )


def check_settings(settings):
    """Fill in the settings that follow from others. Raises UserError for what cannot be evaluated."""
    if settings.checkpoints is None:
        settings.checkpoints = 3 if settings.protocol else 1
    for name, least in {
        "episodes": 1,
        "execute": 1,
        "workers": 1,
        "seed": 0,
        "language": 0,
        "videos": 0,
        "checkpoints": 1,
    }.items():
        if getattr(settings, name) < least:
            raise UserError(f"--{name} must be {least} or more.")
    settings.sim = settings.sim or ("rlbench" if settings.protocol else "mujoco")
    rlbench, folder = settings.sim == "rlbench", settings.run / "episodes"
    if (
        settings.demos
        and not rlbench
        or rlbench
        and (settings.policy == "oracle" or settings.perturb)
    ):
        raise UserError(
            "--demos is for --sim rlbench, --policy oracle and --perturb are for the embedded simulator."
        )
    tasks = settings.tasks or (PAPER_TASKS if rlbench and settings.protocol else ())
    recorded = find_episodes(folder) if folder.is_dir() or not tasks else []
    settings.tasks = tuple(dict.fromkeys(tasks or [path.parent.name for path in recorded]))
    for task in settings.tasks:
        task_class(import_rlbench().tasks, task) if rlbench else check_task(task)
    if settings.demos:
        find_demonstrations(settings.demos, settings.tasks)
    if settings.policy != "genima" or rlbench or settings.perturb:
        settings.language = 0  # nothing is painted, or there is no knowing where
    seeds = range(settings.seed, settings.seed + max(settings.episodes, settings.language))
    for path in recorded:
        seed = path.name.split("_")[0]
        if path.parent.name in settings.tasks and seed.isdigit() and int(seed) in seeds:
            raise UserError(
                f"Seed {int(seed)} was recorded in {path}, so its scene is not unseen: choose another --seed."
            )
    if settings.device == "auto":
        settings.device = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    settings.out = settings.out or settings.run / "evaluation"
    settings.controller = settings.controller or settings.run / (
        "act_rgb" if settings.policy == "act" else "act"
    )
    settings.painter = settings.painter or settings.run / "controlnet"
    # a painter that lies elsewhere may be on the Hub: load_painter will see
    paints_here = settings.policy == "genima" and settings.painter.parent == settings.run
    for folder in (settings.controller, settings.painter)[: 1 + paints_here]:
        if not folder.is_dir():
            raise UserError(f"There is no checkpoint {folder}: train it first.")
    checkpoints(settings)


def checkpoints(settings):
    """The settings of each checkpoint to average over, the last one first: painter and controller are paired from there backwards."""
    count = settings.checkpoints
    each = [replace(settings, videos=0 if i else settings.videos) for i in range(count)]
    for what in (
        ()
        if count == 1
        else ("controller", "painter")
        if settings.policy == "genima"
        else ("controller",)
    ):
        folder = getattr(settings, what)
        found = sorted(folder.glob("step-*"), key=lambda path: int(path.name[5:]), reverse=True)
        if len(found) < count:
            raise UserError(
                f"{folder} holds {len(found)} of the {count} checkpoints to average over: train it with --keep {count}, "
                "or give --checkpoints 1."
            )
        each = [replace(one, **{what: path}) for one, path in zip(each, found)]
    return each


def write_report(settings):
    """Drive all episodes, write and print the results. A variation's policy is a function (run, device) -> painter or None, controller."""
    each, tasks, count = checkpoints(settings), settings.tasks, settings.episodes
    jobs = [
        (drive, task, settings.seed + i, checkpoint)
        for checkpoint in each
        for task in tasks
        for i in range(count)
    ]
    jobs += [
        (listen, task, settings.seed + i, each[0])
        for i in range(settings.language)
        for task in LANGUAGE_TASKS
        if task in tasks
    ]
    # CUDA does not survive a fork, and CoppeliaSim's libraries had better not be asked to
    start = None if settings.device == "cpu" and settings.sim == "mujoco" else "spawn"
    done = run_in_parallel(jobs, settings.workers, "evaluating", "episode", start=start)
    results, heard = (
        {task: [] for task in tasks},
        [],
    )  # of each task (outcome, log), of one checkpoint after the other; [correct, ...]
    for (what, task, seed, checkpoint), result in sorted(
        done, key=lambda pair: (each.index(pair[0][3]), pair[0][2])
    ):
        if what is listen:
            heard += result or []
        else:
            outcome, log = nothing(seed)
            results[task].append(result or (outcome | {"error": "the simulator crashed"}, log))

    policy = getattr(settings.policy, "__name__", settings.policy)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    cpus = re.findall(
        r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    )
    gpu = torch.cuda.get_device_name() if settings.device == "cuda" else None
    report = {
        "policy": policy, "sim": settings.sim, "git_commit": commit or None, "execute": settings.execute, "perturb": settings.perturb,
        "machine": {"cpu": cpus[0] if cpus else platform.processor(), "cores": os.cpu_count(), "gpu": gpu},
        "seeds": {"first": settings.seed, "last": settings.seed + count - 1},
        "tasks": {task: summary(*zip(*pairs)) for task, pairs in results.items()},
    }  # fmt: skip
    if len(each) > 1:
        report["checkpoints"] = [
            {"painter": str(checkpoint.painter), "controller": str(checkpoint.controller),
             "rates": {task: np.mean([outcome["success"] for outcome, _ in results[task][i * count:][:count]]) for task in tasks}}
            for i, checkpoint in enumerate(each)]  # fmt: skip
    if heard:
        report["language"] = {
            "correct": sum(heard),
            "cases": len(heard),
            **rate(sum(heard), len(heard)),
        }
    suffix = "".join(
        f"_{name}" for name in (policy, settings.perturb) if name not in ("genima", None)
    )
    with write_whole(settings.out / f"evaluation{suffix}.json") as path:
        path.write_text(json.dumps(report, indent=1))
    shown = {"act": "plain pictures", "genima": "painted target", "oracle": "painted target"}.get(
        policy, "what the controller sees"
    )
    for task, pairs in results.items():
        if films := [(outcome, log["frames"]) for outcome, log in pairs if log["frames"]]:
            write_film(
                settings.out,
                f"{task}{suffix}",
                films,
                shown,
                HZ if settings.sim == "rlbench" else CONTROL_HZ,
            )
        for outcome, log in pairs:
            if settings.trace and not outcome["success"]:
                with write_whole(
                    settings.out / f"trace{suffix}_{task}_{outcome['seed']}.csv"
                ) as path:
                    np.savetxt(path, log["trace"], "%.6g", ",", header=TRACE, comments="")
    write_bars(settings.out / f"success{suffix}.png", report)
    print_table(report)
    if settings.protocol:
        print(PAPER)
    print(f"Everything is in {settings.out}.")


def main():
    settings = tyro.cli(Settings, description=__doc__)
    check_settings(settings)
    write_report(settings)


if __name__ == "__main__":
    run_stage(main)
