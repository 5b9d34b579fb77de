"""The embedded simulator: a Franka arm at a table in MuJoCo, as a Gymnasium environment.

In:   absolute joint positions (7, rad) and a gripper command (0 closed, 1 open), ten times a second.
Out:  joint positions and velocities, and one picture per camera.
Use:  env = PandaEnv("pick_and_lift");  obs, info = env.reset(seed=0);  print(info["instruction"])

The arm and hand are the Menagerie's Franka model as carried by the `franky-sim` package. World frame: the robot's base on
the table top, metres, z up, x away from the robot. Task names, instructions and success tests follow RLBench (James et al.,
2020) as far as boxes, cylinders and hinges allow.

To add a task, write a class like `ReachTarget` below (about thirty lines) and list it in TASKS:
  build    puts the objects into the scene (an MjSpec: MuJoCo's XML as Python objects), once;
  place    draws where they lie and how they look in this episode;
  focus    the point that the instruction is about, the middle of `geom` if nothing else is said; some demonstrations start near it;
  plan     yields the waypoints of the scripted demonstration;
  success  says whether the task is done.
"""

import difflib
import sys
from dataclasses import dataclass
from pathlib import Path

CANNOT_DRAW = ("Neither EGL nor OSMesa can draw on this machine: install one of them "
               "(Debian, Ubuntu: apt-get install libegl1 libgl1 libosmesa6). MuJoCo said: ")  # fmt: skip
try:
    import mujoco
except Exception as error:  # no EGL, and OSMesa is not there either
    sys.exit(f"{CANNOT_DRAW}{error}")

import franky_sim
import gymnasium
import numpy as np

from episodes import CAMERAS, UserError

CONTROL_HZ = 10
HOME = np.array([0.0, -0.3, 0.0, -2.2, 0.0, 1.9, 0.7853])  # elbow up, fingers down, over the table
TOOL_DOWN = np.diag([1.0, -1.0, -1.0])  # world from tool: z down, fingers open along y
TOOL_OFFSET = 0.1034  # metres from the hand's flange to between the fingertips (Franka's data sheet)
GRIPPER_GAIN = 15  # the model's fingers squeeze with about 1 N and objects slip; this many times more holds them
START_BOX = np.array([[0.32, -0.28, 0.15], [0.62, 0.28, 0.40]])  # where the tool may be when an episode begins

# RLBench's colours, less those that would be taken for a sphere (red, green, purple, cyan, yellow and their neighbours)
COLOURS = {
    "orange": (1.0, 0.5, 0.0),
    "blue": (0.0, 0.1, 1.0),
    "white": (1.0, 1.0, 1.0),
    "black": (0.05, 0.05, 0.05),
    "rose": (1.0, 0.35, 0.6),
}

ELBOW_UP = np.array([0, 0, 1, 0, 0, 0, 0])  # a Task.posture that leaves the hand free to turn
# Geom attributes of what is grasped: rough, and with stiff contacts, so that it does not creep between the fingers.
GRIPPED = {"friction": (1.5, 0.02, 0.001), "condim": 4, "priority": 1, "solref": (0.004, 1)}
# Geom attributes of furniture: it touches the hand and loose objects, but not its own drawers and lids.
FURNITURE = {"contype": 2, "conaffinity": 1}
PAINTED = {"contype": 0, "conaffinity": 0}  # a mark on the table that nothing touches


@dataclass
class Move:
    """One waypoint of a demonstration: where the tool goes (world frame), with which gripper, and how long it stays."""

    position: np.ndarray  # (3,)
    gripper: float = 1.0
    dwell: int = 0  # control steps to wait there
    rotation: np.ndarray = None  # (3, 3) world from tool; None: as it is
    speed: float = 0.4  # m/s


# ------------------------------------------------------------------------------------------------------------- scene
def add_box(parent, name, size, position=(0, 0, 0), colour=(0.7, 0.7, 0.7), **geom):
    """A box of half sizes `size` (m) on a body of MjSpec; further MuJoCo attributes by name."""
    return parent.add_geom(name=name, type=mujoco.mjtGeom.mjGEOM_BOX, size=size, pos=position, rgba=(*colour, 1), **geom)


def add_block(world, name, size, position, colour=(0.7, 0.7, 0.7), **geom):
    """A box that can be pushed and carried."""
    body = world.add_body(name=name, pos=position)
    body.add_freejoint(name=name)
    add_box(body, name, size, (0, 0, 0), colour, **geom)


