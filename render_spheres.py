"""Stage 1: draw the target spheres: where the joints will be, K steps from now, as each camera would see them.

In:   runs/demo/episodes/<task>/<name>.hdf5     (collect_demos.py)
Out:  runs/demo/spheres/<task>/<name>.hdf5      attrs format, horizon, episode, settings
          /layers/<camera>   (T, H, W, 4) uint8 RGBA, to be laid over a picture with `over`
          /target/qpos       (T, D+1) joint positions K steps later, and the gripper command (0 or 1) sent then
          /cameras/<camera>  intrinsics, extrinsics as in an episode, where --calibration measured them anew

    python render_spheres.py                    for every episode of runs/demo
    python render_spheres.py --preview          and runs/demo/spheres/preview.png and preview.mp4

Paper, section 3.1 and appendix: joints 2, 4 and 6 in red, green and purple; the gripper in cyan when it is to be open, in
yellow when it is to be closed; striped, so that a joint's turning can be seen. A sphere needs no renderer: it is drawn by
intersecting the rays of the pixels around it with it, exactly.
"""

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
import yaml
from PIL import Image

from episodes import (CAMERAS, UserError, check_alike, check_array, find_episodes, read_episode, read_hdf5, run_stage, write_hdf5,
                      write_whole)  # fmt: skip
from films import two_columns, write_video
from sims.parallel import in_parallel

FORMAT = "nanogenima-spheres-1"
JOINTS = (1, 3, 5)  # joints 2, 4 and 6 (paper, section 3.1)
RED, GREEN, PURPLE, CYAN, YELLOW = (255, 0, 0), (0, 255, 0), (160, 32, 240), (0, 255, 255), (255, 255, 0)
RADIUS = 0.01  # metres, times a factor per camera (published code)
RADIUS_FACTOR = {"wrist": 3, "front": 8, "left_shoulder": 6.5, "right_shoulder": 6.5, "overhead": 6.5}
DARK_STRIPE = 0.6  # brightness of every other sector; ours, for the paper only says striped


@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """Folder of the run; episodes/ inside it is read, spheres/ is written."""
    horizon: int = 8
    """K: how many steps ahead the spheres show the robot (paper: 20 at RLBench's 20 Hz)."""
    size: int = 0
    """Height of the layers in pixels, the width follows; 0: as large as the camera's images."""
    calibration: Path | None = None
    """JSON or YAML file of cameras measured anew: {camera: {intrinsics: 3x3, world_from_camera: 4x4}}; for a camera on the arm
    last_joint_from_camera in place of world_from_camera."""
    preview: bool = False
    """Also draw preview.png and preview.mp4 of the first episode."""


