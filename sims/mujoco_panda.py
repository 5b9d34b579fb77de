"""The embedded simulator: a Franka arm at a table in MuJoCo, as a Gymnasium environment.

In:   absolute joint positions (7, rad) and a gripper command (0 closed, 1 open), ten times a second.
Out:  joint positions and velocities, and one picture per camera.
Use:  env = PandaEnv("pick_and_lift");  obs, info = env.reset(seed=0);  print(info["instruction"])

The arm and hand are the Menagerie's Franka model as carried by the `franky-sim` package. World frame: the robot's base on
the table top, metres, z up, x away from the robot. The tasks are in sims/mujoco_tasks.py.
"""

import sys
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

from genima.episodes import CAMERAS
from genima.files import UserError
from sims.mujoco_tasks import PAINTED, TASKS, TOOL_DOWN, add_box, check_task

CONTROL_HZ = 10
HOME = np.array([0.0, -0.3, 0.0, -2.2, 0.0, 1.9, 0.7853])  # elbow up, fingers down, over the table
TOOL_OFFSET = (
    0.1034  # metres from the hand's flange to between the fingertips (Franka's data sheet)
)
GRIPPER_GAIN = 15  # the model's fingers squeeze with about 1 N and objects slip; this many times more holds them


# ------------------------------------------------------------------------------------------------------------- scene
def base_scene():
    """Robot, table, light and cameras as an MjSpec."""
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
        part, grey = (
            geom.parent.name,
            {"hand": 0.9, "left_finger": 0.25, "right_finger": 0.25}.get(geom.parent.name, 0.82),
        )
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
    add_box(
        world,
        "table",
        (0.6, 0.8, 0.02),
        (0.4, 0, -0.02),
        (0.62, 0.55, 0.48),
        friction=(1.0, 0.005, 0.0001),
    )
    add_box(world, "backdrop", (3, 3, 0.01), (0, 0, -0.8), (0.35, 0.38, 0.42), **PAINTED)

    add_camera(world, "front", (1.28, 0, 0.62), (0.42, 0, 0.14), 38)
    add_camera(world, "right_shoulder", (0.16, -0.80, 0.62), (0.44, 0.02, 0.12), 38)
    add_camera(world, "left_shoulder", (0.16, 0.80, 0.62), (0.44, -0.02, 0.12), 38)
    add_camera(spec.body("hand"), "wrist", (0.12, 0, 0.01), (0.02, 0, 0.14), 70, up=(1, 0, 0))
    return spec


