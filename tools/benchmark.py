"""How fast are the stages on this machine? Each benchmark prints ours beside a peer's.

    python tools/benchmark.py spheres    pictures a second: draw_spheres, and pyrender
    python tools/benchmark.py demos      demonstrations a minute, four cameras of 128x128
    python tools/benchmark.py step       a training step of tiny, and diffusers' own training loop
    python tools/benchmark.py rlbench --dataset FOLDER    importing, and decoding alone

For SD-Turbo on a GPU: tools/benchmark_gpu.py. The first needs pyrender, the renderer of GENIMA's
published code; it says how to install it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("PYOPENGL_PLATFORM", "egl")

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from genima.diffusion import add_noise
from genima.episodes import CAMERAS
from genima.files import UserError, run_stage
from genima.painter import TinyPainter
from genima.painter_data import find_frames, read_batch
from genima.parallel import run_in_parallel, usable_cores
from genima.spheres import DARK_STRIPE, draw_spheres, target_spheres
from genima.views import composite

PYRENDER = "pyrender==0.1.45 trimesh==5.2.0 freetype-py==2.5.1 pyglet==1.5.29 six networkx"
BATCH_SIZE = 8
STEPS = 60  # of a training; the first ten are not counted
WARM_UP = 10


def run_stage_script(name: str, *options):
    command = [sys.executable, ROOT / name, *map(str, options)]
    if subprocess.run(command).returncode != 0:
        raise UserError(f"{name} failed, so there is nothing to measure.")


# ----------------------------------------------------------------------------------------- spheres
def random_arm(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Joint poses (8, 4, 4) in front of a camera that looks along x, and the camera's pose."""
    rng = np.random.default_rng(seed)
    joint_poses = np.tile(np.eye(4), (8, 1, 1))
    for pose in joint_poses:
        rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        pose[:3, :3] = rotation * np.linalg.det(rotation)
        pose[:3, 3] = rng.uniform([-0.1, -0.35, 0.05], [0.1, 0.35, 0.75])
    world_from_camera = np.array([[0, 0, 1, -1.3], [-1, 0, 0, 0], [0, -1, 0, 0.4], [0, 0, 0, 1.0]])
    return joint_poses, world_from_camera


class Pyrender:
    """Draws four striped spheres with pyrender."""

    def __init__(self, radii, colours, intrinsics, world_from_camera, height, width):
        np.infty = np.inf  # pyrender 0.1.45 was written for NumPy 1
        try:
            import pyrender
            import trimesh
        except ImportError as error:
            raise UserError(
                f"There is no pyrender to compare with ({error}): pip install --no-deps {PYRENDER}."
            ) from error
        self.scene = pyrender.Scene(bg_color=[0, 0, 0, 0], ambient_light=[1, 1, 1])
        self.nodes = []
        for radius, colour in zip(radii, colours):
            ball = trimesh.creation.uv_sphere(radius=radius)
            x, y, _ = ball.triangles_center.T
            is_dark = np.floor(np.arctan2(y, x) / (np.pi / 3)) % 2 == 1
            shades = np.where(is_dark[:, None], DARK_STRIPE * colour, colour)
            ball.visual.face_colors = shades.astype(np.uint8)
            mesh = pyrender.Mesh.from_trimesh(ball, smooth=False)
            self.nodes.append(self.scene.add(mesh))
        fx, fy, cx, cy = intrinsics[[0, 1, 0, 1], [0, 1, 2, 2]]
        camera = pyrender.IntrinsicsCamera(fx, fy, cx, cy, znear=0.05, zfar=10)
        opengl = np.diag([1, -1, -1, 1])  # it looks along -z
        self.scene.add(camera, pose=world_from_camera @ opengl)
        self.renderer = pyrender.OffscreenRenderer(width, height)
        self.flags = pyrender.RenderFlags.FLAT | pyrender.RenderFlags.RGBA

    def draw(self, poses):
        for node, pose in zip(self.nodes, poses):
            self.scene.set_pose(node, pose)
        return self.renderer.render(self.scene, flags=self.flags)[0]


