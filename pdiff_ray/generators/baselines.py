"""The simple generators that every other must beat: members, averages, noise and Gaussians.

All of them draw from the members themselves, so that a sample in the members' span is a row of weights.
Shapes: K vectors of D values, n samples.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pdiff_ray.common.seeds import rng
from pdiff_ray.config import schema
from pdiff_ray.generators.interface import Fitting, Generator, State
from pdiff_ray.generators.subspace import Combinations, Subspace, centred
from pdiff_ray.networks.subset import Subset
from pdiff_ray.storage.matrix import HeldVectors, Vectors, is_held, rows_at_a_time
from pdiff_ray.storage.parameters import BLOCK

NUM_VIEW_DIMENSIONS = 32


class BaselineSettings(schema.Generator):
    """The section `generator` where a baseline is chosen."""

    def cost(self, values: int, members: int, sampling: schema.Sampling) -> tuple[float, float, float]:
        return 0.0, 2.0 * sampling.samples * members * values, 0.0


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


class KernelSettings(BaselineSettings):
    name: schema.GeneratorName = "gaussian_kernel"
    bandwidth: float = Field(0.2, gt=0, description="standard deviations about a member, in those of the members")


class Baseline(Generator):
    """A generator that has learned nothing but which vectors the members are.

    Attributes:
        weighs_members: whether `weights` are of members, and each row's sum is one; else of the centred members over
            sqrt(K - 1).
    """

    weighs_members: ClassVar[bool] = False

    def __init__(self, settings: Any, subset: Subset) -> None:
        self.settings, self.subset = settings, subset
        self.members: Vectors = HeldVectors(torch.zeros(1, subset.size))

    def fit(self, vectors: Vectors | Tensor, fitting: Fitting) -> None:
        self.load_state({}, vectors)

    def state(self) -> State:
        return {}

    def load_state(self, state: State, members: Vectors | Tensor) -> None:
        self.members = Vectors.of(members)
        for name in ("_held", "_stds", "subspace"):
            self.__dict__.pop(name, None)

    def sample(self, count: int, sampling: schema.Sampling, device: torch.device) -> Tensor:
        return torch.cat(list(self.draw(count, sampling, device)))

    def draw(self, count: int, sampling: schema.Sampling, device: torch.device) -> Iterator[Tensor]:
        random = rng(device, sampling.seed or 0, "samples")
        for weights in self.weights(count, random).split(rows_at_a_time(self.subset.size)):
            vectors = torch.empty(len(weights), self.subset.size, device=device)
            for columns, mean, factor in self.factors():
                moved = weights @ factor.to(device)
                vectors[:, columns] = mean.to(device) + (moved * self.scale if self.weighs_members else moved)
            yield self.finish(vectors, random)
            del vectors  # before the next ones are drawn

    def drawn(self, count: int, sampling: schema.Sampling, device: torch.device) -> Vectors:
        """Returns what `sample` does if that can be held, else other draws, which are made some columns at a time."""
        if is_held(count, self.subset.size):
            return Vectors.of(self.sample(count, sampling, device))
        return Draws(self, count, sampling.seed or 0, device)

    def spreads(self, columns: slice, weights: Tensor) -> Tensor | None:
        """Returns the standard deviation (n, c) or (c,) of what is added to samples at some columns; None: nothing."""
        return None

    def weights(self, count: int, random: torch.Generator) -> Tensor:
        """Draws the weights (n, K) of samples; default: none has any, and all samples are the mean."""
        return torch.zeros(count, len(self.members), device=random.device)

    def finish(self, vectors: Tensor, random: torch.Generator) -> Tensor:
        """Returns samples (n, D), given what the weights make of them."""
        return vectors

    def factors(self) -> Iterable[tuple[slice, Tensor, Tensor]]:
        """Gives, for some columns at a time, the members' mean (c,), and the centred ones over sqrt(K - 1) (K, c)."""
        if self.members.in_memory:
            return self._held
        return ((columns, mean, values / self.scale) for columns, mean, values in centred(self.members))

    @functools.cached_property
    def _held(self) -> list[tuple[slice, Tensor, Tensor]]:
        return [(columns, mean, values / self.scale) for columns, mean, values in centred(self.members)]

    @functools.cached_property
    def subspace(self) -> Subspace:
        """The members' principal components."""
        return Subspace.fit(self.members)[0]

    def some(self, count: int, of: int, random: torch.Generator) -> Tensor:
        """Draws the places (n, of) of different members, as far as there are so many."""
        order = torch.rand(count, len(self.members), generator=random, device=random.device).argsort(1)
        return order[:, :of]

    @property
    def scale(self) -> float:
        """What the centred members are divided by."""
        return float(max(1, len(self.members) - 1) ** 0.5)

    def encode(self, vectors: Vectors | Tensor) -> Tensor:
        """Projections on the leading principal components."""
        return self.subspace.coordinates(Vectors.of(vectors))[:, :NUM_VIEW_DIMENSIONS].float()


