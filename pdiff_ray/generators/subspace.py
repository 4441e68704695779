"""The subspace of K members: their exact principal components, by the K x K matrix of inner products.

A point of the subspace is a combination of the members, so that neither components nor copies of the members are kept,
and what is in memory at a time are some columns of them.
Shapes: K members of D values, r components, n vectors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pdiff_ray.storage.matrix import CHUNK_VALUES, Vectors, pieces

MIN_SHARE = 1e-12  # of the variance: what is less is rounding


class Subspace:
    """The principal components of members (K, D): the covariance of their values, whatever D.

    Args:
        members: of which some columns are read at a time, in each method.
        directions: (K, r), float64, the components as combinations of the centred members, orthonormal.
        variances: (r,), float64, of the members along the components, the largest first.
    """

    def __init__(self, members: Vectors, directions: Tensor, variances: Tensor) -> None:
        self.members, self.directions, self.variances = members, directions, variances

    @staticmethod
    def fit(members: Vectors, rank: int | None = None, share: float = 1.0) -> tuple[Subspace, float]:
        """Finds the components of members (K, D), by the eigenvectors of their K x K Gram matrix.

        Args:
            rank: components that are kept at most; default: all, K - 1.
            share: of the variance that those kept have at least.

        Returns:
            The subspace, and the share of the variance that it has.
        """
        gram = torch.zeros(len(members), len(members), dtype=torch.float64, device=members.device)
        for _, _, values in centred(members, torch.float64):
            gram.addmm_(values, values.T)
        squares, directions = torch.linalg.eigh(gram)
        squares, directions = squares.flip(0).clamp(min=0), directions.flip(1)
        shares = squares / squares.sum().clamp(min=torch.finfo(torch.float64).tiny)
        there = int((shares > MIN_SHARE).sum())
        enough = int((shares.cumsum(0) < share - MIN_SHARE).sum()) + 1
        kept = max(1, min(there, enough, rank or there))
        found = Subspace(members, directions[:, :kept].contiguous(), squares[:kept] / max(1, len(members) - 1))
        return found, float(shares[:kept].sum()) if there else 1.0

    @property
    def _lengths(self) -> Tensor:
        """Norms (r,) of the combinations of centred members that `directions` are."""
        return (self.variances * max(1, len(self.members) - 1)).sqrt()

    @property
    def _units(self) -> Tensor:
        """The combinations (K, r) of centred members that are the components, of length one; 0 where none varies."""
        return torch.where(self._lengths > 0, self.directions / self._lengths, 0.0)

    def coordinates_of_members(self) -> Tensor:
        """Returns the members' coordinates (K, r) along the components, float64."""
        return self.directions * self._lengths

    def coordinates(self, vectors: Vectors) -> Tensor:
        """Returns the coordinates (n, r) of vectors (n, D), float64, on their device."""
        products = torch.zeros(len(vectors), len(self.members), dtype=torch.float64, device=vectors.device)
        for piece in pieces(self.members, vectors, values=CHUNK_VALUES):
            values = self.members.columns(piece.start, piece.stop).double()
            mean = values.mean(0)
            moved = vectors.columns(piece.start, piece.stop).double() - mean.to(products.device)
            products.addmm_(moved, (values - mean).T.to(products.device))
        return products @ self._units.to(products.device)

    def points(self, coordinates: Tensor) -> Combinations:
        """Returns the vectors (n, D) that have coordinates (n, r), on their device."""
        weights = coordinates.double() @ self._units.T.to(coordinates.device)
        return Combinations(self.members, weights.float())


class Combinations(Vectors):
    """The members' mean and combinations of the centred members, float32, made some columns at a time.

    Args:
        weights: of the centred members (n, K), float32, on the device of the vectors.
    """

    def __init__(self, members: Vectors, weights: Tensor) -> None:
        self.members, self.weights, self.device = members, weights, weights.device
        self.shape = (len(weights), members.shape[1])

    def columns(self, start: int, stop: int) -> Tensor:
        values = self.members.columns(start, stop).float()
        mean = values.mean(0)
        return torch.addmm(mean.to(self.device), self.weights, (values - mean).to(self.device))

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        for columns, _ in self.members.chunks():
            yield columns, self.columns(columns.start, columns.stop)


def centred(members: Vectors, dtype: torch.dtype = torch.float32) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields, for some columns at a time, which they are, the members' mean (c,) and the members around it (K, c)."""
    for columns, values in members.chunks():
        moved = values.to(dtype)
        mean = moved.mean(0)
        yield columns, mean, moved - mean
