"""Stage 2's data: the frames of a run, read, tiled and augmented to batches.

A batch is a dict. B samples, and all views of a frame tiled to one picture of H x W pixels:

    condition    (B, 3, H, W)  what the ControlNet sees: the observation, with its colours jittered
    observation  (B, 3, H, W)  the views
    layer        (B, 4, H, W)  RGBA, what is to be painted over them
    prompts      B sentences
    seeds        B seeds of the diffusion noise
    keys         B names of the target pictures, or None for those changed by a random crop

Pictures are floats, 0..1. The target is the layer over the observation.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
import torch.nn.functional as F

from genima.episodes import CAMERAS, find_episodes
from genima.episodes import FORMAT as EPISODE_FORMAT
from genima.files import UserError, read_hdf5
from genima.painter import PROMPT
from genima.spheres import FORMAT as SPHERES_FORMAT
from genima.views import resize, tile_views, untile_views, view_size

HELD_OUT = 20  # one scene in so many is kept for validation: those whose seed it divides


# ------------------------------------------------------------------------------------------ frames
class Frame(NamedTuple):
    """Where one sample lies on disk."""

    episode: str
    spheres: str
    t: int
    instructions: list[str]


@dataclass
class PainterData:
    """What a run holds for stage 2."""

    training: list[Frame]
    held_out: list[Frame]
    horizon: int
    cameras: list[str]
    image_size: int
    tasks: list[str]  # sorted
    fps: float

    def instructions(self) -> list[str]:
        """All different instructions, sorted."""
        found = set()
        for frame in self.training + self.held_out:
            found.update(frame.instructions)
        return sorted(found)


def find_frames(run: Path) -> PainterData:
    """Every frame of <run>/episodes that has spheres in <run>/spheres.

    Raises UserError where spheres are missing, or files differ in cameras, sizes or horizon.
    """
    training = []
    held_out = []
    horizons = set()
    tasks = set()
    first_sizes = None
    for path in find_episodes(run / "episodes"):
        spheres = run / "spheres" / path.relative_to(run / "episodes")
        if not spheres.exists():
            raise UserError(
                f"{spheres} is missing: draw the spheres first "
                f"(python render_spheres.py --run {run})."
            )
        with read_hdf5(path, EPISODE_FORMAT) as root:
            instructions = [str(text) for text in root.attrs["instructions"]]
            length = len(root["action"])
            seed = int(root.attrs["seed"])
            fps = float(root.attrs["fps"])
            tasks.add(str(root.attrs["task"]))
            images = root["observations/images"]
            sizes = {camera: images[camera].shape[1:3] for camera in images}
        with read_hdf5(spheres, SPHERES_FORMAT) as root:
            horizons.add(int(root.attrs["horizon"]))
        if first_sizes is None:
            first_sizes = sizes
            image_size = view_size(sizes, f"{path}: the views")
        if sizes != first_sizes:
            raise UserError(
                f"{path} has views of {sizes}, others have {first_sizes}: "
                "put them into different runs."
            )
        frames = [Frame(str(path), str(spheres), t, instructions) for t in range(length)]
        if seed % HELD_OUT == 0:
            held_out += frames
        else:
            training += frames
    if not training:
        raise UserError(
            f"{run / 'episodes'} has no scene to train on: "
            f"record more (python collect_demos.py --run {run})."
        )
    if len(horizons) > 1:
        raise UserError(
            f"{run / 'spheres'} was drawn with different horizons {sorted(horizons)}: "
            f"draw all with one (python render_spheres.py --run {run})."
        )
    cameras = order_cameras(first_sizes)
    horizon = horizons.pop()
    return PainterData(training, held_out, horizon, cameras, image_size, sorted(tasks), fps)


def order_cameras(cameras) -> list[str]:
    """The paper's four in the paper's order, then others as in the file."""
    known = [camera for camera in CAMERAS if camera in cameras]
    others = [camera for camera in cameras if camera not in CAMERAS]
    return known + others


# ----------------------------------------------------------------------------------------- batches
@dataclass
class Augmentation:
    """Random changes to a training sample; the values are the published code's."""

    crop: int = 2
    """Pixels by which each view is moved at most, condition and target alike."""
    brightness: float = 0.2
    """Of the condition alone, as all that follow: a factor within 1 - 0.2 and 1 + 0.2."""
    contrast: float = 0.2
    saturation: float = 0.1
    hue: float = 0.05
    """A turn of the colours, as a part of the full circle."""


