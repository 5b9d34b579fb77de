"""Stage 3: train the controller: ACT (Action Chunking with Transformers) learns to follow spheres.

    In:   runs/demo/episodes/<task>/<name>.hdf5   collect_demos.py
          runs/demo/spheres/<task>/<name>.hdf5    render_spheres.py: targets, horizon K
    Out:  runs/demo/act/    (or --out) config.json, model.safetensors: for Controller.load
                            losses.csv, losses.png; training.pt, to resume

    python train_act.py                             the tiny network, on a laptop
    python train_act.py --observation rgb           the ACT baseline: plain views; into act_rgb/
    accelerate launch train_act.py --size sd-turbo  the paper's network, on any number of GPUs

Paper, section 3.2: the controller sees images with spheres and the current joints, and predicts the
next K joint positions. It is trained on spheres over random backgrounds: textures, or the views
of any scene, so all that it can learn is to follow spheres. `Samples` makes its data: a motion
(genima/motions.py), the target's spheres, and what is behind them (genima/textures.py).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import send_to_device
from numpy.random import Generator
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.data import Dataset, default_collate
from tqdm import tqdm

from genima import training
from genima.act import ACT, SIZES, make_bag_of_words, save_controller
from genima.act_training import check_settings, fill_in_defaults, validate
from genima.base import load_controller_base, start_from
from genima.demonstrations import describe, describe_held_out, read_demonstrations, split_scenes
from genima.files import run_stage
from genima.motions import Motion, Motions, misplace_camera
from genima.painter_training import choose_precision
from genima.plots import write_losses
from genima.spheres import draw_spheres, target_spheres
from genima.textures import fade_and_soften, jitter_and_add_noise, random_background, random_crop


@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """Folder of the run: reads episodes/ and spheres/."""
    out: Path | None = None
    """Folder of the trained controller; by default act/ (for rgb: act_rgb/) in the run."""
    size: Literal["tiny", "sd-turbo"] = "tiny"
    """tiny: a narrow network, for a laptop; sd-turbo: the paper's."""
    observation: Literal["spheres", "rgb"] = "spheres"
    """spheres: GENIMA's controller; rgb: the ACT baseline on plain views and the instruction."""
    base: str | None = None
    """A controller to start from, or none: random weights. By default for spheres the shipped one,
    which has followed random motions, where its cameras and joints are those of the data."""
    steps: int | None = None
    """Gradient steps, 400 from a base, else 2400; the learning rate falls to zero over them."""
    batch_size: int = 32
    """Samples per step, shared among all processes."""
    learning_rate: float | None = None
    """Highest learning rate; by default 1e-3 for tiny, 3e-4 from a base, 5e-5 for sd-turbo
    (published code)."""
    failed: bool = False
    """Also train on demonstrations that failed."""
    seed: int = 0
    """Seed of the weights, the samples and the noise."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    keep: int = 0
    """How many of the last checkpoints to keep in act/step-<N>/ (the paper evaluates three)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 for tiny on a CPU that is faster with it, fp32 elsewhere."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to train; auto takes a GPU if there is one."""


KL_WEIGHT = 10  # ACT
GRIPPER_WEIGHT = 0.1  # paper 0.05; higher, because a gripper changes in few steps
WEIGHT_DECAY = 1e-4  # ACT
GRADIENT_CLIP = 1.0
# The paper drops numbers of the state. Here the whole state is hidden in 30 % of the samples:
# otherwise the controller continues its path without looking at the spheres.
STATE_DROPOUT = 0.3
PAINTER_ERROR = 0.5  # pixels, standard deviation: see draw_target
PAINTER_LAG = 0.5  # of the samples of an arm with a single camera in the room: see draw_target
CAMERAS_MOVED = 0.3  # of the samples: all cameras are a little off, see misplace_camera
VALIDATE_EVERY = 250  # steps
VALIDATION_BATCHES = 6
FOLDERS = {"spheres": "act", "rgb": "act_rgb"}
FILES = ["config.json", "model.safetensors"]  # of a trained controller
# Columns of losses.csv: on training samples, and on held-out scenes (genima/act_training.py).
TRAINING_COLUMNS = ["joints", "gripper", "kl"]
VALIDATION_COLUMNS = ["error", "error_last", "error_without_state", "gripper_right"]
COLUMNS = ["step", "loss", *TRAINING_COLUMNS, *VALIDATION_COLUMNS]


