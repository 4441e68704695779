"""Which parameters are generated: rules, resolved against a network into a subset that flattens and unflattens.

Shapes: D is the number of values in the subset; leading dimensions (...) are batch dimensions.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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
    """One tensor of a subset."""

    name: str
    shape: tuple[int, ...]
    offset: int
    kind: Literal["parameter", "buffer"]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


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
            ConfigError: a tensor is missing or has another shape.
        """
        for entry in self.entries:
            if entry.name not in tensors:
                raise ConfigError(f"{entry.name}: missing from the tensors{did_you_mean(entry.name, tensors)}")
            if tuple(tensors[entry.name].shape) != entry.shape:
                raise ConfigError(
                    f"{entry.name}: has shape {tuple(tensors[entry.name].shape)}, the subset wants {entry.shape}"
                )
        return torch.cat([tensors[entry.name].detach().reshape(-1).float() for entry in self.entries])

    def unflatten(self, vectors: Tensor) -> dict[str, Tensor]:
        """Cuts vectors (..., D) into tensors (..., *shape) by name, as views where possible.

        A generator may put a running variance below zero; it is clamped, since no network can use it.
        """
        if vectors.shape[-1] != self.size:
            raise ConfigError(f"vectors have {vectors.shape[-1]} values, the subset has {self.size}")
        tensors = {}
        for entry in self.entries:
            piece = vectors[..., entry.offset : entry.offset + entry.size]
            tensor = piece.reshape(*vectors.shape[:-1], *entry.shape)
            tensors[entry.name] = tensor.clamp(min=0) if entry.name.endswith("running_var") else tensor
        return tensors

    def to_json(self) -> str:
        return json.dumps([asdict(entry) for entry in self.entries])

    @staticmethod
    def from_json(text: str) -> Subset:
        return Subset(tuple(Entry(**{**item, "shape": tuple(item["shape"])}) for item in json.loads(text)))


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
    parameters = dict(network.named_parameters())
    name, value = rule.chosen
    try:
        chosen = set(RULES[name](network, value))
        if odd := chosen - set(parameters):
            raise ConfigError(f"{min(odd)!r} is no parameter of the network{did_you_mean(min(odd), parameters)}")
        if not chosen:
            raise ConfigError(f"{value!r} chooses no parameter of the network")
    except ConfigError as error:
        raise ConfigError(f"zoo.subset.{name}: {error}") from None
    tensors: dict[str, Tensor] = {name: p for name, p in parameters.items() if name in chosen}
    if batchnorm == "included":
        layers = {name.rpartition(".")[0] for name in chosen}
        for name, buffer in network.named_buffers():
            layer, _, leaf = name.rpartition(".")
            if (rule.all or layer in layers) and leaf in ("running_mean", "running_var"):
                tensors[name] = buffer
    entries, offset = [], 0
    for name, tensor in tensors.items():
        kind: Literal["parameter", "buffer"] = "parameter" if name in parameters else "buffer"
        entries.append(Entry(name, tuple(tensor.shape), offset, kind))
        offset += tensor.numel()
    return Subset(tuple(entries))


def _names(network: nn.Module, patterns: Sequence[str]) -> Iterator[str]:
    parameters = [name for name, _ in network.named_parameters()]
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
