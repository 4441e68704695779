"""Symmetries of a network: what may be done to its tensors and changes no function.

Permutations are read off the labels of the axes in its graph: one that no operation fixes, and of which all tensors are
generated, is a group of axes that are free to be permuted. Units of a group before a positively homogeneous activation
(ReLU) may also be scaled, if what reads them is divided by the same factor; which groups can be is found by trying.

Shapes: D values of a vector, n vectors; an axis with a group is seen as (outer, size, inner) of its tensor's values.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pdiff_ray.common.errors import ConfigError, first_line, some_of
from pdiff_ray.networks.labels import Axes, Label, Labels, fix, resolved, tie
from pdiff_ray.networks.partition import Graph, call_with, perturbed
from pdiff_ray.networks.subset import Subset

BLOCK_VALUES = 2**21  # of vectors that are permuted or matched at a time
BALANCING = 10  # rounds of scaling; each leaves a small part of what was unequal
EXACT = 1e-9  # of the largest logit in double precision
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
class Scaling:
    """Places of a group whose units can be scaled by positive factors and change no function.

    Attributes:
        made: what makes the units, to be multiplied.
        read: what reads them, to be divided.
    """

    made: tuple[Place, ...]
    read: tuple[Place, ...]

    def scaled(self, vectors: Tensor, factors: Tensor) -> None:
        """Scales units in vectors (n, D), in place, by factors (n, size)."""
        for places, by in ((self.made, factors), (self.read, 1 / factors)):
            for place in places:
                place.units(place.tensor(vectors)).mul_(by[:, :, None, None])

    def balance(self, vectors: Tensor) -> Tensor:
        """Returns the factors (n, size) with which what makes and what reads each unit of vectors has equal norms."""
        made, read = (
            sum(place.units(place.tensor(vectors)).square().sum((2, 3)) for place in places)
            for places in (self.made, self.read)
        )
        factors = (read / made) ** 0.25
        return torch.where(factors.isfinite() & (factors > 0), factors, 1.0)  # a dead unit stays as it is


@dataclass(frozen=True)
class Symmetries:
    """All groups of a network's generated tensors.

    Attributes:
        obstacles: what keeps other axes from being permuted, in words; pixels and classes are not among it.
        scalings: those of groups whose units can be scaled.
    """

    groups: tuple[Group, ...]
    obstacles: tuple[str, ...] = ()
    scalings: tuple[Scaling, ...] = ()

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

    def balanced(self, vectors: Tensor) -> Tensor:
        """Returns vectors (n, D) of the same functions, of which what makes and what reads each unit has equal norms.

        Of all scales these have the smallest norm; groups that share tensors take turns.
        """
        vectors = vectors.double()
        for _ in range(BALANCING):
            for scaling in self.scalings:
                scaling.scaled(vectors, scaling.balance(vectors))
        return vectors.float()


def blocks(vectors: Tensor) -> Iterator[slice]:
    """Yields rows of vectors (n, D), some at a time: of more, the system would find memory again for each operation."""
    count = max(1, BLOCK_VALUES // vectors.shape[1])
    for start in range(0, len(vectors), count):
        yield slice(start, start + count)


def find_symmetries(
    network: nn.Module,
    subset: Subset,
    images: Tensor,
    measured: Callable[[str], bool] = lambda name: False,
    scales: bool = False,
) -> Symmetries:
    """Finds the groups of a network's tensors, and tries them: a permuted network must give the same logits.

    Args:
        network: in eval mode.
        images: a few (B >= 2, C, S, S) that it takes.
        measured: tells tensors by name that are not in the subset and will be measured anew for each network, so that
            they follow its permutations.
        scales: looks for scalings as well, which takes a few passes for each group.

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
    check = _Check(network, subset, images, measured)
    random = torch.Generator().manual_seed(1)
    if check.differs(found.permuted(check.vector, found.random(1, random))):
        raise ConfigError("the permutations that its graph allows change its logits")
    return replace(found, scalings=tuple(_scalings(found, check, random))) if scales else found


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


def _scalings(found: Symmetries, check: _Check, random: torch.Generator) -> Iterator[Scaling]:
    """Yields how groups can be scaled: of two ways, the one that changes no logits of a network."""
    for group in found.groups:
        made = [place for place in group.places if place.axis == 0 and place.outer == 1]
        read = [place for place in group.places if place not in made]
        # After a normalization it is that layer's weight and bias that make a unit.
        weights = [place.name for place in made if place.name.endswith("weight") and place.inner == 1]
        layers = {name.removesuffix("weight") for name in weights}
        norm = [place for place in made if re.sub("(weight|bias)$", "", place.name) in layers]
        for makes in (made, norm):
            scaling, scaled = Scaling(tuple(makes), tuple(read)), check.vector.clone()
            scaling.scaled(scaled, 2.0 ** torch.randint(-2, 3, (1, group.size), generator=random))  # rounds nothing
            if makes and read and not check.differs(scaled, exactly=True):
                yield scaling
                break


class _Check:
    """A network with other values than its own, on which it is tried what changes no function.

    Attributes:
        vector: (1, D).
    """

    def __init__(self, network: nn.Module, subset: Subset, images: Tensor, measured: Callable[[str], bool]) -> None:
        self.network, self.subset, self.images = network, subset, images
        named = dict(
            [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
        )
        random = torch.Generator().manual_seed(0)
        vector = perturbed(subset.flatten(named), random)
        for entry in subset.entries:
            if len(entry.shape) == 1:  # scales that begin near zero would hide what is behind them
                vector[entry.offset : entry.offset + entry.size] = torch.rand(entry.size, generator=random) + 0.5
        self.vector = vector[None]
        self.constant = {name: torch.ones_like(named[name]) for name in named if measured(name)}

    def differs(self, vectors: Tensor, exactly: bool = False) -> bool:
        """Returns whether the network of another vector (1, D) gives other logits.

        Args:
            exactly: takes for a difference what float32 would hide, as that of a GELU from a ReLU far from zero.
        """

        def differ(network: nn.Module, dtype: torch.dtype, tolerance: float = TOLERANCE) -> bool:
            pair = [{**self.constant, **self.subset.unflatten(row)} for row in (self.vector[0], vectors[0])]
            cast = [{name: t.to(dtype) if t.is_floating_point() else t for name, t in own.items()} for own in pair]
            with torch.no_grad():
                expected, other = (call_with(network, own, self.images.to(dtype)) for own in cast)
            return not (other - expected).abs().max() <= tolerance * expected.abs().max()

        if exactly:
            return differ(self._double, torch.double, EXACT)
        # Many layers may magnify rounding, of which there is little in double precision.
        return differ(self.network, torch.float32) and differ(self._double, torch.double)

    @functools.cached_property
    def _double(self) -> nn.Module:
        return copy.deepcopy(self.network).double()