def base_scene():
    """Robot, table, light and cameras as an MjSpec. Returns it and the worldbody."""
    assets = Path(franky_sim.__file__).parent / "assets"
    spec = mujoco.MjSpec.from_file(str(assets / "fr3.xml"))
    spec.meshdir = str(assets / "meshes")
    # The collision meshes (3,100 faces) look like the arm and draw 15 times faster than the visual ones (242,000).
    for geom in [geom for geom in spec.geoms if geom.classname.name == "visual"]:
        spec.delete(geom)
    kept = {geom.meshname for geom in spec.geoms}
    for mesh in [mesh for mesh in spec.meshes if mesh.name not in kept]:
        spec.delete(mesh)
    for geom in spec.geoms:
        part, grey = geom.parent.name, {"hand": 0.9, "left_finger": 0.25, "right_finger": 0.25}.get(geom.parent.name, 0.82)
        geom.group, geom.rgba = 2, (grey, grey, grey, 1)
        # Only the hand and the flat finger pads touch things: the fingers' hulls taper and would squeeze objects out.
        if part == "hand" or part.endswith("_finger") and geom.type != mujoco.mjtGeom.mjGEOM_MESH:
            geom.friction, geom.condim = (1.5, 0.02, 0.001), 4
        else:
            geom.contype = geom.conaffinity = 0
    hand = spec.actuator("hand")
    hand.gainprm[0] *= GRIPPER_GAIN
    hand.biasprm[1:3] = hand.biasprm[1:3] * GRIPPER_GAIN
    spec.body("hand").add_site(name="tool", pos=(0, 0, TOOL_OFFSET))

    spec.option.timestep = 0.002
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC  # with impratio: held objects don't creep
    spec.option.impratio = 10
    light, window = spec.visual.headlight, getattr(spec.visual, "global")
    light.ambient, light.diffuse, light.specular = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (0, 0, 0)
    spec.visual.map.znear = 0.005
    window.offwidth, window.offheight = 1280, 960
    spec.visual.quality.shadowsize = 0
    world = spec.worldbody
    world.add_light(pos=(0.5, 0, 2.0), dir=(0, 0, -1), castshadow=False, diffuse=(0.3, 0.3, 0.3))
    add_box(world, "table", (0.6, 0.8, 0.02), (0.4, 0, -0.02), (0.62, 0.55, 0.48), friction=(1.0, 0.005, 0.0001))
    add_box(world, "backdrop", (3, 3, 0.01), (0, 0, -0.8), (0.35, 0.38, 0.42), **PAINTED)

    add_camera(world, "front", (1.28, 0, 0.62), (0.42, 0, 0.14), 38)
    add_camera(world, "right_shoulder", (0.16, -0.80, 0.62), (0.44, 0.02, 0.12), 38)
    add_camera(world, "left_shoulder", (0.16, 0.80, 0.62), (0.44, -0.02, 0.12), 38)
    add_camera(spec.body("hand"), "wrist", (0.12, 0, 0.01), (0.02, 0, 0.14), 70, up=(1, 0, 0))
    return spec, world


def add_camera(body, name, position, target, fovy, up=(0, 0, 1)):
    """A camera at `position` that looks at `target` (both in the body's frame); fovy in degrees."""
    backward = np.subtract(position, target) / np.linalg.norm(np.subtract(position, target))
    right = np.cross(up, backward)
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(backward, right), backward], axis=1)  # MuJoCo: x right, y up, looks along -z
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, axes.ravel())
    body.add_camera(name=name, pos=position, quat=quaternion, fovy=fovy)


def about_z(angle):
    """The quaternion of a turn about the vertical."""
    return np.cos(angle / 2), 0, 0, np.sin(angle / 2)


def scatter(rng, count, low, high, apart):
    """`count` points in the box low..high, at least `apart` metres from one another in the table plane."""
    while True:
        points = rng.uniform(low, high, (count, len(low)))
        gaps = np.linalg.norm(points[:, None, :2] - points[None, :, :2], axis=-1)[np.triu_indices(count, 1)]
        if count == 1 or gaps.min() >= apart:
            return points


# ------------------------------------------------------------------------------------------------------------- tasks
class Task:
    """What is common to all tasks: several candidates in view, of which the instruction names one."""

    candidates = 3
    names = ("",)  # what the instruction calls each candidate
    geom = ""  # the geom that the instruction is about; {} is the candidate's number
    templates = ()  # RLBench's phrasings; {} is the named candidate
    max_steps = 100
    start_box = START_BOX
    posture = np.array([0, 1, 1, 1, 1, 1, 1])  # which joints are drawn to HOME where the tool's pose leaves a choice

    def near(self, env):
        """The point above which the tool begins when it begins near."""
        return self.focus(env)

    def failed(self, env):
        """True when the task can no longer be done (the wrong button was pressed)."""
        return False

    def instructions(self, variation):
        return [template.format(self.names[variation]) for template in self.templates]

    def focus(self, env):
        return env.data.geom(self.geom.format(env.variation)).xpos.copy()

    def draw_colours(self, env, rng):
        """Gives each candidate its own colour for this episode, and its name."""
        self.names = [str(name) for name in rng.permutation(list(COLOURS))[: self.candidates]]
        for i, name in enumerate(self.names):
            env.model.geom(self.geom.format(i)).rgba[:3] = COLOURS[name]


