"""BatchNorm statistics of a network, measured anew on training images."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from pdiff_ray.data.dataset import Dataset
from pdiff_ray.networks.partition import call_with

IMAGES, BATCH = 2048, 128
START = {"running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}


def fresh_statistics(network: nn.Module) -> dict[str, Tensor]:
    """Returns what the running statistics of all BatchNorm layers start from, by name."""
    return {
        f"{name}.{kind}": torch.full_like(getattr(layer, kind), value)
        for name, layer in network.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        for kind, value in START.items()
        if getattr(layer, kind) is not None
    }


def recalibrate(network: nn.Module, tensors: Mapping[str, Tensor], dataset: Dataset) -> dict[str, Tensor]:
    """Returns the running statistics of a network with other tensors: averages over the first training images.

    Args:
        network: is in eval mode, and stays as it is.
        tensors: replace the network's own, by name.
    """
    statistics = fresh_statistics(network)
    if not statistics:
        return {}
    device = next(network.parameters()).device
    with contextlib.ExitStack() as restored:
        for layer in {name.rpartition(".")[0]: None for name in statistics}:
            module = network.get_submodule(layer)
            restored.callback(setattr, module, "momentum", module.momentum)
            restored.callback(module.train, module.training)
            module.momentum = None  # type: ignore[assignment]  # a cumulative average
            module.train()
        # Batches of a fixed size, so that no chunk size changes a result, and equal ones, as each counts the same.
        stop = min(IMAGES, len(dataset.train))
        batches = np.array_split(np.arange(stop), math.ceil(stop / BATCH))
        for images, _ in dataset.train.batches(batches):
            # The updated statistics are written into the tensors that are given.
            call_with(network, {**tensors, **statistics}, dataset.prepare(images, device))
    return statistics
