"""Random scenes of the embedded simulator: random looks, objects, cameras and postures of the arm.

In:   a task of sims/mujoco_tasks.py, whose objects lie on the table, and a seed.
Out:  one picture per camera, where each thing lies, and where the arm is. Nothing moves: no
      demonstration is made, and no action is ever taken.
Use:  env = RandomSceneEnv("push_button");  scene = env.draw_scene(seed=0)

What is random in every scene: the colours and patterns of table, floor and sky, the light, the
shade of every object and of the arm, up to four distractors, every camera by up to 4 cm and 4
degrees, how far drawers and lids are open, what is in the hand, and where the arm is.
pretrain_painter.py trains the base on such scenes.
"""

import mujoco
import numpy as np

from genima.files import UserError
from sims.mujoco_panda import SKY_TEXELS, PandaEnv
from sims.mujoco_tasks import PAINTED, TOOL_DOWN, add_box, rotation_from

TEXELS = 64  # pixels a side of a texture
SURFACES = ("table", "backdrop")  # what gets a random pattern
DISTRACTORS = 4
TOOL_BOX = np.array([[0.28, -0.32, 0.02], [0.66, 0.32, 0.42]])  # metres: where the hand may be
CAMERA_SHIFT = 0.04  # metres along each axis, at most
CAMERA_TURN = 4  # degrees about each axis, at most
SHADE = 0.15  # of 1: how far each channel of an object's colour may be from its usual value


class RandomSceneEnv(PandaEnv):
    """PandaEnv in which everything that can look or lie differently does so."""

    def build(self):
        spec = super().build()
        for surface in SURFACES:
            texture = spec.add_texture(
                name=surface,
                type=mujoco.mjtTexture.mjTEXTURE_2D,
                builtin=mujoco.mjtBuiltin.mjBUILTIN_FLAT,
                width=TEXELS,
                height=TEXELS,
            )
            material = spec.add_material(name=surface)
            material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = texture.name
            spec.geom(surface).material = surface
            spec.geom(surface).rgba = (1, 1, 1, 1)
        for i in range(DISTRACTORS):
            body = spec.worldbody.add_body(name=f"distractor{i}")
            add_box(body, f"distractor{i}", (0.02, 0.02, 0.02), **PAINTED)
        return spec

    def draw_scene(self, seed: int):
        """Lay out the scene of this seed; pictures and poses are then the environment's."""
        self.restore_looks()
        self.reset(seed=seed)
        rng = np.random.default_rng([seed, 4])
        self.draw_looks(rng)
        self.draw_cameras(rng)
        self.draw_distractors(rng)
        self.draw_objects(rng)
        self.data.qpos[:9] = self.draw_posture(rng)
        self.put_something_into_the_hand(rng)
        mujoco.mj_forward(self.model, self.data)
        return rng

    def restore_looks(self):
        """Undo what the last scene changed in the model."""
        model = self.model
        changeable = (
            model.geom_rgba,
            model.geom_size,
            model.cam_pos,
            model.cam_quat,
            model.light_diffuse,
            model.light_dir,
            model.vis.headlight.ambient,
            model.vis.headlight.diffuse,
        )
        if not hasattr(self, "usual_looks"):
            self.usual_looks = [values.copy() for values in changeable]
        for values, usual in zip(changeable, self.usual_looks):
            values[:] = usual

    # -------------------------------------------------------------------------------------- looks
    def draw_looks(self, rng):
        model = self.model
        for surface in SURFACES:
            self.set_texture(surface, draw_pattern(rng))
        self.set_texture("sky", draw_sky(rng))

        light = rng.uniform(0.6, 1.25) * rng.uniform(0.75, 1.2, 3)
        model.light_diffuse[:] *= light * rng.uniform(0.5, 1.5)
        model.vis.headlight.ambient[:] *= light
        model.vis.headlight.diffuse[:] *= light
        model.light_dir[:] += rng.uniform(-0.5, 0.5, model.light_dir.shape)

        for i in range(model.ngeom):
            name = model.geom(i).name
            if name in SURFACES:
                continue
            is_arm = model.geom_group[i] == 2
            if is_arm:
                shade = rng.uniform(-0.05, 0.05)
            else:
                shade = rng.uniform(-SHADE, SHADE, 3)
            model.geom_rgba[i, :3] = np.clip(model.geom_rgba[i, :3] + shade, 0, 1)
        arm = model.geom_group == 2
        model.geom_rgba[arm, :3] = np.clip(model.geom_rgba[arm, :3] + rng.uniform(-0.2, 0.1), 0, 1)

    def draw_cameras(self, rng):
        model = self.model
        model.cam_pos += rng.uniform(-CAMERA_SHIFT, CAMERA_SHIFT, model.cam_pos.shape)
        turns = np.deg2rad(rng.uniform(-CAMERA_TURN, CAMERA_TURN, model.cam_pos.shape))
        for quaternion, turn in zip(model.cam_quat, turns):
            matrix = np.zeros(9)
            mujoco.mju_quat2Mat(matrix, quaternion)
            turned = matrix.reshape(3, 3) @ rotation_from(turn)
            mujoco.mju_mat2Quat(quaternion, turned.ravel())

    def draw_distractors(self, rng):
        shown = rng.integers(DISTRACTORS + 1)
        for i in range(DISTRACTORS):
            side = rng.choice([-1, 1])
            point = (rng.uniform(0.25, 0.75), side * rng.uniform(0.28, 0.45))
            height = 0.02 if i < shown else -1.0  # under the floor
            self.model.body(f"distractor{i}").pos[:] = *point, height
            self.model.geom(f"distractor{i}").size[:] = rng.uniform(0.015, 0.04, 3)
            self.model.geom(f"distractor{i}").rgba[:3] = rng.random(3)

    # ------------------------------------------------------------------------------ what lies where
    def draw_objects(self, rng):
        """Drawers and lids are open by any amount."""
        model = self.model
        for joint in range(model.njnt):
            name = model.joint(joint).name
            is_free = model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_FREE
            is_arm = name.startswith("fr3") or "finger" in name
            if not is_free and not is_arm and rng.random() < 0.5:
                low, high = model.jnt_range[joint]
                self.data.qpos[model.jnt_qposadr[joint]] = rng.uniform(low, high)
        mujoco.mj_forward(model, self.data)

    def draw_posture(self, rng):
        """Seven joint positions (rad) and two finger positions (m)."""
        opening = float(rng.random() < 0.5)
        while True:
            tool = rng.uniform(*TOOL_BOX)
            tilt = rng.normal(0, 0.15, 3)
            tilt[2] = rng.normal(0, 0.5)
            try:
                joints = self.ik(tool, rotation_from(tilt) @ TOOL_DOWN)
            except UserError:  # out of reach: draw again
                continue
            joints = joints + rng.choice([0.0, 0.05, 0.15]) * rng.normal(size=7)
            joints = np.clip(joints, *self.model.jnt_range[:7].T)
            return np.append(joints, [0.04 * opening, 0.04 * opening])

    def put_something_into_the_hand(self, rng):
        """Every fifth scene: something that can be carried is between the fingers."""
        model = self.model
        loose = np.flatnonzero(model.jnt_type == mujoco.mjtJoint.mjJNT_FREE)
        if not len(loose) or rng.random() > 0.2:
            return
        mujoco.mj_forward(model, self.data)
        tool = self.tool_pose()
        address = model.jnt_qposadr[rng.choice(loose)]
        self.data.qpos[address : address + 3] = tool[:3, 3]
        mujoco.mju_mat2Quat(self.data.qpos[address + 3 : address + 7], tool[:3, :3].ravel())
        self.data.qpos[7:9] = 0.02

    # ----------------------------------------------------------------------------------- geometry
    def joint_poses_at(self, joints) -> np.ndarray:
        """World from joint (8, 4, 4), as `joint_poses`, if the arm were at these joints (7,)."""
        before = self.data.qpos.copy()
        self.data.qpos[:7] = joints
        mujoco.mj_kinematics(self.model, self.data)
        poses = self.joint_poses()
        self.data.qpos[:] = before
        mujoco.mj_kinematics(self.model, self.data)
        return poses


