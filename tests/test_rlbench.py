"""RLBench: datasets written by stand-ins of its classes, its live environment (a stand-in), the
paper's protocol."""

import io
import json
import os
import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

STANDIN = ROOT / "tests" / "rlbench_standin"
sys.path.insert(0, str(STANDIN))

import test_evaluate
from gymnasium.utils.env_checker import check_env
from rlbench.action_modes.action_mode import MoveArmThenGripper
from rlbench.action_modes.arm_action_modes import JointPosition
from rlbench.action_modes.gripper_action_modes import Discrete
from rlbench.backend import scene as toy
from rlbench.environment import Environment
from rlbench.observation_config import ObservationConfig
from rlbench.tasks.reach_target import ReachTarget

import collect_demos
import evaluate
from genima.episodes import CAMERAS, check_episode, find_episodes, read_episode, write_episode
from genima.files import UserError
from genima.kinematics import Chain
from genima.report import summarise
from genima.spheres import draw_spheres
from sims.coppeliasim import missing, simulator
from sims.mujoco_panda import PandaEnv
from sims.rlbench_arm import JOINT_4_ZERO, rlbench_chain
from sims.rlbench_dataset import find_demonstrations, load, read_demonstration
from sims.rlbench_panda import RLBenchEnv
from sims.rlbench_protocol import PAPER_TASKS

SIZE = (40, 48)  # height, width


@pytest.fixture(autouse=True)
def no_simulator_left():
    yield
    simulator.stop()


def dumps(thing, protocol=4, core="numpy._core"):
    """A pickle as NumPy 2 (numpy._core) or NumPy 1 (numpy.core) writes it."""
    file, whichmodule = io.BytesIO(), pickle.whichmodule
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(
            pickle,
            "whichmodule",
            lambda obj, name: whichmodule(obj, name).replace("numpy._core", core),
        )
        pickle._Pickler(file, protocol).dump(thing)
    return file.getvalue()


def write_dataset(
    root,
    task="reach_target",
    variations=(0,),
    episodes=1,
    protocol=4,
    core="numpy._core",
    size=SIZE,
    change=None,
):
    """A dataset as RLBench's generator writes it.

    -> {(variation, episode): the Demo, with its pictures}.
    """
    config = ObservationConfig()
    for camera in ("left_shoulder", "right_shoulder", "wrist", "front"):
        getattr(config, f"{camera}_camera").image_size = size[::-1]
    simulator.stop()  # a process has one
    environment = Environment(
        MoveArmThenGripper(JointPosition(), Discrete()), obs_config=config, headless=True
    )
    environment.launch()
    live, demos = environment.get_task(ReachTarget), {}
    for variation in variations:
        live.set_variation(variation)
        descriptions, _ = live.reset()
        folder = root / task / f"variation{variation}"
        (folder / "episodes").mkdir(parents=True)
        (folder / "variation_descriptions.pkl").write_bytes(dumps(descriptions, protocol))
        for number in range(episodes):
            np.random.seed(100 * variation + number)
            (demo,) = live.get_demos(amount=1, live_demos=True)
            episode = folder / "episodes" / f"episode{number}"
            pictures = {}
            for camera in CAMERAS:
                (episode / f"{camera}_rgb").mkdir(parents=True)
                random = np.random.default_rng(number)
                pictures[camera] = [
                    o.__dict__[f"{camera}_rgb"] ^ random.integers(0, 4, (*size, 3), np.uint8)
                    for o in demo
                ]
                for t, picture in enumerate(pictures[camera]):
                    Image.fromarray(picture).save(episode / f"{camera}_rgb" / f"{t}.png")
            for observation in demo:
                for name in list(observation.__dict__):
                    if name.endswith(("_rgb", "_depth", "_mask", "_point_cloud")):
                        setattr(observation, name, None)
            if change:
                change(demo)
            (episode / "low_dim_obs.pkl").write_bytes(dumps(demo, protocol, core))
            demos[variation, number] = demo, pictures
    environment.shutdown()
    return demos


def only(root):
    (folder,) = find_demonstrations(root)
    return folder


