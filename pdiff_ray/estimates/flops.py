"""What networks and generators compute: operations of a forward pass, counted by the formulas of torch's FLOP counter.

Shapes: D values of the subset, K members.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pdiff_ray.config import schema
from pdiff_ray.data.sources import DataInfo
from pdiff_ray.generators.autoencoder import Autoencoder, AutoencoderSettings
from pdiff_ray.generators.diffusion import Diffusion, DiffusionSettings
from pdiff_ray.generators.latent_diffusion import LatentDiffusionSettings
from pdiff_ray.networks.build import build_network, check_network
from pdiff_ray.networks.subset import Subset, resolve

IMAGES = 2  # of a counted pass: the fewest that BatchNorm trains on


@dataclass(frozen=True)
class Counts:
    """What a forward pass of a network takes per image.

    Attributes:
        subset: the tensors that are generated.
        parameters: how many numbers all parameters of the network are.
        flops: of all operations.
        suffix_flops: of those that generated tensors reach.
        bytes: of the outputs of all operations; training keeps no more of them.
    """

    subset: Subset
    parameters: int
    flops: float
    suffix_flops: float
    bytes: float

    @property
    def shared(self) -> float:
        """The part of the FLOPs, 0 to 1, that is the same for networks that differ in the subset alone.

        `split_network` finds no more, and less where it cannot take a network apart.
        """
        return 1 - self.suffix_flops / max(1, self.flops)


class Operations(TorchDispatchMode):
    """Adds up FLOPs, apart for operations that read a tensor with gradients (True) and others (False); and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[bool] = Counter()
        self.bytes = 0  # of outputs that are new

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if formula := flop_registry.get(func.overloadpacket):
            reached = any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves((args, kwargs)))
            self.flops[reached] += formula(*args, **kwargs, out_val=output)
        if not func.is_view and not func._schema.is_mutable:
            self.bytes += sum(t.nbytes for t in tree_leaves(output) if isinstance(t, Tensor))
        return output


def count(config: schema.Network, info: DataInfo, zoo: schema.Zoo) -> Counts:
    """Counts what a network takes per image of `info`, for the subset of `zoo`; on the meta device if it allows that.

    Raises:
        ConfigError: the network cannot be built, cannot take such images, or has no such subset.
    """
    try:
        with torch.device("meta"):
            return _count(build_network(config.model_copy(update={"pretrained": False}), info), info, zoo)
    except Exception:  # it reads values, or something is wrong with it, of which the second try tells
        return _count(check_network(config, info), info, zoo)


def _count(network: nn.Module, info: DataInfo, zoo: schema.Zoo) -> Counts:
    subset = resolve(zoo.subset, network, zoo.batchnorm)
    generated = set(subset.names)
    if (
        zoo.batchnorm == "recalibrated"
    ):  # statistics differ too; they cannot have gradients, but their layers' weights can
        norms = nn.modules.batchnorm._BatchNorm
        generated |= {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, norms)}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in generated)
    network.train()  # in eval mode attention may be one operation without a formula
    with Operations() as found:
        network(torch.zeros(IMAGES, info.channels, info.image_size, info.image_size))
    parameters = sum(p.numel() for p in network.parameters())
    flops, suffix_flops = found.flops.total() / IMAGES, found.flops[True] / IMAGES
    return Counts(subset, parameters, flops, suffix_flops, found.bytes / IMAGES)


def generator_flops(
    settings: schema.Generator, values: int, members: int, sampling: schema.Sampling
) -> tuple[float, float, float]:
    """Counts what a generator takes that learns vectors (K, D).

    Args:
        values, members: D and K.

    Returns:
        FLOPs of fitting and of drawing all samples, and bytes that fitting holds beside the vectors.
    """
    if not isinstance(settings, LatentDiffusionSettings):
        return 2.0 * members * values, 2.0 * sampling.samples * members * values, 4.0 * members * values
    ae, diffusion = settings.autoencoder, settings.diffusion
    any_steps = [section.model_copy(update={"steps": 1}) for section in (ae, diffusion)]
    coded, kept, parameters, denoised = _passes(*any_steps, values)
    rows = min(ae.batch_size, members)
    trained = ae.steps * rows * coded + diffusion.steps * min(diffusion.batch_size, members) * denoised
    drawn = sampling.samples * ((sampling.steps or diffusion.num_timesteps) * denoised + coded / 2)
    # Of values, gradients, and an optimizer's two moments, and of what the backward pass of a batch reads.
    return 3 * trained + members * coded, drawn, 16 * parameters + rows * kept


@functools.cache
def _passes(ae: AutoencoderSettings, diffusion: DiffusionSettings, values: int) -> tuple[int, int, int, int]:
    """Returns FLOPs and bytes of a vector's way to its latent and back, the parameters, and FLOPs of denoising once."""
    with torch.device("meta"):
        model, denoiser = Autoencoder(ae, values), Diffusion(diffusion, ae.latent_dim).denoiser
        with Operations() as coding:
            model.decode(model.encode(torch.zeros(1, values)))
        with Operations() as denoising:
            denoiser(torch.zeros(1, ae.latent_dim), denoiser.embedding(torch.zeros(1)))
    parameters = sum(p.numel() for p in model.parameters())
    return coding.flops.total(), coding.bytes, parameters, denoising.flops.total()
