"""RLBench's datasets as people have them on disk, and two real recordings where they are there."""

import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_rlbench import CAMERAS, dumps, only, run, toy, write_dataset

import collect_demos
from genima.episodes import check_episode, find_episodes, read_episode
from genima.files import UserError
from genima.kinematics import Chain
from sims import rlbench_arm
from sims.rlbench_arm import pose_matrices, rlbench_chain
from sims.rlbench_cameras import IN_THE_ROOM, standard_camera
from sims.rlbench_dataset import HZ, load, read_demonstration, read_notes
from sims.rlbench_folders import episode_file, find_demonstrations, identify, not_importable

REAL = ROOT.parent / "shared" / "rlbench_real"
if not REAL.is_dir():  # a worktree lies one folder deeper
    REAL = ROOT.parents[1] / "shared" / "rlbench_real"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="real recordings are not here")


def move_to_all_variations(root, task="reach_target", folder="all_variations"):
    """Rearrange a dataset as PerAct's generator writes it -> the new folders."""
    moved = []
    for variation in sorted((root / task).glob("variation*")):
        for source in sorted((variation / "episodes").glob("episode*")):
            target = root / task / folder / "episodes" / f"episode{len(moved)}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target)
            shutil.copy(variation / "variation_descriptions.pkl", target)
            number = int(variation.name.removeprefix("variation"))
            (target / "variation_number.pkl").write_bytes(pickle.dumps(number))
            moved.append(target)
    for variation in (root / task).glob("variation*"):
        shutil.rmtree(variation)
    return moved


def import_all(root, out):
    """Import a dataset with the command's function -> the files."""
    settings = collect_demos.Settings(run=out, from_rlbench=root, workers=1)
    collect_demos.collect(settings)
    return find_episodes(out / "episodes")


# ------------------------------------------------------------------------------------- layouts
def test_peract_s_layout(tmp_path):
    demos = write_dataset(tmp_path / "data", variations=(2, 4), episodes=2)
    move_to_all_variations(tmp_path / "data")
    paths = import_all(tmp_path / "data", tmp_path / "run")
    names = [path.name for path in paths]
    assert names == [f"episode{i:03d}_variation{v:02d}.hdf5" for i, v in enumerate((2, 2, 4, 4))]
    for i, path in enumerate(paths):
        episode = read_episode(path)
        demo, _ = demos[episode.variation, i % 2]
        expected = [one.joint_positions for one in demo]
        assert np.allclose(episode.qpos[:, :7], expected, atol=1e-6)
        colour = {2: "green", 4: "blue"}[episode.variation]
        assert episode.task == "reach_target" and colour in episode.instruction
    chosen = find_demonstrations(tmp_path / "data", variations=(4,), count=1)
    assert [identify(folder) for folder in chosen] == [("reach_target", 4, 2)]


def test_an_episode_that_links_lead_to_twice_is_imported_once(tmp_path):
    root = tmp_path / "data"
    write_dataset(root, variations=(0, 3), episodes=2)
    mixed = root / "reach_target/all_variations/episodes"
    mixed.mkdir(parents=True)
    sources = sorted((root / "reach_target").glob("variation*/episodes/episode*"))
    for i, source in enumerate(sources):
        (mixed / f"episode{i}").symlink_to(source)
    (root / "again").symlink_to(root / "reach_target")
    (root / "loop").symlink_to(root)
    assert len(import_all(root, tmp_path / "run")) == 4
    assert not_importable(root) == []


def test_the_colosseum_s_mixed_set(tmp_path):
    root = tmp_path / "data"
    write_dataset(root, task="reach_target_0", variations=(0,))
    write_dataset(root, task="mixing", variations=(1, 2))
    for source in move_to_all_variations(root, task="mixing", folder="."):
        target = root / "reach_target_13" / "episodes" / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
    shutil.rmtree(root / "mixing")
    paths = import_all(root, tmp_path / "run")
    names = [f"{path.parent.name}/{path.name}" for path in paths]
    assert names == [
        "reach_target_0/episode000_variation00.hdf5",
        "reach_target_13/episode000_variation01.hdf5",
        "reach_target_13/episode001_variation02.hdf5",
    ]