# ---------------------------------------------------------------- what the controller is trained on
class Samples(Dataset):
    """Item i is batch i, or this process's share of it.

    A sample is a function of the seed, i and its place in the batch alone, however often training
    is resumed and however many processes share it.
    """

    def __init__(self, motions, scenes, config, settings, process=0, processes=1):
        """scenes: a list of {camera: images (1, H, W, 3)}; config: the network's."""
        self.motions = motions
        self.scenes = scenes
        self.config = config
        self.seed = settings.seed
        share = settings.batch_size // processes
        self.places = range(process * share, (process + 1) * share)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        rngs = [np.random.default_rng((self.seed, i, place)) for place in self.places]
        return default_collate([self.sample(rng) for rng in rngs])

    def sample(self, rng: Generator) -> dict[str, np.ndarray]:
        """One sample: the arguments of ACT.forward."""
        config = self.config
        motion = self.motions.draw(rng)
        demonstration = motion.demonstration
        if config["observation"] == "spheres":
            spheres = self.draw_target(rng, motion)  # (V, H, W, 4) uint8
            spheres = fade_and_soften(rng, spheres)  # colour times alpha, and alpha
            background = random_background(rng, self.scenes, config)  # (V, H, W, 3)
            images = spheres[..., :3] + (1 - spheres[..., 3:]) * background
        else:
            views = [demonstration.images[camera][motion.t] for camera in config["cameras"]]
            images = np.stack([random_crop(rng, view) for view in views]).astype(np.float32)

        # Half the time the gripper's state is random: otherwise the gripper continues what it
        # does, whatever the sphere's colour says ("copycat").
        state = motion.current.copy()
        if rng.random() < 0.5:
            state[-1] = rng.random()
        state = (state - config["state_mean"]) / config["state_std"]

        # Joints relative to the current ones, the gripper as it is.
        actions = (motion.actions - motion.current) / config["state_std"]
        actions[:, -1] = motion.actions[:, -1]

        texts = demonstration.texts()
        text = texts[rng.integers(len(texts))]
        images = jitter_and_add_noise(rng, images)
        latent = SIZES[config["size"]]["latent"]
        return {
            "images": images.transpose(0, 3, 1, 2),  # (V, 3, H, W) uint8
            "state": state.astype(np.float32),  # (D+1,)
            "has_state": np.array(rng.random() >= STATE_DROPOUT),  # ()
            "bag_of_words": make_bag_of_words(text, config["vocabulary"]),  # (W,)
            "actions": actions.astype(np.float32),  # (K, D+1)
            "action_is_pad": motion.action_is_pad,  # (K,)
            "latent_noise": rng.standard_normal(latent, np.float32),  # (L,)
        }

    def draw_target(self, rng: Generator, motion: Motion) -> np.ndarray:
        """The target's spheres as the cameras see them from the current joints: (V, H, W, 4) RGBA.

        Each sphere is a little off in each view, as painters paint it. The errors of two views are
        independent, so the controller learns to trust the nearest view. (The paper distorts and
        crops the images instead; at 64x64 pixels that moves spheres by centimetres.)

        A single camera in the room does not see how far away a thing is, so its painted spheres
        stay behind those of the camera on the arm, which is above the thing. Then they are drawn,
        in a share of the samples, for a posture between the current and the target's: the
        controller learns to follow the camera on the arm.
        """
        demonstration = motion.demonstration
        chain = demonstration.chain
        mounted = [camera for camera in self.config["cameras"] if camera in chain.mounted]
        lag = 0.0
        if mounted and len(mounted) == len(self.config["cameras"]) - 1:
            lag = rng.random() * (rng.random() < PAINTER_LAG)
        lagging = motion.target + lag * (motion.current - motion.target)
        current_poses = chain.forward_kinematics(motion.current[:-1])  # (J, 4, 4)
        target_poses = chain.forward_kinematics(motion.target[:-1])  # (J, 4, 4)
        lagging_poses = chain.forward_kinematics(lagging[:-1])  # (J, 4, 4)
        height, width = self.config["image_size"]
        is_moved = rng.random() < CAMERAS_MOVED
        layers = []
        for camera in self.config["cameras"]:
            poses, radii, colours = target_spheres(
                target_poses if camera in mounted else lagging_poses,
                motion.target[-1] > 0.5,
                camera,
                demonstration.style,
            )
            intrinsics = demonstration.intrinsics[camera]
            world_from_camera = chain.camera_pose(camera, current_poses)
            if is_moved:
                world_from_camera = misplace_camera(rng, world_from_camera)
            right_and_down = world_from_camera[:3, :2]
            forward = world_from_camera[:3, 2]

            depth = (poses[:, :3, 3] - world_from_camera[:3, 3]) @ forward  # (S,) metres
            error = rng.normal(0, PAINTER_ERROR, (len(poses), 2))  # (S, 2) pixels
            error = error * depth[:, None] / intrinsics[[0, 1], [0, 1]]  # (S, 2) metres
            poses[:, :3, 3] += error @ right_and_down.T
            layers.append(
                draw_spheres(poses, radii, colours, intrinsics, world_from_camera, height, width)
            )
        return np.stack(layers)