class ReachTarget(Task):
    """Touch the ball of the named colour with the fingertips; the other balls are distractors."""

    geom = "ball{}"
    templates = ("reach the {} target", "touch the {} ball with the panda gripper", "reach the {} sphere")
    radius = 0.03

    def build(self, spec, world):
        for i in range(self.candidates):
            body = world.add_body(name=f"ball{i}", mocap=True)
            body.add_geom(name=f"ball{i}", type=mujoco.mjtGeom.mjGEOM_SPHERE, size=[self.radius, 0, 0], contype=0, conaffinity=0)

    def place(self, env, rng):
        self.draw_colours(env, rng)
        env.data.mocap_pos[:] = scatter(rng, self.candidates, (0.36, -0.25, 0.05), (0.62, 0.25, 0.30), apart=0.12)

    def plan(self, env):
        yield Move(self.focus(env), dwell=4)

    def success(self, env):
        return np.linalg.norm(env.tool()[:3, 3] - self.focus(env)) < self.radius


class PushButton(Task):
    """Press the button of the named colour with closed fingers. Pressing another one ends the episode."""

    geom = "cap{}"
    templates = ("push the {} button", "push down the {} button", "press the button with the {} color", "press the {} button")
    height, travel = 0.03, 0.010  # of the button's top above the table; how far it goes down

    def build(self, spec, world):
        for i in range(self.candidates):
            body = world.add_body(name=f"button{i}")
            add_box(body, f"base{i}", (0.035, 0.035, 0.01), (0, 0, 0.01), (0.45, 0.45, 0.45))
            cap = body.add_body(name=f"cap{i}", pos=(0, 0, 0.02))
            cap.add_joint(name=f"cap{i}", type=mujoco.mjtJoint.mjJNT_SLIDE, axis=(0, 0, 1), range=(-self.travel, 0),
                          stiffness=[300, 0, 0], damping=[10, 0, 0], springref=0.01)  # fmt: skip
            cap.add_geom(name=f"cap{i}", type=mujoco.mjtGeom.mjGEOM_CYLINDER, size=[0.025, 0.01, 0], mass=0.05)

    def place(self, env, rng):
        self.draw_colours(env, rng)
        for i, point in enumerate(scatter(rng, self.candidates, (0.36, -0.24), (0.62, 0.24), apart=0.13)):
            env.model.body(f"button{i}").pos[:2] = point

    def focus(self, env):
        return np.append(env.model.body(f"button{env.variation}").pos[:2], self.height)

    def plan(self, env):
        top = self.focus(env)
        height = np.clip(env.tool()[2, 3], top[2] + 0.05, top[2] + 0.10)
        yield Move(np.append(top[:2], height), gripper=0)
        yield Move(top - (0, 0, self.travel + 0.005), gripper=0, dwell=4, speed=0.25)

    def pressed(self, env, i):
        return env.data.joint(f"cap{i}").qpos[0] < -0.6 * self.travel

    def success(self, env):
        return self.pressed(env, env.variation)

    def failed(self, env):
        return any(self.pressed(env, i) for i in range(self.candidates) if i != env.variation)


def grasp(env, point, low, high):
    """Waypoints: over the point, between two heights and rather where the tool is already, down to it, and close the fingers."""
    yield Move(np.append(point[:2], np.clip(env.tool()[2, 3], low, high)))
    # The pauses around the closing add up to the horizon (8 steps): a target that many steps ahead never skips the contact.
    yield Move(point, dwell=4, speed=0.25)
    yield Move(point, gripper=0, dwell=5)


class PickAndLift(Task):
    """Grasp the block of the named colour and lift it 10 cm; the other blocks are distractors."""

    geom = "block{}"
    templates = ("pick up the {} block and lift it", "grasp the {} block and lift it up", "lift the {} block up")
    half = 0.02

    def build(self, spec, world):
        for i in range(self.candidates):
            add_block(world, f"block{i}", [self.half] * 3, (0.5, 0.2 * (i - 1), self.half), mass=0.05, **GRIPPED)

    def place(self, env, rng):
        self.draw_colours(env, rng)
        for i, point in enumerate(scatter(rng, self.candidates, (0.38, -0.22), (0.60, 0.22), apart=0.13)):
            env.data.joint(f"block{i}").qpos[:] = [*point, self.half, *about_z(rng.uniform(-0.3, 0.3))]

    def plan(self, env):
        point = self.focus(env)
        yield from grasp(env, point, point[2] + 0.06, point[2] + 0.12)
        yield Move(point + (0, 0, 0.15), gripper=0, dwell=2)

    def success(self, env):
        block = self.focus(env)
        return block[2] > self.half + 0.10 and np.linalg.norm(block - env.tool()[:3, 3]) < 0.04


