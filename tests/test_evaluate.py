"""Stage 4: arithmetic, oracle, rollout, language check, and the whole command, untrained."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

import evaluate
import genima.checkpoints
import genima.policy
from genima.act import ACT
from genima.checkpoints import load_controller, load_function, load_networks, load_policy
from genima.episodes import CAMERAS
from genima.files import UserError
from genima.language import check_language
from genima.policy import GenimaPolicy, OraclePainter, rollout
from genima.report import FinishedJobs, summarise, wilson_interval

CONFIG = {
    "size": "tiny",
    "observation": "spheres",
    "horizon": 8,
    "joints": 7,
    "cameras": list(CAMERAS),
    "image_size": [64, 64],
    "vocabulary": [],
    "state_mean": [0.0] * 8,
    "state_std": [1.0] * 8,
    "action_std": [0.01] * 7,
}


def untrained(folder, **changes):
    """A controller's checkpoint that knows nothing."""
    torch.manual_seed(0)
    config = CONFIG | changes
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: value.contiguous() for name, value in ACT(config).state_dict().items()},
        folder / "model.safetensors",
    )


def settings(run, **changes):
    values = {"tasks": ("reach_target",), "episodes": 2, "videos": 0, "policy": "oracle"}
    values |= {"sim": "mujoco", "execution_horizon": 8}
    return evaluate.Settings(run=run, **(values | changes))


def workspace_of(networks, one):
    """A process's workspace that has loaded these networks for its only checkpoint."""
    workspace = evaluate.Workspace([one])
    workspace.networks = {0: networks}
    return workspace


def drive(networks, task, seed, one):
    return evaluate.run_episode(workspace_of(networks, one), 0, task, seed)


# --------------------------------------------------------------------------------------- arithmetic
@pytest.mark.parametrize(
    "successes, episodes, low, high",
    [(8, 10, 0.4902, 0.9433), (0, 10, 0, 0.2775), (50, 50, 0.9287, 1), (81, 263, 0.2553, 0.3662)],
)
def test_interval_is_wilsons(successes, episodes, low, high):
    assert wilson_interval(successes, episodes) == pytest.approx([low, high], abs=1e-4)
    outcomes = [{"success": i < successes, "steps": 1} for i in range(episodes)]
    report = summarise(outcomes, [{"paint": [0.1], "control": [0.2]}] * episodes)
    assert report["rate"] == successes / episodes
    assert report["wilson_95"] == pytest.approx([low, high], abs=1e-4)
    assert report["paint_ms"] == 100 and report["control_ms"] == 200


def oracle_of(positions, horizon=4):
    """An oracle of a one-jointed arm that was at these positions, one a frame."""
    qpos = np.array([[position, 1] for position in positions], float)
    return OraclePainter(SimpleNamespace(qpos=qpos), horizon)


def test_oracle_follows_progress():
    oracle = oracle_of([0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0])
    assert oracle.progress([0]) == 0
    assert oracle.progress([0]) == 1  # at least one further, although the arm has not moved
    assert oracle.progress([3.2]) == 3  # nearest
    assert oracle.progress([0]) == 7  # frame 10 is nearer, but further off than a chunk
    assert [oracle.progress([0]) for _ in range(2)] == [10, 10]  # and it waits at the end


# -------------------------------------------------------------------------------------- closed loop
class Follower:
    """A controller that is told the demonstration, and does what training asks of one.

    It ends there, whatever it starts from.
    """

    config = CONFIG

    def __call__(self, images, qpos, instructions, drop_state):
        demo, frame = Shared.last.demo, Shared.last.frame
        chunk = demo.action[np.minimum(np.arange(frame, frame + 8), len(demo.action) - 1)].copy()
        chunk[:, :-1] += (qpos[0] - demo.qpos[frame])[:-1] * (1 - np.arange(1, 9)[:, None] / 8)
        return chunk[None]


class Stayer:
    """A controller that stays where it is, and overshoots the gripper and a joint's limit."""

    config = CONFIG

    def __call__(self, images, qpos, instructions, drop_state):
        chunk = np.repeat(qpos[:, None], 8, axis=1)
        chunk[..., 0], chunk[..., -1] = 3.5, 1.2
        return chunk


