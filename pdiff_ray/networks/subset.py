"""Which parameters are generated: rules, resolved against a network into a subset that flattens and unflattens.

Shapes: D is the number of values in the subset; leading dimensions (...) are batch dimensions.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pdiff_ray.common.errors import ConfigError, did_you_mean, first_line, some_of
from pdiff_ray.common.registry import Registry
from pdiff_ray.config.schema import SubsetRule

NORM_TYPES = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
SHORTCUTS = {"downsample", "shortcut"}  # what torchvision and timm call the projection beside the main path


@dataclass(frozen=True)
class Entry:
    """One tensor of a subset.

    Attributes:
        dtype: that it has in the network; in a vector, a complex number is two values.
        also: its other names in the network, if it is tied.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    kind: Literal["parameter", "buffer"]
    dtype: str = "float32"
    also: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape) * (2 if self.is_complex else 1)

    @property
    def is_complex(self) -> bool:
        return self.dtype.startswith("complex")

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.also)

    def to_dict(self) -> dict[str, Any]:
        """Returns its fields as JSON values, but those at their defaults."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}


@dataclass(frozen=True)
class Subset:
    """The manifest of the generated tensors, in the order of the flattened vector."""

    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """D, the length of a flattened vector."""
        return sum(entry.size for entry in self.entries)

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self.entries]

    @property
    def layers(self) -> list[str]:
        """The names of the layers that the tensors belong to."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.names))

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Joins tensors by name (a state dict will do) to one float32 vector (D,).

        Raises:
            ConfigError: a tensor is missing, has another shape, or is complex where it should not be.
        """
        pieces = []
        for entry in self.entries:
            name = next((name for name in entry.names if name in tensors), None)
            if name is None:
                raise ConfigError(f"{entry.name}: missing from the tensors{did_you_mean(entry.name, tensors)}")
            tensor = tensors[name].detach()
            if tuple(tensor.shape) != entry.shape:
                raise ConfigError(f"{name}: has shape {tuple(tensor.shape)}, the subset wants {entry.shape}")
            if tensor.is_complex() != entry.is_complex:
                raise ConfigError(f"{name}: has the type {tensor.dtype}, the subset wants {entry.dtype}")
            pieces.append((torch.view_as_real(tensor) if entry.is_complex else tensor).reshape(-1).float())
        return torch.cat(pieces)

    def unflatten(self, vectors: Tensor) -> dict[str, Tensor]:
        """Cuts vectors (..., D) into tensors (..., *shape) by name, of the network's types, as views where possible.

        A generator may put a running variance below zero; it is clamped, since no network can use it.
        """
        if vectors.shape[-1] != self.size:
            raise ConfigError(f"vectors have {vectors.shape[-1]} values, the subset has {self.size}")
        tensors = {}
        for entry in self.entries:
            piece = vectors[..., entry.offset : entry.offset + entry.size]
            if entry.is_complex:
                piece = torch.complex(piece[..., ::2], piece[..., 1::2])
            tensor = piece.reshape(*vectors.shape[:-1], *entry.shape).to(getattr(torch, entry.dtype))
            tensors[entry.name] = tensor.clamp(min=0) if entry.name.endswith("running_var") else tensor
        return tensors

    def under_all_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns tensors that `unflatten` gave by all their names, as a state dict has them."""
        return {name: tensors[entry.name] for entry in self.entries for name in entry.names}

    def to_json(self) -> str:
        return json.dumps([entry.to_dict() for entry in self.entries])

    @staticmethod
    def from_json(text: str) -> Subset:
        """Reads what `to_json` has written.

        Raises:
            ValueError, TypeError, LookupError: it describes no tensors.
        """
        entries = tuple(
            Entry(**{**item, "shape": tuple(item["shape"]), "also": tuple(item.get("also", ()))})
            for item in json.loads(text)
        )
        for entry in entries:
            if not isinstance(getattr(torch, entry.dtype), torch.dtype):
                raise ValueError(f"{entry.name}: {entry.dtype!r} is no type of tensors")
            if not all(isinstance(size, int) and size >= 0 for size in entry.shape):
                raise ValueError(f"{entry.name}: {entry.shape} is no shape")
        return Subset(entries)


