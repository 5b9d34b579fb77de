"""How fast are the stages on this machine? Each benchmark prints what a person would compare.

    python benchmark.py spheres     pictures per second of draw_spheres, and of pyrender drawing the same four spheres
    python benchmark.py demos       demonstrations per minute: pick_and_lift, four cameras of 128x128
    python benchmark.py step        a training step of the tiny painter, beside diffusers' own ControlNet training loop
    python benchmark.py memory      the memory that training on SD-Turbo needs, tensor by tensor, computed
    python benchmark.py gpu         steps per second, peak memory and time to paint of SD-Turbo, measured on a CUDA GPU
    python benchmark.py rlbench --dataset FOLDER     importing a dataset of RLBench, beside decoding its pictures twice over

pyrender, the renderer of GENIMA's published code, is needed for the first only.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("PYOPENGL_PLATFORM", "egl")

import numpy as np
import torch
import tyro
from diffusers import AutoencoderKL, ControlNetModel, EulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from genima.episodes import CAMERAS, read_episode
from genima.files import UserError, run_stage
from genima.painter import Painter, build_tiny, composite, load_turbo
from genima.parallel import run_in_parallel
from genima.spheres import DARK_STRIPE, draw_spheres, target_spheres
from train_controlnet import Settings as TrainSettings
from train_controlnet import find_frames, load, make_optimizer, one_step_loss

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
        raise UserError(
            f"There is no pyrender to compare with ({error}): {INSTALL_PYRENDER}."
        ) from error
    scene, nodes = pyrender.Scene(bg_color=[0, 0, 0, 0], ambient_light=[1, 1, 1]), []
    for radius, colour in zip(radii, colours):
        ball = trimesh.creation.uv_sphere(radius=radius)
        x, y, _ = ball.triangles_center.T
        dark = np.floor(np.arctan2(y, x) / (np.pi / 3)) % 2 == 1
        ball.visual.face_colors = np.where(dark[:, None], DARK_STRIPE * colour, colour).astype(
            np.uint8
        )
        nodes.append(scene.add(pyrender.Mesh.from_trimesh(ball, smooth=False)))
    (fx, _, cx), (_, fy, cy), _ = intrinsics
    camera = pyrender.IntrinsicsCamera(fx, fy, cx, cy, znear=0.05, zfar=10)
    scene.add(camera, pose=world_from_camera @ np.diag([1, -1, -1, 1]))  # OpenGL looks along -z
    renderer = pyrender.OffscreenRenderer(width, height)

    def draw(poses):
        for node, pose in zip(nodes, poses):
            scene.set_pose(node, pose)
        return renderer.render(scene, flags=pyrender.RenderFlags.FLAT | pyrender.RenderFlags.RGBA)[
            0
        ]

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
        draw_pyrender, end_pyrender = pyrender_spheres(
            radii, colours, intrinsics, world_from_camera, height, width
        )
        renderers = {
            "draw_spheres": lambda poses: draw_spheres(
                poses, radii, colours, intrinsics, world_from_camera, height, width
            ),
            "pyrender": draw_pyrender,
        }
        seconds, overlaps = {name: [] for name in renderers}, []
        for turn in range(turns):
            frames = [
                target_spheres(four_spheres(10 * turn + i)[0], True, "front")[0] for i in range(10)
            ]
            covered = []
            for name, draw in renderers.items():
                start = time.perf_counter()
                pictures = [draw(poses) for poses in frames]
                seconds[name].append((time.perf_counter() - start) / len(frames))
                covered.append(np.stack(pictures)[..., 3] >= 128)
            overlaps.append((covered[0] & covered[1]).sum() / (covered[0] | covered[1]).sum())
        end_pyrender()
        if np.median(overlaps) < 0.9:
            raise UserError(
                f"The renderers disagree (overlap {np.median(overlaps):.2f}), so there is nothing to compare."
            )
        ours, theirs = (1 / np.median(times) for times in seconds.values())
        print(
            f"{width}x{height}: draw_spheres {ours:.0f} pictures/s, pyrender {theirs:.0f} pictures/s, "
            f"ratio {ours / theirs:.1f}; they cover the same pixels to {np.median(overlaps):.1%}."
        )


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
    pictures = sorted(
        path
        for path in dataset.glob("*/variation*/episodes/episode*/*_rgb/*.png")
        if path.parent.name in cameras
    )
    if not pictures:
        raise UserError(
            f"{dataset} has no <task>/variation<N>/episodes/episode<M>/<camera>_rgb: give the root of a dataset."
        )
    parts = [(decode_twice, pictures[i::100]) for i in range(100)]
    start = time.perf_counter()
    alone = sum(seconds for _, seconds in run_in_parallel(parts, workers, "decoding", "part"))
    together = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, Path(__file__).with_name("collect_demos.py"), "--from-rlbench", dataset, "--run", folder,
                   "--workers", str(workers)]  # fmt: skip
        if subprocess.run(command).returncode != 0:
            raise UserError("collect_demos.py failed, so there is nothing to measure.")
        ours = time.perf_counter() - start
    print(
        f"{len(pictures)} pictures, {workers} processes: importing takes {ours:.1f} s; decoding them twice takes {together:.1f} s in as "
        f"many processes, {alone:.1f} s of one."
    )


def decode_twice(paths):
    """Seconds it takes."""
    start = time.perf_counter()
    for path in [*paths, *paths]:
        with Image.open(path) as picture:
            np.array(picture)
    return time.perf_counter() - start


def step(turns: int = 5, run: Path = Path("runs/demo")):
    """Samples per second of training the tiny painter, and of diffusers' own ControlNet training loop on the same net and batch.

    The loop of diffusers' train_controlnet.py, its steps one by one: pictures from PNG files through PIL in the same process, the text
    encoder at every step, noise prediction, clipping, AdamW. Both train all that tiny trains, with the threads that PyTorch takes,
    each time in a new process, from the tenth step to the sixtieth.

    Args:
        turns: How often each makes its steps, in turns; the median counts, and of the ratios within a turn the lowest and highest are shown.
        run: Folder with episodes and spheres.
    """
    two = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
           "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    options = {f"{name}{precision}{noise}": (launch, ["--precision", precision, *noise.split()]) for precision in ("fp32", "bf16")
               for name, launch, noise in (("", (), ""), ("", (), " --objective noise"), ("two processes, ", two, ""))}  # fmt: skip
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in tqdm(range(turns), desc="turns"):
            for name, bf16 in (("diffusers' loop, fp32", False), ("diffusers' loop, bf16", True)):
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                    rates.setdefault(name, []).append(
                        process.submit(their_rate, run, Path(folder), bf16).result()
                    )
            for name, (launch, words) in options.items():
                rates.setdefault(f"train_controlnet.py, {name}", []).append(
                    TrainSettings.batch / seconds_a_step(run, Path(folder) / "run", launch, words)
                )
    for name, found in rates.items():
        loops = [
            rates[f"diffusers' loop, {precision}"]
            for precision in ("fp32", "bf16" if "bf16" in name else "fp32")
        ]
        fp32, same = (
            f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
            for ratios in np.array(found) / loops
        )
        print(
            f"{name}: {np.median(found):.1f} samples/s, {fp32} times diffusers' loop in fp32, {same} in the same precision"
        )


def their_rate(run, folder, bf16):
    """Samples per second of diffusers' loop."""
    training, _, horizon = find_frames(run)
    size = read_episode(training[0][0], images=False).image_sizes[CAMERAS[0]][0]
    settings = TrainSettings(run=run, picture=2 * size)
    instructions = sorted({sentence for frame in training for sentence in frame[3]})
    config = {
        "size": "tiny",
        "objective": "noise",
        "steps": 1,
        "image_size": size,
        "picture": 2 * size,
        "horizon": horizon,
        "cameras": CAMERAS,
    }
    painter = Painter(build_tiny(instructions, size), config).train()
    optimizer = torch.optim.AdamW(painter.parameters(), lr=1e-4)
    files = [
        write_pair(folder, i, load([frame], [np.random.default_rng(i)], settings, augment=False))
        for i, frame in enumerate(training[:: max(1, len(training) // 64)])
    ]
    for step in range(60):
        if step == 10:
            start = time.perf_counter()
        their_step(painter, optimizer, files, settings.batch, bf16)
    return 50 * settings.batch / (time.perf_counter() - start)


def seconds_a_step(source, run, launch, options):
    """Of a training of 60 steps, from the tenth on, as its progress bar counts them."""
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    for name in ("episodes", "spheres"):
        (run / name).symlink_to((source / name).resolve())
    command = [
        sys.executable,
        *launch,
        str(Path(__file__).with_name("train_controlnet.py")),
        "--run",
        str(run),
        "--steps",
        "60",
        *options,
    ]
    threads = (
        {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2)), "ACCELERATE_USE_CPU": "true"}
        if launch
        else {}
    )
    training = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | threads
    )
    seen, said = {}, b""
    while chunk := os.read(training.stderr.fileno(), 4096):
        said = said[-1000:] + chunk
        for count in re.findall(rb"(\d+)/60 ", said):
            seen.setdefault(int(count), time.perf_counter())
    if training.wait():
        raise UserError(
            f"train_controlnet.py failed, so there is nothing to measure: {said[-300:].decode(errors='replace')}"
        )
    first, last = (
        min(count for count in seen if count >= 10),
        max(count for count in seen if count < 60),
    )
    return (seen[last] - seen[first]) / (last - first)