class Shared(OraclePainter):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        Shared.last = self


def test_a_good_controller_succeeds_and_an_idle_one_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(genima.policy, "OraclePainter", Shared)
    workspace = workspace_of(Follower(), settings(tmp_path))
    for seed in range(3):
        outcome, log = evaluate.run_episode(workspace, 0, "reach_target", seed)
        assert outcome["success"] and outcome["steps"] == len(log["trace"]) < 60
        tool, ball = np.array(log["trace"][-1][1:4]), np.array(log["trace"][-1][4:7])
        assert np.linalg.norm(tool - ball) < 0.08 and not log["frames"]
    outcome, log = drive(Stayer(), "reach_target", 0, settings(tmp_path, execution_horizon=8))
    assert not outcome["success"]
    assert outcome["steps"] == len(log["trace"]) == 100 and len(log["paint"]) == 13


class Puppet:
    """A policy of somebody else: the least that one must have."""

    cameras = ("front",)
    image_size = (16, 24)

    def act(self, images, qpos, instruction):
        assert {name: image.shape for name, image in images.items()} == {"front": (16, 24, 3)}
        return np.repeat(qpos[None], 5, axis=0), images


def test_any_object_that_acts_is_a_policy(tmp_path):
    outcome, log = drive(Puppet(), "reach_target", 0, settings(tmp_path, videos=1, policy="a:b"))
    assert outcome["steps"] == 100 and not outcome["success"] and "error" not in outcome
    assert len(log["frames"]) == 101 and log["frames"][0].shape == (256, 768, 3)
    assert len(log["control"]) == 20 and log["paint"] == [0.0] * 20  # a chunk has 5 steps


class Failing:
    """An environment whose call number `count` of one method fails, the rest is real."""

    def __init__(self, env, method, count, error):
        self.env, self.method, self.count, self.error = env, method, count, error

    def __getattr__(self, name):
        value = getattr(self.env, name)
        if name != self.method:
            return value
        self.count -= 1
        if self.count == 0:
            raise self.error
        return value


@pytest.mark.parametrize(
    "method, count, steps",
    [("reset", 1, 0), ("step", 12, 11), ("render_camera", 3, 10), ("tool_pose", 1, 0)],
)
def test_a_failing_simulator_costs_one_episode(tmp_path, method, count, steps):
    workspace = workspace_of(Puppet(), settings(tmp_path, policy="a:b"))
    arguments = ("reach_target", (16, 24), ("front",))
    env = workspace.simulators.get(*arguments)
    ((key, _),) = workspace.simulators.environments.items()
    good, _ = evaluate.run_episode(workspace, 0, "reach_target", 0)
    error = RuntimeError("The call failed\non the V-REP side.")
    workspace.simulators.environments[key] = Failing(env, method, count, error)
    bad, log = evaluate.run_episode(workspace, 0, "reach_target", 0)
    assert bad["error"] == "RuntimeError: The call failed on the V-REP side."
    assert not bad["success"] and bad["steps"] == steps
    workspace.simulators.environments[key] = env
    assert evaluate.run_episode(workspace, 0, "reach_target", 0)[0] == good

    report = summarise([good, bad], [log, log])
    assert report["errors"] == {bad["error"]: 1} and report["episodes_with_errors"] == 1
    for fatal in (UserError("a sentence"), MemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(fatal)):
            rollout(Failing(env, method, count, fatal), Puppet(), 0)


def test_a_failing_policy_ends_everything(tmp_path):
    def act(images, qpos, instruction):
        raise RuntimeError("CUDA is out of memory")

    policy = Puppet()
    policy.act = act
    with pytest.raises(RuntimeError, match="out of memory"):
        drive(policy, "reach_target", 0, settings(tmp_path, policy="a:b"))
    policy.act = lambda images, qpos, instruction: (np.zeros((5, 7)), images)
    with pytest.raises(UserError, match=r"the shape \(K, 8\), not \(5, 7\)"):
        drive(policy, "reach_target", 0, settings(tmp_path, policy="a:b"))


