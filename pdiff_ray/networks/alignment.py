"""Weight matching: networks permuted, as their symmetries allow, so that their units stand where a reference has them.

Git Re-Basin (Ainsworth et al. 2023, arXiv 2209.04836), algorithm 1: group by group, the permutation that brings a
network nearest to the reference, the other groups' being kept, which is a linear assignment; until no group changes.
Many networks are matched at once: the inner products of their units with the reference's are one operation per tensor
for all of them, and are computed again only for networks in which another group of the tensor has changed.

Shapes: D values of a vector, n vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pdiff_ray.networks.symmetries import Place, Symmetries, blocks

GAIN = 1e-6  # of the product of norms: a smaller one is rounding, and could go on for ever


def match(
    symmetries: Symmetries, reference: Tensor, vectors: Tensor, seed: int, start: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Matches networks to a reference.

    What comes of a network depends on the others by rounding alone.

    Args:
        reference: (D,), on the CPU as all vectors.
        vectors: (n, D).
        seed: of the order in which groups take turns.
        start: orders (n, size) of each group to begin with; default: those that change nothing.

    Returns:
        For each group the orders (n, size) that `Symmetries.permuted` takes.
    """
    orders = [order.clone() for order in start or symmetries.identity(len(vectors))]
    for rows in blocks(vectors):
        _match(symmetries, reference, vectors[rows], seed, [order[rows] for order in orders])
    return orders


def _match(symmetries: Symmetries, reference: Tensor, vectors: Tensor, seed: int, orders: list[Tensor]) -> None:
    """Matches networks, of which it changes the orders."""
    from scipy.optimize import linear_sum_assignment

    groups = symmetries.groups
    products = [_products(symmetries, index, reference, vectors) for index in range(len(groups))]
    least = GAIN * reference.norm() * vectors.norm(dim=1)
    due = torch.ones(len(groups), len(vectors), dtype=torch.bool)  # to be assigned (again)
    random = torch.Generator().manual_seed(seed)
    while due.any():
        for index in torch.randperm(len(groups), generator=random).tolist():
            rows = due[index].nonzero()[:, 0]
            if not len(rows):
                continue
            due[index] = False
            first, *more = (product.of(rows, orders) for product in products[index])
            likeness = sum(more, first)
            found = np.stack([linear_sum_assignment(matrix, maximize=True)[1] for matrix in likeness.numpy()])
            before, after = orders[index][rows], torch.from_numpy(found)
            orders[index][rows] = after
            if len(set(groups[index].names)) == len(groups[index].names):
                gain = _along(likeness, after) - _along(likeness, before)
            else:  # of a tensor with the group on both axes the likeness tells that of one of them
                old = [before if order is orders[index] else order[rows] for order in orders]
                new = [order[rows] for order in orders]
                gain = (symmetries.permuted(vectors[rows], new) - symmetries.permuted(vectors[rows], old)) @ reference
            better = gain > least[rows]
            orders[index][rows[~better]] = before[~better]
            for other, of_other in enumerate(products):
                for product in of_other:
                    if product.depends_on(index):
                        product.stale[rows[better]] = due[other, rows[better]] = True


@dataclass
class _Product:
    """Inner products (n, size, size) of a reference's units with those of networks, over some places of a group.

    Attributes:
        others: further places in the same tensor, each with the index of its group.
        stale: (n,) networks for which it is to be computed.
    """

    places: Sequence[Place]
    others: Sequence[tuple[int, Place]]
    reference: Tensor
    vectors: Tensor
    stale: Tensor = field(init=False)
    found: Tensor = field(init=False)

    def __post_init__(self) -> None:
        count, size = len(self.vectors), self.places[0].size
        self.stale, self.found = torch.ones(count, dtype=torch.bool), torch.empty(count, size, size)

    def depends_on(self, index: int) -> bool:
        """Returns whether it changes with the permutation of a group."""
        return any(index == other for other, _ in self.others)

    def of(self, rows: Tensor, orders: Sequence[Tensor]) -> Tensor:
        """Returns it for some networks; units stand in the order of `vectors`, those of other groups in their own."""
        due = rows[self.stale[rows]]
        if len(due):
            self.stale[due] = False
            products = [self._of(place, due, orders) for place in self.places]
            found = sum(products[1:], products[0])
            if len(due) == len(self.found):
                self.found = found
            else:
                self.found[due] = found
        return self.found if len(rows) == len(self.found) else self.found[rows]

    def _of(self, place: Place, rows: Tensor, orders: Sequence[Tensor]) -> Tensor:
        values, chosen = place.tensor(self.vectors), rows if len(rows) < len(self.vectors) else None
        for index, other in self.others:
            values, chosen = other.permuted(values, orders[index][rows], chosen), None
        values = values if chosen is None else values[chosen]
        return torch.einsum("iab,njab->nij", place.units(place.tensor(self.reference[None]))[0], place.units(values))


def _products(symmetries: Symmetries, index: int, reference: Tensor, vectors: Tensor) -> list[_Product]:
    """Returns the products of a group: one of the tensors that are its own, and one of each that it shares."""
    alone, shared = [], []
    for place in symmetries.groups[index].places:
        on_same = [
            (other, further)
            for other, group in enumerate(symmetries.groups)
            for further in group.places
            if further.offset == place.offset and further is not place
        ]
        shared += [_Product([place], on_same, reference, vectors)] if on_same else []
        alone += [] if on_same else [place]
    return ([_Product(alone, [], reference, vectors)] if alone else []) + shared


def _along(likeness: Tensor, order: Tensor) -> Tensor:
    """Returns sums (n,) of likenesses (n, size, size) of units that stand at the same places in an order (n, size)."""
    return likeness.gather(2, order[:, :, None]).sum((1, 2))
