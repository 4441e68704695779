"""Denoising diffusion of latents (DDPM, Ho et al. 2020): the forward process, the denoisers, and sampling.

Shapes: B latents of Z dimensions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pdiff_ray.config import Diffusion as Settings
from pdiff_ray.config import Sampling
from pdiff_ray.seeds import generator


class TimestepEmbedding(nn.Module):
    """Sinusoidal embedding of t (B,) and a small MLP: (B, width)."""

    frequencies: Tensor  # (width // 2,)

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * torch.arange(half) / half), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * half, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], 1))


class MLPDenoiser(nn.Module):
    """Residual MLP blocks, each shifted by the timestep's embedding: (B, Z) to (B, Z)."""

    def __init__(self, latent_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.embedding = TimestepEmbedding(width)
        self.first = nn.Linear(latent_dim, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, latent_dim))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time, hidden = self.embedding(t), self.first(x)
        for block in self.blocks:
            hidden = hidden + block(hidden + time)
        return self.last(hidden)


class CNNDenoiser(nn.Module):
    """The paper's kind: residual 1D convolutions over the latent's dimensions, (B, Z) to (B, Z).

    A learned code per position tells the convolutions, which are alike everywhere, one dimension from another.
    """

    def __init__(self, latent_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.embedding = TimestepEmbedding(width)
        self.positions = nn.Parameter(torch.randn(1, width, latent_dim) * 0.02)
        self.first = nn.Conv1d(1, width, 7, padding=3)
        groups = math.gcd(8, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(groups, width),
                nn.SiLU(),
                nn.Conv1d(width, width, 7, padding=3),
                nn.SiLU(),
                nn.Conv1d(width, width, 7, padding=3),
            )
            for _ in range(depth)
        )
        self.last = nn.Sequential(nn.GroupNorm(groups, width), nn.SiLU(), nn.Conv1d(width, 1, 7, padding=3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time, hidden = self.embedding(t)[:, :, None], self.first(x[:, None]) + self.positions
        for block in self.blocks:
            hidden = hidden + block(hidden + time)
        return self.last(hidden)[:, 0]


class Diffusion(nn.Module):
    """A denoiser and the noise schedule it is trained for, linear betas."""

    alphas_cumprod: Tensor  # (num_timesteps,)

    def __init__(self, settings: Settings, latent_dim: int) -> None:
        super().__init__()
        self.settings, self.latent_dim = settings, latent_dim
        kind = {"mlp": MLPDenoiser, "cnn": CNNDenoiser}[settings.denoiser]
        self.denoiser = kind(latent_dim, settings.width, settings.depth)
        betas = torch.linspace(settings.beta_start, settings.beta_end, settings.num_timesteps)
        self.register_buffer("alphas_cumprod", (1 - betas).cumprod(0), persistent=False)

    def q_sample(self, x_start: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t (B, Z) given x_0: Ho et al., equation 4."""
        a = self.alphas_cumprod[t][:, None]
        return a.sqrt() * x_start + (1 - a).sqrt() * eps

    def target(self, x_start: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the denoiser should predict: eps, or v = sqrt(a) eps - sqrt(1 - a) x_0 (Salimans and Ho 2022)."""
        if self.settings.prediction == "epsilon":
            return eps
        a = self.alphas_cumprod[t][:, None]
        return a.sqrt() * eps - (1 - a).sqrt() * x_start

    def loss(self, x_start: Tensor, random: torch.Generator) -> Tensor:
        """Mean squared error of the denoiser at random timesteps; x_start (B, Z)."""
        t = torch.randint(self.settings.num_timesteps, (len(x_start),), generator=random, device=x_start.device)
        eps = torch.randn(x_start.shape, generator=random, device=x_start.device)
        return functional.mse_loss(self.denoiser(self.q_sample(x_start, t, eps), t), self.target(x_start, t, eps))

    @torch.inference_mode()
    def sample(self, count: int, sampling: Sampling, device: torch.device) -> Tensor:
        """New latents (count, Z) from noise, all in one batch, determined by `sampling.seed`."""
        random = generator(device, sampling.seed or 0, "samples")
        scheduler = make_scheduler(self.settings, sampling)
        scheduler.set_timesteps(sampling.steps or self.settings.num_timesteps, device=device)
        x = torch.randn(count, self.latent_dim, generator=random, device=device)
        # DPM-Solver++ is deterministic and takes no generator.
        kwargs = {} if sampling.sampler == "dpmsolver++" else {"generator": random}
        for t in scheduler.timesteps:
            prediction = self.denoiser(x, t.expand(count))
            x = scheduler.step(prediction, t, x, **kwargs).prev_sample
        return x


def make_scheduler(settings: Settings, sampling: Sampling) -> Any:
    """The diffusers scheduler of a sampler; latents have no bounds, so nothing is clipped."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    common: dict[str, Any] = {
        "num_train_timesteps": settings.num_timesteps,
        "beta_start": settings.beta_start,
        "beta_end": settings.beta_end,
        "beta_schedule": "linear",
        "prediction_type": {"epsilon": "epsilon", "v": "v_prediction"}[settings.prediction],
        "timestep_spacing": "trailing",  # starts from pure noise whatever the number of steps
    }
    if sampling.sampler == "dpmsolver++":
        return DPMSolverMultistepScheduler(**common)
    kind = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[sampling.sampler]
    return kind(**common, clip_sample=False)
