"""Accuracy, loss and wrong predictions of networks that differ in a subset of their parameters.

Shapes: n networks, D values in the subset, B images of a batch, T test images, M classes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from pdiff_ray.data import Dataset
from pdiff_ray.store import Record
from pdiff_ray.subset import Subset

JUDGED_SPLITS = ("selection", "validation", "test")
CALIBRATION_IMAGES, CALIBRATION_BATCH = 2048, 128


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

    @torch.inference_mode()
    def judge(self, vectors: Tensor, splits: Sequence[str] = JUDGED_SPLITS) -> list[Judgement]:
        """Judges vectors (n, D) on each of `splits` (of `JUDGED_SPLITS`).

        Every image chunk is read once and passed through all n networks.
        """
        self.network.eval()
        tensors = [self._tensors(vector) for vector in vectors.to(self.device)]
        results: list[dict[str, float | bytes]] = [{} for _ in tensors]
        for name in splits:
            split = getattr(self.dataset, name)
            losses = torch.zeros(len(tensors), dtype=torch.float64, device=self.device)
            wrong: list[list[Tensor]] = [[] for _ in tensors]
            for images, labels in split.in_order(self.batch_size):
                images, labels = self.dataset.prepare(images, self.device), labels.to(self.device)
                for index, parameters in enumerate(tensors):
                    logits = functional_call(self.network, parameters, (images,)).float()
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

    def _recalibrated(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Running statistics of the network with `tensors`: averages over the first training images."""
        layers = {n: m for n, m in self.network.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        fresh = {
            f"{name}.{kind}": torch.full_like(getattr(layer, kind), value)
            for name, layer in layers.items()
            for kind, value in (("running_mean", 0.0), ("running_var", 1.0), ("num_batches_tracked", 0))
            if getattr(layer, kind) is not None
        }
        with contextlib.ExitStack() as restored:
            for layer in layers.values():
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
    from dataclasses import asdict, replace

    return replace(record, **{name: value for name, value in asdict(judgement).items() if value is not None})
