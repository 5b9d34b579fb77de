"""How fast are the stages on this machine? Each benchmark prints what a person would compare.

    python benchmark.py spheres     pictures per second of draw_spheres, and of pyrender drawing the same four spheres
    python benchmark.py demos       demonstrations per minute: pick_and_lift, four cameras of 128x128
    python benchmark.py rlbench     importing a dataset of RLBench, beside decoding its pictures twice over

pyrender, the renderer of GENIMA's published code, is needed for the first only.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("PYOPENGL_PLATFORM", "egl")

import numpy as np
import tyro
from PIL import Image

from episodes import CAMERAS, UserError, run_stage
from render_spheres import DARK_STRIPE, draw_spheres, target_spheres
from sims.parallel import in_parallel

INSTALL_PYRENDER = "pip install --no-deps pyrender==0.1.45 trimesh==5.2.0 freetype-py==2.5.1 pyglet==1.5.29 six networkx"


def four_spheres(seed):
    """Joint poses (8, 4, 4) of an arm in front of a camera that looks along the world's x, and that camera's pose."""
    random = np.random.default_rng(seed)
    joint_poses = np.tile(np.eye(4), (8, 1, 1))
    for pose in joint_poses:
        rotation, _ = np.linalg.qr(random.normal(size=(3, 3)))
        pose[:3, :3] = rotation * np.linalg.det(rotation)
        pose[:3, 3] = random.uniform([-0.1, -0.35, 0.05], [0.1, 0.35, 0.75])
    world_from_camera = np.array([[0, 0, 1, -1.3], [-1, 0, 0, 0], [0, -1, 0, 0.4], [0, 0, 0, 1.0]])
    return joint_poses, world_from_camera


def pyrender_spheres(radii, colours, intrinsics, world_from_camera, height, width):
    """Two functions: one of the poses (4, 4, 4) that draws the striped spheres with pyrender -> (H, W, 4) uint8, one to end it."""
    np.infty = np.inf  # pyrender 0.1.45 was written for NumPy 1
    try:
        import pyrender
        import trimesh
    except ImportError as error:
        raise UserError(f"There is no pyrender to compare with ({error}): {INSTALL_PYRENDER}.") from error
    scene, nodes = pyrender.Scene(bg_color=[0, 0, 0, 0], ambient_light=[1, 1, 1]), []
    for radius, colour in zip(radii, colours):
        ball = trimesh.creation.uv_sphere(radius=radius)
        x, y, _ = ball.triangles_center.T
        dark = np.floor(np.arctan2(y, x) / (np.pi / 3)) % 2 == 1
        ball.visual.face_colors = np.where(dark[:, None], DARK_STRIPE * colour, colour).astype(np.uint8)
        nodes.append(scene.add(pyrender.Mesh.from_trimesh(ball, smooth=False)))
    (fx, _, cx), (_, fy, cy), _ = intrinsics
    camera = pyrender.IntrinsicsCamera(fx, fy, cx, cy, znear=0.05, zfar=10)
    scene.add(camera, pose=world_from_camera @ np.diag([1, -1, -1, 1]))  # OpenGL looks along -z
    renderer = pyrender.OffscreenRenderer(width, height)

    def draw(poses):
        for node, pose in zip(nodes, poses):
            scene.set_pose(node, pose)
        return renderer.render(scene, flags=pyrender.RenderFlags.FLAT | pyrender.RenderFlags.RGBA)[0]

    return draw, renderer.delete


def spheres(turns: int = 15):
    """Pictures per second of draw_spheres, and of pyrender drawing the same spheres.

    Args:
        turns: How often each draws ten pictures, in turns; the median counts.
    """
    for height, width in [(128, 128), (480, 640)]:
        intrinsics = np.array([[height, 0, width / 2], [0, height, height / 2], [0, 0, 1.0]])
        joint_poses, world_from_camera = four_spheres(0)
        _, radii, colours = target_spheres(joint_poses, True, "front")
        draw_pyrender, end_pyrender = pyrender_spheres(radii, colours, intrinsics, world_from_camera, height, width)
        renderers = {
            "draw_spheres": lambda poses: draw_spheres(poses, radii, colours, intrinsics, world_from_camera, height, width),
            "pyrender": draw_pyrender,
        }
        seconds, overlaps = {name: [] for name in renderers}, []
        for turn in range(turns):
            frames = [target_spheres(four_spheres(10 * turn + i)[0], True, "front")[0] for i in range(10)]
            covered = []
            for name, draw in renderers.items():
                start = time.perf_counter()
                pictures = [draw(poses) for poses in frames]
                seconds[name].append((time.perf_counter() - start) / len(frames))
                covered.append(np.stack(pictures)[..., 3] >= 128)
            overlaps.append((covered[0] & covered[1]).sum() / (covered[0] | covered[1]).sum())
        end_pyrender()
        if np.median(overlaps) < 0.9:
            raise UserError(f"The renderers disagree (overlap {np.median(overlaps):.2f}), so there is nothing to compare.")
        ours, theirs = (1 / np.median(times) for times in seconds.values())
        print(f"{width}x{height}: draw_spheres {ours:.0f} pictures/s, pyrender {theirs:.0f} pictures/s, "
              f"ratio {ours / theirs:.1f}; they cover the same pixels to {np.median(overlaps):.1%}.")


def demos(scenes: int = 10):
    """Demonstrations per minute of collect_demos.py, from its start to its end: pick_and_lift, four cameras of 128x128.

    Args:
        scenes: Scenes to record; each is recorded once for every object in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, Path(__file__).with_name("collect_demos.py"), "--run", folder, "--tasks", "pick_and_lift",
                   "--scenes", str(scenes), "--image-size", "128"]  # fmt: skip
        start = time.perf_counter()
        if subprocess.run(command).returncode != 0:
            raise UserError("collect_demos.py failed, so there is nothing to measure.")
        minutes = (time.perf_counter() - start) / 60
        count = len(list(Path(folder).glob("episodes/*/*.hdf5")))
    print(f"{count} demonstrations in {minutes * 60:.0f} s: {count / minutes:.0f} per minute.")


