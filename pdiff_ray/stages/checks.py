"""What makes a network unfit for the stages to come, found before anything is trained.

What is reported of a network holds in whatever batches it is judged, and for the file that is exported of it, only if
its logits depend on nothing but the image and the tensors that are stored.

Shapes: B images of a batch, C channels, S the edge in pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config.schema import Experiment
from pdiff_ray.data.sources import describe
from pdiff_ray.evaluation.recalibration import START
from pdiff_ray.networks.build import build_network, check_network, load_tensors
from pdiff_ray.networks.partition import call_with, perturbed
from pdiff_ray.networks.subset import Subset, first_names
from pdiff_ray.stages.alignment import symmetries_of
from pdiff_ray.stages.exports import same_logits, text_of
from pdiff_ray.stages.zoo import subset_of
from pdiff_ray.storage.trees import load_tree, save_tree

IMAGES = 3
BatchNorm = nn.modules.batchnorm._BatchNorm


def checked_subset(experiment: Experiment) -> Subset:
    """Returns the subset of the experiment's network, after finding the network fit for all stages.

    Raises:
        ConfigError: the network cannot be built, trained, aligned, judged or exported, or the rule does not fit it.
    """
    info, config = describe(experiment.data), experiment.network.model_copy(update={"pretrained": False})
    network = check_network(config, info).eval()
    fresh, subset = build_network(config, info, "anew").eval(), subset_of(experiment, network)
    if experiment.alignment.method != "none":
        symmetries_of(experiment, network, subset)
    images = torch.randn(
        IMAGES, info.channels, info.image_size, info.image_size, generator=torch.Generator().manual_seed(0)
    )
    try:
        if experiment.zoo.regime == "independent" and not experiment.zoo.imported:
            _check_shared(network, fresh, subset)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            check_function(network, fresh, images)
    except Exception as error:  # the network's own code may raise anything
        raise ConfigError(f"network.name: {config.name} {text_of(error)}") from None
    return subset


def check_function(network: nn.Module, fresh: nn.Module, images: Tensor) -> None:
    """Compares logits of two networks in eval mode, with other parameters than theirs.

    They must be the same in a second pass, for an image among other images or alone, and in a network that was built
    anew and has loaded what is stored of the first.

    Args:
        network: as it is after a step of training; its running statistics become those of the images.
        fresh: the same network from another seed; it is given the first one's tensors.
        images: (B >= 3, C, S, S).

    Raises:
        ValueError: what is wrong, and the remedy, as a sentence about the network.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    random = torch.Generator().manual_seed(1)
    values = {}
    for name, parameter in network.named_parameters():  # that lie in memory as theirs do, so that logits are equal bits
        values[name] = parameter.detach().clone().copy_(_trained(name, parameter.detach(), random))
    for layer in network.modules():
        if isinstance(layer, BatchNorm):
            layer.momentum = 1.0
    network.train()
    call_with(network, values, images)  # gives statistics with which signals reach the logits, as training does
    network.eval()
    try:
        _check_batches(network, values, images)
    except ValueError as found:  # which may be rounding that many layers have magnified
        doubles = {name: value.double() if value.is_floating_point() else value for name, value in values.items()}
        try:
            _check_batches(copy.deepcopy(network).double(), doubles, images.double())
        except Exception:  # it is so in double precision, or there is none of it
            raise found from None
    expected = call_with(network, values, images)
    names = first_names(network)
    stored = {**network.state_dict(), **{name: values[first] for name, first in names.items() if first in values}}
    try:
        content = save_tree(stored)
    except KeyError as error:
        raise ValueError(
            f"has tensors of type {error}, which safetensors files cannot hold; use another type"
        ) from None
    load_tensors(fresh, load_tree(content))
    if not same_logits(fresh(images), expected):
        ours, theirs = _unsaved(network), _unsaved(fresh)
        differ = [name for name in ours if name not in theirs or not _equal(ours[name], theirs[name])]
        raise ValueError(
            "gives other logits when it is built anew and loads its own state dict, so that an exported file would be "
            f"another network{_named(differ)}; what is random or learned has to be a parameter or a persistent buffer, "
            "and what is tied one Parameter under both names"
        )


def _check_batches(network: nn.Module, values: dict[str, Tensor], images: Tensor) -> None:
    """Raises ValueError if logits differ in a second pass, or with the other images of a batch."""
    expected = call_with(network, values, images)
    if not same_logits(call_with(network, values, images), expected):
        raise ValueError(
            "gives the same images other logits in a second pass, in eval mode; leave dropout and noise to training"
        )
    found = "gives an image other logits among other images"
    try:
        some = (slice(1, 2), slice(1, None))
        alone = all(same_logits(call_with(network, values, images[s]), expected[s]) for s in some)
    except Exception as error:
        alone, found = False, f"cannot take one image alone ({text_of(error)})"
    if not alone:
        layers = ((name, layer) for name, layer in network.named_modules() if isinstance(layer, BatchNorm))
        blamed = [name for name, layer in layers if layer.training or layer.running_mean is None]
        raise ValueError(
            f"{found}, in eval mode, so that accuracies would depend on how many are judged at a time"
            f"{_named(blamed)}; let BatchNorm keep and use running statistics, and nothing mix the images of a batch"
        )


def _check_shared(network: nn.Module, fresh: nn.Module, subset: Subset) -> None:
    """Raises ValueError if networks trained apart differ in more than the subset and BatchNorm's statistics."""
    stored = {name for entry in subset.entries for name in entry.names}
    ours, theirs = network.state_dict(), fresh.state_dict()
    others = [name for name in ours if name not in stored and name.rpartition(".")[2] not in START]
    if differ := [name for name in others if not _equal(ours[name], theirs[name])]:
        raise ValueError(
            f"has tensors outside of zoo.subset that its seed or its training decides{_named(differ)}, which networks "
            "of zoo.regime independent would not share; make them constant, or choose branches"
        )


def _unsaved(network: nn.Module) -> dict[str, Tensor]:
    """Returns tensors that are in no state dict, buffers and plain attributes, by name."""
    return {
        f"{prefix}.{name}".removeprefix("."): tensor
        for prefix, module in network.named_modules()
        for name, tensor in {**vars(module), **module._buffers}.items()
        if isinstance(tensor, Tensor) and (name in module._non_persistent_buffers_set or name in vars(module))
    }


def _trained(name: str, parameter: Tensor, random: torch.Generator) -> Tensor:
    """Returns other values of a parameter, and no small ones for scales that begin at or near zero."""
    if (
        parameter.ndim == 1
        and parameter.is_floating_point()
        and not name.endswith("bias")
        and parameter.abs().max() < 0.1
    ):
        return torch.rand(parameter.shape, generator=random).to(parameter.dtype) + 0.5
    return perturbed(parameter, random)


def _equal(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and torch.equal(tensor, other)


def _named(names: Iterable[str]) -> str:
    first = list(names)[:4]
    return f" ({', '.join(first)})" if first else ""
