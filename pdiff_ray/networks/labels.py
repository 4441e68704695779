"""Labels of the axes in a network's graph: what operations do to them, and of which the order along them is free.

Every axis of every tensor is a product of labels, row by row: the input of a linear layer behind a flattened image
(C, H, W) is the product of three. An operation ties labels of what it reads and writes: a residual addition those of
both branches, a convolution its input's channels and the second axis of its weights. A view cuts labels in factors, as
attention does into heads and what is in them. A label is fixed if anything depends on the order along it: pixels,
classes, and what an unknown operation reads.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from pdiff_ray.networks.partition import Graph

BATCH = 1_000_003  # stands for the batch size, a prime that no view can cut


@dataclass(eq=False)
class Label:
    """A factor of an axis.

    Attributes:
        fixed: something depends on the order along it.
        reason: what, if it is neither pixels nor classes.
        parts: what it has been cut into, or the one label that it is the same as.
    """

    size: int
    fixed: bool = False
    reason: str | None = None
    parts: tuple[Label, ...] = ()


Axis = tuple[Label, ...]  # a product of labels, the first one outermost
Axes = list[Axis]  # of a tensor


def resolved(axis: Axis) -> Axis:
    """Returns the labels that an axis is made of by now."""
    found: list[Label] = []
    for label in axis:
        if label.parts:
            found += resolved(label.parts)
        elif label.size > 1:
            found.append(label)
    return tuple(found)


def fix(axes: Sequence[Axis], reason: str | None = None) -> None:
    for axis in axes:
        for label in resolved(axis):
            if not label.fixed:
                label.fixed, label.reason = True, reason


def tie(one: Axis, other: Axis, reason: str | None = None) -> None:
    """Makes two axes of the same size one and the same; fixes them, from where their factors do not agree."""
    left, right = list(reversed(one)), list(reversed(other))
    while True:
        for stack in (left, right):
            while stack and (stack[-1].parts or stack[-1].size == 1):
                stack += reversed(resolved((stack.pop(),)))
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
            large.parts = tuple(Label(size, large.fixed, large.reason) for size in sizes)
        else:
            break
    fix([tuple(left), tuple(right)], reason)


class Labels:
    """The labels of all axes in a graph, tied by its operations."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.of: dict[fx.Node, Any] = {}  # axes of tensors, lists of them for tuples
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                self.of[node] = self.fresh(node)
            elif node.op == "call_function":
                self.of[node] = self._call(node)
        fix([*self.of[graph.images], *self.of[graph.logits]])

    def fresh(self, node: fx.Node, fixed: bool = False) -> Any:
        """Returns new axes of a node's value, of each tensor if it has several; None of a number."""

        def new(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return [new(part) for part in value]
            shape = value.shape if isinstance(value, Tensor) else ()
            return [(Label(self.size(size), fixed),) for size in shape] if isinstance(value, Tensor) else None

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
            fix(_flattened(self.of[read]), call.reason)
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

    labels: Labels
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
        tie(one, other, self.reason)

    def fix(self, axes: Sequence[Axis]) -> None:
        fix(axes, self.reason)

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
        group, inputs, outputs = (Label(s) for s in (groups, _size(within), _size(out) // groups))
        call.tie(channels, (group, inputs))
        call.tie(out, (group, outputs))
        call.tie(within, (inputs,))
    else:
        call.tie(channels, within)
    fix([*x[2:], *weight[2:]])
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
    call.tie(x[1], (Label(groups), Label(_size(x[1]) // groups)))
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
    fix([x[dim] for dim in chosen])

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
    fix([joined])
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
    fix([weight[0]])
    return [*indices, weight[1]]


def _index(call: _Call) -> Axes:
    x, indices = call.first, call.args["indices"]
    chosen = [dim for dim, index in enumerate(indices) if index is not None]
    if chosen != list(range(chosen[0], chosen[-1] + 1)):
        raise _UnknownError
    fix([x[dim] for dim in chosen])
    for dim in chosen:
        fix(call.labels.of[indices[dim]])
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
