"""Stage 4: the arithmetic, the oracle, the language check, and the whole command with untrained networks."""

import json
import subprocess
import sys
from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

import evaluate
from genima.act import ACT
from genima.episodes import CAMERAS
from genima.files import UserError

CONFIG = dict(size="tiny", observation="spheres", horizon=8, joints=7, cameras=list(CAMERAS), image_size=[64, 64], vocabulary=[],
              state_mean=[0.0] * 8, state_std=[1.0] * 8, action_std=[0.01] * 7)  # fmt: skip


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
    return evaluate.Settings(
        **{
            "run": run,
            "tasks": ("reach_target",),
            "episodes": 2,
            "videos": 0,
            "policy": "oracle",
            **changes,
        }
    )


# ------------------------------------------------------------------------------------------------------------ arithmetic
@pytest.mark.parametrize(
    "successes, episodes, low, high",
    [(8, 10, 0.4902, 0.9433), (0, 10, 0, 0.2775), (50, 50, 0.9287, 1), (81, 263, 0.2553, 0.3662)],
)
def test_interval_is_wilsons(successes, episodes, low, high):
    report = evaluate.rate(successes, episodes)
    assert report["rate"] == successes / episodes
    assert report["wilson_95"] == pytest.approx([low, high], abs=1e-4)


def oracle_of(positions, horizon=4):
    """An oracle of a one-jointed arm that was at these positions, one a frame."""
    oracle = evaluate.Oracle.__new__(evaluate.Oracle)
    qpos = np.array([[position, 1] for position in positions], float)
    oracle.demo, oracle.horizon, oracle.frame = SimpleNamespace(qpos=qpos), horizon, -1
    return oracle


def test_oracle_follows_progress():
    oracle = oracle_of([0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0])
    assert oracle.progress([0]) == 0
    assert oracle.progress([0]) == 1  # at least one further, although the arm has not moved
    assert oracle.progress([3.2]) == 3  # nearest
    assert oracle.progress([0]) == 7  # frame 10 is nearer, but further off than a chunk
    assert [oracle.progress([0]) for _ in range(2)] == [10, 10]  # and it waits at the end


# ----------------------------------------------------------------------------------------------------------- closed loop
class Follower:
    """A controller that is told the demonstration, and does what training asks of one: end there, whatever it starts from."""

    config = CONFIG

    def __call__(self, images, qpos, instructions, drop_state):
        demo, frame = Shared.last.demo, Shared.last.frame
        chunk = demo.action[np.minimum(np.arange(frame, frame + 8), len(demo.action) - 1)].copy()
        chunk[:, :-1] += (qpos[0] - demo.qpos[frame])[:-1] * (1 - np.arange(1, 9)[:, None] / 8)
        return chunk[None]


class Stayer:
    """A controller that stays where it is, and overshoots the gripper's range and a joint's limit."""

    config = CONFIG

    def __call__(self, images, qpos, instructions, drop_state):
        chunk = np.repeat(qpos[:, None], 8, axis=1)
        chunk[..., 0], chunk[..., -1] = 3.5, 1.2
        return chunk


class Shared(evaluate.Oracle):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        Shared.last = self


def test_a_good_controller_succeeds_and_an_idle_one_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "Oracle", Shared)
    monkeypatch.setattr(evaluate, "networks", lambda *_: (None, Follower()))
    for seed in range(3):
        outcome, log = evaluate.drive("reach_target", seed, settings(tmp_path))
        assert outcome["success"] and outcome["steps"] == len(log["trace"]) < 60
        tool, ball = np.array(log["trace"][-1][1:4]), np.array(log["trace"][-1][4:7])
        assert np.linalg.norm(tool - ball) < 0.08 and not log["frames"]
    monkeypatch.setattr(evaluate, "networks", lambda *_: (None, Stayer()))
    outcome, log = evaluate.drive("reach_target", 0, settings(tmp_path, execute=8))
    assert (
        not outcome["success"]
        and outcome["steps"] == len(log["trace"]) == 100
        and len(log["paint"]) == 13
    )


