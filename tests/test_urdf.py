"""Arms from robot descriptions: poses as MuJoCo and a maker's own file have them, and bad files."""

from pathlib import Path

import franky_sim
import mujoco
import numpy as np
import pytest
from make_recordings import room_cameras, write_vendor
from test_episodes import stage

import import_demos
from genima.episodes import read_episode
from genima.files import UserError
from genima.kinematics import Chain
from genima.recordings import find_gripper_range
from genima.robots import find_robot
from genima.urdf import read_urdf

LINK = """<link name="{}"><inertial><mass value="1"/>
<inertia ixx="1" iyy="1" izz="1" ixy="0" ixz="0" iyz="0"/></inertial></link>"""
JOINT = """<joint name="{name}" type="{kind}"><parent link="{parent}"/><child link="{child}"/>
<origin xyz="{xyz}" rpy="{rpy}"/><axis xyz="{axis}"/>
<limit lower="-2" upper="2.5" effort="1" velocity="1"/></joint>"""
JOINTS = [  # every kind of axis, then a fixed flange and a finger that slides
    ("revolute", "0 0 0.3", "0 0 0", "0 0 1"),
    ("continuous", "0 0.1 0", "0.2 0 0", "0 1 0"),
    ("revolute", "0 0 0.3", "0 0.4 0", "0 -1 0"),
    ("revolute", "0.2 0 0.1", "0 0 0.6", "1 0 0"),
    ("revolute", "0.1 0 0", "1 0 0", "0 0.6 0.8"),
    ("fixed", "0 0 0.08", "0 0.5 0", "0 0 1"),
    ("prismatic", "0 0 0.1", "0 0 0", "0 1 0"),
]
NAMES = ["base", "a", "b", "c", "d", "e", "tool0", "finger"]


@pytest.fixture
def urdf(tmp_path):
    lines = ['<robot name="Lab arm 5">', *map(LINK.format, NAMES)]
    for i, (kind, xyz, rpy, axis) in enumerate(JOINTS):
        joint = dict(name=f"j{i}", kind=kind, parent=NAMES[i], child=NAMES[i + 1])
        lines.append(JOINT.format(**joint, xyz=xyz, rpy=rpy, axis=axis))
    path = tmp_path / "arm.urdf"
    path.write_text("\n".join([*lines, "</robot>"]))
    return path


def test_frankas_own_description_agrees_with_the_table():
    path = Path(franky_sim.__file__).parent / "assets/fr3.urdf"
    table = find_robot("fr3")
    joints = np.random.default_rng(0).uniform(table.low, table.high, (20, 7))
    ours = table.chain().forward_kinematics(joints)
    theirs = read_urdf(path).chain(table.gripper_length).forward_kinematics(joints)
    np.testing.assert_allclose(theirs, ours, atol=1e-9)


def test_poses_are_mujocos(urdf):
    robot = read_urdf(urdf)
    assert robot.name == "lab_arm_5" and len(robot.links) == 5
    np.testing.assert_allclose(robot.low, [-2, -2 * np.pi, -2, -2, -2])
    model = mujoco.MjModel.from_xml_path(str(urdf))
    data = mujoco.MjData(model)
    for joints in np.random.default_rng(0).uniform(-2, 2, (10, 5)):
        data.qpos[:5] = joints
        mujoco.mj_kinematics(model, data)
        poses = robot.chain(0.1).forward_kinematics(joints)
        np.testing.assert_allclose(poses[:5, :3, 3], data.xanchor[:5], atol=1e-9)
        np.testing.assert_allclose(poses[:5, :3, 2], data.xaxis[:5], atol=1e-9)
        finger = model.body("finger")  # 0.1 m above tool0, as long as the gripper
        np.testing.assert_allclose(poses[5, :3, 3], data.xpos[finger.id], atol=1e-9)


def test_recordings_of_any_arm_become_episodes(urdf, tmp_path, monkeypatch, capsys):
    write_vendor(tmp_path / "demo.hdf5", home=np.zeros(5), cameras={"top": (24, 32)})
    (tmp_path / "cameras.yaml").write_text(str(room_cameras({"top": (24, 32)})))
    mapping = Path(import_demos.__file__).parent / "mappings/vendor.yaml"
    lines = mapping.read_text().replace("gripper_range: null", "gripper_range: [0, 0.08]")
    (tmp_path / "mine.yaml").write_text(lines)
    words = [tmp_path / "demo.hdf5", "--run", tmp_path / "run", "--urdf", urdf]
    words += ["--calibration", tmp_path / "cameras.yaml", "--gripper-length", 0.1]

    with pytest.raises(UserError, match="a lab_arm_5 opens is not known: set gripper_range"):
        find_gripper_range(np.array([0.0, 0.08]), read_urdf(urdf), "demo.hdf5")
    assert stage(monkeypatch, capsys, import_demos.main, *words)[0] == 2
    words += ["--mapping", tmp_path / "mine.yaml"]
    code, _, error = stage(monkeypatch, capsys, import_demos.main, *words)
    assert code == 0, error
    episode = read_episode(tmp_path / "run/episodes/pick_up_the_cup/demo.hdf5", images=False)
    assert episode.robot == "lab_arm_5"
    chain = Chain.from_episode(episode)  # the poses turn about z, as every stage expects
    expected = read_urdf(urdf).chain(0.1).forward_kinematics(episode.qpos[:, :-1])
    np.testing.assert_allclose(chain.forward_kinematics(episode.qpos[:, :-1]), expected, atol=1e-4)


@pytest.mark.parametrize(
    "content, tip, sentence",
    [
        (None, "", "There is no URDF file"),
        ("hello", "", "is no URDF file that can be read"),
        ("<robot name='r'><link name='a'/></robot>", "", "no joint moves the link a"),
        ("", "claw", "has no link claw: give --tip, one of base, a,"),
        ("", "finger", "joint j6 slides"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(urdf, tmp_path, content, tip, sentence):
    if content is None:
        urdf = tmp_path / "none.urdf"
    elif content:
        urdf.write_text(content)
    with pytest.raises(UserError, match=sentence) as raised:
        read_urdf(urdf, tip)
    assert "\n" not in str(raised.value)


def test_of_two_arms_one_has_to_be_named(urdf):
    lines = urdf.read_text().replace("</robot>", "")
    for side in ("left", "right"):
        lines += LINK.format(f"{side}_arm") + LINK.format(f"{side}_tool0")
        joint = dict(parent="base", child=f"{side}_arm", xyz="0 0 1", rpy="0 0 0", axis="1 0 0")
        lines += JOINT.format(name=f"{side}_joint", kind="revolute", **joint)
        joint = dict(parent=f"{side}_arm", child=f"{side}_tool0", xyz="0 0 1", rpy="0 0 0")
        lines += JOINT.format(name=f"{side}_end", kind="fixed", axis="1 0 0", **joint)
    urdf.write_text(lines.replace('"tool0"', '"wrist"') + "</robot>")
    with pytest.raises(UserError, match="several arms: give --tip, one of left_tool0, right_tool0"):
        read_urdf(urdf)
    assert len(read_urdf(urdf, "right_tool0").links) == 1


def test_options_that_contradict(urdf, tmp_path, sentence_of):
    for words in (["--robot", "panda", "--urdf", urdf], ["--tip", "tool0"]):
        assert "Give --robot, or --urdf" in sentence_of("import_demos", tmp_path, *words)
