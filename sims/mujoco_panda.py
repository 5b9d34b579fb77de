"""The embedded simulator: an arm at a table in MuJoCo, as a Gymnasium environment.

In:   absolute joint positions (rad) and a gripper command (0 closed, 1 open), ten times a second
Out:  joint positions and velocities, and one image per camera

    env = PandaEnv("pick_and_lift")
    observation, info = env.reset(seed=0)
    print(info["instruction"])
    observation, reward, terminated, truncated, info = env.step(action)

The arm is a Franka, or a UR5e in its place (robot="ur5e"): sims/arms.py. World frame: the robot's
base on the table top, metres, z up, x away from the robot. The tasks are in sims/mujoco_tasks.py.
"""

import gymnasium
import mujoco
import numpy as np

from genima.episodes import CAMERAS
from genima.files import UserError
from sims.arms import GRIPPER_OPEN, find_arm
from sims.mujoco_tasks import PAINTED, TOOL_DOWN, add_box, find_task
from sims.rendering import new_renderer

CONTROL_HZ = 10
LOWEST_START = 0.02  # metres above the table, of the fingertips
MAX_HEIGHT = 960  # of an image, pixels
MAX_WIDTH = 1280
SKY_TEXELS = 16  # pixels a side of each of the sky's six faces


# ------------------------------------------------------------------------------------------- scene
def base_scene(arm):
    """Robot, table, light and cameras as an MjSpec. arm: of sims/arms.py."""
    spec = arm.load()
    spec.option.timestep = 0.002
    # An elliptic friction cone with a high impedance ratio: held objects do not creep.
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    spec.option.impratio = 10

    headlight = spec.visual.headlight
    headlight.ambient = (0.5, 0.5, 0.5)
    headlight.diffuse = (0.5, 0.5, 0.5)
    headlight.specular = (0, 0, 0)
    buffer = getattr(spec.visual, "global")
    buffer.offwidth = MAX_WIDTH
    buffer.offheight = MAX_HEIGHT
    spec.visual.map.znear = 0.005
    spec.visual.quality.shadowsize = 0

    world = spec.worldbody
    world.add_light(pos=(0.5, 0, 2.0), dir=(0, 0, -1), castshadow=False, diffuse=(0.3, 0.3, 0.3))
    rough = {"friction": (1.0, 0.005, 0.0001)}
    add_box(world, "table", (0.6, 0.8, 0.02), (0.4, 0, -0.02), (0.62, 0.55, 0.48), **rough)
    add_box(world, "backdrop", (3, 3, 0.01), (0, 0, -0.8), (0.35, 0.38, 0.42), **PAINTED)

    spec.add_texture(
        name="sky",
        type=mujoco.mjtTexture.mjTEXTURE_SKYBOX,
        builtin=mujoco.mjtBuiltin.mjBUILTIN_GRADIENT,
        rgb1=(0.50, 0.54, 0.58),
        rgb2=(0.35, 0.38, 0.42),
        width=SKY_TEXELS,
        height=6 * SKY_TEXELS,
    )

    # The shoulders' cameras see the whole arm and the table: every sphere is in two views or more.
    # From where they are, a pixel is 1.2 cm over the table (from the front camera 1.05 cm).
    add_camera(world, "front", (1.28, 0, 0.62), (0.42, 0, 0.14), 38)
    add_camera(world, "right_shoulder", (0.75, -1.02, 0.38), (0.28, 0.06, 0.255), 38)
    add_camera(world, "left_shoulder", (0.75, 1.02, 0.38), (0.28, -0.06, 0.255), 38)
    add_camera(spec.body("hand"), "wrist", (0.12, 0, 0.01), (0.02, 0, 0.14), 70, up=(1, 0, 0))
    return spec


def add_camera(body, name, position, target, fovy, up=(0, 0, 1)):
    """A camera at `position` that looks at `target` (both in the body's frame); fovy in degrees."""
    backward = np.subtract(position, target)
    backward /= np.linalg.norm(backward)
    right = np.cross(up, backward)
    right /= np.linalg.norm(right)
    # MuJoCo's camera: x right, y up, looks along -z.
    axes = np.stack([right, np.cross(backward, right), backward], axis=1)
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, axes.ravel())
    body.add_camera(name=name, pos=position, quat=quaternion, fovy=fovy)


