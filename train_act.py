"""Stage 3: train the controller: ACT (Action Chunking with Transformers) learns to follow the spheres.

In:   runs/demo/episodes/<task>/<name>.hdf5     (collect_demos.py)
      runs/demo/spheres/<task>/<name>.hdf5      (render_spheres.py: targets and horizon K; the spheres are drawn afresh here)
Out:  runs/demo/act/config.json, model.safetensors        for Controller.load
                    training.pt, losses.csv, losses.png   to go on after a stop, and to look at

    python train_act.py                                   the tiny network, on a laptop
    python train_act.py --observation rgb                 the ACT baseline, into act_rgb/: the same network on plain views
    accelerate launch train_act.py --size sd-turbo        the paper's network, on any number of GPUs

Paper, section 3.2: the controller sees pictures with spheres and the joints, and gives the next K joint positions. It is
trained on spheres over random backgrounds, never over their own scene, so that all it can do is to follow spheres.
"""

import json
import math
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from genima.act import ACT, LATENT, SIZES, words_in
from genima.episodes import CAMERAS, check_alike, find_episodes, read_episode
from genima.files import UserError, read_hdf5, run_stage, write_whole
from genima.kinematics import Chain
from genima.parallel import ignore_interrupt
from genima.plots import write_losses
from genima.spheres import FORMAT as SPHERES_FORMAT
from genima.spheres import draw_spheres, target_spheres
from genima.training import keep_last, read_checkpoint


@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """Folder of the run; episodes/ and spheres/ inside it are read, act/ (for rgb: act_rgb/) is written."""
    size: Literal["tiny", "sd-turbo"] = "tiny"
    """tiny: a narrow network for a laptop; sd-turbo: the paper's, to go with the SD-Turbo painter."""
    observation: Literal["spheres", "rgb"] = "spheres"
    """spheres: GENIMA's controller; rgb: plain views and the instruction, which is the ACT baseline."""
    steps: int = 1800
    """Gradient steps; the learning rate falls to zero over them."""
    batch: int = 32
    """Samples a step, shared among all processes: with more of them the same training takes less time."""
    learning_rate: float | None = None
    """Highest learning rate; by default 1e-3 for tiny, 5e-5 for sd-turbo (published code)."""
    seed: int = 0
    """Seed of the weights, the samples and the noise."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    keep: int = 0
    """How many of the last checkpoints to keep in act/step-<N>/ (the paper evaluates the last three)."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to train; auto takes a GPU where there is one."""


KL_WEIGHT = 10  # of the CVAE (ACT)
GRIPPER_WEIGHT = 0.1  # paper 0.05; heavier, or the gripper's rare changes drown in the joints
STATE_DROPOUT = 0.3  # paper; here of the whole state at once, or the controller continues its path without looking
PRESENT_NOISE, TARGET_NOISE = (
    (0, 0.02, 0.05),
    (0, 0.01, 0.02),
)  # rad; standard deviations, one drawn per sample: see Samples.move
TOWARDS = (0, 0.15, 0.4)  # and how far at most it goes towards another demonstration
PAINTER_ERROR = 0.5  # pixels: see Samples.draw
SCENES, SCENE_SHARE = (
    300,
    0.75,
)  # frames kept as backgrounds, and how often they are; the other backgrounds are textures
OPACITY, NOISE, CROP = (
    (0.7, 1.0),
    5,
    4 / 128,
)  # paper: of the spheres; of 255; of the picture's height
JITTER = np.array([0.2, 0.2, 0.1, 0.05])  # paper: brightness, contrast, saturation, hue
VALIDATE_EVERY = 250  # steps