# ------------------------------------------------------------------------------------ the importer
@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_demonstration_comes_back(tmp_path, protocol, core):
    demo, pictures = write_dataset(tmp_path, variations=(1,), protocol=protocol, core=core)[1, 0]
    written = (tmp_path / "reach_target/variation1/episodes/episode0/low_dim_obs.pkl").read_bytes()
    assert (b"numpy._core.multiarray" in written) == (
        core == "numpy._core"
    ) and f"{core}.multiarray".encode() in written
    episode = read_demonstration(only(tmp_path), CAMERAS)
    write_episode(tmp_path / "episode.hdf5", episode)
    episode = read_episode(tmp_path / "episode.hdf5")
    for camera in CAMERAS:
        assert np.array_equal(episode.images[camera], np.stack(pictures[camera]))
    assert np.allclose(episode.qpos[:, :7], [o.joint_positions for o in demo], atol=1e-6)
    assert np.array_equal(episode.qpos[:, 7], [o.gripper_open for o in demo])
    assert np.allclose(episode.qvel[:, :7], [o.joint_velocities for o in demo], atol=1e-5)
    # What was sent after frame t stands in frame t+1; the planner's last step has nothing, so the
    # joints themselves count.
    sent = [o.misc["joint_position_action"] for o in demo[1:-1]]
    assert np.allclose(episode.action[:-2], sent, atol=1e-6)
    assert (
        np.allclose(episode.action[-2:, :7], demo[-1].joint_positions, atol=1e-6)
        and (episode.action[-2:, 7] == 0).all()
    )
    assert np.array_equal(episode.action[:-1, 7], [o.gripper_open for o in demo[1:]])
    assert (episode.task, episode.variation, episode.robot, episode.fps, episode.seed) == (
        "reach_target",
        1,
        "panda",
        20,
        0,
    )
    assert episode.instruction == "reach the blue target" and episode.instructions == [
        "reach the blue target",
        "touch the blue ball",
    ]


def project_as_rlbench(misc, camera, point):
    """RLBench's own formula, whose focal lengths are negative."""
    pose, intrinsics = misc[f"{camera}_camera_extrinsics"], misc[f"{camera}_camera_intrinsics"]
    assert intrinsics[0, 0] < 0 > intrinsics[1, 1]
    u, v, depth = intrinsics @ (pose[:3, :3].T @ (point - pose[:3, 3]))
    return np.array([u, v]) / depth


@pytest.mark.parametrize("known", ["joint_poses", "gripper alone"])
def test_spheres_lie_where_rlbench_would_project_them(tmp_path, known):
    def forget(demo):
        for observation in demo:
            del observation.misc["joint_poses"]

    demo, _ = write_dataset(tmp_path, change=None if known == "joint_poses" else forget)[0, 0]
    episode = read_demonstration(only(tmp_path), CAMERAS)
    check_episode(episode)
    chain = Chain.from_episode(episode)  # what the other stages make of it
    assert set(chain.mounted) == {"wrist"} and set(chain.fixed) == set(CAMERAS) - {"wrist"}
    seen = 0
    for t, observation in enumerate(demo):
        joints, last = toy.kinematics(observation.joint_positions)
        if (
            known != "joint_poses"
        ):  # then the joints' origins are where Denavit and Hartenberg put them
            joints = joints @ np.array([toy.at(0, 0, -shift) for shift in toy.SHIFTS])
        points = [*joints[:, :3, 3], (last @ toy.TIP)[:3, 3]]
        for camera in CAMERAS:
            world_from_camera, intrinsics = (
                episode.extrinsics[camera][t],
                episode.intrinsics[camera],
            )
            for point, pose in zip(points, episode.joint_poses[t]):
                expected = project_as_rlbench(observation.misc, camera, point)
                x, y, z = np.linalg.inv(world_from_camera)[:3] @ np.append(pose[:3, 3], 1)
                if z < 0.05:
                    continue
                assert np.allclose(
                    [x / z, y / z] * intrinsics[[0, 1], [0, 1]] + intrinsics[:2, 2],
                    expected,
                    atol=0.05,
                )
                layer = draw_spheres(
                    pose[None],
                    np.array([0.05]),
                    np.array([[255, 0, 0]]),
                    intrinsics,
                    world_from_camera,
                    *SIZE,
                )
                rows, columns = np.nonzero(layer[..., 3])
                if (
                    len(rows) > 8
                    and rows.min() > 0
                    and rows.max() < SIZE[0] - 1
                    and columns.min() > 0
                    and columns.max() < SIZE[1] - 1
                ):
                    alpha = layer[rows, columns, 3].astype(float)
                    middle = np.average([columns + 0.5, rows + 0.5], axis=1, weights=alpha)
                    assert np.abs(middle - expected).max() < 0.5
                    seen += 1
    assert seen > 50, seen