class KnowingPainter:
    """Paints the true spheres of the object that the instruction names, or always of the first object."""

    def __init__(self, task, seed, deaf):
        self.task, self.seed, self.deaf = task, seed, deaf

    def paint(self, images, instructions):
        env = evaluate.environment(self.task, (64, 64), CAMERAS)
        painted = []
        for i, instruction in enumerate(instructions):
            named = [env.task.names[v] in instruction for v in range(env.task.candidates)].index(
                True
            )
            oracle = evaluate.Oracle(self.task, self.seed, 0 if self.deaf else named, 8)
            painted.append(
                oracle.paint(env, {camera: image[i] for camera, image in images.items()}, 0)
            )
        return {camera: np.stack([picture[camera] for picture in painted]) for camera in images}


@pytest.mark.parametrize("task", evaluate.LANGUAGE_TASKS)
def test_language_check_tells_a_deaf_painter(task, monkeypatch, tmp_path):
    for deaf, expected in ((False, [True, True, True]), (True, [True, False, False])):
        monkeypatch.setattr(
            evaluate, "networks", lambda *_: (KnowingPainter(task, 3, deaf), Follower())
        )
        assert evaluate.listen(task, 3, settings(tmp_path, policy="genima")) == expected


def test_language_check_needs_a_sphere(monkeypatch, tmp_path):
    nothing = SimpleNamespace(paint=lambda images, instructions: images)
    monkeypatch.setattr(evaluate, "networks", lambda *_: (nothing, Follower()))
    assert evaluate.listen("push_button", 3, settings(tmp_path, policy="genima")) == [
        False,
        False,
        False,
    ]


# ----------------------------------------------------------------------------------------------------- the whole command
PROGRAM = """
import sys, evaluate
run = sys.argv[1]
for out, *arguments in (["one", "--policy", "oracle", "--workers", "1"], ["two", "--policy", "oracle", "--workers", "2", "--trace"],
                        ["rgb", "--policy", "act", "--episodes", "1", "--drop-state", "--perturb", "light"]):
    sys.argv = ["evaluate.py", "--run", run, "--tasks", "reach_target", "--episodes", "2", "--out", f"{run}/{out}", *arguments]
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


# -------------------------------------------------------------------------------------------------------------- bad input
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
        ({"seed": 10}, "There is no checkpoint"),
    ],
)
def test_bad_settings_are_one_sentence(run, changes, sentence):
    with pytest.raises(UserError, match=sentence.replace("?", r"\?")):
        evaluate.check_settings(settings(run, **changes))


def test_bad_checkpoints_are_one_sentence(tmp_path, monkeypatch):
    untrained(tmp_path / "act")
    with pytest.raises(UserError, match="was not trained with --observation rgb"):
        evaluate.networks("act", tmp_path, tmp_path, tmp_path / "act", "cpu")
    for what, value in (("horizon", 20), ("image_size", 128), ("cameras", ["front"])):
        painter = SimpleNamespace(
            config={"horizon": 8, "image_size": 64, "cameras": list(CAMERAS)} | {what: value}
        )
        monkeypatch.setattr(evaluate, "load_painter", lambda *_: painter)
        with pytest.raises(UserError, match=f"controlnet was trained with {what} "):
            evaluate.networks("genima", tmp_path, tmp_path / "controlnet", tmp_path / "act", "cpu")
    (tmp_path / "act/model.safetensors").write_bytes(b"half")
    evaluate.networks.cache_clear()
    with pytest.raises(UserError, match="holds no trained controller"):
        evaluate.networks("oracle", tmp_path, tmp_path, tmp_path / "act", "cpu")


def test_command_says_what_is_wrong(tmp_path):
    answer = subprocess.run(
        [sys.executable, "evaluate.py", "--run", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        answer.returncode == 2
        and len(answer.stderr.splitlines()) == 1
        and "Traceback" not in answer.stderr
    )
    assert "There is no HDF5 file" in answer.stderr
