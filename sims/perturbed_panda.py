"""The embedded simulator, with something changed that training never showed. Does the policy know its task, or the picture by heart?

Use:  env = PerturbedEnv("light", "push_button");  env.reset(seed=0)      or  python evaluate.py --perturb light

Paper, section 4: six perturbations, after those of Colosseum (arXiv 2402.08191). Nothing but the pictures changes: the same seed has
the same objects at the same places, and the same instruction.
"""

import mujoco
import numpy as np

from sims.mujoco_panda import PandaEnv
from sims.mujoco_tasks import PAINTED, add_box, rotation_from

PERTURBATIONS = ("colours", "distractors", "light", "background", "table", "camera")
TILES = {
    "background": ((3, 3), -0.788, (0, 0)),
    "table": ((0.6, 0.8), 0, (0.4, 0)),
}  # half sizes, height and middle of what is tiled, m
GRID = 8  # tiles a side


class PerturbedEnv(PandaEnv):
    """PandaEnv, looking different in every episode. kind:

    colours      every object in another shade, each channel by up to 0.15 (of 1): blue stays blue
    distractors  four blocks of any colour on the table, beside where the task's objects lie
    light        another strength and colour: each channel 0.5 to 1.3 times as much
    background   the floor around the table in 8x8 tiles of random colours
    table        the table's top, likewise
    camera       every camera moved by up to 3 cm along each axis, and turned by up to 3 degrees about each
    """

    def __init__(self, kind, *arguments, **named):
        self.kind = kind
        super().__init__(*arguments, **named)
        model = self.model
        self.changeable = (
            model.geom_rgba,
            model.cam_pos,
            model.cam_quat,
            model.light_diffuse,
            model.vis.headlight.ambient,
            model.vis.headlight.diffuse,
        )
        self.usual = [values.copy() for values in self.changeable]

    def build(self):
        spec = super().build()
        world = spec.worldbody
        if self.kind in TILES:
            half, height, middle = TILES[self.kind]
            for i, j in np.ndindex(GRID, GRID):
                x, y = middle + half * ((2 * np.array([i, j]) + 1) / GRID - 1)
                add_box(
                    world,
                    f"changed{i}{j}",
                    (half[0] / GRID, half[1] / GRID, 0.0005),
                    (x, y, height),
                    **PAINTED,
                )
        for i in range(4 * (self.kind == "distractors")):
            add_box(
                world.add_body(name=f"distractor{i}"),
                f"changed{i}",
                (0.025, 0.025, 0.025),
                **PAINTED,
            )
        return spec

    def reset(self, *, seed=None, options=None):
        model = self.model
        for values, usual in zip(self.changeable, self.usual):
            values[:] = usual
        _, info = super().reset(seed=seed, options=options)
        rng, names = (
            np.random.default_rng([self.seed, 3]),
            [model.geom(i).name for i in range(model.ngeom)],
        )
        changed = [i for i, name in enumerate(names) if name.startswith("changed")]
        model.geom_rgba[changed, :3] = rng.random((len(changed), 3))
        if self.kind == "colours":
            objects = [
                i
                for i, name in enumerate(names)
                if model.geom_group[i] == 0 and name not in ("table", "backdrop")
            ]
            model.geom_rgba[objects, :3] = np.clip(
                model.geom_rgba[objects, :3] + rng.uniform(-0.15, 0.15, (len(objects), 3)), 0, 1
            )
        elif self.kind == "distractors":
            for i in range(4):
                model.body(f"distractor{i}").pos[:] = (
                    rng.uniform(0.3, 0.7),
                    (-1) ** i * rng.uniform(0.32, 0.42),
                    0.025,
                )
        elif self.kind == "light":
            strength = rng.uniform(0.5, 1.3, 3)
            for light in self.changeable[3:]:
                light *= strength
        elif self.kind == "camera":
            model.cam_pos += rng.uniform(-0.03, 0.03, model.cam_pos.shape)
            for quaternion, turn in zip(
                model.cam_quat, np.deg2rad(rng.uniform(-3, 3, model.cam_pos.shape))
            ):
                matrix = np.zeros(9)
                mujoco.mju_quat2Mat(matrix, quaternion)
                mujoco.mju_mat2Quat(
                    quaternion, (matrix.reshape(3, 3) @ rotation_from(turn)).ravel()
                )
        mujoco.mj_forward(model, self.data)
        return self.observe(), info