# ---------------------------------------------------------------------------- does language matter?
class KnowingPainter:
    """Paints the true spheres of the object that the instruction names, or always of the first."""

    def __init__(self, workspace, task, seed, deaf):
        self.workspace, self.task, self.seed, self.deaf = workspace, task, seed, deaf

    def paint(self, images, instructions):
        env = self.workspace.simulators.get(self.task, (64, 64), CAMERAS)
        names = [env.task.names[v] for v in range(env.task.candidates)]
        painted = []
        for i, instruction in enumerate(instructions):
            named = [name in instruction for name in names].index(True)
            env.variation = 0 if self.deaf else named
            oracle = OraclePainter(self.workspace.demonstrate(self.task, env), 8)
            views = {camera: image[i] for camera, image in images.items()}
            painted.append(oracle.paint(env, views, 0))
        return {camera: np.stack([views[camera] for views in painted]) for camera in images}


@pytest.mark.parametrize("task", evaluate.LANGUAGE_TASKS)
def test_language_check_tells_a_deaf_painter(task, tmp_path):
    for deaf, expected in ((False, [True, True, True]), (True, [True, False, False])):
        workspace = workspace_of(None, settings(tmp_path, policy="genima"))
        painter = KnowingPainter(workspace, task, 3, deaf)
        workspace.networks = {0: GenimaPolicy(painter, Follower())}
        assert evaluate.run_language_check(workspace, 0, task, 3) == expected


def test_language_check_needs_a_sphere(tmp_path):
    workspace = workspace_of(None, settings(tmp_path, policy="genima"))
    nothing = SimpleNamespace(paint=lambda images, instructions: images)
    workspace.networks = {0: GenimaPolicy(nothing, Follower())}
    answer = evaluate.run_language_check(workspace, 0, "push_button", 3)
    assert answer == [False, False, False]


def test_language_check_without_a_demonstration_says_nothing(tmp_path):
    workspace = workspace_of(None, settings(tmp_path, policy="genima"))
    env = workspace.simulators.get("push_button", (64, 64), CAMERAS)

    def out_of_reach(env):
        raise UserError("The arm cannot reach it.")

    assert check_language(env, None, out_of_reach, 8, 3) == []


# -------------------------------------------------------------------------------- the whole command
PROGRAM = """
import sys, evaluate
run = sys.argv[1]
for out, *arguments in (
    ["one", "--policy", "oracle", "--workers", "1"],
    ["two", "--policy", "oracle", "--workers", "2", "--trace"],
    ["rgb", "--policy", "act", "--episodes", "1", "--drop-state", "--perturb", "light"],
):
    common = ["--run", run, "--tasks", "reach_target", "--episodes", "2", "--out", f"{run}/{out}"]
    sys.argv = ["evaluate.py", *common, *arguments]
    evaluate.run_stage(evaluate.main)
"""


def test_command_writes_the_same_for_any_number_of_workers(tmp_path):
    untrained(tmp_path / "act")
    untrained(tmp_path / "act_rgb", observation="rgb", vocabulary=["blue", "reach"])
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    one, two = (
        json.loads((tmp_path / folder / "evaluation_oracle.json").read_text())
        for folder in ("one", "two")
    )
    task = one["tasks"]["reach_target"]
    assert task["outcomes"] == two["tasks"]["reach_target"]["outcomes"]
    assert {"policy", "git_commit", "machine", "seeds", "tasks"} <= set(one) and one["machine"][
        "cores"
    ] >= 1
    assert set(task) == {
        "successes",
        "episodes",
        "rate",
        "wilson_95",
        "mean_steps",
        "paint_ms",
        "control_ms",
        "outcomes",
    }
    assert [set(outcome) for outcome in task["outcomes"]] == [
        {"seed", "variation", "instruction", "success", "steps"}
    ] * 2
    assert (
        task["control_ms"] > 0
        and task["episodes"] == 2
        and [outcome["seed"] for outcome in task["outcomes"]] == [0, 1]
    )
    assert "reach_target" in answer.stdout and "95 % interval" in answer.stdout

    film = imageio.mimread(tmp_path / "one/reach_target_oracle.mp4", memtest=False)
    assert film[0].shape == (304, 768, 3) and len(film) > task["outcomes"][0]["steps"]
    assert imageio.imread(tmp_path / "one/reach_target_oracle.png").shape == (304, 768, 3)
    assert imageio.imread(tmp_path / "one/success_oracle.png").shape[0] == 600
    failed = [outcome["seed"] for outcome in task["outcomes"] if not outcome["success"]]
    assert sorted(path.name for path in (tmp_path / "two").glob("*.csv")) == [
        f"trace_oracle_reach_target_{seed}.csv" for seed in failed
    ]
    perturbed = json.loads((tmp_path / "rgb/evaluation_act_light.json").read_text())
    assert (
        perturbed["perturb"] == "light"
        and one["perturb"] is None
        and perturbed["tasks"]["reach_target"]["episodes"] == 1
    )
    # The first panel of the film: the same scene in another light.
    plain, lit = (
        imageio.mimread(tmp_path / file, memtest=False)[0][60:250, :256]
        for file in ("one/reach_target_oracle.mp4", "rgb/reach_target_act_light.mp4")
    )
    assert np.abs(plain.astype(int) - lit).mean() > 5
    assert not list(tmp_path.glob("*/.*"))  # nothing half-written
    assert not list(tmp_path.glob("*/*.partial*"))


