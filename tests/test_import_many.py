"""import_demos.py: one HDF5 file of many demonstrations, as robomimic and others write them."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
from make_recordings import PANDA_HOME, motion, pictures
from test_import_again import episodes, mapping, vendor

from genima.files import UserError
from genima.import_groups import detect_mapping
from genima.import_sources import find_hdf5
from genima.mapping import find_cameras, read_mapping, ready_mappings

FRAMES = 20


def robomimic(path, demonstrations=12):
    """As robomimic's documentation lays it out."""
    with h5py.File(path, "w") as root:
        data = root.create_group("data")
        data.attrs["total"] = demonstrations * FRAMES
        data.attrs["env_args"] = '{"env_name": "Lift", "type": 1}'
        for number in range(demonstrations):
            group = data.create_group(f"demo_{number}")
            group.attrs["num_samples"] = FRAMES
            width = np.where(np.arange(FRAMES) < 12, 0.04, 0.02)
            group["obs/robot0_joint_pos"] = motion(PANDA_HOME, FRAMES, number)[0]
            group["obs/robot0_gripper_qpos"] = np.stack([width, -width], axis=1)
            group["obs/robot0_eef_pos"] = np.zeros((FRAMES, 3))
            group["obs/front_image"] = pictures(FRAMES, 96, 128, seed=number)
            command = np.where(np.arange(FRAMES) < 11, -1.0, 1.0)  # 1 closes
            group["actions"] = np.hstack([np.zeros((FRAMES, 6)), command[:, None]])
            group["rewards"] = np.zeros(FRAMES)
            group["dones"] = np.arange(FRAMES) == FRAMES - 1
        root["mask/train"] = np.array([b"demo_0", b"demo_1"])
    return path


def test_a_file_of_robomimic(tmp_path, bring):
    path = robomimic(tmp_path / "image.hdf5")
    out, error = bring(path, instruction="lift the cube", workers=2)
    assert error == ""
    assert "12 demonstrations: mapping 'robomimic', which fits." in out
    assert "lift_the_cube: 12 demonstrations imported" in out
    found = {episode.path.stem: episode for episode in episodes(tmp_path / "run")}
    assert sorted(found) == sorted(f"image_demo_{number}" for number in range(12))
    with h5py.File(path) as root:
        for number in range(12):
            episode = found[f"image_demo_{number}"]
            group = root[f"data/demo_{number}"]
            assert episode.seed == number  # demo_2 before demo_10
            taken = np.arange(0, FRAMES, 2)  # 20 Hz -> 10 Hz
            joints = group["obs/robot0_joint_pos"][()][taken]
            np.testing.assert_allclose(episode.qpos[:, :-1], joints, atol=1e-6)
            np.testing.assert_array_equal(episode.images["front"], group["obs/front_image"][taken])
            np.testing.assert_allclose(episode.qpos[[0, -1], -1], [1, 0.5], atol=1e-6)
            assert episode.action[0, -1] == 1 and episode.action[-1, -1] == 0
    out, error = bring(path, instruction="lift the cube")
    assert error == "" and "12 were there already" in out


@pytest.mark.parametrize("holder", ["/", "episodes"])
@pytest.mark.parametrize("options", [{}, {"mapping": "vendor"}])
def test_a_vendors_demonstrations_in_one_file(tmp_path, bring, holder, options):
    many = tmp_path / "many.h5"
    with h5py.File(many, "w") as root:
        for number in range(2):
            one = vendor(tmp_path / f"one_{number}.hdf5", seed=number)
            with h5py.File(one) as other:
                other.copy("/", root.require_group(holder), f"take_{number}")
        root["notes/operator"] = "A. Smith"
    out, error = bring(many, **options)
    assert error == "" and "2 demonstrations: mapping 'vendor', " in out
    names = [episode.path.stem for episode in episodes(tmp_path / "run")]
    assert names == ["many_take_0", "many_take_1"]
    assert len({episode.instruction for episode in episodes(tmp_path / "run")}) == 1


