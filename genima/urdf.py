"""An arm's kinematics from its URDF file, as robot makers publish it. Read by Pinocchio.

    robot = read_urdf(Path("xarm6.urdf"))                      up to its flange
    robot = read_urdf(Path("two_arms.urdf"), "left_tool0")     up to this link

In a URDF a joint may turn about any axis of its frame; here it is the z axis. So the frame of a
joint is turned until its z axis is the joint's; where a joint is, and about what it turns, stays.
"""

import re
from pathlib import Path

import numpy as np
import pinocchio

from genima.files import UserError, shorten
from genima.robots import Robot

ENDS = ("tool0", "flange", "link_eef", "ee_link", "end_effector", "hand", "gripper")


def read_urdf(path: Path, tip: str = "") -> Robot:
    """The arm in a URDF file, up to the link `tip`, which is its flange.

    tip: "": the link of a usual name for it (ENDS), else the one with most turning joints before
    it. Sliding joints after the arm's, as a gripper's fingers, are not part of it. Raises UserError
    for a file that is no URDF, for one with several such links, and for an arm with a joint that
    slides.
    """
    if not path.is_file():
        raise UserError(f"There is no URDF file {path}.")
    try:
        model = pinocchio.buildModelFromUrdf(str(path))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path} is no URDF file that can be read: {shorten(str(error))}") from None
    frame = find_tip(path, model, tip)
    joints = list(model.supports[frame.parentJoint])[1:]  # the first one is the world
    names = [model.names[joint] for joint in joints]
    if not joints:
        raise UserError(f"{path}: no joint moves the link {frame.name}: give another --tip.")

    data = model.createData()
    pinocchio.forwardKinematics(model, data, pinocchio.neutral(model))
    places = [data.oMi[joint].homogeneous for joint in joints]
    turned = []
    for joint, name, place in zip(joints, names, places):
        axis = joint_axis(model, joint)
        if axis is None:
            raise UserError(f"{path}: joint {name} slides: give another --tip.")
        turned.append(place @ z_axis_to(axis))
    before = [np.eye(4), *turned[:-1]]
    links = np.stack([np.linalg.inv(last) @ pose for last, pose in zip(before, turned)])
    flange = np.linalg.inv(turned[-1]) @ places[-1] @ frame.placement.homogeneous
    unlimited = [model.nqs[joint] == 2 for joint in joints]  # a continuous joint: cosine and sine
    columns = [model.idx_qs[joint] for joint in joints]
    low = np.where(unlimited, -2 * np.pi, model.lowerPositionLimit[columns])
    high = np.where(unlimited, 2 * np.pi, model.upperPositionLimit[columns])
    name = re.sub(r"[^a-z0-9]+", "_", model.name.lower()).strip("_") or path.stem
    return Robot(name, links.round(12), flange, flange, low, high)


def find_tip(path: Path, model, tip: str):
    """The frame of the link at which the arm ends."""
    links = [frame for frame in model.frames if frame.type == pinocchio.FrameType.BODY]
    if tip:
        for frame in links:
            if frame.name == tip:
                return frame
        names = ", ".join(frame.name for frame in links)
        raise UserError(f"{path} has no link {tip}: give --tip, one of {names}.")
    for end in ENDS:
        fitting = [frame for frame in links if frame.name == end or frame.name.endswith(f"_{end}")]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            names = ", ".join(frame.name for frame in fitting)
            raise UserError(f"{path} has several arms: give --tip, one of {names}.")
    return max(links, key=lambda frame: turning_joints(model, frame))


def turning_joints(model, frame) -> int:
    """How many joints turn between the base and a frame; -1 if one slides."""
    axes = [joint_axis(model, joint) for joint in list(model.supports[frame.parentJoint])[1:]]
    if any(axis is None for axis in axes):
        return -1
    return len(axes)


def joint_axis(model, joint: int) -> np.ndarray | None:
    """The axis (3,) about which a joint turns, in its own frame; None for one that slides."""
    if model.nvs[joint] != 1:
        return None
    data = model.createData()
    pinocchio.computeJointJacobians(model, data, pinocchio.neutral(model))
    jacobian = pinocchio.getJointJacobian(model, data, joint, pinocchio.ReferenceFrame.LOCAL)
    axis = jacobian.reshape(6, -1)[3:, model.idx_vs[joint]]
    return axis if np.linalg.norm(axis) > 0.5 else None


def z_axis_to(axis: np.ndarray) -> np.ndarray:
    """A rotation (4, 4) that takes the z axis to `axis`, a unit vector (3,)."""
    pose = np.eye(4)
    pose[:3, :3] = pinocchio.Quaternion.FromTwoVectors(np.array([0.0, 0.0, 1.0]), axis).matrix()
    return pose
