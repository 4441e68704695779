"""Permutation symmetries of a network: which axes of which tensors may be permuted together and change no function.

They are read off the labels of the axes in its graph: one that no operation fixes, and of which all tensors are
generated, is a group of axes that are free to be permuted.

Shapes: D values of a vector, n vectors; an axis with a group is seen as (outer, size, inner) of its tensor's values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pdiff_ray.common.errors import ConfigError, first_line, some_of
from pdiff_ray.networks.labels import Axes, Label, Labels, fix, resolved, tie
from pdiff_ray.networks.partition import Graph, call_with, perturbed
from pdiff_ray.networks.subset import Subset

BLOCK_VALUES = 2**21  # of vectors that are permuted or matched at a time
TOLERANCE = 1e-4  # of the largest logit: permuted sums are rounded otherwise


@dataclass(frozen=True)
class Place:
    """Where a group lies in a vector: an axis of a tensor, or a factor of one.

    Attributes:
        offset: of the tensor in the vector.
        outer: the tensor's values are seen as (outer, size, inner), with the units in the middle.
    """

    name: str
    axis: int
    offset: int
    outer: int
    size: int
    inner: int

    def tensor(self, vectors: Tensor) -> Tensor:
        """Returns the tensor's values (n, outer * size * inner) in vectors (n, D), as a view."""
        return vectors.narrow(1, self.offset, self.outer * self.size * self.inner)

    def units(self, values: Tensor) -> Tensor:
        """Returns the tensor's values by units (n, size, outer, inner), as a view."""
        return values.unflatten(1, (self.outer, self.size, self.inner)).transpose(1, 2)

    def permuted(self, values: Tensor, order: Tensor, rows: Tensor | None = None) -> Tensor:
        """Returns the tensor's values in some networks (m, outer * size * inner), its units in another order.

        Args:
            order: (m, size): unit i becomes the one at `order[i]`.
            rows: (m,) of `values`; default: all.
        """
        rows = torch.arange(len(order)) if rows is None else rows
        before = torch.arange(self.outer)[:, None]
        units = values.unflatten(1, (self.outer, self.size, self.inner))
        return units[rows[:, None, None], before, order[:, None, :]].flatten(1)


@dataclass(frozen=True)
class Group:
    """Axes that are permuted together.

    Attributes:
        size: how many units change places.
    """

    size: int
    places: tuple[Place, ...]

    @property
    def names(self) -> list[str]:
        """The tensors, one as often as it is permuted."""
        return [place.name for place in self.places]


@dataclass(frozen=True)
class Symmetries:
    """All groups of a network's generated tensors.

    Attributes:
        obstacles: what keeps other axes from being permuted, in words; pixels and classes are not among it.
    """

    groups: tuple[Group, ...]
    obstacles: tuple[str, ...] = ()

    def identity(self, count: int) -> list[Tensor]:
        """Returns the permutations (count, size) of each group that change nothing."""
        return [torch.arange(group.size).repeat(count, 1) for group in self.groups]

    def random(self, count: int, random: torch.Generator) -> list[Tensor]:
        """Draws permutations (count, size) of each group."""
        return [torch.rand(count, group.size, generator=random).argsort(1) for group in self.groups]

    def permuted(self, vectors: Tensor, orders: Sequence[Tensor]) -> Tensor:
        """Returns vectors (n, D) of the same functions, permuted by orders (n, size), one for each group."""
        vectors = vectors.clone()
        for rows in blocks(vectors):
            for group, order in zip(self.groups, orders, strict=True):
                for place in group.places:
                    values = place.tensor(vectors[rows])
                    values.copy_(place.permuted(values, order[rows]))
        return vectors


