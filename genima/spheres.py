"""The spheres: drawn as a camera sees them, and laid over an image.

    poses, radii, colours = target_spheres(joint_poses, gripper_open=True, camera="front")
    layer = draw_spheres(poses, radii, colours, intrinsics, world_from_camera, height, width)
    painted = alpha_composite(layer, image)

Paper, section 3.1: joints 2, 4 and 6 in red, green and purple, the gripper in cyan when it is to be
open and in yellow when it is to be closed. The spheres are striped, so that a joint's rotation can
be seen. No renderer is needed: each sphere is where the rays of the pixels around it meet it.
"""

import math
from dataclasses import dataclass, field

import h5py
import numpy as np

from genima.arrays import check_array, read_dataset
from genima.files import read_hdf5

FORMAT = "nanogenima-spheres-1"
JOINTS = (1, 3, 5)  # joints 2, 4 and 6 (paper, section 3.1)
RED = (255, 0, 0)
GREEN = (0, 255, 0)
PURPLE = (160, 32, 240)
CYAN = (0, 255, 255)
YELLOW = (255, 255, 0)
RADIUS = 0.01  # metres, times a factor per camera (published code)
RADIUS_FACTOR = {
    "wrist": 3,
    "front": 8,
    "left_shoulder": 6.5,
    "right_shoulder": 6.5,
    "overhead": 6.5,
}
OTHER_FACTOR = 6.5  # of a camera in the room that the paper does not have
ARM_FACTOR = 3  # of a camera on the arm that the paper does not have: as its wrist's
DARK_STRIPE = 0.6  # brightness of every other sector; ours, for the paper only says striped


@dataclass(frozen=True)
class SphereStyle:
    """What is drawn, where it is not the paper's: on which joints, and how large in which view."""

    joints: tuple[int, ...] = JOINTS  # indices; at most three, in red, green and purple
    factors: dict[str, float] = field(default_factory=dict)  # of RADIUS, by camera

    def factor(self, camera: str) -> float:
        return self.factors.get(camera, RADIUS_FACTOR.get(camera, OTHER_FACTOR))


PAPER = SphereStyle()