class Draws(Combinations):
    """Draws of a baseline (n, D), made some columns at a time."""

    def __init__(self, baseline: Baseline, count: int, seed: int, device: torch.device) -> None:
        self._baseline, self._seed = baseline, seed
        self._weights = baseline.weights(count, rng(device, seed, "samples"))
        super().__init__(baseline.members, self._weights if baseline.weighs_members else self._weights / baseline.scale)

    def columns(self, start: int, stop: int) -> Tensor:
        vectors, moving = super().columns(start, stop), slice(start, stop)
        spreads = self._baseline.spreads(moving, self._weights)
        if spreads is not None:  # each block of columns has numbers of its own, however many are read
            blocks = range(start // BLOCK, -(-stop // BLOCK))
            numbers = [normal(len(self), BLOCK, rng(self.device, self._seed, "noise", block)) for block in blocks]
            noise = torch.cat(numbers, 1)[:, start - blocks[0] * BLOCK :][:, : stop - start]
            vectors += spreads.to(self.device) * noise
        return vectors


def normal(count: int, values: int, random: torch.Generator) -> Tensor:
    """Draws (n, values) from N(0, 1)."""
    return torch.randn(count, values, generator=random, device=random.device)


class Gaussian(Baseline):
    """The Gaussian with the members' mean and full covariance, which has rank K - 1 at most."""

    Settings = GaussianSettings

    def weights(self, count: int, random: torch.Generator) -> Tensor:
        return normal(count, len(self.members), random)


class DiagonalGaussian(Baseline):
    """The Gaussian with each value's own mean and variance among the members; arXiv 2506.07998's strongest baseline."""

    Settings = DiagonalSettings

    def spreads(self, columns: slice, weights: Tensor) -> Tensor:
        values = self.members.columns(columns.start, columns.stop)
        return values.std(0, correction=min(1, len(values) - 1))

    def finish(self, vectors: Tensor, random: torch.Generator) -> Tensor:
        drawn = normal(len(vectors), self.subset.size, random)
        for columns, mean, factor in self.factors():
            stds = factor.square().sum(0).sqrt().to(drawn.device)
            drawn[:, columns] = mean.to(drawn.device) + stds * drawn[:, columns]
        return drawn


class PrincipalGaussian(Baseline):
    """The Gaussian of the leading principal components of the members.

    Their number is by default the effective rank (Roy and Vetterli, 2007): the exponential of the entropy of the
    components' shares of the variance.
    """

    Settings = PrincipalSettings

    def weights(self, count: int, random: torch.Generator) -> Tensor:
        shares = self.subspace.variances / self.subspace.variances.sum().clamp(min=torch.finfo(torch.double).tiny)
        rank = self.settings.rank or max(1, round(float(torch.special.entr(shares).sum().exp())))
        kept = self.subspace.directions[:, :rank].float().to(random.device)  # (K, rank)
        return normal(count, kept.shape[1], random) @ kept.T


class Average(Baseline):
    """The averages of k random members, as model soups are."""

    Settings = AverageSettings
    weighs_members = True

    def weights(self, count: int, random: torch.Generator) -> Tensor:
        chosen = self.some(count, self.settings.count, random)
        return super().weights(count, random).scatter(1, chosen, 1 / chosen.shape[1])


class Interpolation(Baseline):
    """Random points between two random members."""

    Settings = InterpolationSettings
    weighs_members = True

    def weights(self, count: int, random: torch.Generator) -> Tensor:
        chosen = self.some(count, 2, random)
        share = torch.rand(count, 1, generator=random, device=random.device)
        shares = torch.cat([share, 1 - share], 1)[:, -chosen.shape[1] :]
        return super().weights(count, random).scatter(1, chosen, shares / shares.sum(1, keepdim=True))


class KernelDensity(Baseline):
    """Random members with deviations of the members' covariance: a Gaussian kernel density (Silverman 1986)."""

    Settings = KernelSettings
    weighs_members = True

    def weights(self, count: int, random: torch.Generator) -> Tensor:
        chosen = super().weights(count, random).scatter(1, self.some(count, 1, random), 1.0)
        drawn = normal(count, len(self.members), random) / self.scale
        return chosen + self.settings.bandwidth * (drawn - drawn.mean(1, keepdim=True))


class Noise(Baseline):
    """Random members with Gaussian noise, scaled by the standard deviation of each tensor's values."""

    Settings = NoiseSettings
    weighs_members = True

    def weights(self, count: int, random: torch.Generator) -> Tensor:
        return super().weights(count, random).scatter(1, self.some(count, 1, random), 1.0)

    def spreads(self, columns: slice, weights: Tensor) -> Tensor:
        stds = self.settings.sigma * self._stds[weights.argmax(1).to(self._stds.device)]
        sizes = self._overlaps(columns)
        return stds.repeat_interleave(torch.tensor(sizes, device=stds.device), 1, output_size=sum(sizes))

    @functools.cached_property
    def _stds(self) -> Tensor:
        """Standard deviations (K, tensors) of the members' tensors."""
        sums = torch.zeros(2, len(self.members), len(self.subset.entries), dtype=torch.double)
        for columns, values in self.members.chunks():
            parts = values.double().split(self._overlaps(columns), 1)
            sums += torch.stack([torch.stack([part.sum(1), part.square().sum(1)]) for part in parts], 2).to(sums)
        means, squares = sums / torch.tensor([entry.size for entry in self.subset.entries])
        return (squares - means.square()).clamp(min=0).sqrt().float()

    def _overlaps(self, columns: slice) -> list[int]:
        """Returns how many of some columns each tensor has."""
        ends = ((entry.offset, entry.offset + entry.size) for entry in self.subset.entries)
        return [max(0, min(end, columns.stop) - max(start, columns.start)) for start, end in ends]

    def finish(self, vectors: Tensor, random: torch.Generator) -> Tensor:
        noise = normal(len(vectors), self.subset.size, random)
        for entry in self.subset.entries:
            piece = slice(entry.offset, entry.offset + entry.size)
            noise[:, piece] *= self.settings.sigma * vectors[:, piece].std(1, correction=0, keepdim=True)
        return vectors + noise
