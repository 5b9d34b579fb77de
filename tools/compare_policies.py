"""The table of policies: the same demonstrations, scenes and perturbations for each of them.

In:   nothing: demonstrations are recorded, networks trained and episodes driven by the stages
Out:  runs/table/<demonstrations a task>/           episodes and spheres
      runs/table/<demonstrations>/seed-<seed>/      networks and results of one training seed
      runs/table/table.md, table.json               all that is finished so far

    python tools/compare_policies.py --policies genima act --demos 50 --seeds 0
    python tools/compare_policies.py                all of it: two days on two cores

Every part is a command of the stages, printed before it runs. Run again after Ctrl-C: what is
finished is read, not run. A cell counts the successes of all tasks and seeds, with the 95 %
interval (Wilson).
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from genima.files import UserError, run_stage, write_whole
from genima.report import describe_rate
from sims.perturbed_panda import PERTURBATIONS

TASKS = ("reach_target", "push_button", "pick_and_lift")
CONDITIONS = ("unchanged", *PERTURBATIONS)


@dataclass
class Policy:
    """How a policy is trained, and what evaluate.py is told.

    {seed}: the training seed's folder; {scenes}: random scenes, to be rehearsed.
    """

    training: tuple[str, ...]
    options: str


ACT = "train_act.py --observation rgb --out {seed}/act_rgb"
POLICIES = {
    "genima": Policy(
        (
            "train_controlnet.py --out {seed}/controlnet --rehearse {scenes} --backgrounds",
            "train_act.py --out {seed}/act",
        ),
        "--painter {seed}/controlnet --controller {seed}/act",
    ),
    "genima-from-nothing": Policy(
        (
            "train_controlnet.py --base none --out {seed}/controlnet_none",
            "train_act.py --base none --out {seed}/act_none",
        ),
        "--painter {seed}/controlnet_none --controller {seed}/act_none",
    ),
    "act": Policy((ACT,), "--policy act --controller {seed}/act_rgb"),
    "diffusion-policy": Policy(
        ("variations/train_diffusion_policy.py --steps 2000 --out {seed}/diffusion_policy",),
        "--policy variations/train_diffusion_policy.py:policy",
    ),
    "action-tokens": Policy(
        ("variations/train_action_tokens.py --steps 2000 --out {seed}/action_tokens",),
        "--policy variations/train_action_tokens.py:policy",
    ),
}


@dataclass
class Settings:
    policies: tuple[str, ...] = tuple(POLICIES)
    """Which rows."""
    demos: tuple[int, ...] = (20, 50)
    """Demonstrations a task."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds."""
    conditions: tuple[str, ...] = CONDITIONS
    """Which columns: unchanged, or a perturbation of evaluate.py --perturb."""
    episodes: int = 50
    """Scenes a task, from test seed 0 on, which nothing was trained on."""
    out: Path = Path("runs/table")
    """Folder of everything."""


def run(command: str, *options):
    """Run a stage of this repository; its output is shown. Raises UserError if it fails."""
    words = [*command.split(), *map(str, options)]
    print("\npython", *words, flush=True)
    done = subprocess.run([sys.executable, *words], cwd=ROOT)
    if done.returncode:
        raise UserError(
            f"{words[0]} ended with exit code {done.returncode}: see above. Run the same command "
            "again to go on from there."
        )


def record(data: Path, demos: int):
    run("collect_demos.py", "--run", data, "--demos", demos, "--tasks", *TASKS)
    run("render_spheres.py", "--run", data)


def evaluate(policy: Policy, seed: Path, out: Path, condition: str, episodes: int) -> dict:
    """The report of one cell and training seed: {task: [success, ...]}, driven unless it is there.

    Raises UserError for results of another number of episodes.
    """
    files = list(out.glob("evaluation*.json"))
    if not files:
        options = ["--language", 0, "--videos", 0, "--episodes", episodes, "--tasks", *TASKS]
        if condition != "unchanged":
            options += ["--perturb", condition]
        command = f"evaluate.py {policy.options}".format(seed=seed)
        run(command, "--run", seed, "--out", out, *options)
        files = list(out.glob("evaluation*.json"))
    report = json.loads(files[0].read_text())
    results = {}
    for task, summary in report["tasks"].items():
        results[task] = [outcome["success"] for outcome in summary["outcomes"]]
        if len(results[task]) != episodes:
            raise UserError(
                f"{files[0]} has {len(results[task])} episodes a task, not {episodes}: "
                "use another --out."
            )
    return results


def write_table(out: Path, cells: dict, settings: Settings):
    """cells: {(policy, demos, condition): [results of each seed]} -> table.md and table.json."""
    lines = ["| policy | demonstrations | " + " | ".join(settings.conditions) + " |"]
    lines.append("| --- " * (2 + len(settings.conditions)) + "|")
    rows = []
    for demos in settings.demos:
        for name in settings.policies:
            texts = []
            for condition in settings.conditions:
                runs = cells.get((name, demos, condition), [])
                row = {"policy": name, "demos": demos, "condition": condition, "seeds": runs}
                rows.append(row)
                texts.append(describe_cell(runs))
            lines.append(f"| {name} | {demos} | " + " | ".join(texts) + " |")
    with write_whole(out / "table.md") as path:
        path.write_text("\n".join(lines) + "\n")
    with write_whole(out / "table.json") as path:
        path.write_text(json.dumps(rows, indent=1))
    print("\n" + "\n".join(lines), flush=True)


def describe_cell(runs: list[dict]) -> str:
    """Successes of all tasks and seeds, as "41 of 50 (69 to 90 %)"."""
    successes = []
    for results in runs:
        for task in results.values():
            successes += task
    if not successes:
        return ""
    low, high = describe_rate(sum(successes), len(successes))["wilson_95"]
    return f"{sum(successes)} of {len(successes)} ({100 * low:.0f} to {100 * high:.0f} %)"


def check_settings(settings: Settings):
    for option, given, known in (
        ("--policies", settings.policies, tuple(POLICIES)),
        ("--conditions", settings.conditions, CONDITIONS),
    ):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise UserError(f"{option} {unknown[0]}: choose from {', '.join(known)}.")


def main():
    settings = tyro.cli(Settings, description=__doc__)
    check_settings(settings)
    settings.out = settings.out.resolve()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cells = {}
    scenes = settings.out / "scenes"
    run("pretrain_painter.py --scenes 1500 --steps 0", "--out", scenes)
    for demos in settings.demos:
        data = settings.out / str(demos)
        record(data, demos)
        for number in settings.seeds:
            seed = data / f"seed-{number}"
            for name in settings.policies:
                policy = POLICIES[name]
                for command in policy.training:
                    run(command.format(seed=seed, scenes=scenes), "--run", data, "--seed", number)
                for condition in settings.conditions:
                    out = seed / "results" / name / condition
                    results = evaluate(policy, seed, out, condition, settings.episodes)
                    cells.setdefault((name, demos, condition), []).append(results)
                    write_table(settings.out, cells, settings)


if __name__ == "__main__":
    run_stage(main)
