"""Accuracy, loss and wrong predictions of networks that differ in a subset of their parameters.

Shapes: n networks, D values in the subset, B images of a batch, T test images, M classes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from pdiff_ray.data import Dataset
from pdiff_ray.split import SplitNetwork, split_network
from pdiff_ray.store import Record
from pdiff_ray.subset import Subset

JUDGED_SPLITS = ("selection", "validation", "test")
CALIBRATION_IMAGES, CALIBRATION_BATCH = 2048, 128
EXAMPLE_IMAGES = 4  # to trace a network with


@dataclass(frozen=True)
class Judgement:
    """One network on some of the splits; the fields are those of `store.Record`."""

    train_accuracy: float | None = None
    train_loss: float | None = None
    validation_accuracy: float | None = None
    validation_loss: float | None = None
    test_accuracy: float | None = None
    test_loss: float | None = None
    wrong: bytes | None = None


class Judge:
    """Evaluates networks that share everything but a subset.

    Args:
        network: has the shared parameters; moved to `device`.
        batchnorm: "recalibrated" measures BatchNorm's running statistics anew for each network, on training images;
            the other policies use the network's, or those in the vector.
        batch_size: images per forward pass.
    """

    def __init__(
        self,
        network: nn.Module,
        subset: Subset,
        dataset: Dataset,
        device: torch.device,
        batchnorm: str = "frozen",
        batch_size: int = 500,
    ) -> None:
        self.network, self.subset, self.dataset, self.device = network.to(device), subset, dataset, device
        self.batchnorm, self.batch_size = batchnorm, batch_size

    @functools.cached_property
    def split(self) -> SplitNetwork:
        """The network, split at what differs."""
        names = set(self.subset.names)
        if self.batchnorm == "recalibrated":
            names |= {f"{layer}.{kind}" for layer, statistics in self._statistics().items() for kind in statistics}
        images, _ = next(self.dataset.train.batches([np.arange(EXAMPLE_IMAGES)]))
        return split_network(self.network.eval(), sorted(names), self.dataset.prepare(images, self.device))

    def judge(self, vectors: Tensor, splits: Sequence[str] = JUDGED_SPLITS) -> list[Judgement]:
        """Judges vectors (n, D) on each of `splits` (of `JUDGED_SPLITS`).

        Every image chunk passes once through what all networks share, and then through what is each one's own.
        """
        network = self.split  # tracing fails in inference mode
        self.network.eval()
        with torch.inference_mode():
            return self._judge(network, [self._tensors(vector) for vector in vectors.to(self.device)], splits)

    def _judge(self, network: SplitNetwork, tensors: list[dict[str, Tensor]], splits: Sequence[str]) -> list[Judgement]:
        results: list[dict[str, float | bytes]] = [{} for _ in tensors]
        for name in splits:
            split = getattr(self.dataset, name)
            losses = torch.zeros(len(tensors), dtype=torch.float64, device=self.device)
            wrong: list[list[Tensor]] = [[] for _ in tensors]
            for images, labels in split.in_order(self.batch_size):
                frontier = network.prefix(self.dataset.prepare(images, self.device))
                labels = labels.to(self.device)
                for index, own in enumerate(tensors):
                    logits = network.suffix(frontier, own).float()
                    losses[index] += functional.cross_entropy(logits, labels, reduction="sum").double()
                    wrong[index].append(logits.argmax(1) != labels)
            column = "train" if name == "selection" else name
            for index, result in enumerate(results):
                misses = torch.cat(wrong[index]).cpu().numpy()
                result[f"{column}_accuracy"] = 1 - float(misses.mean())
                result[f"{column}_loss"] = losses[index].item() / len(split)
                if name == "test":
                    result["wrong"] = np.packbits(misses).tobytes()
        return [Judgement(**result) for result in results]  # type: ignore[arg-type]

    def _tensors(self, vector: Tensor) -> dict[str, Tensor]:
        tensors = self.subset.unflatten(vector)
        if self.batchnorm == "recalibrated":
            tensors |= self._recalibrated(tensors)
        return tensors

    def _statistics(self) -> dict[str, dict[str, float]]:
        """The running statistics of each BatchNorm layer, and what they start from."""
        start = {"running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}
        return {
            name: {kind: value for kind, value in start.items() if getattr(module, kind) is not None}
            for name, module in self.network.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        }

    def _recalibrated(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Running statistics of the network with `tensors`: averages over the first training images."""
        statistics = self._statistics()
        layers: list[Any] = [self.network.get_submodule(name) for name in statistics]
        fresh = {
            f"{name}.{kind}": torch.full_like(getattr(layer, kind), value)
            for layer, (name, start) in zip(layers, statistics.items(), strict=True)
            for kind, value in start.items()
        }
        with contextlib.ExitStack() as restored:
            for layer in layers:
                restored.callback(setattr, layer, "momentum", layer.momentum)
                restored.callback(layer.train, layer.training)
                layer.momentum = None  # cumulative average
                layer.train()
            # Batches of a fixed size, so that `batch_size` changes no result, and equal ones, as each counts the same.
            stop = min(CALIBRATION_IMAGES, len(self.dataset.train))
            batches = np.array_split(np.arange(stop), math.ceil(stop / CALIBRATION_BATCH))
            for images, _ in self.dataset.train.batches(batches):
                # functional_call writes the updated statistics into the tensors that it is given.
                functional_call(self.network, {**tensors, **fresh}, (self.dataset.prepare(images, self.device),))
        return fresh


def judged(record: Record, judgement: Judgement) -> Record:
    """The record with the judgement's fields."""
    return replace(record, **{name: value for name, value in asdict(judgement).items() if value is not None})
