"""Stage 1: draw the target spheres: where the joints will be K steps later, for each camera.

    In:   <run>/episodes/<task>/<name>.hdf5      (collect_demos.py)
    Out:  <run>/spheres/<task>/<name>.hdf5       attrs format, horizon, episode, settings
          /layers/<camera>   (T, H, W, 4) uint8 RGBA, to lay over an image
          /target/qpos       (T, D+1) joint positions K steps later (rad), and the gripper
                             command (0 or 1) sent then
          /cameras/<camera>  intrinsics and extrinsics as in an episode, where
                             --calibration measured them again

    python render_spheres.py                    for every episode of runs/demo
    python render_spheres.py --preview          and runs/demo/spheres/preview.png and preview.mp4

Paper, section 3.1 and appendix. Which spheres, how large and in which colours: target_spheres in
genima/spheres.py. A file that is there already and was drawn with the same settings is kept.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from genima.calibration import load_calibration
from genima.episodes import Episode, check_alike, find_episodes, order_cameras, read_episode
from genima.files import (
    UserError,
    check_number,
    read_hdf5,
    run_stage,
    write_hdf5,
    write_whole,
)
from genima.kinematics import is_in_room
from genima.parallel import run_in_parallel, usable_cores
from genima.plots import write_video
from genima.previews import contact_sheet, labelled_views
from genima.robots import sphere_joints
from genima.spheres import (
    ARM_FACTOR,
    FORMAT,
    PAPER,
    RADIUS_FACTOR,
    SphereStyle,
    alpha_composite,
    draw_spheres,
    read_spheres,
    target_spheres,
    write_style,
)
from genima.visibility import describe_visibility, is_visible

MAX_HORIZON = 100_000
MAX_SIZE = 4096  # pixels
PREVIEW = 160  # pixels, at least, of each picture of preview.png
PREVIEW_FILM = 320  # likewise of each view of preview.mp4
MOVED = 0.01  # metres: a camera in the room is the same if it moved less between two episodes


@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """Folder of the run; episodes/ inside it is read, spheres/ is written."""
    horizon: int = 8
    """K: how many steps ahead the spheres show the robot (paper: 20 at RLBench's 20 Hz)."""
    size: int = 0
    """Height of the layers in pixels, the width follows; 0: as large as the camera's images."""
    calibration: Path | None = None
    """JSON or YAML file of cameras that were measured again: {camera: {intrinsics: 3x3,
    world_from_camera: 4x4}}; for a camera on the arm last_joint_from_camera in place of
    world_from_camera."""
    joints: list[int] = field(default_factory=list)
    """On which joints, counted from 1; up to three. None named: shoulder, elbow and wrist, in the
    paper 2, 4 and 6, of a UR5e 2, 3 and 5. The gripper has its own."""
    radius: list[str] = field(default_factory=list)
    """Radius of a camera's spheres in centimetres, as wrist=3 ego=5; by default the paper's (wrist
    3, front 8, shoulders 6.5), and for other names 3 on the arm and 6.5 in the room."""
    moved_cameras: bool = False
    """Accept cameras in the room that stand elsewhere in each episode (perturbed simulations)."""
    preview: bool = False
    """Also draw preview.png and preview.mp4 of the first episode."""


# -------------------------------------------------------------------------------------- one episode
def render(
    source: Path, target: Path, horizon: int, size: int, calibration: dict, style: SphereStyle
) -> dict[str, np.ndarray]:
    """Draw one episode's spheres into the file `target`, unless they are there.

    Returns {camera: (T, S) whether each sphere is in the picture}. Raises UserError
    where the episode does not fit the calibration, or `target` was drawn with other settings.
    """
    episode = read_episode(source, images=False)
    apply_calibration(episode, calibration)
    settings = fingerprint(episode, horizon, size, style)
    frames = len(episode.qpos)
    later = np.minimum(np.arange(frames) + horizon, frames - 1)  # (T,) clipped at the end
    visible = {}
    for camera in episode.image_sizes:
        visible[camera] = is_visible(episode, camera, later, style)
    if target.exists():
        check_settings(target, horizon, settings)
        return visible

    command = np.round(episode.action[later, -1:])  # (T, 1)
    target_qpos = np.concatenate([episode.qpos[later, :-1], command], axis=1)  # (T, D+1)
    with write_hdf5(target) as root:
        root.attrs["format"] = FORMAT
        root.attrs["horizon"] = horizon
        root.attrs["episode"] = f"{source.parent.name}/{source.name}"
        root.attrs["settings"] = settings
        root["target/qpos"] = target_qpos
        for camera in calibration:  # for whoever draws the spheres again
            root[f"cameras/{camera}/intrinsics"] = episode.intrinsics[camera]
            root[f"cameras/{camera}/extrinsics"] = episode.extrinsics[camera]
        for camera in episode.image_sizes:
            layers = draw_layers(episode, camera, later, command[:, 0] == 1, size, style)
            root.create_dataset(
                f"layers/{camera}", data=layers, chunks=(1, *layers.shape[1:]), compression=1
            )
        write_style(root, style)
    return visible


def draw_layers(
    episode: Episode,
    camera: str,
    later: np.ndarray,
    gripper_open: np.ndarray,
    size: int,
    style: SphereStyle,
) -> np.ndarray:
    """The layers (T, H, W, 4) of one camera.

    later (T,): the frame that each frame's spheres show; gripper_open (T,): the command sent then.
    """
    image_height, image_width = episode.image_sizes[camera]
    height = image_height if size == 0 else size
    width = round(image_width * height / image_height)
    scale = np.diag([width / image_width, height / image_height, 1])
    intrinsics = scale @ episode.intrinsics[camera]
    layers = []
    for t in range(len(later)):
        joint_poses = episode.joint_poses[later[t]]
        poses, radii, colours = target_spheres(joint_poses, gripper_open[t], camera, style)
        world_from_camera = episode.extrinsics[camera][t]
        layers.append(
            draw_spheres(poses, radii, colours, intrinsics, world_from_camera, height, width)
        )
    return np.stack(layers)


def apply_calibration(episode: Episode, calibration: dict):
    """Replace the cameras that were measured again, in place."""
    for camera, measured in calibration.items():
        if camera not in episode.intrinsics:
            raise UserError(
                f"{episode.path} has no camera '{camera}', which the calibration names."
            )
        episode.intrinsics[camera] = measured["intrinsics"]
        if "world_from_camera" in measured:
            episode.extrinsics[camera][:] = measured["world_from_camera"]
        else:
            last_joint = episode.joint_poses[:, -2]
            episode.extrinsics[camera] = last_joint @ measured["last_joint_from_camera"]


def check_mixture(first: Episode, others: list[Path], calibration: dict, moved_cameras: bool):
    """Raise a UserError where an episode was recorded otherwise than the first; it names both.

    The robot, the rate, the cameras and the place of every camera in the room must be the same,
    but for cameras of the calibration, which were measured again. moved_cameras: accept others.
    """
    for source in others:
        episode = read_episode(source, images=False)
        check_alike(episode, first)
        for camera in episode.image_sizes:
            may_differ = moved_cameras or camera in calibration
            if not may_differ and is_in_room(first, camera) and is_in_room(episode, camera):
                check_place(camera, episode, first)


def check_place(camera: str, episode: Episode, first: Episode):
    """Raise a UserError where a camera in the room is not where it was in the first episode."""
    here = episode.extrinsics[camera][0, :3, 3]
    there = first.extrinsics[camera][0, :3, 3]
    moved = np.linalg.norm(here - there)  # metres
    if moved > MOVED:
        raise UserError(
            f"{episode.path} has the camera '{camera}' {100 * moved:.0f} cm from where "
            f"{first.path} has it: put them into different runs, or measure it again "
            "(--calibration); for perturbed simulations give --moved-cameras."
        )


# ----------------------------------------------------------------------------------------- settings
def choose_style(settings: Settings, first: Episode) -> SphereStyle:
    """Which spheres are drawn, from the settings and from where each camera is mounted."""
    count = first.qpos.shape[1] - 1
    wanted = settings.joints
    if not wanted:
        wanted = [joint + 1 for joint in sphere_joints(first.robot)]
    joints = sorted(set(wanted))
    named = " ".join(str(joint) for joint in wanted)
    if len(joints) > 3 or len(joints) < len(wanted):
        raise UserError(f"--joints {named}: give one to three different joints.")
    if joints[0] < 1 or joints[-1] > count:
        raise UserError(f"{first.path} has {count} joints, but --joints asks for {named}.")
    factors = {}
    for camera in first.image_sizes:
        if camera not in RADIUS_FACTOR and not is_in_room(first, camera):
            factors[camera] = ARM_FACTOR
    for entry in settings.radius:
        camera, _, centimetres = entry.partition("=")
        if camera not in first.image_sizes:
            cameras = ", ".join(first.image_sizes)
            raise UserError(f"--radius {entry}: the cameras are {cameras}; write <camera>=<cm>.")
        try:
            factor = float(centimetres)
        except ValueError:
            raise UserError(f"--radius {entry}: write it as {camera}=3, in centimetres.") from None
        check_number(f"--radius {camera}", factor, 0.1, 100)
        if factor != PAPER.factor(camera):
            factors[camera] = factor
        else:
            factors.pop(camera, None)
    return SphereStyle(tuple(joint - 1 for joint in joints), factors)


def fingerprint(episode: Episode, horizon: int, size: int, style: SphereStyle) -> str:
    """A short text that changes with anything that the spheres are drawn from."""
    arrays = [episode.qpos, episode.action, episode.joint_poses]
    for camera in sorted(episode.image_sizes):
        arrays.append(episode.intrinsics[camera])
        arrays.append(episode.extrinsics[camera])
    numbers = [horizon, size, sorted(episode.image_sizes.items())]
    if style != PAPER:
        numbers.append(sorted(style.factors.items()))
        numbers.append(style.joints)
    numbers = repr(numbers).encode()
    content = numbers + b"".join(array.tobytes() for array in arrays)
    return hashlib.sha256(content).hexdigest()[:16]


def check_settings(target: Path, horizon: int, settings: str):
    """Raise a UserError unless a file of spheres was drawn with these settings."""
    with read_hdf5(target, FORMAT) as root:
        settings_before = root.attrs["settings"]
        horizon_before = root.attrs["horizon"]
    if settings_before == settings:
        return
    if horizon_before != horizon:
        other = f"with horizon {horizon_before}, not {horizon}"
    else:
        other = "from another recording, size or calibration, or with other spheres"
    raise UserError(
        f"{target} was drawn {other}: use the same settings or another --run, "
        f"or move {target.parent.parent} away."
    )


# ------------------------------------------------------------------------------------------ preview
def preview(source: Path, target: Path, folder: Path, horizon: int):
    """Contact sheet and film of one episode: per camera the images, and the spheres over them."""
    episode = read_episode(source)
    layers, _ = read_spheres(target)
    frames = len(episode.qpos)
    sizes = [layer.shape[1:3] for layer in layers.values()]
    height, width = np.max(sizes, axis=0)
    seconds = horizon / episode.fps
    columns = {}
    painted = {}
    for camera in order_cameras(layers):
        images = resize(episode.images[camera], height, width)  # (T, H, W, 3)
        spheres = resize(layers[camera], height, width)  # (T, H, W, 4)
        painted[camera] = alpha_composite(spheres, images)
        name = camera.replace("_", " ")
        columns[name] = images
        columns[f"{name}, {seconds:.1f} s later"] = painted[camera]
    chosen = np.linspace(0, frames - 1, min(5, frames)).round().astype(int)
    columns = {title: images[chosen] for title, images in columns.items()}
    captions = [f"{t / episode.fps:.1f} s" for t in chosen]
    with write_whole(folder / "preview.png") as path:
        Image.fromarray(contact_sheet(columns, captions, PREVIEW)).save(path)
    title = f"\u201c{episode.instruction}\u201d: where the joints are {seconds:.1f} s later"
    write_video(folder / "preview.mp4", labelled_views(painted, title, PREVIEW_FILM), episode.fps)


def resize(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Images (T, h, w, C) uint8 -> (T, height, width, C)."""
    resized = [Image.fromarray(image).resize((width, height)) for image in images]
    return np.stack(resized)


# --------------------------------------------------------------------------------------------- main
def main():
    settings = tyro.cli(Settings, description=__doc__)
    check_number("--horizon", settings.horizon, 1, MAX_HORIZON)
    check_number("--size", settings.size, 0, MAX_SIZE)
    sources = find_episodes(settings.run / "episodes")
    first = read_episode(sources[0], images=False)
    calibration = {}
    if settings.calibration is not None:
        calibration = load_calibration(settings.calibration, first.robot)
    check_mixture(first, sources[1:], calibration, settings.moved_cameras)
    style = choose_style(settings, first)

    folder = settings.run / "spheres"
    targets = [folder / source.parent.name / source.name for source in sources]
    jobs = []
    for source, target in zip(sources, targets):
        job = (render, source, target, settings.horizon, settings.size, calibration, style)
        jobs.append(job)
    seen = {camera: [] for camera in first.image_sizes}  # (T, S) of each episode
    for _, visible in run_in_parallel(jobs, usable_cores(), "spheres", "episode"):
        if visible is None:
            raise UserError(
                "A process that draws died twice: run the same command again; "
                "finished files are kept."
            )
        for camera, spheres in visible.items():
            seen[camera].append(spheres)
    if settings.preview:
        preview(sources[0], targets[0], folder, settings.horizon)
    print(f"{len(targets)} files of spheres, {settings.horizon} steps ahead, are in {folder}.")
    print(describe_visibility(seen, style))


if __name__ == "__main__":
    run_stage(main)
