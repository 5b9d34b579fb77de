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
  focus    the point that the instruction is about; some demonstrations start near it;
  plan     yields the waypoints of the scripted demonstration;
  success  says whether the task is done.
"""

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path


def _egl_works():
    """True when some EGL device initialises (asked of EGL itself: PyOpenGL cannot change its mind in one process)."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    query, display = (egl.eglGetProcAddress(name) for name in (b"eglQueryDevicesEXT", b"eglGetPlatformDisplayEXT"))
    if not query or not display:
        return False
    pointer = ctypes.c_void_p
    devices, count = (pointer * 16)(), ctypes.c_int(0)
    ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, pointer, pointer)(query)(16, devices, ctypes.byref(count))
    get_display = ctypes.CFUNCTYPE(pointer, ctypes.c_uint, pointer, pointer)(display)
    platform_device = 0x313F  # EGL_PLATFORM_DEVICE_EXT
    displays = [get_display(platform_device, device, None) for device in devices[: count.value]]
    return any(d and egl.eglInitialize(pointer(d), None, None) for d in displays)


def _choose_renderer():
    """EGL where it works, else OSMesa. MuJoCo reads this variable when it is imported, so import this file first."""
    if "MUJOCO_GL" not in os.environ and sys.platform == "linux":
        os.environ["MUJOCO_GL"] = "egl" if _egl_works() else "osmesa"


_choose_renderer()

try:
    import mujoco
except Exception as error:  # no EGL, and OSMesa is not there either
    sys.exit(
        "Neither EGL nor OSMesa can draw on this machine: install one of them "
        f"(Debian, Ubuntu: apt-get install libegl1 libgl1 libosmesa6). MuJoCo said: {error}"
    )

import franky_sim
import gymnasium
import numpy as np

from episodes import CAMERAS, UserError

CONTROL_HZ = 10
HOME = np.array([0.0, -0.3, 0.0, -2.2, 0.0, 1.9, -0.7853])  # elbow up, fingers down, over the table
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


@dataclass
class Move:
    """One waypoint of a demonstration: where the tool goes (world frame), with which gripper, and how long it stays."""

    position: np.ndarray  # (3,)
    gripper: float = 1.0
    dwell: int = 0  # control steps to wait there
    rotation: np.ndarray = None  # (3, 3) world from tool; None: fingers down
    speed: float = 0.4  # m/s


# ------------------------------------------------------------------------------------------------------------- scene
def add_box(parent, name, size, position=(0, 0, 0), colour=(0.7, 0.7, 0.7), **geom):
    """A box of half sizes `size` (m) on a body of MjSpec; further MuJoCo attributes by name."""
    return parent.add_geom(
        name=name, type=mujoco.mjtGeom.mjGEOM_BOX, size=size, pos=position, rgba=(*colour, 1), **geom
    )


