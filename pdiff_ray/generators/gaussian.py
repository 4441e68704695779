"""A Gaussian with the zoo's mean and full covariance: the simple generator that every other must beat.

Shapes: K vectors of D values; the covariance has rank K - 1 at most, so it is kept as its factor (K, D).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdiff_ray.common.seeds import rng
from pdiff_ray.config import schema
from pdiff_ray.generators.interface import Fitting, Generator, State
from pdiff_ray.networks.subset import Subset

NUM_VIEW_DIMENSIONS = 32


class GaussianSettings(schema.Generator):
    """The section `generator` where its name is gaussian."""

    name: schema.GeneratorName = "gaussian"

    def cost(self, values: int, members: int, sampling: schema.Sampling) -> tuple[float, float, float]:
        return 2.0 * members * values, 2.0 * sampling.samples * members * values, 4.0 * members * values


class Gaussian(Generator):
    """A Gaussian, whose samples are mean + z @ factor with z ~ N(0, I) of K dimensions."""

    Settings = GaussianSettings

    def __init__(self, settings: GaussianSettings, subset: Subset) -> None:
        self.mean = torch.zeros(subset.size)
        self.factor = torch.zeros(1, subset.size)

    def fit(self, vectors: Tensor, fitting: Fitting) -> None:
        self.mean = vectors.mean(0)
        self.factor = (vectors - self.mean) / max(1, len(vectors) - 1) ** 0.5

    def sample(self, count: int, sampling: schema.Sampling, device: torch.device) -> Tensor:
        random = rng(device, sampling.seed or 0, "samples")
        z = torch.randn(count, len(self.factor), generator=random, device=device)
        return self.mean.to(device) + z @ self.factor.to(device)

    def encode(self, vectors: Tensor) -> Tensor:
        """Projections on the leading principal components."""
        factor = self.factor.to(vectors.device)
        components = torch.linalg.svd(factor, full_matrices=False).Vh[:NUM_VIEW_DIMENSIONS]
        return (vectors - self.mean.to(vectors.device)) @ components.T

    def state(self) -> State:
        return {"mean": self.mean, "factor": self.factor}

    def load_state(self, state: State) -> None:
        self.mean, self.factor = state["mean"], state["factor"]
