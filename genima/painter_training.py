"""What stage 2 needs to train and is not its lesson: checks, precision, memory, optimisers."""

from pathlib import Path

import torch
from diffusers.models.attention_processor import AttnProcessor
from transformers.optimization import Adafactor

from genima.base import BASES, FROM_SCRATCH, fingerprint
from genima.diffusion import VAE_PATCH
from genima.episodes import read_episode
from genima.files import UserError, check_number
from genima.hub import check_hub
from genima.kinematics import is_in_room
from genima.painter import PROMPT, TinyPainter, TurboPainter
from genima.painter_data import PainterData, read_pictures
from genima.scenes import describe_split
from genima.tiny import LAYOUTS, pixel_unit
from genima.tokenizer import tokenize, unknown_words
from genima.training import check_numbers, trained_parameters
from genima.views import TILED, grid_of, tile_views, untile_views

MAX_RESOLUTION = 4096  # pixels
TRAINED_STEPS = 1000  # of noise, in a training; painting can take no more
ROOM_SAMPLES = 96  # pictures, of all demonstrations, that show what an empty room looks like
LEAST_SCENES = 5  # in fewer, what is to be grasped is often at one place, as if it were the room's
# Steps and learning rate by default: from the base, and from random weights. Those of small are
# tiny's, with a learning rate in proportion to 1 / width, and were never tuned.
FROM_BASE = {"tiny": (1200, 2e-4), "small": (1200, 7e-5), "sd-turbo": (10_000, 1e-5)}
FROM_RANDOM = {"tiny": (4800, 8e-4), "small": (4800, 3e-4)}


def fill_in_defaults(settings, data: PainterData):
    """Set what is None: values that depend on the size, the base and the recorded views."""
    size = settings.size
    schedules = FROM_BASE
    if settings.base == FROM_SCRATCH and size in FROM_RANDOM:
        schedules = FROM_RANDOM
    steps, learning_rate = schedules[size]
    resolution = TILED[size]
    as_recorded = data.image_size is not None and data.image_size <= resolution
    if size in LAYOUTS:
        rows, _ = grid_of(len(data.cameras))
        if as_recorded:
            resolution = rows * data.image_size
        elif settings.base != FROM_SCRATCH:  # cells as large as those that the base has seen
            resolution = rows * TILED[size] // 2
    defaults = {
        "base": BASES[size],
        "steps": steps,
        "learning_rate": learning_rate,
        "resolution": resolution,
        "out": settings.run / "controlnet",
    }
    for name, value in defaults.items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)


