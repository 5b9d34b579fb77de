"""How fast are the stages on this machine? Each benchmark prints ours beside a peer's.

    python tools/benchmark.py spheres     pictures a second: draw_spheres, and pyrender's the same
    python tools/benchmark.py demos       demonstrations a minute: pick_and_lift, four cameras
    python tools/benchmark.py rlbench --dataset FOLDER      importing a dataset of RLBench, beside
                                          decoding its pictures twice
    python tools/benchmark.py import      importing a vendor's JPEGs, beside decoding them alone
    python tools/benchmark.py step        a training step of the laptop's painter, beside diffusers'
                                          own ControlNet training loop
    python tools/benchmark.py memory      what training on SD-Turbo needs, tensor by tensor

pyrender, the renderer of GENIMA's published code, is needed for the first alone. Training is in
tools/benchmark_training.py.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("PYOPENGL_PLATFORM", "egl")

import numpy as np
import tyro
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from genima.episodes import CAMERAS
from genima.files import UserError, run_stage
from genima.parallel import run_in_parallel, usable_cores
from genima.spheres import DARK_STRIPE, draw_spheres, target_spheres
from tools.benchmark_import import importing
from tools.benchmark_training import memory, step

INSTALL_PYRENDER = (
    "pip install --no-deps pyrender==0.1.45 trimesh==5.2.0 freetype-py==2.5.1 pyglet==1.5.29 "
    "six networkx"
)
SIZES = [(128, 128), (480, 640)]  # of the spheres' pictures: height, width
PICTURES = 10  # that a renderer draws in one turn
LEAST_OVERLAP = 0.9  # of what two renderers cover; below, they do not draw the same
PARTS = 100  # into which RLBench's pictures are divided for the processes


# ----------------------------------------------------------------------------------------- spheres
def spheres(turns: int = 15):
    """Pictures a second of draw_spheres, and of pyrender drawing the same spheres.

    Args:
        turns: How often each draws ten pictures, in turns; the median counts.
    """
    for height, width in SIZES:
        compare_renderers(height, width, turns)


def compare_renderers(height: int, width: int, turns: int):
    """Measure both renderers at one size, and print the result."""
    intrinsics = np.array([[height, 0, width / 2], [0, height, height / 2], [0, 0, 1.0]])
    joint_poses, world_from_camera = four_spheres(0)
    _, radii, colours = target_spheres(joint_poses, True, "front")
    pyrender = PyrenderSpheres(radii, colours, intrinsics, world_from_camera, height, width)

    def draw(poses):
        return draw_spheres(poses, radii, colours, intrinsics, world_from_camera, height, width)

    ours = []  # seconds a picture
    theirs = []
    overlaps = []
    for turn in range(turns):
        frames = []
        for i in range(PICTURES):
            joint_poses, _ = four_spheres(PICTURES * turn + i)
            frames.append(target_spheres(joint_poses, True, "front")[0])
        seconds, covered = time_drawing(draw, frames)
        ours.append(seconds)
        seconds, their_covered = time_drawing(pyrender.draw, frames)
        theirs.append(seconds)
        both = (covered & their_covered).sum()
        overlaps.append(both / (covered | their_covered).sum())
    pyrender.close()

    overlap = np.median(overlaps)
    if overlap < LEAST_OVERLAP:
        raise UserError(
            f"The renderers disagree (overlap {overlap:.2f}), so there is nothing to compare."
        )
    ours = 1 / np.median(ours)
    theirs = 1 / np.median(theirs)
    print(
        f"{width}x{height}: draw_spheres {ours:.0f} pictures/s, pyrender {theirs:.0f} pictures/s, "
        f"ratio {ours / theirs:.1f}; they cover the same pixels to {overlap:.1%}."
    )


def time_drawing(draw: Callable, frames: list[np.ndarray]) -> tuple[float, np.ndarray]:
    """Seconds a picture, and which pixels the spheres cover (N, H, W)."""
    start = time.perf_counter()
    pictures = [draw(poses) for poses in frames]
    seconds = (time.perf_counter() - start) / len(frames)
    return seconds, np.stack(pictures)[..., 3] >= 128


def four_spheres(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random joint poses (8, 4, 4) in front of a camera that looks along the world's x axis.

    Returns them and the camera's pose (4, 4).
    """
    rng = np.random.default_rng(seed)
    joint_poses = np.tile(np.eye(4), (8, 1, 1))
    for pose in joint_poses:
        rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        pose[:3, :3] = rotation * np.linalg.det(rotation)
        pose[:3, 3] = rng.uniform([-0.1, -0.35, 0.05], [0.1, 0.35, 0.75])
    world_from_camera = np.array([[0, 0, 1, -1.3], [-1, 0, 0, 0], [0, -1, 0, 0.4], [0, 0, 0, 1.0]])
    return joint_poses, world_from_camera