def first_names(network: nn.Module) -> dict[str, str]:
    """Returns the first name of every parameter and buffer by each of its names, of which a tied tensor has several."""
    first: dict[int, str] = {}
    named = (*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def norm_layers(network: nn.Module, images: Tensor | None = None) -> dict[str, list[str]]:
    """Returns the names of the normalization layers that have parameters.

    They are torch's, and all whose class, or one that it inherits from, has "Norm" in its name and whose parameters are
    a number per channel.

    Args:
        images: (B, C, S, S) for a forward pass in eval mode. The layers stand in the order in which it reaches them,
            those that it does not reach are left out; without images all stand in the order of definition.

    Returns:
        For each layer those beside it, on parallel branches: neither sees what the other computes.

    Raises:
        ConfigError: the forward pass fails.
    """
    layers = {name: module for name, module in network.named_modules() if _is_norm(module)}
    if images is None:
        return {name: [] for name in layers}
    training = {module: module.training for module in network.modules()}
    found = _Reached(layers, images)
    try:
        with torch.no_grad(), found:
            network.eval()(images)
    except Exception as error:  # the network's own code
        raise ConfigError(f"the order of layers is unknown, as a forward pass fails: {first_line(error)}") from None
    finally:
        for module, mode in training.items():
            module.training = mode
    before = found.before
    return {
        name: [other for other in before if other != name and name not in before[other] and other not in before[name]]
        for name in before
    }


def _is_norm(module: nn.Module) -> bool:
    if not any(True for _ in module.parameters(recurse=False)):
        return False
    named = any("Norm" in kind.__name__ for kind in type(module).__mro__)
    per_channel = all(max(p.shape, default=1) == p.numel() for p in module.parameters())
    return isinstance(module, NORM_TYPES) or (named and per_channel)


class _Reached(TorchDispatchMode):
    """Follows images through operations, to find which layers' parameters they meet, and in what order.

    Tensors are told apart by their storage, so that a view is the tensor that it looks at.

    Attributes:
        before: by layer, in the order in which the images reach them first: those that its input depends on.
    """

    def __init__(self, layers: Mapping[str, nn.Module], images: Tensor) -> None:
        super().__init__()
        self.before: dict[str, set[str]] = {}
        self.of_images: dict[StorageWeakRef, set[str]] = {_storage(images): set()}
        own = [(name, p) for name, module in layers.items() for p in module.parameters(recurse=False)]
        self.of_parameters: dict[StorageWeakRef, set[str]] = {}
        for name, parameter in own:
            self.of_parameters.setdefault(_storage(parameter), set()).add(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = [_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        output = func(*args, **(kwargs or {}))
        own = set[str]().union(*(self.of_parameters.get(storage, ()) for storage in read))
        found = self.of_parameters
        if any(storage in self.of_images for storage in read):
            before = set[str]().union(*(self.of_images.get(storage, ()) for storage in read))
            for layer in sorted(own - self.before.keys()):
                self.before[layer] = before - own
            found, own = self.of_images, own | before
        elif not own:
            return output
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                found.setdefault(_storage(tensor), set()).update(own)
        return output


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def main_path_norm_layers(network: nn.Module, images: Tensor | None = None) -> list[str]:
    """Returns `norm_layers` without those on projection shortcuts.

    A ResNet-18 has 17, and 'BN-layer 16 to 18' of the paper is `layer4.1.bn1` and `layer4.1.bn2`, the layers 16 and 17
    counted from 1.
    """
    return [name for name in norm_layers(network, images) if not SHORTCUTS & set(name.split("."))]


def resolve(rule: SubsetRule, network: nn.Module, batchnorm: str = "frozen", images: Tensor | None = None) -> Subset:
    """Returns the subset of `network` that `rule` describes.

    Args:
        batchnorm: with "included", the running statistics of the subset's BatchNorm layers belong to it; with the rule
            "all", those of every layer.
        images: a few (B, C, S, S) that the network takes; rules that count layers count them as `norm_layers` does.

    Raises:
        ConfigError: the rule matches nothing or goes beyond the network's layers.
    """
    parameters, first = dict(network.named_parameters()), first_names(network)
    rule_name, value = rule.chosen
    try:
        chosen = {first.get(found, found) for found in RULES[rule_name](network, value, images)}
        if odd := chosen - set(parameters):
            raise ConfigError(f"{min(odd)!r} is no parameter of the network{did_you_mean(min(odd), parameters)}")
        whole = {name for name in chosen if not _is_continuous(parameters[name])}
        if rule.all:  # steps and noise of any size are for the others
            chosen -= whole
        elif whole:
            raise ConfigError(
                f"{min(whole)!r} holds {parameters[min(whole)].dtype}, which cannot be generated; leave it out"
            )
        if not chosen:
            raise ConfigError(f"{value!r} chooses no parameter of the network")
    except ConfigError as error:
        raise ConfigError(f"zoo.subset.{rule_name}: {error}") from None
    tensors: dict[str, Tensor] = {name: p for name, p in parameters.items() if name in chosen}
    if batchnorm == "included":
        layers = {name.rpartition(".")[0] for name in chosen}
        for name, buffer in network.named_buffers():
            layer, _, leaf = name.rpartition(".")
            if (rule.all or layer in layers) and leaf in ("running_mean", "running_var"):
                tensors[name] = buffer
    names: dict[str, list[str]] = {}
    for other, name in first.items():
        names.setdefault(name, []).append(other)
    entries: list[Entry] = []
    for name, tensor in tensors.items():
        kind: Literal["parameter", "buffer"] = "parameter" if name in parameters else "buffer"
        offset = entries[-1].offset + entries[-1].size if entries else 0
        dtype, also = str(tensor.dtype).removeprefix("torch."), tuple(names[name][1:])
        entries.append(Entry(name, tuple(tensor.shape), offset, kind, dtype, also))
    return Subset(tuple(entries))


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _names(network: nn.Module, patterns: Sequence[str], _: Tensor | None) -> Iterator[str]:
    parameters = [name for name, _ in network.named_parameters(remove_duplicate=False)]
    for pattern in patterns:
        matched = fnmatch.filter(parameters, pattern)
        if not matched:
            near = did_you_mean(pattern, parameters) or f"; it has {some_of(parameters)}"
            raise ConfigError(f"{pattern!r} matches no parameter of the network{near}")
        yield from matched


def _last_norm_layers(network: nn.Module, count: int, images: Tensor | None) -> list[str]:
    layers = list(norm_layers(network, images))
    return _parameters_of(network, layers, len(layers) - count, len(layers), count)


def _norm_layers(network: nn.Module, bounds: tuple[int, int], images: Tensor | None) -> list[str]:
    layers, (start, stop) = main_path_norm_layers(network, images), bounds
    return _parameters_of(network, layers, start - 1, stop - 1, list(bounds), " of the main path")


def _parameters_of(
    network: nn.Module, layers: list[str], start: int, stop: int, value: object, which: str = ""
) -> list[str]:
    if not layers:
        raise ConfigError("the network has no normalization layer; choose by names: instead")
    if start < 0 or stop > len(layers):
        raise ConfigError(
            f"{value} goes beyond the network's {len(layers)} normalization layers{which}: {some_of(layers)}"
        )
    modules = dict(network.named_modules())
    return [f"{name}.{own}" for name in layers[start:stop] for own, _ in modules[name].named_parameters(recurse=False)]


# The user's own functions of a network, which give names of parameters.
FUNCTIONS: Registry[Callable[[nn.Module], Iterable[str]]] = Registry("function of a network", {})
# Functions of a network, of the value of a field of `SubsetRule` and of images, which give names of parameters.
RULES: Registry[Callable[[nn.Module, Any, Tensor | None], Iterable[str]]] = Registry(
    "subset rule",
    {
        "all": lambda network, value, images: dict(network.named_parameters()),
        "last_norm_layers": _last_norm_layers,
        "norm_layers": _norm_layers,
        "names": _names,
        "function": lambda network, name, images: FUNCTIONS[name](network),
    },
)
