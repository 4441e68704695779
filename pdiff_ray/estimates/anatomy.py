"""What networks consist of: the operations of a forward pass, before and after generated tensors take part in it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pdiff_ray.config import schema
from pdiff_ray.data.sources import DataInfo
from pdiff_ray.networks.build import build_network, check_network
from pdiff_ray.networks.subset import Entry, Subset, resolve

MAX_BUILT = 5 * 10**7  # parameters of a network that is built to be examined
MAX_EDGE = 64  # of images that a network is given for its anatomy alone
CLASSES = 1009  # of networks that are dissected once for any number: a prime, which no other dimension of them is


@dataclass(frozen=True)
class Anatomy:
    """What a forward pass of a network in eval mode does, per image, before and after generated tensors take part.

    Attributes:
        parameters: of the network.
        subset: what is generated of it.
        prefix_flops, suffix_flops: of operations that generated tensors do not reach, and of the others.
        operation_bytes, suffix_bytes: outputs of all operations and of the suffix: what training keeps, at most.
        largest_bytes: of the largest output.
        frontier_bytes: of what the suffix reads of the prefix.
        runs_whole: why nothing is shared, where that is known.
    """

    parameters: int
    subset: Subset
    prefix_flops: float
    suffix_flops: float
    operation_bytes: float
    suffix_bytes: float
    largest_bytes: float
    frontier_bytes: float
    runs_whole: str | None = None

    @property
    def flops(self) -> float:
        return self.prefix_flops + self.suffix_flops

    @property
    def shared(self) -> float:
        """The prefix's part of the FLOPs, 0 to 1; that of `split.SplitNetwork`."""
        return self.prefix_flops / max(1, self.flops)


@dataclass(frozen=True)
class Operation:
    """One operation of a forward pass.

    Attributes:
        generated: whether generated tensors reach it.
        flops, bytes: what it computes, and its new outputs.
        scales: whether both are proportional to the number of classes.
    """

    generated: bool
    flops: float
    bytes: float
    scales: bool


@dataclass(frozen=True)
class Dissection:
    """What was found of a network.

    Attributes:
        classes: that it was built for; if they are `CLASSES`, it tells the anatomy for any other number.
        shapes: of the parameters.
        subset: what is generated.
        operations: of a forward pass.
        frontier_bytes: of what the suffix reads of the prefix.
        images: in the pass.
    """

    classes: int
    shapes: Sequence[Sequence[int]]
    subset: Subset
    operations: Sequence[Operation]
    frontier_bytes: float
    images: int

    def anatomy(self, classes: int) -> Anatomy:
        """Of the network with so many classes."""
        assert self.classes in (classes, CLASSES)
        scale = classes / self.classes

        def total(kind: str, generated: Collection[bool]) -> float:
            of = [o for o in self.operations if o.generated in generated]
            return sum(getattr(o, kind) * (scale if o.scales else 1) for o in of) / self.images

        entries: list[Entry] = []
        for entry in self.subset.entries:
            offset = entries[-1].offset + entries[-1].size if entries else 0
            entries.append(Entry(entry.name, self._shape(entry.shape, classes), offset, entry.kind))
        return Anatomy(
            parameters=sum(math.prod(self._shape(shape, classes)) for shape in self.shapes),
            subset=Subset(tuple(entries)),
            prefix_flops=total("flops", {False}),
            suffix_flops=total("flops", {True}),
            operation_bytes=total("bytes", {False, True}),
            suffix_bytes=total("bytes", {True}),
            largest_bytes=max((o.bytes * (scale if o.scales else 1) for o in self.operations), default=0.0)
            / self.images,
            frontier_bytes=self.frontier_bytes / self.images,
        )

    def _shape(self, shape: Sequence[int], classes: int) -> tuple[int, ...]:
        return tuple(classes if edge == self.classes == CLASSES else edge for edge in shape)


class Trace(TorchDispatchMode):
    """Watches operations, and tells those that depend on given tensors alone from those that `generated` ones reach.

    Eager operations serve as the graph does in `split`, without the seconds that torch.export takes, and on the
    meta device without memory.
    """

    def __init__(self, given: Collection[Tensor], generated: Collection[Tensor] = ()) -> None:
        super().__init__()
        self._given, self._generated = {id(t) for t in given}, {id(t) for t in generated}
        self._alive: list[Any] = [given, generated]  # an id is a tensor's as long as that lives
        self._frontier: dict[int, float] = {}
        self.calls: dict[bool, list[Callable[[], Any]]] = {False: [], True: []}  # by whether generated tensors reach it
        self.operations: list[Operation] = []

    @property
    def frontier_bytes(self) -> float:
        return sum(self._frontier.values())

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to exclude it from compilation would import the compiler, which takes two seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        reached = any(id(t) in self._generated for t in read)
        if not reached and not any(id(t) in self._given for t in read):
            return output  # of parameters alone
        if reached:
            self._frontier |= {id(t): _bytes(t) for t in read if id(t) in self._given}
        written = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        (self._generated if reached else self._given).update(id(t) for t in written)
        self._alive.append((read, written))
        self.calls[reached].append(functools.partial(func, *args, **kwargs))
        count = flop_registry.get(func.overloadpacket)
        flops = count(*args, **kwargs, out_val=output) if count else 0
        size = 0.0 if func.is_view or func._schema.is_mutable else sum(map(_bytes, written))
        self.operations.append(Operation(reached, flops, size, any(CLASSES in t.shape for t in written)))
        return output


def _bytes(tensor: Tensor) -> float:
    return float(tensor.numel() * tensor.itemsize)


def network_to_dissect(network: schema.Network, info: DataInfo) -> nn.Module:
    """A network to be traced; a large one has no values."""
    try:
        with torch.device("meta"):
            built = build_network(plain(network), info)
    except Exception:  # it reads values, or something is wrong with it, which `check_network` tells
        return check_network(network, info)
    if info.image_size > MAX_EDGE or sum(p.numel() for p in built.parameters()) > MAX_BUILT:
        return built
    # Some operations on the meta device import the compiler, which takes two seconds.
    return build_network(plain(network), info)


def plain(network: schema.Network) -> schema.Network:
    """The network with weights of its own, which need no download."""
    return network.model_copy(update={"pretrained": False})


def dissect(network: nn.Module, info: DataInfo, zoo: schema.Zoo) -> Dissection:
    """Looks into a forward pass of a network on images of `info`, for the subset of `zoo`.

    Raises:
        ConfigError: it has no such subset.
    """
    subset = resolve(zoo.subset, network, zoo.batchnorm)
    generated = [tensor for _, tensor in generated_tensors(network, subset, zoo)]
    count = 2
    with torch.device(next(network.parameters()).device):  # where it may make tensors of its own
        images = torch.zeros(count, info.channels, info.image_size, info.image_size)
        with torch.no_grad(), Trace([images], generated) as trace:
            network.eval()(images)
    shapes = [p.shape for p in network.parameters()]
    return Dissection(info.num_classes, shapes, subset, trace.operations, trace.frontier_bytes, count)


def generated_tensors(network: nn.Module, subset: Subset, zoo: schema.Zoo | None) -> list[tuple[str, Tensor]]:
    """The tensors that differ from member to member, by name."""
    names = set(subset.names)
    if zoo is not None and zoo.batchnorm == "recalibrated":
        ends = (".running_mean", ".running_var", ".num_batches_tracked")
        names |= {name for name, _ in network.named_buffers() if f".{name}".endswith(ends)}
    return [(n, t) for n, t in (*network.named_parameters(), *network.named_buffers()) if n in names]