def test_demonstrations_beside_the_one_at_the_top_are_named(tmp_path, bring):
    path = vendor(tmp_path / "many.hdf5")
    for number in range(2):
        one = vendor(tmp_path / f"one_{number}.hdf5", seed=number + 1)
        with h5py.File(path, "r+") as root, h5py.File(one) as other:
            other.copy("/", root.require_group("more"), f"take_{number}")
    out, error = bring(path)
    assert error == "" and "1 demonstration imported" in out
    assert f"Note: {path} is a demonstration itself; 2 more in groups such as /more/take_0" in out
    assert "`demonstrations: more/*`" in out
    mine = mapping(tmp_path, "vendor", demonstrations="more/*")
    assert "2 demonstrations imported" in bring(path, mapping=mine)[0]


def test_one_demonstration_is_not_taken_for_more(tmp_path, capsys):
    path = vendor(tmp_path / "one.hdf5")
    with h5py.File(path, "r+") as root:
        root["calibration/joint_positions"] = root["joint_positions"][:3]  # without pictures
    relative = read_mapping("vendor")
    absolute = replace(relative, joints=f"/{relative.joints}", images=f"/{relative.images}")
    for one in (relative, absolute):
        assert [source.group for source in find_hdf5(path, "one", one)] == [""]
    assert capsys.readouterr().out == ""


def test_what_is_wrong_is_said_with_the_group(tmp_path, bring):
    path = robomimic(tmp_path / "image.hdf5", demonstrations=3)
    with h5py.File(path, "r+") as root:
        root["data/demo_1/obs/robot0_joint_pos"][4, 2] = np.nan
    out, error = bring(path, instruction="lift the cube")
    assert f"{path}/data/demo_1: joints or gripper hold NaN" in error
    assert "2 demonstrations imported" in out and "1 demonstration not imported" in error


def test_a_group_that_is_not_there(tmp_path, bring):
    path = robomimic(tmp_path / "image.hdf5", demonstrations=1)
    mine = mapping(tmp_path, "robomimic", demonstrations="episodes/*")
    assert (
        f"{path} has no demonstrations in episodes/*, as {mine} says"
        in bring(path, mapping=mine)[1]
    )


def test_the_instruction_of_all_demonstrations(tmp_path, bring):
    path = robomimic(tmp_path / "image.hdf5", demonstrations=2)
    with h5py.File(path, "r+") as root:
        root["data"].attrs["problem_info"] = '{"language_instruction": "lift it"}'
    mine = mapping(tmp_path, "robomimic", instruction="@/data/problem_info")
    assert bring(path, mapping=mine)[1] == ""
    assert [episode.instruction for episode in episodes(tmp_path / "run")] == ["lift it"] * 2


def test_cameras_by_the_end_or_the_beginning_of_a_name(tmp_path):
    path = robomimic(tmp_path / "image.hdf5", demonstrations=1)
    with h5py.File(path, "r+") as root:
        group = root["data/demo_0"]
        group["obs/rgb_side"] = group["obs/front_image"][()]
        assert list(find_cameras(group, "obs/{camera}_image")) == ["front"]
        assert list(find_cameras(group, "obs/rgb_{camera}")) == ["side"]
        assert find_cameras(group, "obs/depth_{camera}") == {}
    assert len(find_hdf5(path, "image", read_mapping("robomimic"))) == 1
    with h5py.File(path, "r+") as root:
        del root["data/demo_0/obs/robot0_joint_pos"]
    with pytest.raises(UserError, match="no ready mapping fits"):
        detect_mapping(path, ready_mappings())


def test_what_is_said_once_holds_for_all(tmp_path, bring):
    many = tmp_path / "many.h5"
    with h5py.File(many, "w") as root:
        root.attrs["language_instruction"] = "lift it"
        root.attrs["success"] = False
        root.attrs["joint_names"] = [f"joint{i}" for i in (2, 1, 3, 4, 5, 6, 7)]
        for number in range(2):
            one = vendor(tmp_path / f"one_{number}.hdf5", seed=number)
            with h5py.File(one) as other:
                other.copy("/", root, f"take_{number}")
            del root[f"take_{number}"].attrs["language_instruction"]
            del root[f"take_{number}"].attrs["success"]
    assert "joint_positions[1,0,2,3,4,5,6]" in bring(many)[1]
    with h5py.File(many, "r+") as root:
        del root.attrs["joint_names"]
    out, error = bring(many)
    assert error == "" and "lift_it: 2 demonstrations imported; 2 of them FAILED" in out
    mine = mapping(tmp_path, instruction="@/language_instruction")
    assert bring(many, mapping=mine, task="other")[1] == ""


