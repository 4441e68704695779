"""The paper's autoencoder of flattened parameters: 1D convolutions, noise on the input and on the latent.

Source: Neural Network Diffusion (arXiv 2402.13144), section 2.2, equations 2 and 3.
Shapes: B vectors of D values, Z latent dimensions.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config.section import Section

MAX_PARAMETERS = 2 * 10**9


class AutoencoderSettings(Section):
    """The section `generator.autoencoder`."""

    added = frozenset({"batchnorm", "target", "kl_weight"})
    section: ClassVar[str] = "generator.autoencoder"

    channels: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = Field(
        (8, 16, 32, 32), min_length=1, max_length=64, description="of the encoder's layers"
    )
    kernel_size: int = Field(5, ge=3, le=1001, description="odd")
    stride: int = Field(2, ge=1, le=1000, description="of every layer")
    latent_dim: int = Field(32, ge=1, le=1_000_000, description="numbers that a vector is encoded into")
    parameter_noise: float = Field(0.001, ge=0, description="sigma of the noise on the normalized input")
    latent_noise: float | None = Field(
        0.1, ge=0, description="sigma of the noise on the latent; null: the one that a variational encoder gives"
    )
    batchnorm: bool = Field(
        False, description="BatchNorm behind every convolution but the last, then leaky ReLU or ELU in place of GELU"
    )
    target: Literal["clean", "noised"] = Field("clean", description="input that is to be reconstructed")
    kl_weight: float | None = Field(
        None, ge=0, description="weight of the KL divergence from N(0, 1); given, the encoder is a variational one"
    )
    steps: int = Field(500, ge=1, description="training steps")
    batch_size: int = Field(50, ge=1, description="vectors per step; all of them if there are fewer")
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW, with a cosine schedule")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")

    @model_validator(mode="after")
    def _possible(self) -> AutoencoderSettings:
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}; it must be odd")
        if self.latent_noise is None and self.kl_weight is None:
            raise ValueError("latent_noise is null, but the encoder is not variational; set it, or kl_weight")
        return self


class BatchNorm(nn.BatchNorm1d):
    """Batch normalization that takes its running statistics where a channel has one value: it has none of its own."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == self.num_features:
            mean, variance = self.running_mean, self.running_var
            return functional.batch_norm(x, mean, variance, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class Autoencoder(nn.Module):
    """Strided 1D convolutions and a linear layer to the latent, and the same way back.

    The vector is padded with zeros to a multiple of the total stride, so any D will do.

    Raises:
        ConfigError: the linear layers at the latent would be too large; a larger stride makes them smaller.
    """

    def __init__(self, settings: AutoencoderSettings, dimension: int) -> None:
        super().__init__()
        self.settings, self.dimension = settings, dimension
        channels, kernel, stride = settings.channels, settings.kernel_size, settings.stride
        self.length = math.ceil(dimension / stride ** len(channels))  # of the innermost sequence
        self.padding = self.length * stride ** len(channels) - dimension
        innermost = channels[-1] * self.length
        if (weights := 2 * innermost * settings.latent_dim) > MAX_PARAMETERS:
            raise ConfigError(
                f"{settings.section}: {dimension:,} values at stride {stride} need linear layers of {weights:,} "
                f"weights; raise {settings.section}.stride"
            )
        widths, window = list(pairwise((1, *channels))), (kernel, stride, kernel // 2)
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = [nn.Unflatten(1, (channels[-1], self.length))]
        if settings.batchnorm:
            for outer, inner in widths:
                encoder += [nn.Conv1d(outer, inner, *window), BatchNorm(inner), nn.LeakyReLU()]
            for outer, inner in reversed([(channels[0], channels[0]), *widths[1:]]):
                transposed = nn.ConvTranspose1d(inner, outer, *window, output_padding=stride - 1)
                decoder += [transposed, BatchNorm(outer), nn.ELU()]
            decoder.append(nn.Conv1d(channels[0], 1, kernel, padding=kernel // 2))
        else:
            for outer, inner in widths:
                encoder += [nn.Conv1d(outer, inner, *window), nn.GELU()]
            for outer, inner in reversed(widths):
                decoder += [nn.GELU(), nn.ConvTranspose1d(inner, outer, *window, output_padding=stride - 1)]
        latent_dim = settings.latent_dim
        self.encoder = nn.Sequential(*encoder, nn.Flatten(), nn.Linear(innermost, latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, innermost), *decoder)
        self.moments = None if settings.kl_weight is None else nn.Linear(latent_dim, 2 * latent_dim)

    def encode(self, vectors: Tensor) -> Tensor:
        """Encodes normalized vectors (B, D) as latents (B, Z); a variational encoder gives their means."""
        return self._moments(vectors)[0]

    def _moments(self, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns means and logarithms of the variances (B, Z) of the latents; None: the encoder gives no variances."""
        hidden = self.encoder(functional.pad(vectors, (0, self.padding))[:, None])
        if self.moments is None:
            return hidden, None
        mean, log_variance = self.moments(hidden).chunk(2, 1)
        return mean, log_variance

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents (B, Z) to normalized vectors (B, D)."""
        return self.decoder(latents)[:, 0, : self.dimension]

    def loss(self, vectors: Tensor, random: torch.Generator) -> Tensor:
        """Computes the mean squared error of vectors (B, D), reconstructed from noised ones through noised latents.

        A variational encoder adds the divergence of its latents from N(0, I), summed over Z: Kingma and Welling (2014),
        appendix B.
        """
        settings = self.settings
        noised = vectors + settings.parameter_noise * _normal_like(vectors, random)
        latents, log_variance = self._moments(noised)
        sigma: float | Tensor
        if settings.latent_noise is None and log_variance is not None:
            sigma = (log_variance / 2).exp()
        else:
            sigma = settings.latent_noise or 0.0
        decoded = self.decode(latents + sigma * _normal_like(latents, random))
        loss = functional.mse_loss(decoded, noised if settings.target == "noised" else vectors)
        if log_variance is None or settings.kl_weight is None:
            return loss
        divergence = (latents.square() + log_variance.exp() - log_variance - 1).sum(1).mean() / 2
        return loss + settings.kl_weight * divergence


def _normal_like(tensor: Tensor, random: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=random, device=tensor.device)