class PainterDataset(torch.utils.data.Dataset):
    """Item `step` is this process's share of that step's batch; there is one for every step.

    Sample i of a step is a function of (seed, step, i) alone: a resumed training, or one shared
    among other processes, gets the same samples.
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
    ):
        self.cameras = cameras
        self.resolution = resolution
        self.augmentation = augmentation
        self.seed = seed
        share = batch_size // num_processes
        self.samples = range(process * share, (process + 1) * share)
        episodes = {}
        for frame in frames:
            episodes.setdefault(frame.episode, []).append(frame)
        self.episodes = list(episodes.values())

    def __getitem__(self, step: int) -> dict:
        rngs = [np.random.default_rng([self.seed, step, i]) for i in self.samples]
        frames = [self.draw_frame(rng) for rng in rngs]
        return read_batch(frames, self.cameras, self.resolution, rngs, self.augmentation)

    def draw_frame(self, rng: np.random.Generator) -> Frame:
        """Any episode; early frames more often than late ones.

        In the first frames nothing but the prompt tells the target. Later the arm's place gives it
        away, and a painter could learn to do without the prompt.
        """
        frames = self.episodes[rng.integers(len(self.episodes))]
        return frames[int(len(frames) * rng.random() ** 2)]


def read_batch(
    frames: list[Frame],
    cameras: list[str],
    resolution: int,
    rngs: list[np.random.Generator],
    augmentation: Augmentation | None = None,
) -> dict:
    """Read frames from disk -> a batch (see above). rngs: a random generator per frame."""
    pictures = read_pictures(frames, cameras, resolution)  # (B, 7, H, W)
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
        keys.append(f"{frame.episode} {frame.t} {resolution}")
    if cropped:
        keys = [None] * len(frames)
    return {
        "condition": condition,
        "observation": observation,
        "layer": layer,
        "prompts": prompts,
        "seeds": seeds,
        "keys": keys,
    }


def read_pictures(frames: list[Frame], cameras: list[str], resolution: int) -> torch.Tensor:
    """(B, 7, H, W): the tiled views, the layer's colour times its alpha, and its alpha.

    The colour of a transparent pixel means nothing; times alpha, it stays out of the resizing.
    """
    views = np.stack([read_views(frame, cameras) for frame in frames])  # (B, V, h, w, 7)
    views = torch.from_numpy(views).permute(0, 1, 4, 2, 3)  # (B, V, 7, h, w)
    pictures = tile_views(views).float() / 255  # (B, 7, rows h, columns w)
    pictures[:, 3:6] *= pictures[:, 6:]
    return resize(pictures, resolution)


def read_views(frame: Frame, cameras: list[str]) -> np.ndarray:
    """The views of one frame, and the layers to paint on them: (V, h, w, 3 + 4) uint8."""
    views = []
    with h5py.File(frame.episode, "r") as episode, h5py.File(frame.spheres, "r") as spheres:
        for camera in cameras:
            image = episode["observations/images"][camera][frame.t]
            layer = spheres["layers"][camera][frame.t]
            views.append(np.concatenate([image, layer], axis=-1))
    return np.stack(views)


# ------------------------------------------------------------------------------------ augmentation
def random_crop(pictures: torch.Tensor, rngs: list, crop: int, views: int) -> torch.Tensor:
    """Each sample's views (B, C, H, W), moved alike by up to `crop` pixels."""
    moved = []
    for picture, rng in zip(pictures, rngs):
        dy, dx = rng.integers(-crop, crop + 1, size=2)
        moved.append(shift_views(picture, dy, dx, views))
    return torch.stack(moved)


def shift_views(picture: torch.Tensor, dy: int, dx: int, views: int) -> torch.Tensor:
    """Every view within (C, H, W) moved by (dy, dx) pixels; its edge is filled by reflection."""
    tiles = untile_views(picture[None], views)[0]  # (V, C, h, w)
    height, width = tiles.shape[2:]
    pad = max(abs(dy), abs(dx))
    padded = F.pad(tiles, (pad, pad, pad, pad), mode="reflect")
    rows = slice(pad + dy, pad + dy + height)
    columns = slice(pad + dx, pad + dx + width)
    return tile_views(padded[None, :, :, rows, columns])[0]


def colour_jitter(pictures: torch.Tensor, rngs: list, strength: Augmentation) -> torch.Tensor:
    """Random brightness, contrast, saturation and hue for each of (B, 3, H, W), 0..1."""
    drawn = []
    for rng in rngs:
        numbers = []
        for limit in (strength.brightness, strength.contrast, strength.saturation):
            numbers.append(rng.uniform(1 - limit, 1 + limit))
        if strength.hue:
            numbers.append(rng.uniform(-strength.hue, strength.hue))
        else:
            numbers.append(0.0)
        drawn.append(numbers)
    drawn = torch.tensor(drawn, dtype=torch.float32, device=pictures.device)
    drawn = drawn[:, :, None, None, None]  # (B, 4, 1, 1, 1)
    brightness, contrast, saturation, turn = drawn.unbind(1)

    pictures = pictures * brightness
    mean = pictures.mean((1, 2, 3), keepdim=True)
    pictures = mean + contrast * (pictures - mean)
    grey = pictures.mean(1, keepdim=True)
    colour = pictures - grey
    if strength.hue:  # turn the colours about the axis of greys
        angle = 2 * math.pi * turn
        across = colour.roll(1, 1) - colour.roll(-1, 1)
        colour = angle.cos() * colour + angle.sin() / math.sqrt(3) * across
    return (grey + saturation * colour).clamp(0, 1)