def test_links_to_files_of_one_demonstration_each(tmp_path, bring):
    with h5py.File(tmp_path / "master.h5", "w") as root:
        for number in range(2):
            robomimic(tmp_path / f"part_{number}.h5", demonstrations=1 + number)
            link = h5py.ExternalLink(f"part_{number}.h5", f"/data/demo_{number}")
            root[f"train/demo_{number}"] = link
        root["train/demo_2"] = h5py.ExternalLink("lost.h5", "/data/demo_0")
    out, error = bring(tmp_path / "master.h5", instruction="lift")
    assert "2 demonstrations imported" in out
    assert "/train/demo_2 is a link to what is not there" in error
    first, second = episodes(tmp_path / "run")
    assert (first.qpos[-1] != second.qpos[-1]).any()


def test_one_broken_group_does_not_hide_the_others(tmp_path, bring):
    path = robomimic(tmp_path / "image.hdf5", demonstrations=5)
    with h5py.File(path, "r+") as root:
        del root["data/demo_0/obs/front_image"]
        del root["data/demo_1/obs/robot0_joint_pos"]
        root["data/demo_1/obs/robot0_joint_pos"] = h5py.SoftLink("/nowhere")
        del root["data/demo_2/obs"]
        root["latest"] = h5py.SoftLink("/data/demo_9")
    out, error = bring(path, instruction="lift the cube")
    assert "2 demonstrations imported" in out
    for number in range(3):
        assert f"{path}/data/demo_{number}" in error
    assert "3 demonstrations not imported" in error


def test_demonstrations_in_several_places_of_a_file(tmp_path, bring):
    path = robomimic(tmp_path / "image.hdf5", demonstrations=2)
    with h5py.File(path, "r+") as root:
        root.move("data", "train")
        root.copy("train", "val")
    out, error = bring(path, instruction="lift the cube")
    assert error == "" and "4 demonstrations imported" in out
    names = [episode.path.stem for episode in episodes(tmp_path / "run")]
    assert names == [f"image_{part}_demo_{i}" for part in ("train", "val") for i in range(2)]


def test_numbers_beside_the_pictures_are_no_cameras(tmp_path, bring):
    path = robomimic(tmp_path / "image.hdf5", demonstrations=1)
    with h5py.File(path, "r+") as root:
        group = root["data/demo_0/obs"]
        group["has_image"] = True
        group["time_of_image"] = np.arange(FRAMES) / 20
        group["intrinsics_image"] = np.eye(3)
    assert bring(path, instruction="lift the cube")[1] == ""
    (episode,) = episodes(tmp_path / "run")
    assert list(episode.images) == ["front"]


def test_a_long_list_of_sentences_is_cut(tmp_path, bring):
    path = robomimic(tmp_path / "image.hdf5", demonstrations=30)
    error = bring(path)[1].splitlines()
    assert len(error) == 22 and error[-2] == "and 10 sentences more."
    assert error[-1] == "30 demonstrations not imported."


def test_a_damaged_demonstration_is_named(tmp_path, bring):
    path = robomimic(tmp_path / "image.hdf5", demonstrations=3)
    with h5py.File(path, "r+") as root:
        joints = root["data/demo_1/obs/robot0_joint_pos"][()]
        del root["data/demo_1/obs/robot0_joint_pos"]
        packed = root["data/demo_1/obs"].create_dataset(
            "robot0_joint_pos", data=joints, chunks=joints.shape, compression="gzip"
        )
        packed.id.write_direct_chunk((0, 0), b"no gzip")
    out, error = bring(path, instruction="lift the cube")
    assert "2 demonstrations imported" in out
    assert f"{path}/data/demo_1 is damaged" in error and "copy it again" in error


def test_a_long_name_of_a_group_is_cut(tmp_path, bring):
    path = robomimic(tmp_path / "image.hdf5", demonstrations=1)
    with h5py.File(path, "r+") as root:
        root.move("data/demo_0", "data/" + 260 * "d")
    assert bring(path, instruction="lift the cube")[1] == ""
    assert len(episodes(tmp_path / "run")) == 1
