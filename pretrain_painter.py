"""Before stage 2: the base. A painter that knows the things on the table by name.

    In:   nothing: random scenes of the embedded simulator (sims/random_scenes.py) are drawn here
    Out:  <out>/scenes/<shard>.hdf5   pictures, sentences and layers; may be removed afterwards
          <out>/scenes.png            a contact sheet: look at it before you train for an hour
          <out>/                      the painter in diffusers' layout, losses.csv, losses.png

    python pretrain_painter.py                                scenes, then training
    python pretrain_painter.py --scenes 2000 --steps 50 --out runs/try      to try it out
    python pretrain_painter.py --size small --image-size 128                on one GPU of 12 GB
    python pretrain_painter.py --scenes 1500 --steps 0 --out runs/scenes    scenes alone
    python train_controlnet.py --base runs/base --rehearse runs/scenes      both in stage 2

GENIMA starts from SD-Turbo, a network that ties words to places in pictures, whatever the table,
the light or the colours look like. On a laptop this small base plays that part. It has never seen
a demonstration, an action or a task: every scene is a still picture, and a sentence says what to
paint on it. There are three kinds of sentence:

    A  "the robot as it is, the hand open"   the four spheres where the joints are now
    B  "the rose block"                      one magenta sphere on the thing that is named
    C  "the open hand above the rose block"  the four spheres where inverse kinematics puts the arm

What the base has seen: the objects of all eight tasks and their colours' names, tables and floors
of every pattern, any light, cameras moved a little. What it has not: the tasks' instructions, what
to do with a thing, and any motion.
"""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # scenes are drawn by one process per core

import h5py
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from tqdm import tqdm

from genima import painter_training as setup
from genima.base import FROM_SCRATCH, fingerprint, load_base
from genima.episodes import CAMERAS
from genima.files import UserError, check_number, read_hdf5, run_stage, write_hdf5
from genima.painter import PROMPT, TinyPainter
from genima.painter_data import Augmentation, colour_jitter
from genima.parallel import run_in_parallel, usable_cores
from genima.plots import write_contact_sheet, write_losses
from genima.scene_files import FORMAT, KINDS, SHARD, RandomScenes, check_shards, find_shards
from genima.training import (
    StopSignal,
    agree,
    batches,
    check_numbers,
    half_cosine,
    resume,
    save,
    set_learning_rate,
    stop_training,
    warmup,
)
from genima.views import TILED, composite, tile_views
from sims.mujoco_panda import render_cameras
from sims.mujoco_tasks import TASKS
from sims.random_scenes import RandomSceneEnv
from sims.rendering import choose_renderer
from sims.scene_sentences import all_sentences, draw_sentence, kind_of

SHOWN = 8  # scenes in scenes.png
COLUMNS = ("step", "loss", "iou_A", "iou_B", "iou_C")  # of losses.csv
# The settings that a training must share with the one that it resumes.
IDENTITY = ("size", "first_scene", "scenes", "steps", "batch_size", "learning_rate", "image_size")
IDENTITY += ("seed",)
# What a batch shows of its scenes: mostly all four views, as CAMERAS has them; sometimes wrist and
# front alone, or one view, so that the base fits data of one or two cameras, too.
VIEWS = [(0, 1, 2, 3), (0, 1), (0,), (1,)]
HOW_OFTEN = [0.7, 0.15, 0.1, 0.05]
MAX_SCENES = 10_000_000
FOLDERS = {"tiny": Path("runs/base"), "small": Path("runs/base-small")}
LEARNING_RATES = {"tiny": 8e-4, "small": 3e-4}  # small's: in proportion to 1 / width, not tuned