def spheres(turns: int = 15):
    """Pictures a second of draw_spheres, and of pyrender drawing the same spheres.

    Args:
        turns: How often each draws ten pictures, in turns; the median counts.
    """
    for height, width in [(128, 128), (480, 640)]:
        intrinsics = np.array([[height, 0, width / 2], [0, height, height / 2], [0, 0, 1.0]])
        joint_poses, camera = random_arm(0)
        _, radii, colours = target_spheres(joint_poses, True, "front")
        peer = Pyrender(radii, colours, intrinsics, camera, height, width)
        ours = []
        theirs = []
        overlaps = []
        for turn in range(turns):
            frames = []
            for i in range(10):
                joint_poses, _ = random_arm(10 * turn + i)
                frames.append(target_spheres(joint_poses, True, "front")[0])
            start = time.perf_counter()
            drawn = [
                draw_spheres(poses, radii, colours, intrinsics, camera, height, width)
                for poses in frames
            ]
            middle = time.perf_counter()
            rendered = [peer.draw(poses) for poses in frames]
            ours.append((middle - start) / 10)
            theirs.append((time.perf_counter() - middle) / 10)
            a = np.stack(drawn)[..., 3] >= 128
            b = np.stack(rendered)[..., 3] >= 128
            overlaps.append((a & b).sum() / (a | b).sum())
        peer.renderer.delete()
        if np.median(overlaps) < 0.9:
            raise UserError(f"The renderers disagree: they overlap by {np.median(overlaps):.2f}.")
        rate = 1 / np.median(ours)
        peer_rate = 1 / np.median(theirs)
        print(
            f"{width}x{height}: draw_spheres {rate:.0f} pictures/s, pyrender {peer_rate:.0f}, "
            f"ratio {rate / peer_rate:.1f}; they cover the same pixels to {np.median(overlaps):.1%}"
        )