def test_the_world_is_the_robots_base_and_joints_turn_about_z(tmp_path):
    demo, _ = write_dataset(tmp_path)[0, 0]
    episode = read_demonstration(only(tmp_path), ("front",))
    for t, observation in enumerate(demo):
        joints, last = toy.kinematics(observation.joint_positions)
        expected = np.linalg.inv(toy.BASE) @ np.array([*joints, last @ toy.TIP])
        assert np.allclose(episode.joint_poses[t, :, :3, 3], expected[:, :3, 3], atol=1e-5)
        assert np.allclose(episode.joint_poses[t, :, :3, 2], expected[:, :3, 2], atol=1e-5)
    assert np.allclose(
        Chain.from_episode(episode).forward_kinematics(episode.qpos[:, :7]),
        episode.joint_poses,
        atol=1e-5,
    )


def test_the_panda_is_franka_s_with_another_zero_of_joint_4():
    env = PandaEnv("reach_target", images=False)
    for seed in range(3):
        env.reset(seed=seed)
        q = env.data.qpos[:7].copy()
        q[3] -= JOINT_4_ZERO
        ours = rlbench_chain().forward_kinematics(q)
        assert np.allclose(ours[:7], env.joint_poses()[:7], atol=1e-6)
    assert JOINT_4_ZERO == 0.0698 and (toy.ZEROS == [0, 0, 0, 0.0698, 0, 0, 0]).all()


def test_a_slack_arm_is_made_rigid(tmp_path):
    """CoppeliaSim's joints give by fractions of a millimetre; other stages want them exact."""

    def slacken(demo):
        random = np.random.default_rng(0)
        for observation in demo:
            for pose in observation.misc["joint_poses"]:
                pose[:3] += random.normal(0, 1e-3, 3)
            observation.gripper_pose[:3] += random.normal(0, 1e-3, 3)
            observation.misc["wrist_camera_extrinsics"][:3, 3] += random.normal(0, 1e-3, 3)

    write_dataset(tmp_path, change=slacken)
    episode = read_demonstration(only(tmp_path), CAMERAS)
    chain = Chain.from_episode(episode)
    demo, _ = write_dataset(tmp_path / "rigid")[0, 0]
    joints, _ = toy.kinematics(demo[5].joint_positions)
    assert np.allclose(
        chain.forward_kinematics(episode.qpos[5, :7])[:7, :3, 3],
        (np.linalg.inv(toy.BASE) @ joints)[:, :3, 3],
        atol=3e-3,
    )


def test_pictures_are_resized_with_their_cameras(tmp_path):
    demo, _ = write_dataset(tmp_path)[0, 0]
    episode = read_demonstration(only(tmp_path), ("front", "wrist"), size=(20, 20))
    assert episode.images["front"].shape == (len(demo), 20, 20, 3) and set(episode.images) == {
        "front",
        "wrist",
    }
    tip = toy.kinematics(demo[3].joint_positions)[1] @ toy.TIP
    x, y, z = np.linalg.inv(episode.extrinsics["front"][3])[:3] @ np.append(
        episode.joint_poses[3, -1, :3, 3], 1
    )
    expected = project_as_rlbench(demo[3].misc, "front", tip[:3, 3]) * [20 / SIZE[1], 20 / SIZE[0]]
    assert np.allclose((episode.intrinsics["front"] @ [x, y, z])[:2] / z, expected, atol=0.02)


