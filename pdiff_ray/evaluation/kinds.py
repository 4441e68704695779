"""Known kinds of vectors: what they are made by, how they lie among the members, and samples as a mixture of them.

Shapes: K members, n samples, m vectors of a kind, D values each; F features of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdiff_ray.evaluation.geometry import Geometry
from pdiff_ray.storage.matrix import Vectors

WORDS = {
    "replica": "members, or members with less noise than parts them from each other",
    "interpolation": "averages of members, points between them, or points in few of their main directions",
    "gaussian-like": "what a Gaussian draws that was fitted to the members",
    "noise": "members with so much noise that they are farther from every member than members are from each other",
    "new": "networks of the kind of those that no generator has seen",
    "unknown": "what is far from every known kind",
}
# Of noise, at which replicas are known.
SIGMAS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0, 3.0)
BANDWIDTHS = (0.03, 0.1, 0.2, 0.3)  # of deviations within the span, likewise
FREEDOM = 5.0  # degrees of freedom of the densities: tails heavier than a Gaussian's
SHRINKAGE = 0.3  # of covariances to their diagonal
MIN_SPREAD = 0.2  # of features, all of which are logarithms


class Recipe(NamedTuple):
    """A known way of making vectors from members.

    Attributes:
        word: of `WORDS`; see `Family`.
        generator: the section `generator` of what draws them.
        of: what is interpolated, for sentences.
    """

    word: str
    generator: Mapping[str, Any]
    of: str = ""


def recipes(geometry: Geometry) -> dict[str, Recipe]:
    """Returns the known ways of making vectors from the members, by name: draws of each are families for `Known`."""
    rank = len(geometry.variances)
    ranks = sorted({k for k in (5, 10, 20, rank // 4, rank // 2) if 0 < k < rank})
    return {
        "copies": Recipe("replica", {"name": "average", "count": 1}, "copies"),
        **{f"noise {sigma:g}": Recipe("replica", {"name": "noise", "sigma": sigma}) for sigma in SIGMAS},
        **{f"deviation {b:g}": Recipe("replica", {"name": "gaussian_kernel", "bandwidth": b}) for b in BANDWIDTHS},
        "average 2": Recipe("interpolation", {"name": "average", "count": 2}, "pairs"),
        "between": Recipe("interpolation", {"name": "interpolation"}, "pairs"),
        "average 4": Recipe("interpolation", {"name": "average", "count": 4}, "averages of a few"),
        "average 16": Recipe("interpolation", {"name": "average", "count": 16}, "the mean"),
        **{
            f"{k} components": Recipe("interpolation", {"name": "gaussian_pca", "rank": k}, "a subspace") for k in ranks
        },
        "gaussian per value": Recipe("gaussian-like", {"name": "gaussian_diagonal"}),
        "gaussian": Recipe("gaussian-like", {"name": "gaussian"}),
    }


class Family(NamedTuple):
    """Vectors of a known kind.

    Attributes:
        word: of `WORDS`; that of members with noise is "replica" however much noise it is.
        vectors: draws (m, D), or a function that makes them, so that one family is in memory at a time.
        of: what is interpolated, such as "pairs", "the mean", "the subspace"; for sentences.
    """

    word: str
    vectors: Tensor | Vectors | Callable[[], Tensor | Vectors]
    of: str = ""


class Kind:
    """A kind of vectors and its density of features: a multivariate t with a shrunk covariance.

    Args:
        worth: how many independent vectors these are worth; default: their number. A new vector of the kind varies more
            about the mean of few than these do.
    """

    def __init__(self, word: str, features: Tensor, of: str = "", worth: float | None = None) -> None:
        self.word, self.features, self.of = word, features, of
        self.mean = features.mean(0)
        centred = features - self.mean
        covariance = centred.T @ centred / len(features)
        count = max(2.0, worth or len(features))
        covariance *= (count + 1) / (count - 1)
        shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * torch.diag(covariance.diagonal())
        self.factor = torch.linalg.cholesky(shrunk + MIN_SPREAD**2 * torch.eye(len(shrunk)).to(shrunk))
        # Of its own vectors; of a kind that hardly varies, half of what `MIN_SPREAD` allows each feature.
        self.reach = max(float(self.squares(features).max()), len(self.mean) / 4)

    def squares(self, features: Tensor) -> Tensor:
        """Returns squared Mahalanobis distances (n,)."""
        white = torch.linalg.solve_triangular(self.factor, (features - self.mean).T, upper=False)
        return white.square().sum(0)

    def log_density(self, features: Tensor) -> Tensor:
        """Returns the log density (n,) at features (n, F)."""
        return log_t(self.squares(features), len(self.mean), float(self.factor.diagonal().log().sum()))


def log_t(squares: Tensor, dimension: int, log_scale: float) -> Tensor:
    """Returns the log density of a multivariate t from squared Mahalanobis distances."""
    constant = math.lgamma((FREEDOM + dimension) / 2) - math.lgamma(FREEDOM / 2)
    constant -= dimension / 2 * math.log(FREEDOM * math.pi) + log_scale
    return constant - (FREEDOM + dimension) / 2 * torch.log1p(squares / FREEDOM)


def mixture(log_densities: Tensor, mass: Tensor | None = None, steps: int = 200) -> Tensor:
    """Returns the posterior of each kind for each sample (kinds, n): EM over the shares of the kinds.

    Args:
        log_densities: of the kinds at the samples (kinds, n).
        mass: how much each sample counts (n,); default: 1.
    """
    mass = torch.ones_like(log_densities[0]) if mass is None else mass
    shares = torch.full_like(log_densities[:, 0], 1 / len(log_densities))
    for _ in range(steps):
        posterior = torch.softmax(log_densities + (shares + 1e-12).log()[:, None], 0)
        shares = (posterior * mass).sum(1) / mass.sum().clamp(min=1e-12)
    return posterior