class SlideBlockToTarget(Task):
    """Push the block along the table, with open fingers side by side, until it lies on the blue square."""

    candidates, geom = 1, "block"
    templates = (
        "slide the block to target", "slide the block onto the target", "slide the block towards the blue target",
        "push the block until it is sitting on top of the target",
        "cover the target with the block by pushing the block in its direction",
    )  # fmt: skip
    posture = ELBOW_UP
    half = np.array([0.03, 0.055, 0.025])

    def build(self, spec, world):
        add_box(world.add_body(name="target"), "target", (0.055, 0.055, 0.001), (0, 0, 0), COLOURS["blue"], **PAINTED)
        slippery = {"friction": (0.3, 0.005, 0.0001), "priority": 1}  # rough blocks jam between fingers and table
        add_block(world, "block", self.half, (0.4, 0, self.half[2]), COLOURS["orange"], mass=0.1, **slippery)

    def place(self, env, rng):
        block, yaw, distance = rng.uniform((0.39, -0.12), (0.46, 0.12)), rng.uniform(-1.2, 1.2), rng.uniform(0.11, 0.17)
        env.data.joint("block").qpos[:] = [*block, self.half[2], *about_z(yaw)]
        env.model.body("target").pos[:2] = block + distance * np.array([np.cos(yaw), np.sin(yaw)])
        env.model.body("target").quat[:] = env.data.joint("block").qpos[3:]

    def plan(self, env):
        block, target = self.focus(env), np.append(env.model.body("target").pos[:2], self.half[2])
        direction = (target - block) / np.linalg.norm(target - block)
        turned = rotation_from(np.arctan2(direction[1], direction[0]) * np.array([0, 0, 1.0])) @ TOOL_DOWN
        behind = block - (self.half[0] + 0.04) * direction
        yield Move(np.append(behind[:2], np.clip(env.tool()[2, 3], 0.09, 0.14)), rotation=turned)
        yield Move(behind, dwell=2, rotation=turned, speed=0.25)
        yield Move(target - (self.half[0] + 0.008) * direction, dwell=4, rotation=turned, speed=0.15)

    def success(self, env):
        return np.linalg.norm(self.focus(env)[:2] - env.model.body("target").pos[:2]) < 0.025


class OpenDrawer(Task):
    """Grasp the handle of the bottom, middle or top drawer of a cabinet from its front and pull it open."""

    names, geom = ("bottom", "middle", "top"), "handle{}"
    templates = ("open the {0} drawer", "grip the {0} handle and pull the {0} drawer open", "slide the {0} drawer open")
    start_box = np.array([[0.32, -0.28, 0.15], [0.62, -0.08, 0.40]])  # in front of the cabinet
    posture = ELBOW_UP

    def build(self, spec, world):
        cabinet, white, bar = world.add_body(name="cabinet"), (0.85, 0.85, 0.82), COLOURS["black"]
        add_box(cabinet, "plinth", (0.11, 0.08, 0.0375), (0, 0, 0.0375), white, **FURNITURE)
        add_box(cabinet, "back", (0.11, 0.005, 0.13), (0, 0.075, 0.205), white, **FURNITURE)
        add_box(cabinet, "top", (0.11, 0.08, 0.005), (0, 0, 0.34), white, **FURNITURE)
        for side in (-1, 1):
            add_box(cabinet, f"side{side}", (0.005, 0.08, 0.13), (side * 0.105, 0, 0.205), white, **FURNITURE)
        for i in range(self.candidates):
            drawer = cabinet.add_body(name=f"drawer{i}", pos=(0, -0.08, 0.12 + 0.085 * i))
            drawer.add_joint(name=f"drawer{i}", type=mujoco.mjtJoint.mjJNT_SLIDE, axis=(0, -1, 0), range=(0, 0.15),
                             frictionloss=0.5, damping=[5, 0, 0])  # fmt: skip
            add_box(drawer, f"front{i}", (0.098, 0.005, 0.04), (0, 0.005, 0), (0.35, 0.45, 0.55), mass=0.1, **FURNITURE)
            add_box(drawer, f"tray{i}", (0.09, 0.07, 0.005), (0, 0.08, -0.03), white, mass=0.1, **FURNITURE)
            add_box(drawer, f"stem{i}", (0.008, 0.015, 0.005), (0, -0.015, 0), bar, mass=0.01, **FURNITURE)
            add_box(drawer, f"handle{i}", (0.035, 0.006, 0.008), (0, -0.035, 0), bar, mass=0.02, **FURNITURE)

    def place(self, env, rng):
        cabinet, yaw = env.model.body("cabinet"), rng.uniform(-0.3, 0.3)
        cabinet.pos[:2] = rng.uniform((0.44, 0.17), (0.54, 0.21))
        cabinet.quat[:] = about_z(yaw)

    def near(self, env):
        return self.focus(env) - (0, 0.18, 0)

    def plan(self, env):
        handle, axes = self.focus(env), env.data.body("cabinet").xmat.reshape(3, 3)
        forward, inward = axes @ rotation_from(np.array([np.pi / 2, 0, 0])) @ TOOL_DOWN, axes[:, 1]
        yield Move(handle - 0.08 * inward, rotation=forward)
        yield Move(handle, dwell=4, rotation=forward, speed=0.25)
        yield Move(handle, gripper=0, dwell=5, rotation=forward)
        yield Move(handle - 0.13 * inward, gripper=0, dwell=3, rotation=forward, speed=0.25)

    def success(self, env):
        return env.data.joint(f"drawer{env.variation}").qpos[0] > 0.10


