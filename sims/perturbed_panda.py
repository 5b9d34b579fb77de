"""The embedded simulator, with something changed that training never showed.

    env = PerturbedEnv("light", "push_button")
    env.reset(seed=0)
    python evaluate.py --perturb light

Does the policy know its task, or the images by heart? Paper, section 4: six perturbations, after
those of Colosseum (arXiv 2402.08191). Nothing but the images changes: the same seed has the same
objects at the same places, and the same instruction.
"""

import mujoco
import numpy as np

from sims.mujoco_panda import SKY_TEXELS, PandaEnv
from sims.mujoco_tasks import PAINTED, add_box, rotation_from

PERTURBATIONS = ("colours", "distractors", "light", "background", "table", "camera")
# What is tiled: half sizes (x, y), height and middle (x, y), metres.
TILED = {
    "background": ((3, 3), -0.788, (0, 0)),
    "table": ((0.6, 0.8), 0, (0.4, 0)),
}
TILES = 8  # along each side
DISTRACTORS = 4


class PerturbedEnv(PandaEnv):
    """PandaEnv, looking different in every episode.

    kind:
    colours      every object in another shade, each channel by up to 0.15 (of 1): blue stays blue
    distractors  four blocks of any colour on the table, beside where the task's objects lie
    light        another strength and colour: each channel 0.5 to 1.3 times as much
    background   the floor around the table in 8x8 tiles of random colours
    table        the table's top, likewise
    camera       every camera moved by up to 3 cm along each axis, and turned by up to 3 degrees
                 about each
    """

    def __init__(self, kind, *arguments, **named):
        self.kind = kind
        super().__init__(*arguments, **named)
        model = self.model
        self.lights = [
            model.light_diffuse,
            model.vis.headlight.ambient,
            model.vis.headlight.diffuse,
        ]
        self.changeable = [model.geom_rgba, model.cam_pos, model.cam_quat, *self.lights]
        self.usual = [values.copy() for values in self.changeable]
        names = [model.geom(i).name for i in range(model.ngeom)]
        self.added = [i for i, name in enumerate(names) if name.startswith("added")]
        self.objects = [
            i
            for i, name in enumerate(names)
            if model.geom_group[i] == 0 and name not in ("table", "backdrop")
        ]

    def build(self):
        spec = super().build()
        if self.kind in TILED:
            add_tiles(spec.worldbody, *TILED[self.kind])
        if self.kind == "distractors":
            for i in range(DISTRACTORS):
                body = spec.worldbody.add_body(name=f"distractor{i}")
                add_box(body, f"added{i}", (0.025, 0.025, 0.025), **PAINTED)
        return spec

    def reset(self, *, seed=None, options=None):
        for values, usual in zip(self.changeable, self.usual):
            values[:] = usual
        _, info = super().reset(seed=seed, options=options)
        self.perturb(np.random.default_rng([self.seed, 3]))
        mujoco.mj_forward(self.model, self.data)
        return self.observe(), info

    def perturb(self, rng):
        """Change how the scene looks."""
        model = self.model
        model.geom_rgba[self.added, :3] = rng.random((len(self.added), 3))
        if self.kind == "background":
            sky = np.full((6 * SKY_TEXELS, SKY_TEXELS, 3), 255 * rng.random(3), np.uint8)
            self.set_texture("sky", sky)
        if self.kind == "colours":
            shades = rng.uniform(-0.15, 0.15, (len(self.objects), 3))
            colours = model.geom_rgba[self.objects, :3] + shades
            model.geom_rgba[self.objects, :3] = np.clip(colours, 0, 1)
        elif self.kind == "distractors":
            for i in range(DISTRACTORS):
                x = rng.uniform(0.3, 0.7)
                y = (-1) ** i * rng.uniform(0.32, 0.42)  # left and right of the task's objects
                model.body(f"distractor{i}").pos[:] = x, y, 0.025
        elif self.kind == "light":
            strength = rng.uniform(0.5, 1.3, 3)
            for light in self.lights:
                light *= strength
        elif self.kind == "camera":
            model.cam_pos += rng.uniform(-0.03, 0.03, model.cam_pos.shape)
            turns = np.deg2rad(rng.uniform(-3, 3, model.cam_pos.shape))
            for quaternion, turn in zip(model.cam_quat, turns):
                rotate(quaternion, turn)


def add_tiles(world, half_size, height, middle):
    """Lay TILES x TILES thin boxes over a rectangle."""
    half_size = np.array(half_size)
    tile_size = (half_size[0] / TILES, half_size[1] / TILES, 0.0005)
    for i, j in np.ndindex(TILES, TILES):
        x, y = middle + half_size * ((2 * np.array([i, j]) + 1) / TILES - 1)
        add_box(world, f"added{i}{j}", tile_size, (x, y, height), **PAINTED)


def rotate(quaternion, turn):
    """Turn a quaternion (4,) by an axis times an angle (3,) of its own frame, in place."""
    matrix = np.zeros(9)
    mujoco.mju_quat2Mat(matrix, quaternion)
    turned = matrix.reshape(3, 3) @ rotation_from(turn)
    mujoco.mju_mat2Quat(quaternion, turned.ravel())