def blocks(vectors: Tensor) -> Iterator[slice]:
    """Yields rows of vectors (n, D), some at a time: of more, the system would find memory again for each operation."""
    count = max(1, BLOCK_VALUES // vectors.shape[1])
    for start in range(0, len(vectors), count):
        yield slice(start, start + count)


def find_symmetries(
    network: nn.Module, subset: Subset, images: Tensor, measured: Callable[[str], bool] = lambda name: False
) -> Symmetries:
    """Finds the groups of a network's tensors, and tries them: a permuted network must give the same logits.

    Args:
        network: in eval mode.
        images: a few (B >= 2, C, S, S) that it takes.
        measured: tells tensors by name that are not in the subset and will be measured anew for each network, so that
            they follow its permutations.

    Raises:
        ConfigError: it has no such group, with the reason.
    """
    try:
        labels = Labels(Graph(network, images))
    except ValueError as error:
        raise ConfigError(f"no permutation of units is known: {first_line(error)}") from None
    found = _groups(labels, network, subset, measured)
    if not found.groups:
        reason = (
            some_of(found.obstacles) if found.obstacles else "none of its tensors has units of which the order is free"
        )
        raise ConfigError(f"no permutation of units leaves its function as it is: {reason}")
    _verify(found, network, subset, images, measured)
    return found


def _groups(labels: Labels, network: nn.Module, subset: Subset, measured: Callable[[str], bool]) -> Symmetries:
    """Returns the groups of a subset's tensors, by the labels of the network's graph."""
    entries = {name: entry for entry in subset.entries for name in entry.names}
    named = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    names: dict[int, list[str]] = {}
    for name, tensor in named:
        names.setdefault(id(tensor), []).append(name)
    found: dict[str, Axes] = {}
    for node, tensor in labels.graph.stored.items():
        if not node.users:
            continue
        known = names.get(id(tensor), [])
        own = next((entries[name] for name in known if name in entries), None)
        if own is None or own.is_complex:
            if not any(map(measured, known)):
                fix(labels.of[node], f"{known[0]} is not generated" if known else f"{node.name} is a constant")
        elif own.name in found:  # a tied tensor has a node per name
            for one, other in zip(found[own.name], labels.of[node], strict=True):
                tie(one, other)
        else:
            found[own.name] = labels.of[node]
    places: dict[Label, list[Place]] = {}
    obstacles: dict[str, None] = {}
    for entry in subset.entries:  # those that no operation reads are nowhere
        for axis, product in enumerate(found.get(entry.name, ())):
            outer = math.prod(entry.shape[:axis])
            for label in resolved(product):
                if not label.fixed:
                    inner = entry.size // outer // label.size
                    place = Place(entry.name, axis, entry.offset, outer, label.size, inner)
                    places.setdefault(label, []).append(place)
                elif label.reason:
                    obstacles[label.reason] = None
                outer *= label.size
    return Symmetries(tuple(Group(label.size, tuple(p)) for label, p in places.items()), tuple(obstacles))


def _verify(
    found: Symmetries, network: nn.Module, subset: Subset, images: Tensor, measured: Callable[[str], bool]
) -> None:
    """Raises ConfigError unless a network with other values, randomly permuted, gives the same logits."""
    random = torch.Generator().manual_seed(0)
    named = dict([*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)])
    vector = perturbed(subset.flatten(named), random)
    for entry in subset.entries:
        if len(entry.shape) == 1:  # scales that begin near zero would hide what is behind them
            vector[entry.offset : entry.offset + entry.size] = torch.rand(entry.size, generator=random) + 0.5
    rows = torch.stack([vector, found.permuted(vector[None], found.random(1, random))[0]])
    constant = {name: torch.ones_like(named[name]) for name in named if measured(name)}

    def differ(network: nn.Module, dtype: torch.dtype) -> bool:
        pair = [{**constant, **subset.unflatten(row)} for row in rows]
        cast = [{name: t.to(dtype) if t.is_floating_point() else t for name, t in own.items()} for own in pair]
        with torch.no_grad():
            expected, permuted = (call_with(network, own, images.to(dtype)) for own in cast)
        return not (permuted - expected).abs().max() <= TOLERANCE * expected.abs().max()

    # Many layers may magnify rounding, of which there is little in double precision.
    if differ(network, torch.float32) and differ(copy.deepcopy(network).double(), torch.double):
        raise ConfigError("the permutations that its graph allows change its logits")
