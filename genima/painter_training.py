"""What stage 2 needs to train and is not its lesson: precision, memory, noise, target latents."""

import torch
from diffusers.models.attention_processor import AttnProcessor
from transformers.optimization import Adafactor

from genima.files import UserError
from genima.painter import PROMPT, TIMESTEP, TinyPainter, TurboPainter
from genima.training import trained_parameters
from genima.views import composite


# --------------------------------------------------------------------------- precision and memory
def choose_precision(size: str, precision: str) -> str:
    """fp32 or bf16, where "auto" means bf16 if it is faster here.

    bf16 is for multiplications alone; trained weights and sums stay float32.
    """
    if precision != "auto":
        return precision
    if size == "sd-turbo":
        faster = torch.cuda.is_available()
    else:
        able = torch.cpu.get_capabilities()
        in_hardware = able.get("avx512_bf16") or able.get("amx_bf16")
        faster = in_hardware and not torch.accelerator.is_available()
    if faster:
        return "bf16"
    return "fp32"


def prepare_tiny(painter: TinyPainter, device: torch.device, bf16: bool) -> TinyPainter:
    """Move it to the device, with the attention that is faster there."""
    if bf16 and device.type == "cpu":
        # Plain operations: the backward of PyTorch's fused attention took a fifth of the step.
        painter.unet.set_attn_processor(AttnProcessor())
        painter.controlnet.set_attn_processor(AttnProcessor())
    return painter.to(device)


def prepare_turbo(
    painter: TurboPainter, device: torch.device, bf16: bool, instructions: list[str]
) -> TurboPainter:
    """Move it to the device, in as little memory as its training needs."""
    if bf16:  # what is frozen needs no float32
        painter.unet.to(torch.bfloat16)
        painter.vae.to(torch.bfloat16)
    painter.to(device)
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


def split_batch(batch: dict, size: int, device: torch.device):
    """Yield the batch in parts of `size` samples, on the device."""
    for i in range(0, len(batch["prompts"]), size):
        part = {}
        for name, values in batch.items():
            part[name] = values[i : i + size]
            if isinstance(values, torch.Tensor):
                part[name] = part[name].to(device)
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


# ------------------------------------------------------------------------------- noise and targets
def draw_noise(seeds: list[int], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise in the shape of `like` (B, C, h, w), and timesteps (B,).

    Each sample's depends on its seed alone, on every device and in every process.
    """
    noise = []
    timesteps = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.randn(like.shape[1:], generator=generator))
        timesteps.append(torch.randint(TIMESTEP + 1, (1,), generator=generator))
    return torch.stack(noise).to(like.device), torch.cat(timesteps).to(like.device)


def add_noise(scheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor):
    """sqrt(a) latents + sqrt(1 - a) noise, with a = alphas_cumprod at each sample's timestep."""
    a = scheduler.alphas_cumprod.to(latents.device)[timesteps][:, None, None, None]
    return a.sqrt() * latents + (1 - a).sqrt() * noise


class LatentCache:
    """Encodes the target pictures for one painter; a picture that has a key, only once."""

    def __init__(self, painter: TinyPainter | TurboPainter):
        self.painter = painter
        self.latents = {}  # key: (C, h, w), on the CPU

    def encode(self, batch: dict) -> torch.Tensor:
        """The latents (B, C, h, w), float32, of a batch's target pictures."""
        pictures = composite(batch["layer"], batch["observation"])
        keys = batch["keys"]
        if None in keys:  # a random crop has changed them
            return self.painter.encode_images(pictures).float()
        new = [i for i, key in enumerate(keys) if key not in self.latents]
        if new:
            latents = self.painter.encode_images(pictures[new]).cpu()
            for i, latent in zip(new, latents):
                self.latents[keys[i]] = latent
        found = [self.latents[key] for key in keys]
        return torch.stack(found).to(pictures.device).float()
