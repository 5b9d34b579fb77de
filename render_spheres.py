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
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from genima.calibration import load_calibration
from genima.episodes import CAMERAS, check_alike, find_episodes, read_episode
from genima.files import UserError, read_hdf5, run_stage, write_hdf5, write_whole
from genima.parallel import run_in_parallel
from genima.plots import two_columns, write_video
from genima.spheres import (
    FORMAT,
    JOINTS,
    alpha_composite,
    draw_spheres,
    read_spheres,
    target_spheres,
)


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
            episode.extrinsics[camera] = (
                episode.joint_poses[:, -2] @ measured["last_joint_from_camera"]
            )
    drawn_from = [episode.qpos, episode.action, episode.joint_poses]
    for camera in sorted(episode.image_sizes):
        drawn_from += [episode.intrinsics[camera], episode.extrinsics[camera]]
    fingerprint = repr([horizon, size, sorted(episode.image_sizes.items())]).encode() + b"".join(
        array.tobytes() for array in drawn_from
    )
    settings = hashlib.sha256(fingerprint).hexdigest()[:16]
    if target.exists():
        with read_hdf5(target, FORMAT) as root:
            drawn, before = root.attrs["settings"], root.attrs["horizon"]
        if drawn != settings:
            other = (
                f"with horizon {before}, not {horizon}"
                if before != horizon
                else "from another recording, size or calibration"
            )
            raise UserError(
                f"{target} was drawn {other}: delete {target.parent.parent} or use another --run."
            )
        return True

    frames = len(episode.qpos)
    later = np.minimum(np.arange(frames) + horizon, frames - 1)  # (T,)
    command = np.round(episode.action[later, -1:])  # (T, 1)
    with write_hdf5(target) as root:
        root.attrs.update(
            format=FORMAT,
            horizon=horizon,
            episode=f"{source.parent.name}/{source.name}",
            settings=settings,
        )
        root["target/qpos"] = np.concatenate([episode.qpos[later, :-1], command], axis=1)
        for camera in calibration:  # for whoever draws the spheres again
            root[f"cameras/{camera}/intrinsics"] = episode.intrinsics[camera]
            root[f"cameras/{camera}/extrinsics"] = episode.extrinsics[camera]
        for camera, (image_height, image_width) in episode.image_sizes.items():
            height = size or image_height
            width = round(image_width * height / image_height)
            intrinsics = (
                np.diag([width / image_width, height / image_height, 1])
                @ episode.intrinsics[camera]
            )
            layers = np.stack(
                [
                    draw_spheres(
                        *target_spheres(episode.joint_poses[later[t]], command[t, 0] == 1, camera),
                        intrinsics,
                        episode.extrinsics[camera][t],
                        height,
                        width,
                    )
                    for t in range(frames)
                ]
            )
            root.create_dataset(
                f"layers/{camera}", data=layers, chunks=(1, height, width, 4), compression=1
            )
    return True


def preview(source, target, folder):
    """Contact sheet and film of one episode: per camera the observation, and the spheres over it."""
    episode = read_episode(source)
    layers, _ = read_spheres(target)
    frames, cells = len(episode.qpos), []
    height, width = np.max([layer.shape[1:3] for layer in layers.values()], axis=0)
    fit = lambda pictures: np.stack(
        [Image.fromarray(picture).resize((width, height)) for picture in pictures]
    )  # noqa: E731
    for camera in sorted(layers, key=lambda name: (*CAMERAS, name).index(name)):
        seen = fit(episode.images[camera])  # (T, H, W, 3)
        cells += [seen, alpha_composite(fit(layers[camera]), seen)]
    rows = [
        np.concatenate([cell[t] for cell in cells], axis=1)
        for t in np.linspace(0, frames - 1, min(5, frames)).round().astype(int)
    ]
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
        raise UserError(
            f"{sources[0]} has {first.qpos.shape[1] - 1} joints, but spheres are drawn on joints 2, 4 and 6."
        )
    folder = settings.run / "spheres"
    targets = [folder / source.parent.name / source.name for source in sources]

    jobs = [
        (render, source, target, settings.horizon, settings.size, calibration, first)
        for source, target in zip(sources, targets)
    ]
    for _, done in run_in_parallel(jobs, os.cpu_count(), "spheres", "episode"):
        if not done:
            raise UserError(
                "A process that draws died twice: run the same command again; finished files are kept."
            )
    if settings.preview:
        preview(sources[0], targets[0], folder)
    print(f"{len(targets)} files of spheres, {settings.horizon} steps ahead, are in {folder}.")


if __name__ == "__main__":
    run_stage(main)
