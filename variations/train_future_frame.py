"""Variation: paint the future camera pictures instead of spheres, as SuSIE does (Black et al. 2023), and follow those.

    python variations/train_future_frame.py                 trains painter and controller, into runs/demo/future_frame/
    python variations/train_future_frame.py --evaluate      drives them in 50 unseen scenes of each task

What changed against train_controlnet.py and train_act.py (the same episodes, networks, K):
  1. the painter's layer is the cameras' own pictures K steps later, opaque where they differ from the present ones;
  2. the controller sees eight pictures, the present views and the painted goals, all over their own scenes;
  3. it is trained on true futures, half of them softened, since painted ones are; there are no others to draw afresh, so present and
     goal cannot be shifted, and it has only the recorded motions to learn from.
What it gave (--painter-steps 2400, two thirds of GENIMA's): 40, 42 and 46 of 50 in reach_target, push_button and pick_and_lift, where
GENIMA has 49, 49 and 50. One step of denoising gives the mean of all futures that it thinks possible: the painted arm is soft at its
edges, a fog at first (painter/validation.png). After 900 steps of painter and controller it was 10, 0 and 3: four spheres are learned
sooner than an arm with all its edges.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import torch

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # the stages' scripts are one folder up

import loop  # noqa: E402

from genima.act import ACT, Controller  # noqa: E402
from genima.episodes import CAMERAS  # noqa: E402
from genima.files import run_stage  # noqa: E402
from genima.painter import PROMPT, Painter, build_tiny, composite, tile  # noqa: E402
from genima.plots import write_grid  # noqa: E402
from genima.policy import GenimaPolicy  # noqa: E402
from train_act import Samples, crop, losses_of  # noqa: E402
from train_controlnet import Batches, colour_jitter, find_frames, painting_loss  # noqa: E402

DIFFERENT = 0.08  # of 1: where a pixel's colour changes by more, the layer is opaque


@dataclass
class Settings(loop.Settings):
    painter_steps: int = 3600
    """Gradient steps of the painter (steps: of the controller)."""
    painter_batch: int = 8
    """Samples a step for the painter."""
    painter_learning_rate: float = 8e-4
    """Highest learning rate of the painter."""


# ------------------------------------------------------------------------------------------------------------ the painter
class Futures(Batches):
    """train_controlnet.py's batches, with future pictures for layers."""

    def __init__(self, frames, horizon, settings, augment=True):
        super().__init__(frames, settings, augment=augment)
        self.horizon = horizon

    def __getitem__(self, step):
        rngs = [np.random.default_rng([self.settings.seed, step, i]) for i in self.mine]
        chosen = [self.episodes[rng.integers(len(self.episodes))] for rng in rngs]
        return self.load(
            [frames[int(len(frames) * rng.random() ** 2)] for frames, rng in zip(chosen, rngs)],
            rngs,
        )  # early ones more often

    def load(self, chosen, rngs):
        pictures, prompts = [], []
        for (path, _, t, instructions), rng in zip(chosen, rngs):
            with h5py.File(path, "r") as root:
                later = min(t + self.horizon, len(root["action"]) - 1)
                both = np.stack(
                    [
                        np.concatenate(
                            [root[f"observations/images/{camera}"][frame] for frame in (t, later)],
                            axis=-1,
                        )
                        for camera in CAMERAS
                    ]
                )  # (4, H, W, 6): now and later
            if self.augment:  # the same crop for both
                dy, dx = rng.integers(0, 5, size=2)
                height, width = both.shape[1:3]
                both = np.pad(both, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")[
                    :, dy : dy + height, dx : dx + width
                ]
            pictures.append(
                tile(torch.from_numpy(both).permute(0, 3, 1, 2).float()[None] / 255)[0]
            )  # (6, 2H, 2W)
            prompts.append(PROMPT.format(instructions[rng.integers(len(instructions))]))
        observation, future = torch.stack(pictures).chunk(2, 1)  # (B, 3, 2H, 2W) each
        condition = colour_jitter(observation, rngs, hue=0) if self.augment else observation
        different = ((future - observation).abs().amax(1, keepdim=True) > DIFFERENT).float()
        return dict(
            condition=condition,
            observation=observation,
            layer=torch.cat([future, different], 1),
            prompts=prompts,
        )


