"""The simple generators that every other must beat: members, averages, noise and Gaussians.

All of them know the zoo's mean and its centred members, so a sample in the members' span is a row of weights.
Shapes: K vectors of D values, n samples.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from pdiff_ray.common.seeds import rng
from pdiff_ray.config import schema
from pdiff_ray.generators.interface import Fitting, Generator, State
from pdiff_ray.networks.subset import Subset

NUM_VIEW_DIMENSIONS = 32


class BaselineSettings(schema.Generator):
    """The section `generator` where a baseline is chosen."""

    def cost(self, values: int, members: int, sampling: schema.Sampling) -> tuple[float, float, float]:
        return 2.0 * members * values, 2.0 * sampling.samples * members * values, 4.0 * members * values


class GaussianSettings(BaselineSettings):
    name: schema.GeneratorName = "gaussian"


class DiagonalSettings(BaselineSettings):
    name: schema.GeneratorName = "gaussian_diagonal"


class PrincipalSettings(BaselineSettings):
    name: schema.GeneratorName = "gaussian_pca"
    rank: int | None = Field(None, ge=1, description="principal components; default: the members' effective rank")


class AverageSettings(BaselineSettings):
    name: schema.GeneratorName = "average"
    count: int = Field(2, ge=1, description="members, drawn for each sample, that are averaged; 1 copies members")


class InterpolationSettings(BaselineSettings):
    name: schema.GeneratorName = "interpolation"


class NoiseSettings(BaselineSettings):
    name: schema.GeneratorName = "noise"
    sigma: float = Field(0.1, ge=0, description="of the noise, in standard deviations of each tensor's values")


class Baseline(Generator):
    """A generator that keeps the members: their mean, and `factor` (K, D), the centred members over sqrt(K - 1)."""

    def __init__(self, settings: Any, subset: Subset) -> None:
        self.settings, self.subset = settings, subset
        self.mean = torch.zeros(subset.size)
        self.factor = torch.zeros(1, subset.size)

    def fit(self, vectors: Tensor, fitting: Fitting) -> None:
        self.mean = vectors.mean(0)
        self.factor = (vectors - self.mean) / self._scale(len(vectors))

    def sample(self, count: int, sampling: schema.Sampling, device: torch.device) -> Tensor:
        self.mean, self.factor = self.mean.to(device), self.factor.to(device)
        return self.draw(count, rng(device, sampling.seed or 0, "samples"))

    @abstractmethod
    def draw(self, count: int, random: torch.Generator) -> Tensor:
        """Draws vectors (n, D) on the device of `mean`."""

    def combined(self, weights: Tensor) -> Tensor:
        """Returns combinations (n, D) of the members by weights (n, K), of which each row's sum is one."""
        return self.mean + weights @ self.factor * self._scale(len(self.factor))

    def normal(self, count: int, values: int, random: torch.Generator) -> Tensor:
        """Draws (n, values) from N(0, 1)."""
        return torch.randn(count, values, generator=random, device=self.mean.device)

    def some(self, count: int, of: int, random: torch.Generator) -> Tensor:
        """Draws the places (n, of) of different members, as far as there are so many."""
        order = torch.rand(count, len(self.factor), generator=random, device=self.mean.device).argsort(1)
        return order[:, :of]

    @staticmethod
    def _scale(members: int) -> float:
        return float(max(1, members - 1) ** 0.5)

    def encode(self, vectors: Tensor) -> Tensor:
        """Projections on the leading principal components."""
        factor = self.factor.to(vectors.device)
        components = torch.linalg.svd(factor, full_matrices=False).Vh[:NUM_VIEW_DIMENSIONS]
        return (vectors - self.mean.to(vectors.device)) @ components.T

    def state(self) -> State:
        return {"mean": self.mean, "factor": self.factor}

    def load_state(self, state: State) -> None:
        self.mean, self.factor = state["mean"], state["factor"]


class Gaussian(Baseline):
    """The Gaussian with the members' mean and full covariance, which has rank K - 1 at most."""

    Settings = GaussianSettings

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        return self.mean + self.normal(count, len(self.factor), random) @ self.factor


class DiagonalGaussian(Baseline):
    """The Gaussian with each value's own mean and variance among the members; arXiv 2506.07998's strongest baseline."""

    Settings = DiagonalSettings

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        return self.mean + self.factor.square().sum(0).sqrt() * self.normal(count, len(self.mean), random)


class PrincipalGaussian(Baseline):
    """The Gaussian of the leading principal components of the members.

    Their number is by default the effective rank (Roy and Vetterli, 2007): the exponential of the entropy of the
    components' shares of the variance.
    """

    Settings = PrincipalSettings

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        # From the K x K matrix of inner products: the D-dimensional components need not be known.
        factor = self.factor.double()
        variances, directions = torch.linalg.eigh(factor @ factor.T)
        variances = variances.flip(0).clamp(min=0)
        shares = variances / variances.sum().clamp(min=torch.finfo(torch.double).tiny)
        rank = self.settings.rank or max(1, round(float(torch.special.entr(shares).sum().exp())))
        kept = directions.flip(1)[:, :rank].float()  # (K, rank)
        return self.mean + self.normal(count, kept.shape[1], random) @ kept.T @ self.factor


class Average(Baseline):
    """The averages of k random members, as model soups are."""

    Settings = AverageSettings

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        chosen = self.some(count, self.settings.count, random)
        weights = torch.zeros(count, len(self.factor), device=self.mean.device)
        return self.combined(weights.scatter(1, chosen, 1 / chosen.shape[1]))


class Interpolation(Baseline):
    """Random points between two random members."""

    Settings = InterpolationSettings

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        chosen = self.some(count, 2, random)
        share = torch.rand(count, 1, generator=random, device=self.mean.device)
        shares = torch.cat([share, 1 - share], 1)[:, -chosen.shape[1] :]
        weights = torch.zeros(count, len(self.factor), device=self.mean.device)
        return self.combined(weights.scatter(1, chosen, shares / shares.sum(1, keepdim=True)))


class Noise(Baseline):
    """Random members with Gaussian noise, scaled by the standard deviation of each tensor's values."""

    Settings = NoiseSettings

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        weights = torch.zeros(count, len(self.factor), device=self.mean.device)
        vectors = self.combined(weights.scatter(1, self.some(count, 1, random), 1.0))
        noise = self.normal(count, len(self.mean), random)
        for entry in self.subset.entries:
            piece = slice(entry.offset, entry.offset + entry.size)
            noise[:, piece] *= self.settings.sigma * vectors[:, piece].std(1, correction=0, keepdim=True)
        return vectors + noise