def check_settings(settings, num_processes: int, cameras: list[str]):
    """Raise a UserError for settings of train_controlnet.py that cannot be trained with."""
    samples = settings.batch_size
    if samples < num_processes:
        raise UserError(
            f"There are more processes ({num_processes}) than samples a step ({samples}): "
            "raise --batch-size."
        )
    check_numbers(settings)
    if settings.micro_batch_size != "auto":
        check_number("--micro-batch-size", settings.micro_batch_size, 1)
    check_number("--num-inference-steps", settings.num_inference_steps, 1, TRAINED_STEPS)
    check_number("--resolution", settings.resolution, 1, MAX_RESOLUTION)
    rows, columns = grid_of(len(cameras))
    check_number("--crop", settings.crop, 0, settings.resolution // rows - 1)
    unit = VAE_PATCH
    if settings.size in LAYOUTS:
        unit = pixel_unit(settings.size)
    height = settings.resolution
    width = height * columns // rows
    if height < unit or height % unit or width % unit:
        raise UserError(
            f"The tiled views have {height}x{width} pixels, which is no multiple of {unit}: "
            "give another --resolution."
        )
    at_once = 1 if settings.micro_batch_size == "auto" else settings.micro_batch_size
    if samples % (num_processes * at_once):
        raise UserError(
            f"--batch-size {samples} is no multiple of {num_processes} processes times "
            f"--micro-batch-size {settings.micro_batch_size}: change one."
        )
    if settings.push_to_hub:
        check_hub(settings.push_to_hub)


def identity_of(settings, data: PainterData) -> dict:
    """Settings and facts about the data that must be the same when a training is resumed."""
    names = "size objective resolution steps batch_size learning_rate optimizer precision crop seed"
    identity = {name: getattr(settings, name) for name in names.split()}
    identity |= {"image_size": data.image_size, "horizon": data.horizon}
    identity |= {"cameras": data.cameras, "frames": len(data.training)}
    if data.image_size is None:
        identity["image_sizes"] = {name: list(size) for name, size in data.image_sizes.items()}
    if data.rehearsed is not None:
        identity["rehearsed"] = [Path(file).name for file in data.rehearsed.files]
    if settings.any_frame:
        identity["any_frame"] = True
    if settings.backgrounds:
        identity["backgrounds"] = True
    if settings.size in LAYOUTS:  # its base is a folder
        identity["base"] = fingerprint(settings.base)
    return identity


def find_room(data: PainterData, resolution: int) -> torch.Tensor:
    """What the cameras see when nothing is before them, tiled (3, H, W): the medians of pictures.

    Infinity for a camera on the arm, which sees another part of the room in each. Raises UserError
    where all are on the arm, and for few scenes.
    """
    if data.scenes < LEAST_SCENES:
        raise UserError(
            f"--backgrounds needs demonstrations of at least {LEAST_SCENES} scenes, to tell things "
            f"from the room by where they lie, and here are {data.scenes}: train without it."
        )
    chosen = data.training[:: max(1, len(data.training) // ROOM_SAMPLES)]
    episode = read_episode(Path(chosen[0].episode), images=False)
    on_arm = [not is_in_room(episode, camera) for camera in data.cameras]
    if all(on_arm):
        raise UserError(
            f"--backgrounds needs a camera in the room, but {', '.join(data.cameras)} moves with "
            "the arm: train without it."
        )
    pictures = read_pictures(chosen, data.cameras, resolution)[:, :3]
    room = pictures.median(dim=0).values  # (3, H, W)
    views = untile_views(room[None], len(data.cameras))  # (1, V, 3, h, w)
    views[:, on_arm] = torch.inf
    return tile_views(views)[0]


# ------------------------------------------------------------------------- precision and memory
def choose_precision(size: str, precision: str) -> str:
    """fp32 or bf16, where "auto" means bf16 if it is faster here.

    bf16 is for multiplications alone; trained weights and sums stay float32.
    """
    if precision != "auto":
        return precision
    on_gpu = torch.cuda.is_available()
    able = torch.cpu.get_capabilities()
    # Intel's avx512_bf16 multiplies no faster than its fp32, and converting costs: a step took 1.4
    # times as long with it (a Xeon without AMX).
    on_intel = "Intel" in able.get("cpu_name", "")
    in_hardware = able.get("amx_bf16") or (able.get("avx512_bf16") and not on_intel)
    on_cpu = in_hardware and not torch.accelerator.is_available()
    # On a GPU tiny's operations are too short, on a CPU nobody waits for sd-turbo.
    faster = {"tiny": on_cpu, "small": on_cpu or on_gpu, "sd-turbo": on_gpu}
    if faster[size]:
        return "bf16"
    return "fp32"


def check_prompts(painter: TinyPainter, data: PainterData):
    """Raise a UserError for an instruction that is longer than the painter's text encoder reads."""
    tokenize(painter.tokenizer, [PROMPT.format(text) for text in data.instructions()])


def prepare_tiny(painter: TinyPainter, device: torch.device, bf16: bool) -> TinyPainter:
    """Move it to the device, with the attention and the layout that are faster there."""
    if bf16 and device.type == "cpu":
        # Plain operations: the backward of PyTorch's fused attention took a fifth of the step.
        painter.unet.set_attn_processor(AttnProcessor())
        painter.controlnet.set_attn_processor(AttnProcessor())
    painter.to(device)
    if bf16 and device.type == "cuda":
        painter.to(memory_format=torch.channels_last)
    return painter


def prepare_turbo(
    painter: TurboPainter, device: torch.device, bf16: bool, instructions: list[str]
) -> TurboPainter:
    """Move it to the device, in as little memory as its training needs."""
    if bf16:  # what is frozen needs no float32
        painter.unet.to(torch.bfloat16)
        painter.vae.to(torch.bfloat16)
    painter.to(device)
    if device.type == "cuda":  # whose convolutions are faster so
        painter.to(memory_format=torch.channels_last)
    painter.encode_text([PROMPT.format(instruction) for instruction in instructions])
    painter.text_encoder = None  # all prompts are in the cache: it is no longer needed
    painter.unet.enable_gradient_checkpointing()
    painter.controlnet.enable_gradient_checkpointing()
    return painter


def make_optimizer(name: str, painter: torch.nn.Module, learning_rate: float):
    """adamw or adafactor, of what is trained, with the published code's weight decay."""
    parameters = list(trained_parameters(painter).values())
    if name == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=learning_rate,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=1e-2,
            fused=True,
        )
    return Adafactor(
        parameters,
        lr=learning_rate,
        relative_step=False,
        scale_parameter=False,
        weight_decay=1e-2,
    )


def describe_training(painter, accelerator, data: PainterData, use_failed: bool) -> str:
    """What is going to be trained, on how many frames, where, and which words are new to it."""
    trained = sum(parameter.numel() for parameter in trained_parameters(painter).values())
    used = data.failed if use_failed else 0
    split = describe_split(data.scenes, data.scenes_held_out, data.failed - used, used)
    rehearsed = ""
    if data.rehearsed is not None:
        rehearsed = f"{len(data.rehearsed)} random scenes among them.\n"
    words = (
        f"{len(data.training)} frames to train on; {split}\n{rehearsed}"
        f"{trained / 1e6:.1f} M parameters to train, on {accelerator.num_processes} processes "
        f"({accelerator.device.type})."
    )
    if isinstance(painter, TinyPainter):
        unknown = unknown_words(painter.tokenizer, data.instructions())
        if unknown:
            words += f"\nNew to the text encoder, which spells them in bytes: {', '.join(unknown)}."
    return words


def split_batch(batch: dict, size: int, device: torch.device):
    """Yield the batch in parts of `size` samples, on the device."""
    for i in range(0, len(batch["prompts"]), size):
        part = {}
        for name, values in batch.items():
            part[name] = values[i : i + size]
            if isinstance(values, torch.Tensor):
                part[name] = part[name].to(device, non_blocking=True)
        yield part


def advise_when_out_of_memory(main):
    """main, with one sentence of advice in place of PyTorch's error."""

    def main_with_advice():
        try:
            main()
        except RuntimeError as error:
            if "out of memory" not in str(error):  # CUDA and MPS say it in the same words
                raise
            raise UserError(
                "The GPU is out of memory: lower --micro-batch-size, then --resolution, or take "
                "--optimizer adafactor (the same command resumes from the last checkpoint)."
            ) from error

    return main_with_advice


# ----------------------------------------------------------------------------------- validation
def sphere_overlap(painted: torch.Tensor, truth: torch.Tensor, observation: torch.Tensor) -> float:
    """Intersection over union of painted and true spheres in pictures (B, 3, H, W), 0..1.

    A sphere is where a picture differs from the observation by a fifth.
    """
    ours = (painted - observation).abs().amax(1) > 0.2  # (B, H, W)
    theirs = (truth - observation).abs().amax(1) > 0.2
    union = (ours | theirs).sum().clamp(min=1)
    return ((ours & theirs).sum() / union).item()
