"""Networks cut in two parts, so that what their generated tensors do not reach is computed once for all of them.

A node of the network's graph belongs to the suffix if it depends on a generated tensor. The frontier is what the suffix
reads of the nodes before it: the prefix computes it from the images, and the suffix computes the logits from it and the
generated tensors.

Shapes: B images of a batch, C channels, S the edge in pixels, M classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from pdiff_ray.common.errors import first_line

aten = torch.ops.aten
# Of the largest logit. CPUs give equal bits, but GPU libraries choose kernels, which round otherwise, by batch size.
TOLERANCE, AUTOCAST_TOLERANCE = 1e-4, 3e-2


class PartitionedNetwork(nn.Module):
    """A network as prefix and suffix; `partition_network` makes it.

    Its shared tensors are frozen: buffers that use the network's memory until either one moves to another device.

    Attributes:
        names: of the generated tensors.
        shared: the prefix's part of the FLOPs of a forward pass, 0 to 1.
        prefix_flops: of the prefix, per image.
        reason: why the network runs whole, with the images as the frontier; None if it was cut.
    """

    def __init__(
        self,
        names: Collection[str],
        prefix: nn.Module | None,
        suffix: nn.Module,
        shared: float = 0.0,
        prefix_flops: float = 0.0,
        reason: str | None = None,
    ) -> None:
        super().__init__()
        self.names, self.shared, self.prefix_flops, self.reason = tuple(names), shared, prefix_flops, reason
        self._prefix, self._suffix = prefix, suffix

    @torch.no_grad()
    def prefix(self, images: Tensor) -> tuple[Tensor, ...]:
        """Computes the frontier of images (B, C, S, S): tensors (B, ...), from which parts of the batch may be cut."""
        return (images,) if self._prefix is None else tuple(self._prefix(images))

    def suffix(self, frontier: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        """Computes logits (B, M) from a frontier, which stays as it is, and the generated tensors by name.

        Gradients flow to `tensors`.

        Raises:
            ValueError: `tensors` are not the ones that the network was cut for.
        """
        if wrong := sorted(tensors.keys() ^ set(self.names)):
            raise ValueError(f"the network was cut for other tensors; missing or too many: {', '.join(wrong)}")
        return self._suffix(*frontier, *(tensors[name] for name in self.names))

    def forward(self, images: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Computes logits (B, M) from images (B, C, S, S) and the generated tensors by name."""
        return self.suffix(self.prefix(images), tensors)

    def fingerprint(self) -> str:
        """Returns a hash of what the prefix computes: its operations and the shared tensors in them."""
        assert isinstance(self._prefix, fx.GraphModule)
        found = hashlib.sha256(self._prefix.code.encode())
        for name, tensor in sorted(self._prefix.state_dict().items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()


class _Whole(nn.Module):
    """A whole network with the signature of a suffix."""

    def __init__(self, network: nn.Module, names: Collection[str]) -> None:
        super().__init__()
        self.network, self.names = network, tuple(names)

    def forward(self, images: Tensor, *tensors: Tensor) -> Tensor:
        return call_with(self.network, dict(zip(self.names, tensors, strict=True)), images)


def call_with(network: nn.Module, tensors: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Computes logits (B, M) of a network with other tensors in the place of its own, under all of their names.

    What the network changes of them in its pass, like running statistics, it changes in `tensors`.
    """
    # functional_call's own handling of tied tensors puts the others back into a module that has two names.
    places: dict[int, list[str]] = {}
    for prefix, module in network.named_modules():  # by one of its names
        for name, own in (*module._parameters.items(), *module._buffers.items()):
            places.setdefault(id(own), []).append(f"{prefix}.{name}" if prefix else name)
    now = _tensors(network)
    replaced = {place: tensor for name, tensor in tensors.items() for place in places[id(now[name])]}
    return functional_call(network, replaced, (images,), tie_weights=False)


def partition_network(network: nn.Module, names: Collection[str], images: Tensor) -> PartitionedNetwork:
    """Cuts a network in two and compares the parts with the whole; what cannot be cut, or differs, runs whole.

    Under autocast the parts get its casts as operations of their own; a network that runs whole needs it again.

    Args:
        network: in eval mode, on the device where it will run: its graph may name that of tensors it creates.
        names: of the generated parameters and buffers.
        images: a few (B >= 2, C, S, S), of the size and in the memory format of those to come.
    """
    whole = PartitionedNetwork(names, None, _Whole(network, names))
    if not names:  # a graph would keep the tensors as they are now
        whole.reason = "nothing is generated"
        return whole
    try:
        found = _partition(network, names, images)
        _verify(found, whole, images, {name: _tensors(network)[name] for name in names})
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # say nothing of the network
        raise
    except Exception as error:  # the network's own code is traced, and may raise anything
        whole.reason = first_line(error)
        return whole
    return found


def runs_whole(network: nn.Module, images: Tensor) -> str | None:
    """Returns why a network cannot be cut whatever is generated, as far as its graph tells; None if it can.

    Args:
        network, images: as `partition_network` takes them; they may have no values (on the meta device).
    """
    try:
        Graph(network.eval(), images)
    except Exception as error:  # the network's own code is traced
        return first_line(error)
    return None


def _partition(network: nn.Module, names: Collection[str], images: Tensor) -> PartitionedNetwork:
    """Cuts a network in two, or raises ValueError with the reason why it cannot be cut."""
    tensors = _tensors(network)
    if unknown := set(names) - tensors.keys():
        raise ValueError(f"the network has no tensor {min(unknown)}")
    if any(module.training for module in network.modules()):
        raise ValueError("the network, or a layer of it, is in training mode")
    graph = Graph(network, images)
    generated = [graph.node_of(tensors[name]) for name in names]
    of_images, of_generated = graph.dependents([graph.images]), graph.dependents(generated)
    # Numbers, and tensors with B elsewhere than in front, cannot be cached by image: the suffix computes them from
    # earlier nodes that can, and what depends on no image from shared tensors.
    cacheable = {node for node in of_images - of_generated if graph.per_image(node)}
    frontier = [node for node in graph.needed([graph.logits], cacheable) if node in cacheable] or [graph.images]
    prefix, suffix = graph.part([graph.images], frontier), graph.part([*frontier, *generated], graph.logits)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        values = prefix(images)
        before = counter.get_total_flops()
        suffix(*values, *(tensors[name] for name in names))
    shared = before / max(1, counter.get_total_flops())
    return PartitionedNetwork(names, prefix, suffix, shared, prefix_flops=before / len(images))


class Graph:
    """The computation of a network, as nodes without side effects.

    Attributes:
        images, logits: its input's and output's nodes.
        batch: B as a symbol.
        stored: the tensors of the nodes that stand for the network's parameters, buffers and constants.
        sizes: the nodes whose value is B.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        dynamic_batch = ({0: torch.export.Dim.AUTO},)
        try:
            traced = torch.export.export(network, (images,), strict=False, dynamic_shapes=dynamic_batch)
            program = traced.run_decompositions({})  # makes it functional: nothing is written into a cached tensor
        except Exception as error:
            raise ValueError(f"torch.export cannot trace the network: {first_line(error)}") from error
        if any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in traced.graph.nodes):
            raise ValueError("the network branches, or switches gradients or autocast, in its forward pass")
        self.graph, signature = program.graph, program.graph_signature
        if signature.buffers_to_mutate or signature.user_inputs_to_mutate or len(signature.user_outputs) != 1:
            raise ValueError("the network returns more than logits, or changes its images or buffers")
        nodes = {node.name: node for node in self.graph.nodes}
        self.images, self.logits = (nodes[str(name)] for name in (*signature.user_inputs, *signature.user_outputs))
        self.batch = self.images.meta["val"].shape[0].node.expr
        if self.batch.is_number:
            raise ValueError("the network fixes the batch size, as len(images) does, unlike images.shape[0]")
        tensors: dict[str, Any] = {**program.constants, **_tensors(network)}
        self.stored: dict[fx.Node, Tensor] = {
            nodes[spec.arg.name]: tensors[spec.target] for spec in signature.input_specs if spec.target
        }
        self.sizes = {node for node in self.graph.nodes if self._is_batch(node.meta.get("val"))}

    def _is_batch(self, size: object) -> bool:
        return isinstance(size, torch.SymInt) and size.node.expr == self.batch

    def per_image(self, node: fx.Node) -> bool:
        """Returns whether the node is a tensor (B, ...) whose other dimensions do not vary with B."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.ndim:
            return False
        return self._is_batch(value.shape[0]) and all(isinstance(size, int) for size in value.shape[1:])

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Returns the one node of a tensor; a tied one, which has a node per name, is given one."""
        first, *others = [node for node, stored in self.stored.items() if stored is tensor]
        for node in others:
            node.replace_all_uses_with(first)
        return first

    def dependents(self, sources: Collection[fx.Node]) -> set[fx.Node]:
        """Returns `sources` and the nodes that depend on them."""
        found = set(sources)
        for node in self.graph.nodes:
            if not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return found

    def needed(self, outputs: Collection[fx.Node], given: Collection[fx.Node]) -> list[fx.Node]:
        """Returns the nodes that `outputs` depend on if `given` and B are known, and these, in order of computation."""
        found = set(outputs)
        for node in reversed(self.graph.nodes):
            if node in found and node not in given and node not in self.sizes:
                found.update(node.all_input_nodes)
        return [node for node in self.graph.nodes if node in found]

    def part(self, inputs: Sequence[fx.Node], output: fx.Node | list[fx.Node]) -> fx.GraphModule:
        """Returns the function from `inputs`, of which the first has B in front, to `output`."""
        part = fx.Graph()
        copies = {node: part.placeholder(node.name) for node in inputs}
        attributes: dict[str, Any] = {}  # named as their nodes, whose prefixes keep clear of GraphModule's own names
        for node in self.needed(output if isinstance(output, list) else [output], inputs):
            if node in copies:
                continue
            if node in self.sizes:
                copies[node] = part.call_method("size", (copies[inputs[0]], 0))  # vmap has no aten.sym_size
            elif node in self.stored:
                copies[node], attributes[node.name] = part.get_attr(node.name), self.stored[node].detach()
            else:
                copies[node] = part.node_copy(node, copies.__getitem__)
                if node.target is aten.view.default:  # vmap may find strides that cannot be viewed
                    copies[node].target = aten.reshape.default
                if node.target is aten._native_batch_norm_legit_no_training.default:  # which vmap would run in a loop
                    copies[node].target = aten.native_batch_norm.default
                    copies[node].args = (*copies[node].args[:5], False, *copies[node].args[5:])
        part.output(fx.map_arg(output, copies.__getitem__))
        return fx.GraphModule(attributes, part)


def _verify(
    parts: PartitionedNetwork, whole: PartitionedNetwork, images: Tensor, tensors: Mapping[str, Tensor]
) -> None:
    """Raises ValueError unless both give the same logits: for other tensors, other batches and part of a frontier."""
    random = torch.Generator().manual_seed(0)
    tensors = {name: perturbed(tensor, random) for name, tensor in tensors.items()}
    larger, first = torch.cat([images, images[:1]]), images[:1]
    with torch.no_grad():
        frontier = parts.prefix(larger)
        cases = [(larger, frontier), (first, [tensor[:1] for tensor in frontier])]
        for batch, values in [*cases, (images, parts.prefix(images)), (first, parts.prefix(first))]:
            expected = whole(batch, tensors)
            if not expected.isfinite().all():
                raise ValueError("the network's logits are not finite")
            if not expected.any():
                raise ValueError("the network's logits are all zero, so that parts cannot be compared with it")
            if not _close(parts.suffix(values, tensors), expected):
                if not _close(whole(batch, tensors), expected):
                    raise ValueError("two forward passes of the network over the same images differ")
                raise ValueError("the network's parts do not compute what the whole does")


def perturbed(tensor: Tensor, random: torch.Generator) -> Tensor:
    """Changes each value by a tenth or so, without changing a sign: variances stay positive."""
    noise = torch.randn(tensor.shape, generator=random).to(tensor.device)
    return torch.where(tensor == 0, 0.01 * noise.abs(), tensor * (noise / 10).exp()).to(tensor.dtype)


def _close(logits: Tensor, expected: Tensor) -> bool:
    rounded = torch.is_autocast_enabled(logits.device.type)
    tolerance = AUTOCAST_TOLERANCE if rounded else TOLERANCE
    return bool((logits - expected).abs().max() <= tolerance * expected.abs().max())


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers by name; tied ones by each of their names."""
    return dict([*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)])
