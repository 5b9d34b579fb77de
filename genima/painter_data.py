"""Stage 2's data: the frames of a run, read, tiled and augmented to batches.

A batch is a dict. B samples, and all views of a frame tiled to one picture of H x W pixels:

    condition    (B, 3, H, W)  what the ControlNet sees: the observation, with its colours jittered
    observation  (B, 3, H, W)  the views
    layer        (B, 4, H, W)  RGBA, what is to be painted over them
    prompts      B sentences
    seeds        B seeds of the diffusion noise
    keys         B names of the target pictures, or None for those that are augmented

Pictures are floats, 0..1. The target is the layer over the observation.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch

from genima.arrays import check_pictures
from genima.episodes import ATTRIBUTES, find_episodes, order_cameras, read_attribute
from genima.episodes import FORMAT as EPISODE_FORMAT
from genima.files import UserError, read_hdf5
from genima.painter import PROMPT
from genima.painter_augmentation import Augmentation, colour_jitter, random_crop, replace_room
from genima.scene_files import RandomScenes, Scene
from genima.scenes import check_successful, held_out_scenes, name_of, scene_of
from genima.spheres import FORMAT as SPHERES_FORMAT
from genima.views import TILED, fit, is_uniform, resize, tile_any


# ------------------------------------------------------------------------------------------ frames
class Frame(NamedTuple):
    """Where one sample lies on disk."""

    episode: str
    spheres: str
    t: int
    instructions: list[str]

    @property
    def key(self) -> str:
        return f"{self.episode} {self.t}"

    def read_views(self, cameras: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The views (h, w, 3), with the layers (h, w, 4) to paint on them; uint8."""
        views = []
        with h5py.File(self.episode, "r") as episode, h5py.File(self.spheres, "r") as spheres:
            for camera in cameras:
                image = episode["observations/images"][camera][self.t]
                layer = spheres["layers"][camera][self.t]
                views.append((image, layer))
        return views


@dataclass
class PainterData:
    """What a run holds for stage 2."""

    training: list[Frame]
    held_out: list[Frame]
    horizon: int
    cameras: list[str]
    image_sizes: dict[str, tuple[int, int]]  # (height, width) by camera, in order
    tasks: list[str]  # sorted
    fps: float
    scenes: int
    scenes_held_out: int
    failed: int  # demonstrations
    rehearsed: RandomScenes | None = None  # samples beside the frames

    @property
    def image_size(self) -> int | None:
        """Height and width of the views; None where they are not square or differ."""
        if not is_uniform(self.image_sizes):
            return None
        return self.image_sizes[self.cameras[0]][0]

    def small_square_size(self) -> int:
        """image_size. Raises UserError for other views than small square ones of one size."""
        size = self.image_size
        if size is None or size > TILED["tiny"]:
            words = f"square views of one size, up to {TILED['tiny']} pixels"
            raise UserError(f"This takes {words}, not {self.image_sizes}: use train_controlnet.py.")
        return size

    def describe(self) -> dict:
        """What a painter must fit, for its config."""
        config = {
            "image_size": self.image_size,
            "horizon": self.horizon,
            "cameras": self.cameras,
            "tasks": self.tasks,
            "fps": self.fps,
            "held_out": sorted({name_of(Path(frame.episode)) for frame in self.held_out}),
        }
        if self.image_size is None:
            config["image_sizes"] = {name: list(size) for name, size in self.image_sizes.items()}
        return config

    def instructions(self) -> list[str]:
        """All different instructions, sorted."""
        frames = self.training + self.held_out
        return sorted({text for frame in frames for text in frame.instructions})


def find_frames(run: Path, use_failed: bool = False) -> PainterData:
    """Every frame of <run>/episodes that has spheres in <run>/spheres.

    use_failed: also of those that failed. What is held out: see genima/scenes.py. Raises UserError
    where spheres are missing, or files differ in cameras, sizes or horizon.
    """
    demonstrations = []  # (scene, frames)
    horizons = set()
    failed = 0
    first_sizes = None
    for path in find_episodes(run / "episodes"):
        spheres = run / "spheres" / path.relative_to(run / "episodes")
        if not spheres.exists():
            raise UserError(
                f"{spheres} is missing: draw the spheres first "
                f"(python render_spheres.py --run {run})."
            )
        with read_hdf5(path, EPISODE_FORMAT) as root:
            facts = {name: read_attribute(root, name) for name in ATTRIBUTES}
            instructions = [str(text) for text in facts["instructions"]]
            length = len(root["action"])
            images = root["observations/images"]
            sizes = {}
            for name in order_cameras(images):
                check_pictures(images[name], length, 3)
                sizes[name] = images[name].shape[1:3]
        if first_sizes is None:
            first_sizes = sizes
        if sizes != first_sizes:
            raise UserError(
                f"{path} has views of {sizes}, others have {first_sizes}: "
                "put them into different runs."
            )
        with read_hdf5(spheres, SPHERES_FORMAT) as root:
            horizons.add(int(root.attrs["horizon"]))
            for name in sizes:
                check_pictures(root["layers"][name], length, 4)
        if not facts["success"]:
            failed += 1
            if not use_failed:
                continue
        scene = scene_of(path, facts["task"], facts["seed"], facts["sim"])
        frames = [Frame(str(path), str(spheres), t, instructions) for t in range(length)]
        demonstrations.append((scene, frames))
    check_successful(len(demonstrations), failed, run / "episodes")
    if len(horizons) > 1:
        raise UserError(
            f"{run / 'spheres'} was drawn with different horizons {sorted(horizons)}: "
            f"draw all with one (python render_spheres.py --run {run})."
        )

    scenes = {scene for scene, _ in demonstrations}
    held_out_ones = held_out_scenes(scenes)
    training = []
    held_out = []
    for scene, frames in demonstrations:
        if scene in held_out_ones:
            held_out += frames
        else:
            training += frames
    return PainterData(
        training=training,
        held_out=held_out,
        horizon=horizons.pop(),
        cameras=list(first_sizes),
        image_sizes=first_sizes,
        tasks=sorted({scene.task for scene in scenes}),
        fps=facts["fps"],
        scenes=len(scenes),
        scenes_held_out=len(held_out_ones),
        failed=failed,
    )