def add_camera(body, name, position, target, fovy, up=(0, 0, 1)):
    """A camera at `position` that looks at `target` (both in the body's frame); fovy in degrees."""
    backward = np.subtract(position, target) / np.linalg.norm(np.subtract(position, target))
    right = np.cross(up, backward)
    right /= np.linalg.norm(right)
    axes = np.stack(
        [right, np.cross(backward, right), backward], axis=1
    )  # MuJoCo: x right, y up, looks along -z
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, axes.ravel())
    body.add_camera(name=name, pos=position, quat=quaternion, fovy=fovy)


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
        self.height, self.width = (
            (image_size, image_size) if np.isscalar(image_size) else image_size
        )
        self.cameras, self.images = tuple(cameras), images
        self.action_space = gymnasium.spaces.Box(
            np.append(low, 0).astype(np.float32), np.append(high, 1).astype(np.float32)
        )
        unbounded = gymnasium.spaces.Box(-np.inf, np.inf, (8,), np.float32)
        picture = gymnasium.spaces.Box(0, 255, (self.height, self.width, 3), np.uint8)
        pictures = (
            {"images": gymnasium.spaces.Dict(dict.fromkeys(self.cameras, picture))}
            if images
            else {}
        )
        self.observation_space = gymnasium.spaces.Dict(
            {"qpos": unbounded, "qvel": unbounded, **pictures}
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.steps = int(self.np_random.integers(2**31)) if seed is None else seed, 0

    def checked(self, action):
        """The action as an array (8,) of float64. Raises UserError for one that the arm cannot take."""
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (8,) or not np.isfinite(action).all():
            raise UserError(
                f"The action must be 8 finite numbers (7 joints in rad and the gripper), not {action}."
            )
        if not self.action_space.contains(action.astype(np.float32)):
            raise UserError(
                f"The action {action.round(3)} is outside the joint limits; clip it to env.action_space first."
            )
        return action

    def observation(self, qpos, opening, qvel, speed):
        seen = {"images": render_cameras(self)} if self.images else {}
        return {
            "qpos": np.append(qpos, opening).astype(np.float32),
            "qvel": np.append(qvel, speed).astype(np.float32),
            **seen,
        }

    def render_camera(self, camera, height, width):
        return self.picture(camera, height, width)

    def tool_pose(self):
        return self.tool()

    def camera_parameters(self, name):
        return self.camera(name)

    def render(self):
        return self.picture("front", self.height, self.width)


def render_cameras(env):
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
        self.model = self.build().compile()
        self.data = mujoco.MjData(self.model)
        self.scratch = mujoco.MjData(
            self.model
        )  # for kinematics that must not touch the simulation
        self.renderers = {}
        super().__init__(image_size, cameras, images, *self.model.jnt_range[:7].T)

    def build(self):
        """The whole scene as an MjSpec."""
        spec = base_scene()
        self.task.build(spec.worldbody)
        return spec

    # ---- Gymnasium
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        options = options or {}
        scene_rng, start_rng = (
            np.random.default_rng([self.seed, 0]),
            np.random.default_rng([self.seed, 1]),
        )
        mujoco.mj_resetData(self.model, self.data)
        self.task.place(self, scene_rng)
        drawn = int(scene_rng.integers(self.task.candidates))
        phrase = int(scene_rng.integers(len(self.task.templates)))
        self.variation = drawn if options.get("variation") is None else options["variation"]
        if not 0 <= self.variation < self.task.candidates:
            raise UserError(
                f"Variation {self.variation} does not exist: the task has 0 to {self.task.candidates - 1}."
            )
        self.instructions = self.task.instructions(self.variation)
        self.instruction = self.instructions[phrase]
        mujoco.mj_forward(self.model, self.data)

        opening = 1.0
        if options.get("start") == "near":
            start_rng = np.random.default_rng([self.seed, 2, self.variation])
            tool = self.task.near(self) + np.append(
                start_rng.normal(0, 0.03, 2), start_rng.uniform(0.05, 0.16)
            )
            opening = float(
                start_rng.random() < 0.7
            )  # also with empty closed fingers: a missed grasp is tried again
        else:
            tool = start_rng.uniform(*self.task.start_box)
        qpos = self.ik(tool, TOOL_DOWN)
        self.data.qpos[:9] = *qpos, 0.04 * opening, 0.04 * opening
        self.data.ctrl[:] = *qpos, 255 * opening
        mujoco.mj_forward(self.model, self.data)
        return self.observe(), self.info()

    def step(self, action):
        action = self.checked(action)
        self.data.ctrl[:] = *action[:7], 255 * (action[7] > 0.5)
        mujoco.mj_step(self.model, self.data, round(1 / (CONTROL_HZ * self.model.opt.timestep)))
        mujoco.mj_forward(
            self.model, self.data
        )  # so that poses and pictures belong to the new state
        self.steps += 1
        success = bool(self.task.success(self))
        terminated = success or bool(self.task.failed(self))
        return (
            self.observe(),
            float(success),
            terminated,
            self.steps >= self.task.max_steps,
            self.info(),
        )

    def close(self):
        for renderer in self.renderers.values():
            renderer.close()
        self.renderers = {}

    def info(self):
        return {"instruction": self.instruction, "instructions": self.instructions, "variation": self.variation,
                "success": bool(self.task.success(self))}  # fmt: skip

    def observe(self):
        fingers, speed = self.data.qpos[7:9].sum() / 0.08, self.data.qvel[7:9].sum() / 0.08
        return self.observation(
            self.data.qpos[:7], np.clip(fingers, 0, 1), self.data.qvel[:7], speed
        )

    def picture(self, camera, height, width):
        """What the camera sees now: (height, width, 3) uint8."""
        if (height, width) not in self.renderers:
            try:
                renderer = self.renderers[height, width] = mujoco.Renderer(
                    self.model, height, width
                )
            except Exception as error:
                raise UserError(f"{CANNOT_DRAW}{error}") from error
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
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
        return np.stack([_pose(link.xmat, link.xpos) for link in links] + [self.tool()]).astype(
            np.float32
        )

    def camera(self, name):
        """OpenCV intrinsics (3, 3) in pixels and world from camera (4, 4) as of now."""
        focal = 0.5 * self.height / np.tan(np.deg2rad(self.model.cam(name).fovy[0]) / 2)
        intrinsics = np.array([[focal, 0, self.width / 2], [0, focal, self.height / 2], [0, 0, 1]])
        camera = self.data.cam(name)
        return intrinsics, _pose(
            camera.xmat.reshape(3, 3) * [1, -1, -1], camera.xpos
        )  # MuJoCo: y up, looks along -z

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
            rest = self.task.posture * (
                HOME - data.qpos[:7]
            )  # the base joint turns towards the target; no pull
            step = pseudo @ error + 0.3 * (np.eye(7) - pseudo @ J) @ rest
            data.qpos[:7] = np.clip(
                data.qpos[:7] + np.clip(step, -0.3, 0.3), *self.model.jnt_range[:7].T
            )
            if np.abs(step).max() < 1e-4:
                break
        if np.linalg.norm(error) > 5e-3:
            raise UserError(
                f"The arm cannot reach {np.round(position, 3)} (off by {np.linalg.norm(error):.3f})."
            )
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