def draw_spheres(poses, radii, colours, intrinsics, world_from_camera, height, width):
    """Draw striped spheres as a camera sees them: poses (S, 4, 4), radii (S,), colours (S, 3) -> (H, W, 4) uint8 RGBA."""
    picture, drawn = np.zeros((height, width, 4), np.uint8), []
    rotation = world_from_camera[:3, :3]
    centres = ((poses[:, :3, 3] - world_from_camera[:3, 3]) @ rotation).tolist()  # S times (x, y, z) in the camera
    axes = (np.swapaxes(poses[:, :3, :3], 1, 2) @ rotation).astype(np.float32)  # (S, 3, 3) each joint's x, y, z in the camera
    colours, radii = np.asarray(colours, np.float32), np.asarray(radii).tolist()
    focal_x, focal_y, middle_x, middle_y = intrinsics[[0, 1, 0, 1], [0, 1, 2, 2]].tolist()
    rays_x = (np.arange(0.5, width, dtype=np.float32) - middle_x) / focal_x  # (W,)  a pixel's ray is (x, y, 1)
    rays_y = (np.arange(0.5, height, dtype=np.float32) - middle_y) / focal_y  # (H,)

    # Far to near, by the squared distance at which the camera's rays touch: no sphere's edge lies before one with a shorter distance.
    tangents = [math.hypot(*centre) ** 2 - radius**2 for centre, radius in zip(centres, radii)]
    for s in sorted(range(len(radii)), key=tangents.__getitem__, reverse=True):
        (across, down, ahead), reach = centres[s], radii[s] + centres[s][2] / focal_x / 2  # half a pixel more, for the edge
        if ahead <= 0 or tangents[s] <= 0:
            continue  # behind the camera, or around it
        left, right = np.searchsorted(rays_x, touching(across, ahead, reach))
        top, bottom = np.searchsorted(rays_y, touching(down, ahead, reach))
        if left == right or top == bottom:
            continue
        cx, cy, cz, radius = np.float32([*centres[s], radii[s]])
        x, y, layer = rays_x[left:right], rays_y[top:bottom, None], picture[top:bottom, left:right]
        rho2, t = meet(x, y, cx, cy, cz, radius)  # (h, w)
        coverage = np.minimum(np.maximum((radius - np.sqrt(rho2)) / (cz / focal_x) + 0.5, 0), 1)  # cz / focal_x: a pixel's width there
        for other in drawn:  # a sphere that reaches into this one may hide a part of it
            if math.dist(centres[other], centres[s]) < radii[other] + radii[s]:
                other_rho2, other_t = meet(x, y, *centres[other], radii[other])
                coverage *= (other_t > t) | (other_rho2 > radii[other] ** 2)
        drawn.append(s)

        # Stripes: which of six sectors around the joint's axis the point (u, v, .) lies in. sin(3 angle) is negative in every
        # other one, and is 3 sin cos² - sin³, so no angle is needed.
        (a, b, c), (d, e, f), _ = axes[s]
        u = (x * a + (y * b + c)) * t - (a * cx + b * cy + c * cz)
        v = (x * d + (y * e + f)) * t - (d * cx + e * cy + f * cz)
        brightness = np.where(v * (3 * u * u - v * v) < 0, np.float32(DARK_STRIPE), np.float32(1))

        below = (1 - coverage) * (layer[..., 3] * np.float32(1 / 255))  # what still shows of the layer's alpha
        alpha = coverage + below
        scale = 1 / np.maximum(alpha, np.float32(1e-6))
        ours, theirs = (coverage * brightness * scale)[..., None], (below * scale)[..., None]  # shares of the colour, (h, w, 1)
        layer[..., :3] = ours * colours[s] + theirs * layer[..., :3] + 0.5
        layer[..., 3] = alpha * 255 + 0.5
    return picture


def meet(x, y, cx, cy, cz, radius):
    """The rays t * (x, y, 1) and a sphere: squared distance rho2 of ray and centre, depth t of the point that is seen."""
    length2 = x * x + (y * y + 1)
    along = np.maximum(x * cx + (y * cy + cz), 0)
    nearest = along / length2  # where the ray passes the centre, or begins
    rho2 = np.maximum((cx * cx + cy * cy + cz * cz) - along * nearest, 0)
    return rho2, nearest - np.sqrt(np.maximum(radius * radius - rho2, 0) / length2)


def touching(across, ahead, radius):
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


