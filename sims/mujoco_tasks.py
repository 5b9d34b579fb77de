"""The eight tasks of the embedded simulator, after RLBench's (James et al., 2020).

In:   the scene that sims/mujoco_panda.py has begun, and its environment (`env`)
Out:  objects and where they lie, an instruction, the waypoints of a demonstration, success

To add a task, write a class like `ReachTarget` below (about thirty lines) and list it in TASKS:
  build    puts the objects into the scene (an MjSpec: MuJoCo's XML as Python objects), once;
  place    draws where they lie and how they look in this episode;
  focus    the point that the instruction is about, by default the middle of `geom`; some
           demonstrations start near it;
  plan     yields the waypoints of the scripted demonstration;
  success  says whether the task is done.
World frame: the robot's base on the table top, metres, z up, x away from the robot. Boxes,
cylinders and hinges stand for RLBench's meshes.
"""

import difflib
from dataclasses import dataclass

import mujoco
import numpy as np

from genima.files import UserError

TOOL_DOWN = np.diag([1.0, -1.0, -1.0])  # world from tool: z down, fingers open along y

# RLBench's colours, less those that would be taken for a sphere (red, green, purple, cyan, yellow
# and their neighbours).
COLOURS = {
    "orange": (1.0, 0.5, 0.0),
    "blue": (0.0, 0.1, 1.0),
    "white": (1.0, 1.0, 1.0),
    "black": (0.05, 0.05, 0.05),
    "rose": (1.0, 0.35, 0.6),
}

ELBOW_UP = np.array([0, 0, 1, 0, 0, 0, 0])  # a Task.posture that leaves the hand free to turn
# Geom attributes of what is grasped: rough, and with stiff contacts, so that it does not creep
# between the fingers.
GRIPPED = {"friction": (1.5, 0.02, 0.001), "condim": 4, "priority": 1, "solref": (0.004, 1)}
# Geom attributes of furniture: it touches the hand and loose objects, but not its own drawers.
FURNITURE = {"contype": 2, "conaffinity": 1}
PAINTED = {"contype": 0, "conaffinity": 0}  # a mark on the table that nothing touches
SLIPPERY = {"friction": (0.3, 0.005, 0.0001), "priority": 1}  # rough blocks jam on the table
UP = np.array([0, 0, 1.0])


@dataclass
class Move:
    """One waypoint of a demonstration: where the tool goes, with which gripper, and for how long.

    World frame, metres.
    """

    position: np.ndarray  # (3,)
    gripper: float = 1.0
    dwell: int = 0  # control steps to wait there
    rotation: np.ndarray | None = None  # (3, 3) world from tool; None: as it is
    speed: float = 0.4  # m/s


# --------------------------------------------------------------------------------------- building
def add_box(parent, name, size, position=(0, 0, 0), colour=(0.7, 0.7, 0.7), **geom):
    """A box of half sizes `size` (m) on a body of MjSpec; further MuJoCo attributes by name."""
    return parent.add_geom(
        name=name,
        type=mujoco.mjtGeom.mjGEOM_BOX,
        size=size,
        pos=position,
        rgba=(*colour, 1),
        **geom,
    )


def add_block(world, name, size, position, colour=(0.7, 0.7, 0.7), **geom):
    """A box that can be pushed and carried."""
    body = world.add_body(name=name, pos=position)
    body.add_freejoint(name=name)
    add_box(body, name, size, (0, 0, 0), colour, **geom)


def lay(env, name, point, yaw=0.0):
    """Lay a body on the table at a point (x, y), turned about the vertical by yaw (rad)."""
    body = env.model.body(name)
    if body.jntnum:  # it can be carried
        env.data.joint(name).qpos[[0, 1, 3, 4, 5, 6]] = *point, *about_z(yaw)
    else:
        body.pos[:2] = point
        body.quat[:] = about_z(yaw)


# --------------------------------------------------------------------------------------- geometry
def about_z(angle):
    """The quaternion (w first) of a rotation about the vertical."""
    return np.cos(angle / 2), 0, 0, np.sin(angle / 2)