MINE = """
from pathlib import Path

class Idle:
    cameras = ("front",)
    image_size = (16, 16)

    def __init__(self, run):
        self.starts = run / "starts"

    def reset(self, env):
        with self.starts.open("a") as file:
            file.write(f"{env.seed} ")
        if env.seed in (0, 3) and not (self.starts.parent / "finish").exists():
            raise OSError(28, "No space left on device")

    def act(self, images, qpos, instruction):
        return qpos[None].repeat(50, 0), images

def policy(run, device):
    return Idle(run)
"""


def test_somebodys_policy_and_the_same_command_resumes(tmp_path):
    (tmp_path / "train_mine.py").write_text(MINE)
    policy = f"{tmp_path / 'train_mine.py'}:policy"
    command = [sys.executable, "evaluate.py", "--run", tmp_path, "--policy", policy]
    command += ["--tasks", "reach_target", "--episodes", "4", "--videos", "0", "--workers", "1"]
    out = tmp_path / "evaluation"

    def run():
        (tmp_path / "starts").write_text("")
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done, (tmp_path / "starts").read_text().split()

    done, starts = run()  # the disk is full in the first episode
    assert done.returncode == 2 and "disk is full" in done.stderr and starts == ["0"], done.stderr
    (tmp_path / "train_mine.py").write_text(MINE.replace("(0, 3)", "(3,)"))
    done, starts = run()
    assert done.returncode == 2 and starts == ["0", "1", "2", "3"], done.stderr
    (kept,) = out.glob("evaluation_mine.*.partial.jsonl")
    with kept.open("a") as file:
        file.write('\n[["run_episode", 0, "reach_t')  # killed in the middle of a line
    (tmp_path / "finish").touch()
    done, starts = run()
    assert done.returncode == 0 and starts == ["3"], done.stderr
    report = json.loads((out / "evaluation_mine.json").read_text())
    outcomes = report["tasks"]["reach_target"]["outcomes"]
    assert report["policy"] == "mine" and [one["seed"] for one in outcomes] == [0, 1, 2, 3]
    assert sorted(path.name for path in out.iterdir()) == [
        "evaluation_mine.json",
        "success_mine.png",
    ]
    assert run()[1] == ["0", "1", "2", "3"]  # a finished evaluation runs again


def test_results_of_other_settings_or_weights_are_not_taken_over(tmp_path):
    untrained(tmp_path / "act")
    one = settings(tmp_path, controller=tmp_path / "act", painter=tmp_path / "controlnet")
    job = (drive, 0, "reach_target", 0)
    FinishedJobs(tmp_path / "out/evaluation", [one]).add(job, [1], keep=True)
    assert job in FinishedJobs(tmp_path / "out/evaluation", [replace(one, workers=7)])
    assert job not in FinishedJobs(tmp_path / "out/evaluation", [replace(one, seed=7)])
    untrained(tmp_path / "again")
    (tmp_path / "again/model.safetensors").replace(tmp_path / "act/model.safetensors")
    assert job not in FinishedJobs(tmp_path / "out/evaluation", [one])


