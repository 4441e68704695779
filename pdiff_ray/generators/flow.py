"""Flow matching of latents: a velocity that carries noise to latents on straight paths.

Sources: Lipman et al. 2023 (arXiv 2210.02747), Liu et al. 2023 (rectified flow, arXiv 2209.03003).
Shapes: B latents of Z values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pdiff_ray.generators.diffusion import DenoiserSettings, make_denoiser

TIME_SCALE = 1000  # of a time from 0 to 1, for embeddings that are made for timesteps


class Flow(nn.Module):
    """The velocity of x_t = (1 - t) x_0 + t x_1, from noise x_0 at time 0 to latents x_1 at time 1."""

    def __init__(self, settings: DenoiserSettings, latent_dim: int) -> None:
        super().__init__()
        self.settings, self.latent_dim = settings, latent_dim
        self.denoiser = make_denoiser(settings, latent_dim)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the velocity (B, Z) at x (B, Z) and times (B,) or (1,)."""
        return self.denoiser(x, self.denoiser.embedding(TIME_SCALE * t))

    def loss(self, x_1: Tensor, random: torch.Generator) -> Tensor:
        """Computes the mean squared error of the velocity at random times; x_1 (B, Z). Lipman et al., equation 23,
        with sigma_min 0."""
        t = torch.rand(len(x_1), generator=random, device=x_1.device)
        x_0 = torch.randn(x_1.shape, generator=random, device=x_1.device)
        x_t = torch.lerp(x_0, x_1, t[:, None])
        return functional.mse_loss(self.velocity(x_t, t), x_1 - x_0)