def rotation_from(vector):
    """Rotation matrix (3, 3) of an axis times an angle (3,)."""
    angle = np.linalg.norm(vector)
    quaternion = np.zeros(4)
    matrix = np.zeros(9)
    mujoco.mju_axisAngle2Quat(quaternion, vector / max(angle, 1e-12), angle)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)


def above(env, point, low, high=np.inf):
    """The point over `point` between two heights (m), as near to the tool's height as possible."""
    return np.append(point[:2], np.clip(env.tool_pose()[2, 3], low, high))


def grasp(start, point, rotation=None):
    """Waypoints: from a start nearby slowly to the point, and close the fingers."""
    yield Move(start, rotation=rotation)
    # The pauses around the closing add up to the horizon (8 steps): a target that many steps ahead
    # never skips the contact.
    yield Move(point, rotation=rotation, dwell=4, speed=0.12)
    yield Move(point, rotation=rotation, gripper=0, dwell=5)


# ------------------------------------------------------------------------------------------ tasks
class Task:
    """What is common to all tasks: several candidates in view, the instruction names one."""

    candidates = 3
    names = ("",)  # what the instruction calls each candidate
    geom = ""  # the geom that the instruction is about; {} is the candidate's number
    templates = ()  # RLBench's phrasings; {} is the named candidate
    max_steps = 100
    # Where the tool may be when an episode begins: two corners of a box.
    start_box = np.array([[0.32, -0.28, 0.15], [0.62, 0.28, 0.40]])
    # Which of up to seven joints are drawn home where the tool's pose leaves a choice; the base
    # joint is not, for it turns towards the target.
    posture = np.array([0, 1, 1, 1, 1, 1, 1])

    lowest_start = 0.05  # metres above the object, when the tool begins near it

    def near(self, env):
        """The point above which the tool begins when it begins near."""
        return self.focus(env)

    def place_half_done(self, env, rng):
        """Lay things as they may lie in mid-task, for a demonstration that begins near."""

    def draw_offset(self, rng):
        """How far from that point (3,) it begins, metres."""
        sideways = rng.normal(0, 0.03, 2)
        return np.append(sideways, rng.uniform(self.lowest_start, 0.16))

    def failed(self, env):
        """Whether the task can no longer be done (the wrong button was pressed)."""
        return False

    def instructions(self, variation):
        return [template.format(self.names[variation]) for template in self.templates]

    def focus(self, env):
        return env.data.geom(self.geom.format(env.variation)).xpos.copy()

    def draw(self, env, rng, low, high, apart, each=1, more=0):
        """Draw a colour for each candidate, which also names it, and where everything lies.

        each: geoms per candidate. more: further things that need a place. Returns a point for each
        geom and further thing in the box low..high, at least `apart` metres from one another in the
        table plane.
        """
        colours = rng.permutation(list(COLOURS))[: self.candidates]
        self.names = [str(name) for name in colours]
        count = each * self.candidates
        for i in range(count):
            name = self.names[i // each]
            env.model.geom(self.geom.format(i)).rgba[:3] = COLOURS[name]
        pairs = np.triu_indices(count + more, 1)
        while True:
            points = rng.uniform(low, high, (count + more, len(low)))
            offsets = points[:, None, :2] - points[None, :, :2]
            distances = np.linalg.norm(offsets, axis=-1)
            if distances[pairs].min() >= apart:
                return points


class ReachTarget(Task):
    """Touch the ball of the named colour with the fingertips; the others are distractors."""

    geom = "ball{}"
    templates = (
        "reach the {} target",
        "touch the {} ball with the panda gripper",
        "reach the {} sphere",
    )
    radius = 0.03

    def draw_offset(self, rng):
        return rng.normal(0, 0.06, 3)  # on any side: a ball can be reached from below, too

    def build(self, world):
        for i in range(self.candidates):
            body = world.add_body(name=f"ball{i}", mocap=True)
            body.add_geom(
                name=f"ball{i}",
                type=mujoco.mjtGeom.mjGEOM_SPHERE,
                size=[self.radius, 0, 0],
                **PAINTED,
            )

    def place(self, env, rng):
        low, high = (0.36, -0.25, 0.05), (0.62, 0.25, 0.30)
        env.data.mocap_pos[:] = self.draw(env, rng, low, high, apart=0.12)

    def plan(self, env):
        # The last 8 cm slowly, for a policy that looks every 0.8 s.
        ball = self.focus(env)
        offset = ball - env.tool_pose()[:3, 3]
        distance = np.linalg.norm(offset)
        if distance > 0.08:
            yield Move(ball - 0.08 / distance * offset)
        yield Move(ball, dwell=4, speed=0.15)

    def success(self, env):
        return np.linalg.norm(env.tool_pose()[:3, 3] - self.focus(env)) < self.radius


class PushButton(Task):
    """Press the button of the named colour with closed fingers. Another one ends the episode."""

    geom = "cap{}"
    templates = (
        "push the {} button",
        "push down the {} button",
        "press the button with the {} color",
        "press the {} button",
    )
    lowest_start = 0.025  # a press that missed is tried again
    height = 0.03  # metres, of the button's top above the table
    travel = 0.010  # metres that it goes down

    def build(self, world):
        for i in range(self.candidates):
            body = world.add_body(name=f"button{i}")
            add_box(body, f"base{i}", (0.035, 0.035, 0.01), (0, 0, 0.01), (0.45, 0.45, 0.45))
            cap = body.add_body(name=f"cap{i}", pos=(0, 0, 0.02))
            cap.add_joint(
                name=f"cap{i}",
                type=mujoco.mjtJoint.mjJNT_SLIDE,
                axis=(0, 0, 1),
                range=(-self.travel, 0),
                stiffness=[300, 0, 0],
                damping=[10, 0, 0],
                springref=0.01,
            )
            cap.add_geom(
                name=f"cap{i}",
                type=mujoco.mjtGeom.mjGEOM_CYLINDER,
                size=[0.025, 0.01, 0],
                mass=0.05,
            )

    def place(self, env, rng):
        points = self.draw(env, rng, (0.36, -0.24), (0.62, 0.24), apart=0.13)
        for i, point in enumerate(points):
            lay(env, f"button{i}", point)

    def focus(self, env):
        return np.append(env.model.body(f"button{env.variation}").pos[:2], self.height)

    def plan(self, env):
        top = self.focus(env)
        # From low down it goes sideways, not up: over a button the hand always moves down. And it
        # moves down slowly: a policy that looks every 0.8 s looks once more on the way.
        yield Move(above(env, top, top[2] + 0.02, top[2] + 0.10), gripper=0)
        yield Move(top - (0, 0, self.travel + 0.015), gripper=0, dwell=4, speed=0.12)

    def pressed(self, env, i):
        return env.data.joint(f"cap{i}").qpos[0] < -0.6 * self.travel

    def success(self, env):
        return self.pressed(env, env.variation)

    def failed(self, env):
        others = [i for i in range(self.candidates) if i != env.variation]
        return any(self.pressed(env, i) for i in others)


class PickAndLift(Task):
    """Grasp the block of the named colour and lift it 10 cm; the others are distractors."""

    geom = "block{}"
    templates = (
        "pick up the {} block and lift it",
        "grasp the {} block and lift it up",
        "lift the {} block up",
    )
    half = 0.02  # metres, half the block's edge

    def build(self, world):
        for i in range(self.candidates):
            position = (0.5, 0.2 * (i - 1), self.half)
            add_block(world, f"block{i}", [self.half] * 3, position, mass=0.05, **GRIPPED)

    def place(self, env, rng):
        points = self.draw(env, rng, (0.38, -0.22), (0.60, 0.22), apart=0.13)
        for i, point in enumerate(points):
            lay(env, f"block{i}", point, rng.uniform(-0.3, 0.3))

    def plan(self, env):
        point = self.focus(env)
        yield from grasp(above(env, point, point[2] + 0.06, point[2] + 0.12), point)
        yield Move(point + (0, 0, 0.15), gripper=0, dwell=2)

    def success(self, env):
        block = self.focus(env)
        lifted = block[2] > self.half + 0.10
        return lifted and np.linalg.norm(block - env.tool_pose()[:3, 3]) < 0.04


class SlideBlockToTarget(Task):
    """Push the block with open fingers side by side until it lies on the blue square."""

    candidates = 1
    geom = "block"
    templates = (
        "slide the block to target",
        "slide the block onto the target",
        "slide the block towards the blue target",
        "push the block until it is sitting on top of the target",
        "cover the target with the block by pushing the block in its direction",
    )
    posture = ELBOW_UP
    half = np.array([0.03, 0.055, 0.025])  # metres, half the block's edges

    def build(self, world):
        square = world.add_body(name="target")
        add_box(square, "target", (0.055, 0.055, 0.001), (0, 0, 0), COLOURS["blue"], **PAINTED)
        position = (0.4, 0, self.half[2])
        add_block(world, "block", self.half, position, COLOURS["orange"], mass=0.1, **SLIPPERY)

    def place(self, env, rng):
        block = rng.uniform((0.39, -0.12), (0.46, 0.12))
        yaw = rng.uniform(-1.2, 1.2)
        distance = rng.uniform(0.11, 0.17)
        lay(env, "block", block, yaw)
        lay(env, "target", block + distance * np.array([np.cos(yaw), np.sin(yaw)]), yaw)

    def plan(self, env):
        block = self.focus(env)
        target = np.append(env.model.body("target").pos[:2], self.half[2])
        direction = (target - block) / np.linalg.norm(target - block)
        yaw = np.arctan2(direction[1], direction[0])
        turned = rotation_from(yaw * UP) @ TOOL_DOWN
        behind = block - (self.half[0] + 0.04) * direction
        end = target - (self.half[0] + 0.008) * direction
        yield Move(above(env, behind, 0.09, 0.14), rotation=turned)
        yield Move(behind, dwell=2, rotation=turned, speed=0.12)
        yield Move(end, dwell=4, rotation=turned, speed=0.15)

    def success(self, env):
        target = env.model.body("target").pos
        return np.linalg.norm(self.focus(env)[:2] - target[:2]) < 0.025


class OpenDrawer(Task):
    """Grasp the handle of the bottom, middle or top drawer from its front and pull it open."""

    names = ("bottom", "middle", "top")
    geom = "handle{}"
    templates = (
        "open the {0} drawer",
        "grip the {0} handle and pull the {0} drawer open",
        "slide the {0} drawer open",
    )
    start_box = np.array([[0.32, -0.28, 0.15], [0.62, -0.08, 0.40]])  # in front of the cabinet
    posture = ELBOW_UP

    def build(self, world):
        white = (0.85, 0.85, 0.82)
        cabinet = world.add_body(name="cabinet")
        add_box(cabinet, "plinth", (0.11, 0.08, 0.0375), (0, 0, 0.0375), white, **FURNITURE)
        add_box(cabinet, "back", (0.11, 0.005, 0.13), (0, 0.075, 0.205), white, **FURNITURE)
        add_box(cabinet, "top", (0.11, 0.08, 0.005), (0, 0, 0.34), white, **FURNITURE)
        for side in (-1, 1):
            position = (side * 0.105, 0, 0.205)
            add_box(cabinet, f"side{side}", (0.005, 0.08, 0.13), position, white, **FURNITURE)
        for i in range(self.candidates):
            self.add_drawer(cabinet, i, white)

    def add_drawer(self, cabinet, i, white):
        drawer = cabinet.add_body(name=f"drawer{i}", pos=(0, -0.08, 0.12 + 0.085 * i))
        drawer.add_joint(
            name=f"drawer{i}",
            type=mujoco.mjtJoint.mjJNT_SLIDE,
            axis=(0, -1, 0),
            range=(0, 0.15),
            frictionloss=0.5,
            damping=[5, 0, 0],
        )
        blue = (0.35, 0.45, 0.55)
        black = COLOURS["black"]
        heavy = {"mass": 0.1, **FURNITURE}
        stem = {"mass": 0.01, **FURNITURE}
        bar = {"mass": 0.02, **FURNITURE}
        add_box(drawer, f"front{i}", (0.098, 0.005, 0.04), (0, 0.005, 0), blue, **heavy)
        add_box(drawer, f"tray{i}", (0.09, 0.07, 0.005), (0, 0.08, -0.03), white, **heavy)
        add_box(drawer, f"stem{i}", (0.008, 0.015, 0.005), (0, -0.015, 0), black, **stem)
        add_box(drawer, f"handle{i}", (0.035, 0.006, 0.008), (0, -0.035, 0), black, **bar)

    def place(self, env, rng):
        yaw = rng.uniform(-0.3, 0.3)
        lay(env, "cabinet", rng.uniform((0.44, 0.17), (0.54, 0.21)), yaw)

    def near(self, env):
        return self.focus(env) - (0, 0.18, 0)

    def plan(self, env):
        handle = self.focus(env)
        axes = env.data.body("cabinet").xmat.reshape(3, 3)
        forward = axes @ rotation_from(np.array([np.pi / 2, 0, 0])) @ TOOL_DOWN
        inward = axes[:, 1]
        yield from grasp(handle - 0.08 * inward, handle, forward)
        yield Move(handle - 0.13 * inward, gripper=0, dwell=3, rotation=forward, speed=0.25)

    def success(self, env):
        return env.data.joint(f"drawer{env.variation}").qpos[0] > 0.10


class TakeLidOffSaucepan(Task):
    """Grasp the knob of the lid, lift it 10 cm off the pan and hold it."""

    candidates = 1
    geom = "knob"
    templates = (
        "take lid off the saucepan",
        "using the handle, lift the lid off of the pan",
        "remove the lid from the pan",
        "grip the saucepan's lid and remove it from the pan",
        "leave the pan open",
        "uncover the saucepan",
    )
    posture = ELBOW_UP
    plan = PickAndLift.plan  # a knob is grasped and lifted as a block is
    radius = 0.08  # metres, of the pan
    height = 0.07
    rest = height + 0.005  # height of the lid's centre when it is on

    def build(self, world):
        cylinder = mujoco.mjtGeom.mjGEOM_CYLINDER
        steel = (0.3, 0.32, 0.35)
        black = COLOURS["black"]
        pan = world.add_body(name="pan")
        pan.add_geom(
            name="bottom",
            type=cylinder,
            size=[self.radius, 0.004, 0],
            pos=(0, 0, 0.004),
            rgba=(*steel, 1),
        )
        wall_size = (0.003, 0.022, self.height / 2)
        for angle in np.arange(12) * np.pi / 6:
            outward = self.radius * np.array([np.cos(angle), np.sin(angle), 0])
            position = outward + (0, 0, self.height / 2)
            add_box(pan, f"wall{angle:.1f}", wall_size, position, steel, quat=about_z(angle))
        handle = (self.radius + 0.05, 0, self.height - 0.015)
        add_box(pan, "handle", (0.05, 0.01, 0.006), handle, black)

        lid = world.add_body(name="lid", pos=(0.5, 0, self.rest))
        lid.add_freejoint(name="lid")
        lid.add_geom(
            name="lid",
            type=cylinder,
            size=[self.radius + 0.006, 0.005, 0],
            rgba=(0.75, 0.78, 0.8, 1),
            mass=0.08,
        )
        lid.add_geom(
            name="knob",
            type=cylinder,
            size=[0.011, 0.018, 0],
            pos=(0, 0, 0.023),
            rgba=(*black, 1),
            mass=0.02,
            **GRIPPED,
        )

    def place(self, env, rng):
        point = rng.uniform((0.42, -0.16), (0.56, 0.16))
        yaw = rng.uniform(-np.pi, np.pi)
        lay(env, "pan", point, yaw)
        lay(env, "lid", point)

    def success(self, env):
        lifted = env.data.body("lid").xpos[2] > self.rest + 0.10
        held = np.linalg.norm(self.focus(env) - env.tool_pose()[:3, 3]) < 0.04
        return lifted and held


class CloseBox(Task):
    """Push the open lid over with closed fingers until the box is shut."""

    candidates = 1
    templates = ("close box", "close the lid on the box", "shut the box", "shut the box lid")
    start_box = np.array([[0.32, -0.28, 0.30], [0.62, 0.28, 0.42]])  # above the open lid
    posture = ELBOW_UP
    half = np.array([0.07, 0.09, 0.04])  # metres, half the box's edges
    open_angle = 1.85  # rad; leaning back against its stop

    def build(self, world):
        x, y, z = self.half
        card = (0.9, 0.9, 0.85)
        box = world.add_body(name="box")
        add_box(box, "bottom", (x, y, 0.004), (0, 0, 0.004), card, **FURNITURE)
        for side in (-1, 1):
            add_box(box, f"end{side}", (0.004, y, z), (side * x, 0, z), card, **FURNITURE)
            add_box(box, f"side{side}", (x, 0.004, z), (0, side * y, z), card, **FURNITURE)
        lid = box.add_body(name="lid", pos=(-x, 0, 2 * z))
        lid.add_joint(name="lid", axis=(0, -1, 0), range=(0, self.open_angle), damping=[0.05, 0, 0])
        light = {"mass": 0.1, **FURNITURE}
        add_box(lid, "lid", (x, y, 0.004), (x, 0, 0.004), COLOURS["blue"], **light)

    def place(self, env, rng):
        yaw = rng.uniform(-0.4, 0.4)
        lay(env, "box", rng.uniform((0.47, -0.14), (0.54, 0.14)), yaw)
        env.data.joint("lid").qpos[0] = self.open_angle

    def edge(self, env, angle, reach=0.13):
        """The point on the lid's outer face, `reach` from the hinge, when it stands at an angle."""
        box = env.data.body("box")
        along = np.array([np.cos(angle), 0, np.sin(angle)]) * reach
        outward = np.array([-np.sin(angle), 0, np.cos(angle)]) * 0.016
        hinge = (-self.half[0], 0, 2 * self.half[2])
        return box.xpos + box.xmat.reshape(3, 3) @ (hinge + (along + outward))

    def focus(self, env):
        return self.edge(env, env.data.joint("lid").qpos[0])

    def plan(self, env):
        forward = env.data.body("box").xmat.reshape(3, 3)[:, 0]
        behind = self.focus(env) - 0.03 * forward
        yield Move(above(env, behind, behind[2] + 0.05), gripper=0)
        yield Move(behind, gripper=0, dwell=2, speed=0.25)
        for angle in np.linspace(self.open_angle, 0.1, 8):
            yield Move(self.edge(env, angle), gripper=0, speed=0.25)
        yield Move(self.edge(env, 0), gripper=0, dwell=4, speed=0.1)

    def success(self, env):
        return env.data.joint("lid").qpos[0] < 0.1


class StackBlocks(Task):
    """Stack the two blocks of the named colour on the square; the others are distractors."""

    candidates = 2
    geom = "block{}"
    templates = (
        "stack 2 {} blocks",
        "place 2 of the {} cubes on top of each other",
        "build a tall tower out of 2 {} cubes",
        "pick up and set down 2 {} blocks on top of each other",
        "arrange 2 {} blocks in a vertical stack on the table top",
        "set 2 {} cubes on top of each other",
    )
    max_steps = 300
    posture = ELBOW_UP
    half = 0.02  # metres, half the block's edge

    def build(self, world):
        square = world.add_body(name="target")
        add_box(square, "target", (0.04, 0.04, 0.001), (0, 0, 0), (0.3, 0.3, 0.3), **PAINTED)
        for i in range(4):
            position = (0.5, 0.1 * i, self.half)
            add_block(world, f"block{i}", [self.half] * 3, position, mass=0.05, **GRIPPED)

    def place(self, env, rng):
        # Of each colour one block lies nearer to the robot, and is taken first: a picture has to
        # show which of two equal blocks the expert takes, or a painter paints both.
        while True:
            points = self.draw(env, rng, (0.38, -0.22), (0.60, 0.22), apart=0.11, each=2, more=1)
            *blocks, square = points
            rows = np.array(blocks)[:, 0].reshape(2, 2)  # colour, which block: x
            if rows[:, 0].max() < 0.47 and rows[:, 1].min() > 0.51:
                break
        lay(env, "target", square)
        for i, point in enumerate(blocks):
            lay(env, f"block{i}", point, rng.uniform(-0.3, 0.3))

    def place_half_done(self, env, rng):
        if rng.random() < 0.5:  # the near block stands on the square
            point = env.model.body("target").pos[:2] + rng.uniform(-0.015, 0.015, 2)
            lay(env, f"block{2 * env.variation}", point, rng.uniform(-0.3, 0.3))
            mujoco.mj_forward(env.model, env.data)

    def blocks(self, env):
        """The two named blocks' centres, the near one first."""
        first = 2 * env.variation
        return [env.data.body(f"block{first + i}").xpos.copy() for i in range(2)]

    def first_stands(self, env):
        """Whether the near block stands on the square already."""
        from_square = self.blocks(env)[0] - env.model.body("target").pos
        return np.linalg.norm(from_square[:2]) < 0.025

    def focus(self, env):
        near, far = self.blocks(env)
        return far if self.first_stands(env) else near

    def near(self, env):
        return self.blocks(env)[0]  # in mid-task the hand has just let it go

    def plan(self, env):
        for layer in range(int(self.first_stands(env)), 2):
            block = self.focus(env)
            place = env.model.body("target").pos[:2]
            if layer == 1:
                place = self.blocks(env)[0][:2]  # on the first block, wherever it stands
            height = self.half * (1 + 2 * layer) + 0.002
            carried = 0.12 + 0.06 * layer  # the second one higher: the arm shows which it is
            yield from grasp(above(env, block, 0.10, 0.16), block)
            yield Move(np.append(block[:2], carried), gripper=0, speed=0.2)
            yield Move(np.append(place, carried), gripper=0, speed=0.2)
            yield Move(np.append(place, height), gripper=0, dwell=4, speed=0.12)
            yield Move(np.append(place, height), dwell=5)
            yield Move(np.append(place, 0.16), speed=0.2)

    def success(self, env):
        upwards = np.array(sorted(self.blocks(env), key=lambda block: block[2]))
        blocks = upwards - env.model.body("target").pos  # (2, 3) from the square's centre
        stacked = np.abs(blocks[:, 2] - self.half * np.array([1, 3])).max() < 0.008
        centred = np.linalg.norm(blocks[:, :2], axis=1).max() < 0.025
        let_go = env.fingers().min() > 0.025
        return stacked and centred and let_go


class MoveAround(Task):
    """No task but an exercise: the hand goes through random poses over an empty table.

    A controller that follows spheres can learn it before it has seen any task.
    """

    candidates = 1
    templates = ("move around",)
    hand_box = np.array([[0.30, -0.30, 0.02], [0.66, 0.30, 0.40]])  # metres
    waypoints = 6

    def build(self, world):
        pass

    def place(self, env, rng):
        self.rng = rng
        self.first = rng.uniform(*self.hand_box)

    def focus(self, env):
        return self.first

    def plan(self, env):
        rng = self.rng
        position = env.tool_pose()[:3, 3]
        for _ in range(self.waypoints):
            if rng.random() < 0.5:  # far away, or near by
                position = rng.uniform(*self.hand_box)
            else:
                position = np.clip(position + rng.normal(0, 0.06, 3), *self.hand_box)
            tilt = rng.normal(0, (0.1, 0.1, 0.4))  # rad
            yield Move(
                position,
                gripper=float(rng.random() < 0.5),
                dwell=int(rng.integers(6)),
                rotation=rotation_from(tilt) @ TOOL_DOWN,
                speed=rng.uniform(0.2, 0.45),
            )

    def success(self, env):
        return True


TASKS = {
    "reach_target": ReachTarget,
    "push_button": PushButton,
    "pick_and_lift": PickAndLift,
    "slide_block_to_target": SlideBlockToTarget,
    "open_drawer": OpenDrawer,
    "take_lid_off_saucepan": TakeLidOffSaucepan,
    "close_box": CloseBox,
    "stack_blocks": StackBlocks,
}


EXERCISES = {"move_around": MoveAround}  # to be recorded, but nothing to be evaluated on


def find_task(name: str) -> type[Task]:
    """The class of a task or an exercise. Raises UserError for a name that does not exist."""
    if name in EXERCISES:
        return EXERCISES[name]
    check_task(name)
    return TASKS[name]


def check_task(name: str):
    """Raise a UserError, with the nearest name, for a task that does not exist."""
    if name in TASKS:
        return
    near = difflib.get_close_matches(name, TASKS, 1)
    hint = f"is it '{near[0]}'?" if near else f"choose from {', '.join(TASKS)}."
    raise UserError(f"There is no task '{name}'; {hint}")