def test_what_is_not_imported_is_named_and_the_command_fails(tmp_path):
    root = tmp_path / "data"
    write_dataset(root)
    source = root / "reach_target/variation0/episodes/episode0"
    places = ("stray_13/episodes/episode4", "deep/train/task/variation0/episodes/episode0")
    for place in places:  # the first without a variation_number.pkl
        shutil.copytree(source, root / place)
    shutil.copytree(source, root / "reach_target/variation0/episodes/episode_old")
    words = ("collect_demos.py", "--from-rlbench", root, "--run", tmp_path / "run")
    done = run(*words, "--workers", 1, PYTHONPATH="")
    assert done.returncode == 2 and "1 episodes in" in done.stdout
    for place in (*places, "variation0/episodes/episode_old"):
        folder, name = place.rsplit("/", 1)
        assert f"{folder} was not imported ({name}" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    # The user has chosen: other tasks' places are none of this run's business.
    done = run(*words, "--workers", 1, "--tasks", "reach_target", PYTHONPATH="")
    assert done.returncode == 2 and "stray_13" not in done.stderr


def test_two_recordings_of_one_name_are_not_taken_for_each_other(tmp_path):
    root = tmp_path / "data"
    write_dataset(root, variations=(0,), episodes=1)
    kept = root / "reach_target/variation0"
    shutil.move(kept, tmp_path / "kept")
    write_dataset(root, variations=(0,), episodes=1)
    move_to_all_variations(root)
    shutil.move(tmp_path / "kept", kept)
    with pytest.raises(UserError, match="all_variations/episodes/episode0 was not imported"):
        import_all(root, tmp_path / "run")


def test_a_folder_of_a_task_is_not_a_root(tmp_path):
    write_dataset(tmp_path / "data")
    with pytest.raises(UserError, match="give the folder above the tasks"):
        find_demonstrations(tmp_path / "data/reach_target")


def test_a_broken_variation_number_costs_its_episode_alone(tmp_path):
    root = tmp_path / "data"
    write_dataset(root, variations=(0, 1))
    folders = move_to_all_variations(root)
    for bad in (b"", pickle.dumps("3"), pickle.dumps(-1)):
        (folders[0] / "variation_number.pkl").write_bytes(bad)
        with pytest.raises(UserError, match="episode0/variation_number.pkl"):
            import_all(root, tmp_path / "run")
        assert len(find_episodes(tmp_path / "run/episodes")) == 1


def turn_into_peract2(folder, bimanual=False):
    """Rewrite a demonstration with the classes and names of PerAct2's fork."""
    from rlbench.backend.observation import BimanualObservation, UnimanualObservation

    demo = pickle.loads((folder / "low_dim_obs.pkl").read_bytes())
    observations = []
    for old in demo:
        new = BimanualObservation() if bimanual else UnimanualObservation()
        misc = {}
        for name, value in old.misc.items():
            name = name.replace("left_shoulder", "over_shoulder_left")
            misc[name.replace("right_shoulder", "over_shoulder_right")] = value
        low = {name: value for name, value in vars(old).items() if value is not None}
        new.__dict__ |= {"perception_data": {}, "task_low_dim_state": None}
        new.__dict__ |= {"right": low, "left": low} if bimanual else low
        new.misc = misc
        observations.append(new)
    demo._observations = observations
    (folder / "low_dim_obs.pkl").write_bytes(dumps(demo))
    for side in ("left", "right"):
        (folder / f"{side}_shoulder_rgb").rename(folder / f"over_shoulder_{side}_rgb")
    for picture in folder.glob("*_rgb/*.png"):
        picture.rename(picture.with_name(f"rgb_{int(picture.stem):04d}.png"))


