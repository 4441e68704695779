"""Where vectors lie among the members that a generator has learned from: a few numbers that do not grow with D.

Shapes: K members and n vectors of D values each; r is the number of directions that the members span, F of features.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pdiff_ray.storage.matrix import CHUNK_VALUES, Vectors, pieces

PAIR_VALUES = 2**21  # of vectors and pairs of members, held at a time
BANDS = (3, 10, 30, 100)  # principal components up to which energies are averaged
FLOOR = 1e-4  # of the mean distance: what is closer is the same
# Of the mean distance, and of the member's distance to its nearest fellow: a vector that is as near to a member lies as
# that does, whatever parts them.
NEAR, NEARER = 0.02, 0.25
MIN_SPAN = 1e-6  # of the largest singular value: what is smaller is rounding
MAX_SQUARE = 25.0  # of a standardized value: one that hardly moves in the zoo does not outweigh the others
MIN_WHITENESS = -8.0  # logarithm, below which a band has no part in a residual
USED_ENERGY = 1e-2  # of a component's variance, above which a vector uses the component


@dataclass(frozen=True)
class Place:
    """Where vectors lie relative to a geometry's members, in float64.

    Attributes:
        distances: to each member (n, K), L2.
        squares: squared distances to the members' mean (n,).
        cosines: of the angles between vectors and members, both seen from the members' mean (n, K).
        components: coordinates on the members' principal components, leading ones first (n, r).
        standardized: mean square of the values that move in the zoo, in standard deviations of each over it (n,).
    """

    distances: Tensor
    squares: Tensor
    cosines: Tensor
    components: Tensor
    standardized: Tensor

    @property
    def nearest(self) -> Tensor:
        """The distance to the nearest member (n,)."""
        return self.distances.amin(1)


class Geometry:
    """The members, as their products with each other (K, K): all that matters of D values.

    Everything is computed over chunks of columns, so that memory does not grow with copies of (K, D); a set of vectors
    takes one pass. Works for any K; see `degenerate`.

    Attributes:
        members: (K, D), any dtype and device, not copied; they need not be in memory.
        gram: products of the members, seen from their mean (K, K), float64.
        squares: squared distances among members (K, K).
        mean_distance: among members; the unit of length in features. 0 if they do not differ.
        variances: of the principal components, leading ones first (r,).
        names: of the features.
    """

    def __init__(self, members: Tensor | Vectors) -> None:
        self.members = members = Vectors.of(members)
        count = len(members)
        self.gram = torch.zeros(count, count, dtype=torch.float64, device=members.device)
        for _, centred in self._columns():
            self.gram += centred @ centred.T
        self.squares = _squares(self.gram)
        pairs = torch.triu_indices(count, count, 1, device=members.device)
        self.pair_distances = self.squares[pairs[0], pairs[1]].sqrt()
        self.mean_distance = float(self.pair_distances.mean()) if count > 1 else 0.0
        energies, directions = torch.linalg.eigh(self.gram)
        energies, directions = energies.flip(0).clamp(min=0), directions.flip(1)
        kept = energies > energies[0] * MIN_SPAN**2
        self.variances = energies[kept] / max(1, count - 1)
        self._directions = directions[:, kept] / energies[kept].sqrt()  # (K, r): products to components
        bands = [*(end for end in BANDS if end < len(self.variances)), len(self.variances)]
        self._bands = [slice(start, end) for start, end in zip([0, *bands], bands, strict=False) if end > start]
        self.names = (
            "nearest member",
            "nearest segment",
            "mean",
            "outside span",
            *(f"components {band.start + 1} to {band.stop}" for band in self._bands),
            "components used",
            *(f"residual {band.start + 1} to {band.stop}" for band in self._bands),
            "standardized energy",
        )

    @property
    def degenerate(self) -> str | None:
        """Says why nothing can be said of vectors; None if something can."""
        if len(self.members) < 3:
            return f"distances among members take three of them, and there {_are(len(self.members))}"
        if self.mean_distance == 0:
            return f"all {len(self.members)} members are the same"
        return None

    @property
    def effective_rank(self) -> float:
        """The participation ratio of the components' variances, (sum v)^2 / sum v^2: 1 to r; 0 if nothing varies."""
        return self.effective_rank_of(range(len(self.members)))

    def effective_rank_of(self, ids: Sequence[int]) -> float:
        """Returns the effective rank of some of the members."""
        rows = torch.tensor(list(ids), device=self.gram.device)
        gram = self.gram[rows][:, rows]
        gram = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
        energy = float(gram.square().sum())
        return float(gram.trace()) ** 2 / energy if energy else 0.0

    @functools.cached_property
    def components(self) -> Tensor:
        """The members' coordinates on their principal components (K, r)."""
        return self.gram @ self._directions

    @property
    def among(self) -> Place:
        """Where each member lies among the others: infinitely far from itself, and at no angle to itself."""
        lengths, itself = self.gram.diagonal(), torch.eye(len(self.gram), dtype=torch.bool, device=self.gram.device)
        distances = self.squares.sqrt().masked_fill(itself, torch.inf)
        cosines = _cosines(self.gram, lengths, lengths).masked_fill(itself, -1)
        return Place(distances, lengths, cosines, self.components, torch.ones_like(lengths))

    def place(self, vectors: Tensor | Vectors) -> Place:
        """Returns where vectors (n, D) lie, which need not be in memory."""
        vectors = Vectors.of(vectors)
        count, num = len(self.members), len(vectors)
        like = self.gram
        products, squares = like.new_zeros(num, count), like.new_zeros(num)
        standardized, moving = like.new_zeros(num), 0
        for block, centred in self._columns(vectors):
            products += block @ centred.T
            energies = block.square_()
            squares += energies.sum(1)
            variance = centred.square().sum(0) / max(1, count - 1)
            moves = variance > 0
            if not moves.all():  # else nothing is copied
                energies, variance = energies[:, moves], variance[moves]
            standardized += energies.div_(variance).clamp_(max=MAX_SQUARE).sum(1)
            moving += len(variance)
        lengths = self.gram.diagonal()
        distances = (squares[:, None] - 2 * products + lengths).clamp(min=0).sqrt()
        cosines = _cosines(products, squares, lengths)
        return Place(distances, squares, cosines, products @ self._directions, standardized / max(1, moving))

    def features(self, vectors: Tensor | Vectors) -> Tensor:
        """Returns the features (n, F) of vectors (n, D): lengths and energies as logarithms; see `names`."""
        return self.features_of(self.place(vectors))

    def features_of(self, place: Place) -> Tensor:
        """Returns the features (n, F) of vectors that have been placed.

        - log distance to the nearest member, to the nearest segment between two members, to the mean, and to the span
          of the members, in units of the mean distance among members;
        - log mean over a band of principal components of the squared coordinate in units of the component's variance;
        - log share of the components in use, whose energy is above a hundredth of the variance;
        - log mean over a band of the squared coordinates of what parts the vector from its nearest member, against the
          mean over all dimensions: 0 for white noise;
        - log mean square of the values in standard deviations of the zoo: 0 for values that are drawn independently.

        Vectors that are `NEAR` to a member have its features: what rounding or a little noise leaves is no other kind.
        """
        found, member = self._features(place), place.distances.argmin(1)
        limits = (NEARER * self.among.nearest).clamp(max=NEAR * self.mean_distance)
        near = place.nearest <= limits[member]
        if near.any():
            found[near] = self._of_members[member[near]]
        return found

    @functools.cached_property
    def _of_members(self) -> Tensor:
        """The features of the members (K, F), as vectors."""
        return self._features(self.place(self.members))

    def _features(self, place: Place) -> Tensor:
        unit = self.mean_distance or 1.0
        inside = place.components.square()
        outside = (place.squares - inside.sum(1)).clamp(min=0)
        relative = inside / self.variances if len(self.variances) else inside
        lengths = (place.nearest, self._to_segments(place), place.squares.sqrt(), outside.sqrt())
        used = (relative > USED_ENERGY).double().mean(1) if relative.shape[1] else torch.zeros_like(place.squares)
        columns = [
            *(torch.log(length / unit + FLOOR) for length in lengths),
            *(torch.log(relative[:, band].mean(1) + 1e-6) for band in self._bands),
            torch.log(used + 1e-3),
            *self._residuals(place, unit),
            torch.log(place.standardized + 1e-6),
        ]
        return torch.stack(columns, 1)

    def _residuals(self, place: Place, unit: float) -> list[Tensor]:
        """Returns the whiteness (n,) in each band of what parts vectors from their nearest members."""
        nearest = place.distances.argmin(1)
        total = place.nearest.square() / unit**2
        parted = (place.components - self.components[nearest]).square() / unit**2
        white = total / self.members.shape[1]  # energy per dimension
        copies = total <= FLOOR**2  # parted from their members by rounding
        found = [torch.log((parted[:, band].mean(1) + 1e-12) / (white + 1e-12)) for band in self._bands]
        return [torch.where(copies, 0.0, one.clamp(min=MIN_WHITENESS)) for one in found]

    def _to_segments(self, place: Place) -> Tensor:
        """Returns the distance (n,) to the nearest of the segments between two members."""
        count = len(self.members)
        if count < 2:
            return place.nearest
        first, second = torch.triu_indices(count, count, 1, device=self.gram.device)
        lengths = self.squares[first, second]
        first, second = first[lengths > 0], second[lengths > 0]
        if not len(first):
            return place.nearest
        # In float32 to find the segment, in float64 to measure: the difference is taken of large numbers.
        rough, inverse = self.squares[first, second].float(), (1 / self.squares[first, second]).float()
        chosen = []
        for piece in place.distances.square().float().split(max(1, PAIR_VALUES // len(first))):
            start = piece[:, first]
            along = (start - piece[:, second]).add_(rough).mul_(0.5)  # product of x - a and b - a
            share = (along * inverse).clamp_(0, 1)
            chosen.append(start.sub_(share.mul(2 * along)).add_(share.square_().mul_(rough)).argmin(1))
        pair = torch.cat(chosen)
        a, b = first[pair], second[pair]
        rows = torch.arange(len(pair), device=pair.device)
        start, length = place.distances[rows, a].square(), self.squares[a, b]
        along = (start - place.distances[rows, b].square() + length) / 2
        share = (along / length).clamp(0, 1)
        found = (start - 2 * share * along + share.square() * length).clamp(min=0).sqrt()
        return torch.minimum(found, place.nearest)

    def _columns(self, vectors: Vectors | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields chunks of the columns of vectors (n, width) and members (K, width), seen from the members' mean."""
        for piece in pieces(self.members, *([] if vectors is None else [vectors]), values=CHUNK_VALUES):
            block = self.members.columns(piece.start, piece.stop).double()
            mean = block.mean(0)
            others = block[:0] if vectors is None else vectors.columns(piece.start, piece.stop)
            yield others.to(block.device) - mean, block - mean


def _cosines(products: Tensor, squares: Tensor, lengths: Tensor) -> Tensor:
    norms = (squares[:, None] * lengths).sqrt()
    return torch.where(norms > 0, products / norms, 0.0).clamp(-1, 1)


def _squares(gram: Tensor) -> Tensor:
    lengths = gram.diagonal()
    return (lengths[:, None] - 2 * gram + lengths).clamp(min=0).fill_diagonal_(0)


def _are(count: int) -> str:
    return f"is {count}" if count == 1 else f"are {count}"
