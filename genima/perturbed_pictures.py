"""Recorded pictures, changed as a robot's surroundings change: light, clutter, another room.

    static = find_static(pictures)                      where nothing ever moves
    images = perturb("background", images, static, rng)

hue          all colours turned around the colour circle by 20 degrees, one way or the other
brightness   0.6 or 1.4 times as bright
distractors  three blocks or discs of any colour, pasted where nothing moves, if there is room
background   a random texture wherever nothing ever moves

All frames of an episode are changed in the same way. Pixels change, not the world: a pasted block
casts no shadow, and a texture lies flat in the picture. sims/perturbed_panda.py changes a world.
"""

from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator

from genima.episodes import Episode
from genima.kinematics import is_in_room
from genima.spheres import draw_spheres
from genima.textures import random_texture

PERTURBATIONS = ("hue", "brightness", "distractors", "background")
TURN = 20  # degrees; instructions name colours, and red has to stay red
BRIGHTNESS = (0.6, 1.4)
DISTRACTORS = 3
DISTRACTOR_SIZE = (0.04, 0.09)  # half of their width and height, of the picture's height
PLACES = 20  # tried for each distractor
MOVED = 25  # of 255: by how much a pixel that moves differs from its median
MARGIN = 0.02  # of the picture's height, kept around what moves
LEAST_STATIC = 0.05  # of a picture: where less never moves, there is no background to replace
ARM_RADIUS = 0.1  # metres around the line from joint to joint that belong to the arm
SAMPLES = 64  # pictures of a camera to find out where nothing moves
LINK_POINTS = 6  # on that line, from one joint to the next


def perturb(kind: str, images: np.ndarray, static: np.ndarray, rng: Generator) -> np.ndarray:
    """A camera's images (T, H, W, 3) uint8, perturbed. static (H, W): where nothing moves."""
    if kind == "hue":
        return turn_hue(images, TURN * rng.choice([-1, 1]))
    if kind == "brightness":
        return change_brightness(images, rng.choice(BRIGHTNESS))
    if kind == "distractors":
        return paste_distractors(images, static, rng)
    return replace_background(images, static, rng)


