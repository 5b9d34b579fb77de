"""SD-Turbo's networks at their true size with random weights, made on the device in seconds.

Times and memory depend on sizes alone, so nothing has to be downloaded to measure them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from genima.episodes import CAMERAS
from genima.painter import PROMPT, TinyPainter, TurboPainter
from genima.tokenizer import train_tokenizer

INSTRUCTION = "push the blue button"
PROMPTS = [PROMPT.format(INSTRUCTION)]


@dataclass
class Layout:
    """Sizes of the networks; the default is SD 2.1-base's, from which SD-Turbo was distilled."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    heads: tuple[int, ...] = (5, 10, 20, 20)
    text_width: int = 1024
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    groups: int = 32
    resolution: int = 512
    text_layers: int = 23
    text_heads: int = 16


MINIATURE = Layout((8, 16, 16, 16), (1, 2, 2, 2), 16, (4, 4, 4, 4), 1, 4, 64, 1, 2)


def random_networks(layout: Layout, device: str) -> tuple:
    """UNet, VAE and scheduler of this size, their weights drawn on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=layout.channels,
            attention_head_dim=layout.heads,
            cross_attention_dim=layout.text_width,
            layers_per_block=layout.layers,
            norm_num_groups=layout.groups,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            use_linear_projection=True,
        )
        vae = AutoencoderKL(
            block_out_channels=layout.vae_channels,
            layers_per_block=layout.layers,
            norm_num_groups=layout.groups,
            latent_channels=4,
            sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        steps_offset=1,
    )
    return unet, vae, scheduler


def random_painter(layout: Layout, config: dict, device: str) -> TurboPainter:
    """A painter of this size. Text: random, encoded already."""
    unet, vae, scheduler = random_networks(layout, device)
    with torch.device(device):
        controlnet = ControlNetModel.from_unet(unet)
    painter = TurboPainter(config, None, None, vae, unet, controlnet, scheduler)
    painter.prompt_cache[PROMPTS[0]] = torch.randn(77, layout.text_width)
    return painter


def layout_for(device: str) -> Layout:
    """The true size; on a CPU a very small one, to see that all works."""
    if device == "cpu":
        return MINIATURE
    return Layout()


def make_painter(base: str | None, device: str) -> TurboPainter:
    """The painter, float32; its ControlNet changes the picture, as after a training.

    base: SD-Turbo's folder or name; None, and always on a CPU: random weights.
    """
    layout = layout_for(device)
    config = {
        "size": "sd-turbo",
        "objective": "one-step",
        "num_inference_steps": 1,
        "image_size": layout.resolution // 2,
        "resolution": layout.resolution,
        "horizon": 20,
        "cameras": list(CAMERAS),
    }
    if base is None or device == "cpu":
        painter = random_painter(layout, config, device)
    else:
        painter = TurboPainter.from_base(base, config).to(device)
    controlnet = painter.controlnet
    zero_convolutions = [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]
    zero_convolutions.append(controlnet.controlnet_cond_embedding.conv_out)
    for convolution in zero_convolutions:
        torch.nn.init.normal_(convolution.weight, std=0.02)
    return painter


def painter_to_paint_with(base: str | None, device: str) -> TurboPainter:
    """As load_painter leaves it: in bf16 and channels last on a GPU."""
    painter = make_painter(base, device).eval()
    painter.encode_text(PROMPTS)
    painter.text_encoder = None  # the prompt is in the cache
    if device == "cuda":
        painter.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    return painter


def random_views(painter: TurboPainter | TinyPainter) -> dict:
    """{camera: (1, h, w, 3) uint8}"""
    size = painter.config["image_size"]
    random = np.random.default_rng(0)
    views = {}
    for camera in painter.config["cameras"]:
        views[camera] = random.integers(0, 256, (1, size, size, 3), np.uint8)
    return views


def write_folder(folder: Path, device: str, sentences: list[str]):
    """Write a folder in SD-Turbo's layout, in half precision, as `--variant fp16` fetches it."""
    layout = layout_for(device)
    unet, vae, scheduler = random_networks(layout, device)
    tokenizer = train_tokenizer([PROMPT.format(sentence) for sentence in sentences])
    tokenizer.model_max_length = 77
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=layout.text_width,
        intermediate_size=4 * layout.text_width,
        num_hidden_layers=layout.text_layers,
        num_attention_heads=layout.text_heads,
        max_position_embeddings=77,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device(device):
        text_encoder = CLIPTextModel(config)
    for name, network in (("unet", unet), ("vae", vae), ("text_encoder", text_encoder)):
        network.half().save_pretrained(folder / name, variant="fp16")
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