def paint_loss(painter, batch):
    return painting_loss(
        painter(batch["condition"], batch["prompts"]), batch["layer"], batch["observation"]
    )


@torch.no_grad()
def show(painter, futures, path):
    """Observation, true and painted future at the first frames of unseen scenes."""
    firsts = [frames[0] for frames in futures.episodes]
    batch = futures.load(
        [firsts[i] for i in np.linspace(0, len(firsts) - 1, 5).astype(int)],
        [np.random.default_rng(0)] * 5,
    )
    painter.eval()
    painted = (
        painter(batch["observation"].to(painter.unet.device), batch["prompts"]).sigmoid().cpu()
    )
    future, painted = (
        composite(layer, batch["observation"]) for layer in (batch["layer"], painted)
    )
    columns = {"now": batch["observation"], "true future": future, "painted future": painted}
    write_grid(path, columns, [prompt.split("'")[1] for prompt in batch["prompts"]])


# --------------------------------------------------------------------------------------------------------- the controller
class Goals(Samples):
    """train_act.py's samples of plain views, and beside each view the one of K steps later."""

    def see(self, random, episode, t, present, target):
        """-> (2V, H, W, 3): the views now, and the views then."""
        later = min(t + self.config["horizon"], len(episode.qpos) - 1)
        views = [
            np.concatenate([episode.images[camera][frame] for frame in (t, later)], -1)
            for camera in self.config["cameras"]
        ]
        views = np.stack([crop(random, view) for view in views]).astype(np.float32)  # (V, H, W, 6)
        now, goal = views[..., :3], views[..., 3:]
        if random.random() < 0.5:  # mean of 3x3 pixels: painted goals are soft
            goal = np.pad(goal, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
            goal = (
                sum(
                    goal[:, y : y + now.shape[1], x : x + now.shape[2]]
                    for y in range(3)
                    for x in range(3)
                )
                / 9
            )
        return np.concatenate([now, goal])


class Following:
    """For evaluate.py, painter and controller in one: the controller looks at what the painter saw, too."""

    def __init__(self, painter, controller):
        self.painter, self.controller = painter, controller
        self.config = controller.config | {"cameras": painter.config["cameras"]}

    def paint(self, images, instructions):
        self.now = images
        return self.painter.paint(images, instructions)

    def __call__(self, goals, qpos, instructions=None, drop_state=False):
        goals = {f"goal_{camera}": picture for camera, picture in goals.items()}
        return self.controller(self.now | goals, qpos, drop_state=drop_state)


def future_frame(run, device):
    folder = run / "future_frame"
    following = Following(
        Painter.load(folder / "painter", device), Controller.load(folder / "controller", device)
    )
    return GenimaPolicy(following, following)


def main():
    settings = loop.settle(Settings, __doc__)
    folder = settings.run / "future_frame"
    if settings.evaluate:
        return loop.drive(future_frame, settings, folder)
    training, held_out, horizon = find_frames(settings.run)
    samples, checks, config = loop.prepare(settings, Goals, language=False)

    instructions = sorted({sentence for frame in training for sentence in frame[3]})
    size = config["image_size"][0]
    paints = dict(
        size="tiny",
        objective="one-step",
        steps=1,
        image_size=size,
        picture=2 * size,
        horizon=horizon,
        cameras=list(CAMERAS),
    )
    torch.manual_seed(settings.seed)
    painter = Painter(build_tiny(instructions, size), paints)
    its = replace(
        settings,
        steps=settings.painter_steps,
        batch=settings.painter_batch,
        learning_rate=settings.painter_learning_rate,
    )
    unseen = Futures(held_out or training, horizon, its, augment=False)
    loop.train(
        painter,
        paint_loss,
        Futures(training, horizon, its),
        unseen,
        its,
        folder / "painter",
        paints,
    )
    painter.save(folder / "painter")
    show(painter, unseen, folder / "painter/validation.png")

    sees = config | {
        "cameras": [*config["cameras"], *(f"goal_{camera}" for camera in config["cameras"])]
    }
    torch.manual_seed(settings.seed)
    loop.train(
        ACT(sees),
        lambda network, batch: losses_of(network, batch)[0],
        samples,
        checks,
        settings,
        folder / "controller",
        sees,
    )


if __name__ == "__main__":
    run_stage(main)
