"""Forward kinematics of a chain of joints that turn about their z axes.

    chain = Chain.from_episode(episode)              found in a recorded episode, or
    chain = franka_chain()                           given by the data sheet's table
    poses = chain.forward_kinematics(q)              (..., D) -> (..., D+1, 4, 4), the last the tool
    chain.camera_pose("wrist", poses)                (..., 4, 4) world from camera

Poses are 4x4 matrices `a_from_b`, metres and radians; the world is the robot's base.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from genima.episodes import Episode
from genima.files import UserError

TOLERANCE = 1e-3  # metres, and parts of a rotation matrix: what counts as the same pose
# Lower and upper limits of the joints, radians, from Franka's data sheets; looked up by the word
# that occurs in an episode's `robot`.
JOINT_LIMITS = {
    "panda": (
        (-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973),
        (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973),
    ),
    "fr3": (  # the Franka Research 3
        (-2.7437, -1.7837, -2.9007, -3.0421, -2.8065, 0.5445, -3.0159),
        (2.7437, 1.7837, 2.9007, -0.1518, 2.8065, 4.5169, 3.0159),
    ),
}


@dataclass
class Chain:
    """A robot's kinematics: joint i is at joint i-1 @ links[i] @ rotation about z by q[i]."""

    links: np.ndarray  # (D, 4, 4) joint i-1 from joint i, at q[i] = 0; joint -1 is the world
    tool: np.ndarray  # (4, 4) last joint from tool centre
    mounted: dict[str, np.ndarray]  # camera on the arm: (4, 4) last joint from camera
    fixed: dict[str, np.ndarray]  # camera in the room: (4, 4) world from camera

    @classmethod
    def from_episode(cls, episode: Episode) -> Chain:
        """Find the constants of the chain in an episode's poses and joint positions.

        Raises UserError where the poses do not follow the joints, or a camera moves by itself.
        """
        world_from_joints = episode.joint_poses[:, :-1].astype(np.float64)  # (T, D, 4, 4)
        world_from_tool = episode.joint_poses[:, -1].astype(np.float64)  # (T, 4, 4)
        where = f"{episode.path}: observations/joint_poses"

        world = np.broadcast_to(np.eye(4), world_from_joints[:, :1].shape)
        before = np.concatenate([world, world_from_joints[:, :-1]], axis=1)  # (T, D, 4, 4)
        before_from_joint = np.linalg.inv(before) @ world_from_joints
        links = constant_pose(
            before_from_joint @ rotate_z(-episode.qpos[:, :-1]),
            f"{where} does not follow qpos through a chain of joints that turn about their z axes",
        )
        last_from_world = np.linalg.inv(world_from_joints[:, -1])
        tool = constant_pose(
            last_from_world @ world_from_tool,
            f"{where}: the tool centre is not fixed to the last joint",
        )

        mounted = {}
        fixed = {}
        for camera, poses in episode.extrinsics.items():
            if is_in_room(episode, camera):
                fixed[camera] = poses[0].astype(np.float64)
            else:
                mounted[camera] = constant_pose(
                    last_from_world @ poses,
                    f"{episode.path}: cameras/{camera}/extrinsics moves, "
                    "but not with the last joint",
                )
        return cls(links, tool, mounted, fixed)

    def forward_kinematics(self, q: np.ndarray) -> np.ndarray:
        """Joint positions (..., D), rad -> world from joint (..., D+1, 4, 4), the last the tool."""
        steps = self.links @ rotate_z(np.asarray(q))  # (..., D, 4, 4)
        pose = np.eye(4)
        poses = []
        for i in range(len(self.links)):
            pose = pose @ steps[..., i, :, :]
            poses.append(pose)
        poses.append(pose @ self.tool)
        return np.stack(poses, axis=-3)

    def camera_pose(self, camera: str, joint_poses: np.ndarray) -> np.ndarray:
        """World from camera (..., 4, 4) when the joints are at joint_poses (..., D+1, 4, 4)."""
        if camera in self.mounted:
            return joint_poses[..., -2, :, :] @ self.mounted[camera]
        return np.broadcast_to(self.fixed[camera], (*joint_poses.shape[:-3], 4, 4))


def is_in_room(episode: Episode, camera: str) -> bool:
    """Whether a camera is fixed in the room; otherwise it is on the arm.

    A camera that never moves is in the room. If the arm never moves either, its name tells.
    """
    still = spread(episode.extrinsics[camera]) < TOLERANCE
    arm_moves = spread(episode.joint_poses[:, -2]) >= TOLERANCE
    return still and (arm_moves or camera != "wrist")


def spread(poses: np.ndarray) -> float:
    """By how much poses (T, ..., 4, 4) differ over the frames."""
    return np.ptp(poses, axis=0).max()


def constant_pose(poses: np.ndarray, otherwise: str) -> np.ndarray:
    """The mean over the frames of poses (T, ..., 4, 4) that must not change.

    Raises UserError, which begins with `otherwise`, where they do.
    """
    if spread(poses) > TOLERANCE:
        raise UserError(f"{otherwise}: check how the episode was recorded.")
    return poses.mean(axis=0)


def rotate_z(angles: np.ndarray) -> np.ndarray:
    """Rotations about z by angles (...), rad -> (..., 4, 4)."""
    matrices = np.tile(np.eye(4), (*angles.shape, 1, 1))
    cosine = np.cos(angles)
    sine = np.sin(angles)
    matrices[..., 0, 0] = cosine
    matrices[..., 0, 1] = -sine
    matrices[..., 1, 0] = sine
    matrices[..., 1, 1] = cosine
    return matrices


def franka_chain(cameras: dict | None = None) -> Chain:
    """The kinematics of Panda and FR3 with Franka's hand, from the data sheet.

    cameras: {name: {"world_from_camera" or "last_joint_from_camera": (4, 4)}}.
    """
    # Denavit-Hartenberg parameters after Craig: metres, metres, radians.
    a = (0, 0, 0, 0.0825, -0.0825, 0, 0.088)
    d = (0.333, 0, 0.316, 0, 0.384, 0, 0)
    alpha = np.pi / 2 * np.array([0, -1, 1, 1, -1, 1, 1])
    links = np.tile(np.eye(4), (7, 1, 1))
    for i in range(7):
        cosine = np.cos(alpha[i])
        sine = np.sin(alpha[i])
        links[i, 0, 3] = a[i]
        links[i, 1, 1:] = cosine, -sine, -sine * d[i]
        links[i, 2, 1:] = sine, cosine, cosine * d[i]
    tool = rotate_z(np.array(-np.pi / 4))
    tool[2, 3] = 0.107 + 0.1034  # from the last joint to the flange, and on to the fingertips
    return Chain(links.round(12), tool, *sort_cameras(cameras))


def sort_cameras(cameras: dict | None) -> tuple[dict, dict]:
    """A calibration's poses {camera: (4, 4)}: of cameras on the arm, and of those in the room."""
    mounted = {}
    fixed = {}
    if cameras is None:
        cameras = {}
    for camera, entry in cameras.items():
        if "last_joint_from_camera" in entry:
            mounted[camera] = entry["last_joint_from_camera"]
        else:
            fixed[camera] = entry["world_from_camera"]
    return mounted, fixed