def read_run(settings):
    """-> episodes, each with its `target` (T, D+1) and `chain`, and K. Pictures: all for rgb, or some to serve as backgrounds."""
    paths, episodes, rgb = (
        find_episodes(settings.run / "episodes"),
        [],
        settings.observation == "rgb",
    )
    scenes, random = (
        set(np.linspace(0, len(paths) - 1, SCENES).astype(int).tolist()),
        np.random.default_rng(settings.seed),
    )
    for i, path in enumerate(tqdm(paths, desc="reading", unit="episode", leave=False)):
        episode = read_episode(path, images=rgb or i in scenes)
        check_alike(episode, episodes[0] if episodes else episode)
        if episode.images and not rgb:
            t = random.integers(len(episode.qpos))
            episode.images = {
                camera: images[t : t + 1].copy() for camera, images in episode.images.items()
            }
        spheres = settings.run / "spheres" / path.parent.name / path.name
        if not spheres.exists():
            raise UserError(
                f"{spheres} is missing: run render_spheres.py --run {settings.run} first."
            )
        with read_hdf5(spheres, SPHERES_FORMAT) as root:
            episode.target, episode.horizon = root["target/qpos"][()], int(root.attrs["horizon"])
            for camera, measured in root.get(
                "cameras", {}
            ).items():  # render_spheres.py --calibration
                episode.intrinsics[camera], episode.extrinsics[camera] = (
                    measured["intrinsics"][()],
                    measured["extrinsics"][()],
                )
        episode.chain = Chain.from_episode(episode)
        episodes.append(episode)
        if episode.target.shape != episode.qpos.shape or episode.horizon != episodes[0].horizon:
            raise UserError(
                f"{spheres} was drawn for another episode or horizon: delete {settings.run / 'spheres'} and draw all again."
            )
    if len(set(episode.image_sizes.values())) > 1:
        raise UserError(
            f"{path} has cameras of different image sizes {episode.image_sizes}: record all with one size."
        )
    return episodes, episode.horizon


