"""The report of an evaluation: success rates and intervals, a table, files, and how to resume.

`settings` is evaluate.py's Settings, `checkpoints` one Settings for each checkpoint to average
over. Outcomes and logs are those of genima/policy.py's rollout.
"""

import json
import os
import platform
import re
import subprocess
import sys
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from genima.files import UserError, write_whole
from genima.plots import write_bars, write_film

TRACE = "step,tool x,tool y,tool z,object x,object y,object z,gripper,painted"


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """The 95 % interval of a success rate (Wilson 1927).

    Unlike the textbook's interval it is right for few episodes and for rates near 0 and 1.
    """
    z = 1.959964
    rate = successes / episodes
    scale = 1 + z**2 / episodes
    middle = (rate + z**2 / (2 * episodes)) / scale
    half = z / scale * np.sqrt(rate * (1 - rate) / episodes + z**2 / (4 * episodes**2))
    return round(float(max(middle - half, 0)), 4), round(float(min(middle + half, 1)), 4)


def describe_rate(successes: int, episodes: int) -> dict:
    """Rate and interval as evaluation.json holds them."""
    interval = list(wilson_interval(successes, episodes))
    return {"rate": successes / episodes, "wilson_95": interval}


def summarise(outcomes: list[dict], logs: list[dict]) -> dict:
    """What evaluation.json says about one task."""
    steps = [outcome["steps"] for outcome in outcomes if outcome["success"]]
    summary = {
        "successes": len(steps),
        "episodes": len(outcomes),
        **describe_rate(len(steps), len(outcomes)),
        "mean_steps": float(np.mean(steps)) if steps else None,
    }
    for name in ("paint", "control"):
        seconds = [0.0]
        if any(log[name] for log in logs):
            seconds = np.concatenate([log[name] for log in logs])
        summary[f"{name}_ms"] = round(1000 * float(np.median(seconds)), 2)
    failed_resets = sum(outcome.get("failed_resets", 0) for outcome in outcomes)
    errors = [outcome["error"] for outcome in outcomes if "error" in outcome]
    if failed_resets or errors:
        summary["failed_resets"] = failed_resets
        summary["episodes_with_errors"] = len(errors)
        summary["errors"] = dict(Counter(errors))
    summary["outcomes"] = outcomes
    return summary


def describe_machine(device: str) -> dict:
    """Processor, cores and GPU: what the milliseconds of a report were measured on."""
    cpu = platform.processor()
    if sys.platform == "linux":
        models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = models[0] if models else cpu
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu}


def git_commit() -> str | None:
    """The commit of this code, None outside a repository."""
    command = ["git", "rev-parse", "HEAD"]
    with suppress(OSError):  # no git
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return None


def results_name(settings) -> str:
    """evaluation, and what is not the usual: the policy, the perturbation."""
    name = "evaluation"
    for part in (policy_name(settings.policy), settings.perturb):
        if part not in ("genima", None):
            name += f"_{part}"
    return name


def policy_name(policy: str) -> str:
    """What results are named after; for FILE:FUNCTION the file's name, without train_."""
    if ":" in policy:
        return Path(policy.rpartition(":")[0]).stem.removeprefix("train_")
    return policy


def make_report(checkpoints: list, episodes: dict, language: list[bool]) -> dict:
    """The content of evaluation.json.

    episodes: {task: [(outcome, log), ...]}, one checkpoint after the other. language: for each
    case, whether the gripper was painted towards the named object.
    """
    settings = checkpoints[0]
    count = settings.episodes
    report = {
        "policy": policy_name(settings.policy),
        "sim": settings.sim,
        "protocol": settings.protocol,
        "demos": None if settings.demos is None else str(settings.demos),
        "git_commit": git_commit(),
        "execute": settings.execution_horizon,
        "perturb": settings.perturb,
        "machine": describe_machine(settings.device),
        "seeds": {"first": settings.seed, "last": settings.seed + count - 1},
        "tasks": {task: summarise(*zip(*pairs)) for task, pairs in episodes.items()},
    }
    if len(checkpoints) > 1:
        report["checkpoints"] = []
        for i, one in enumerate(checkpoints):
            rates = {}
            for task, pairs in episodes.items():
                part = pairs[i * count : (i + 1) * count]
                rates[task] = np.mean([outcome["success"] for outcome, _ in part])
            report["checkpoints"].append(
                {"painter": str(one.painter), "controller": str(one.controller), "rates": rates}
            )
    if language:
        right = sum(language)
        cases = len(language)
        report["language"] = {"correct": right, "cases": cases, **describe_rate(right, cases)}
    return report