def draw_sky(rng) -> np.ndarray:
    """The sky's six faces in one or two colours, (6 SKY_TEXELS, SKY_TEXELS, 3) uint8."""
    colours = rng.uniform(0, 255, (2, 3))
    if rng.random() < 0.5:
        colours[1] = colours[0]
    mix = rng.random((6 * SKY_TEXELS, 1, 1)) < rng.random()
    picture = np.where(mix, colours[0], colours[1])
    return np.broadcast_to(picture, (6 * SKY_TEXELS, SKY_TEXELS, 3)).astype(np.uint8)


def draw_pattern(rng) -> np.ndarray:
    """A random surface, (TEXELS, TEXELS, 3) uint8: plain, gradient, stripes, tiles, or noise."""
    kind = rng.choice(
        ["plain", "gradient", "stripes", "tiles", "noise"], p=[0.25, 0.15, 0.15, 0.3, 0.15]
    )
    first = rng.uniform(0, 255, 3)
    second = rng.uniform(0, 255, 3)
    y, x = np.mgrid[0:TEXELS, 0:TEXELS] / TEXELS
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    if kind == "plain":
        mix = np.zeros_like(x)
    elif kind == "gradient":
        mix = (along - along.min()) / np.ptp(along)
    elif kind == "stripes":
        mix = (np.floor(along * rng.integers(3, 14)) % 2).astype(float)
    elif kind == "tiles":
        cells = rng.integers(2, 13, 2)
        colours = rng.uniform(0, 255, (*cells, 3))
        if rng.random() < 0.4:  # a chessboard of two colours
            odd = np.add.outer(np.arange(cells[0]), np.arange(cells[1])) % 2
            colours = np.where(odd[..., None], first, second)
        rows = (y * cells[0]).astype(int)
        columns = (x * cells[1]).astype(int)
        return colours[rows, columns].astype(np.uint8)
    else:
        mix = rng.random((TEXELS, TEXELS))
    picture = first + mix[..., None] * (second - first)
    return picture.astype(np.uint8)
