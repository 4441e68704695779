"""The paper's autoencoder of flattened parameters: 1D convolutions, noise on the input and on the latent.

Source: Neural Network Diffusion (arXiv 2402.13144), section 2.2, equations 2 and 3.
Shapes: B vectors of D values, Z latent dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config.schema import Autoencoder as Settings

MAX_PARAMETERS = 2 * 10**9


class Autoencoder(nn.Module):
    """Strided 1D convolutions and a linear layer to the latent, and the same way back.

    The vector is padded with zeros to a multiple of the total stride, so any D will do.

    Raises:
        ConfigError: the linear layers at the latent would be too large; a larger stride makes them smaller.
    """

    def __init__(self, settings: Settings, dimension: int) -> None:
        super().__init__()
        self.settings, self.dimension = settings, dimension
        channels, kernel, stride = settings.channels, settings.kernel_size, settings.stride
        self.length = math.ceil(dimension / stride ** len(channels))  # of the innermost sequence
        self.padding = self.length * stride ** len(channels) - dimension
        inner = channels[-1] * self.length
        if 2 * inner * settings.latent_dim > MAX_PARAMETERS:
            raise ConfigError(
                f"generator.autoencoder: {dimension:,} values at stride {stride} need linear layers of "
                f"{2 * inner * settings.latent_dim:,} weights; raise generator.autoencoder.stride"
            )
        encoder: list[nn.Module] = []
        for width_in, width_out in zip((1, *channels[:-1]), channels, strict=True):
            encoder += [nn.Conv1d(width_in, width_out, kernel, stride, kernel // 2), nn.GELU()]
        decoder: list[nn.Module] = []
        for width_in, width_out in zip(channels[::-1], (*channels[-2::-1], 1), strict=True):
            decoder += [
                nn.GELU(),
                nn.ConvTranspose1d(width_in, width_out, kernel, stride, kernel // 2, output_padding=stride - 1),
            ]
        self.encoder = nn.Sequential(*encoder, nn.Flatten(), nn.Linear(inner, settings.latent_dim))
        self.decoder = nn.Sequential(
            nn.Linear(settings.latent_dim, inner), nn.Unflatten(1, (channels[-1], self.length)), *decoder
        )

    def encode(self, vectors: Tensor) -> Tensor:
        """Normalized vectors (B, D) to latents (B, Z)."""
        return self.encoder(functional.pad(vectors, (0, self.padding))[:, None])

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, Z) to normalized vectors (B, D)."""
        return self.decoder(latents)[:, 0, : self.dimension]

    def loss(self, vectors: Tensor, random: torch.Generator) -> Tensor:
        """Mean squared error of the clean vectors (B, D), reconstructed from noised ones through noised latents."""
        noised = vectors + self.settings.parameter_noise * _normal_like(vectors, random)
        latents = self.encode(noised)
        decoded = self.decode(latents + self.settings.latent_noise * _normal_like(latents, random))
        return functional.mse_loss(decoded, vectors)


def _normal_like(tensor: Tensor, random: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=random, device=tensor.device)