@dataclass
class Settings:
    out: Path | None = None
    """Folder of the base: scenes/ and the trained painter; by default runs/base, or for small
    runs/base-small."""
    size: Literal["tiny", "small"] = "tiny"
    """tiny: a base for a laptop; small: ten times as large, for one consumer GPU."""
    base: str = FROM_SCRATCH
    """A base to train further; by default random weights."""
    first_scene: int = 0
    """The first scene's number: a base that is trained further wants new scenes."""
    scenes: int = 22_500
    """Random scenes to draw, in whole files of 500, each with four sentences; 0.6 GB on disk."""
    steps: int = 900
    """Gradient steps; with 0 only the scenes are drawn, to be rehearsed in stage 2."""
    batch_size: int = 64
    """Samples a step."""
    learning_rate: float | None = None
    """Highest learning rate of AdamW, by default 8e-4, for small 3e-4; falls as half a cosine."""
    image_size: int | None = None
    """Height and width of a view, pixels; by default 64, for small 128."""
    seed: int = 0
    """Seed of initialisation, sampling and augmentation; scenes have seeds of their own."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    workers: int = usable_cores()
    """Processes that draw scenes."""


# ---------------------------------------------------------------------------------------- scenes
def make_environments(image_size: int) -> dict:
    """One environment a task, made once in each process."""
    environments = {}
    for task in TASKS:
        environments[task] = RandomSceneEnv(task, image_size, images=False)
        environments[task].task_name = task
    return environments


def draw_shard(environments: dict, path: Path, first: int):
    """Draw scenes first, first + 1, ... into one file, unless it is there.

    Scene i is a function of i alone.
    """
    if path.exists():
        return
    images, layers, sentences = [], [], []
    tasks = list(environments)
    for seed in range(first, first + SHARD):
        env = environments[tasks[seed % len(tasks)]]
        rng = env.draw_scene(seed)
        views = render_cameras(env)
        painted, said = [], []
        for kind in KINDS:
            try:
                sentence, layer = draw_sentence(kind, env, rng)
            except UserError:  # out of reach
                sentence, layer = draw_sentence("B", env, rng)
            said.append(sentence)
            painted.append(layer)
        images.append(np.stack([views[camera] for camera in env.cameras]))
        layers.append(np.stack(painted))
        sentences.append(said)

    with write_hdf5(path) as root:
        root.attrs.update(format=FORMAT, first=first, cameras=list(CAMERAS))
        for name, arrays in (("images", images), ("layers", layers)):
            data = np.stack(arrays)  # (N, V, H, W, 3) and (N, S, V, H, W, 4)
            chunks = (1, *data.shape[1:])
            root.create_dataset(name, data=data, chunks=chunks, compression=1, shuffle=True)
        root["sentences"] = np.array(sentences, dtype=h5py.string_dtype())  # (N, S)


def draw_scenes(settings: Settings) -> list[Path]:
    """Draw all scenes that are not there yet, in parallel. Returns the files."""
    shards = find_shards(settings.out / "scenes", settings.first_scene, settings.scenes)
    jobs = [(draw_shard, path, first) for path, first in shards.items()]
    (settings.out / "scenes").mkdir(parents=True, exist_ok=True)
    choose_renderer()  # once, for all processes
    make_context = partial(make_environments, settings.image_size)
    for _ in run_in_parallel(jobs, settings.workers, "scenes", f"{SHARD} scenes", make_context):
        pass
    check_shards(list(shards), len(CAMERAS), settings.image_size)
    with read_hdf5(next(iter(shards)), FORMAT) as root:
        images = root["images"][:SHOWN]  # (N, V, H, W, 3)
        layers = root["layers"][:SHOWN]  # (N, S, V, H, W, 4)
        sentences = root["sentences"].asstr()[:SHOWN]  # (N, S)
    write_contact_sheet(settings.out / "scenes.png", images, layers, sentences)
    return list(shards)


# ------------------------------------------------------------------------------------------ data
class SceneDataset(torch.utils.data.Dataset):
    """Item i is the whole batch of step i + 1: a function of seed and step alone.

    Pictures stay bytes here; prepare() makes numbers of them, on the device that trains.
    """

    def __init__(self, shards: list[Path], batch_size: int, seed: int, how_often=HOW_OFTEN):
        self.scenes = RandomScenes(shards)
        self.batch_size = batch_size
        self.seed = seed
        self.how_often = how_often  # each of VIEWS is shown

    def __getitem__(self, step: int) -> dict:
        rng = np.random.default_rng([self.seed, step])
        drawn = [self.scenes.draw(rng) for _ in range(self.batch_size)]
        views = VIEWS[rng.choice(len(VIEWS), p=self.how_often)]
        pictures = np.stack([scene.read() for scene in drawn])[:, views]  # (B, V, h, w, 7) uint8
        sentences = [scene.instructions[0] for scene in drawn]
        return {
            "step": step,
            "pictures": torch.from_numpy(pictures),
            "prompts": [PROMPT.format(sentence) for sentence in sentences],
            "kinds": [kind_of(sentence) for sentence in sentences],
        }


def prepare(batch: dict, device, augment: bool = True) -> dict:
    """A batch of SceneDataset as floats, 0..1, on the device: the names of stage 2's batches."""
    pictures = batch["pictures"].to(device).permute(0, 1, 4, 2, 3)  # (B, V, 7, h, w)
    tiled = tile_views(pictures).float() / 255  # (B, 7, H, W)
    observation, layer = tiled.split((3, 4), dim=1)
    condition = observation
    if augment:
        rngs = [np.random.default_rng([batch["step"], i]) for i in range(len(tiled))]
        no_hue = Augmentation(hue=0.0)  # the sentences name colours
        condition = colour_jitter(observation, rngs, no_hue)
    return {
        "condition": condition,  # (B, 3, H, W)
        "observation": observation,  # (B, 3, H, W)
        "layer": layer,  # (B, 4, H, W)
        "prompts": batch["prompts"],
    }


# -------------------------------------------------------------------------------------- training
def painting_loss(logits: torch.Tensor, batch: dict) -> torch.Tensor:
    """Where to paint, and what it looks like; as stage 2's loss for tiny (train_controlnet.py)."""
    layer = batch["layer"]
    observation = batch["observation"]
    alpha = layer[:, 3:]
    where = F.binary_cross_entropy_with_logits(logits[:, 3:], alpha)
    painted = composite(logits.sigmoid(), observation)
    difference = (painted - composite(layer, observation)).abs()
    return where + ((1 + 19 * alpha) * difference).mean()


