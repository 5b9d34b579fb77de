"""Forward kinematics of a chain of joints that turn about their z axes, found in an episode or given by a table."""

from dataclasses import dataclass

import numpy as np

from genima.files import UserError

JOINT_LIMITS = {  # lower and upper, radians, from the data sheets; looked up by the word that occurs in the episode's `robot`
    "panda": ((-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973),
              (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973)),
    "fr3": ((-2.7437, -1.7837, -2.9007, -3.0421, -2.8065, 0.5445, -3.0159),  # the Franka Research 3
            (2.7437, 1.7837, 2.9007, -0.1518, 2.8065, 4.5169, 3.0159)),
}  # fmt: skip


@dataclass
class Chain:
    """A robot's kinematics, found in an episode: world_from_joint[i] = world_from_joint[i-1] @ links[i] @ turn about z by q[i]."""

    links: np.ndarray  # (D, 4, 4)
    tool: np.ndarray  # (4, 4) last joint from tool centre
    mounted: dict[str, np.ndarray]  # camera on the arm: (4, 4) last joint from camera
    fixed: dict[str, np.ndarray]  # camera in the room: (4, 4) world from camera

    @classmethod
    def from_episode(cls, episode):
        joints = episode.joint_poses.astype(np.float64)  # (T, J, 4, 4)
        before = np.concatenate(
            [np.broadcast_to(np.eye(4), joints[:, :1].shape), joints[:, :-2]], axis=1
        )
        links = (
            np.linalg.inv(before) @ joints[:, :-1] @ rotate_z(-episode.qpos[:, :-1])
        )  # (T, D, 4, 4)
        from_world = np.linalg.inv(joints[:, -2])
        what = f"{episode.path}: observations/joint_poses"
        tool = constant(
            from_world @ joints[:, -1], f"{what}: the tool centre is not fixed to the last joint."
        )
        links = constant(
            links,
            f"{what} does not follow qpos through a chain of joints that turn about their z axes.",
        )
        mounted, fixed = {}, {}
        for camera, poses in episode.extrinsics.items():
            # A camera that never moves is in the room, unless the arm never moved either: then its name has to tell.
            if spread(poses) < TOLERANCE and (spread(from_world) >= TOLERANCE or camera != "wrist"):
                fixed[camera] = poses[0].astype(np.float64)
            else:
                mounted[camera] = constant(
                    from_world @ poses,
                    f"{episode.path}: cameras/{camera}/extrinsics moves, "
                    "but not with the last joint.",
                )
        return cls(links, tool, mounted, fixed)

    def joint_poses(self, q):
        """Joint positions (..., D) -> poses (..., J, 4, 4), the last the tool centre's."""
        steps, pose, poses = (
            self.links @ rotate_z(np.asarray(q)),
            np.eye(4),
            [],
        )  # steps (..., D, 4, 4)
        for i in range(len(self.links)):
            pose = pose @ steps[..., i, :, :]
            poses.append(pose)
        return np.stack([*poses, pose @ self.tool], axis=-3)

    forward_kinematics = joint_poses

    def camera_pose(self, camera, joint_poses):
        """World from camera (..., 4, 4), when the joints are at joint_poses (..., J, 4, 4)."""
        if camera in self.mounted:
            return joint_poses[..., -2, :, :] @ self.mounted[camera]
        return np.broadcast_to(self.fixed[camera], (*joint_poses.shape[:-3], 4, 4))


TOLERANCE = 1e-3  # metres, and parts of a rotation matrix


def spread(poses):
    return np.ptp(poses, axis=0).max()


def constant(poses, otherwise):
    """The mean over the frames of poses (T, ..., 4, 4) that ought not to change."""
    if spread(poses) > TOLERANCE:
        raise UserError(f"{otherwise} Check how the episode was recorded.")
    return poses.mean(axis=0)


def rotate_z(angles):
    """Rotations about z: (...) -> (..., 4, 4)."""
    matrices = np.tile(np.eye(4), (*angles.shape, 1, 1))
    matrices[..., 0, 0] = matrices[..., 1, 1] = np.cos(angles)
    matrices[..., 1, 0] = np.sin(angles)
    matrices[..., 0, 1] = -matrices[..., 1, 0]
    return matrices


def franka_chain(cameras=None):
    """The kinematics of Panda and FR3 (Denavit and Hartenberg after Craig; data sheet) with hand, and where the cameras are."""
    a, d = [0, 0, 0, 0.0825, -0.0825, 0, 0.088], [0.333, 0, 0.316, 0, 0.384, 0, 0]
    alpha = np.pi / 2 * np.array([0, -1, 1, 1, -1, 1, 1])
    links = np.array([[[1, 0, 0, a[i]], [0, cosine, -sine, -sine * d[i]], [0, sine, cosine, cosine * d[i]], [0, 0, 0, 1]]
                      for i, (sine, cosine) in enumerate(zip(np.sin(alpha), np.cos(alpha)))])  # fmt: skip
    tool = rotate_z(np.array(-np.pi / 4))
    tool[2, 3] = 0.107 + 0.1034  # flange and fingertips
    mounted, fixed = (
        {camera: entry[key] for camera, entry in (cameras or {}).items() if key in entry}
        for key in ("last_joint_from_camera", "world_from_camera")
    )
    return Chain(links.round(12), tool, mounted, fixed)
