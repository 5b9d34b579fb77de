"""The Panda of RLBench's scene: its kinematics, and where in the room a recording has it.

In:   recorded joint angles, poses of the joints (all datasets since July 2024) and of the gripper
Out:  a Chain (genima/kinematics.py) in the frame of the robot's base, and the base's pose

RLBench's arm is Franka's with two differences, both measured on twelve recordings of three
generations of RLBench:
  zero   joint 4 stands at 0 where Franka's stands at 0.0698 rad, 4 degrees. Without that turn the
         recorded hand is up to 36 mm and 4 degrees away from where the joints put it.
  tip    between the fingertips is 0.2169 m from joint 7 (Franka's data sheet: 0.2104 m).
CoppeliaSim's limits of joint 4, -3.0718 to -0.0698 rad, are Franka's numbers in RLBench's angles.
"""

import numpy as np

from genima.files import UserError
from genima.kinematics import Chain, franka_chain, rotate_z, spread

JOINT_4_ZERO = 0.0698  # rad: Franka's angle of joint 4 less RLBench's
TIP = 0.2169  # metres from joint 7, 0.107 of them to the hand (RLBench's urdfs/panda/panda.urdf)
TIP_TURN = 0.75 * np.pi  # rad: the tip's frame from joint 7's
NEAR = 0.02  # metres, and parts of a rotation matrix: other arms are off by ten times as much


def rlbench_chain(tool=None, offsets=None):
    """RLBench's arm.

    tool: (4, 4) last joint from tool, RLBench's tip if None. offsets: (7,) metres by which the
    origins of the joints' frames are moved along their axes, none if None.
    """
    links = franka_chain().links.copy()
    links[3] = links[3] @ rotate_z(np.array(JOINT_4_ZERO))
    if tool is None:
        tool = rotate_z(np.array(TIP_TURN))
        tool[2, 3] = TIP
    along = np.tile(np.eye(4), (8, 1, 1))
    if offsets is not None:
        along[1:, 2, 3] = offsets
    return Chain(np.linalg.inv(along[:-1]) @ links @ along[1:], tool, {}, {})


# --------------------------------------------------------------------------------------- poses
def nearest_rotation(matrices):
    """The rotation (3, 3) nearest to the mean of matrices (..., 3, 3)."""
    u, _, v = np.linalg.svd(matrices.reshape(-1, 3, 3).mean(axis=0))
    return u @ np.diag([1, 1, np.linalg.det(u @ v)]) @ v


def pose_of(rotation, position):
    """A pose (4, 4) from a rotation (3, 3) and a position (3,)."""
    return np.vstack([np.column_stack([rotation, position]), [0, 0, 0, 1]])


def mean_pose(poses):
    """The pose (4, 4) in the middle of poses (T, 4, 4) that hardly differ."""
    return pose_of(nearest_rotation(poses[:, :3, :3]), poses[:, :3, 3].mean(axis=0))


def pose_matrices(poses):
    """Poses (..., 7), x y z and a quaternion with w last -> (..., 4, 4)."""
    quaternions = poses[..., 3:]
    quaternions = quaternions / np.linalg.norm(quaternions, axis=-1, keepdims=True)
    x, y, z, w = np.moveaxis(quaternions, -1, 0)
    matrices = np.zeros((*poses.shape[:-1], 4, 4))
    matrices[..., 0, 0] = 1 - 2 * (y * y + z * z)
    matrices[..., 0, 1] = 2 * (x * y - z * w)
    matrices[..., 0, 2] = 2 * (x * z + y * w)
    matrices[..., 1, 0] = 2 * (x * y + z * w)
    matrices[..., 1, 1] = 1 - 2 * (x * x + z * z)
    matrices[..., 1, 2] = 2 * (y * z - x * w)
    matrices[..., 2, 0] = 2 * (x * z - y * w)
    matrices[..., 2, 1] = 2 * (y * z + x * w)
    matrices[..., 2, 2] = 1 - 2 * (x * x + y * y)
    matrices[..., :3, 3] = poses[..., :3]
    matrices[..., 3, 3] = 1
    return matrices


# ------------------------------------------------------------------------------ where it stands
def fit_base(q, joint_poses):
    """Where the arm with angles q (T, 7) stands, whose joints turn about joint_poses' z axes.

    joint_poses: (T, 7, 4, 4) -> world_from_base (4, 4), offsets (7,) of the joints' origins along
    their axes, the largest error in metres.
    """
    ours = rlbench_chain().forward_kinematics(q)[:, :7]
    rotation = nearest_rotation(joint_poses[..., :3, 2:3] @ ours[..., None, :3, 2])
    axes = ours[..., :3, 2] @ rotation.T  # (T, 7, 3)
    origins = ours[..., :3, 3] @ rotation.T  # (T, 7, 3)
    # joint_poses' origins = base + origins + axes * offsets: linear in base and offsets
    base_part = np.broadcast_to(np.eye(3), (*axes.shape, 3))
    offsets_part = axes[..., None] * np.eye(7)[:, None]
    system = np.concatenate([base_part, offsets_part], axis=-1)  # (T, 7, 3, 10)
    wanted = joint_poses[..., :3, 3] - origins
    solution = np.linalg.lstsq(system.reshape(-1, 10), wanted.ravel(), rcond=None)[0]
    position_error = np.abs(system @ solution - wanted).max()
    axis_error = np.abs(axes - joint_poses[..., :3, 2]).max()
    base = pose_of(rotation, solution[:3])
    return base, solution[3:], max(position_error, axis_error)


def fit_base_to_tool(q, tool):
    """The same from poses tool (T, 4, 4) of the gripper alone -> world_from_base (4, 4), error."""
    ours = rlbench_chain().forward_kinematics(q)[:, -1]
    rotations = tool[:, :3, :3] @ np.swapaxes(ours[:, :3, :3], 1, 2)
    rotation = nearest_rotation(rotations)
    positions = tool[:, :3, 3] - ours[:, :3, 3] @ rotation.T
    error = max(np.abs(rotations - rotation).max(), np.ptp(positions, axis=0).max())
    return pose_of(rotation, positions.mean(axis=0)), error


def find_arm(q, joint_poses, tool, where):
    """The chain of the recorded arm and base_from_world (4, 4).

    q: (T, 7) rad; joint_poses: (T, 7, 4, 4) or None; tool: (T, 4, 4). Raises UserError for
    another robot.
    """
    if joint_poses is None:
        base, error = fit_base_to_tool(q, tool)
        offsets = np.zeros(7)
    else:
        base, offsets, error = fit_base(q, joint_poses)
    last_joint = base @ rlbench_chain(offsets=offsets).forward_kinematics(q)[:, 6]
    tips = np.linalg.inv(last_joint) @ tool
    if error > NEAR or spread(tips) > 2 * NEAR:
        raise UserError(
            f"{where}: this is not a Panda, for its joints and its gripper do not move as a "
            f"Panda's do (by {error:.2f}): only RLBench's default robot can be imported."
        )
    return rlbench_chain(mean_pose(tips), offsets), np.linalg.inv(base)