def base_scene():
    """Robot, table, light and cameras as an MjSpec. Returns it and the worldbody."""
    assets = Path(franky_sim.__file__).parent / "assets"
    spec = mujoco.MjSpec.from_file(str(assets / "fr3.xml"))
    spec.meshdir = str(assets / "meshes")
    # The collision meshes (3,100 faces) look like the arm and draw 15 times faster than the visual ones (242,000).
    for geom in list(spec.geoms):
        if geom.classname.name == "visual":
            spec.delete(geom)
    kept = {geom.meshname for geom in spec.geoms}
    for mesh in list(spec.meshes):
        if mesh.name not in kept:
            spec.delete(mesh)
    for geom in spec.geoms:
        geom.group = 2
        on_hand = geom.parent.name in ("hand", "left_finger", "right_finger")
        grey = {"hand": 0.9, "left_finger": 0.25, "right_finger": 0.25}.get(geom.parent.name, 0.82)
        geom.rgba = (grey, grey, grey, 1)
        # Only the hand and the flat finger pads touch things: the fingers' hulls taper and would squeeze objects out.
        if not on_hand or (geom.parent.name != "hand" and geom.type == mujoco.mjtGeom.mjGEOM_MESH):
            geom.contype = geom.conaffinity = 0
        else:
            geom.friction = (1.5, 0.02, 0.001)
            geom.condim = 4
    hand = spec.actuator("hand")
    hand.gainprm[0] *= GRIPPER_GAIN
    hand.biasprm[1:3] = hand.biasprm[1:3] * GRIPPER_GAIN
    spec.body("hand").add_site(name="tool", pos=(0, 0, TOOL_OFFSET))

    spec.option.timestep = 0.002
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC  # with impratio: held objects don't creep
    spec.option.impratio = 10
    spec.visual.headlight.ambient = (0.5, 0.5, 0.5)
    spec.visual.headlight.diffuse = (0.5, 0.5, 0.5)
    spec.visual.headlight.specular = (0, 0, 0)
    spec.visual.map.znear = 0.005
    getattr(spec.visual, "global").offwidth = 1280
    getattr(spec.visual, "global").offheight = 960
    spec.visual.quality.shadowsize = 0
    world = spec.worldbody
    world.add_light(pos=(0.5, 0, 2.0), dir=(0, 0, -1), castshadow=False, diffuse=(0.3, 0.3, 0.3))
    add_box(world, "table", (0.6, 0.8, 0.02), (0.4, 0, -0.02), (0.62, 0.55, 0.48), friction=(1.0, 0.005, 0.0001))
    add_box(world, "backdrop", (3, 3, 0.01), (0, 0, -0.8), (0.35, 0.38, 0.42), contype=0, conaffinity=0)

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
    templates = ()  # RLBench's phrasings; {} is the named candidate
    max_steps = 100

    def place(self, env, rng):
        """Draws the scene. Sets self.names: what the instruction calls each candidate."""

    def failed(self, env):
        """True when the task can no longer be done (the wrong button was pressed)."""
        return False

    def instructions(self, variation):
        return [template.format(self.names[variation]) for template in self.templates]

    def draw_colours(self, env, rng, geoms):
        """Gives each candidate's geoms (name pattern with {i}) its own colour for this episode."""
        self.names = [str(name) for name in rng.permutation(list(COLOURS))[: self.candidates]]
        for i, name in enumerate(self.names):
            env.model.geom(geoms.format(i=i)).rgba[:3] = COLOURS[name]


class ReachTarget(Task):
    """Touch the ball of the named colour with the fingertips; the other balls are distractors."""

    templates = ("reach the {} target", "touch the {} ball with the panda gripper", "reach the {} sphere")
    radius = 0.03

    def build(self, spec, world):
        for i in range(self.candidates):
            body = world.add_body(name=f"ball{i}", mocap=True)
            body.add_geom(name=f"ball{i}", type=mujoco.mjtGeom.mjGEOM_SPHERE, size=[self.radius, 0, 0], contype=0, conaffinity=0)

    def place(self, env, rng):
        self.draw_colours(env, rng, "ball{i}")
        env.data.mocap_pos[:] = scatter(rng, self.candidates, (0.36, -0.25, 0.05), (0.62, 0.25, 0.30), apart=0.12)

    def focus(self, env):
        return env.data.mocap_pos[env.variation].copy()

    def plan(self, env):
        yield Move(self.focus(env), dwell=4)

    def success(self, env):
        return np.linalg.norm(env.tool()[:3, 3] - self.focus(env)) < self.radius


class PushButton(Task):
    """Press the button of the named colour with closed fingers. Pressing another one ends the episode."""

    templates = ("push the {} button", "push down the {} button", "press the button with the {} color", "press the {} button")
    height, travel = 0.03, 0.010  # of the button's top above the table; how far it goes down

    def build(self, spec, world):
        for i in range(self.candidates):
            body = world.add_body(name=f"button{i}")
            add_box(body, f"base{i}", (0.035, 0.035, 0.01), (0, 0, 0.01), (0.45, 0.45, 0.45))
            cap = body.add_body(name=f"cap{i}", pos=(0, 0, 0.02))
            cap.add_joint(
                name=f"cap{i}", type=mujoco.mjtJoint.mjJNT_SLIDE, axis=(0, 0, 1), range=(-self.travel, 0),
                stiffness=[300, 0, 0], damping=[10, 0, 0], springref=0.01,
            )
            cap.add_geom(name=f"cap{i}", type=mujoco.mjtGeom.mjGEOM_CYLINDER, size=[0.025, 0.01, 0], mass=0.05)

    def place(self, env, rng):
        self.draw_colours(env, rng, "cap{i}")
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


