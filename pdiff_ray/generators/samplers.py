"""Samplers: how noise becomes latents with the denoiser of a diffusion model, or with the velocity of a flow.

A sampler is a function of the model, of the timesteps or times to stop at, of noise, and of what draws more of it.
Shapes: B latents of Z dimensions, num_steps timesteps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdiff_ray.common.registry import Registry
from pdiff_ray.common.seeds import rng
from pdiff_ray.config.schema import Sampling
from pdiff_ray.generators.diffusion import Diffusion
from pdiff_ray.generators.flow import Flow
from pdiff_ray.generators.graphs import capture

Draw = Callable[[], Tensor]
FLOW_STEPS = 50


@torch.inference_mode()
def sample(model: Diffusion | Flow, count: int, sampling: Sampling, device: torch.device) -> Tensor:
    """Draws latents (count, Z) from noise, all in one batch, determined by `sampling.seed`."""
    random = rng(device, sampling.seed or 0, "samples")
    x = torch.randn(count, model.latent_dim, generator=random, device=device)
    return denoise(model, x, sampling, lambda: torch.randn(x.shape, generator=random, device=device))


@torch.inference_mode()
def denoise(model: Diffusion | Flow, x: Tensor, sampling: Sampling, draw: Draw) -> Tensor:
    """Turns noise x (B, Z) into latents (B, Z); `draw` gives more noise (B, Z), for samplers that add some."""
    if isinstance(model, Flow):
        times = torch.linspace(0, 1, (sampling.steps or FLOW_STEPS) + 1)
        return SAMPLERS[sampling.sampler or FLOW_SAMPLERS[0]](model, times, x, draw)
    timesteps = spaced_timesteps(model.num_timesteps, sampling.steps or model.num_timesteps)
    return SAMPLERS[sampling.sampler or DIFFUSION_SAMPLERS[0]](model, timesteps, x, draw)


def spaced_timesteps(num_timesteps: int, num_steps: int) -> Tensor:
    """Returns falling timesteps (num_steps,), int64, on the CPU, evenly spaced from the last one, which is pure noise.

    This is the "trailing" spacing of Lin et al. 2023 (arXiv 2305.08891), table 2.
    """
    # Rounding may let one more value through at the end of the range.
    steps = np.arange(num_timesteps, 0, -num_timesteps / num_steps)[:num_steps]
    return torch.from_numpy(np.round(steps).astype(np.int64) - 1)


def ddpm(model: Diffusion, timesteps: Tensor, x: Tensor, draw: Draw) -> Tensor:
    """Follows the reverse process with the posterior's variance (Ho et al. 2020, equation 7)."""
    following = torch.cat([timesteps[1:], timesteps.new_tensor([-1])])
    a, a_next, x_start, _ = _factors(model, timesteps, following)
    alpha = a / a_next
    mean = a_next.sqrt() * (1 - alpha) / (1 - a) * x_start
    mean[0] += alpha.sqrt() * (1 - a_next) / (1 - a)
    noise = ((1 - a_next) / (1 - a) * (1 - alpha)).sqrt()
    return _follow(model, timesteps, x, torch.cat([mean, noise[None]]).T, draw)


def ddim(model: Diffusion, timesteps: Tensor, x: Tensor, draw: Draw) -> Tensor:
    """Follows the deterministic process with the same marginals, eta 0 (Song et al. 2020, equation 12)."""
    following = torch.cat([timesteps[1:], timesteps.new_tensor([-1])])
    _, a_next, x_start, eps = _factors(model, timesteps, following)
    mean = a_next.sqrt() * x_start + (1 - a_next).sqrt() * eps
    return _follow(model, timesteps, x, torch.cat([mean, torch.zeros_like(mean[:1])]).T, draw)


def dpmsolver(model: Diffusion, timesteps: Tensor, x: Tensor, draw: Draw) -> Tensor:
    """Solves the probability flow with DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    Its first and last steps are of first order.
    """
    a = model.alphas_cumprod.cpu()
    ratios = torch.cat([(((1 - a) / a) ** 0.5)[timesteps], torch.zeros(1)])  # of sigma to alpha; no noise at the end
    alphas = [1 / (ratio**2 + 1) ** 0.5 for ratio in ratios]
    sigmas = [ratio * alpha for ratio, alpha in zip(ratios, alphas, strict=True)]
    lambdas = [alpha.log() - sigma.log() for alpha, sigma in zip(alphas, sigmas, strict=True)]
    times = model.denoiser.embedding(timesteps.to(x.device))
    previous = x
    for i, time in enumerate(times.split(1)):
        prediction = model.denoiser(x, time)
        if model.prediction == "v":
            x_start = alphas[i] * x - sigmas[i] * prediction
        else:
            x_start = (x - sigmas[i] * prediction) / alphas[i]
        h = lambdas[i + 1] - lambdas[i]
        factor = alphas[i + 1] * ((-h).exp() - 1)
        x = sigmas[i + 1] / sigmas[i] * x - factor * x_start
        if 0 < i < len(timesteps) - 1:
            r = (lambdas[i] - lambdas[i - 1]) / h
            x = x - 0.5 * factor * (1 / r * (x_start - previous))
        previous = x_start
    return x


