"""sims/: the environment's contract, the eight tasks and their experts, cameras, drawing."""

import hashlib
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from test_episodes import stage

import collect_demos
from genima.episodes import CAMERAS
from genima.files import UserError
from sims import Simulators, make_env, rendering
from sims.demonstrator import expert_actions, record_demonstration
from sims.mujoco_panda import PandaEnv
from sims.mujoco_tasks import COLOURS, TASKS
from sims.perturbed_panda import PERTURBATIONS, PerturbedEnv
from sims.rendering import new_renderer

ROOT = Path(__file__).resolve().parent.parent
SEVERAL = [task for task in TASKS if TASKS[task].candidates > 1]
_envs = {}


def blind(task):
    """One environment without pictures per task."""
    if task not in _envs:
        _envs[task] = PandaEnv(task, images=False)
    return _envs[task]


def test_all_tasks_are_there():
    assert set(TASKS) == {
        "reach_target",
        "push_button",
        "pick_and_lift",
        "slide_block_to_target",
        "open_drawer",
        "take_lid_off_saucepan",
        "close_box",
        "stack_blocks",
    }


@pytest.mark.filterwarnings(
    "ignore:.*(infinity|spec).*"
)  # joint speeds have no bound; the environment is not registered
def test_gymnasium_accepts_the_environment():
    check_env(PandaEnv("push_button", image_size=(16, 24)))