def test_peract2_s_recordings_of_one_arm(tmp_path):
    _, pictures = write_dataset(tmp_path / "data", variations=(1,))[1, 0]
    before = read_demonstration(only(tmp_path / "data"), CAMERAS)
    (folder,) = move_to_all_variations(tmp_path / "data")
    turn_into_peract2(folder)
    after = read_demonstration(folder, CAMERAS)
    for camera in CAMERAS:
        assert np.array_equal(after.images[camera], np.stack(pictures[camera]))
        assert np.allclose(after.intrinsics[camera], before.intrinsics[camera])
        assert np.allclose(after.extrinsics[camera], before.extrinsics[camera])
    assert np.array_equal(after.qpos, before.qpos) and after.variation == 1


def test_peract2_s_recordings_of_two_arms_are_called_that(tmp_path):
    write_dataset(tmp_path / "data")
    (folder,) = move_to_all_variations(tmp_path / "data")
    turn_into_peract2(folder, bimanual=True)
    with pytest.raises(UserError, match="two arms .PerAct2's BimanualObservation"):
        read_demonstration(folder, CAMERAS)


def test_an_observation_in_place_of_the_sentences(tmp_path, capsys):
    demo, _ = write_dataset(tmp_path / "data")[0, 0]
    path = tmp_path / "data/reach_target/variation0/variation_descriptions.pkl"
    path.write_bytes(dumps(demo[0]))
    (episode,) = import_all(tmp_path / "data", tmp_path / "run")
    assert read_episode(episode).instructions == ["reach target"]
    assert "the instruction is the task's name, 'reach target'" in capsys.readouterr().out


@pytest.mark.parametrize("content", [["x" * 10**6], [""], [1], ["a", None], "text", {"a": 1}])
def test_sentences_that_are_none_are_refused(tmp_path, content):
    write_dataset(tmp_path)
    path = tmp_path / "reach_target/variation0/variation_descriptions.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="variation_descriptions.pkl is not a list of sentences"):
        read_demonstration(only(tmp_path), CAMERAS)


def test_genima_s_own_recordings(tmp_path):
    """256x256, one variation, gripper_matrix and all other fields set."""

    def fill(demo):
        for one in demo:
            tip = toy.kinematics(one.joint_positions)[1] @ toy.TIP
            one.gripper_matrix = tip
            one.gripper_joint_positions = np.array([0.04, 0.04])
            one.task_low_dim_state = np.zeros(3)

    write_dataset(tmp_path / "data", size=(256, 256), change=fill)
    (path,) = import_all(tmp_path / "data", tmp_path / "run")
    episode = read_episode(path)
    assert set(episode.image_sizes.values()) == {(256, 256)} and episode.variation == 0


# ------------------------------------------------------------------------- fields that are odd
def changed(tmp_path, change):
    """The demonstration of a dataset after this change to each observation."""
    write_dataset(tmp_path, change=lambda demo: [change(one) for one in demo])
    return read_demonstration(only(tmp_path), CAMERAS)


def test_positive_focal_lengths_are_opencv_s(tmp_path):
    def turn(one):
        for camera in CAMERAS:
            one.misc[f"{camera}_camera_intrinsics"] *= [[-1], [-1], [1]]
            one.misc[f"{camera}_camera_intrinsics"][:2, 2] *= -1
            one.misc[f"{camera}_camera_extrinsics"] = one.misc[
                f"{camera}_camera_extrinsics"
            ] @ np.diag([-1, -1, 1, 1])

    write_dataset(tmp_path / "pyrep")
    expected = read_demonstration(only(tmp_path / "pyrep"), CAMERAS)
    episode = changed(tmp_path / "opencv", turn)
    for camera in CAMERAS:
        assert np.allclose(episode.intrinsics[camera], expected.intrinsics[camera])
        assert np.allclose(episode.extrinsics[camera], expected.extrinsics[camera], atol=1e-6)


