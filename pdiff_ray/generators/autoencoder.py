"""The paper's autoencoder of flattened parameters: 1D convolutions, noise on the input and on the latent.

Source: Neural Network Diffusion (arXiv 2402.13144), section 2.2, equations 2 and 3.
Shapes: B vectors of D values, Z latent dimensions.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config.section import Section

MAX_PARAMETERS = 2 * 10**9


class AutoencoderSettings(Section):
    """The section `generator.autoencoder`."""

    channels: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = Field(
        (8, 16, 32, 32), min_length=1, max_length=64, description="of the encoder's layers"
    )
    kernel_size: int = Field(5, ge=3, le=1001, description="odd")
    stride: int = Field(2, ge=1, le=1000, description="of every layer")
    latent_dim: int = Field(32, ge=1, le=1_000_000, description="numbers that a vector is encoded into")
    parameter_noise: float = Field(0.001, ge=0, description="sigma of the noise on the normalized input")
    latent_noise: float = Field(0.1, ge=0, description="sigma of the noise on the latent")
    steps: int = Field(500, ge=1, description="training steps")
    batch_size: int = Field(50, ge=1, description="vectors per step; all of them if there are fewer")
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW, with a cosine schedule")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")

    @model_validator(mode="after")
    def _odd(self) -> AutoencoderSettings:
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}; it must be odd")
        return self


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
                f"generator.autoencoder: {dimension:,} values at stride {stride} need linear layers of {weights:,} "
                "weights; raise generator.autoencoder.stride"
            )
        widths, window = list(pairwise((1, *channels))), (kernel, stride, kernel // 2)
        encoder: list[nn.Module] = []
        for outer, inner in widths:
            encoder += [nn.Conv1d(outer, inner, *window), nn.GELU()]
        decoder: list[nn.Module] = [nn.Unflatten(1, (channels[-1], self.length))]
        for outer, inner in reversed(widths):
            decoder += [nn.GELU(), nn.ConvTranspose1d(inner, outer, *window, output_padding=stride - 1)]
        self.encoder = nn.Sequential(*encoder, nn.Flatten(), nn.Linear(innermost, settings.latent_dim))
        self.decoder = nn.Sequential(nn.Linear(settings.latent_dim, innermost), *decoder)

    def encode(self, vectors: Tensor) -> Tensor:
        """Encodes normalized vectors (B, D) as latents (B, Z)."""
        return self.encoder(functional.pad(vectors, (0, self.padding))[:, None])

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents (B, Z) to normalized vectors (B, D)."""
        return self.decoder(latents)[:, 0, : self.dimension]

    def loss(self, vectors: Tensor, random: torch.Generator) -> Tensor:
        """Computes the mean squared error of vectors (B, D), reconstructed from noised ones through noised latents."""
        noised = vectors + self.settings.parameter_noise * _normal_like(vectors, random)
        latents = self.encode(noised)
        decoded = self.decode(latents + self.settings.latent_noise * _normal_like(latents, random))
        return functional.mse_loss(decoded, vectors)


def _normal_like(tensor: Tensor, random: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=random, device=tensor.device)
