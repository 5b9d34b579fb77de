"""The spheres: drawn as a camera would see them, and laid over a picture."""

import math

import numpy as np

from genima.episodes import check_array
from genima.files import read_hdf5

FORMAT = "nanogenima-spheres-1"
JOINTS = (1, 3, 5)  # joints 2, 4 and 6 (paper, section 3.1)
RED, GREEN, PURPLE, CYAN, YELLOW = (
    (255, 0, 0),
    (0, 255, 0),
    (160, 32, 240),
    (0, 255, 255),
    (255, 255, 0),
)
RADIUS = 0.01  # metres, times a factor per camera (published code)
RADIUS_FACTOR = {
    "wrist": 3,
    "front": 8,
    "left_shoulder": 6.5,
    "right_shoulder": 6.5,
    "overhead": 6.5,
}
DARK_STRIPE = 0.6  # brightness of every other sector; ours, for the paper only says striped


def draw_spheres(poses, radii, colours, intrinsics, world_from_camera, height, width):
    """Draw striped spheres as a camera sees them: poses (S, 4, 4), radii (S,), colours (S, 3) -> (H, W, 4) uint8 RGBA."""
    picture, drawn = np.zeros((height, width, 4), np.uint8), []
    rotation = world_from_camera[:3, :3]
    centres = (
        (poses[:, :3, 3] - world_from_camera[:3, 3]) @ rotation
    ).tolist()  # S times (x, y, z) in the camera
    axes = (np.swapaxes(poses[:, :3, :3], 1, 2) @ rotation).astype(
        np.float32
    )  # (S, 3, 3) each joint's x, y, z in the camera
    colours, radii = np.asarray(colours, np.float32), np.asarray(radii).tolist()
    focal_x, focal_y, middle_x, middle_y = intrinsics[[0, 1, 0, 1], [0, 1, 2, 2]].tolist()
    rays_x = (
        np.arange(0.5, width, dtype=np.float32) - middle_x
    ) / focal_x  # (W,)  a pixel's ray is (x, y, 1)
    rays_y = (np.arange(0.5, height, dtype=np.float32) - middle_y) / focal_y  # (H,)

    # Far to near, by the squared distance at which the camera's rays touch: no sphere's edge lies before one with a shorter distance.
    tangents = [math.hypot(*centre) ** 2 - radius**2 for centre, radius in zip(centres, radii)]
    for s in sorted(range(len(radii)), key=tangents.__getitem__, reverse=True):
        (across, down, ahead), reach = (
            centres[s],
            radii[s] + centres[s][2] / focal_x / 2,
        )  # half a pixel more, for the edge
        if ahead <= 0 or tangents[s] <= 0:
            continue  # behind the camera, or around it
        left, right = np.searchsorted(rays_x, tangent_slopes(across, ahead, reach))
        top, bottom = np.searchsorted(rays_y, tangent_slopes(down, ahead, reach))
        if left == right or top == bottom:
            continue
        cx, cy, cz, radius = np.float32([*centres[s], radii[s]])
        x, y, layer = rays_x[left:right], rays_y[top:bottom, None], picture[top:bottom, left:right]
        rho2, t = intersect_rays_sphere(x, y, cx, cy, cz, radius)  # (h, w)
        coverage = np.minimum(
            np.maximum((radius - np.sqrt(rho2)) / (cz / focal_x) + 0.5, 0), 1
        )  # cz / focal_x: a pixel's width there
        for other in drawn:  # a sphere that reaches into this one may hide a part of it
            if math.dist(centres[other], centres[s]) < radii[other] + radii[s]:
                other_rho2, other_t = intersect_rays_sphere(x, y, *centres[other], radii[other])
                coverage *= (other_t > t) | (other_rho2 > radii[other] ** 2)
        drawn.append(s)

        # Stripes: which of six sectors around the joint's axis the point (u, v, .) lies in. sin(3 angle) is negative in every
        # other one, and is 3 sin cos² - sin³, so no angle is needed.
        (a, b, c), (d, e, f), _ = axes[s]
        u = (x * a + (y * b + c)) * t - (a * cx + b * cy + c * cz)
        v = (x * d + (y * e + f)) * t - (d * cx + e * cy + f * cz)
        brightness = np.where(v * (3 * u * u - v * v) < 0, np.float32(DARK_STRIPE), np.float32(1))

        below = (1 - coverage) * (
            layer[..., 3] * np.float32(1 / 255)
        )  # what still shows of the layer's alpha
        alpha = coverage + below
        scale = 1 / np.maximum(alpha, np.float32(1e-6))
        ours, theirs = (
            (coverage * brightness * scale)[..., None],
            (below * scale)[..., None],
        )  # shares of the colour, (h, w, 1)
        layer[..., :3] = ours * colours[s] + theirs * layer[..., :3] + 0.5
        layer[..., 3] = alpha * 255 + 0.5
    return picture


def intersect_rays_sphere(x, y, cx, cy, cz, radius):
    """The rays t * (x, y, 1) and a sphere: squared distance rho2 of ray and centre, depth t of the point that is seen."""
    length2 = x * x + (y * y + 1)
    along = np.maximum(x * cx + (y * cy + cz), 0)
    nearest = along / length2  # where the ray passes the centre, or begins
    rho2 = np.maximum((cx * cx + cy * cy + cz * cz) - along * nearest, 0)
    return rho2, nearest - np.sqrt(np.maximum(radius * radius - rho2, 0) / length2)


def tangent_slopes(across, ahead, radius):
    """The slopes across / ahead between which rays from the camera meet a sphere, seen along one axis of the picture."""
    if ahead <= radius:
        return -math.inf, math.inf  # it reaches beside the camera
    tangent2 = ahead**2 - radius**2
    half = radius * math.sqrt(across**2 + tangent2)
    return (across * ahead - half) / tangent2, (across * ahead + half) / tangent2


def target_spheres(joint_poses, gripper_open, camera):
    """The paper's four spheres for one camera: joint_poses (J, 4, 4) -> poses (4, 4, 4), radii (4,), colours (4, 3)."""
    poses = joint_poses[[*JOINTS, -1]]
    radii = np.full(4, RADIUS * RADIUS_FACTOR.get(camera, 6.5))
    colours = np.array([RED, GREEN, PURPLE, CYAN if gripper_open else YELLOW], np.uint8)
    return poses, radii, colours


def alpha_composite(layer, picture):
    """Lay RGBA layers (..., H, W, 4) over RGB pictures (..., H, W, 3), both uint8."""
    alpha = layer[..., 3:].astype(np.uint16)
    return ((layer[..., :3] * alpha + picture * (255 - alpha) + 127) // 255).astype(np.uint8)


def read_spheres(path):
    """Read and check a file of this stage -> layers {camera: (T, H, W, 4)}, target_qpos (T, D+1)."""
    with read_hdf5(path, FORMAT) as root:
        qpos = root["target/qpos"][()]
        layers = {camera: data[()] for camera, data in root["layers"].items()}
    check_array(qpos, (None, None), np.float32, f"{path}: target/qpos")
    for camera, layer in layers.items():
        check_array(layer, (len(qpos), None, None, 4), np.uint8, f"{path}: layers/{camera}")
    return layers, qpos