class Samples(Dataset):
    """The batch of each step. Sample i of step s is a pure function of (seed, s, i): to resume, nothing need be remembered."""

    def __init__(self, episodes, all_episodes, config, settings, process=0, processes=1):
        self.config, self.seed, share = config, settings.seed, settings.batch // processes
        self.mine = range(
            process * share, (process + 1) * share
        )  # which samples of each step are this process's
        self.frames = [(episode, t) for episode in episodes for t in range(len(episode.qpos))]
        self.scenes = [episode.images for episode in all_episodes if episode.images]
        joints = np.concatenate([episode.qpos[:, :-1] for episode in all_episodes])
        self.low, self.high = joints.min(0) - 0.1, joints.max(0) + 0.1  # rad

    def __getitem__(self, step):
        return default_collate(
            [self.sample(np.random.default_rng((self.seed, step, i))) for i in self.mine]
        )

    def motion(self, random):
        """A random moment -> episode, t, present (D+1,), target (D+1,), chunk (K, D+1) of actions, valid (K,).

        For spheres, the present joints are shifted by delta and the target by epsilon, and the chunk leads from one to the
        other. So data never ends, the controller learns to correct errors, and the joints don't tell where the spheres are.
        """
        episode, t = self.frames[random.integers(len(self.frames))]
        present, target, k = (
            episode.qpos[t].copy(),
            episode.target[t].copy(),
            np.arange(1, self.config["horizon"] + 1),
        )
        chunk = episode.action[np.minimum(t + k - 1, len(episode.action) - 1)].copy()  # (K, D+1)
        if self.config["observation"] == "spheres":
            delta = self.move(random, present, "qpos", PRESENT_NOISE)
            epsilon = self.move(random, target, "target", TARGET_NOISE)
            u = (k / len(k))[:, None]  # (K, 1)
            chunk[:, :-1] += delta * (1 - u) + epsilon * u
        return episode, t, present, target, chunk, t + k - 1 < len(episode.action)

    def move(self, random, q, name, noise):
        """Move q (D+1,) part of the way to a moment of another demonstration, and a little at random; -> by how much (D,).

        Not at random alone: four spheres tell the postures that the arm has from one another, but not all that it could have.
        """
        (episode, t), before = self.frames[random.integers(len(self.frames))], q[:-1].copy()
        there = random.random() * random.choice(TOWARDS) * (getattr(episode, name)[t, :-1] - before)
        q[:-1] = np.clip(
            before + there + random.choice(noise) * random.normal(size=len(there)),
            self.low,
            self.high,
        )
        return q[:-1] - before

    def sample(self, random):
        config, (episode, t, present, target, chunk, valid) = self.config, self.motion(random)
        pictures = self.see(random, episode, t, present, target)
        state, texts = present.copy(), [episode.instruction, *episode.instructions]
        if (
            random.random() < 0.5
        ):  # or the gripper goes on doing what it does, whatever the spheres' colour ("copycat")
            state[-1] = random.random()
        words = words_in(texts[random.integers(len(texts))])
        return dict(
            pictures=jitter(random, pictures).transpose(0, 3, 1, 2),  # (V, 3, H, W) uint8
            state=((state - config["state_mean"]) / config["state_std"]).astype(
                np.float32
            ),  # (D+1,)
            state_given=np.array(random.random() >= STATE_DROPOUT),  # ()
            joints=((chunk - present) / config["state_std"])[:, :-1].astype(
                np.float32
            ),  # (K, D) relative to the present
            gripper=chunk[:, -1].astype(np.float32),  # (K,)
            valid=valid.astype(np.float32),  # (K,) 0 after the episode's end
            words=np.array(
                [word in words for word in config["vocabulary"]], np.float32
            ),  # (W,); W = 0 for spheres
            noise=random.standard_normal(LATENT, np.float32),  # (LATENT,) of the CVAE
        )

    def see(self, random, episode, t, present, target):
        """The controller's pictures (V, H, W, 3), 0..255: the target's spheres over anything else, or the plain views."""
        if self.config["observation"] == "spheres":
            return self.blend(random, self.draw(random, episode, present, target))
        return np.stack(
            [crop(random, episode.images[camera][t]) for camera in self.config["cameras"]]
        ).astype(np.float32)

    def draw(self, random, episode, present, target):
        """The target's spheres as the cameras see them from the present joints: layers (V, H, W, 4) uint8.

        Each sphere is a little off in each view, as a painter has it; the errors of two views are independent, so that the
        controller learns to trust the nearest. (For the paper's elastic distortion and crop, which at 64x64 move spheres by cm.)
        """
        layers, (now, later) = (
            [],
            episode.chain.forward_kinematics(np.stack([present[:-1], target[:-1]])),
        )  # (J, 4, 4) each
        for camera in self.config["cameras"]:
            poses, radii, colours = target_spheres(
                later, target[-1] > 0.5, camera
            )  # (S, 4, 4), (S,), (S, 3)
            intrinsics, world_from_camera = (
                episode.intrinsics[camera],
                episode.chain.camera_pose(camera, now),
            )
            depth = (poses[:, :3, 3] - world_from_camera[:3, 3]) @ world_from_camera[:3, 2]  # (S,)
            error = (
                random.normal(0, PAINTER_ERROR, (len(poses), 2))
                * depth[:, None]
                / intrinsics[[0, 1], [0, 1]]
            )  # (S, 2) metres
            poses[:, :3, 3] += error @ world_from_camera[:3, :2].T
            layers.append(
                draw_spheres(
                    poses, radii, colours, intrinsics, world_from_camera, *self.config["image_size"]
                )
            )
        return np.stack(layers)

    def blend(self, random, layers):
        """Layers (V, H, W, 4) uint8, faded and half the time softened, over an unrelated scene or textures: (V, H, W, 3)."""
        alpha = layers[..., 3:] * np.float32(random.uniform(*OPACITY) / 255)
        paint = np.concatenate(
            [layers[..., :3] * alpha, alpha], -1
        )  # (V, H, W, 4), colour times alpha
        if random.random() < 0.5:  # mean of 3x3 pixels
            paint = np.pad(paint, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
            paint = (paint[:, :-2] + paint[:, 1:-1] + paint[:, 2:]) / 3
            paint = (paint[:, :, :-2] + paint[:, :, 1:-1] + paint[:, :, 2:]) / 3
        if random.random() < SCENE_SHARE:
            scene = self.scenes[random.integers(len(self.scenes))]
            background = np.stack([scene[camera][0] for camera in self.config["cameras"]])
        else:
            background = np.stack([texture(random, *layers.shape[1:3]) for _ in layers])
        return paint[..., :3] + (1 - paint[..., 3:]) * background


def texture(random, height, width):
    """A random picture (H, W, 3): colour noise from large to small, with rectangles and ellipses on it."""
    picture, weights = (
        random.uniform(0, 255, 3) * random.uniform(0, 0.7),
        random.dirichlet((1, 0.6, 0.3)) * random.uniform(0.3, 1),
    )
    for cells, weight in zip((2, random.integers(3, 9), random.integers(9, 33)), weights):
        noise = Image.fromarray(random.integers(0, 256, (cells, cells, 3), np.uint8))
        picture = picture + weight * np.asarray(
            noise.resize((width, height), Image.Resampling.BICUBIC)
        )
    for _ in range(random.integers(6)):
        x = np.abs(np.arange(width) - random.uniform(0, width)) / random.uniform(
            2, width / 3
        )  # (W,)
        y = np.abs(np.arange(height) - random.uniform(0, height))[:, None] / random.uniform(
            2, height / 3
        )  # (H, 1)
        picture[np.maximum(x, y) < 1 if random.random() < 0.5 else x * x + y * y < 1] = (
            random.uniform(0, 255, 3)
        )
    return np.minimum(picture, 255)


def crop(random, picture):
    """Move a picture (H, W, 3) by a few pixels, repeating its edge."""
    height, width, pad = *picture.shape[:2], max(1, round(len(picture) * CROP))
    top, left = random.integers(2 * pad + 1, size=2)
    return np.pad(picture, ((pad, pad), (pad, pad), (0, 0)), mode="edge")[
        top : top + height, left : left + width
    ]


def jitter(random, pictures):
    """Brightness, contrast, saturation and hue, all in one 3x3 matrix, and noise: (V, H, W, 3), 0..255 -> uint8."""
    brightness, contrast, saturation, hue = random.uniform(-JITTER, JITTER) + [1, 1, 1, 0]
    grey, cross = (
        np.full((3, 3), 1 / 3),
        np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]]) / np.sqrt(3),
    )
    turn = (
        grey + np.cos(2 * np.pi * hue) * (np.eye(3) - grey) + np.sin(2 * np.pi * hue) * cross
    )  # about the axis of greys
    matrix = brightness * contrast * turn @ (saturation * np.eye(3) + (1 - saturation) * grey)
    offset = (
        brightness * (1 - contrast) * pictures.mean((1, 2, 3), keepdims=True) + 0.5
    )  # (V, 1, 1, 1)
    noise = random.standard_normal(pictures.shape, np.float32) * NOISE
    return np.clip(
        pictures.astype(np.float32) @ matrix.astype(np.float32) + offset.astype(np.float32) + noise,
        0,
        255,
    ).astype(np.uint8)


