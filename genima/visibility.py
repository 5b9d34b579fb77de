"""Which spheres are in which pictures: what a camera does not see, a painter cannot learn there."""

import numpy as np

from genima.episodes import Episode
from genima.spheres import SphereStyle

LITTLE = 0.5  # of the frames: a sphere that is visible in fewer teaches little, so say so


def is_visible(episode: Episode, camera: str, later: np.ndarray, style: SphereStyle) -> np.ndarray:
    """Whether each sphere's centre is in the picture (T, S); later (T,) as in render_spheres.py."""
    poses = episode.joint_poses[later][:, [*style.joints, -1]]  # (T, S, 4, 4)
    centres = poses[..., :3, 3]  # (T, S, 3) metres
    world_from_camera = episode.extrinsics[camera]  # (T, 4, 4)
    offsets = centres - world_from_camera[:, None, :3, 3]
    points = offsets @ world_from_camera[:, :3, :3]  # (T, S, 3) in the camera's frame
    depth = points[..., 2]
    pixels = points @ episode.intrinsics[camera].T
    pixels = pixels[..., :2] / np.maximum(depth, 1e-6)[..., None]  # (T, S, 2) x, y
    height, width = episode.image_sizes[camera]
    inside = (pixels >= 0) & (pixels < [width, height])
    return inside.all(axis=-1) & (depth > 0)


def describe_visibility(seen: dict[str, list[np.ndarray]], style: SphereStyle) -> str:
    """A line for each camera: in how many of all frames each sphere's centre is in the picture.

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
    if rare:
        lines.append(
            f"Warning: no camera sees {', '.join(rare)} in half of the frames: check the "
            "calibration with --preview, or choose other --joints or another --radius."
        )
    return "\n".join(lines)
