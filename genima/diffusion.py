"""Noise for diffusion: in training, from a clean picture to a noisy one; to paint, where it starts.

The noise depends on seeds alone. It is drawn on the CPU, so it is the same on every device.
"""

import torch

from genima.views import composite

TIMESTEP = 999  # SD-Turbo's first timestep, and its only one when it paints in one step


def initial_latents(scheduler, shape: tuple, seed: int, device) -> torch.Tensor:
    """Noise (B, C, h, w) that painting starts from; the same for every picture and device."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((1, *shape[1:]), generator=generator)  # on the CPU
    return noise.to(device).expand(shape) * scheduler.init_noise_sigma


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

    def __init__(self, painter):
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
