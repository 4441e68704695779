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

from pdiff_ray.common.errors import ConfigError, did_you_mean
from pdiff_ray.common.registry import Registry
from pdiff_ray.config.schema import SubsetRule

NORM_TYPES = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
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
        return Subset(
            tuple(
                Entry(**{**item, "shape": tuple(item["shape"]), "also": tuple(item.get("also", ()))})
                for item in json.loads(text)
            )
        )


def first_names(network: nn.Module) -> dict[str, str]:
    """Returns the first name of every parameter and buffer by each of its names, of which a tied tensor has several."""
    first: dict[int, str] = {}
    named = (*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def norm_layers(network: nn.Module) -> list[str]:
    """Returns the names of the normalization layers with a weight, in order of definition."""
    modules = network.named_modules()
    return [name for name, module in modules if isinstance(module, NORM_TYPES) and module.weight is not None]


def main_path_norm_layers(network: nn.Module) -> list[str]:
    """Returns `norm_layers` without those on projection shortcuts.

    A ResNet-18 has 17, and 'BN-layer 16 to 18' of the paper is `layer4.1.bn1` and `layer4.1.bn2`, the layers 16 and 17
    counted from 1.
    """
    return [name for name in norm_layers(network) if not SHORTCUTS & set(name.split("."))]


def resolve(rule: SubsetRule, network: nn.Module, batchnorm: str = "frozen") -> Subset:
    """Returns the subset of `network` that `rule` describes.

    Args:
        batchnorm: with "included", the running statistics of the subset's BatchNorm layers belong to it; with the rule
            "all", those of every layer.

    Raises:
        ConfigError: the rule matches nothing or goes beyond the network's layers.
    """
    parameters, first = dict(network.named_parameters()), first_names(network)
    rule_name, value = rule.chosen
    try:
        chosen = {first.get(found, found) for found in RULES[rule_name](network, value)}
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


def _names(network: nn.Module, patterns: Sequence[str]) -> Iterator[str]:
    parameters = [name for name, _ in network.named_parameters(remove_duplicate=False)]
    for pattern in patterns:
        matched = fnmatch.filter(parameters, pattern)
        if not matched:
            near = did_you_mean(pattern, parameters) or f"; it has {_some(parameters)}"
            raise ConfigError(f"{pattern!r} matches no parameter of the network{near}")
        yield from matched


def _last_norm_layers(network: nn.Module, count: int) -> list[str]:
    layers = norm_layers(network)
    return _weights_and_biases(network, layers, len(layers) - count, len(layers), count)


def _norm_layers(network: nn.Module, bounds: tuple[int, int]) -> list[str]:
    layers, (start, stop) = main_path_norm_layers(network), bounds
    return _weights_and_biases(network, layers, start - 1, stop - 1, list(bounds), " of the main path")


def _weights_and_biases(
    network: nn.Module, layers: list[str], start: int, stop: int, value: object, which: str = ""
) -> list[str]:
    if not layers:
        raise ConfigError("the network has no normalization layer; choose by names: instead")
    if start < 0 or stop > len(layers):
        raise ConfigError(
            f"{value} goes beyond the network's {len(layers)} normalization layers{which}: {_some(layers)}"
        )
    names = [f"{layer}.{kind}" for layer in layers[start:stop] for kind in ("weight", "bias")]
    parameters = dict(network.named_parameters())
    return [name for name in names if name in parameters]


# The user's own functions of a network, which give names of parameters.
FUNCTIONS: Registry[Callable[[nn.Module], Iterable[str]]] = Registry("function of a network", {})
# Functions of a network and of the value of a field of `SubsetRule`, which give names of parameters.
RULES: Registry[Callable[[nn.Module, Any], Iterable[str]]] = Registry(
    "subset rule",
    {
        "all": lambda network, value: dict(network.named_parameters()),
        "last_norm_layers": _last_norm_layers,
        "norm_layers": _norm_layers,
        "names": _names,
        "function": lambda network, name: FUNCTIONS[name](network),
    },
)


def _some(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 8 else [*names[:4], "...", *names[-4:]])