# ---------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"tasks": ("pick_and_lit",)}, "is it 'pick_and_lift'?"),
        ({"tasks": ("fly",)}, "choose from reach_target"),
        ({"episodes": 0}, "--episodes must be 1 or more"),
        ({"seed": -1}, "--seed must be 0 or more"),
        (
            {"tasks": ("pick_and_lift",), "seed": 0},
            "Seed 0 was recorded in",
        ),  # conftest's run holds seeds 0 and 1
        ({"seed": 10}, "There is no checkpoint .*`make demo` .*`make try`"),
        ({"seed": 10**12}, "--seed must be 0 or more, up to"),
        ({"episodes": 10**18}, "--episodes must be 1 or more, up to"),
        ({"execution_horizon": 0}, "--execution-horizon must be 1 or more"),
        ({"policy": "genimo"}, "There is no policy 'genimo'"),
        ({"policy": "nowhere.py:policy", "seed": 10}, "There is no file nowhere.py"),
        ({"policy": "evaluate.py:fly", "seed": 10}, "evaluate.py has no function 'fly'"),
        ({"device": "cuda", "seed": 10}, "--device cuda: PyTorch finds no such GPU"),
    ],
)
def test_bad_settings_are_one_sentence(run, changes, sentence, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=sentence.replace("?", r"\?")):
        evaluate.resolve_settings(settings(run, **changes))


def test_a_task_that_was_never_recorded_is_said(run, capsys):
    (run / "act").mkdir()
    evaluate.resolve_settings(settings(run, seed=10))
    assert "never trained on reach_target" in capsys.readouterr().out
    evaluate.resolve_settings(settings(run, seed=10, tasks=("pick_and_lift",)))
    assert not capsys.readouterr().out


def test_bad_checkpoints_are_one_sentence(tmp_path, monkeypatch):
    untrained(tmp_path / "act")
    painter, controller = tmp_path / "controlnet", tmp_path / "act"
    with pytest.raises(UserError, match="was not trained with --observation rgb"):
        load_controller(controller, "rgb")
    usual = {"horizon": 8, "image_size": 64, "cameras": list(CAMERAS), "size": "tiny"}
    for what, value in (("horizon", 20), ("image_size", 128), ("cameras", ["front"])):
        loaded = SimpleNamespace(config=usual | {what: value})
        monkeypatch.setattr(genima.checkpoints, "load_painter", lambda *_, it=loaded: it)
        with pytest.raises(UserError, match=f"controlnet was trained with {what} "):
            load_policy(painter, controller)
    loaded = SimpleNamespace(config=usual)
    monkeypatch.setattr(genima.checkpoints, "load_painter", lambda *_: loaded)
    assert load_policy(painter, controller, size="tiny").painter is loaded
    with pytest.raises(UserError, match="controlnet was trained with --size tiny, not sd-turbo"):
        load_policy(painter, controller, size="sd-turbo")
    (tmp_path / "act/model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="holds no trained controller"):
        load_controller(controller, "spheres")


def test_bad_policy_functions_are_one_sentence(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def policy(run, device):\n    return None\n")
    assert load_function(f"{file}:policy")(None, "cpu") is None
    one = settings(tmp_path, policy=f"{file}:policy", device="cpu")
    with pytest.raises(UserError, match="mine.py:policy returns no policy: it has no 'cameras'"):
        load_networks(one)


def test_command_says_what_is_wrong(tmp_path):
    (tmp_path / "episodes").mkdir()
    (tmp_path / "file").touch()
    for words, sentence in (
        ([tmp_path], "There is no HDF5 file"),
        ([tmp_path / "nowhere"], "`make demo`"),
        ([tmp_path / "nowhere"], "`make try`"),
    ):
        answer = subprocess.run(
            [sys.executable, "evaluate.py", "--run", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert answer.returncode == 2 and len(answer.stderr.splitlines()) == 1
        assert "Traceback" not in answer.stderr and sentence in answer.stderr
    with pytest.raises(UserError, match="cannot hold the results .*give another --out"):
        one = settings(tmp_path, controller=tmp_path, painter=tmp_path)
        FinishedJobs(tmp_path / "file/evaluation", [one])
