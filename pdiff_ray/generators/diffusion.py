"""Denoising diffusion of latents (DDPM, Ho et al. 2020): the forward process, the denoisers, and their training.

Shapes: B latents of Z dimensions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.common.registry import Registry
from pdiff_ray.config.schema import Condition
from pdiff_ray.config.section import Known, Section
from pdiff_ray.generators.autoencoder import MAX_PARAMETERS, BatchNorm
from pdiff_ray.generators.conditioning import ConditionedDenoiser
from pdiff_ray.networks.subset import Entry, Subset

TOKEN_VALUES, HEAD_WIDTH, FREQUENCIES = 4, 32, 16  # values of a token per width, width of a head at least
MIN_LOG_ALPHA = -85.0  # logarithm of what the forward process leaves of a latent's variance
KINDS = ("weight", "bias", "running_mean", "running_var")  # by tensors' names; each of one axis, or of more
ONEDNN, ONEDNN_BATCH = torch.backends.mkldnn.is_available(), 16  # for fewer rows MKL takes less time


class DenoiserSettings(Section):
    """A denoiser and its training."""

    section: ClassVar[str] = "generator.diffusion"
    added = frozenset({"condition", "condition_dropout"})

    denoiser: Annotated[str, Known("pdiff_ray.generators.diffusion:DENOISERS")] = Field(
        "mlp",
        description="residual MLP, residual 1D CNN, 1D CNN that widens and narrows, with skips, or transformer over "
        "chunks of each tensor (of generator latent with encoder none)",
    )
    width: int = Field(
        256,
        ge=8,
        le=65_536,
        description="hidden width (mlp; tokens: of 4 x as many values), or channels (cnn; unet: at first)",
    )
    depth: int = Field(3, ge=1, le=1000, description="blocks; unet: widths, each twice the one before")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="0 switches the average of the weights off")
    steps: int = Field(600, ge=1, description="training steps")
    batch_size: int = Field(50, ge=1, description="latents per step; all of them if there are fewer")
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW, with a cosine schedule")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    condition: Condition | None = Field(
        None,
        description="what it is told of each member, and sampling.condition asks for: train_accuracy, train_loss, "
        "validation_accuracy, validation_loss or step; default: nothing",
    )
    condition_dropout: float = Field(
        0.1, ge=0, lt=1, description="probability with which it is not told, as sampling.guidance needs"
    )


class DiffusionSettings(DenoiserSettings):
    """What a diffusion model is made of."""

    prediction: Literal["v", "epsilon"] = Field("v", description="what the denoiser is trained to predict")
    num_timesteps: int = Field(1000, ge=2, le=100_000, description="of the forward process")
    beta_start: float = Field(1e-4, gt=0, lt=1, description="first of the linear betas")
    beta_end: float = Field(2e-2, gt=0, lt=1, description="last of the linear betas")

    @model_validator(mode="after")
    def _something_is_left(self) -> DiffusionSettings:
        betas = torch.linspace(self.beta_start, self.beta_end, self.num_timesteps, dtype=torch.double)
        if (left := float((-betas).log1p().sum())) < MIN_LOG_ALPHA:
            raise ValueError(
                f"num_timesteps {self.num_timesteps} with betas from {self.beta_start:g} to {self.beta_end:g} leaves "
                f"e^{left:.0f} of a latent's variance, which float32 cannot hold; lower the betas by a factor of "
                f"{math.ceil(10 * left / MIN_LOG_ALPHA) / 10:.1f} or more"
            )
        return self


class TimestepEmbedding(nn.Module):
    """Sinusoidal embedding of t (B,) and a small MLP: (B, width)."""

    frequencies: Tensor  # (width // 2,), unless another number is given

    def __init__(self, width: int, num_frequencies: int | None = None) -> None:
        super().__init__()
        half = num_frequencies or width // 2
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
        conv = functools.partial(nn.Conv1d, kernel_size=7, padding=3)
        norm = functools.partial(nn.GroupNorm, math.gcd(8, width), width)
        self.first = conv(1, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(norm(), nn.SiLU(), conv(width, width), nn.SiLU(), conv(width, width)) for _ in range(depth)
        )
        self.last = nn.Sequential(norm(), nn.SiLU(), conv(width, 1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        time, hidden = time[:, :, None], self.first(x[:, None]) + self.positions
        for block in self.blocks:
            hidden = hidden + block(hidden + time)
        return self.last(hidden)[:, 0]


class UNetDenoiser(nn.Module):
    """The released code's kind: 1D convolutions that double their channels `depth` times and halve them again.

    None strides. What widens is added to what narrows where both have as many channels, and the timestep's embedding, a
    number per dimension of the latent, to the input of every convolution. Called as `MLPDenoiser` is.

    Raises:
        ConfigError: it would be too large.
    """

    def __init__(self, latent_dim: int, width: int, depth: int) -> None:
        super().__init__()
        channels = [1, *(width * 2**i for i in range(depth))]
        if 14 * sum(a * b for a, b in pairwise(channels)) > MAX_PARAMETERS:
            raise ConfigError(
                f"a unet of width {width} and depth {depth} has more than {MAX_PARAMETERS:,} weights; lower "
                "generator.diffusion.depth, or generator.process.depth"
            )
        self.embedding = TimestepEmbedding(latent_dim, num_frequencies=128)
        self.down = nn.ModuleList(self._layer(outer, inner) for outer, inner in pairwise(channels))
        up = [self._layer(inner, outer) for outer, inner in pairwise(channels)]
        self.up = nn.ModuleList([*reversed(up[1:]), up[0][0]])  # the last is a convolution alone

    @staticmethod
    def _layer(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv1d(inputs, outputs, 7, padding=3), BatchNorm(outputs), nn.ELU())

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        time, hidden = time[:, None], x[:, None]
        widened = []
        for layer in self.down:
            hidden = layer(hidden + time)
            widened.append(hidden)
        for layer in self.up:
            wide = widened.pop()
            hidden = layer((hidden if wide is hidden else hidden + wide) + time)
        return hidden[:, 0]


class TokenDenoiser(nn.Module):
    """A transformer over tokens, chunks of each tensor of the vector that a latent is; called as `MLPDenoiser` is.

    A token knows where it is by sinusoids of its layer and of its place in the tensor, and by the tensor's kind, as in
    Wang et al. (2025, RPG, arXiv 2501.11587). What a multiple of x, by time, predicts is added: no token needs to carry
    the noise of more values than it is wide.
    """

    index: Tensor  # (N * C,) of a latent's values in the N tokens, Z for what fills the last token of a tensor
    slots: Tensor  # (Z,) of the values in the tokens
    places: Tensor  # (N, what is known of a place)

    def __init__(self, latent_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.embedding = TimestepEmbedding(width)
        self.latent_dim, self.chunk = latent_dim, TOKEN_VALUES * width
        self.arrange(Subset((Entry("latent", (latent_dim,), 0, "parameter"),)))
        self.place = nn.Sequential(nn.Linear(self.places.shape[1], width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Linear(self.chunk, width)
        heads = math.gcd(width, max(1, width // HEAD_WIDTH))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, functional.gelu, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, self.chunk))
        self.scale = nn.Sequential(nn.SiLU(), nn.Linear(width, 1))

    def arrange(self, subset: Subset) -> None:
        """Cuts latents that are vectors of a subset into tokens of its tensors; until then a latent is one tensor."""
        layers, index, slots, places = subset.layers, list[Tensor](), list[Tensor](), list[Tensor]()
        for entry in subset.entries:
            count = -(-entry.size // self.chunk)
            values, fill = torch.arange(entry.size), count * self.chunk - entry.size
            slots.append(values + sum(map(len, index)))
            index.append(functional.pad(values + entry.offset, (0, fill), value=self.latent_dim))
            layer, _, name = entry.name.rpartition(".")
            kind = KINDS.index(name) if name in KINDS else len(KINDS)
            known = [kind + len(KINDS) + 1 if len(entry.shape) > 1 else kind] * count
            kinds = functional.one_hot(torch.tensor(known), 2 * len(KINDS) + 2)
            at = [_sinusoids(torch.full((count,), layers.index(layer))), _sinusoids(torch.arange(count))]
            places.append(torch.cat([*at, kinds], 1))
        self.register_buffer("index", torch.cat(index), persistent=False)
        self.register_buffer("slots", torch.cat(slots), persistent=False)
        self.register_buffer("places", torch.cat(places), persistent=False)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        tokens = functional.pad(x, (0, 1))[:, self.index].unflatten(1, (-1, self.chunk))
        hidden = self.first(tokens) + self.place(self.places)
        for layer in self.layers:
            hidden = layer(hidden + time[:, None])
        return self.last(hidden).flatten(1)[:, self.slots] + self.scale(time) * x


def _sinusoids(positions: Tensor) -> Tensor:
    """Returns sines and cosines of positions (n,), at wavelengths from a few positions to thousands."""
    angles = positions[:, None] * torch.logspace(0, -4, FREQUENCIES)
    return torch.cat([angles.sin(), angles.cos()], 1)


# Classes or functions of the latent's dimension, a width and a depth. A denoiser has an `embedding` of timesteps (B,).
# One with a method `arrange` is told the subset where latents are vectors.
DENOISERS: Registry[Callable[[int, int, int], Any]] = Registry(
    "denoiser", {"mlp": MLPDenoiser, "cnn": CNNDenoiser, "unet": UNetDenoiser, "tokens": TokenDenoiser}
)


def make_denoiser(settings: DenoiserSettings, latent_dim: int) -> Any:
    """Makes a denoiser by its settings, which may be told a condition if these name one."""
    denoiser = DENOISERS[settings.denoiser](latent_dim, settings.width, settings.depth)
    return ConditionedDenoiser(denoiser) if settings.condition else denoiser


class Diffusion(nn.Module):
    """A denoiser and the noise schedule it is trained for, linear betas."""

    alphas_cumprod: Tensor  # (num_timesteps,)

    def __init__(self, settings: DiffusionSettings, latent_dim: int) -> None:
        super().__init__()
        self.settings, self.latent_dim = settings, latent_dim
        self.prediction, self.num_timesteps = settings.prediction, settings.num_timesteps
        self.denoiser = make_denoiser(settings, latent_dim)
        betas = torch.linspace(settings.beta_start, settings.beta_end, settings.num_timesteps)
        self.register_buffer("alphas_cumprod", (1 - betas).cumprod(0), persistent=False)

    def q_sample(self, x_start: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Returns x_t (B, Z) given x_0: Ho et al., equation 4."""
        a = self.alphas_cumprod[t][:, None]
        return a.sqrt() * x_start + (1 - a).sqrt() * eps

    def target(self, x_start: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Returns what should be predicted: eps, or v = sqrt(a) eps - sqrt(1 - a) x_0 (Salimans and Ho 2022)."""
        if self.prediction == "epsilon":
            return eps
        a = self.alphas_cumprod[t][:, None]
        return a.sqrt() * eps - (1 - a).sqrt() * x_start

    def loss(self, x_start: Tensor, random: torch.Generator) -> Tensor:
        """Computes the mean squared error of the denoiser at random timesteps; x_start (B, Z)."""
        t = torch.randint(self.num_timesteps, (len(x_start),), generator=random, device=x_start.device)
        eps = torch.randn(x_start.shape, generator=random, device=x_start.device)
        prediction = self.denoiser(self.q_sample(x_start, t, eps), self.denoiser.embedding(t))
        return functional.mse_loss(prediction, self.target(x_start, t, eps))

    def predict(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Returns x_0 and eps (B, Z) as the denoiser sees them in x_t (B, Z)."""
        prediction = self.denoiser(x, self.denoiser.embedding(torch.tensor([t], device=x.device)))
        a = self.alphas_cumprod[t]
        if self.prediction == "epsilon":
            return (x - (1 - a).sqrt() * prediction) / a.sqrt(), prediction
        return a.sqrt() * x - (1 - a).sqrt() * prediction, (1 - a).sqrt() * x + a.sqrt() * prediction
