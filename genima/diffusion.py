"""Noise and target latents: what a painter is trained on, and where its painting starts.

Noise depends on seeds alone and is drawn on the CPU: every device and process gets the same.
"""

import torch
from torch import Tensor

from genima.views import composite

VAE_PATCH = 8  # pixels a side of one latent of SD-Turbo's autoencoder
TIMESTEP = 999  # SD-Turbo's first timestep, and its only one when it paints in one step


def initial_latents(scheduler, shape: tuple, seed: int, device) -> Tensor:
    """Noise (B, C, h, w) that painting starts from; the same for every picture and device."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((1, *shape[1:]), generator=generator)
    return noise.to(device).expand(shape) * scheduler.init_noise_sigma


def draw_noise(seeds: list[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Noise like `like` (B, C, h, w), and timesteps (B,), for each sample by its seed."""
    noise = []
    timesteps = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.randn(like.shape[1:], generator=generator))
        timesteps.append(torch.randint(TIMESTEP + 1, (1,), generator=generator))
    noise = torch.stack(noise)
    timesteps = torch.cat(timesteps)
    return noise.to(like.device), timesteps.to(like.device)


def add_noise(scheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """sqrt(a) latents + sqrt(1 - a) noise, where a is alphas_cumprod at the timesteps."""
    a = scheduler.alphas_cumprod.to(latents.device)[timesteps]
    a = a[:, None, None, None]  # (B, 1, 1, 1)
    return a.sqrt() * latents + (1 - a).sqrt() * noise


class LatentCache:
    """Encodes the target pictures for one painter; a picture that has a key, only once."""

    def __init__(self, painter):
        self.painter = painter
        self.latents = {}  # key: (C, h, w), on the CPU

    def encode(self, batch: dict) -> Tensor:
        """The latents (B, C, h, w), float32, of a batch's target pictures."""
        pictures = composite(batch["layer"], batch["observation"])
        keys = batch["keys"]
        if None in keys:  # a random crop has changed them
            return self.painter.encode_images(pictures).float()
        new = [i for i, key in enumerate(keys) if key not in self.latents]
        if new:
            encoded = self.painter.encode_images(pictures[new])
            for i, latents in zip(new, encoded.cpu()):
                self.latents[keys[i]] = latents
        found = [self.latents[key] for key in keys]
        return torch.stack(found).to(pictures.device).float()
