"""The arms of the embedded simulator: what sims/mujoco_panda.py must know of one.

    arm = find_arm("ur5e")
    spec = arm.load()                    MuJoCo's model as Python objects, without a scene

A model has the joints of the arm first, then the two fingers; as many position servos, then one
for the gripper (0 closed, 255 open); a body `hand`, which carries the wrist's camera, and a site
`tool` between the fingertips. The frame of body i is joint i's: it turns about its z axis.

Franka's arm is the Menagerie's model as carried by the `franky-sim` package. The UR5e is built here
of capsules, from Universal Robots' published lengths, masses and torques: no meshes to download,
and quick to draw. Its gripper has the stroke and the length of a Robotiq 2F-85, but two fingers
that slide, where the real ones swing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import mujoco
import numpy as np

from genima.files import UserError
from genima.robots import FLANGES, GRIPPER_LENGTHS, GRIPPER_WIDTHS, JOINT_LIMITS, ur5e_links

CAPSULE = mujoco.mjtGeom.mjGEOM_CAPSULE
CYLINDER = mujoco.mjtGeom.mjGEOM_CYLINDER
BOX = mujoco.mjtGeom.mjGEOM_BOX

GRIPPER_OPEN = 255  # what a gripper's servo takes for open
# Metres from the hand to between the fingertips (Franka's data sheet; the UR5e's hand likewise).
TOOL_OFFSET = 0.1034
# The model's fingers squeeze with about 1 N and objects slip; this many times more holds them.
GRIPPER_GAIN = 15
GRIPPER_STIFFNESS = 100 * GRIPPER_GAIN  # N/m
GRIPPER_FORCE = 140  # N
TOUCHING = {"friction": (1.5, 0.02, 0.001), "condim": 4}  # geoms of the hand that touch things
# Of our fingers' contacts: soft ones sink into a button before it moves.
STIFF = {"solref": (0.004, 1), "solmix": 10}
ROBOT_GROUP = 2  # the group of the arm's geoms
LIGHT = 0.82  # grey, of links
DARK = 0.45  # of the UR5e's joints
BLACK = 0.25  # of fingers

# A UR5e's masses, kg, and the torques of its joints, N m (Universal Robots' data).
UR5E_MASSES = (3.761, 8.058, 2.846, 1.37, 1.3, 0.365)
UR5E_TORQUES = (150, 150, 150, 28, 28, 28)
UR5E_STIFFNESS = (4500, 4500, 4500, 2000, 2000, 2000)  # N m/rad, of our servos: as Franka's model's
SERVO_LAG = 0.1  # seconds, of all servos
ROTOR = 0.1  # kg m^2 that a gear adds to a joint's inertia
HAND_MASS = 0.9  # kg (Robotiq's data sheet)

# What the links look like: capsules in the frames of their joints, from, to, radius (metres), grey.
# The upper arm runs 13 cm beside the base's axis, the forearm back in front of it.
UR5E_CAPSULES = (
    [((0, 0, 0.06), (0, 0, 0.1625), 0.06, DARK)],
    [
        ((0, 0, 0), (0, 0, 0.138), 0.06, DARK),
        ((0, 0, 0.138), (-0.425, 0, 0.138), 0.05, LIGHT),
    ],
    [
        ((0, 0, 0.007), (0, 0, 0.138), 0.055, DARK),
        ((0, 0, 0.007), (-0.3922, 0, 0.007), 0.04, LIGHT),
    ],
    [((0, 0, 0.02), (0, 0, 0.1333), 0.042, DARK)],
    [((0, 0, 0), (0, 0, 0.0997), 0.042, LIGHT)],
    [((0, 0, 0), (0, 0, 0.06), 0.04, DARK)],
)


@dataclass(frozen=True)
class Arm:
    """An arm in the simulator; D joints."""

    load: Callable[[], mujoco.MjSpec]
    bodies: tuple[str, ...]  # (D,) the link behind each joint
    home: tuple[float, ...]  # (D,) rad: elbow up, fingers down, over the table
    finger_travel: float  # metres, of each finger between closed and open


def find_arm(robot: str) -> Arm:
    """The arm of this name. Raises UserError if it is not simulated."""
    if robot not in ARMS:
        raise UserError(f"There is no simulated {robot}: the simulator has {', '.join(ARMS)}.")
    return ARMS[robot]


# ------------------------------------------------------------------------------------------ Franka
def load_franka() -> mujoco.MjSpec:
    """The Franka Research 3 and its hand, fast to draw and with a firm grip."""
    assets = Path(find_spec("franky_sim").origin).parent / "assets"
    spec = mujoco.MjSpec.from_file(str(assets / "fr3.xml"))
    spec.meshdir = str(assets / "meshes")
    # The collision meshes (3,100 faces) look like the arm and draw 15 times faster than the visual
    # ones (242,000).
    for geom in list(spec.geoms):
        if geom.classname.name == "visual":
            spec.delete(geom)
    used = {geom.meshname for geom in spec.geoms}
    for mesh in list(spec.meshes):
        if mesh.name not in used:
            spec.delete(mesh)

    greys = {"hand": 0.9, "left_finger": BLACK, "right_finger": BLACK}
    for geom in spec.geoms:
        part = geom.parent.name
        grey = greys.get(part, LIGHT)
        geom.group = ROBOT_GROUP
        geom.rgba = (grey, grey, grey, 1)
        # Only the hand and the flat pads of the fingers touch things: the fingers' hulls taper and
        # would squeeze objects out.
        is_pad = part.endswith("_finger") and geom.type != mujoco.mjtGeom.mjGEOM_MESH
        if part == "hand" or is_pad:
            geom.friction = TOUCHING["friction"]
            geom.condim = TOUCHING["condim"]
        else:
            geom.contype = 0
            geom.conaffinity = 0

    hand = spec.actuator("hand")
    hand.gainprm[0] *= GRIPPER_GAIN
    hand.biasprm[1:3] = hand.biasprm[1:3] * GRIPPER_GAIN
    spec.body("hand").add_site(name="tool", pos=(0, 0, TOOL_OFFSET))
    return spec


# -------------------------------------------------------------------------------------------- UR5e
def load_ur5e() -> mujoco.MjSpec:
    """The UR5e with a gripper of two fingers. Its links lie as in genima/robots.py."""
    spec = mujoco.MjSpec()
    spec.modelname = "ur5e"
    spec.compiler.degree = False
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    add_part(spec.worldbody, CAPSULE, (0.075, 0, 0), BLACK, fromto=(0, 0, -0.06, 0, 0, 0.05))

    body = spec.worldbody
    low, high = JOINT_LIMITS["ur5e"]
    for i, link in enumerate(ur5e_links()):
        body = add_body(body, f"ur5e_link{i + 1}", link)
        joint = f"ur5e_joint{i + 1}"
        body.add_joint(name=joint, axis=(0, 0, 1), range=(low[i], high[i]), armature=ROTOR)
        capsules = UR5E_CAPSULES[i]
        for start, end, radius, grey in capsules:
            mass = UR5E_MASSES[i] / len(capsules)
            add_part(body, CAPSULE, (radius, 0, 0), grey, fromto=(*start, *end), mass=mass)
        stiffness = UR5E_STIFFNESS[i]
        add_servo(spec, joint, stiffness, SERVO_LAG * stiffness, UR5E_TORQUES[i])
    add_gripper(spec, body)
    return spec


def add_gripper(spec, last_link):
    """Two fingers that slide along the hand's y axis, moved by one servo."""
    to_hand = np.eye(4)
    to_hand[2, 3] = FLANGES["ur5e"] + GRIPPER_LENGTHS["ur5e"] - TOOL_OFFSET
    hand = add_body(last_link, "hand", to_hand)
    flange = FLANGES["ur5e"] - to_hand[2, 3]
    add_part(hand, CYLINDER, (0.032, 0, 0), BLACK, fromto=(0, 0, flange, 0, 0, 0.01), mass=0.2)
    palm = {"pos": (0, 0, 0.03), "mass": HAND_MASS - 0.3, **TOUCHING}
    add_part(hand, BOX, (0.025, 0.065, 0.03), BLACK, touches=True, **palm)
    hand.add_site(name="tool", pos=(0, 0, TOOL_OFFSET))

    travel = GRIPPER_WIDTHS["ur5e"] / 2
    both = spec.add_tendon(name="fingers")
    for number, side in ((1, 1), (2, -1)):
        finger = hand.add_body(name=f"finger{number}", gravcomp=1)
        finger.add_joint(
            name=f"finger_joint{number}",
            type=mujoco.mjtJoint.mjJNT_SLIDE,
            axis=(0, side, 0),
            range=(0, travel),
            armature=ROTOR,
        )
        pad = {"pos": (0, side * 0.007, 0.086), "mass": 0.05, **STIFF, **TOUCHING}
        add_part(finger, BOX, (0.011, 0.006, 0.026), DARK, touches=True, **pad)
        both.wrap_joint(f"finger_joint{number}", 0.5)
    mirror = spec.add_equality(
        type=mujoco.mjtEq.mjEQ_JOINT,
        objtype=mujoco.mjtObj.mjOBJ_JOINT,
        name1="finger_joint1",
        name2="finger_joint2",
        solref=(0.005, 1),
    )
    mirror.data[1] = 1  # the one is as far open as the other
    servo = add_servo(
        spec, "fingers", GRIPPER_STIFFNESS, SERVO_LAG * GRIPPER_STIFFNESS, GRIPPER_FORCE
    )
    servo.trntype = mujoco.mjtTrn.mjTRN_TENDON
    servo.gainprm[0] *= travel / GRIPPER_OPEN
    servo.ctrlrange = (0, GRIPPER_OPEN)