def losses_of(model, batch):
    """-> the loss to minimise, and its parts."""
    joints, gripper, mean, log_variance = model(**batch)
    # Masked steps count as zeros (ACT), so that the mean over a batch is the mean over its parts in several processes.
    average = lambda values: (values * batch["valid"]).mean()  # noqa: E731  (B, K) -> ()
    parts = dict(
        joints=average((joints - batch["joints"]).abs().mean(-1)),
        gripper=average(
            F.binary_cross_entropy_with_logits(gripper, batch["gripper"], reduction="none")
        ),
        kl=-0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(-1).mean(),
    )
    return parts["joints"] + GRIPPER_WEIGHT * parts["gripper"] + KL_WEIGHT * parts["kl"], parts


@torch.inference_mode()
def validate(model, batches, state_std):
    """Mean error (rad) over all steps, at the last step, and over all steps without the state; how often the gripper is right."""
    model.eval()
    found = []
    for batch in batches:
        for given in (True, False):
            joints, gripper, *_ = model(
                batch["pictures"],
                batch["state"],
                torch.full_like(batch["state_given"], given),
                batch["words"],
            )
            error = ((joints - batch["joints"]).abs() * state_std[:-1]).mean(-1)  # (B, K) rad
            found.append(
                (error, ((gripper > 0) == (batch["gripper"] > 0.5)).float(), batch["valid"])
            )
    model.train()
    (error, right, valid), (without, _, _) = (
        [torch.cat(column) for column in zip(*found[i::2])] for i in (0, 1)
    )  # (N, K) each
    average = lambda values, valid: ((values * valid).sum() / valid.sum().clamp(min=1)).item()  # noqa: E731
    return [
        average(error, valid),
        average(error[:, -1], valid[:, -1]),
        average(without, valid),
        average(right, valid),
    ]