# ----------------------------------------------------------------------------------------- batches
class PainterDataset(torch.utils.data.Dataset):
    """Item `step` is this process's share of that step's batch; there is one for every step.

    Sample i of a step is a function of (seed, step, i) alone: a resumed training, or one shared
    among other processes, gets the same samples. scenes: every fourth sample is of these instead.
    """

    def __init__(
        self,
        frames: list[Frame],
        cameras: list[str],
        resolution: int,
        augmentation: Augmentation | None,
        batch_size: int = 8,
        seed: int = 0,
        process: int = 0,
        num_processes: int = 1,
        scenes: RandomScenes | None = None,
        any_frame: bool = False,
    ):
        self.cameras = cameras
        self.resolution = resolution
        self.augmentation = augmentation
        self.seed = seed
        share = batch_size // num_processes
        self.samples = range(process * share, (process + 1) * share)
        self.scenes = scenes
        self.frames = frames
        self.any_frame = any_frame
        episodes = {}
        for frame in frames:
            episodes.setdefault(frame.episode, []).append(frame)
        self.episodes = list(episodes.values())

    def __getitem__(self, step: int) -> dict:
        rngs = [np.random.default_rng([self.seed, step, i]) for i in self.samples]
        frames = []
        for i, rng in zip(self.samples, rngs):
            rehearsed = self.scenes is not None and i % 4 == 3
            frames.append(self.scenes.draw(rng) if rehearsed else self.draw_frame(rng))
        return read_batch(frames, self.cameras, self.resolution, rngs, self.augmentation)

    def draw_frame(self, rng: np.random.Generator) -> Frame:
        """Any episode; early frames more often than late ones.

        In the first frames nothing but the prompt tells the target. Later the arm's place gives it
        away, and a painter could learn to do without the prompt. With any_frame, as long tasks
        need, all frames of all episodes are drawn equally often.
        """
        if self.any_frame:
            return self.frames[rng.integers(len(self.frames))]
        frames = self.episodes[rng.integers(len(self.episodes))]
        return frames[int(len(frames) * rng.random() ** 2)]


def read_batch(
    frames: list[Frame | Scene],
    cameras: list[str],
    resolution: int,
    rngs: list[np.random.Generator],
    augmentation: Augmentation | None = None,
) -> dict:
    """Read frames from disk -> a batch (see above). rngs: a random generator per frame."""
    pictures = read_pictures(frames, cameras, resolution)  # (B, 7, H, W)
    other_rooms = augmentation is not None and augmentation.room is not None
    for i, frame in enumerate(frames):
        if other_rooms and isinstance(frame, Frame):  # random scenes have rooms enough
            pictures[i] = replace_room(pictures[i], augmentation.room, rngs[i], len(cameras))
    cropped = augmentation is not None and augmentation.crop > 0
    if cropped:
        pictures = random_crop(pictures, rngs, augmentation.crop, len(cameras))
    observation, colour, alpha = pictures.split((3, 3, 1), dim=1)
    layer = torch.cat([colour / alpha.clamp(min=1e-3), alpha], dim=1)  # (B, 4, H, W)
    condition = observation
    if augmentation is not None:
        condition = colour_jitter(observation, rngs, augmentation)

    prompts = []
    seeds = []
    keys = []
    for frame, rng in zip(frames, rngs):
        instruction = frame.instructions[rng.integers(len(frame.instructions))]
        prompts.append(PROMPT.format(instruction))
        seeds.append(int(rng.integers(2**31)))
        keys.append(f"{frame.key} {resolution}")
    if cropped or other_rooms:
        keys = [None] * len(frames)
    return {
        "condition": condition,
        "observation": observation,
        "layer": layer,
        "prompts": prompts,
        "seeds": seeds,
        "keys": keys,
    }


def read_pictures(frames: list[Frame | Scene], cameras: list[str], resolution: int) -> torch.Tensor:
    """(B, 7, H, W): the tiled views, the layer's colour times its alpha, and its alpha.

    The colour of a transparent pixel means nothing; times alpha, it stays out of the resizing.
    """
    read = [frame.read_views(cameras) for frame in frames]
    views = [as_floats([view[i] for view in read]) for i in range(len(cameras))]
    return resize(tile_any(views, resolution), resolution)


def as_floats(pairs: list[tuple[np.ndarray, np.ndarray]]) -> torch.Tensor:
    """B images (h, w, 3) with their layers (h', w', 4), uint8 -> (B, 7, h, w), see above."""
    images = np.stack([image for image, _ in pairs])
    layers = np.stack([layer for _, layer in pairs])
    images = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255  # (B, 3, h, w)
    layers = torch.from_numpy(layers).permute(0, 3, 1, 2).float() / 255
    layers[:, :3] *= layers[:, 3:]
    layers = fit(layers, *images.shape[2:])  # render_spheres.py --size draws others
    return torch.cat([images, layers], dim=1)
