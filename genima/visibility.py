"""Which spheres are in which pictures: what a camera does not see, a painter cannot learn there."""

import numpy as np

from genima.episodes import Episode
from genima.spheres import RADIUS, SphereStyle

LITTLE = 0.5  # of all spheres and frames: where fewer are visible, there is little to learn


def is_visible(episode: Episode, camera: str, later: np.ndarray, style: SphereStyle) -> np.ndarray:
    """Whether each sphere is in the picture, at least a part of it: (T, S).

    later (T,): the frame that each frame's spheres show, as in render_spheres.py. What hides behind
    another sphere counts.
    """
    poses = episode.joint_poses[later][:, [*style.joints, -1]]  # (T, S, 4, 4)
    centres = poses[..., :3, 3]  # (T, S, 3) metres
    world_from_camera = episode.extrinsics[camera]  # (T, 4, 4)
    offsets = centres - world_from_camera[:, None, :3, 3]
    points = offsets @ world_from_camera[:, :3, :3]  # (T, S, 3) in the camera's frame
    depth = points[..., 2]
    pixels = points @ episode.intrinsics[camera].T
    pixels = pixels[..., :2] / np.maximum(depth, 1e-6)[..., None]  # (T, S, 2) x, y
    height, width = episode.image_sizes[camera]
    focal_lengths = episode.intrinsics[camera][[0, 1], [0, 1]]
    reach = RADIUS * style.factor(camera) * focal_lengths / np.maximum(depth, 1e-6)[..., None]
    inside = (pixels > -reach) & (pixels < [width, height] + reach)
    return inside.all(axis=-1) & (depth > 0)


def describe_visibility(seen: dict[str, list[np.ndarray]], style: SphereStyle) -> str:
    """A line for each camera: in how many of all frames each sphere is in the picture.

    seen: {camera: (T, S) of each episode}.
    """
    names = [f"joint {joint + 1}" for joint in style.joints] + ["gripper"]
    shares = {camera: np.concatenate(episodes).mean(axis=0) for camera, episodes in seen.items()}
    lines = ["In the picture, of all frames:"]
    for camera, share in shares.items():
        parts = [f"{name} {part:.0%}" for name, part in zip(names, share)]
        lines.append(f"  {camera}: {', '.join(parts)}")
    best = np.max(list(shares.values()), axis=0)  # (S,)
    rare = [name for name, part in zip(names, best) if part < LITTLE]
    if best.mean() < LITTLE or best[-1] < LITTLE:
        lines.append(
            f"Warning: no camera sees {', '.join(rare)} in half of the frames: check the "
            "calibration with --preview, or choose other --joints."
        )
    return "\n".join(lines)
