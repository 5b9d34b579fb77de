"""Stage 2's networks: a diffusion model, steered by a ControlNet (paper, section 3.1).

    prompt --> text encoder --> encoder_hidden_states --+----------------------+
                                (B, L, E)               v                      v
    tiled views (B, 3, H, W) --> controlnet_cond --> ControlNet --residuals--> UNet --> prediction
                                                        ^                      ^
    latents (B, C, h, w), timestep ---------------------+----------------------+

The ControlNet is a copy of the UNet's encoder. Zero convolutions join it to the UNet, so before
training it changes nothing. Two classes with the same methods; TinyPainter has two sizes:

                 TurboPainter                            TinyPainter
    size         sd-turbo                                tiny, small (genima/tiny.py)
    network      SD-Turbo; the ControlNet is trained     the same parts, small; all are trained
    a latent     8x8 pixels, encoded (C = 4, h = H/8)    4x4 pixels as they are (C = 48, h = H/4)
    text         L = 77, E = 1024                        L = 32 to 77, E = 64, 256; pooled_text
    prediction   the noise in the latents, (B, C, h, w)  an RGBA layer over the views (B, 4, H, W)

A painter's `config`, saved as painter.json: size, objective, num_inference_steps, image_size (of
square views of one size, pixels; otherwise null, and image_sizes by camera), resolution (height of
the tiled views inside the networks, pixels), horizon (steps ahead), cameras, tasks, fps, held_out
(demonstrations not trained on), and for sd-turbo base (where its frozen parts come from).
Trained by train_controlnet.py; loaded by load_painter, at the end of this file.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from genima.diffusion import TIMESTEP, VAE_PATCH, initial_latents
from genima.files import UserError
from genima.hub import fetch_folder, load_part, load_parts, read_config, save_parts
from genima.tiny import LAYOUTS, PATCH, build_parts
from genima.tokenizer import tokenize
from genima.turbo_speed import speed_up
from genima.views import check_views, composite, fit, image_sizes_of, resize, tile_any, untile_views

PROMPT = "tiled perspectives of a robot arm executing '{}'"  # paper, appendix


class Painter(torch.nn.Module):
    """What the two painters share: from views to tiled views and back, and how they are saved."""

    def paint(self, images: dict[str, np.ndarray], instructions: list[str]) -> dict:
        """Views {camera: (B, h, w, 3) uint8} and B instructions -> the painted views, likewise."""
        sizes = image_sizes_of(self.config)
        check_views(images, sizes, "painter")
        views = []
        for camera in sizes:
            view = torch.from_numpy(images[camera]).to(self.unet.device).float() / 255
            views.append(view.permute(0, 3, 1, 2))  # (B, 3, h, w)
        tiled = tile_any(views, self.config["resolution"])  # (B, 3, rows h, columns w)
        condition = resize(tiled, self.config["resolution"])  # (B, 3, H, W)
        prompts = [PROMPT.format(instruction) for instruction in instructions]
        tiled_painting = resize(self.paint_tiled(condition, prompts), tiled.shape[2])
        cells = untile_views(tiled_painting, len(sizes))  # (B, V, 3, h, w)
        painted = {}
        for i, (camera, size) in enumerate(sizes.items()):
            view = fit(cells[:, i], *size).permute(0, 2, 3, 1)  # (B, h, w, 3)
            painted[camera] = (255 * view).round().to(torch.uint8).cpu().numpy()
        return painted

    def save(self, folder: Path):
        """Write saved_parts, each to a folder of its name, and painter.json."""
        parts = {name: getattr(self, name) for name in self.saved_parts}
        save_parts(folder, parts, self.config)


class TurboPainter(Painter):
    """The paper's: SD-Turbo and a ControlNet, which alone is trained and saved."""

    base_parts = {  # frozen; loaded from config["base"]
        "tokenizer": CLIPTokenizer,
        "text_encoder": CLIPTextModel,
        "vae": AutoencoderKL,
        "unet": UNet2DConditionModel,
        "scheduler": EulerDiscreteScheduler,
    }
    saved_parts = {"controlnet": ControlNetModel}

    def __init__(self, config, tokenizer, text_encoder, vae, unet, controlnet, scheduler):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.text_encoder = text_encoder
        self.unet = unet
        self.controlnet = controlnet
        self.vae = vae
        self.requires_grad_(False)
        self.controlnet.requires_grad_(True)
        # prompt -> its encoder_hidden_states (L, E): the text encoder is frozen, so it reads each
        # prompt once, and can be dropped (None) when all prompts to come are in here.
        self.prompt_cache = {}

    @classmethod
    def from_base(cls, base: str, config: dict):
        """A painter to be trained. base: SD-Turbo's folder, or its name on the Hub."""
        parts = load_parts(base, cls.base_parts)
        unet_width = parts["unet"].config.cross_attention_dim
        text_width = parts["text_encoder"].config.hidden_size
        if unet_width != text_width:
            raise UserError(
                f"{base}: the UNet reads text of width {unet_width}, the text encoder gives "
                f"{text_width}: take both from one model."
            )
        controlnet = ControlNetModel.from_unet(parts["unet"])
        return cls(config | {"base": base}, controlnet=controlnet, **parts)

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> tuple[Tensor, None]:
        """B prompts -> encoder_hidden_states (B, L, E); None, for SD-Turbo reads no pooled text."""
        device = self.unet.device
        new = sorted(set(prompts) - set(self.prompt_cache))
        if new:
            token_ids = tokenize(self.tokenizer, new).to(device)
            hidden_states = self.text_encoder(token_ids).last_hidden_state
            self.prompt_cache.update(zip(new, hidden_states.cpu()))
        hidden_states = torch.stack([self.prompt_cache[prompt] for prompt in prompts])
        return hidden_states.to(device, self.unet.dtype), None

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), 0..1 -> latents (B, 4, H/8, W/8): the mean, not a sample."""
        posterior = self.vae.encode((2 * images - 1).to(self.vae.dtype)).latent_dist
        return posterior.mode() * self.vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, h, w) -> images (B, 3, 8 h, 8 w), 0..1."""
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        images = self.vae.decode(latents).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def forward(self, condition, prompts: list[str], latents: Tensor, timestep=TIMESTEP) -> Tensor:
        """The noise in latents (B, 4, H/8, W/8), given tiled views (B, 3, H, W), 0..1, and text."""
        encoder_hidden_states, _ = self.encode_text(prompts)  # (B, 77, 1024)
        return self.predict_noise(condition, encoder_hidden_states, latents, timestep)

    def predict_noise(self, condition, encoder_hidden_states, latents, timestep) -> Tensor:
        """The same, for encoder_hidden_states (B, 77, 1024) in place of prompts."""
        latents = latents.to(self.unet.dtype)
        down_residuals, mid_residual = self.controlnet(
            latents,
            timestep,
            encoder_hidden_states,
            controlnet_cond=condition.to(self.unet.dtype),
            return_dict=False,
        )
        return self.unet(
            latents,
            timestep,
            encoder_hidden_states,
            down_block_additional_residuals=down_residuals,
            mid_block_additional_residual=mid_residual,
        ).sample

    @torch.no_grad()
    def paint_tiled(self, condition: Tensor, prompts: list[str], seed: int = 0) -> Tensor:
        """Tiled views (B, 3, H, W), 0..1 -> the same with spheres. Same seed, same picture.

        Euler's steps along the path from noise to picture; a single one goes straight to its end.
        """
        B, _, H, W = condition.shape
        shape = (B, self.unet.config.in_channels, H // VAE_PATCH, W // VAE_PATCH)
        self.scheduler.set_timesteps(self.config["num_inference_steps"], device=condition.device)
        latents = initial_latents(self.scheduler, shape, seed, condition.device)
        for timestep in self.scheduler.timesteps:
            noisy = self.scheduler.scale_model_input(latents, timestep)
            noise = self(condition, prompts, noisy, timestep).float()
            latents = self.scheduler.step(noise, timestep, latents).prev_sample
        return self.decode_latents(latents)


class TinyPainter(Painter):
    """The same parts built small, all trained, and no VAE; it paints a layer over the views."""

    saved_parts = {
        "tokenizer": CLIPTokenizer,
        "text_encoder": CLIPTextModel,
        "unet": UNet2DConditionModel,
        "controlnet": ControlNetModel,
        "scheduler": EulerDiscreteScheduler,
    }

    def __init__(self, config, tokenizer, text_encoder, unet, controlnet, scheduler):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.text_encoder = text_encoder
        self.unet = unet
        self.controlnet = controlnet

    @classmethod
    def from_scratch(cls, instructions: list[str], config: dict):
        """A painter to be trained; each word of the instructions becomes one token."""
        prompts = [PROMPT.format(instruction) for instruction in instructions]
        return cls(config, **build_parts(config["size"], prompts, config["resolution"]))

    def encode_text(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """B prompts -> encoder_hidden_states (B, L, E), pooled_text (B, E)."""
        token_ids = tokenize(self.tokenizer, prompts).to(self.unet.device)
        text = self.text_encoder(token_ids)
        return text.last_hidden_state, text.pooler_output

    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), 0..1 -> latents (B, 48, H/4, W/4), -1..1: the same numbers."""
        return F.pixel_unshuffle(2 * images - 1, PATCH)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, 48, h, w) -> images (B, 3, 4 h, 4 w), 0..1."""
        return (F.pixel_shuffle(latents, PATCH) / 2 + 0.5).clamp(0, 1)

    def forward(
        self, condition: Tensor, prompts: list[str], latents=None, timestep=TIMESTEP
    ) -> Tensor:
        """Logits of the layer (B, 4, H, W) to paint over tiled views (B, 3, H, W), 0..1.

        latents (B, 48, H/4, W/4): the noisy picture with spheres; None: the views themselves.
        """
        encoder_hidden_states, pooled_text = self.encode_text(prompts)  # (B, L, E), (B, E)
        controlnet_cond = self.encode_images(condition)  # (B, 48, H/4, W/4)
        if latents is None:
            latents = controlnet_cond
        down_residuals, mid_residual = self.controlnet(
            latents,
            timestep,
            encoder_hidden_states,
            controlnet_cond=controlnet_cond,
            class_labels=pooled_text,
            return_dict=False,
        )
        patches = self.unet(
            latents,
            timestep,
            encoder_hidden_states,
            class_labels=pooled_text,
            down_block_additional_residuals=down_residuals,
            mid_block_additional_residual=mid_residual,
        ).sample  # (B, 64, H/4, W/4)
        return F.pixel_shuffle(patches, PATCH)  # (B, 4, H, W)

    @torch.no_grad()
    def paint_tiled(self, condition: Tensor, prompts: list[str], seed: int = 0) -> Tensor:
        """Tiled views (B, 3, H, W), 0..1 -> the same with spheres. Same seed, same picture."""
        if self.config["objective"] == "one-step":
            return composite(self(condition, prompts).sigmoid(), condition)
        shape = self.encode_images(condition).shape
        self.scheduler.set_timesteps(self.config["num_inference_steps"], device=condition.device)
        latents = initial_latents(self.scheduler, shape, seed, condition.device)
        for timestep in self.scheduler.timesteps:
            noisy = self.scheduler.scale_model_input(latents, timestep)
            layer = self(condition, prompts, noisy, timestep).sigmoid()
            clean = self.encode_images(composite(layer, condition))
            latents = self.scheduler.step(clean, timestep, latents).prev_sample
        return self.decode_latents(latents)


# -------------------------------------------------------------------------------------------- load
def load_painter(
    folder: str | Path, device: str = "cpu", taesd: str | None = None, compile: bool = False
) -> TinyPainter | TurboPainter:
    """A trained painter. folder: a run's controlnet/, or a name on the Hugging Face Hub.

    For sd-turbo alone: taesd is a tiny autoencoder (madebyollin/taesd, or a folder) that decodes
    faster; compile prepares the painter for this device, which takes a minute (turbo_speed.py).
    """
    folder = fetch_folder(folder)
    config = read_config(folder)
    if config["size"] in LAYOUTS:
        if taesd or compile:
            print(f"--taesd and --compile are for sd-turbo: {folder} paints without them.")
        parts = load_parts(folder, TinyPainter.saved_parts)
        return TinyPainter(config, **parts).to(device).eval()

    parts = load_parts(config["base"], TurboPainter.base_parts)
    parts |= load_parts(folder, TurboPainter.saved_parts)
    if taesd:
        parts["vae"] = load_part(taesd, AutoencoderTiny)
    painter = TurboPainter(config, **parts).to(device).eval()
    if torch.device(device).type == "cuda":
        painter.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    if compile:
        print(speed_up(painter))
    return painter