# ----------------------------------------------------------------------------------------- drawing
def test_a_machine_that_cannot_draw_is_one_sentence(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setattr(rendering, "try_to_draw", lambda library: f"{library} is not there")
    with pytest.raises(UserError) as caught:
        PandaEnv("push_button", images=False).render()
    sentence = str(caught.value)
    if sys.platform == "linux":
        assert sentence.startswith("Neither EGL nor OSMesa can draw on this machine")
        assert "'egl is not there'" in sentence and "'osmesa is not there'" in sentence
    assert "apt-get install" in sentence and "\n" not in sentence


def test_a_renderer_that_fails_is_one_sentence(monkeypatch):
    monkeypatch.setattr(mujoco, "Renderer", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="cannot draw with MUJOCO_GL=.*division by zero"):
        PandaEnv("push_button", images=False).render()


@pytest.mark.parametrize("value", ["foo", "wgl", "disabled"])
def test_a_wrong_variable_is_named_with_its_value(monkeypatch, value):
    monkeypatch.setenv("MUJOCO_GL", value)
    with pytest.raises(UserError, match=f"MUJOCO_GL is '{value}'"):
        PandaEnv("push_button", images=False).render()


@pytest.mark.parametrize("works", ["egl", "osmesa"])
def test_the_renderer_is_chosen_once_for_this_process_and_its_children(monkeypatch, works):
    tried = []

    def attempt(library):
        tried.append(library)
        return None if library == works else "no"

    monkeypatch.setattr(rendering, "try_to_draw", attempt)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("MUJOCO_GL", " ")
    assert rendering.choose_renderer() == works and os.environ["MUJOCO_GL"] == works
    assert rendering.choose_renderer() == works
    assert tried == ["egl", "osmesa"][: 1 if works == "egl" else 2]


def test_trying_to_draw_runs_no_file_of_the_current_folder(tmp_path, monkeypatch):
    for name in ("mujoco.py", "importlib.py", "numpy.py"):
        (tmp_path / name).write_text("open('this_ran', 'w').close(); raise SystemExit(0)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    rendering.try_to_draw("egl")
    assert not (tmp_path / "this_ran").exists()


def test_what_the_library_says_is_kept():
    reason = rendering.try_to_draw("nothing")
    assert "RuntimeError: invalid value" in reason and "\n" not in reason


def test_mujoco_may_be_imported_before(tmp_path):
    code = """
import mujoco
from sims.mujoco_panda import PandaEnv
env = PandaEnv("push_button", image_size=16)
env.reset(seed=0)
print(env.render().shape)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "(16, 16, 3)", done.stderr


def test_images_that_are_too_large_are_refused():
    for size in (10**7, (64, 5000)):
        with pytest.raises(UserError, match="too large"):
            PandaEnv("push_button", image_size=size)


# --------------------------------------------------------------------------------- no hidden state
def test_each_environment_is_new_unless_it_is_kept():
    arguments = ("push_button", 0, ())
    assert make_env(*arguments) is not make_env(*arguments)
    simulators = Simulators()
    assert simulators.get(*arguments) is simulators.get(*arguments)
    assert simulators.get(*arguments) is not simulators.get(*arguments, sim="light")
    assert Simulators().get(*arguments) is not simulators.get(*arguments)


# ------------------------------------------------------------------------------------- collecting
@pytest.mark.parametrize(
    "words",
    [
        ("--seed", -1),
        ("--seed", 10**30),
        ("--scenes", 0),
        ("--scenes", 10**18),
        ("--image-size", 0),
        ("--image-size", 10**7),
        ("--workers", 0),
        ("--workers", 10**9),
    ],
)
def test_numbers_out_of_range_are_one_sentence(tmp_path, monkeypatch, capsys, words):
    code, out, sentence = stage(monkeypatch, capsys, collect_demos.main, "--run", tmp_path, *words)
    assert code == 2 and out == "" and words[0] in sentence and str(words[1]) in sentence
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------- same seed
def digest(env, seed):
    """A fingerprint of every byte that a whole demonstration shows and does."""
    fingerprint = hashlib.sha256()
    observation, info = env.reset(seed=seed)
    for action in expert_actions(env):
        for part in (
            observation["qpos"],
            observation["qvel"],
            *observation["images"].values(),
            action,
        ):
            fingerprint.update(part.tobytes())
        observation, _, _, _, info = env.step(action)
    return fingerprint.hexdigest() + info["instruction"]


def test_same_seed_same_episode_bit_for_bit():
    env = PandaEnv("pick_and_lift", image_size=24)
    first = digest(env, 3)
    assert digest(env, 4) != first  # and it leaves traces in the environment, if anything does
    assert digest(env, 3) == first
    code = (
        "from sims.mujoco_panda import PandaEnv; from test_sims import digest; "
        "print(digest(PandaEnv('pick_and_lift', image_size=24), 3))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert other.stdout.strip() == first, other.stderr


def test_reset_without_a_seed_draws_another_scene():
    env = blind("reach_target")
    env.reset(seed=0)
    scenes = []
    for _ in range(2):
        env.reset()
        scenes.append(env.data.mocap_pos.copy())
    assert not np.allclose(*scenes)


# -------------------------------------------------------------------------------------------- tasks
@pytest.mark.parametrize("start", ["anywhere", "near"])
@pytest.mark.parametrize("task", TASKS)
def test_the_scripted_expert_succeeds(task, start):
    env, successes, seeds = blind(task), 0, range(100, 105)
    for seed in seeds:
        variation = seed % env.task.candidates
        _, info = env.reset(seed=seed, options={"variation": variation, "start": start})
        assert not info["success"]
        rewards, truncated = [], False
        for action in expert_actions(env):
            assert env.action_space.contains(action.astype(np.float32))
            _, reward, terminated, truncated, info = env.step(action)
            assert terminated == (reward == 1)
            rewards.append(reward)
        successes += info["success"] and not truncated
        assert info["success"] == (rewards[-1] == 1)
        for other in set(range(env.task.candidates)) - {
            variation
        }:  # what was done counts for the named object only
            env.variation = other
            assert not env.task.success(env)
    assert successes >= 0.9 * len(seeds)


def test_a_stack_counts_once_it_is_let_go():
    env = blind("stack_blocks")
    env.reset(seed=100)
    successes = [(action[7], env.step(action)[4]["success"]) for action in expert_actions(env)]
    assert (1, True) in successes and (0, True) not in successes


@pytest.mark.parametrize("task", TASKS)
def test_nothing_happens_while_the_arm_holds_still(task):
    env = blind(task)
    observation, _ = env.reset(seed=7)
    hold = np.append(env.data.ctrl[:7], observation["qpos"][7])
    focus = env.task.focus(env)
    for _ in range(15):
        _, reward, terminated, _, info = env.step(hold)
        assert reward == 0 and not terminated and not info["success"]
    assert np.linalg.norm(env.task.focus(env) - focus) < 2e-3


def test_truncation_after_the_longest_allowed_time():
    env = blind("reach_target")
    env.reset(seed=1)
    hold = np.append(env.data.ctrl[:7], 1)
    truncations = [env.step(hold)[3] for _ in range(env.task.max_steps)]
    assert truncations == [False] * (env.task.max_steps - 1) + [True]


def test_the_wrong_button_ends_the_episode_without_success():
    env = blind("push_button")
    env.reset(seed=11, options={"variation": 0})
    env.variation = 1
    actions = list(expert_actions(env))
    env.variation = 0
    for action in actions:
        _, reward, terminated, _, info = env.step(action)
        assert reward == 0 and not info["success"]
        if terminated:
            break
    assert terminated and env.task.pressed(env, 1) and not env.task.pressed(env, 0)


# ----------------------------------------------------------------------------------------- language
@pytest.mark.parametrize("task", SEVERAL)
def test_only_the_words_say_which_object_is_meant(task):
    env = PandaEnv(task, image_size=32)
    pictures, instructions = [], []
    for variation in range(env.task.candidates):
        observation, info = env.reset(seed=5, options={"variation": variation})
        pictures.append(np.stack(list(observation["images"].values())))
        instructions.append(info["instructions"])
        assert info["instruction"] in info["instructions"] and info["variation"] == variation
        for sentence in info["instructions"]:
            assert [name for name in env.task.names if name in sentence.split()] == [
                env.task.names[variation]
            ]
    for other in range(1, env.task.candidates):
        np.testing.assert_array_equal(pictures[0], pictures[other])
        assert not set(instructions[0]) & set(instructions[other])


@pytest.mark.parametrize(
    ("task", "geom"),
    [
        ("reach_target", "ball{}"),
        ("push_button", "cap{}"),
        ("pick_and_lift", "block{}"),
        ("stack_blocks", "block{}"),
    ],
)
def test_the_named_object_has_the_named_colour(task, geom):
    env = blind(task)
    for seed in range(4):
        for variation in range(env.task.candidates):
            env.reset(seed=seed, options={"variation": variation})
            named = [
                i
                for i in range(4 if task == "stack_blocks" else 3)
                if np.allclose(
                    env.model.geom(geom.format(i)).rgba[:3], COLOURS[env.task.names[variation]]
                )
            ]
            assert len(named) == (2 if task == "stack_blocks" else 1)
            gaps = [
                np.linalg.norm((env.data.geom(geom.format(i)).xpos - env.task.focus(env))[:2])
                for i in named
            ]
            assert min(gaps) < 1e-6


def test_the_drawers_are_named_from_the_table_upwards():
    env = blind("open_drawer")
    heights = []
    for variation, name in enumerate(("bottom", "middle", "top")):
        _, info = env.reset(seed=0, options={"variation": variation})
        assert name in info["instruction"]
        heights.append(env.task.focus(env)[2])
    assert heights == sorted(heights)


@pytest.mark.parametrize("task", sorted(set(TASKS) - set(SEVERAL)))
def test_one_candidate_needs_no_name(task):
    env = blind(task)
    _, info = env.reset(seed=0)
    assert info["instruction"] in env.task.templates and "{" not in info["instruction"]


# ----------------------------------------------------------------------------------------- geometry
def test_camera_matrices_agree_with_mujocos_pictures():
    """Small balls anywhere in view: a centre's projection is the middle of the ball's pixels."""
    height, width = 120, 200
    env, random = (
        PandaEnv("reach_target", image_size=(height, width), images=False),
        np.random.default_rng(0),
    )
    env.reset(seed=2)
    ball = env.model.geom("ball0").id
    env.model.geom("ball0").size[0] = 0.006
    renderer, option = new_renderer(env.model, height, width), mujoco.MjvOption()
    renderer.enable_segmentation_rendering()
    option.geomgroup[2] = 0  # without the arm, which might hide a part of the ball
    env.data.mocap_pos[1:] = (0, 0, -5)
    for camera in CAMERAS:
        seen = 0
        while seen < 12:
            intrinsics, world_from_camera = env.camera_parameters(camera)
            depth = random.uniform(0.15, 0.5)
            pixel = np.array([random.uniform(20, width - 20), random.uniform(20, height - 20), 1.0])
            env.data.mocap_pos[0] = (
                world_from_camera @ np.append(np.linalg.inv(intrinsics) @ pixel * depth, 1)
            )[:3]
            if env.data.mocap_pos[0, 2] < 0.02:  # under the table
                continue
            mujoco.mj_forward(env.model, env.data)
            renderer.update_scene(env.data, camera, option)
            picture = renderer.render()
            rows, columns = np.nonzero(
                (picture[..., 0] == ball) & (picture[..., 1] == mujoco.mjtObj.mjOBJ_GEOM)
            )
            assert len(rows), f"{camera}: no ball at pixel {pixel[:2]}"
            assert np.hypot(columns.mean() + 0.5 - pixel[0], rows.mean() + 0.5 - pixel[1]) < 0.75
            seen += 1
    renderer.close()


def test_joint_frames_turn_with_their_joints():
    env = blind("reach_target")
    env.reset(seed=0)
    before = env.joint_poses()
    for i in range(7):
        env.reset(seed=0)
        env.data.qpos[i] += 0.3
        mujoco.mj_forward(env.model, env.data)
        after = env.joint_poses()
        turn = np.array([[np.cos(0.3), -np.sin(0.3), 0], [np.sin(0.3), np.cos(0.3), 0], [0, 0, 1]])
        np.testing.assert_allclose(after[: i + 1, :3, 3], before[: i + 1, :3, 3], atol=1e-6)
        np.testing.assert_allclose(after[i, :3, :3], before[i, :3, :3] @ turn, atol=1e-5)
        assert np.abs(after[7] - before[7]).max() > 1e-2  # and the tool goes along


def test_inverse_kinematics_reaches_the_pose():
    env = blind("reach_target")
    for seed in range(5):
        env.reset(seed=seed)
        position, rotation = env.task.focus(env), env.tool_pose()[:3, :3]
        env.data.qpos[:7] = env.ik(position, rotation)
        mujoco.mj_forward(env.model, env.data)
        np.testing.assert_allclose(env.tool_pose()[:3, 3], position, atol=1e-3)
        np.testing.assert_allclose(env.tool_pose()[:3, :3], rotation, atol=5e-3)
    with pytest.raises(UserError, match="cannot reach"):
        env.ik(np.array([2.0, 0, 0.3]), rotation)


# ---------------------------------------------------------------------------------------- bad input
def test_a_task_that_does_not_exist():
    with pytest.raises(UserError, match="no task 'make_coffee'"):
        PandaEnv("make_coffee")


def test_a_variation_that_does_not_exist():
    for variation in (-1, 3):
        with pytest.raises(UserError, match="does not exist"):
            blind("push_button").reset(seed=0, options={"variation": variation})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda action: np.where(np.arange(8) == 2, np.nan, action), "finite"),
        (lambda action: action[:7], "8 finite numbers"),
        (lambda action: action + 4.0 * (np.arange(8) == 0), "outside the joint limits"),
        (lambda action: np.append(action[:7], 1.2), "outside the joint limits"),
    ],
)
def test_bad_actions(change, message):
    env = blind("push_button")
    env.reset(seed=0)
    hold, before = np.append(env.data.ctrl[:7], 1), env.data.qpos.copy()
    with pytest.raises(UserError, match=message):
        env.step(change(hold))
    np.testing.assert_array_equal(env.data.qpos, before)  # nothing moved
    assert env.steps == 0
    env.step(hold)


# ------------------------------------------------------------------------------------ perturbations
@pytest.mark.parametrize("kind", PERTURBATIONS)
@pytest.mark.parametrize("task", ["push_button", "pick_and_lift"])
def test_a_perturbation_changes_the_pictures_and_nothing_else(kind, task):
    plain, env = PandaEnv(task, image_size=64), PerturbedEnv(kind, task, image_size=64)
    before = {}
    for seed in (0, 1, 0):
        (usual, expected), (seen, info) = plain.reset(seed=seed), env.reset(seed=seed)
        assert info == expected
        for camera in ("front", "right_shoulder"):
            different = (
                np.abs(seen["images"][camera].astype(int) - usual["images"][camera]).max(-1) > 8
            )
            shares = {  # of the picture; behind the shoulders' views there are floor and sky
                "light": (0.3, 1),
                "table": (0.1, 1),
                "camera": (0.05, 0.6),
                "background": (0.002, 0.6),
            }
            least, most = shares.get(kind, (0.002, 0.2))
            assert least < different.mean() < most
        pictures = np.stack(list(seen["images"].values()))
        if seed in before:  # the same seed looks the same, whatever was there in between
            np.testing.assert_array_equal(pictures, before[seed])
        before[seed] = pictures
        for action, _ in zip(expert_actions(plain), range(15)):
            usual, seen = plain.step(action)[0], env.step(action)[0]
            np.testing.assert_array_equal(seen["qpos"], usual["qpos"])
        np.testing.assert_array_equal(env.tool_pose(), plain.tool_pose())
    assert not np.array_equal(before[0], before[1])


def test_cameras_tell_where_they_were_moved_to():
    plain, env = (
        PandaEnv("push_button", images=False),
        PerturbedEnv("camera", "push_button", images=False),
    )
    for seed in range(3):
        plain.reset(seed=seed), env.reset(seed=seed)
        for camera in CAMERAS:
            (_, usual), (_, moved) = plain.camera_parameters(camera), env.camera_parameters(camera)
            turn = np.degrees(np.arccos((np.trace(usual[:3, :3].T @ moved[:3, :3]) - 1) / 2))
            assert (
                0 < np.abs(usual[:3, 3] - moved[:3, 3]).max() <= 0.03 * 3**0.5
                and 0 < turn <= 3 * 3**0.5
            )


def test_near_starts_are_on_any_side_or_on_the_way():
    """A painter must see that what is to be reached does not depend on where the arm is."""
    offsets = start_offsets("reach_target")
    assert 10 < np.sum(offsets[:, 2] < 0) < 50  # on either side of a ball
    distances = np.linalg.norm(offsets, axis=1)
    assert np.median(distances) < 0.15 < np.max(distances)

    offsets = start_offsets("push_button")
    assert np.sum(np.linalg.norm(offsets, axis=1) > 0.19) > 3  # metres: still on the way
    sideways = np.linalg.norm(offsets[:, :2], axis=1)
    assert np.sum((offsets[:, 2] < 0.05) & (sideways > 0.02)) > 3  # a press that missed


@pytest.mark.parametrize("task", TASKS)
def test_every_second_demonstration_of_each_object_begins_near_it(task):
    for count in range(1, 4):  # scenes a variation
        starts = defaultdict(list)
        candidates = TASKS[task].candidates
        for seed in range(1_000_000, 1_000_000 + 4 * count * candidates):
            _, _, variation, start = collect_demos.attempt_of(task, seed, seed % candidates)
            starts[variation].append(start)
        assert len(starts) == candidates
        for several in starts.values():
            assert several.count("near") == several.count("anywhere") == 2 * count
    starts = {collect_demos.attempt_of(task, 7, variation)[3] for variation in range(candidates)}
    assert len(starts) == min(candidates, 2)  # --scenes: of one scene, too


def test_half_of_the_stacks_that_begin_near_are_half_done():
    env = blind("stack_blocks")
    half_done = {"anywhere": 0, "near": 0}
    for start in half_done:
        for seed in range(20):
            env.reset(seed=seed, options={"start": start})
            half_done[start] += env.task.first_stands(env)
    assert half_done["anywhere"] == 0 and 5 <= half_done["near"] <= 15


def test_a_half_done_stack_is_finished_on_the_first_block():
    env = blind("stack_blocks")
    finished = 0
    for seed in range(10):
        _, info = env.reset(seed=seed, options={"start": "near"})
        if not env.task.first_stands(env):
            continue
        assert not info["success"]
        grippers = []
        for action in expert_actions(env):
            _, _, _, _, info = env.step(action)
            grippers.append(action[-1])
        first, second = env.task.blocks(env)
        assert info["success"]
        assert np.sum(np.diff(grippers) < 0) == 1  # it takes one block alone
        assert np.linalg.norm((second - first)[:2]) < 0.006  # metres
        finished += 1
    assert finished >= 3


def start_offsets(task):
    """Where the tool is from the object when an episode begins near it: (60, 3) metres."""
    env = make_env(task, 0, ())
    offsets = []
    for seed in range(60):
        env.reset(seed=seed, options={"start": "near"})
        tool = env.tool_pose()[:3, 3]
        assert tool[2] > 0.015  # over the table
        assert task == "reach_target" or not env.task.success(env)
        offsets.append(tool - env.task.focus(env))
    return np.array(offsets)


def test_a_ball_is_approached_slowly_enough_to_be_looked_at_once_more():
    env = make_env("reach_target", 0, ())
    for seed in range(4):
        episode = record_demonstration(env, "reach_target", seed, 0, start="anywhere")
        assert episode.success
        tool = episode.joint_poses[:, -1, :3, 3]
        distances = np.linalg.norm(tool - env.task.focus(env), axis=1)
        assert np.sum((distances > 0.01) & (distances < 0.09)) >= 5


def test_a_button_is_pressed_slowly_enough_to_be_looked_at_once_more():
    """A policy looks every 8 steps: so one look at least is from near, on the way down."""
    env = make_env("push_button", 0, ())
    for seed in range(4):
        episode = record_demonstration(env, "push_button", seed, 0, start="anywhere")
        assert episode.success
        height = episode.joint_poses[:, -1, 2, 3] - env.task.height  # metres over the cap
        assert np.sum((height > 0) & (height < 0.095)) >= 7


@pytest.mark.parametrize("task", ["pick_and_lift", "take_lid_off_saucepan", "stack_blocks"])
def test_a_grasp_is_slow_enough_to_be_looked_at_once_more(task):
    env = make_env(task, 0, ())
    for seed in range(3):
        env.reset(seed=seed)
        point = env.task.focus(env)
        heights = []
        for action in expert_actions(env):
            if action[7] == 0:  # the fingers close
                break
            env.step(action)
            heights.append(env.tool_pose()[2, 3] - point[2])
        assert sum(0.005 < height < 0.1 for height in heights) >= 7


def test_of_two_equal_blocks_the_near_one_goes_first():
    """Whichever the expert takes, its place in the picture has to say so."""
    env = blind("stack_blocks")
    for seed in range(10):
        env.reset(seed=seed)
        along = [env.data.body(f"block{i}").xpos[0] for i in range(4)]  # metres from the robot
        assert max(along[::2]) + 0.04 < min(along[1::2])
        near, far = env.task.blocks(env)
        np.testing.assert_array_equal(env.task.focus(env), near)
        env.data.joint(f"block{2 * env.variation}").qpos[:2] = env.model.body("target").pos[:2]
        mujoco.mj_forward(env.model, env.data)
        np.testing.assert_array_equal(env.task.focus(env), far)