def target_spheres(
    joint_poses: np.ndarray, gripper_open: bool, camera: str, style: SphereStyle = PAPER
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The paper's four spheres for one camera: S = 4, or one for each joint of the style and one.

    joint_poses (D+1, 4, 4) world from joint, the last the tool -> poses (S, 4, 4), radii (S,) in
    metres, colours (S, 3) uint8.
    """
    poses = joint_poses[[*style.joints, -1]]
    radii = np.full(len(poses), RADIUS * style.factor(camera))
    gripper = CYAN if gripper_open else YELLOW
    of_joints = (RED, GREEN, PURPLE)[: len(style.joints)]
    colours = np.array([*of_joints, gripper], np.uint8)
    return poses, radii, colours


def write_style(root: h5py.File, style: SphereStyle):
    """Note in a file of spheres what is not the paper's; of the paper's style nothing."""
    if style.joints != JOINTS:
        root.attrs["joints"] = np.array(style.joints) + 1  # as people count
    for camera, factor in style.factors.items():
        root[f"layers/{camera}"].attrs["radius_factor"] = factor


def read_style(root: h5py.File) -> SphereStyle:
    """The style that a file of spheres was drawn in."""
    joints = JOINTS
    if "joints" in root.attrs:
        joints = tuple(int(joint) - 1 for joint in root.attrs["joints"])
    factors = {}
    for camera, layer in root.get("layers", {}).items():
        if "radius_factor" in layer.attrs:
            factors[camera] = float(layer.attrs["radius_factor"])
    return SphereStyle(joints, factors)


def draw_spheres(
    poses: np.ndarray,
    radii: np.ndarray,
    colours: np.ndarray,
    intrinsics: np.ndarray,
    world_from_camera: np.ndarray,
    height: int,
    width: int,
) -> np.ndarray:
    """Draw S striped spheres as a camera sees them -> (height, width, 4) uint8 RGBA.

    poses (S, 4, 4) world from joint; radii (S,) metres; colours (S, 3) 0..255; intrinsics (3, 3)
    pixels; world_from_camera (4, 4), OpenCV axes. A sphere behind the camera or around it is not
    drawn.
    """
    # Into the camera's frame: x right, y down, z forward.
    rotation = world_from_camera[:3, :3]
    centres = ((poses[:, :3, 3] - world_from_camera[:3, 3]) @ rotation).tolist()  # S x (x, y, z)
    axes = np.swapaxes(poses[:, :3, :3], 1, 2) @ rotation  # (S, 3, 3) each joint's x, y, z axes
    axes = axes.astype(np.float32)
    colours = np.asarray(colours, np.float32)
    radii = np.asarray(radii).tolist()

    # The ray of a pixel's centre is t * (x, y, 1).
    fx, fy, cx, cy = intrinsics[[0, 1, 0, 1], [0, 1, 2, 2]].tolist()
    rays_x = (np.arange(0.5, width, dtype=np.float32) - cx) / fx  # (W,)
    rays_y = (np.arange(0.5, height, dtype=np.float32) - cy) / fy  # (H,)

    # From far to near, by the squared distance at which the camera's rays touch a sphere: no
    # sphere's edge lies before the edge of one with a shorter distance.
    tangents = [math.hypot(*centre) ** 2 - radius**2 for centre, radius in zip(centres, radii)]
    far_to_near = sorted(range(len(radii)), key=tangents.__getitem__, reverse=True)

    layer = np.zeros((height, width, 4), np.uint8)
    drawn = []
    for s in far_to_near:
        centre = centres[s]
        radius = radii[s]
        if centre[2] <= 0 or tangents[s] <= 0:
            continue  # behind the camera, or around it

        # Which pixels it may touch: a window, half a pixel larger than the sphere.
        reach = radius + centre[2] / fx / 2
        left, right = np.searchsorted(rays_x, tangent_slopes(centre[0], centre[2], reach))
        top, bottom = np.searchsorted(rays_y, tangent_slopes(centre[1], centre[2], reach))
        if left == right or top == bottom:
            continue
        x = rays_x[left:right]  # (w,)
        y = rays_y[top:bottom, None]  # (h, 1)
        centre32 = np.float32(centre)
        radius32 = np.float32(radius)

        # Ray meets sphere, and how much of each pixel it covers.
        distance2, depth = intersect_rays_sphere(x, y, *centre32, radius32)  # (h, w) each
        pixel_width = centre32[2] / fx  # metres, where the sphere is
        coverage = (radius32 - np.sqrt(distance2)) / pixel_width + 0.5
        coverage = np.minimum(np.maximum(coverage, 0), 1)
        for other in drawn:
            # A farther sphere that reaches into this one may hide a part of it.
            if math.dist(centres[other], centre) < radii[other] + radius:
                other_distance2, other_depth = intersect_rays_sphere(
                    x, y, *centres[other], radii[other]
                )
                coverage *= (other_depth > depth) | (other_distance2 > radii[other] ** 2)
        drawn.append(s)

        brightness = stripes(x, y, depth, axes[s], centre32)
        lay_over(layer[top:bottom, left:right], colours[s], brightness, coverage)
    return layer


def intersect_rays_sphere(x, y, cx, cy, cz, radius):
    """Where the rays t * (x, y, 1) meet the sphere around (cx, cy, cz), in the camera's frame.

    x (w,), y (h, 1) -> squared distance of ray and centre (h, w), and depth t of the point that is
    seen (h, w); where the ray misses, of the ray's point nearest to the centre.
    """
    length2 = x * x + (y * y + 1)
    along = np.maximum(x * cx + (y * cy + cz), 0)
    nearest = along / length2  # t of the ray's point nearest to the centre, not behind the camera
    distance2 = np.maximum((cx * cx + cy * cy + cz * cz) - along * nearest, 0)
    half_chord2 = np.maximum(radius * radius - distance2, 0)
    return distance2, nearest - np.sqrt(half_chord2 / length2)


def tangent_slopes(across: float, ahead: float, radius: float) -> tuple[float, float]:
    """The slopes across/ahead between which rays from the camera meet a sphere.

    Seen along one axis of the image: the sphere's centre is `across` to the side (right or down)
    and `ahead` of the camera.
    """
    if ahead <= radius:
        return -math.inf, math.inf  # it reaches beside the camera
    tangent2 = ahead**2 - radius**2
    half = radius * math.sqrt(across**2 + tangent2)
    return (across * ahead - half) / tangent2, (across * ahead + half) / tangent2


def stripes(x, y, depth, axes, centre):
    """Brightness (h, w) of the points at `depth` on the rays: six sectors around the joint's axis.

    axes (3, 3): the joint's x, y and z axes in the camera's frame; the stripes run along z.
    """
    cx, cy, cz = centre
    (a, b, c), (d, e, f), _ = axes
    # The point in the joint's frame is (u, v, .): its product with the axes x and y.
    u = (x * a + (y * b + c)) * depth - (a * cx + b * cy + c * cz)
    v = (x * d + (y * e + f)) * depth - (d * cx + e * cy + f * cz)
    # sin(3 angle) is negative in every other sector. It is 3 sin cos^2 - sin^3: no angle is needed.
    dark = v * (3 * u * u - v * v) < 0
    return np.where(dark, np.float32(DARK_STRIPE), np.float32(1))


def lay_over(layer, colour, brightness, coverage):
    """Lay a sphere over a part of an RGBA layer (h, w, 4), in place.

    colour (3,) 0 to 255; brightness and coverage (h, w) 0 to 1.
    Colours are not premultiplied, so both are weighted by their share of the alpha.
    """
    below = (1 - coverage) * (layer[..., 3] * np.float32(1 / 255))  # alpha that still shows
    alpha = coverage + below
    scale = 1 / np.maximum(alpha, np.float32(1e-6))
    share = (coverage * brightness * scale)[..., None]  # (h, w, 1) of the sphere's colour
    share_below = (below * scale)[..., None]  # (h, w, 1) of the colour below
    layer[..., :3] = share * colour + share_below * layer[..., :3] + 0.5  # + 0.5: to round
    layer[..., 3] = alpha * 255 + 0.5


def alpha_composite(layer: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Lay RGBA layers (..., H, W, 4) over RGB images (..., H, W, 3), both uint8."""
    alpha = layer[..., 3:].astype(np.uint16)
    mixed = layer[..., :3] * alpha + image * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def read_spheres(path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Read and check a file of render_spheres.py.

    Returns layers {camera: (T, H, W, 4) uint8} and target_qpos (T, D+1). Raises UserError.
    """
    with read_hdf5(path, FORMAT) as root:
        target_qpos = read_dataset(root, "target/qpos")
        layers = {camera: read_dataset(root["layers"], camera) for camera in root["layers"]}
    check_array(target_qpos, (None, None), np.float32, f"{path}: target/qpos")
    frames = len(target_qpos)
    for camera, layer in layers.items():
        check_array(layer, (frames, None, None, 4), np.uint8, f"{path}: layers/{camera}")
    return layers, target_qpos
