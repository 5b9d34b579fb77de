"""How many samples of a batch a GPU computes at once, and whether it keeps their activations.

A batch can be computed in parts (micro-batches) whose gradients add up. Large parts keep a GPU
busy, but the activations of every sample must fit into its memory until the backward pass has used
them. Gradient checkpointing keeps few of them and computes the others twice: a quarter slower, for
a small part of the memory.

--micro-batch-size auto measures on this GPU what one sample and two take, and takes

    without checkpointing   the largest part that fits, if it has ENOUGH samples or all of them;
    with it                 otherwise, and then the largest part that fits.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from genima.diffusion import LatentCache
from genima.files import UserError
from genima.training import trained_parameters
from genima.views import grid_of

MARGIN = 0.1  # of all the memory stays free: working memory of kernels, gaps between tensors
ENOUGH = 4  # samples at once; with fewer, a large GPU waits for Python more than it computes
OPTIMIZER_BYTES = {"adamw": 8, "adafactor": 2}  # for each trained number, float32


class Peak(NamedTuple):
    """The most bytes that a training step takes."""

    one: int
    """With one sample at once."""
    further: int
    """What each further sample adds."""

    def of(self, samples: int) -> int:
        return self.one + (samples - 1) * self.further


# ---------------------------------------------------------------------------------------- settings
def resolve_micro_batch(settings, painter, objective, accelerator, prompt: str):
    """Replace the "auto" in train_controlnet.py's settings by a number, and say which.

    Call it before the optimiser allocates its memory. Weights and random numbers stay as they are.
    prompt: one of those that are trained with.
    """
    if settings.micro_batch_size != "auto":
        return
    share = settings.batch_size // accelerator.num_processes
    if settings.size == "tiny":
        settings.micro_batch_size = share
        return
    if accelerator.device.type != "cuda":
        settings.micro_batch_size = 1
        switch_checkpointing(painter, True)
        print("There is no CUDA GPU to measure on: one sample at once, with checkpointing.")
        return

    def compute(count):
        batch = random_batch(count, painter, prompt)
        with accelerator.autocast():
            loss = objective(painter, painter, batch, LatentCache(painter))
        loss.backward()

    numbers = sum(parameter.numel() for parameter in trained_parameters(painter).values())
    later = OPTIMIZER_BYTES[settings.optimizer] * numbers
    if accelerator.num_processes > 1:
        later += 4 * numbers  # the gradients once more, while processes exchange them
    count, sentence = choose_micro_batch(
        compute, partial(switch_checkpointing, painter), share, later
    )
    painter.zero_grad()
    counts = accelerator.gather(torch.tensor([count], device=painter.unet.device))
    settings.micro_batch_size = int(counts.min())
    if accelerator.is_main_process:
        print(sentence)


def switch_checkpointing(painter, on: bool):
    """Let the networks that are trained through keep few activations (on) or all of them."""
    for network in (painter.unet, painter.controlnet):
        if on:
            network.enable_gradient_checkpointing()
        else:
            network.disable_gradient_checkpointing()


def random_batch(count: int, painter, prompt: str) -> dict:
    """What an objective takes (painter_data.py), of noise, all with the same prompt."""
    device = painter.unet.device
    rows, columns = grid_of(len(painter.config["cameras"]))
    height = painter.config["resolution"]
    width = height * columns // rows
    generator = torch.Generator(device).manual_seed(0)
    pictures = torch.rand(count, 7, height, width, device=device, generator=generator)
    observation, layer = pictures.split((3, 4), dim=1)
    return {
        "condition": observation,
        "observation": observation,
        "layer": layer,
        "prompts": [prompt] * count,
        "seeds": list(range(count)),
        "keys": [None] * count,  # no target latents are kept
    }


# ------------------------------------------------------------------------------------------ memory
def largest_that_fits(peak: Peak | None, share: int, available: int) -> int:
    """The largest divisor of `share` whose samples fit into `available` bytes at once; 0: none."""
    if peak is None:
        return 0
    fitting = [n for n in range(1, share + 1) if share % n == 0 and peak.of(n) <= available]
    return max(fitting, default=0)


def choose_micro_batch(
    compute: Callable[[int], None],
    set_checkpointing: Callable[[bool], None],
    share: int,
    optimizer_bytes: int,
) -> tuple[int, str]:
    """Samples at once, and a sentence about them. Leaves checkpointing as is best for them.

    compute(n): forward and backward of n samples on the GPU. share: samples a step of this process,
    which the samples at once must divide. optimizer_bytes: what the optimiser is going to allocate.
    Raises UserError where not even one sample fits.
    """
    available = available_bytes() - optimizer_bytes
    for checkpointing in (False, True):
        set_checkpointing(checkpointing)
        peak = measure_peak(compute)
        count = largest_that_fits(peak, share, available)
        if count >= min(ENOUGH, share):
            break
    if count == 0:
        raise UserError(
            "Not even one sample fits into this GPU's memory: lower --resolution, or take "
            "--optimizer adafactor."
        )
    how = "without"
    if checkpointing:
        how = "with"
    sentence = (
        f"{count} samples at once {how} gradient checkpointing: about "
        f"{(peak.of(count) + optimizer_bytes) / 1e9:.1f} GB of this GPU's memory."
    )
    return count, sentence


def available_bytes() -> int:
    """Bytes of the current GPU that this process has or can get, less the margin."""
    free, total = torch.cuda.mem_get_info()
    return int(free + torch.cuda.memory_reserved() - MARGIN * total)


def measure_peak(compute: Callable[[int], None]) -> Peak | None:
    """The memory that compute(1) and compute(2) take, all tensors included; None: too much."""
    try:
        compute(1)  # allocates the gradients, which stay, and starts the libraries
        one = peak_of(compute, 1)
        two = peak_of(compute, 2)
    except torch.OutOfMemoryError:
        peak = None
    else:
        peak = Peak(one, max(two - one, 0))
    torch.cuda.empty_cache()
    return peak


def peak_of(compute: Callable[[int], None], count: int) -> int:
    torch.cuda.reset_peak_memory_stats()
    compute(count)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
