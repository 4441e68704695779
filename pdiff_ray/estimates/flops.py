"""What networks compute and keep in a forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pdiff_ray.common.operations import Operations
from pdiff_ray.config import schema
from pdiff_ray.data.sources import DataInfo
from pdiff_ray.networks.build import blank_images, build_network, check_network
from pdiff_ray.networks.partition import runs_whole
from pdiff_ray.networks.subset import Subset, norm_layers, resolve


@dataclass(frozen=True)
class Counts:
    """What a forward pass of a network takes per image.

    Attributes:
        subset: the tensors that are generated.
        layers: those that a rule has counted, in its order; of each those beside it, on parallel branches.
        parameters: how many numbers all parameters of the network are.
        flops: of all operations.
        suffix_flops: of those that generated tensors reach; of all, if the network runs whole.
        bytes: of the outputs of all operations; training keeps no more of them.
        whole: why the network runs whole; None if it is cut, or that was not looked into.
    """

    subset: Subset
    layers: dict[str, list[str]]
    parameters: int
    flops: float
    suffix_flops: float
    bytes: float
    whole: str | None

    @property
    def shared(self) -> float:
        """The part of the FLOPs, 0 to 1, that is the same for networks that differ in the subset alone.

        `partition_network` finds no more, and less where it cannot take a network apart.
        """
        return 1 - self.suffix_flops / max(1, self.flops)


def count(config: schema.Network, info: DataInfo, zoo: schema.Zoo, trace: bool = False) -> Counts:
    """Counts what a network takes per image of `info`, for the subset of `zoo`; on the meta device if it allows that.

    Args:
        trace: finds out whether the network can be cut, which takes seconds.

    Raises:
        ConfigError: the network cannot be built, cannot take such images, or has no such subset.
    """
    try:
        with torch.device("meta"):
            return _count(build_network(config.model_copy(update={"pretrained": False}), info), info, zoo, trace)
    except Exception:  # it reads values, or something is wrong with it, of which the second try tells
        return _count(check_network(config, info), info, zoo, trace)


def _count(network: nn.Module, info: DataInfo, zoo: schema.Zoo, trace: bool) -> Counts:
    images = blank_images(info)
    subset = resolve(zoo.subset, network, zoo.batchnorm, images)
    layers = norm_layers(network, images) if zoo.subset.counts_layers else {}
    layers = {name: beside for name, beside in layers.items() if name in subset.layers}
    generated = set(subset.names)
    if zoo.batchnorm == "recalibrated":  # statistics differ too; they have no gradients, but their layers' weights can
        norms = nn.modules.batchnorm._BatchNorm
        generated |= {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, norms)}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in generated)
    network.train()  # in eval mode attention may be one operation without a formula
    with Operations() as found:
        network(images)
    total, suffix, kept = (number / len(images) for number in (found.flops.total(), found.flops[True], found.bytes))
    whole = runs_whole(network, images) if trace and suffix < total else None
    if whole and images.is_meta:
        raise ValueError(whole)  # it may be for want of values
    parameters = sum(p.numel() for p in network.parameters())
    return Counts(subset, layers, parameters, total, total if whole else suffix, kept, whole)