def test_focal_lengths_of_both_signs_are_one_sentence(tmp_path):
    def turn(one):
        one.misc["front_camera_intrinsics"][0, 0] *= -1

    with pytest.raises(UserError, match="low_dim_obs.pkl: front_camera_intrinsics has focal"):
        changed(tmp_path, turn)


@pytest.mark.parametrize("dummy", [None, np.zeros(7), np.full(7, np.nan), "a dummy"])
def test_a_dummy_gripper_pose_gives_way_to_the_matrix(tmp_path, dummy):
    def forget(one):
        one.gripper_matrix = toy.kinematics(one.joint_positions)[1] @ toy.TIP
        one.gripper_pose = dummy

    write_dataset(tmp_path / "whole")
    expected = read_demonstration(only(tmp_path / "whole"), CAMERAS)
    episode = changed(tmp_path / "dummy", forget)
    assert np.allclose(episode.joint_poses, expected.joint_poses, atol=1e-6)


def test_missing_velocities_become_differences(tmp_path):
    episode = changed(tmp_path, lambda one: setattr(one, "joint_velocities", None))
    expected = np.gradient(episode.qpos[:, :7], 1 / HZ, axis=0)
    assert np.allclose(episode.qvel[:, :7], expected, atol=1e-4) and np.ptp(expected) > 0.1


def test_keyframes_are_refused_and_nothing_is_written(tmp_path):
    def keep_keyframes(demo):
        demo._observations = demo._observations[::4]

    write_dataset(tmp_path / "data", change=keep_keyframes)
    folder = only(tmp_path / "data")
    for pictures in folder.glob("*_rgb"):
        for path in pictures.iterdir():
            if int(path.stem) % 4:
                path.unlink()
        for path in sorted(pictures.iterdir(), key=lambda path: int(path.stem)):
            path.rename(path.with_name(f"{int(path.stem) // 4}.png"))
    demo = load(folder / "low_dim_obs.pkl")._observations
    recorded = [one.joint_positions for one in demo]
    for scale in (1, 20):
        for one, positions in zip(demo, recorded):
            one.joint_positions = toy.START + scale * (positions - toy.START) / 4
            joints, last = toy.kinematics(one.joint_positions)
            one.misc["joint_poses"] = [toy.pose7(pose) for pose in joints]
            one.gripper_pose = toy.pose7(last @ toy.TIP)
            one.misc["wrist_camera_extrinsics"] = last @ toy.WRIST
        (folder / "low_dim_obs.pkl").write_bytes(as_demo(demo))
        out = tmp_path / f"run{scale}"
        if scale == 1:
            assert len(import_all(tmp_path / "data", out)) == 1
            continue
        with pytest.raises(UserError, match="low_dim_obs.pkl: joint . turns at .* keyframes"):
            import_all(tmp_path / "data", out)
        assert not [path for path in out.rglob("*") if path.is_file()]


def as_demo(observations):
    """A pickle of RLBench's classes from namespaces."""
    from rlbench.backend.observation import Observation
    from rlbench.demo import Demo

    real = []
    for one in observations:
        real.append(Observation.__new__(Observation))
        real[-1].__dict__.update(vars(one))
    return dumps(Demo(real))


def test_a_list_of_lists_of_itself_is_no_number(tmp_path):
    """Taking its shape would take for ever."""

    def nest(one):
        numbers = 0.0
        for _ in range(60):
            numbers = [numbers, numbers]
        one.joint_positions = numbers

    with pytest.raises(UserError, match="joint_positions of frame 0 is something else"):
        changed(tmp_path, nest)


# --------------------------------------------------------------------------------- the real thing
def real_folders():
    return sorted(REAL.glob("*/reach_target/variation*/episodes/episode*"))