def rlbench(dataset: Path, workers: int = os.cpu_count()):
    """Seconds to import a dataset of RLBench, and to decode its pictures twice, in as many processes and in one.

    Args:
        dataset: Its root; tests/make_rlbench_dataset.py writes one to measure with.
        workers: Processes.
    """
    cameras = [f"{camera}_rgb" for camera in CAMERAS]
    pictures = sorted(path for path in dataset.glob("*/variation*/episodes/episode*/*_rgb/*.png") if path.parent.name in cameras)
    if not pictures:
        raise UserError(f"{dataset} has no <task>/variation<N>/episodes/episode<M>/<camera>_rgb: give the root of a dataset.")
    parts = [(decode_twice, pictures[i::100]) for i in range(100)]
    start = time.perf_counter()
    alone = sum(seconds for _, seconds in in_parallel(parts, workers, "decoding", "part"))
    together = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, Path(__file__).with_name("collect_demos.py"), "--from-rlbench", dataset, "--run", folder,
                   "--workers", str(workers)]  # fmt: skip
        if subprocess.run(command).returncode != 0:
            raise UserError("collect_demos.py failed, so there is nothing to measure.")
        ours = time.perf_counter() - start
    print(f"{len(pictures)} pictures, {workers} processes: importing takes {ours:.1f} s; decoding them twice takes {together:.1f} s in as "
          f"many processes, {alone:.1f} s of one.")


def decode_twice(paths):
    """Seconds it takes."""
    start = time.perf_counter()
    for path in [*paths, *paths]:
        with Image.open(path) as picture:
            np.array(picture)
    return time.perf_counter() - start


def main():
    tyro.extras.subcommand_cli_from_dict({"spheres": spheres, "demos": demos, "rlbench": rlbench}, description=__doc__)


if __name__ == "__main__":
    run_stage(main)
