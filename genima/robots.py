"""The arms that a recording can be of: kinematics, joint limits, named frames, grippers.

A recording says joint angles; spheres need the poses of the joints. A table of link lengths turns
one into the other, so a bought recording needs no simulator and no robot description.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from genima.files import UserError
from genima.kinematics import JOINT_LIMITS as FRANKA_LIMITS
from genima.kinematics import Chain, franka_chain, rotate_z, sort_cameras
from genima.spheres import JOINTS

FRANKA = ("fr3", "panda")  # names of the robot that everything is of, if nothing else is said
TWO_TURNS = 2 * np.pi

# Lower and upper, radians. Every joint of a UR5e turns once around either way (its data sheet).
JOINT_LIMITS = FRANKA_LIMITS | {"ur5e": ((-TWO_TURNS,) * 6, (TWO_TURNS,) * 6)}

# Metres between the fingers when the gripper is open: Franka Hand, Robotiq 2F-85 (data sheets).
GRIPPER_WIDTHS = {"panda": 0.08, "fr3": 0.08, "ur5e": 0.085}

# Metres from the flange to the middle of the fingers' pads: Franka Hand (data sheet); a Robotiq
# 2F-85 with its coupling (we measured the model; give --gripper-length for another gripper).
GRIPPER_LENGTHS = {"panda": 0.1034, "fr3": 0.1034, "ur5e": 0.155}

# Metres from the last joint's frame to the flange, along the joint's axis.
FLANGES = {"panda": 0.107, "fr3": 0.107, "ur5e": 0.0996}

# The hand is screwed to Franka's flange an eighth of a turn back; on a UR5e the two agree.
HAND_TURNS = {"panda": -np.pi / 4, "fr3": -np.pi / 4, "ur5e": 0.0}

# Universal Robots' table for the UR5e (Denavit and Hartenberg), metres and radians: after the turn
# about a joint's z axis, shift d along it, then a along the new x axis, then turn alpha about that.
UR5E_D = (0.1625, 0.0, 0.0, 0.1333, 0.0997)
UR5E_A = (0.0, -0.425, -0.3922, 0.0, 0.0)
UR5E_ALPHA = (np.pi / 2, 0.0, 0.0, np.pi / 2, -np.pi / 2)

# The joints with spheres, counted from 0, where they are not the paper's 2, 4 and 6. Those are a
# Franka's shoulder, elbow and wrist, and these are a UR5e's. Its joints 4 and 6 are 17 cm apart,
# two radii of a sphere in the front view; of these three the nearest are 27 cm apart (a Franka's
# 23), and with the gripper's sphere they still tell where every joint is.
SPHERE_JOINTS = {"ur5e": (1, 2, 4)}

# What drivers and calibration programs call the frames, in our words. Franka's EE is the end of
# what is mounted: with its hand, the fingertips.
FRAME_NAMES = {
    "base": ("base", "world", "link0", "robot"),
    "base_link": ("base_link",),
    "last_joint": ("last_joint", "link7"),
    "flange": ("flange", "link8", "tool0", "wrist_3_link"),  # UR's wrist_3_link lies in the flange
    "ros_flange": ("ros_flange",),
    "hand": ("hand", "gripper"),
    "tool": ("tool", "tcp", "hand_tcp", "tool_centre", "ee", "end_effector"),
}

# The frames of ROS that are not always ours, and which of ours each is, but for a turn.
ROS_FRAMES = {"base_link": "base", "ros_flange": "flange"}

# That turn for Universal Robots (ur_description): base_link is half a turn about z from the
# controller's base, flange has its x axis where tool0 has z (roll, pitch, yaw 0, -90, -90 degrees).
ROS_TURNS = {
    "ur5e": {
        "base_link": np.diag([-1.0, -1, 1, 1]),
        "ros_flange": np.array([[0.0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]),
    }
}


def check_robot(robot: str) -> str:
    """The name of a robot in our table ("Franka Panda" is "panda"). Raises UserError."""
    for known in JOINT_LIMITS:
        if known in robot.lower():
            return known
    names = ", ".join(JOINT_LIMITS)
    raise UserError(f"Robot '{robot}' is not known: give --robot, one of {names}, or --urdf FILE.")


def guess_robot(joints: int) -> str | None:
    """The robot with this many joints: 7 is a Panda, 6 a UR5e, None for any other number."""
    return {7: "panda", 6: "ur5e"}.get(joints)


def sphere_joints(robot: str) -> tuple[int, ...]:
    """Which joints of a robot have spheres, counted from 0."""
    for known, joints in SPHERE_JOINTS.items():
        if known in robot.lower():
            return joints
    return JOINTS


def translation(z: float) -> np.ndarray:
    """A shift along z, metres -> (4, 4)."""
    pose = np.eye(4)
    pose[2, 3] = z
    return pose


def ur5e_links() -> np.ndarray:
    """Joint i-1 from joint i before it turns: (6, 4, 4).

    The base is the controller's ("base" in ROS, half a turn from "base_link").
    """
    links = [np.eye(4)]
    for d, a, alpha in zip(UR5E_D, UR5E_A, UR5E_ALPHA):
        cosine = np.cos(alpha)
        sine = np.sin(alpha)
        link = [[1, 0, 0, a], [0, cosine, -sine, 0], [0, sine, cosine, d], [0, 0, 0, 1]]
        links.append(np.array(link))
    return np.stack(links).round(12)


@dataclass(frozen=True)
class Robot:
    """An arm of D joints: one of the tables above, or of a URDF file (genima/urdf.py)."""

    name: str
    links: np.ndarray  # (D, 4, 4) joint i-1 from joint i before it turns about its z axis
    flange: np.ndarray  # (4, 4) last joint from the flange, to which the gripper is screwed
    hand: np.ndarray  # (4, 4) last joint from the gripper's frame
    low: np.ndarray  # (D,) joint limits, radians
    high: np.ndarray
    gripper_length: float = 0.0  # metres from the flange to the fingertips
    gripper_width: float | None = None  # metres between the fingers when open; None: not known
    ros_turns: dict = field(default_factory=dict)  # {frame: (4, 4)} of ROS_TURNS

    def frames(self, gripper_length: float | None = None) -> dict[str, np.ndarray]:
        """Last joint from each named frame: {"last_joint", "flange", "hand", "tool": (4, 4)}.

        gripper_length: metres from the flange to the fingertips; None: the usual gripper's.
        """
        if gripper_length is None:
            gripper_length = self.gripper_length
        tool = self.hand @ translation(gripper_length)
        return {
            "last_joint": np.eye(4),
            "flange": self.flange,
            "hand": self.hand,
            "tool": tool,
        }

    def chain(self, gripper_length: float | None = None, cameras: dict | None = None) -> Chain:
        """The kinematics, with a gripper of this length.

        cameras: {name: {"world_from_camera" or "last_joint_from_camera": (4, 4)}}.
        """
        return Chain(self.links, self.frames(gripper_length)["tool"], *sort_cameras(cameras))


def find_robot(robot: Robot | str) -> Robot:
    """The robot of this name in JOINT_LIMITS; a Robot stays what it is."""
    if isinstance(robot, Robot):
        return robot
    links = ur5e_links() if robot == "ur5e" else franka_chain().links
    flange = translation(FLANGES[robot])
    low, high = JOINT_LIMITS[robot]
    return Robot(
        name=robot,
        links=links,
        flange=flange,
        hand=flange @ rotate_z(np.array(HAND_TURNS[robot])),
        low=np.array(low),
        high=np.array(high),
        gripper_length=GRIPPER_LENGTHS[robot],
        gripper_width=GRIPPER_WIDTHS[robot],
        ros_turns=ROS_TURNS.get(robot, {}),
    )


def robot_frames(robot: Robot | str, gripper_length: float | None = None) -> dict:
    """Robot.frames of a robot, or of the one of this name; of an unknown one the last joint."""
    if isinstance(robot, str) and robot not in JOINT_LIMITS:  # an arm from a URDF file
        return {"last_joint": np.eye(4)}
    return find_robot(robot).frames(gripper_length)


def turn_from_ros(robot: Robot | str, frame: str) -> np.ndarray:
    """Our frame from the one of ROS_FRAMES: (4, 4)."""
    turns = robot.ros_turns if isinstance(robot, Robot) else ROS_TURNS.get(robot, {})
    return turns.get(frame, np.eye(4))


def robot_chain(
    robot: Robot | str, gripper_length: float | None = None, cameras: dict | None = None
) -> Chain:
    """Robot.chain of a robot, or of the one of this name."""
    return find_robot(robot).chain(gripper_length, cameras)


def frame_name(name: str, ros: bool = False) -> str | None:
    """A frame in our words ("panda_link8" is "flange"); None where no robot of ours has it.

    ros: the name is surely one of ROS, where a UR5e's flange and world are turned.
    """
    word = name.lower().strip("/").split("/")[-1]
    for robot in ("panda_", "fr3_", "ur5e_", "fer_"):
        word = word.removeprefix(robot)
    if ros:
        word = {"flange": "ros_flange", "world": "base_link"}.get(word, word)
    for ours, theirs in FRAME_NAMES.items():
        if word in theirs:
            return ours
    return None


def beyond_limits(joints: np.ndarray, robot: Robot | str, tolerance: float = 1e-3) -> np.ndarray:
    """Which frames of joints (T, D) are beyond the limits by more than the tolerance: (T,)."""
    robot = find_robot(robot)
    outside = (joints < robot.low - tolerance) | (joints > robot.high + tolerance)
    return outside.any(axis=1)