# ----------------------------------------------------------------------------------------- pickles
class Runs:
    """Its pickle calls a function."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


def attacks(marker):
    touch = f"touch {marker}"
    return {
        "posix.system": Runs(os.system, touch),
        "builtins.eval": Runs(eval, f"open({str(marker)!r}, 'w')"),
        "subprocess.Popen": Runs(subprocess.Popen, ["touch", str(marker)]),
        "numpy.load": Runs(np.load, str(marker)),
        "numpy.fromfile": Runs(np.fromfile, "/dev/null"),
        "builtins.getattr": Runs(getattr, "text", "upper"),
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    "name",
    [
        "posix.system",
        "builtins.eval",
        "subprocess.Popen",
        "numpy.load",
        "numpy.fromfile",
        "builtins.getattr",
    ],
)
@pytest.mark.parametrize("file", ["low_dim_obs.pkl", "variation_descriptions.pkl"])
def test_a_pickle_that_runs_code_is_refused(tmp_path, protocol, name, file):
    write_dataset(tmp_path)
    folder = only(tmp_path)
    path = (folder if file == "low_dim_obs.pkl" else folder.parent.parent) / file
    attack = attacks(tmp_path / "ran")[name]
    content = load(path)
    nested = (
        [*content, {"deep": [attack]}]
        if isinstance(content, list)
        else {"a": [content._observations[0].__dict__, (attack,)]}
    )
    for thing in (attack, nested):
        path.write_bytes(pickle.dumps(thing, protocol))
        with pytest.raises(UserError) as caught:
            read_demonstration(folder, CAMERAS)
        assert (
            str(path) in str(caught.value)
            and name in str(caught.value)
            and "\n" not in str(caught.value)
        )
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "attack",
    [
        b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",  # a way round through a dotted name
        # an array out of thin air
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x64\x85U\x01b\x87R.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\x00\x85U\x01b\x87R.",
        b"\x80\x02crlbench.demo\nDemo\n)\x81N}X\x07\x00\x00\x00__doc__K\x01s\x86b",  # cut off
        b"",
        b"\x80\x04",
        b"not a pickle",
    ],
)
def test_a_broken_pickle_is_one_sentence(tmp_path, attack):
    (tmp_path / "file.pkl").write_bytes(attack)
    with pytest.raises(UserError, match="file.pkl") as caught:
        load(tmp_path / "file.pkl")
    assert "\n" not in str(caught.value)


def test_a_pickle_cannot_change_the_next_one_s_classes(tmp_path):
    # BUILD with a pair of states sets attributes, here of the class itself
    (tmp_path / "evil.pkl").write_bytes(
        b"\x80\x02crlbench.demo\nDemo\nN}X\x05\x00\x00\x00taintK\x01s\x86b."
    )
    with pytest.raises(UserError, match="evil.pkl"):
        load(tmp_path / "evil.pkl")
    write_dataset(tmp_path)
    assert not hasattr(load(only(tmp_path) / "low_dim_obs.pkl"), "taint")


# --------------------------------------------------------------------------------------- bad input
def spoil(folder, how):
    """Break a demonstration; afterwards reading it must fail with a sentence that names this."""
    if how == "half an episode":
        for t in range(6, 13):
            (folder / "wrist_rgb" / f"{t}.png").unlink()
        return "wrist_rgb has 6 pictures, but the demonstration 13 frames"
    if how == "a missing picture":
        (folder / "front_rgb/3.png").unlink()
        return "front_rgb has 12 pictures"
    if how == "more pictures than frames":
        (folder / "front_rgb/13.png").write_bytes((folder / "front_rgb/3.png").read_bytes())
        return "front_rgb has 14 pictures"
    if how == "half a picture":
        path = folder / "front_rgb/3.png"
        path.write_bytes(path.read_bytes()[:200])
        return "front_rgb/3.png is no whole picture"
    if how == "no pickle":
        (folder / "low_dim_obs.pkl").unlink()
        return "low_dim_obs.pkl cannot be read"
    if how == "half a pickle":
        path = folder / "low_dim_obs.pkl"
        path.write_bytes(path.read_bytes()[:5000])
        return "low_dim_obs.pkl cannot be read"
    if how == "no descriptions":
        (folder.parent.parent / "variation_descriptions.pkl").unlink()
        return "variation_descriptions.pkl cannot be read"
    (folder.parent.parent / "variation_descriptions.pkl").write_bytes(pickle.dumps([]))
    return "variation_descriptions.pkl is not a list of sentences"


@pytest.mark.parametrize(
    "how",
    [
        "half an episode",
        "a missing picture",
        "more pictures than frames",
        "half a picture",
        "no pickle",
        "half a pickle",
        "no descriptions",
        "empty descriptions",
    ],
)
def test_a_broken_demonstration_is_one_sentence_and_nothing_half_imported(tmp_path, how):
    write_dataset(tmp_path / "data", variations=(0, 1))
    sentence = spoil(tmp_path / "data/reach_target/variation1/episodes/episode0", how)
    settings = collect_demos.Settings(
        run=tmp_path / "run", from_rlbench=tmp_path / "data", workers=2
    )
    with pytest.raises(UserError) as caught:
        collect_demos.collect(settings)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert [path.name for path in written] == ["episode000_variation00.hdf5"]  # the whole one


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            lambda o: o.misc.pop("wrist_camera_intrinsics"),
            "wrist_camera_intrinsics of frame 0 is missing",
        ),
        (
            lambda o: o.misc.update(front_camera_extrinsics=np.eye(3)),
            "front_camera_extrinsics of frame 0 is of shape (3, 3)",
        ),
        (
            lambda o: setattr(o, "joint_positions", o.joint_positions[:6]),
            "joint_positions of frame 0 is of shape (6,)",
        ),
        (
            lambda o: setattr(o, "joint_positions", o.joint_positions[::-1].copy()),
            "its joints and its gripper do not move as a Panda's",
        ),
        (lambda o: setattr(o, "gripper_open", None), "gripper_open of frame 0 is missing"),
        (
            lambda o: setattr(o, "joint_positions", o.joint_positions * np.nan),
            "joint_positions of frame 0 is",
        ),
        (lambda o: setattr(o, "gripper_pose", None), "gripper_pose of frame 0 is missing"),
    ],
)
def test_unusable_numbers_are_one_sentence(tmp_path, change, sentence):
    def change_all(demo):
        for observation in demo:
            change(observation)

    write_dataset(tmp_path, change=change_all)
    with pytest.raises(UserError) as caught:
        read_demonstration(only(tmp_path), CAMERAS)
    assert (
        sentence in str(caught.value)
        and "low_dim_obs.pkl" in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_wrong_folders_and_choices_are_one_sentence(tmp_path):
    write_dataset(tmp_path / "data")
    for arguments, sentence in [
        ((tmp_path / "nothing",), "has no <task>/variation<N>"),
        ((tmp_path,), "has no <task>/variation<N>"),
        ((tmp_path / "data", ("open_bax",)), "has no task 'open_bax', only reach_target"),
        ((tmp_path / "data", (), (7,)), "has no variation7"),
    ]:
        with pytest.raises(UserError, match=sentence.replace("<", ".")):
            find_demonstrations(*arguments)
    with pytest.raises(
        UserError,
        match="overhead_rgb is missing; this demonstration's cameras are: front, left_shoulder",
    ):
        read_demonstration(only(tmp_path / "data"), ("overhead",))


# ------------------------------------------------------------------------------------ the commands
def run(*words, **environment):
    """A command with the stand-in for RLBench within reach."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(STANDIN),
        **{key: str(value) for key, value in environment.items()},
    }
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )


def test_importing_chooses_goes_on_and_needs_no_rlbench(tmp_path):
    write_dataset(tmp_path / "data", variations=(0, 2, 10), episodes=2)
    command = ["collect_demos.py", "--from-rlbench", tmp_path / "data", "--run", tmp_path / "run"]
    done = run(
        *command,
        "--variations",
        2,
        10,
        "--scenes",
        1,
        "--image-size",
        16,
        "--cameras",
        "front",
        "wrist",
        PYTHONPATH="",
    )
    assert (
        done.returncode == 0
        and "reach_target: 100.0% of 2 attempts succeeded; 2 episodes in" in done.stdout
    ), done.stderr
    paths = find_episodes(tmp_path / "run/episodes")
    assert [path.name for path in paths] == [
        "episode000_variation02.hdf5",
        "episode000_variation10.hdf5",
    ]
    assert read_episode(paths[1]).variation == 10 and read_episode(paths[0]).image_sizes == {
        "front": (16, 16),
        "wrist": (16, 16),
    }
    before = [path.stat().st_mtime_ns for path in paths]
    done = run(
        *command,
        "--variations",
        2,
        10,
        "--image-size",
        16,
        "--cameras",
        "front",
        "wrist",
        PYTHONPATH="",
    )
    assert (
        "reach_target: 100.0% of 2 attempts succeeded; 4 episodes in" in done.stdout
        and [path.stat().st_mtime_ns for path in paths] == before
    )