def write_pair(folder, i, batch):
    """Condition and target of one frame as PNG files, as a dataset for diffusers' script has them; and the prompt."""
    pictures = batch["condition"][0], composite(batch["layer"], batch["observation"])[0]
    paths = [folder / f"{i}_{name}.png" for name in ("condition", "target")]
    for path, picture in zip(paths, pictures):
        Image.fromarray((255 * picture).round().byte().permute(1, 2, 0).numpy()).save(path)
    return *paths, batch["prompts"][0]


def their_step(painter, optimizer, files, batch, bf16, random=np.random.default_rng(0)):  # noqa: B008
    chosen = [files[i] for i in random.integers(len(files), size=batch)]
    pixels = [
        np.stack([np.asarray(Image.open(pair[i]).convert("RGB"), np.float32) for pair in chosen])
        for i in (0, 1)
    ]
    condition, target = (
        torch.from_numpy(pictures / 255).permute(0, 3, 1, 2).contiguous() for pictures in pixels
    )
    tokens = painter.tokenizer(
        [prompt for *_, prompt in chosen],
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    ).input_ids
    latents = painter.encode(target)
    noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (batch,))
    alphas = painter.scheduler.alphas_cumprod[timesteps][:, None, None, None]
    noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        text = painter.text_encoder(tokens)
        words, sentence, hint = (
            text.last_hidden_state,
            text.pooler_output,
            painter.encode(condition),
        )
        down, middle = painter.controlnet(
            noisy, timesteps, words, class_labels=sentence, controlnet_cond=hint, return_dict=False
        )
        predicted = painter.unet(
            noisy,
            timesteps,
            words,
            class_labels=sentence,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0][:, : latents.shape[1]]  # of a layer's 4/3 as many
    torch.nn.functional.mse_loss(predicted.float(), noise.float(), reduction="mean").backward()
    torch.nn.utils.clip_grad_norm_(painter.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Peak(TorchDispatchMode):
    """The bytes of all tensors alive, as they come and go: `now`, and their highest number, `peak`."""

    def __init__(self, tensors):
        super().__init__()
        self.known, self.now, self.peak = weakref.WeakSet(), 0, 0
        for tensor in tensors:
            self.count(tensor)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        tree_map_only(torch.Tensor, self.count, result)
        return result

    def count(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known.add(storage)
            self.add(storage.nbytes())
            weakref.finalize(storage, self.add, -storage.nbytes())

    def add(self, number):
        self.now += number
        self.peak = max(self.peak, self.now)


def memory():
    """Memory that training on SD-Turbo needs, computed: two steps run on tensors that have a shape and no content, all of which are counted.

    What a GPU's kernels take to work in, and what is lost between tensors, comes on top; `benchmark.py gpu` measures the whole.
    """
    print(
        f"{'GB':<36}{'weights':>9}{'gradients':>11}{'optimiser':>11}{'activations':>13}{'peak':>7}"
    )
    for precision, optimizer, at_once in (
        ("fp32", "adamw", 1),
        ("bf16", "adamw", 1),
        ("bf16", "adamw", 4),
        ("bf16", "adafactor", 1),
    ):
        with FakeTensorMode(allow_non_fake_inputs=True):
            torch.set_default_dtype(
                torch.bfloat16 if precision == "bf16" else torch.float32
            )  # of what is frozen
            unet = UNet2DConditionModel(
                sample_size=64, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024,
                down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
                use_linear_projection=True)  # fmt: skip
            vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
            torch.set_default_dtype(torch.float32)
            parts = {
                "unet": unet,
                "vae": vae,
                "controlnet": ControlNetModel.from_unet(unet, load_weights_from_unet=False),
            }
            painter = Painter(
                parts
                | {"tokenizer": None, "text_encoder": None, "scheduler": EulerDiscreteScheduler()},
                TURBO,
            ).train()
            unet.enable_gradient_checkpointing(), painter.controlnet.enable_gradient_checkpointing()
            painter.memory[""] = torch.rand(
                77, 1024
            )  # what the text encoder made of a prompt before it was dropped
            optimiser = make_optimizer(optimizer, painter, 1e-5)
            batch = random_batch(at_once, "cpu")
            with Peak(painter.parameters()) as peak:
                weights = peak.now
                for _ in range(2):
                    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                        loss = one_step_loss(painter, painter, batch)
                    loss.backward()
                    del loss
                    gradients = sum(
                        parameter.grad.nbytes for parameter in painter.controlnet.parameters()
                    )
                    optimiser.step()
                    optimiser.zero_grad()
                    states = peak.now - weights
        numbers = weights, gradients, states, peak.peak - weights - gradients - states, peak.peak
        print(
            f"{f'{precision}, {optimizer}, {at_once} at once':<36}"
            + "".join(f"{n / 1e9:{w}.2f}" for n, w in zip(numbers, (9, 11, 11, 13, 7))),
            flush=True,
        )


TURBO = {
    "size": "sd-turbo",
    "objective": "one-step",
    "steps": 1,
    "image_size": 256,
    "picture": 512,
    "horizon": 20,
    "cameras": CAMERAS,
}


def random_batch(count, device):
    """What one_step_loss takes, of 512x512 pixels, for the empty prompt."""
    condition, layer = (
        torch.rand(count, 3, 512, 512, device=device),
        torch.rand(count, 4, 512, 512, device=device),
    )
    return {
        "condition": condition,
        "observation": condition,
        "layer": layer,
        "prompts": [""] * count,
        "seeds": [0] * count,
        "keys": None,
    }


def gpu(base: str = "stabilityai/sd-turbo", steps: int = 10):
    """On a CUDA GPU: steps per second and peak memory of training by setting, and milliseconds to paint, with and without compiling.

    Args:
        base: SD-Turbo's name on the Hugging Face Hub, or a folder in its layout.
        steps: How many steps are timed.
    """
    if not torch.cuda.is_available():
        raise UserError("There is no CUDA GPU here, so there is nothing to measure.")
    device = "cuda"
    for at_once in (1, 2, 4):
        painter = Painter(load_turbo(base), TURBO)
        painter.unet.to(torch.bfloat16), painter.vae.to(torch.bfloat16)
        painter.to(device).read([""])
        painter.text_encoder = None
        (
            painter.unet.enable_gradient_checkpointing(),
            painter.controlnet.enable_gradient_checkpointing(),
        )
        optimizer, batch = make_optimizer("adamw", painter, 1e-5), random_batch(at_once, device)
        torch.cuda.reset_peak_memory_stats()
        for i in range(steps + 3):
            if i == 3:
                torch.cuda.synchronize()
                start = time.perf_counter()
            with torch.autocast(device, torch.bfloat16):
                one_step_loss(painter, painter, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.cuda.synchronize()
        rate, peak = steps / (time.perf_counter() - start), torch.cuda.max_memory_allocated() / 1e9
        print(
            f"training, {at_once} at once: {rate * at_once:.2f} samples/s, peak {peak:.1f} GB",
            flush=True,
        )
        del painter, optimizer
        torch.cuda.empty_cache()
    for compiled in (False, True):
        painter = (
            Painter(load_turbo(base), TURBO)
            .to(device, torch.bfloat16, memory_format=torch.channels_last)
            .eval()
        )
        for part in (painter.unet, painter.controlnet, painter.vae.decoder) if compiled else ():
            part.compile()
        condition, times = torch.rand(1, 3, 512, 512, device=device), []
        for _ in range(steps + 3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            painter.paint_tiles(condition, [""])
            torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - start))
        print(
            f"painting one picture of 512x512{', compiled' * compiled}: {np.median(times[3:]):.1f} ms",
            flush=True,
        )


def main():
    tyro.extras.subcommand_cli_from_dict(
        {"spheres": spheres, "demos": demos, "step": step, "memory": memory, "gpu": gpu, "rlbench": rlbench}, description=__doc__)  # fmt: skip


if __name__ == "__main__":
    run_stage(main)
