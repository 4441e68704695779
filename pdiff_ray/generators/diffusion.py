"""Denoising diffusion of latents (DDPM, Ho et al. 2020): the forward process, the denoisers, and sampling.

Shapes: B latents of Z dimensions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pdiff_ray.common.seeds import generator
from pdiff_ray.config.schema import Diffusion as Settings
from pdiff_ray.config.schema import Sampling
from pdiff_ray.generators.graphs import capture

ONEDNN, ONEDNN_BATCH = torch.backends.mkldnn.is_available(), 16  # for fewer rows MKL takes less time


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


class Linear(nn.Linear):
    """A linear layer that oneDNN computes for batches on CPUs, outside of training.

    PyTorch's own choice there is MKL, which takes about twice as long on processors that are not Intel's.
    """

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < ONEDNN_BATCH or torch.is_grad_enabled() or x.device.type != "cpu" or not ONEDNN:
            return super().forward(x)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


class MLPDenoiser(nn.Module):
    """Residual MLP blocks, each shifted by the timestep's embedding.

    `forward` takes x (B, Z) and `embedding(t)`, (B, width) or (1, width), and returns (B, Z).
    """

    def __init__(self, latent_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.embedding = TimestepEmbedding(width)
        self.first = Linear(latent_dim, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), Linear(width, width), nn.SiLU(), Linear(width, width))
            for _ in range(depth)
        )
        self.last = nn.Sequential(nn.LayerNorm(width), Linear(width, latent_dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.first(x)
        for block in self.blocks:
            hidden = hidden + block(hidden + time)
        return self.last(hidden)


class CNNDenoiser(nn.Module):
    """The paper's kind: residual 1D convolutions over the latent's dimensions; called as `MLPDenoiser` is.

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

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        time, hidden = time[:, :, None], self.first(x[:, None]) + self.positions
        for block in self.blocks:
            hidden = hidden + block(hidden + time)
        return self.last(hidden)[:, 0]


class Diffusion(nn.Module):
    """A denoiser and the noise schedule it is trained for, linear betas."""

    alphas_cumprod: Tensor  # (num_timesteps,)

    def __init__(self, settings: Settings, latent_dim: int) -> None:
        super().__init__()
        self.settings, self.latent_dim = settings, latent_dim
        kind = MLPDenoiser if settings.denoiser == "mlp" else CNNDenoiser
        self.denoiser: MLPDenoiser | CNNDenoiser = kind(latent_dim, settings.width, settings.depth)
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
        prediction = self.denoiser(self.q_sample(x_start, t, eps), self.denoiser.embedding(t))
        return functional.mse_loss(prediction, self.target(x_start, t, eps))

    @torch.inference_mode()
    def sample(self, count: int, sampling: Sampling, device: torch.device) -> Tensor:
        """New latents (count, Z) from noise, all in one batch, determined by `sampling.seed`."""
        random = generator(device, sampling.seed or 0, "samples")
        x = torch.randn(count, self.latent_dim, generator=random, device=device)
        draw = lambda: torch.randn(x.shape, generator=random, device=device)  # noqa: E731
        return self.denoise(x, sampling, draw)

    @torch.inference_mode()
    def denoise(self, x: Tensor, sampling: Sampling, draw: Callable[[], Tensor]) -> Tensor:
        """Noise x (B, Z) to latents (B, Z); `draw` gives the noise (B, Z) that a step of DDPM adds."""
        scheduler = make_scheduler(self.settings, sampling)
        scheduler.set_timesteps(sampling.steps or self.settings.num_timesteps)
        times = self.denoiser.embedding(scheduler.timesteps.to(x.device))
        if sampling.sampler == "dpmsolver++":  # looks back at earlier steps
            for t, time in zip(scheduler.timesteps, times.split(1), strict=True):
                x = scheduler.step(self.denoiser(x, time), t, x).prev_sample
            return x
        steps = linear_steps(scheduler)
        if x.device.type == "cuda":
            step = GraphStep(self.denoiser, x, times, steps)
            try:
                graph, _ = capture(step)
            except RuntimeError as error:
                warnings.warn(f"sampling without a CUDA graph, which is slower: {error}", stacklevel=2)
            else:
                step.restart(x)
                for of_noise in steps[:, 2].tolist():
                    if of_noise:
                        step.noise.copy_(draw())
                    graph.replay()
                return step.x
        for time, (of_x, of_prediction, of_noise) in zip(times.split(1), steps.tolist(), strict=True):
            x = torch.add(x * of_x, self.denoiser(x, time), alpha=of_prediction)
            if of_noise:
                x.add_(draw(), alpha=of_noise)
        return x


class GraphStep:
    """A sampling step that works on the same memory each time, and finds by itself which one it is.

    Args:
        x: noise (B, Z) to start from.
        times: embeddings (steps, width).
        steps: of `linear_steps`.
    """

    def __init__(self, denoiser: nn.Module, x: Tensor, times: Tensor, steps: Tensor) -> None:
        self.denoiser, self.times, self.steps = denoiser, times, steps.to(x)
        self.x, self.noise = x.clone(), torch.zeros_like(x)
        self.index = torch.zeros(1, dtype=torch.long, device=x.device)

    def __call__(self) -> None:
        of_x, of_prediction, of_noise = self.steps[self.index].split(1, 1)  # (1, 1) each
        prediction = self.denoiser(self.x, self.times[self.index])
        self.x.copy_(of_x * self.x + of_prediction * prediction + of_noise * self.noise)
        self.index.add_(1)

    def restart(self, x: Tensor) -> None:
        self.x.copy_(x)
        self.index.zero_()


def linear_steps(scheduler: Any) -> Tensor:
    """The steps of DDPM or DDIM (eta 0) as what they are: sums of x_t, the prediction and fresh noise.

    Ho et al. 2020, equation 7, and Song et al. 2020, equation 12, with the prediction's x_0 and eps put in. diffusers
    computes the same from the schedule at each step, which takes longer than a small denoiser.

    Args:
        scheduler: of `make_scheduler`, its timesteps set.

    Returns:
        Factors of the three (steps, 3), float64, on the CPU.
    """
    ddpm, t = "DDPM" in type(scheduler).__name__, scheduler.timesteps
    following = torch.cat([t[1:], t.new_tensor([-1])])
    if not ddpm:
        following = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alphas_cumprod = scheduler.alphas_cumprod.double()
    a = alphas_cumprod[t]
    a_next = torch.where(following >= 0, alphas_cumprod[following.clamp(min=0)], 1.0)
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    # Factors of x_t and the prediction.
    if scheduler.config.prediction_type == "epsilon":
        x_start, eps = torch.stack([one, -(1 - a).sqrt()]) / a.sqrt(), torch.stack([zero, one])
    else:
        x_start, eps = torch.stack([a.sqrt(), -(1 - a).sqrt()]), torch.stack([(1 - a).sqrt(), a.sqrt()])
    if not ddpm:
        return torch.cat([a_next.sqrt() * x_start + (1 - a_next).sqrt() * eps, zero[None]]).T
    alpha = a / a_next
    mean = a_next.sqrt() * (1 - alpha) / (1 - a) * x_start
    mean[0] += alpha.sqrt() * (1 - a_next) / (1 - a)
    return torch.cat([mean, ((1 - a_next) / (1 - a) * (1 - alpha)).sqrt()[None]]).T


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