# -------------------------------------------------------------------------------------------- loss
def act_loss(model, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L1 of the joints, cross-entropy of the gripper, KL of the latent: their sum, and each.

    Padded steps count as zeros (ACT), so that the mean over a batch is the mean over its parts in
    several processes.
    """
    joints, gripper_logits, posterior = model(**batch)
    target_joints = batch["actions"][..., :-1]  # (B, K, D)
    target_gripper = batch["actions"][..., -1]  # (B, K)
    is_action = ~batch["action_is_pad"]  # (B, K)

    l1 = (joints - target_joints).abs().mean(-1)  # (B, K)
    cross_entropy = F.binary_cross_entropy_with_logits(
        gripper_logits, target_gripper, reduction="none"
    )  # (B, K)
    parts = {
        "joints": (l1 * is_action).mean(),
        "gripper": (cross_entropy * is_action).mean(),
        "kl": torch.zeros((), device=l1.device),
    }
    if posterior is not None:
        mean, log_variance = posterior  # (B, L) each
        kl = -0.5 * (1 + log_variance - mean**2 - log_variance.exp())
        parts["kl"] = kl.sum(-1).mean()
    loss = parts["joints"] + GRIPPER_WEIGHT * parts["gripper"] + KL_WEIGHT * parts["kl"]
    return loss, parts


# ---------------------------------------------------------------------------------------- training
def prepare_data(settings: Settings, process: int, processes: int):
    """The network's config, its base, samples, held-out batches, and what a resumed training must
    share."""
    spheres = settings.observation == "spheres"
    demonstrations = read_demonstrations(
        settings.run, not spheres, settings.seed, settings.failed, settings.size
    )
    training_set, held_out = split_scenes(demonstrations)
    config = {
        "size": settings.size,
        "observation": settings.observation,
        **describe(demonstrations, with_words=not spheres),
    }
    base, fingerprint = load_controller_base(settings.base, config)
    fill_in_defaults(settings, base)
    identity = dict(config)
    for name in ("steps", "batch_size", "learning_rate", "seed", "precision"):
        identity[name] = getattr(settings, name)
    identity["episodes"] = len(demonstrations)
    identity["frames"] = sum(len(one.qpos) for one in demonstrations)
    identity["base"] = fingerprint
    motions = Motions(training_set, demonstrations, shifted=spheres)
    if base is None:
        config.update(motions.state_statistics(settings.seed))
    else:
        config.update({name: base.config[name] for name in ("state_mean", "state_std")})
    scenes = [one.images for one in demonstrations if one.images]
    samples = Samples(motions, scenes, config, settings, process, processes)
    batches = []
    if process == 0:
        split = describe_held_out(demonstrations, settings.run)
        print(f"{len(training_set)} episodes to train on, on {processes} processes; {split}")
        motions = Motions(held_out, demonstrations, shifted=spheres)
        held_out_samples = Samples(motions, scenes, config, settings)
        batches = [held_out_samples[settings.steps + i] for i in range(VALIDATION_BATCHES)]
    return config, base, samples, batches, identity


def main():
    settings = tyro.cli(Settings, description=__doc__)
    folder = settings.out
    if folder is None:
        folder = settings.run / FOLDERS[settings.observation]
    if settings.precision == "auto":
        settings.precision = choose_precision("tiny", "auto") if settings.size == "tiny" else "fp32"
    mixed = "bf16" if settings.precision == "bf16" else "no"
    accelerator = Accelerator(cpu=settings.device == "cpu", mixed_precision=mixed)
    check_settings(settings, accelerator)
    device = accelerator.device
    process = accelerator.process_index
    data = prepare_data(settings, process, accelerator.num_processes)
    config, base, samples, held_out, identity = data
    held_out = send_to_device(held_out, device)
    torch.manual_seed(settings.seed)
    network = ACT(config).to(device)
    if base is not None:
        start_from(network, config["cameras"], base)
    parameters = network.parameters()
    optimizer = AdamW(parameters, settings.learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    start, log = training.resume(folder, network, optimizer, identity)
    if start == settings.steps:
        accelerator.print(f"{folder} is trained already, {start} steps.")
        return
    model, optimizer = accelerator.prepare(network, optimizer)

    stopping = training.StopSignal()
    batches = training.batches(samples, start, settings.steps, 2, device.type == "cuda")
    bar = tqdm(batches, "controller", settings.steps, initial=start, disable=process > 0)
    for step, batch in enumerate(bar, start + 1):
        factor = training.warmup(step) * training.half_cosine(step, settings.steps)
        training.set_learning_rate(optimizer, settings.learning_rate * factor)
        dropout_seed = np.random.SeedSequence((settings.seed, step - 1, process))
        torch.manual_seed(int(dropout_seed.generate_state(1)[0]))

        loss, parts = act_loss(model, send_to_device(batch, device, non_blocking=True))
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        optimizer.step()

        loss, stop = training.agree(accelerator, loss, stopping.requested)
        is_last = step == settings.steps
        if accelerator.is_main_process:
            log.append([step, loss, *[part.item() for part in parts.values()]])
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if step % VALIDATE_EVERY == 0 or is_last:
                log[-1] += validate(network, held_out, config["state_std"])
            if step % settings.checkpoint_every == 0 or is_last or stop:
                save_controller(folder, network, config)
                errors = VALIDATION_COLUMNS[:3]
                write_losses(folder, COLUMNS, log, TRAINING_COLUMNS, errors, "error, rad")
                training.keep_last(folder, FILES, step, settings.keep)
                training.save(folder, network, optimizer, identity, step, log)
        if stop and not is_last:
            training.stop_training(step, say=accelerator.is_main_process)

    if process == 0:
        error, error_last, _, _ = log[-1][-4:]
        print(f"{folder}: validation error {error:.4f} rad, at the last step {error_last:.4f} rad.")


if __name__ == "__main__":
    run_stage(main)
