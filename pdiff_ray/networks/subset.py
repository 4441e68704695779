"""Which parameters are generated: rules, resolved against a network into a subset that flattens and unflattens.

Shapes: D is the number of values in the subset; leading dimensions (...) are batch dimensions.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pdiff_ray.common.errors import ConfigError, did_you_mean
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
        """Tensors by name (a state dict will do) to one float32 vector (D,).

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
        """Vectors (..., D) to tensors (..., *shape) by name, as views where possible.

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
    """Names of the normalization layers with a weight, in order of definition."""
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, NORM_TYPES) and getattr(module, "weight", None) is not None
    ]


def main_path_norm_layers(network: nn.Module) -> list[str]:
    """`norm_layers` without those on projection shortcuts: a ResNet-18 has 17, and 'BN-layer 16 to 18' of the paper
    is `layer4.1.bn1` and `layer4.1.bn2`, the layers 16 and 17 counted from 1."""
    return [name for name in norm_layers(network) if not SHORTCUTS & set(name.split("."))]


def resolve(rule: SubsetRule, network: nn.Module, batchnorm: str = "frozen") -> Subset:
    """The subset of `network` that `rule` describes.

    Args:
        batchnorm: with "included", the running statistics of the subset's BatchNorm layers belong to it; with the rule
            "all", those of every layer.

    Raises:
        ConfigError: the rule matches nothing or goes beyond the network's layers.
    """
    parameters = dict(network.named_parameters())
    if rule.all:
        chosen = set(parameters)
    elif rule.names is not None:
        chosen = set()
        for pattern in rule.names:
            matched = fnmatch.filter(parameters, pattern)
            if not matched:
                near = did_you_mean(pattern, parameters) or f"; it has {_some(list(parameters))}"
                raise ConfigError(f"zoo.subset.names: {pattern!r} matches no parameter of the network{near}")
            chosen.update(matched)
    else:
        chosen = {f"{layer}.{kind}" for layer in _norm_rule(rule, network) for kind in ("weight", "bias")}
        chosen &= set(parameters)
    tensors: dict[str, tuple[Tensor, str]] = {
        name: (p, "parameter") for name, p in parameters.items() if name in chosen
    }
    if batchnorm == "included":
        layers = {name.rpartition(".")[0] for name in chosen}
        for name, buffer in network.named_buffers():
            layer, _, leaf = name.rpartition(".")
            if (rule.all or layer in layers) and leaf in ("running_mean", "running_var"):
                tensors[name] = (buffer, "buffer")
    entries, offset = [], 0
    for name, (tensor, kind) in tensors.items():
        entries.append(Entry(name, tuple(tensor.shape), offset, kind))  # type: ignore[arg-type]
        offset += tensor.numel()
    return Subset(tuple(entries))


def _norm_rule(rule: SubsetRule, network: nn.Module) -> list[str]:
    if rule.last_norm_layers is not None:
        layers, field = norm_layers(network), "last_norm_layers"
        start, stop = len(layers) - rule.last_norm_layers, len(layers)
        value: object = rule.last_norm_layers
    else:
        assert rule.norm_layers is not None
        layers, field, value = main_path_norm_layers(network), "norm_layers", list(rule.norm_layers)
        start, stop = rule.norm_layers[0] - 1, rule.norm_layers[1] - 1
    if not layers:
        raise ConfigError(f"zoo.subset.{field}: the network has no normalization layer; choose by names: instead")
    if start < 0 or stop > len(layers):
        raise ConfigError(
            f"zoo.subset.{field}: {value} goes beyond the network's {len(layers)} normalization layers"
            f"{' of the main path' if field == 'norm_layers' else ''}: {_some(layers)}"
        )
    return layers[start:stop]


def _some(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 8 else [*names[:4], "...", *names[-4:]])
