"""The toy: kinematics, cameras, pictures."""

import numpy as np

from rlbench.backend.observation import CAMERAS, FIELDS, Observation

# Franka's URDF (franka_description): where each joint sits in the link before it, and its quarter
# turns about x
ORIGINS = [
    ((0, 0, 0.333), 0),
    ((0, 0, 0), -1),
    ((0, -0.316, 0), 1),
    ((0.0825, 0, 0), 1),
    ((-0.0825, 0.384, 0), -1),
    ((0, 0, 0), 1),
    ((0.088, 0, 0), 1),
]
# RLBench's model has the zero of joint 4 elsewhere: Franka's angle is 0.0698 rad larger.
ZEROS = np.array([0, 0, 0, 0.0698, 0, 0, 0])
# The model's joints lie elsewhere on their axes.
SHIFTS = np.array([-0.19, 0, -0.12, 0, -0.05, 0, 0.04])
START = np.array([0, 0.175, 0, -0.873, 0, 1.222, 0.785])
LOOKS_FROM = {
    "front": (1.35, 0.05, 1.6),
    "left_shoulder": (0.3, 0.5, 2.0),
    "right_shoulder": (0.3, -0.5, 2.0),
    "overhead": (0.35, 0.01, 2.1),
}


def about(axis, angle):
    pose = np.eye(4)
    i, j = [(1, 2), (2, 0), (0, 1)]["xyz".index(axis)]
    pose[i, i] = pose[j, j] = np.cos(angle)
    pose[j, i] = np.sin(angle)
    pose[i, j] = -pose[j, i]
    return pose


def at(x, y, z):
    pose = np.eye(4)
    pose[:3, 3] = x, y, z
    return pose


BASE = at(-0.27, -0.01, 0.77) @ about("z", 0.02)  # world from base
TIP = at(0, 0, 0.2169) @ about("z", 0.75 * np.pi)  # last joint from tip
WRIST = (
    TIP @ at(0.07, 0, -0.17) @ about("z", -0.5 * np.pi) @ about("x", -0.3)
)  # last joint from wrist camera


def kinematics(q):
    """PyRep's joint poses (7, 4, 4) in the room, and the last link's (4, 4)."""
    link = BASE
    poses = []
    for (origin, turns), angle, zero, shift in zip(ORIGINS, q, ZEROS, SHIFTS):
        joint = link @ at(*origin) @ about("x", turns * np.pi / 2) @ about("z", zero)
        joint = joint @ at(0, 0, shift)
        poses.append(joint)
        link = joint @ about("z", angle) @ at(0, 0, -shift)
    return np.array(poses), link


def pose7(pose):
    """x y z and a quaternion with w last."""
    r = pose[:3, :3]
    halves = []
    for a, b, c in ((1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)):
        halves.append(np.sqrt(max(0, 1 + a * r[0, 0] + b * r[1, 1] + c * r[2, 2])) / 2)
    w, x, y, z = halves
    signs = np.sign([r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]])
    if w < 1e-6:  # half a turn: the signs are relative to the largest
        k = int(np.argmax([x, y, z]))
        signs = np.where(r[k] + r[:, k] < 0, -1, 1)
        signs[k] = 1
    return np.array([*pose[:3, 3], *np.array([x, y, z]) * np.where(signs == 0, 1, signs), w])


def look_at(position, target):
    """PyRep's camera: z forward, y up, x to the left."""
    z = np.subtract(target, position) / np.linalg.norm(np.subtract(target, position))
    x = np.cross([0, 0, 1], z) / np.linalg.norm(np.cross([0, 0, 1], z))
    pose = at(*position)
    pose[:3, :3] = np.stack([x, np.cross(z, x), z], axis=1)
    return pose


class Scene:
    def __init__(self, config):
        self.config = config
        self.action = None
        self.broken = False
        self.put(START)

    def check(self):
        """A simulator that has failed once fails again."""
        if self.broken:
            raise RuntimeError("The call failed on the V-REP side. Return value: -1")

    def put(self, q):
        self.check()
        self.q = np.array(q, float)
        self.speed = np.zeros(7)
        self.gripper_open = 1.0

    def move(self, q):
        self.speed = (np.asarray(q) - self.q) / 0.05
        self.q = np.array(q, float)

    def get_observation(self, variation):
        joints, last = kinematics(self.q)
        tip = last @ TIP
        fields = dict.fromkeys(FIELDS)
        misc = {"variation_index": variation, "joint_poses": [pose7(pose) for pose in joints]}
        if self.action is not None:
            misc["joint_position_action"] = self.action
        for camera in CAMERAS:
            settings = getattr(self.config, f"{camera}_camera")
            if not settings.rgb:
                continue  # RLBench removes such a camera
            pose = (
                look_at(LOOKS_FROM[camera], (0.25, 0, 0.9)) if camera != "wrist" else last @ WRIST
            )
            width, height = settings.image_size
            intrinsics = np.array(
                [
                    [-width / (2 * np.tan(0.6)), 0, width / 2],
                    [0, -height / (2 * np.tan(0.6)), height / 2],
                    [0, 0, 1],
                ]
            )
            misc[f"{camera}_camera_extrinsics"] = pose
            misc[f"{camera}_camera_intrinsics"] = intrinsics
            misc[f"{camera}_camera_near"] = 0.01
            misc[f"{camera}_camera_far"] = 4.5
            fields[f"{camera}_rgb"] = self.draw(pose, intrinsics, tip, width, height)
        values = {
            "joint_velocities": self.speed.copy(),
            "joint_positions": self.q.copy(),
            "joint_forces": np.zeros(7),
            "gripper_open": self.gripper_open,
            "gripper_pose": pose7(tip),
            "gripper_matrix": tip,
        }
        for name, value in values.items():
            if getattr(self.config, name):
                fields[name] = value
        fields["misc"] = misc
        return Observation(**fields)

    def draw(self, pose, intrinsics, tip, width, height):
        """A gradient, with the tip in white."""
        picture = np.zeros((height, width, 3), np.uint8)
        picture[..., 0] = np.linspace(0, 200, width)
        picture[..., 1] = np.linspace(0, 200, height)[:, None]
        picture[..., 2] = int(100 + 40 * self.q[0]) % 256
        # RLBench's own formula: intrinsics @ (rotation.T @ (point - position)) / its last number
        u, v, depth = intrinsics @ (pose[:3, :3].T @ (tip[:3, 3] - pose[:3, 3]))
        u = int(u / depth)
        v = int(v / depth)
        picture[max(v - 1, 0) : max(v + 2, 0), max(u - 1, 0) : max(u + 2, 0)] = 255
        return picture