# ------------------------------------------------------------------------------------ data on disk
def demos(scenes: int = 10):
    """Demonstrations a minute of collect_demos.py: pick_and_lift, four cameras of 128x128.

    Args:
        scenes: Scenes to record; each is recorded once for every object in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        options = ["--tasks", "pick_and_lift", "--scenes", scenes, "--image-size", 128]
        run_stage_script("collect_demos.py", "--run", folder, *options)
        seconds = time.perf_counter() - start
        count = len(list(Path(folder).glob("episodes/*/*.hdf5")))
    print(f"{count} demonstrations in {seconds:.0f} s: {60 * count / seconds:.0f} a minute.")


def rlbench(dataset: Path, workers: int = usable_cores()):
    """Seconds to import a dataset of RLBench, and to decode its pictures twice.

    Args:
        dataset: Its root; tests/make_rlbench_dataset.py writes one to measure with.
        workers: Processes.
    """
    pictures = []
    for camera in CAMERAS:
        pictures += sorted(dataset.glob(f"*/*/episodes/episode*/{camera}_rgb/*.png"))
    if not pictures:
        raise UserError(f"{dataset} has no pictures of RLBench: give the root of a dataset.")
    parts = [(decode_twice, pictures[i::100]) for i in range(100)]
    start = time.perf_counter()
    for _ in run_in_parallel(parts, workers, "decoding", "part"):
        pass
    decoding = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        options = ["--from-rlbench", dataset, "--run", folder, "--workers", workers]
        run_stage_script("collect_demos.py", *options)
        importing = time.perf_counter() - start
    print(
        f"{len(pictures)} pictures, {workers} processes: importing takes {importing:.1f} s, "
        f"decoding them twice {decoding:.1f} s."
    )


def decode_twice(paths: list[Path]):
    for path in [*paths, *paths]:
        with Image.open(path) as picture:
            np.array(picture)


# ---------------------------------------------------------------------------------- a training step
def step(turns: int = 5, run: Path = Path("runs/demo")):
    """Samples a second of training tiny, and of diffusers' ControlNet training loop on it.

    The peer is the loop of diffusers' train_controlnet.py: pictures from PNG files through PIL, the
    text encoder at every step, noise prediction, clipping, AdamW. Both train the same network with
    PyTorch's own choice of threads, each time in a new process.

    Args:
        turns: How often each makes its steps, in turns; medians count.
        run: Folder with episodes and spheres.
    """
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in tqdm(range(turns), desc="turns"):
            for precision in ("fp32", "bf16"):
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                    peer = process.submit(peer_rate, run, Path(folder), precision == "bf16")
                    rates.setdefault(f"diffusers' loop, {precision}", []).append(peer.result())
                for objective in ("one-step", "noise"):
                    options = ["--precision", precision, "--objective", objective]
                    rate = BATCH_SIZE / seconds_a_step(run, Path(folder) / "run", options)
                    name = f"train_controlnet.py, {precision}, {objective}"
                    rates.setdefault(name, []).append(rate)
    for name, found in rates.items():
        precision = "bf16" if "bf16" in name else "fp32"
        ratios = np.array(found) / rates[f"diffusers' loop, {precision}"]
        print(
            f"{name}: {np.median(found):.1f} samples/s, {np.median(ratios):.2f} times diffusers' "
            f"loop in the same precision ({ratios.min():.2f} to {ratios.max():.2f})"
        )


def peer_rate(run: Path, folder: Path, bf16: bool) -> float:
    """Samples a second of diffusers' loop."""
    data = find_frames(run)
    config = {
        "size": "tiny",
        "objective": "noise",
        "num_inference_steps": 1,
        "image_size": data.image_size,
        "resolution": 2 * data.image_size,
        "horizon": data.horizon,
        "cameras": data.cameras,
    }
    painter = TinyPainter.from_scratch(data.instructions(), config).train()
    optimizer = torch.optim.AdamW(painter.parameters(), lr=1e-4)
    samples = []
    frames = data.training[:: max(1, len(data.training) // 64)]
    for i, frame in enumerate(frames):
        rngs = [np.random.default_rng(i)]
        batch = read_batch([frame], data.cameras, config["resolution"], rngs)
        samples.append(write_sample(folder, i, batch))
    rng = np.random.default_rng(0)
    for number in range(STEPS):
        if number == WARM_UP:
            start = time.perf_counter()
        chosen = [samples[i] for i in rng.integers(len(samples), size=BATCH_SIZE)]
        peer_step(painter, optimizer, chosen, bf16)
    return (STEPS - WARM_UP) * BATCH_SIZE / (time.perf_counter() - start)


def write_sample(folder: Path, i: int, batch: dict) -> tuple[Path, Path, str]:
    """Condition and target of a frame as PNG files, as diffusers' script has them; the prompt."""
    pictures = {
        "condition": batch["condition"][0],
        "target": composite(batch["layer"], batch["observation"])[0],
    }
    paths = []
    for name, picture in pictures.items():
        paths.append(folder / f"{i}_{name}.png")
        pixels = (255 * picture).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(paths[-1])
    return *paths, batch["prompts"][0]


def peer_step(painter, optimizer, samples, bf16: bool):
    pictures = []
    for column in (0, 1):
        images = [Image.open(sample[column]).convert("RGB") for sample in samples]
        images = np.stack([np.asarray(image, np.float32) for image in images]) / 255
        pictures.append(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())
    condition, target = pictures
    latents = painter.encode_images(target)
    noise = torch.randn_like(latents)
    timesteps = torch.randint(1000, (len(latents),))
    noisy = add_noise(painter.scheduler, latents, noise, timesteps)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = painter(condition, [sample[2] for sample in samples], noisy, timesteps)
    loss = torch.nn.functional.mse_loss(logits[:, :3].float().sigmoid(), target)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(painter.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def seconds_a_step(source: Path, run: Path, options: list[str]) -> float:
    """Of a training, after its warm-up, as its progress bar counts the steps."""
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    for name in ("episodes", "spheres"):
        (run / name).symlink_to((source / name).resolve())
    command = [sys.executable, ROOT / "train_controlnet.py", "--run", run, "--base", "none"]
    command += ["--steps", str(STEPS), *options]
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    seen = {}
    said = b""
    while chunk := os.read(training.stderr.fileno(), 4096):
        said = said[-1000:] + chunk
        for count in re.findall(rb"(\d+)/%d " % STEPS, said):
            seen.setdefault(int(count), time.perf_counter())
    if training.wait() != 0:
        reason = said[-300:].decode(errors="replace")
        raise UserError(f"train_controlnet.py failed, so there is nothing to measure: {reason}")
    first = min(count for count in seen if count >= WARM_UP)
    last = max(count for count in seen if count < STEPS)
    return (seen[last] - seen[first]) / (last - first)


def main():
    tyro.extras.subcommand_cli_from_dict(
        {"spheres": spheres, "demos": demos, "step": step, "rlbench": rlbench}, description=__doc__
    )


if __name__ == "__main__":
    run_stage(main)