def write_results(settings, name: str, report: dict, episodes: dict, fps: float):
    """Write films, traces of failures, the bars, and last <name>.json into settings.out."""
    suffix = name.removeprefix("evaluation")
    painted_name = "plain views" if settings.policy == "act" else "painted target"
    for task, pairs in episodes.items():
        films = [(outcome, log["frames"]) for outcome, log in pairs if log["frames"]]
        if films:
            write_film(settings.out, f"{task}{suffix}", films, painted_name, fps)
        for outcome, log in pairs:
            if settings.trace and not outcome["success"]:
                file = settings.out / f"trace{suffix}_{task}_{outcome['seed']}.csv"
                with write_whole(file) as path:
                    np.savetxt(path, log["trace"], "%.6g", ",", header=TRACE, comments="")
    write_bars(settings.out / f"success{suffix}.png", report)
    with write_whole(settings.out / f"{name}.json") as path:
        path.write_text(json.dumps(report, indent=1))


def print_table(report: dict):
    """The content of evaluation.json, a line for each task."""
    print(
        f"\n{'task':<24}{'success':>10}{'rate':>7}{'95 % interval':>16}"
        f"{'steps':>7}{'paint':>10}{'control':>10}"
    )
    for name, task in report["tasks"].items():
        low, high = task["wilson_95"]
        interval = f"{low:.0%} to {high:.0%}"
        steps = "-"
        if task["mean_steps"] is not None:
            steps = f"{task['mean_steps']:.0f}"
        print(
            f"{name:<24}{task['successes']:>4} of {task['episodes']:<3}{task['rate']:>6.0%}"
            f"{interval:>16}{steps:>7}{task['paint_ms']:>7.1f} ms{task['control_ms']:>7.1f} ms"
        )
        if task.get("failed_resets"):
            print(f"{'':<24}{task['failed_resets']} scenes that could not be laid out")
        for kind, count in task.get("errors", {}).items():
            print(f"{'':<24}{count} episodes ended by the simulator's {kind}")
    mean = np.mean([task["rate"] for task in report["tasks"].values()])
    print(f"{'mean over the tasks':<24}{mean:>16.1%}")
    if "language" in report:
        language = report["language"]
        low, high = language["wilson_95"]
        print(
            f"The gripper was painted towards the named object in {language['correct']} of "
            f"{language['cases']} cases ({language['rate']:.0%}, {low:.0%} to {high:.0%})."
        )


class FinishedJobs:
    """Results of an evaluation that may be stopped, in <path>.<identity>.partial.jsonl.

    Each is written as soon as it is there, so that the same command resumes. A job is (function,
    arguments...); a result is what JSON can hold.
    """

    def __init__(self, path: Path, checkpoints: list):
        """Made of all settings and weights: results of other ones are not taken over."""
        files = []
        for one in checkpoints:
            for folder in (one.run, one.controller, one.painter):
                files += sorted(folder.rglob("*.safetensors"))
            if ":" in one.policy:
                files.append(Path(one.policy.rpartition(":")[0]))
        versions = [(str(file), file.stat().st_mtime_ns) for file in files]
        settings = [replace(one, workers=1) for one in checkpoints]
        identity = zlib.crc32(repr((settings, versions)).encode())
        self.path = path.with_name(f"{path.name}.{identity:08x}.partial.jsonl")
        self.results = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{path.parent} cannot hold the results ({error.strerror}): give another --out."
            ) from error
        if self.path.exists():
            for line in self.path.read_text(errors="replace").splitlines():
                # A killed process leaves half a line.
                with suppress(ValueError, TypeError, RecursionError):
                    name, result = json.loads(line)
                    self.results[tuple(name)] = result

    def __contains__(self, job: tuple) -> bool:
        return job_name(job) in self.results

    def result(self, job: tuple):
        return self.results[job_name(job)]

    def add(self, job: tuple, result, keep: bool):
        """keep: whether to write the result; the job runs again if not."""
        self.results[job_name(job)] = result
        if keep:
            with open(self.path, "a") as file:
                file.write("\n" + json.dumps([job_name(job), result]))

    def remove(self):
        self.path.unlink(missing_ok=True)


def job_name(job):
    function, *arguments = job
    return function.__name__, *arguments