# ------------------------------------------------------------------------------------- environment
class ArmEnv(gymnasium.Env):
    """What the simulators have in common: an arm of D joints with a gripper, and cameras.

    Observation: {"qpos": (D+1,) joint positions (rad) and gripper opening 0..1,
                  "qvel": (D+1,) their rates,
                  "images": {camera: (H, W, 3) uint8}}, the last only with images=True.
    Action: (D+1,) absolute joint targets (rad) within the limits, gripper command 0..1.

    A simulator has these methods as well:
        render_camera(camera, height, width)   (height, width, 3) uint8
        joint_poses()                          (D+1, 4, 4) world from joint, the last the tool
        tool_pose()                            (4, 4) world from tool
        camera_parameters(camera, size)        intrinsics (3, 3), world from camera (4, 4)
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}
    render_mode = "rgb_array"

    def __init__(self, image_size, cameras, images, low, high):
        """image_size: (height, width) or both as one number. low, high: (D,) rad, joint limits."""
        if np.isscalar(image_size):
            image_size = (image_size, image_size)
        self.height, self.width = image_size
        self.cameras = tuple(cameras)
        self.images = images
        self.action_space = gymnasium.spaces.Box(
            np.append(low, 0).astype(np.float32), np.append(high, 1).astype(np.float32)
        )
        unbounded = gymnasium.spaces.Box(-np.inf, np.inf, (len(low) + 1,), np.float32)
        spaces = {"qpos": unbounded, "qvel": unbounded}
        if images:
            image = gymnasium.spaces.Box(0, 255, (self.height, self.width, 3), np.uint8)
            spaces["images"] = gymnasium.spaces.Dict(dict.fromkeys(self.cameras, image))
        self.observation_space = gymnasium.spaces.Dict(spaces)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self.seed = seed
        self.steps = 0

    def checked(self, action):
        """The action as an array (D+1,) of float64. Raises UserError if the arm cannot take it."""
        action = np.asarray(action, dtype=np.float64)
        shape = self.action_space.shape
        if action.shape != shape or not np.isfinite(action).all():
            count = shape[0]
            raise UserError(
                f"The action must be {count} finite numbers ({count - 1} joints in rad and the "
                f"gripper), not {action}."
            )
        if not self.action_space.contains(action.astype(np.float32)):
            raise UserError(
                f"The action {action.round(3)} is outside the joint limits; "
                "clip it to env.action_space first."
            )
        return action

    def observation(self, qpos, opening, qvel, opening_rate):
        """What the policy sees now; qpos, qvel: (D,)."""
        observation = {
            "qpos": np.append(qpos, opening).astype(np.float32),
            "qvel": np.append(qvel, opening_rate).astype(np.float32),
        }
        if self.images:
            observation["images"] = render_cameras(self)
        return observation

    def render_camera(self, camera, height, width):
        return self.picture(camera, height, width)

    def tool_pose(self):
        return self.tool()

    def camera_parameters(self, name):
        return self.camera(name)

    def render(self):
        return self.render_camera("front", self.height, self.width)


def render_cameras(env):
    """What all cameras see now: {camera: (H, W, 3) uint8}."""
    return {camera: env.render_camera(camera, env.height, env.width) for camera in env.cameras}


class PandaEnv(ArmEnv):
    """One task on the table. Same seed, same episode, bit for bit.

    reset(options=...): "variation" is which candidate the instruction names, drawn if absent;
    "start" is where the tool begins: "anywhere" over the table, or "near" the object, perhaps in
    the middle of the task, as half of the demonstrations do.
    """

    def __init__(
        self, task="reach_target", image_size=128, cameras=CAMERAS, images=True, robot="fr3"
    ):
        """robot: one of sims/arms.py. Raises UserError for an unknown task or robot, or images
        that are too large."""
        task_class = find_task(task)
        if np.greater(image_size, (MAX_HEIGHT, MAX_WIDTH)).any():
            raise UserError(
                f"Images of {image_size} pixels are too large for the embedded simulator: "
                f"at most {MAX_HEIGHT} x {MAX_WIDTH}."
            )
        self.task = task_class()
        self.robot = robot
        self.arm = find_arm(robot)
        self.joints = len(self.arm.home)  # D
        self.model = self.build().compile()
        self.data = mujoco.MjData(self.model)
        self.scratch = mujoco.MjData(self.model)  # for kinematics beside the simulation
        self.renderers = {}  # by (height, width)
        low, high = self.model.jnt_range[: self.joints].T
        super().__init__(image_size, cameras, images, low, high)

    def build(self):
        """The whole scene as an MjSpec."""
        spec = base_scene(self.arm)
        self.task.build(spec.worldbody)
        return spec

    # ---- Gymnasium
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if options is None:
            options = {}
        rng = np.random.default_rng([self.seed, 0])
        mujoco.mj_resetData(self.model, self.data)
        self.task.place(self, rng)
        variation = int(rng.integers(self.task.candidates))
        phrase = int(rng.integers(len(self.task.templates)))
        if options.get("variation") is not None:
            variation = options["variation"]
        if not 0 <= variation < self.task.candidates:
            raise UserError(
                f"Variation {variation} does not exist: "
                f"the task has 0 to {self.task.candidates - 1}."
            )
        self.variation = variation
        self.instructions = self.task.instructions(variation)
        self.instruction = self.instructions[phrase]
        mujoco.mj_forward(self.model, self.data)

        start = options.get("start")
        if start == "near":
            self.task.place_half_done(self, np.random.default_rng([self.seed, 3, variation]))
        tool, opening = self.draw_start(start)
        joints = self.ik(tool, TOOL_DOWN)
        finger = self.arm.finger_travel * opening
        self.data.qpos[: self.joints + 2] = *joints, finger, finger
        self.data.ctrl[:] = *joints, GRIPPER_OPEN * opening
        mujoco.mj_forward(self.model, self.data)
        return self.observe(), self.info()

    def draw_start(self, where):
        """Where the tool begins (3,), and whether the gripper is open (1.0) or closed (0.0).

        "near": off the object, or, half the time, on the way there from anywhere. So a painter sees
        that what is to be reached does not depend on where the arm is going.
        """
        rng = np.random.default_rng([self.seed, 1])
        anywhere = rng.uniform(*self.task.start_box)
        if where != "near":
            return anywhere, 1.0
        rng = np.random.default_rng([self.seed, 2, self.variation])
        point = self.task.near(self) + self.task.draw_offset(rng)
        # Also with closed and empty fingers: a missed grasp is tried again.
        opening = float(rng.random() < 0.7)
        if rng.random() < 0.5:
            point += rng.random() * (anywhere - point)
        point[2] = max(point[2], LOWEST_START)
        return point, opening

    def step(self, action):
        action = self.checked(action)
        self.data.ctrl[:] = *action[:-1], GRIPPER_OPEN * (action[-1] > 0.5)
        substeps = round(1 / (CONTROL_HZ * self.model.opt.timestep))
        mujoco.mj_step(self.model, self.data, substeps)
        mujoco.mj_forward(self.model, self.data)  # so that poses and images are of the new state
        self.steps += 1
        success = bool(self.task.success(self))
        terminated = success or bool(self.task.failed(self))
        truncated = self.steps >= self.task.max_steps
        return self.observe(), float(success), terminated, truncated, self.info()

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
        count = self.joints
        span = 2 * self.arm.finger_travel
        opening = self.fingers().sum() / span
        rate = self.data.qvel[count : count + 2].sum() / span
        return self.observation(
            self.data.qpos[:count], np.clip(opening, 0, 1), self.data.qvel[:count], rate
        )

    def fingers(self):
        """How far each finger is open (2,), metres."""
        return self.data.qpos[self.joints : self.joints + 2]

    def render_camera(self, camera, height, width):
        """What the camera sees now: (height, width, 3) uint8."""
        size = (height, width)
        if size not in self.renderers:
            renderer = new_renderer(self.model, height, width)
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
            self.renderers[size] = renderer
        renderer = self.renderers[size]
        renderer.update_scene(self.data, camera)
        return renderer.render()

    def set_texture(self, name: str, pixels: np.ndarray):
        """Paint a texture of the scene anew. pixels: its (height, width, 3) uint8."""
        texture = self.model.texture(name).id
        start = self.model.tex_adr[texture]
        self.model.tex_data[start : start + pixels.size] = pixels.ravel()
        for renderer in self.renderers.values():
            renderer._gl_context.make_current()
            mujoco.mjr_uploadTexture(self.model, renderer._mjr_context, texture)

    # ---- geometry
    def tool_pose(self):
        """World from tool (4, 4): between the fingertips, z out of the hand, fingers along y."""
        site = self.data.site("tool")
        return make_pose(site.xmat, site.xpos)

    def joint_poses(self):
        """World from joint (D+1, 4, 4) float32: the joints, then the tool.

        A joint's z axis is the axis it turns about, and its frame turns with it.
        """
        poses = []
        for name in self.arm.bodies:
            link = self.data.body(name)
            poses.append(make_pose(link.xmat, link.xpos))
        poses.append(self.tool_pose())
        return np.stack(poses).astype(np.float32)

    def camera_parameters(self, camera, size=None):
        """OpenCV intrinsics (3, 3) in pixels and world from camera (4, 4) as of now.

        size: (H, W) of the view, where it is not the environment's own.
        """
        if size is None:
            size = (self.height, self.width)
        height, width = size
        fovy = np.deg2rad(self.model.cam(camera).fovy[0])
        focal = 0.5 * height / np.tan(fovy / 2)
        intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
        seen_from = self.data.cam(camera)
        rotation = seen_from.xmat.reshape(3, 3) * [1, -1, -1]  # MuJoCo: y up, looks along -z
        return intrinsics, make_pose(rotation, seen_from.xpos)

    def ik(self, position, rotation, start=None):
        """Joint positions (D,), rad, that bring the tool to a pose in the world frame.

        Damped least squares from `start`, with the home posture in the null space, so that a pose
        has one answer. Six joints leave no choice. Raises UserError if the pose is out of reach.
        """
        data = self.scratch
        low, high = self.model.jnt_range[: self.joints].T
        home = np.array(self.arm.home)
        count = self.joints
        posture = self.task.posture[:count]
        if start is None:
            start = home.copy()
            start[0] += np.arctan2(position[1], position[0])  # towards the pose
        data.qpos[:] = self.data.qpos
        data.qpos[:count] = start
        jacobian = np.zeros((6, self.model.nv))
        site = self.model.site("tool").id
        for _ in range(100):
            mujoco.mj_kinematics(self.model, data)
            mujoco.mj_comPos(self.model, data)
            turn = rotation_vector(rotation @ data.site_xmat[site].reshape(3, 3).T)
            error = np.concatenate([position - data.site_xpos[site], turn])  # (6,) metres, rad
            mujoco.mj_jacSite(self.model, data, jacobian[:3], jacobian[3:], site)
            J = jacobian[:, :count]
            damped_inverse = J.T @ np.linalg.inv(J @ J.T + 1e-6 * np.eye(6))  # (D, 6)
            null_space = np.eye(count) - damped_inverse @ J
            to_home = posture * (home - data.qpos[:count])
            step = damped_inverse @ error + 0.3 * null_space @ to_home
            moved = data.qpos[:count] + np.clip(step, -0.3, 0.3)
            data.qpos[:count] = np.clip(moved, low, high)
            if np.abs(step).max() < 1e-4:
                break
        distance = np.linalg.norm(error)
        if distance > 5e-3:
            raise UserError(
                f"The arm cannot reach {np.round(position, 3)} (off by {distance:.3f})."
            )
        return data.qpos[:count].copy()


def make_pose(rotation, position):
    """A pose (4, 4) of a rotation (9 numbers) and a position (3,)."""
    pose = np.eye(4)
    pose[:3, :3] = np.reshape(rotation, (3, 3))
    pose[:3, 3] = position
    return pose


def rotation_vector(matrix):
    """Axis times angle (3,), rad, of a rotation matrix (3, 3)."""
    quaternion = np.zeros(4)
    vector = np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, matrix.ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1)
    return vector