@torch.no_grad()
def validate(painter, dataset: SceneDataset, count: int = 6) -> list[float]:
    """The overlap (IoU) of painted and true spheres in scenes held out, for each kind."""
    painter.eval()
    intersection = dict.fromkeys("ABC", 0)
    union = dict.fromkeys("ABC", 0)
    for i in range(count):
        drawn = dataset[i]
        batch = prepare(drawn, painter.unet.device, augment=False)
        observation = batch["observation"]
        painted = painter.paint_tiled(observation, batch["prompts"])
        truth = composite(batch["layer"], observation)
        is_painted = (painted - observation).abs().amax(1) > 0.2  # (B, H, W)
        is_sphere = (truth - observation).abs().amax(1) > 0.2
        for sample, kind in enumerate(drawn["kinds"]):
            intersection[kind] += (is_painted[sample] & is_sphere[sample]).sum().item()
            union[kind] += (is_painted[sample] | is_sphere[sample]).sum().item()
    painter.train()
    return [intersection[kind] / max(union[kind], 1) for kind in "ABC"]


def fill_in_defaults(settings: Settings):
    """Set what is None: values that depend on the size."""
    defaults = {
        "out": FOLDERS[settings.size],
        "learning_rate": LEARNING_RATES[settings.size],
        "image_size": TILED[settings.size] // 2,
    }
    for name, value in defaults.items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)


def main():
    settings = tyro.cli(Settings, description=__doc__)
    fill_in_defaults(settings)
    if settings.steps:
        check_numbers(settings)
    check_number("--scenes", settings.scenes, 1, MAX_SCENES)
    check_number("--image-size", settings.image_size, 8, 256)
    if settings.image_size % 8:
        raise UserError(f"--image-size must be a multiple of 8, not {settings.image_size}.")
    check_number("--workers", settings.workers, 1, 1024)
    shards = draw_scenes(settings)
    if settings.steps == 0:
        print(f"{settings.out}: {len(shards) * SHARD} scenes.")
        return
    torch.set_num_threads(settings.workers)
    held_out = shards[-1:]
    training = shards[:-1] if len(shards) > 1 else shards
    # Unlike stage 2's batches of 8, these are large enough for bf16 to pay on a GPU.
    bf16 = setup.choose_precision(settings.size, "auto") == "bf16" or torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no")
    config = {
        "size": settings.size,
        "objective": "one-step",
        "num_inference_steps": 1,
        "image_size": settings.image_size,
        "resolution": 2 * settings.image_size,
        "horizon": 0,  # it paints what is named, not what comes next
        "cameras": list(CAMERAS),
    }
    torch.manual_seed(settings.seed)
    if settings.base == FROM_SCRATCH:
        painter = TinyPainter.from_scratch(all_sentences(), config)
    else:
        painter = load_base(settings.base, config)
    painter = setup.prepare_tiny(painter, accelerator.device, bf16)
    optimizer = setup.make_optimizer("adamw", painter, settings.learning_rate)

    identity = {name: getattr(settings, name) for name in IDENTITY}
    identity["base"] = fingerprint(settings.base)
    start, log = resume(settings.out, painter, optimizer, identity)
    model, optimizer = accelerator.prepare(painter, optimizer)
    dataset = SceneDataset(training, settings.batch_size, settings.seed)
    checks = SceneDataset(held_out, settings.batch_size, settings.seed, how_often=[1, 0, 0, 0])
    loader = batches(dataset, start, settings.steps, num_workers=settings.workers)
    stopping = StopSignal()

    bar = tqdm(loader, "base", settings.steps, unit="step", initial=start)
    for step, batch in enumerate(bar, start + 1):
        factor = min(warmup(step), half_cosine(step, settings.steps))
        set_learning_rate(optimizer, settings.learning_rate * factor)
        batch = prepare(batch, accelerator.device)
        loss = painting_loss(model(batch["condition"], batch["prompts"]), batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        loss, stop = agree(accelerator, loss, stopping.requested)
        log.append([step, loss, "", "", ""])
        bar.set_postfix(loss=f"{np.mean([row[1] for row in log[-50:]]):.4f}", refresh=False)
        due = step % settings.checkpoint_every == 0 or step == settings.steps
        if due:
            log[-1][2:] = validate(painter, checks)
        if due or stop:
            painter.save(settings.out)
            write_losses(settings.out, COLUMNS, log, ["loss"], COLUMNS[2:], "overlap of spheres")
            save(settings.out, painter, optimizer, identity, step, log)
        if stop and step < settings.steps:
            stop_training(step, say=True)
    print(f"{settings.out}: overlap (IoU) in scenes held out, A, B and C: {log[-1][2:]}")


if __name__ == "__main__":
    run_stage(main)