COLUMNS = (
    "step",
    "loss",
    "joints",
    "gripper",
    "kl",
    "error",
    "error_last",
    "error_without_state",
    "gripper_right",
)


def save(folder, checkpoint, config):
    """Write the network, what is needed to go on, and the curves: checkpoint["history"] has rows of COLUMNS, most without the last 4."""
    with write_whole(folder / "config.json") as path:
        path.write_text(json.dumps(config, indent=1))
    with write_whole(folder / "model.safetensors") as path:
        save_file(checkpoint["model"], path)
    write_losses(
        folder,
        COLUMNS,
        checkpoint["history"],
        ["joints", "gripper", "kl"],
        ["error", "error_last", "error_without_state"],
        "error, rad",
    )
    with write_whole(folder / "training.pt") as path:  # last: what it says is done, is done
        torch.save(checkpoint, path)


def main():
    settings = tyro.cli(Settings, description=__doc__)
    if min(settings.steps, settings.batch, settings.checkpoint_every) < 1 or settings.keep < 0:
        raise UserError(
            "--steps, --batch and --checkpoint-every must be 1 or more, and --keep 0 or more."
        )
    accelerator = Accelerator(cpu=settings.device == "cpu")
    if settings.device not in ("auto", accelerator.device.type):
        raise UserError(f"There is no {settings.device} device here: use --device auto.")
    if settings.batch % accelerator.num_processes:
        raise UserError(
            f"--batch {settings.batch} cannot be shared equally among {accelerator.num_processes} processes: give a multiple of it."
        )
    device, folder = (
        accelerator.device,
        settings.run / ("act" if settings.observation == "spheres" else "act_rgb"),
    )
    episodes, horizon = read_run(settings)
    scenes = sorted({(episode.task, episode.seed) for episode in episodes})
    held_out = set(
        scenes[9::20] or scenes[1:][-1:]
    )  # every 20th scene, with all that was recorded in it
    training = [episode for episode in episodes if (episode.task, episode.seed) not in held_out]
    unseen = [
        episode for episode in episodes if (episode.task, episode.seed) in held_out
    ] or training

    vocabulary = {
        word
        for episode in episodes
        for text in (episode.instruction, *episode.instructions)
        for word in words_in(text)
    }
    config = dict(
        size=settings.size,
        observation=settings.observation,
        horizon=horizon,
        joints=episodes[0].qpos.shape[1] - 1,
        cameras=sorted(episodes[0].image_sizes, key=lambda name: (*CAMERAS, name).index(name)),
        image_size=list(next(iter(episodes[0].image_sizes.values()))),
        vocabulary=sorted(vocabulary) if settings.observation == "rgb" else [],
    )
    learning_rate = settings.learning_rate or SIZES[settings.size]["learning_rate"]
    identity = dict(
        config,
        steps=settings.steps,
        batch=settings.batch,
        learning_rate=learning_rate,
        seed=settings.seed,
        episodes=len(episodes),
        frames=sum(len(episode.qpos) for episode in episodes),
    )
    checkpoint = read_checkpoint(folder / "training.pt", identity)
    start, history = (checkpoint["step"], checkpoint["history"]) if checkpoint else (0, [])
    if start == settings.steps:
        print(f"{folder} is trained already, {start} steps.")
        return

    samples = Samples(
        training, episodes, config, settings, accelerator.process_index, accelerator.num_processes
    )
    present = np.stack(
        [samples.motion(np.random.default_rng((settings.seed, i)))[2] for i in range(2000)]
    )  # (2000, D+1)
    config.update(state_mean=present.mean(0).tolist(), state_std=(present.std(0) + 1e-3).tolist())
    torch.manual_seed(settings.seed)
    network = ACT(config).to(device)
    optimizer = torch.optim.AdamW(
        network.parameters(), learning_rate, weight_decay=1e-4
    )  # weight decay: ACT
    if checkpoint:
        network.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    model, optimizer = accelerator.prepare(network, optimizer)
    on_device = lambda batch: {
        key: value.to(device, non_blocking=True) for key, value in batch.items()
    }  # noqa: E731
    if accelerator.is_main_process:
        checks = Samples(unseen, episodes, config, settings)
        checks = [on_device(checks[settings.steps + i]) for i in range(6)]
        print(
            f"{len(training)} episodes to train on, {len(unseen)} held out, {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M "
            f"parameters, on {accelerator.num_processes} processes ({device.type})."
        )

    stopping = []  # Ctrl-C ends the training after the step it is in, a second one at once
    signal.signal(
        signal.SIGINT,
        lambda *_: (
            stopping.append(True) or signal.signal(signal.SIGINT, signal.default_int_handler)
        ),
    )
    batches = DataLoader(
        samples,
        batch_size=None,
        sampler=range(start, settings.steps),
        num_workers=2,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_interrupt,
    )
    bar = tqdm(
        batches,
        desc="controller",
        unit="step",
        initial=start,
        total=settings.steps,
        disable=not accelerator.is_main_process,
    )
    for step, batch in enumerate(bar, start):
        torch.manual_seed(
            int(
                np.random.SeedSequence(
                    (settings.seed, step, accelerator.process_index)
                ).generate_state(1)[0]
            )
        )
        for group in optimizer.param_groups:  # a short warm-up, and half a cosine down to zero
            group["lr"] = (
                learning_rate
                * min(1, (step + 1) / 100)
                * (1 + math.cos(math.pi * step / settings.steps))
                / 2
            )
        loss, parts = losses_of(model, on_device(batch))
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        done, stop = step + 1, len(stopping)
        if (
            accelerator.num_processes > 1
        ):  # the loss is of the whole batch, and all stop at the same step
            loss, stop = accelerator.reduce(
                torch.stack([loss.detach(), torch.full_like(loss, stop)]), "mean"
            )
        if accelerator.is_main_process:
            history.append([step, loss.item(), *(value.item() for value in parts.values())])
            bar.set_postfix(
                {name: f"{value:.3f}" for name, value in zip(COLUMNS[1:], history[-1][1:])},
                refresh=False,
            )
            if done % VALIDATE_EVERY == 0 or done == settings.steps:
                history[-1] += validate(
                    network, checks, torch.tensor(config["state_std"], device=device)
                )
            if done % settings.checkpoint_every == 0 or done == settings.steps or stop > 0:
                save(
                    folder,
                    dict(
                        model=network.state_dict(),
                        optimizer=optimizer.state_dict(),
                        step=done,
                        identity=identity,
                        history=history,
                    ),
                    config,
                )
                keep_last(folder, ["config.json", "model.safetensors"], done, settings.keep)
        if stop > 0 and done < settings.steps:
            print(
                f"\nStopped after step {done}: the same command goes on from there.",
                file=sys.stderr,
            )
            sys.exit(130)
    if accelerator.is_main_process:
        error, error_last, _, right = history[-1][-4:]
        print(
            f"{folder}: error on held-out episodes {error:.4f} rad, at the last step {error_last:.4f} rad; gripper right {right:.1%}."
        )


if __name__ == "__main__":
    run_stage(main)
