"""Random backgrounds of the controller's spheres, and the augmentation of its images.

Images have values 0..255; (V, H, W, 3) are the V views of one moment.
All that is random comes from `rng`.
"""

import numpy as np
from numpy.random import Generator
from PIL import Image

SCENE_SHARE = 0.75  # of the backgrounds are other scenes, the rest textures
OPACITY = (0.7, 1.0)  # of the spheres (paper)
CROP = 4 / 128  # of the image's height (paper: 4 pixels of 128)
NOISE = 5  # standard deviation, of 255 (paper)
JITTER = np.array([0.2, 0.2, 0.1, 0.05])  # brightness, contrast, saturation, hue (paper)


def random_background(rng: Generator, scenes: list[dict], config: dict) -> np.ndarray:
    """The views of any scene, or random textures: (V, H, W, 3).

    scenes: a list of {camera: images (1, H, W, 3)}
    config: the controller's; its cameras and image_size are used.
    """
    cameras = config["cameras"]
    height, width = config["image_size"]
    if rng.random() < SCENE_SHARE:
        scene = scenes[rng.integers(len(scenes))]
        return np.stack([scene[camera][0] for camera in cameras])
    return np.stack([random_texture(rng, height, width) for _ in cameras])


def random_texture(rng: Generator, height: int, width: int) -> np.ndarray:
    """A random image (H, W, 3): coarse and fine colour noise, with shapes on it."""
    colour = rng.uniform(0, 255, 3)
    texture = colour * rng.uniform(0, 0.7)
    weights = rng.dirichlet((1, 0.6, 0.3)) * rng.uniform(0.3, 1)
    cells = (2, rng.integers(3, 9), rng.integers(9, 33))  # per side: coarse to fine
    for n, weight in zip(cells, weights):
        noise = rng.integers(0, 256, (n, n, 3), np.uint8)
        noise = Image.fromarray(noise)
        noise = noise.resize((width, height), Image.Resampling.BICUBIC)
        texture = texture + weight * np.asarray(noise)  # (H, W, 3)

    for _ in range(rng.integers(6)):
        # The distance from the shape's centre, in units of its half width and half height.
        x = np.abs(np.arange(width) - rng.uniform(0, width))
        x = x / rng.uniform(2, width / 3)  # (W,)
        y = np.abs(np.arange(height) - rng.uniform(0, height))
        y = y / rng.uniform(2, height / 3)
        y = y[:, None]  # (H, 1)
        colour = rng.uniform(0, 255, 3)
        if rng.random() < 0.5:
            inside = np.maximum(x, y) < 1  # a rectangle
        else:
            inside = x * x + y * y < 1  # an ellipse
        texture[inside] = colour
    return np.minimum(texture, 255)


def fade_and_soften(rng: Generator, layers: np.ndarray) -> np.ndarray:
    """Make spheres as transparent and as blurred as a painter may paint them.

    RGBA layers (V, H, W, 4) uint8 -> colour times alpha, and alpha 0..1: (V, H, W, 4).
    """
    opacity = np.float32(rng.uniform(*OPACITY) / 255)
    alpha = layers[..., 3:] * opacity
    layers = np.concatenate([layers[..., :3] * alpha, alpha], -1)
    if rng.random() < 0.5:
        # The mean of 3 x 3 pixels: first over rows, then over columns.
        layers = np.pad(layers, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        layers = (layers[:, :-2] + layers[:, 1:-1] + layers[:, 2:]) / 3
        layers = (layers[:, :, :-2] + layers[:, :, 1:-1] + layers[:, :, 2:]) / 3
    return layers


def random_crop(rng: Generator, image: np.ndarray) -> np.ndarray:
    """Pad an image (H, W, C) by repeating its edge, and crop it to its size at random."""
    height, width = image.shape[:2]
    pad = max(1, round(height * CROP))
    top, left = rng.integers(2 * pad + 1, size=2)
    image = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    return image[top : top + height, left : left + width]


def jitter_and_add_noise(rng: Generator, images: np.ndarray) -> np.ndarray:
    """Change the colours of all views alike, and add noise to each pixel.

    Images (V, H, W, 3) -> (V, H, W, 3) uint8.
    """
    jitter = rng.uniform(-JITTER, JITTER)
    brightness, contrast, saturation, hue = jitter + [1, 1, 1, 0]

    # A change of hue is a rotation about the axis of greys (Rodrigues' formula).
    identity = np.eye(3)
    grey = np.full((3, 3), 1 / 3)
    cross = np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]]) / np.sqrt(3)
    angle = 2 * np.pi * hue
    rotation = grey + np.cos(angle) * (identity - grey) + np.sin(angle) * cross

    # All four changes are one matrix; contrast is about the mean of a view.
    saturate = saturation * identity + (1 - saturation) * grey
    matrix = brightness * contrast * rotation @ saturate
    mean = images.mean((1, 2, 3), keepdims=True)  # (V, 1, 1, 1)
    offset = brightness * (1 - contrast) * mean + 0.5  # a half to round

    noise = rng.standard_normal(images.shape, np.float32) * NOISE
    images = images.astype(np.float32) @ matrix.astype(np.float32)
    images = images + offset.astype(np.float32) + noise
    return np.clip(images, 0, 255).astype(np.uint8)