def add_body(parent, name, pose):
    """A body at a pose (4, 4) in its parent, whose weight the servos bear, as a UR's do."""
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, pose[:3, :3].ravel())
    return parent.add_body(name=name, pos=pose[:3, 3], quat=quaternion, gravcomp=1)


def add_part(body, shape, size, grey, touches=False, **geom):
    """A geom of the robot; touches: whether it collides with objects."""
    body.add_geom(
        type=shape,
        size=size,
        rgba=(grey, grey, grey, 1),
        group=ROBOT_GROUP,
        contype=int(touches),
        conaffinity=int(touches),
        **geom,
    )


def add_servo(spec, target, stiffness, damping, strongest):
    """A position servo of a joint, N m/rad (of fingers N/m), whose force has a limit."""
    servo = spec.add_actuator(name=target, target=target)
    servo.trntype = mujoco.mjtTrn.mjTRN_JOINT
    servo.gaintype = mujoco.mjtGain.mjGAIN_FIXED
    servo.biastype = mujoco.mjtBias.mjBIAS_AFFINE
    servo.gainprm[0] = stiffness
    servo.biasprm[1] = -stiffness
    servo.biasprm[2] = -damping
    servo.forcerange = (-strongest, strongest)
    return servo


FRANKA = Arm(
    load=load_franka,
    bodies=tuple(f"fr3_link{i}" for i in range(1, 8)),
    home=(0.0, -0.3, 0.0, -2.2, 0.0, 1.9, 0.7853),
    finger_travel=0.04,
)
UR5E = Arm(
    load=load_ur5e,
    bodies=tuple(f"ur5e_link{i}" for i in range(1, 7)),
    # At zero the arm lies along -x of the controller's base: half a turn points it at the table.
    home=(np.pi, -1.75, 1.9, -1.72, -np.pi / 2, -np.pi / 2),
    finger_travel=GRIPPER_WIDTHS["ur5e"] / 2,
)
ARMS = {"fr3": FRANKA, "panda": FRANKA, "ur5e": UR5E}
