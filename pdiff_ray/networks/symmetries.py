"""Permutation symmetries of a network: which axes of which tensors may be permuted together and change no function.

They are read off the network's graph. Every axis of every tensor in it is a product of labels, row by row: the input of
a linear layer behind a flattened image (C, H, W) is the product of three. An operation ties labels of what it reads and
writes: a residual addition those of both branches, a convolution its input's channels and the second axis of its
weights. A view cuts labels in factors, as attention does into heads and what is in them. A label is fixed if anything
depends on the order along it: pixels, classes, tensors that are not generated, and what an unknown operation reads.
Each other one is a group of axes that are free to be permuted.

Shapes: D values of a vector, n vectors; an axis with a group is seen as (outer, size, inner) of its tensor's values.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from pdiff_ray.common.errors import ConfigError, first_line, some_of
from pdiff_ray.networks.partition import Graph, call_with, perturbed
from pdiff_ray.networks.subset import Subset

BATCH = 1_000_003  # stands for the batch size, a prime that no view can cut
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
        labels = _Labels(Graph(network, images))
    except ValueError as error:
        raise ConfigError(f"no permutation of units is known: {first_line(error)}") from None
    found = labels.symmetries(network, subset, measured)
    if not found.groups:
        reason = (
            some_of(found.obstacles) if found.obstacles else "none of its tensors has units of which the order is free"
        )
        raise ConfigError(f"no permutation of units leaves its function as it is: {reason}")
    _verify(found, network, subset, images, measured)
    return found


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


@dataclass(eq=False)
class _Label:
    """A factor of an axis.

    Attributes:
        fixed: something depends on the order along it.
        reason: what, if it is neither pixels nor classes.
        parts: what it has been cut into, or the one label that it is the same as.
    """

    size: int
    fixed: bool = False
    reason: str | None = None
    parts: tuple[_Label, ...] = ()


Axis = tuple[_Label, ...]  # a product of labels, the first one outermost
Axes = list[Axis]  # of a tensor


def _resolved(axis: Axis) -> Axis:
    """Returns the labels that an axis is made of by now."""
    found: list[_Label] = []
    for label in axis:
        if label.parts:
            found += _resolved(label.parts)
        elif label.size > 1:
            found.append(label)
    return tuple(found)


def _fix(axes: Sequence[Axis], reason: str | None = None) -> None:
    for axis in axes:
        for label in _resolved(axis):
            if not label.fixed:
                label.fixed, label.reason = True, reason


def _tie(one: Axis, other: Axis, reason: str | None = None) -> None:
    """Makes two axes of the same size one and the same; fixes them, from where their factors do not agree."""
    left, right = list(reversed(one)), list(reversed(other))
    while True:
        for stack in (left, right):
            while stack and (stack[-1].parts or stack[-1].size == 1):
                stack += reversed(_resolved((stack.pop(),)))
        if not left and not right:
            return
        if not left or not right:
            break
        a, b = left[-1], right[-1]
        if a is b:
            left.pop(), right.pop()
        elif a.size == b.size:
            a.fixed, a.reason = a.fixed or b.fixed, a.reason if a.fixed else b.reason
            b.parts = (a,)
        elif (large := max(a, b, key=lambda x: x.size)).size % (small := min(a, b, key=lambda x: x.size)).size == 0:
            sizes = (small.size, large.size // small.size)
            large.parts = tuple(_Label(size, large.fixed, large.reason) for size in sizes)
        else:
            break
    _fix([tuple(left), tuple(right)], reason)


class _Labels:
    """The labels of all axes in a graph, tied by its operations."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.of: dict[fx.Node, Any] = {}  # axes of tensors, lists of them for tuples
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                self.of[node] = self.fresh(node)
            elif node.op == "call_function":
                self.of[node] = self._call(node)
        _fix([*self.of[graph.images], *self.of[graph.logits]])

    def symmetries(self, network: nn.Module, subset: Subset, measured: Callable[[str], bool]) -> Symmetries:
        """Returns the groups of a subset's tensors."""
        entries = {name: entry for entry in subset.entries for name in entry.names}
        named = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
        names: dict[int, list[str]] = {}
        for name, tensor in named:
            names.setdefault(id(tensor), []).append(name)
        found: dict[str, Axes] = {}
        for node, tensor in self.graph.stored.items():
            if not node.users:
                continue
            known = names.get(id(tensor), [])
            own = next((entries[name] for name in known if name in entries), None)
            if own is None or own.is_complex:
                if not any(map(measured, known)):
                    _fix(self.of[node], f"{known[0]} is not generated" if known else f"{node.name} is a constant")
            elif own.name in found:  # a tied tensor has a node per name
                for one, other in zip(found[own.name], self.of[node], strict=True):
                    _tie(one, other)
            else:
                found[own.name] = self.of[node]
        places: dict[_Label, list[Place]] = {}
        obstacles: dict[str, None] = {}
        for entry in subset.entries:  # those that no operation reads are nowhere
            for axis, labels in enumerate(found.get(entry.name, ())):
                outer = math.prod(entry.shape[:axis])
                for label in _resolved(labels):
                    if not label.fixed:
                        inner = entry.size // outer // label.size
                        place = Place(entry.name, axis, entry.offset, outer, label.size, inner)
                        places.setdefault(label, []).append(place)
                    elif label.reason:
                        obstacles[label.reason] = None
                    outer *= label.size
        return Symmetries(tuple(Group(label.size, tuple(p)) for label, p in places.items()), tuple(obstacles))

    def fresh(self, node: fx.Node, fixed: bool = False) -> Any:
        """Returns new axes of a node's value, of each tensor if it has several; None of a number."""

        def new(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return [new(part) for part in value]
            shape = value.shape if isinstance(value, Tensor) else ()
            return [(_Label(self.size(size), fixed),) for size in shape] if isinstance(value, Tensor) else None

        return new(node.meta.get("val"))

    def size(self, size: Any) -> int:
        """Returns a size as a number, with `BATCH` for B."""
        return size if isinstance(size, int) else int(size.node.expr.subs(self.graph.batch, BATCH))

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            return self.of[node.all_input_nodes[0]][node.args[1]]
        output = self.fresh(node, fixed=True)
        if output is None or not isinstance(node.target, torch._ops.OpOverload):  # a size, which no order changes
            return None
        name = node.target._schema.name.removeprefix("aten::")
        call = _Call(self, node, f"{name}{_layer(node)}")
        rule = RULES.get(name) or (_pointwise if torch.Tag.pointwise in node.target.tags else None)
        if rule is not None:
            try:
                return rule(call)
            except _UnknownError:
                pass
        for read in node.all_input_nodes:
            _fix(_flattened(self.of[read]), call.reason)
        return output


def _layer(node: fx.Node) -> str:
    """Returns where in the network a node is, in words."""
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return f" in {stack[-1]}" if stack and stack[-1] and not stack[-1].startswith("_") else ""


def _flattened(axes: Any) -> list[Axis]:
    """Returns all axes of a node's value, which may be of several tensors."""
    if not axes:
        return []
    if isinstance(axes[0], tuple):
        return list(axes)
    return [axis for tensor in axes for axis in _flattened(tensor)]


class _UnknownError(Exception):
    """A rule does not know an operation with these arguments."""


@dataclass
class _Call:
    """A call of an operation: its arguments by name, tensors as their axes."""

    labels: _Labels
    node: fx.Node
    reason: str
    args: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        target: Any = self.node.target
        schema = target._schema.arguments
        given = dict(zip((a.name for a in schema), self.node.args, strict=False)) | dict(self.node.kwargs)
        self.args = {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema}

    def axes(self, name: str) -> Axes:
        """Returns the axes of a tensor argument; none if it is not given."""
        value = self.args.get(name)
        return list(self.labels.of[value]) if isinstance(value, fx.Node) else []

    def fresh(self, fixed: bool = False) -> Any:
        return self.labels.fresh(self.node, fixed)

    def tie(self, one: Axis, other: Axis) -> None:
        _tie(one, other, self.reason)

    def fix(self, axes: Sequence[Axis]) -> None:
        _fix(axes, self.reason)

    def dims(self, name: str, ndim: int) -> list[int]:
        """Returns dimensions given by an argument, counted from 0; all, if it is not given."""
        value = self.args.get(name)
        if value is None or value == []:
            return list(range(ndim))
        return [dim % ndim for dim in (value if isinstance(value, list | tuple) else [value])]

    @property
    def first(self) -> Axes:
        """The axes of the first argument."""
        return self.axes(next(iter(self.args)))


Rule = Callable[[_Call], Any]


def _broadcast(call: _Call, tensors: Sequence[Axes], output: Axes) -> Axes:
    """Ties the axes of tensors to those of an output that they are broadcast to."""
    for axes in tensors:
        for axis, out in zip(reversed(axes), reversed(output), strict=False):
            if _size(axis) == _size(out):
                call.tie(out, axis)
    return output


def _size(axis: Axis) -> int:
    return math.prod(label.size for label in axis)


def _pointwise(call: _Call) -> Any:
    output = call.fresh()
    if any(not isinstance(axis, tuple) for axis in output or ()):  # several tensors
        raise _UnknownError
    nodes = call.node.all_input_nodes
    return _broadcast(call, [call.labels.of[n] for n in nodes if call.labels.of[n] is not None], output)


def _same(call: _Call) -> Axes:
    return call.first


def _constant(call: _Call) -> Any:
    return call.fresh()  # the same value everywhere


def _linear(call: _Call) -> Axes:
    x, weight, bias = call.axes("input"), call.axes("weight"), call.axes("bias")
    call.tie(x[-1], weight[1])
    return _broadcast(call, [bias], [*x[:-1], weight[0]])


def _product(call: _Call) -> Axes:
    names = {"mat1", "mat2", "self", "other", "tensor1"} & call.args.keys()
    left, right = (call.axes(name) for name in call.args if name in names and not ("mat1" in names and name == "self"))
    if min(len(left), len(right)) < 2:
        raise _UnknownError
    call.tie(left[-1], right[-2])
    batch = call.fresh()[:-2]
    _broadcast(call, [left[:-2], right[:-2]], batch)
    bias = [call.axes("self")] if "mat1" in names else []  # addmm
    return _broadcast(call, bias, [*batch, left[-2], right[-1]])


def _convolution(call: _Call) -> Axes:
    x, weight, bias, groups = call.axes("input"), call.axes("weight"), call.axes("bias"), call.args["groups"]
    if call.args.get("transposed") or len(x) != len(weight):
        raise _UnknownError
    channels, out, within = x[1], weight[0], weight[1]
    if groups > 1:
        group, inputs, outputs = (_Label(s) for s in (groups, _size(within), _size(out) // groups))
        call.tie(channels, (group, inputs))
        call.tie(out, (group, outputs))
        call.tie(within, (inputs,))
    else:
        call.tie(channels, within)
    _fix([*x[2:], *weight[2:]])
    for axis in bias:
        call.tie(out, axis)
    return [x[0], out, *call.fresh(fixed=True)[2:]]


def _batch_norm(call: _Call) -> Any:
    x = call.axes("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        for axis in call.axes(name):
            call.tie(x[1], axis)
    output = call.fresh(fixed=True)
    return [x, *output[1:]] if isinstance(call.node.meta["val"], list | tuple) else x


def _layer_norm(call: _Call) -> Axes:
    x = call.axes("input")
    return _broadcast(call, [call.axes("weight"), call.axes("bias")], x)


def _group_norm(call: _Call) -> Axes:
    x, groups = call.axes("input"), call.args["num_groups"]
    call.tie(x[1], (_Label(groups), _Label(_size(x[1]) // groups)))
    for name in ("weight", "bias"):
        for axis in call.axes(name):
            call.tie(x[1], axis)
    return x


def _reduction(call: _Call) -> Axes:
    x = call.first
    dims = call.dims("dim", len(x))
    if call.args.get("keepdim"):
        return [() if dim in dims else axis for dim, axis in enumerate(x)]
    return [axis for dim, axis in enumerate(x) if dim not in dims]


def _view(call: _Call) -> Any:
    output = call.fresh()
    call.tie(sum(call.first, ()), sum(output, ()))
    return output


def _permute(call: _Call) -> Axes:
    x = call.first
    return [x[dim] for dim in call.dims("dims", len(x))]


def _transpose(call: _Call) -> Axes:
    x = call.first
    a, b = (call.args.get(name, dim) % len(x) for dim, name in enumerate(("dim0", "dim1")))
    x[a], x[b] = x[b], x[a]
    return x


def _squeeze(call: _Call) -> Axes:
    x = call.first
    dims = call.dims("dim", len(x))
    return [axis for dim, axis in enumerate(x) if dim not in dims or _size(axis) > 1]


def _unsqueeze(call: _Call) -> Axes:
    x = call.first
    x.insert(call.args["dim"] % (len(x) + 1), ())
    return x


def _expand(call: _Call) -> Any:
    return _broadcast(call, [call.first], call.fresh())


def _attention(call: _Call) -> Axes:
    query, key, value, mask = (call.axes(name) for name in ("query", "key", "value", "attn_mask"))
    if call.args.get("enable_gqa") or call.args.get("dropout_p"):
        raise _UnknownError
    call.tie(query[-1], key[-1])
    call.tie(key[-2], value[-2])
    batch = call.fresh()[:-2]
    _broadcast(call, [query[:-2], key[:-2], value[:-2]], batch)
    _broadcast(call, [mask], [*batch, query[-2], key[-2]])
    if call.args.get("is_causal"):
        call.fix([query[-2], key[-2]])
    return [*batch, query[-2], value[-1]]


def _along(name: str) -> Rule:
    """Returns the rule of operations for which places count along the dimensions that an argument names."""
    return lambda call: _passed(call, call.dims(name, len(call.first)))


def _cut(call: _Call) -> Any:
    """Units that go different ways could be permuted apart, which no label says."""
    call.fix([call.first[dim] for dim in call.dims("dim", len(call.first))])
    return _along("dim")(call)


def _passed(call: _Call, chosen: Collection[int]) -> Any:
    """Fixes the chosen dimensions of the first argument, and returns the axes of outputs that have the others."""
    x = call.first
    _fix([x[dim] for dim in chosen])

    def one(axes: Axes) -> Axes:
        if len(axes) < len(x):  # the dimension is gone
            return [axis for dim, axis in enumerate(x) if dim not in chosen]
        return [axes[dim] if dim in chosen else axis for dim, axis in enumerate(x)]

    output = call.fresh(fixed=True)
    return [one(axes) for axes in output] if isinstance(call.node.meta["val"], list | tuple) else one(output)


def _slice(call: _Call) -> Any:
    whole = [_size(axis) for axis in call.first] == [_size(axis) for axis in call.fresh()]
    return call.first if whole else _cut(call)


def _join(call: _Call) -> Axes:
    tensors = [list(call.labels.of[node]) for node in call.args["tensors"]]
    dim, output = call.args["dim"] % len(tensors[0]), call.fresh()
    for axes in tensors:
        call.fix([axes.pop(dim)])
    joined = output.pop(dim)
    _fix([joined])
    _broadcast(call, tensors, output)
    return [*output[:dim], joined, *output[dim:]]


def _pad(call: _Call) -> Any:
    last = len(call.first) - 1
    return _passed(call, {last - i // 2 for i, pad in enumerate(call.args["pad"]) if pad})


def _resampled(call: _Call) -> Any:
    """The rule of pooling and interpolation: places count along height and width."""
    last = len(call.first) - 1
    return _passed(call, {last - 1, last})


def _embedding(call: _Call) -> Axes:
    weight, indices = call.axes("weight"), call.axes("indices")
    _fix([weight[0]])
    return [*indices, weight[1]]


def _index(call: _Call) -> Axes:
    x, indices = call.first, call.args["indices"]
    chosen = [dim for dim, index in enumerate(indices) if index is not None]
    if chosen != list(range(chosen[0], chosen[-1] + 1)):
        raise _UnknownError
    _fix([x[dim] for dim in chosen])
    for dim in chosen:
        _fix(call.labels.of[indices[dim]])
    behind = x[chosen[-1] + 1 :]
    output = call.fresh(fixed=True)
    middle = output[chosen[0] : len(output) - len(behind)]
    return [*x[: chosen[0]], *middle, *behind]


# What operations do to labels, by their names in ATen. Those that work value by value are told by their tag; all others
# fix what they read.
RULES: Mapping[str, Rule] = {
    "linear": _linear,
    **dict.fromkeys(("mm", "bmm", "matmul", "addmm"), _product),
    **dict.fromkeys(("conv1d", "conv2d", "convolution"), _convolution),
    **dict.fromkeys(("batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training"), _batch_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    "group_norm": _group_norm,
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "alias", "contiguous", "detach", "_to_copy", "to"), _same),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std", "logsumexp", "linalg_vector_norm"), _reduction),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _view),
    "permute": _permute,
    **dict.fromkeys(("transpose", "t", "numpy_T"), _transpose),
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    **dict.fromkeys(("expand", "expand_as"), _expand),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("full", "zeros", "ones", "full_like", "zeros_like", "ones_like", "new_zeros"), _constant),
    **dict.fromkeys(("select", "unbind", "index_select"), _along("dim")),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _cut),
    "slice": _slice,
    **dict.fromkeys(("roll", "flip"), _along("dims")),
    "cat": _join,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(
        (
            *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "max_pool2d_with_indices"),
            *("upsample_bilinear2d", "upsample_nearest2d", "upsample_bicubic2d"),
        ),
        _resampled,
    ),
    "index": _index,
    "embedding": _embedding,
}