def test_both_commands_import_the_same(tmp_path):
    write_dataset(tmp_path / "data", variations=(0, 1), episodes=2, size=(16, 24))
    by_collecting = tmp_path / "collected"
    by_importing = tmp_path / "imported"
    run("collect_demos.py", "--from-rlbench", tmp_path / "data", "--run", by_collecting)
    words = ["import_demos.py", tmp_path / "data", "--run", by_importing, "--fps", 20]
    for sentence in ("4 demonstrations imported", "4 were there already"):
        done = run(*words, PYTHONPATH="")
        assert done.returncode == 0 and sentence in done.stdout, done.stderr
    paths = sorted(by_collecting.rglob("*.hdf5"))
    assert len(paths) == 4
    for path in paths:
        ours = read_episode(by_importing / path.relative_to(by_collecting))
        theirs = read_episode(path)
        assert ours.instruction == theirs.instruction and ours.seed == theirs.seed
        for name in ("qpos", "action", "joint_poses"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        for camera, images in theirs.images.items():
            np.testing.assert_array_equal(ours.images[camera], images)


def test_stages_1_to_3_run_on_an_imported_dataset(tmp_path):
    write_dataset(tmp_path / "data", variations=(0, 1), episodes=2, size=(32, 32))
    for words in (
        ["collect_demos.py", "--from-rlbench", tmp_path / "data"],
        ["episodes.py", "--check", tmp_path / "run/episodes"],
        ["render_spheres.py", "--horizon", 4, "--preview"],
        ["train_controlnet.py", "--base", "none", "--steps", 2, "--batch-size", 2],
        ["train_act.py", "--steps", 2, "--batch-size", 2],
    ):
        done = run(
            *words,
            *([] if words[0] == "episodes.py" else ["--run", tmp_path / "run"]),
            PYTHONPATH="",
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    assert {"controlnet", "act", "spheres"} <= {path.name for path in (tmp_path / "run").iterdir()}


# ------------------------------------------------------------------------------ the live simulator
def test_gymnasium_accepts_the_environment():
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # joint speeds have no bound; the environment is not registered
        check_env(RLBenchEnv("reach_target", image_size=(16, 24)))


def test_the_live_environment_sees_what_rlbench_sees():
    env = RLBenchEnv("open_box", image_size=SIZE)
    observation, info = env.reset(seed=3, options={"variation": 1})
    assert (
        info["variation"] == 1
        and info["instruction"] in info["instructions"]
        and "blue" in info["instruction"]
    )
    for _ in range(3):
        action = np.append(observation["qpos"][:7] + 0.05, 0)
        observation, reward, terminated, truncated, info = env.step(action)
    assert np.allclose(observation["qpos"], action, atol=1e-6) and not (
        reward or terminated or truncated or info["success"]
    )
    joints, last = toy.kinematics(action[:7])
    expected = np.linalg.inv(toy.BASE) @ np.array([*joints, last @ toy.TIP])
    assert np.allclose(env.joint_poses()[:, :3, 3], expected[:, :3, 3], atol=1e-5)
    for camera in CAMERAS:  # the toy paints the tip white, where RLBench's formula says
        intrinsics, world_from_camera = env.camera_parameters(camera)
        x, y, z = np.linalg.inv(world_from_camera)[:3] @ np.append(env.tool_pose()[:3, 3], 1)
        u, v = ((intrinsics @ [x, y, z])[:2] / z).astype(int)
        if 1 < u < SIZE[1] - 1 and 1 < v < SIZE[0] - 1:
            assert (env.render_camera(camera, *SIZE)[v, u] == 255).all()
    assert env.render_camera("front", 80, 96).shape == (80, 96, 3)
    for bad, sentence in [
        (action[:7], "8 finite numbers"),
        (action * np.nan, "8 finite numbers"),
        (action + 9, "outside the joint limits"),
    ]:
        with pytest.raises(UserError, match=sentence):
            env.step(bad)
    # RLBench sends the arm wherever it is told to within the limits.
    far = np.append(env.action_space.high[:7], 1)
    observation, reward, terminated, _, info = env.step(far)
    assert not terminated and not reward and np.allclose(observation["qpos"], far, atol=1e-6)


def test_same_seed_same_scene_and_scenes_of_demonstrations_come_back(tmp_path):
    env = RLBenchEnv("reach_target", image_size=16)
    goals = []
    for seed in (1, 2, 1):
        env.reset(seed=seed)
        goals.append((env.variation, *simulator.task._task.goal))
    assert goals[0] == goals[2] != goals[1]
    demo, _ = write_dataset(tmp_path, variations=(0, 4), episodes=2)[4, 1]
    _, info = env.reset(
        seed=5, options={"demonstration": tmp_path / "reach_target/variation4/episodes/episode1"}
    )
    assert info["variation"] == 4 and np.allclose(
        simulator.task._task.goal, demo[-1].joint_positions
    )


@pytest.mark.parametrize(
    "name, near",
    [("reach_targe", "reach_target"), ("open_bocks", "open_box"), ("Open_Box", "open_box")],
)
def test_a_task_with_a_typo(name, near):
    with pytest.raises(UserError, match=f"no task '{name}'; is it '{near}'"):
        RLBenchEnv(name)


def test_missing_software_is_one_sentence(tmp_path, monkeypatch):
    for variable in (
        "COPPELIASIM_ROOT",
        "LD_LIBRARY_PATH",
        "QT_QPA_PLATFORM_PLUGIN_PATH",
        "DISPLAY",
    ):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "platforms").mkdir()
    for variable, value in [
        ("COPPELIASIM_ROOT", tmp_path),
        ("libcoppeliaSim", None),
        ("LD_LIBRARY_PATH", tmp_path),
        ("QT_QPA_PLATFORM_PLUGIN_PATH", tmp_path),
        ("DISPLAY", ":99"),
    ]:
        assert variable in missing()
        if value:
            monkeypatch.setenv(variable, str(value))
        else:
            (tmp_path / "libcoppeliaSim.so.1").touch()
    assert missing() is None
    for script in ("collect_demos.py", "evaluate.py"):
        (tmp_path / "run/act").mkdir(parents=True, exist_ok=True)
        words = (
            ["--policy", "act", "--controller", tmp_path / "run/act"]
            if script == "evaluate.py"
            else []
        )
        done = run(
            script,
            "--sim",
            "rlbench",
            "--tasks",
            "open_box",
            "--run",
            tmp_path / "run",
            *words,
            PYTHONPATH="",
            COPPELIASIM_ROOT="",
        )
        assert (
            done.returncode == 2
            and len(done.stderr.splitlines()) == 1
            and "COPPELIASIM_ROOT" in done.stderr
        ), done.stderr


def test_collecting_survives_what_goes_wrong(tmp_path):
    command = [
        "collect_demos.py",
        "--sim",
        "rlbench",
        "--run",
        tmp_path,
        "--image-size",
        16,
        "--workers",
        2,
        "--scenes",
        3,
    ]
    tasks = ["reach_target", "crowded_table", "unreachable", "crashing"]
    done = run(*command, "--tasks", *tasks, STANDIN_CRASHED=tmp_path / "crashed")
    assert done.returncode == 0, done.stderr
    assert (
        "reach_target: 100.0% of 3 attempts succeeded; 3 episodes" in done.stdout
        and (tmp_path / "crashed").exists()
    )
    assert "unreachable: 0.0% of 15 attempts succeeded; 0 episodes" in done.stdout
    assert (
        "crashing: 100.0% of 3 attempts succeeded; 3 episodes" in done.stdout
    )  # the scene of the crash was tried once more
    crowded = next(line for line in done.stdout.splitlines() if line.startswith("crowded_table"))
    assert "100.0%" not in crowded and " 0 episodes" not in crowded
    for path in find_episodes(tmp_path / "episodes"):
        episode = read_episode(path)
        assert path.name == f"{episode.seed:07d}_{episode.variation:02d}.hdf5" and set(
            episode.images
        ) == set(CAMERAS)
        Chain.from_episode(episode)
    done = run(*command, "--tasks", "reach_target", "crashing")
    assert done.stdout.count("nothing left to record") == 2


# -------------------------------------------------------------------------------------- evaluation
class Knowing:
    """A policy that is told where to go, and goes there in eight steps."""

    cameras = CAMERAS
    image_size = (16, 16)

    def act(self, images, qpos, instruction):
        assert all(image.shape == (16, 16, 3) for image in images.values())
        goal = simulator.task._task.goal
        steps = np.linspace(0, 1, 9)[1:, None]
        joints = qpos[:7] + steps * (goal - qpos[:7])
        return np.concatenate([joints, np.ones((8, 1))], axis=1), images


class Staying:
    """A policy that stays where it is."""

    cameras = CAMERAS
    image_size = (16, 16)

    def act(self, images, qpos, instruction):
        return np.repeat(qpos[None], 8, axis=0), images


def rlbench_settings(run, **changes):
    """Settings of an evaluation in RLBench."""
    values = {"sim": "rlbench", "policy": "a:b", "episodes": 4, "videos": 0}
    values |= {"execution_horizon": 8}
    return evaluate.Settings(run=run, **(values | changes))


def test_a_good_controller_succeeds_in_rlbench(tmp_path):
    settings = rlbench_settings(tmp_path, videos=1)
    for seed in (0, 1):
        outcome, log = test_evaluate.drive(Knowing(), "reach_target", seed, settings)
        assert outcome["success"] and outcome["steps"] == 8 and outcome["seed"] == seed
        assert (
            len(log["frames"]) == (9 if seed == 0 else 0)
            and np.isfinite(log["trace"][0][1:4]).all()
        )
    demos = write_dataset(tmp_path / "data", variations=(0, 4), episodes=2)
    for seed in range(4):
        one = replace(settings, demos=tmp_path / "data")
        test_evaluate.drive(Knowing(), "reach_target", seed, one)
        goal = simulator.task._task.goal
        assert np.allclose(goal, demos[(0, 4)[seed // 2], seed % 2][0][-1].joint_positions)


def test_scenes_without_room_are_tried_again_and_counted(tmp_path, monkeypatch):
    settings = rlbench_settings(tmp_path)
    outcomes = []
    for seed in range(4):
        outcomes.append(test_evaluate.drive(Staying(), "crowded_table", seed, settings)[0])
    retried = [outcome for outcome in outcomes if outcome.get("failed_resets")]
    assert retried and all(outcome["seed"] % 4 == i for i, outcome in enumerate(outcomes))
    assert all(
        outcome["seed"] == i + 4 * outcome.get("failed_resets", 0)
        for i, outcome in enumerate(outcomes)
    )
    report = summarise(outcomes, [{"paint": [], "control": []}] * 4)
    assert report["failed_resets"] == sum(outcome.get("failed_resets", 0) for outcome in outcomes)
    monkeypatch.setattr(evaluate, "ATTEMPTS", 1)
    seed = outcomes.index(retried[0])
    given_up = test_evaluate.drive(Staying(), "crowded_table", seed, settings)[0]
    assert (
        not given_up["success"]
        and given_up["failed_resets"] == 1
        and "Could not place" in given_up["error"]
    )


def test_the_paper_s_protocol(tmp_path):
    assert len(PAPER_TASKS) == len(set(PAPER_TASKS)) == 25
    for folder in ("act_rgb", "act_rgb/step-900", "act_rgb/step-1100", "act_rgb/step-1000"):
        test_evaluate.untrained(
            tmp_path / "held" / folder, observation="rgb", vocabulary=["red"], image_size=[16, 16]
        )
    command = [
        "evaluate.py",
        "--protocol",
        "paper",
        "--policy",
        "act",
        "--run",
        tmp_path / "held",
        "--videos",
        1,
    ]
    done = run(*command, "--tasks", "reach_target", "crashing", "--episodes", 2, "--workers", 2)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "held/evaluation/evaluation_act.json").read_text())
    used = [Path(checkpoint["controller"]).name for checkpoint in report["checkpoints"]]
    assert report["sim"] == "rlbench" and used == ["step-1100", "step-1000", "step-900"]
    for task in report["tasks"].values():
        assert (
            task["episodes"] == 6 and max(outcome["steps"] for outcome in task["outcomes"]) <= 200
        )
    assert (
        report["tasks"]["crashing"]["episodes_with_errors"] == 6
        and "64 %" in done.stdout
        and "16 of 25" in done.stdout
    )
    assert (tmp_path / "held/evaluation/reach_target_act.mp4").exists()
    done = run(*command)  # all 25: the stand-in has two of them
    assert done.returncode == 2 and "RLBench has no task 'basketball_in_hoop'" in done.stderr


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"checkpoints": 3}, "act_rgb holds 1 of the 3 checkpoints"),
        ({"checkpoints": 0}, "--checkpoints must be 1 or more"),
        ({"tasks": ("open_bax",)}, "is it 'open_box'"),
        ({"policy": "oracle"}, "oracle and --perturb are for the embedded simulator"),
        ({"sim": None, "demos": Path("data")}, "--demos is for --sim rlbench"),
        ({"demos": Path("data")}, "data has no <task>/variation<N>"),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path, changes, sentence):
    for folder in ("act_rgb", "act_rgb/step-1000"):
        (tmp_path / folder).mkdir()
    settings = {"run": tmp_path, "sim": "rlbench", "policy": "act", "tasks": ("reach_target",)}
    settings |= {"controller": tmp_path / "act_rgb"} | changes
    with pytest.raises(UserError, match=sentence):
        evaluate.resolve_settings(evaluate.Settings(**settings))