class TakeLidOffSaucepan(Task):
    """Grasp the knob of the lid, lift it 10 cm off the pan and hold it."""

    candidates, geom = 1, "knob"
    templates = (
        "take lid off the saucepan", "using the handle, lift the lid off of the pan", "remove the lid from the pan",
        "grip the saucepan's lid and remove it from the pan", "leave the pan open", "uncover the saucepan",
    )  # fmt: skip
    posture = ELBOW_UP
    plan = PickAndLift.plan  # a knob is grasped and lifted as a block is
    radius, height = 0.08, 0.07  # of the pan
    rest = height + 0.005  # where the lid's centre lies when it is on

    def build(self, spec, world):
        cylinder, steel = mujoco.mjtGeom.mjGEOM_CYLINDER, (0.3, 0.32, 0.35)
        pan = world.add_body(name="pan")
        pan.add_geom(name="bottom", type=cylinder, size=[self.radius, 0.004, 0], pos=(0, 0, 0.004), rgba=(*steel, 1))
        for angle in np.arange(12) * np.pi / 6:
            wall = self.radius * np.array([np.cos(angle), np.sin(angle), 0]) + (0, 0, self.height / 2)
            add_box(pan, f"wall{angle:.1f}", (0.003, 0.022, self.height / 2), wall, steel, quat=about_z(angle))
        add_box(pan, "handle", (0.05, 0.01, 0.006), (self.radius + 0.05, 0, self.height - 0.015), COLOURS["black"])
        lid = world.add_body(name="lid", pos=(0.5, 0, self.rest))
        lid.add_freejoint(name="lid")
        lid.add_geom(name="lid", type=cylinder, size=[self.radius + 0.006, 0.005, 0], rgba=(0.75, 0.78, 0.8, 1), mass=0.08)
        knob = {"size": [0.011, 0.018, 0], "pos": (0, 0, 0.023), "rgba": (*COLOURS["black"], 1), "mass": 0.02, **GRIPPED}
        lid.add_geom(name="knob", type=cylinder, **knob)

    def place(self, env, rng):
        point, yaw = rng.uniform((0.42, -0.16), (0.56, 0.16)), rng.uniform(-np.pi, np.pi)
        env.model.body("pan").pos[:2] = point
        env.model.body("pan").quat[:] = about_z(yaw)
        env.data.joint("lid").qpos[:2] = point

    def success(self, env):
        lid = env.data.body("lid").xpos
        return lid[2] > self.rest + 0.10 and np.linalg.norm(self.focus(env) - env.tool()[:3, 3]) < 0.04


class CloseBox(Task):
    """Push the open lid over with closed fingers until the box is shut."""

    candidates = 1
    templates = ("close box", "close the lid on the box", "shut the box", "shut the box lid")
    start_box = np.array([[0.32, -0.28, 0.30], [0.62, 0.28, 0.42]])  # above the open lid
    posture = ELBOW_UP
    half = np.array([0.07, 0.09, 0.04])
    open_angle = 1.85  # rad; leaning back against its stop

    def build(self, spec, world):
        box, (x, y, z), card = world.add_body(name="box"), self.half, (0.9, 0.9, 0.85)
        add_box(box, "bottom", (x, y, 0.004), (0, 0, 0.004), card, **FURNITURE)
        for side in (-1, 1):
            add_box(box, f"end{side}", (0.004, y, z), (side * x, 0, z), card, **FURNITURE)
            add_box(box, f"side{side}", (x, 0.004, z), (0, side * y, z), card, **FURNITURE)
        lid = box.add_body(name="lid", pos=(-x, 0, 2 * z))
        lid.add_joint(name="lid", axis=(0, -1, 0), range=(0, self.open_angle), damping=[0.05, 0, 0])
        add_box(lid, "lid", (x, y, 0.004), (x, 0, 0.004), COLOURS["blue"], mass=0.1, **FURNITURE)

    def place(self, env, rng):
        box, yaw = env.model.body("box"), rng.uniform(-0.4, 0.4)
        box.pos[:2] = rng.uniform((0.47, -0.14), (0.54, 0.14))
        box.quat[:] = about_z(yaw)
        env.data.joint("lid").qpos[0] = self.open_angle

    def edge(self, env, angle, reach=0.13):
        """The point on the lid's outer face, `reach` from the hinge, when it stands at an angle."""
        box = env.data.body("box")
        along = np.array([np.cos(angle), 0, np.sin(angle)]) * reach + np.array([-np.sin(angle), 0, np.cos(angle)]) * 0.016
        return box.xpos + box.xmat.reshape(3, 3) @ ((-self.half[0], 0, 2 * self.half[2]) + along)

    def focus(self, env):
        return self.edge(env, env.data.joint("lid").qpos[0])

    def plan(self, env):
        behind = self.focus(env) - 0.03 * env.data.body("box").xmat.reshape(3, 3)[:, 0]
        yield Move(np.append(behind[:2], np.maximum(env.tool()[2, 3], behind[2] + 0.05)), gripper=0)
        yield Move(behind, gripper=0, dwell=2, speed=0.25)
        for angle in np.linspace(self.open_angle, 0.1, 8):
            yield Move(self.edge(env, angle), gripper=0, speed=0.25)
        yield Move(self.edge(env, 0), gripper=0, dwell=4, speed=0.1)

    def success(self, env):
        return env.data.joint("lid").qpos[0] < 0.1