def measure(folder):
    """Tilt of the base (degrees) and the largest error of the tool (metres) of an import."""
    episode = read_demonstration(folder, CAMERAS)
    check_episode(episode)
    observations = load(folder / "low_dim_obs.pkl")._observations
    tool = pose_matrices(np.array([one.gripper_pose for one in observations]))
    # The front camera does not move, so it tells where the base stands in the room.
    front = IN_THE_ROOM["front"].pose()
    world_from_base = front @ np.linalg.inv(episode.extrinsics["front"][0])
    tilt = np.degrees(np.arccos(min(world_from_base[2, 2], 1)))
    ours = world_from_base @ episode.joint_poses[:, -1].astype(np.float64)
    return tilt, np.linalg.norm(ours[:, :3, 3] - tool[:, :3, 3], axis=1).max(), world_from_base


@needs_real
def test_real_recordings_stand_upright_and_hold_the_tool():
    assert len(real_folders()) == 2
    for folder in real_folders():
        tilt, error, world_from_base = measure(folder)
        print(f"{folder}: tilt {tilt:.3f} degrees, tool {1000 * error:.2f} mm")
        assert tilt < 0.1 and error < 0.002
        # RLBench's scene has the robot here (its URDF).
        assert np.abs(world_from_base[:3, 3] - [-0.268, -0.0064, 0.75]).max() < 0.003


@needs_real
def test_franka_s_zero_of_joint_4_does_not_fit_the_real_recordings(monkeypatch):
    monkeypatch.setattr(rlbench_arm, "JOINT_4_ZERO", 0.0)
    for folder in real_folders():
        tilt, error, _ = measure(folder)
        assert tilt > 3 and error > 0.004


@needs_real
def test_the_spheres_of_real_recordings_lie_where_the_robot_is():
    """In the wrist's picture the tip is between the fingers, which are its black corners."""
    for folder in real_folders():
        episode = read_demonstration(folder, CAMERAS)
        assert set(Chain.from_episode(episode).mounted) == {"wrist"}
        size = episode.image_sizes or episode.images["wrist"].shape[1:3]
        pose = np.linalg.inv(episode.extrinsics["wrist"][-1]) @ episode.joint_poses[-1, -1]
        u, v = (episode.intrinsics["wrist"] @ pose[:3, 3])[:2] / pose[2, 3]
        last = folder / "wrist_rgb" / f"{len(episode.qpos) - 1}.png"
        picture = np.array(Image.open(last).convert("L"))
        dark = np.nonzero(picture[int(v)] < 60)[0] + 0.5
        left, right = dark[dark < u], dark[dark > u]
        assert len(left) and len(right), size
        assert abs((left.max() + right.min()) / 2 - u) < 0.05 * picture.shape[1]


@needs_real
def test_real_recordings_without_sentences_and_cameras_say_so():
    notes = read_notes(real_folders())
    assert len(notes) == 2 and "task's name" in notes[0] and "without its cameras" in notes[1]
    (path,) = REAL.glob("b80e51fe/*/variation0/variation_descriptions.pkl")
    observation = load(path)
    misc = observation.misc
    tool = observation.gripper_matrix[None]
    for camera in (*IN_THE_ROOM, "wrist"):  # the cameras we know are those that it was seen with
        intrinsics, poses = standard_camera(camera, tool, (128, 128), True, path)
        turn = np.diag([-1, -1, 1, 1])
        assert np.allclose(intrinsics @ turn[:3, :3], misc[f"{camera}_camera_intrinsics"])
        assert np.allclose(poses[0] @ turn, misc[f"{camera}_camera_extrinsics"], atol=2e-4)
    q = observation.joint_positions[None]
    base, error = rlbench_arm.fit_base_to_tool(q, tool)
    assert error < 1e-6 and abs(base[2, 2] - 1) < 2e-6
    assert rlbench_chain().forward_kinematics(q).shape == (1, 8, 4, 4)


def test_names_of_files():
    folder = ROOT / "data/open_box/variation7/episodes/episode12"
    assert episode_file(folder) == "episode012_variation07.hdf5"
    assert identify(folder) == ("open_box", 7, 12)
    assert replace(IN_THE_ROOM["front"], yaw=0).pose()[0, 2] > 0
