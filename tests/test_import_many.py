"""import_demos.py: one HDF5 file of many demonstrations, as robomimic and others write them."""

import h5py
import numpy as np
import pytest
from make_recordings import PANDA_HOME, motion, pictures
from test_import_again import episodes, mapping, vendor

from genima.files import UserError
from genima.import_hdf5 import detect_mapping
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


def test_what_is_wrong_is_said_with_the_group(tmp_path, bring):
    path = robomimic(tmp_path / "image.hdf5", demonstrations=3)
    with h5py.File(path, "r+") as root:
        root["data/demo_1/obs/robot0_joint_pos"][4, 2] = np.nan
    out, error = bring(path, instruction="lift the cube")
    assert f"{path}/data/demo_1: joints or gripper hold NaN" in error
    assert "2 demonstrations imported" in out and "1 demonstration not imported" in error


def test_a_group_that_is_not_there(tmp_path, bring):
    path = robomimic(tmp_path / "image.hdf5", demonstrations=1)
    mine = mapping(tmp_path, "robomimic", demonstrations="episodes")
    assert (
        f"{path} has no demonstrations in episodes, as {mine} says" in bring(path, mapping=mine)[1]
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