def turn_hue(images: np.ndarray, degrees: float) -> np.ndarray:
    """Turn the colours of images (..., 3) around the grey axis: at 120 degrees red is green."""
    cos = np.cos(np.deg2rad(degrees))
    sin = np.sin(np.deg2rad(degrees)) / np.sqrt(3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    rotation = cos * np.eye(3) + sin * cross + (1 - cos) / 3
    return as_bytes(images @ rotation.T.astype(np.float32))


def change_brightness(images: np.ndarray, factor: float) -> np.ndarray:
    return as_bytes(images * np.float32(factor))


def as_bytes(images: np.ndarray) -> np.ndarray:
    return np.clip(images + 0.5, 0, 255).astype(np.uint8)


def paste_distractors(images: np.ndarray, static: np.ndarray, rng: Generator) -> np.ndarray:
    """Paste blocks and discs of random colours, their lower halves darker."""
    pasted = images.copy()
    height, width = static.shape
    for _ in range(DISTRACTORS):
        half_height, half_width = rng.uniform(*DISTRACTOR_SIZE, 2) * height
        round_one = rng.random() < 0.5
        colour = rng.uniform(0, 255, 3)
        best = None
        for _ in range(PLACES):
            x = rng.uniform(half_width, width - half_width)
            y = rng.uniform(half_height, height - half_height)
            across = np.abs(np.arange(width) + 0.5 - x) / half_width  # (W,)
            down = np.abs(np.arange(height) + 0.5 - y)[:, None] / half_height  # (H, 1)
            if round_one:
                inside = across**2 + down**2 < 1  # (H, W)
            else:
                inside = np.maximum(across, down) < 1
            room = static[inside].mean()
            if best is None or room > best[0]:
                best = (room, inside, y)
        _, inside, y = best
        lower = inside & (np.arange(height) > y)[:, None]
        pasted[:, inside] = colour.astype(np.uint8)
        pasted[:, lower] = (0.7 * colour).astype(np.uint8)
    return pasted


def replace_background(images: np.ndarray, static: np.ndarray, rng: Generator) -> np.ndarray:
    """A random texture where nothing moves."""
    replaced = images.copy()
    texture = random_texture(rng, *static.shape).astype(np.uint8)
    replaced[:, static] = texture[static]
    return replaced


# ------------------------------------------------------------------------------------ what moves
def find_static(pictures: np.ndarray) -> np.ndarray:
    """Where nothing moves in any of N pictures (N, H, W, 3) of one camera in the room: (H, W).

    A pixel that moves differs from its median once; the mean of 3 x 3 pixels is compared, because
    of the camera's noise.
    """
    typical = np.median(pictures, axis=0)  # (H, W, 3)
    moved = np.zeros(typical.shape[:2], bool)
    for picture in pictures:
        difference = np.abs(picture - typical).max(axis=-1)  # (H, W)
        difference = torch.from_numpy(difference)[None, None].float()
        moved |= (F.avg_pool2d(difference, 3, 1, 1)[0, 0] > MOVED).numpy()
    margin = max(1, round(MARGIN * len(moved)))
    moved = torch.from_numpy(moved)[None, None].float()
    moved = F.max_pool2d(moved, 2 * margin + 1, 1, margin)[0, 0] > 0
    return ~moved.numpy()


def arm_pixels(
    joint_poses: np.ndarray,
    intrinsics: np.ndarray,
    world_from_camera: np.ndarray,
    height: int,
    width: int,
) -> np.ndarray:
    """Where a camera sees the arm, about: (H, W). Its lower joints may never move.

    joint_poses (D+1, 4, 4). The arm is drawn as balls on the lines from the base to each joint.
    """
    joints = np.concatenate([np.zeros((1, 3)), joint_poses[:, :3, 3]])  # (D+2, 3) metres
    part = np.linspace(0, 1, LINK_POINTS)[:, None, None]
    centres = joints[:-1] + part * (joints[1:] - joints[:-1])  # (points, D+1, 3)
    centres = centres.reshape(-1, 3)
    poses = np.tile(np.eye(4), (len(centres), 1, 1))
    poses[:, :3, 3] = centres
    radii = np.full(len(centres), ARM_RADIUS)
    colours = np.zeros((len(centres), 3), np.uint8)
    layer = draw_spheres(poses, radii, colours, intrinsics, world_from_camera, height, width)
    return layer[..., 3] > 0


def sample_pictures(paths: list[Path], camera: str) -> np.ndarray:
    """Pictures (N, H, W, 3) of a camera, from all of a run."""
    pictures = []
    each = max(1, SAMPLES // len(paths))
    chosen = np.linspace(0, len(paths) - 1, min(SAMPLES, len(paths))).astype(int)
    for i in chosen:
        with h5py.File(paths[i], "r") as root:
            images = root["observations/images"][camera]
            for t in np.linspace(0, len(images) - 1, each).astype(int):
                pictures.append(images[t])
    return np.stack(pictures)


def static_views(
    demonstration: Episode, cameras: list[str], frames: np.ndarray, samples: dict
) -> dict[str, np.ndarray]:
    """{camera: (H, W) bool}: where nothing moves in any demonstration, and where the arm is not.

    Of a camera on the arm nowhere. samples: {camera: (N, H, W, 3)} of the whole run.
    """
    static = {}
    for camera in cameras:
        images = demonstration.images[camera][frames]
        height, width = images.shape[1:3]
        if not is_in_room(demonstration, camera):
            static[camera] = np.zeros((height, width), bool)
            continue
        static[camera] = find_static(np.concatenate([images, samples[camera]]))
        for t in frames:
            arm = arm_pixels(
                demonstration.joint_poses[t],
                demonstration.intrinsics[camera],
                demonstration.extrinsics[camera][t],
                height,
                width,
            )
            static[camera] &= ~arm
    return static