class PickAndLift(Task):
    """Grasp the block of the named colour and lift it 10 cm; the other blocks are distractors."""

    templates = ("pick up the {} block and lift it", "grasp the {} block and lift it up", "lift the {} block up")
    half = 0.02

    def build(self, spec, world):
        for i in range(self.candidates):
            body = world.add_body(name=f"block{i}", pos=(0.5, 0.2 * (i - 1), self.half))
            body.add_freejoint(name=f"block{i}")
            add_box(body, f"block{i}", [self.half] * 3, mass=0.05, friction=(1.5, 0.02, 0.001), condim=4)

    def place(self, env, rng):
        self.draw_colours(env, rng, "block{i}")
        for i, point in enumerate(scatter(rng, self.candidates, (0.38, -0.22), (0.60, 0.22), apart=0.13)):
            yaw = rng.uniform(-0.3, 0.3)
            env.data.joint(f"block{i}").qpos[:] = [*point, self.half, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]

    def focus(self, env):
        return env.data.body(f"block{env.variation}").xpos.copy()

    def plan(self, env):
        block = self.focus(env)
        height = np.clip(env.tool()[2, 3], block[2] + 0.06, block[2] + 0.12)
        yield Move(np.append(block[:2], height))
        # The pauses around the closing of the fingers add up to the horizon (8 steps), so that a target that many
        # steps ahead never skips the contact.
        yield Move(block, dwell=4, speed=0.25)
        yield Move(block, gripper=0, dwell=5)
        yield Move(block + (0, 0, 0.15), gripper=0, dwell=2)

    def success(self, env):
        block = self.focus(env)
        return block[2] > self.half + 0.10 and np.linalg.norm(block - env.tool()[:3, 3]) < 0.04


TASKS = {
    "reach_target": ReachTarget,
    "push_button": PushButton,
    "pick_and_lift": PickAndLift,
}