def over(layer, picture):
    """Lay RGBA layers (..., H, W, 4) over RGB pictures (..., H, W, 3), both uint8."""
    alpha = layer[..., 3:].astype(np.uint16)
    return ((layer[..., :3] * alpha + picture * (255 - alpha) + 127) // 255).astype(np.uint8)


@dataclass
class Chain:
    """A robot's kinematics, found in an episode: world_from_joint[i] = world_from_joint[i-1] @ links[i] @ turn about z by q[i]."""

    links: np.ndarray  # (D, 4, 4)
    tool: np.ndarray  # (4, 4) last joint from tool centre
    mounted: dict[str, np.ndarray]  # camera on the arm: (4, 4) last joint from camera
    fixed: dict[str, np.ndarray]  # camera in the room: (4, 4) world from camera

    @classmethod
    def from_episode(cls, episode):
        joints = episode.joint_poses.astype(np.float64)  # (T, J, 4, 4)
        before = np.concatenate([np.broadcast_to(np.eye(4), joints[:, :1].shape), joints[:, :-2]], axis=1)
        links = np.linalg.inv(before) @ joints[:, :-1] @ turns(-episode.qpos[:, :-1])  # (T, D, 4, 4)
        from_world = np.linalg.inv(joints[:, -2])
        what = f"{episode.path}: observations/joint_poses"
        tool = constant(from_world @ joints[:, -1], f"{what}: the tool centre is not fixed to the last joint.")
        links = constant(links, f"{what} does not follow qpos through a chain of joints that turn about their z axes.")
        mounted, fixed = {}, {}
        for camera, poses in episode.extrinsics.items():
            # A camera that never moves is in the room, unless the arm never moved either: then its name has to tell.
            if spread(poses) < TOLERANCE and (spread(from_world) >= TOLERANCE or camera != "wrist"):
                fixed[camera] = poses[0].astype(np.float64)
            else:
                mounted[camera] = constant(from_world @ poses, f"{episode.path}: cameras/{camera}/extrinsics moves, "
                                           "but not with the last joint.")
        return cls(links, tool, mounted, fixed)

    def joint_poses(self, q):
        """Joint positions (..., D) -> poses (..., J, 4, 4), the last the tool centre's."""
        steps, pose, poses = self.links @ turns(np.asarray(q)), np.eye(4), []  # steps (..., D, 4, 4)
        for i in range(len(self.links)):
            pose = pose @ steps[..., i, :, :]
            poses.append(pose)
        return np.stack([*poses, pose @ self.tool], axis=-3)

    def camera_pose(self, camera, joint_poses):
        """World from camera (..., 4, 4), when the joints are at joint_poses (..., J, 4, 4)."""
        if camera in self.mounted:
            return joint_poses[..., -2, :, :] @ self.mounted[camera]
        return np.broadcast_to(self.fixed[camera], (*joint_poses.shape[:-3], 4, 4))


TOLERANCE = 1e-3  # metres, and parts of a rotation matrix


def spread(poses):
    return np.ptp(poses, axis=0).max()


def constant(poses, otherwise):
    """The mean over the frames of poses (T, ..., 4, 4) that ought not to change."""
    if spread(poses) > TOLERANCE:
        raise UserError(f"{otherwise} Check how the episode was recorded.")
    return poses.mean(axis=0)


def turns(angles):
    """Rotations about z: (...) -> (..., 4, 4)."""
    matrices = np.tile(np.eye(4), (*angles.shape, 1, 1))
    matrices[..., 0, 0] = matrices[..., 1, 1] = np.cos(angles)
    matrices[..., 1, 0] = np.sin(angles)
    matrices[..., 0, 1] = -matrices[..., 1, 0]
    return matrices


def load_calibration(path):
    """Read the cameras measured anew: {camera: {"intrinsics": (3, 3), and one pose (4, 4) by its name}}."""
    try:
        cameras = yaml.safe_load(Path(path).read_text())  # YAML reads JSON too
        cameras = {camera: {key: np.array(value, float) for key, value in entries.items()} for camera, entries in cameras.items()}
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no file of cameras ({' '.join(str(error).split())}): see --calibration in --help.") from error
    for camera, entries in cameras.items():
        if set(entries) - {"intrinsics"} not in ({"world_from_camera"}, {"last_joint_from_camera"}) or "intrinsics" not in entries:
            raise UserError(f"{path}: {camera} needs intrinsics, and either world_from_camera or last_joint_from_camera.")
        for key, value in entries.items():
            check_array(value, (3, 3) if key == "intrinsics" else (4, 4), np.float64, f"{path}: {camera}/{key}")
    return cameras


def render(source, target, horizon, size, calibration, first):
    """Draw one episode's spheres into the file `target`, unless that was done with these settings. True when it is there."""
    episode = read_episode(source, images=False)
    check_alike(episode, first)
    for camera, measured in calibration.items():
        if camera not in episode.intrinsics:
            raise UserError(f"{source} has no camera '{camera}', which the calibration names.")
        episode.intrinsics[camera] = measured["intrinsics"]
        if "world_from_camera" in measured:
            episode.extrinsics[camera][:] = measured["world_from_camera"]
        else:
            episode.extrinsics[camera] = episode.joint_poses[:, -2] @ measured["last_joint_from_camera"]
    drawn_from = [episode.qpos, episode.action, episode.joint_poses]
    for camera in sorted(episode.image_sizes):
        drawn_from += [episode.intrinsics[camera], episode.extrinsics[camera]]
    fingerprint = repr([horizon, size, sorted(episode.image_sizes.items())]).encode() + b"".join(array.tobytes() for array in drawn_from)
    settings = hashlib.sha256(fingerprint).hexdigest()[:16]
    if target.exists():
        with read_hdf5(target, FORMAT) as root:
            drawn, before = root.attrs["settings"], root.attrs["horizon"]
        if drawn != settings:
            other = f"with horizon {before}, not {horizon}" if before != horizon else "from another recording, size or calibration"
            raise UserError(f"{target} was drawn {other}: delete {target.parent.parent} or use another --run.")
        return True

    frames = len(episode.qpos)
    later = np.minimum(np.arange(frames) + horizon, frames - 1)  # (T,)
    command = np.round(episode.action[later, -1:])  # (T, 1)
    with write_hdf5(target) as root:
        root.attrs.update(format=FORMAT, horizon=horizon, episode=f"{source.parent.name}/{source.name}", settings=settings)
        root["target/qpos"] = np.concatenate([episode.qpos[later, :-1], command], axis=1)
        for camera in calibration:  # for whoever draws the spheres again
            root[f"cameras/{camera}/intrinsics"] = episode.intrinsics[camera]
            root[f"cameras/{camera}/extrinsics"] = episode.extrinsics[camera]
        for camera, (image_height, image_width) in episode.image_sizes.items():
            height = size or image_height
            width = round(image_width * height / image_height)
            intrinsics = np.diag([width / image_width, height / image_height, 1]) @ episode.intrinsics[camera]
            layers = np.stack([
                draw_spheres(*target_spheres(episode.joint_poses[later[t]], command[t, 0] == 1, camera),
                             intrinsics, episode.extrinsics[camera][t], height, width) for t in range(frames)])
            root.create_dataset(f"layers/{camera}", data=layers, chunks=(1, height, width, 4), compression=1)
    return True


def read_spheres(path):
    """Read and check a file of this stage -> layers {camera: (T, H, W, 4)}, target_qpos (T, D+1)."""
    with read_hdf5(path, FORMAT) as root:
        qpos = root["target/qpos"][()]
        layers = {camera: data[()] for camera, data in root["layers"].items()}
    check_array(qpos, (None, None), np.float32, f"{path}: target/qpos")
    for camera, layer in layers.items():
        check_array(layer, (len(qpos), None, None, 4), np.uint8, f"{path}: layers/{camera}")
    return layers, qpos


def preview(source, target, folder):
    """Contact sheet and film of one episode: per camera the observation, and the spheres over it."""
    episode = read_episode(source)
    layers, _ = read_spheres(target)
    frames, cells = len(episode.qpos), []
    height, width = np.max([layer.shape[1:3] for layer in layers.values()], axis=0)
    fit = lambda pictures: np.stack([Image.fromarray(picture).resize((width, height)) for picture in pictures])  # noqa: E731
    for camera in sorted(layers, key=lambda name: (*CAMERAS, name).index(name)):
        seen = fit(episode.images[camera])  # (T, H, W, 3)
        cells += [seen, over(fit(layers[camera]), seen)]
    rows = [np.concatenate([cell[t] for cell in cells], axis=1) for t in np.linspace(0, frames - 1, min(5, frames)).round().astype(int)]
    with write_whole(folder / "preview.png") as path:
        Image.fromarray(np.concatenate(rows)).save(path)
    write_video(folder / "preview.mp4", two_columns(cells[1::2]), episode.fps)


def main():
    settings = tyro.cli(Settings, description=__doc__)
    if settings.horizon < 1 or settings.size < 0:
        raise UserError("--horizon must be 1 or more, and --size 0 or more.")
    calibration = load_calibration(settings.calibration) if settings.calibration else {}
    sources = find_episodes(settings.run / "episodes")
    first = read_episode(sources[0], images=False)
    if len(first.joint_poses[0]) <= max(JOINTS) + 1:
        raise UserError(f"{sources[0]} has {first.qpos.shape[1] - 1} joints, but spheres are drawn on joints 2, 4 and 6.")
    folder = settings.run / "spheres"
    targets = [folder / source.parent.name / source.name for source in sources]

    jobs = [(render, source, target, settings.horizon, settings.size, calibration, first) for source, target in zip(sources, targets)]
    for _, done in in_parallel(jobs, os.cpu_count(), "spheres", "episode"):
        if not done:
            raise UserError("A process that draws died twice: run the same command again; finished files are kept.")
    if settings.preview:
        preview(sources[0], targets[0], folder)
    print(f"{len(targets)} files of spheres, {settings.horizon} steps ahead, are in {folder}.")


if __name__ == "__main__":
    run_stage(main)