class PyrenderSpheres:
    """The same striped spheres, drawn by pyrender."""

    def __init__(self, radii, colours, intrinsics, world_from_camera, height, width):
        """Arguments as those of draw_spheres. Raises UserError where pyrender is missing."""
        np.infty = np.inf  # pyrender 0.1.45 was written for NumPy 1
        try:
            import pyrender
            import trimesh
        except ImportError as error:
            raise UserError(
                f"There is no pyrender to compare with ({error}): {INSTALL_PYRENDER}."
            ) from error
        self.scene = pyrender.Scene(bg_color=[0, 0, 0, 0], ambient_light=[1, 1, 1])
        self.nodes = []
        for radius, colour in zip(radii, colours):
            ball = trimesh.creation.uv_sphere(radius=radius)
            x, y, _ = ball.triangles_center.T
            is_dark = np.floor(np.arctan2(y, x) / (np.pi / 3)) % 2 == 1
            faces = np.where(is_dark[:, None], DARK_STRIPE * colour, colour)
            ball.visual.face_colors = faces.astype(np.uint8)
            mesh = pyrender.Mesh.from_trimesh(ball, smooth=False)
            self.nodes.append(self.scene.add(mesh))
        fx, fy, cx, cy = intrinsics[[0, 1, 0, 1], [0, 1, 2, 2]]
        camera = pyrender.IntrinsicsCamera(fx, fy, cx, cy, znear=0.05, zfar=10)
        opengl_from_opencv = np.diag([1, -1, -1, 1])  # OpenGL looks along -z
        self.scene.add(camera, pose=world_from_camera @ opengl_from_opencv)
        self.renderer = pyrender.OffscreenRenderer(width, height)
        self.flags = pyrender.RenderFlags.FLAT | pyrender.RenderFlags.RGBA

    def draw(self, poses: np.ndarray) -> np.ndarray:
        """The spheres at poses (4, 4, 4) -> (H, W, 4) uint8."""
        for node, pose in zip(self.nodes, poses):
            self.scene.set_pose(node, pose)
        colour, _ = self.renderer.render(self.scene, flags=self.flags)
        return colour

    def close(self):
        self.renderer.delete()


# --------------------------------------------------------------------------------------- recording
def demos(scenes: int = 10):
    """Demonstrations a minute of collect_demos.py: pick_and_lift, four cameras of 128x128.

    Args:
        scenes: Scenes to record; each is recorded once for every object in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ["--tasks", "pick_and_lift", "--scenes", str(scenes), "--image-size", "128"]
        seconds = time_collecting(Path(folder), options)
        count = len(list(Path(folder).glob("episodes/*/*.hdf5")))
    print(f"{count} demonstrations in {seconds:.0f} s: {60 * count / seconds:.0f} a minute.")


def time_collecting(run: Path, options: list[str]) -> float:
    """Seconds that collect_demos.py takes, from its start to its end."""
    command = [sys.executable, str(ROOT / "collect_demos.py"), "--run", str(run), *options]
    start = time.perf_counter()
    if subprocess.run(command).returncode != 0:
        raise UserError("collect_demos.py failed, so there is nothing to measure.")
    return time.perf_counter() - start


def rlbench(dataset: Path, workers: int | None = None):
    """Seconds to import a dataset of RLBench, and to decode its pictures twice.

    Args:
        dataset: Its root; tests/make_rlbench_dataset.py writes one to measure with.
        workers: Processes; by default as many as there are cores.
    """
    if workers is None:
        workers = usable_cores()
    folders = [f"{camera}_rgb" for camera in CAMERAS]
    pictures = []
    for path in sorted(dataset.glob("*/variation*/episodes/episode*/*_rgb/*.png")):
        if path.parent.name in folders:
            pictures.append(path)
    if not pictures:
        raise UserError(
            f"{dataset} has no <task>/variation<N>/episodes/episode<M>/<camera>_rgb: "
            "give the root of a dataset."
        )
    jobs = [(decode_twice, pictures[i::PARTS]) for i in range(PARTS)]
    start = time.perf_counter()
    in_one = 0.0  # seconds
    for _, seconds in run_in_parallel(jobs, workers, "decoding", "part"):
        in_one += seconds
    in_all = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        options = ["--from-rlbench", str(dataset), "--workers", str(workers)]
        ours = time_collecting(Path(folder), options)
    print(
        f"{len(pictures)} pictures, {workers} processes: importing takes {ours:.1f} s; decoding "
        f"them twice takes {in_all:.1f} s in as many processes, {in_one:.1f} s of one."
    )


def decode_twice(paths: list[Path]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    for path in [*paths, *paths]:
        with Image.open(path) as picture:
            np.array(picture)
    return time.perf_counter() - start


# -------------------------------------------------------------------------------------------- main
def main():
    benchmarks = {
        "spheres": spheres,
        "demos": demos,
        "rlbench": rlbench,
        "import": importing,
        "step": step,
        "memory": memory,
    }
    tyro.extras.subcommand_cli_from_dict(benchmarks, description=__doc__)


if __name__ == "__main__":
    run_stage(main)