# ------------------------------------------------------------------------------------------------------- environment
class PandaEnv(gymnasium.Env):
    """One task on the table. Same seed, same episode, bit for bit.

    Observation: {"qpos": (8,) joint positions (rad) and gripper opening 0..1, "qvel": (8,) their rates,
    "images": {camera: (H, W, 3) uint8}}. Action: (8,) absolute joint targets (rad) within the limits, gripper command 0..1.
    reset(options=...): "variation" (which candidate the instruction names, drawn if absent), "start" ("anywhere" over the
    table, or "near" the object, as half of the demonstrations do).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}
    render_mode = "rgb_array"

    def __init__(self, task="reach_target", image_size=128, cameras=CAMERAS, images=True):
        if task not in TASKS:
            raise UserError(f"There is no task '{task}'; choose one of {', '.join(TASKS)}.")
        self.height, self.width = (image_size, image_size) if np.isscalar(image_size) else image_size
        self.cameras, self.images = cameras, images
        self.task = TASKS[task]()
        spec, world = base_scene()
        self.task.build(spec, world)
        self.model = spec.compile()
        self.data = mujoco.MjData(self.model)
        self.scratch = mujoco.MjData(self.model)  # for kinematics that must not touch the simulation
        self.renderers = {}
        self.substeps = round(1 / (CONTROL_HZ * self.model.opt.timestep))
        self.limits = self.model.jnt_range[:7].copy()  # (7, 2) rad
        low, high = np.append(self.limits[:, 0], 0), np.append(self.limits[:, 1], 1)
        self.action_space = gymnasium.spaces.Box(low.astype(np.float32), high.astype(np.float32))
        unbounded = gymnasium.spaces.Box(-np.inf, np.inf, (8,), np.float32)
        picture = gymnasium.spaces.Box(0, 255, (self.height, self.width, 3), np.uint8)
        spaces = {"qpos": unbounded, "qvel": unbounded}
        if images:
            spaces["images"] = gymnasium.spaces.Dict({camera: picture for camera in cameras})
        self.observation_space = gymnasium.spaces.Dict(spaces)

    # ---- Gymnasium
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        options = options or {}
        self.seed = int(self.np_random.integers(2**31)) if seed is None else seed
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
        if options.get("start", "anywhere") == "near":
            start_rng = np.random.default_rng([self.seed, 2, self.variation])
            tool = self.task.focus(self) + np.append(start_rng.normal(0, 0.03, 2), start_rng.uniform(0.05, 0.16))
            opening = float(start_rng.random() < 0.7)  # also with empty closed fingers: a missed grasp is tried again
        else:
            tool = start_rng.uniform(*START_BOX)
        qpos = self.ik(tool, TOOL_DOWN)
        self.data.qpos[:7] = qpos
        self.data.qpos[7:9] = 0.04 * opening
        self.data.ctrl[:7], self.data.ctrl[7] = qpos, 255 * opening
        self.data.qvel[:] = 0
        mujoco.mj_forward(self.model, self.data)
        self.steps = 0
        return self.observe(), self.info()

    def step(self, action):
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (8,) or not np.isfinite(action).all():
            raise UserError(f"The action must be 8 finite numbers (7 joints in rad and the gripper), not {action}.")
        if not self.action_space.contains(action.astype(np.float32)):
            raise UserError(f"The action {action.round(3)} is outside the joint limits; clip it to env.action_space first.")
        self.data.ctrl[:7] = action[:7]
        self.data.ctrl[7] = 255 if action[7] > 0.5 else 0
        mujoco.mj_step(self.model, self.data, self.substeps)
        mujoco.mj_forward(self.model, self.data)  # so that poses and pictures belong to the new state
        self.steps += 1
        success = bool(self.task.success(self))
        terminated = success or bool(self.task.failed(self))
        return self.observe(), float(success), terminated, self.steps >= self.task.max_steps, self.info()

    def render(self):
        return self.picture("front", self.height, self.width)

    def close(self):
        for renderer in self.renderers.values():
            renderer.close()
        self.renderers = {}

    def info(self):
        return {
            "instruction": self.instruction,
            "instructions": self.instructions,
            "variation": self.variation,
            "success": bool(self.task.success(self)),
        }

    def observe(self):
        fingers, speeds = self.data.qpos[7:9].sum() / 0.08, self.data.qvel[7:9].sum() / 0.08
        observation = {
            "qpos": np.append(self.data.qpos[:7], np.clip(fingers, 0, 1)).astype(np.float32),
            "qvel": np.append(self.data.qvel[:7], speeds).astype(np.float32),
        }
        if self.images:
            observation["images"] = {c: self.picture(c, self.height, self.width) for c in self.cameras}
        return observation

    def picture(self, camera, height, width):
        """What the camera sees now: (height, width, 3) uint8."""
        if (height, width) not in self.renderers:
            try:
                renderer = mujoco.Renderer(self.model, height, width)
            except Exception as error:
                raise UserError(
                    "Neither EGL nor OSMesa can draw on this machine: install one of them "
                    f"(on Debian or Ubuntu: apt-get install libegl1 libgl1 libosmesa6). MuJoCo said: {error}"
                ) from error
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
            self.renderers[height, width] = renderer
        renderer = self.renderers[height, width]
        renderer.update_scene(self.data, camera)
        return renderer.render()

    # ---- geometry
    def tool(self, data=None):
        """World from tool (4, 4): between the fingertips, z out of the hand, fingers along y."""
        site = (data or self.data).site("tool")
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
            rest = HOME - data.qpos[:7]
            rest[0] = 0  # the base joint turns towards the target; no pull
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