def euler(model: Flow, times: Tensor, x: Tensor, draw: Draw) -> Tensor:
    """Follows the velocity at the start of each step; times (num_steps + 1,) rise from 0 to 1."""
    for t, h in _steps(times, x):
        x = x + h * model.velocity(x, t)
    return x


def midpoint(model: Flow, times: Tensor, x: Tensor, draw: Draw) -> Tensor:
    """Follows the velocity in the middle of each step, which Euler's method finds."""
    for t, h in _steps(times, x):
        x = x + h * model.velocity(x + h / 2 * model.velocity(x, t), t + h / 2)
    return x


def rk4(model: Flow, times: Tensor, x: Tensor, draw: Draw) -> Tensor:
    """Takes the classical Runge-Kutta method's steps, of fourth order, with four velocities each."""
    for t, h in _steps(times, x):
        first = model.velocity(x, t)
        second = model.velocity(x + h / 2 * first, t + h / 2)
        third = model.velocity(x + h / 2 * second, t + h / 2)
        fourth = model.velocity(x + h * third, t + h)
        x = x + h / 6 * (first + 2 * second + 2 * third + fourth)
    return x


def _steps(times: Tensor, x: Tensor) -> Iterator[tuple[Tensor, float]]:
    """Yields the time (1,) at which each step begins, and how long it is."""
    return zip(times[:-1].to(x.device).split(1), times.diff().tolist(), strict=True)


SAMPLERS: Registry[Callable[[Any, Tensor, Tensor, Draw], Tensor]] = Registry(
    "sampler",
    {"ddpm": ddpm, "ddim": ddim, "dpmsolver++": dpmsolver, "midpoint": midpoint, "euler": euler, "rk4": rk4},
)
# The first of each is what its models are sampled with unless another one is asked for.
DIFFUSION_SAMPLERS, FLOW_SAMPLERS = ("ddpm", "ddim", "dpmsolver++"), ("midpoint", "euler", "rk4")


def _factors(model: Diffusion, timesteps: Tensor, following: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns, in float64 on the CPU, alphas_cumprod of the timesteps and of those that follow them (num_steps,), and
    the factors of x_t and the prediction in x_0 and in eps (2, num_steps)."""
    alphas_cumprod = model.alphas_cumprod.cpu().double()
    a = alphas_cumprod[timesteps]
    a_next = torch.where(following >= 0, alphas_cumprod[following.clamp(min=0)], 1.0)
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    if model.prediction == "epsilon":
        return a, a_next, torch.stack([one, -(1 - a).sqrt()]) / a.sqrt(), torch.stack([zero, one])
    return a, a_next, torch.stack([a.sqrt(), -(1 - a).sqrt()]), torch.stack([(1 - a).sqrt(), a.sqrt()])


def _follow(model: Diffusion, timesteps: Tensor, x: Tensor, factors: Tensor, draw: Draw) -> Tensor:
    """Takes steps that are sums of x_t, the prediction and fresh noise, with these factors (num_steps, 3).

    To compute the factors from the schedule at each step would take longer than a small denoiser.
    """
    times = model.denoiser.embedding(timesteps.to(x.device))
    if x.device.type == "cuda":
        step = GraphStep(model.denoiser, x, times, factors)
        try:
            graph, _ = capture(step)
        except RuntimeError as error:
            warnings.warn(f"sampling without a CUDA graph, which is slower: {error}", stacklevel=2)
        else:
            step.restart(x)
            for of_noise in factors[:, 2].tolist():
                if of_noise:
                    step.noise.copy_(draw())
                graph.replay()
            return step.x
    for time, (of_x, of_prediction, of_noise) in zip(times.split(1), factors.tolist(), strict=True):
        x = torch.add(x * of_x, model.denoiser(x, time), alpha=of_prediction)
        if of_noise:
            x.add_(draw(), alpha=of_noise)
    return x


class GraphStep:
    """A step of `_follow` that works on the same memory each time, and finds by itself which one it is.

    Args:
        x: noise (B, Z) to start from.
        times: embeddings (num_steps, width).
        factors: of x_t, the prediction and fresh noise (num_steps, 3).
    """

    def __init__(self, denoiser: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Tensor, factors: Tensor) -> None:
        self.denoiser, self.times, self.factors = denoiser, times, factors.to(x)
        self.x, self.noise = x.clone(), torch.zeros_like(x)
        self.index = torch.zeros(1, dtype=torch.long, device=x.device)

    def __call__(self) -> None:
        of_x, of_prediction, of_noise = self.factors[self.index].split(1, 1)  # (1, 1) each
        prediction = self.denoiser(self.x, self.times[self.index])
        self.x.copy_(of_x * self.x + of_prediction * prediction + of_noise * self.noise)
        self.index.add_(1)

    def restart(self, x: Tensor) -> None:
        self.x.copy_(x)
        self.index.zero_()