class StackBlocks(Task):
    """Stack the two blocks of the named colour on the square; the two of the other colour are distractors."""

    candidates, geom = 2, "block{}"
    templates = (
        "stack 2 {} blocks", "place 2 of the {} cubes on top of each other", "build a tall tower out of 2 {} cubes",
        "pick up and set down 2 {} blocks on top of each other", "arrange 2 {} blocks in a vertical stack on the table top",
        "set 2 {} cubes on top of each other",
    )  # fmt: skip
    max_steps = 250
    posture = ELBOW_UP
    half = 0.02

    def build(self, spec, world):
        add_box(world.add_body(name="target"), "target", (0.04, 0.04, 0.001), (0, 0, 0), (0.3, 0.3, 0.3), **PAINTED)
        for i in range(4):
            add_block(world, f"block{i}", [self.half] * 3, (0.5, 0.1 * i, self.half), mass=0.05, **GRIPPED)

    def place(self, env, rng):
        self.draw_colours(env, rng)
        points = scatter(rng, 5, (0.38, -0.22), (0.60, 0.22), apart=0.11)
        env.model.body("target").pos[:2] = points[4]
        for i in range(4):
            env.model.geom(f"block{i}").rgba[:3] = COLOURS[self.names[i // 2]]
            env.data.joint(f"block{i}").qpos[:] = [*points[i], self.half, *about_z(rng.uniform(-0.3, 0.3))]

    def blocks(self, env):
        """The two named blocks' centres, the one nearest to the square first."""
        pair = [env.data.body(f"block{2 * env.variation + k}").xpos.copy() for k in range(2)]
        return sorted(pair, key=lambda block: np.linalg.norm((block - env.model.body("target").pos)[:2]))

    def focus(self, env):
        nearest, other = self.blocks(env)
        placed = np.linalg.norm((nearest - env.model.body("target").pos)[:2]) < 0.02
        return other if placed else nearest

    def plan(self, env):
        for layer in range(2):
            block, target = self.focus(env), env.model.body("target").pos + (0, 0, self.half * (1 + 2 * layer) + 0.002)
            yield from grasp(env, block, 0.10, 0.16)
            yield Move(np.append(block[:2], 0.14), gripper=0)
            yield Move(np.append(target[:2], 0.14), gripper=0)
            yield Move(target, gripper=0, dwell=4, speed=0.25)
            yield Move(target, dwell=5)
            yield Move(np.append(target[:2], 0.16))

    def success(self, env):
        blocks = np.array(sorted(self.blocks(env), key=lambda block: block[2])) - env.model.body("target").pos
        stacked = np.abs(blocks[:, 2] - self.half * np.array([1, 3])).max() < 0.008
        return stacked and np.linalg.norm(blocks[:, :2], axis=1).max() < 0.025 and env.data.qpos[7:9].min() > 0.025


TASKS = {
    "reach_target": ReachTarget, "push_button": PushButton, "pick_and_lift": PickAndLift,
    "slide_block_to_target": SlideBlockToTarget, "open_drawer": OpenDrawer, "take_lid_off_saucepan": TakeLidOffSaucepan,
    "close_box": CloseBox, "stack_blocks": StackBlocks,
}  # fmt: skip


def check_task(name):
    """Raises UserError for a task that does not exist, with the nearest name."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1)
        raise UserError(f"There is no task '{name}'; " + (f"is it '{near[0]}'?" if near else f"choose from {', '.join(TASKS)}."))


# ------------------------------------------------------------------------------------------------------- environment
class ArmEnv(gymnasium.Env):
    """What the simulators have in common: an arm of seven joints with a gripper, and cameras.

    Observation: {"qpos": (8,) joint positions (rad) and gripper opening 0..1, "qvel": (8,) their rates,
    "images": {camera: (H, W, 3) uint8}}. Action: (8,) absolute joint targets (rad) within the limits, gripper command 0..1.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}
    render_mode = "rgb_array"

    def __init__(self, image_size, cameras, images, low, high):
        """low, high: (7,) rad, how far the joints turn."""
        self.height, self.width = (image_size, image_size) if np.isscalar(image_size) else image_size
        self.cameras, self.images = tuple(cameras), images
        self.action_space = gymnasium.spaces.Box(np.append(low, 0).astype(np.float32), np.append(high, 1).astype(np.float32))
        unbounded = gymnasium.spaces.Box(-np.inf, np.inf, (8,), np.float32)
        picture = gymnasium.spaces.Box(0, 255, (self.height, self.width, 3), np.uint8)
        pictures = {"images": gymnasium.spaces.Dict(dict.fromkeys(self.cameras, picture))} if images else {}
        self.observation_space = gymnasium.spaces.Dict({"qpos": unbounded, "qvel": unbounded, **pictures})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.steps = int(self.np_random.integers(2**31)) if seed is None else seed, 0

    def checked(self, action):
        """The action as an array (8,) of float64. Raises UserError for one that the arm cannot take."""
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (8,) or not np.isfinite(action).all():
            raise UserError(f"The action must be 8 finite numbers (7 joints in rad and the gripper), not {action}.")
        if not self.action_space.contains(action.astype(np.float32)):
            raise UserError(f"The action {action.round(3)} is outside the joint limits; clip it to env.action_space first.")
        return action

    def observation(self, qpos, opening, qvel, speed):
        seen = {"images": look(self)} if self.images else {}
        return {"qpos": np.append(qpos, opening).astype(np.float32), "qvel": np.append(qvel, speed).astype(np.float32), **seen}

    def render(self):
        return self.picture("front", self.height, self.width)


def look(env):
    """What all cameras see now: {camera: (H, W, 3) uint8}."""
    return {camera: env.picture(camera, env.height, env.width) for camera in env.cameras}


class PandaEnv(ArmEnv):
    """One task on the table. Same seed, same episode, bit for bit.

    reset(options=...): "variation" (which candidate the instruction names, drawn if absent), "start" ("anywhere" over the
    table, or "near" the object, as half of the demonstrations do).
    """

    def __init__(self, task="reach_target", image_size=128, cameras=CAMERAS, images=True):
        check_task(task)
        self.task = TASKS[task]()
        spec, world = base_scene()
        self.task.build(spec, world)
        self.model = spec.compile()
        self.data = mujoco.MjData(self.model)
        self.scratch = mujoco.MjData(self.model)  # for kinematics that must not touch the simulation
        self.renderers = {}
        self.substeps = round(1 / (CONTROL_HZ * self.model.opt.timestep))
        self.limits = self.model.jnt_range[:7].copy()  # (7, 2) rad
        super().__init__(image_size, cameras, images, *self.limits.T)

    # ---- Gymnasium
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        options = options or {}
        scene_rng, start_rng = np.random.default_rng([self.seed, 0]), np.random.default_rng([self.seed, 1])
        mujoco.mj_resetData(self.model, self.data)
        self.task.place(self, scene_rng)
        drawn = int(scene_rng.integers(self.task.candidates))
        phrase = int(scene_rng.integers(len(self.task.templates)))
        self.variation = drawn if options.get("variation") is None else options["variation"]
        if not 0 <= self.variation < self.task.candidates:
            raise UserError(f"Variation {self.variation} does not exist: the task has 0 to {self.task.candidates - 1}.")
        self.instructions = self.task.instructions(self.variation)
        self.instruction = self.instructions[phrase]
        mujoco.mj_forward(self.model, self.data)

        opening = 1.0
        if options.get("start") == "near":
            start_rng = np.random.default_rng([self.seed, 2, self.variation])
            tool = self.task.near(self) + np.append(start_rng.normal(0, 0.03, 2), start_rng.uniform(0.05, 0.16))
            opening = float(start_rng.random() < 0.7)  # also with empty closed fingers: a missed grasp is tried again
        else:
            tool = start_rng.uniform(*self.task.start_box)
        qpos = self.ik(tool, TOOL_DOWN)
        self.data.qpos[:7] = qpos
        self.data.qpos[7:9] = 0.04 * opening
        self.data.ctrl[:7], self.data.ctrl[7] = qpos, 255 * opening
        self.data.qvel[:] = 0
        mujoco.mj_forward(self.model, self.data)
        return self.observe(), self.info()

    def step(self, action):
        action = self.checked(action)
        self.data.ctrl[:7] = action[:7]
        self.data.ctrl[7] = 255 if action[7] > 0.5 else 0
        mujoco.mj_step(self.model, self.data, self.substeps)
        mujoco.mj_forward(self.model, self.data)  # so that poses and pictures belong to the new state
        self.steps += 1
        success = bool(self.task.success(self))
        terminated = success or bool(self.task.failed(self))
        return self.observe(), float(success), terminated, self.steps >= self.task.max_steps, self.info()

    def close(self):
        for renderer in self.renderers.values():
            renderer.close()
        self.renderers = {}

    def info(self):
        return {"instruction": self.instruction, "instructions": self.instructions, "variation": self.variation,
                "success": bool(self.task.success(self))}  # fmt: skip

    def observe(self):
        fingers, speed = self.data.qpos[7:9].sum() / 0.08, self.data.qvel[7:9].sum() / 0.08
        return self.observation(self.data.qpos[:7], np.clip(fingers, 0, 1), self.data.qvel[:7], speed)

    def picture(self, camera, height, width):
        """What the camera sees now: (height, width, 3) uint8."""
        if (height, width) not in self.renderers:
            try:
                renderer = mujoco.Renderer(self.model, height, width)
            except Exception as error:
                raise UserError(f"{CANNOT_DRAW}{error}") from error
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
            self.renderers[height, width] = renderer
        renderer = self.renderers[height, width]
        renderer.update_scene(self.data, camera)
        return renderer.render()

    # ---- geometry
    def tool(self):
        """World from tool (4, 4): between the fingertips, z out of the hand, fingers along y."""
        site = self.data.site("tool")
        return _pose(site.xmat, site.xpos)

    def joint_poses(self):
        """World from joint (8, 4, 4): the seven joints (z is the axis, the frame turns with the joint), then the tool."""
        links = [self.data.body(f"fr3_link{i}") for i in range(1, 8)]
        return np.stack([_pose(link.xmat, link.xpos) for link in links] + [self.tool()]).astype(np.float32)

    def camera(self, name):
        """OpenCV intrinsics (3, 3) in pixels and world from camera (4, 4) as of now."""
        focal = 0.5 * self.height / np.tan(np.deg2rad(self.model.cam(name).fovy[0]) / 2)
        intrinsics = np.array([[focal, 0, self.width / 2], [0, focal, self.height / 2], [0, 0, 1]])
        camera = self.data.cam(name)
        return intrinsics, _pose(camera.xmat.reshape(3, 3) * [1, -1, -1], camera.xpos)  # MuJoCo: y up, looks along -z

    def ik(self, position, rotation, start=None):
        """Joint positions (7,) that bring the tool to a pose (world frame). Damped least squares, home posture in the null
        space, so that a pose has one answer. Raises UserError when the pose is out of reach."""
        data = self.scratch
        if start is None:
            start = HOME + np.eye(7)[0] * np.arctan2(position[1], position[0])
        data.qpos[:] = self.data.qpos
        data.qpos[:7] = start
        jacobian = np.zeros((6, self.model.nv))
        site = self.model.site("tool").id
        for _ in range(100):
            mujoco.mj_kinematics(self.model, data)
            mujoco.mj_comPos(self.model, data)
            turn = rotation_vector(rotation @ data.site_xmat[site].reshape(3, 3).T)
            error = np.concatenate([position - data.site_xpos[site], turn])
            mujoco.mj_jacSite(self.model, data, jacobian[:3], jacobian[3:], site)
            J = jacobian[:, :7]
            pseudo = J.T @ np.linalg.inv(J @ J.T + 1e-6 * np.eye(6))
            rest = self.task.posture * (HOME - data.qpos[:7])  # the base joint turns towards the target; no pull
            step = pseudo @ error + 0.3 * (np.eye(7) - pseudo @ J) @ rest
            data.qpos[:7] = np.clip(data.qpos[:7] + np.clip(step, -0.3, 0.3), *self.limits.T)
            if np.abs(step).max() < 1e-4:
                break
        if np.linalg.norm(error) > 5e-3:
            raise UserError(f"The arm cannot reach {np.round(position, 3)} (off by {np.linalg.norm(error):.3f}).")
        return data.qpos[:7].copy()


def _pose(rotation, position):
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = np.reshape(rotation, (3, 3)), position
    return pose


def rotation_vector(matrix):
    """Axis times angle (3,) of a rotation matrix."""
    quaternion, vector = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, matrix.ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1)
    return vector


def rotation_from(vector):
    """Rotation matrix (3, 3) of an axis times an angle."""
    angle, matrix, quaternion = np.linalg.norm(vector), np.zeros(9), np.zeros(4)
    mujoco.mju_axisAngle2Quat(quaternion, vector / angle if angle else np.array([1.0, 0, 0]), angle)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)
