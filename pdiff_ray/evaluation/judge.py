"""Accuracy, loss and wrong predictions of networks that differ in a subset of their parameters.

Shapes: n networks, D values in the subset, B images of a batch, T test images, M classes.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pdiff_ray.common.devices import autocast
from pdiff_ray.data.dataset import Dataset
from pdiff_ray.evaluation.memory import Capacity
from pdiff_ray.evaluation.recalibration import fresh_statistics, recalibrate
from pdiff_ray.networks.frontier import Kept, keep
from pdiff_ray.networks.partition import PartitionedNetwork, partition_network
from pdiff_ray.networks.subset import Subset, first_names
from pdiff_ray.storage.parameters import Record, class_type
from pdiff_ray.storage.trees import save_tree

JUDGED_SPLITS = ("selection", "validation", "test")
EXAMPLE_IMAGES = 4  # to trace a network with


@dataclass(frozen=True)
class Judgement:
    """What is found of one network on some of the splits; the fields are those of `Record`."""

    train_accuracy: float | None = None
    train_loss: float | None = None
    validation_accuracy: float | None = None
    validation_loss: float | None = None
    test_accuracy: float | None = None
    test_loss: float | None = None
    wrong: bytes | None = None
    wrong_classes: bytes | None = None
    statistics: bytes | None = None


@dataclass
class Seconds:
    """The time that judging took, and would have taken with a prefix computed for each network, as it was measured."""

    prefix: float = 0.0
    suffix: float = 0.0
    unshared: float = 0.0


class Judge:
    """An examiner of networks that share everything but a subset.

    Args:
        network: has the shared parameters; it is moved to `device`.
        batchnorm: "recalibrated" measures BatchNorm's running statistics anew for each network, on training images;
            the other policies use the network's, or those in the vector.
        batch_size: images per forward pass; default: as memory allows.
        precision: "bfloat16" for autocast.
        cache: folder of this node where frontiers are kept; by default they are computed for every call.
        networks_per_program: how many networks' suffixes run as one program; see `Capacity`.
    """

    def __init__(
        self,
        network: nn.Module,
        subset: Subset,
        dataset: Dataset,
        device: torch.device,
        batchnorm: str = "frozen",
        batch_size: int | None = None,
        precision: str = "float32",
        cache: Path | None = None,
        networks_per_program: int | None = None,
    ) -> None:
        self.network, self.subset, self.dataset, self.device = network.to(device), subset, dataset, device
        self.batchnorm, self.precision, self.cache = batchnorm, precision, cache
        self._at_a_time = batch_size, networks_per_program
        self._kept: dict[str | tuple[str, float], Kept] = {}
        self._others: dict[str, Judge] = {}

    def at(self, precision: str) -> Judge:
        """Returns the judge of the same networks in a precision."""
        if precision == self.precision:
            return self
        if precision not in self._others:
            batch_size, networks = self._at_a_time
            about = (self.subset, self.dataset, self.device, self.batchnorm, batch_size)
            self._others[precision] = Judge(self.network, *about, precision, self.cache, networks)
        return self._others[precision]

    @functools.cached_property
    def partitioned(self) -> PartitionedNetwork:
        """The network in two parts, cut where the generated tensors begin to matter."""
        names = set(self.subset.names)
        if self.batchnorm == "recalibrated":
            names |= fresh_statistics(self.network).keys()
        with autocast(self.device, self.precision):
            return partition_network(self.network.eval(), sorted(names), self._examples)

    @functools.cached_property
    def capacity(self) -> Capacity:
        """How many images and networks are judged at a time."""
        state = dict([*self.network.named_parameters(remove_duplicate=False), *self.network.named_buffers()])
        own = {name: state[name].detach() for name in self.partitioned.names}
        return Capacity(self.partitioned, own, self._examples, self.precision, *self._at_a_time)

    @functools.cached_property
    def _examples(self) -> Tensor:
        images, _ = next(self.dataset.train.batches([np.arange(EXAMPLE_IMAGES)]))
        return self.dataset.prepare(images, self.device)

    def frontier(self, name: str, reads: float = math.inf) -> Kept:
        """Returns the frontier of a split of the data set, kept if it is worth it; see `frontier.keep`."""
        if self.cache is None:
            return Kept(reason="no cache is given")
        found = self._kept.get(name) or self._kept.get((name, reads))
        if found is None:
            network, cache, split = self.partitioned, self.cache, getattr(self.dataset, name)
            found = self.capacity.with_less(
                lambda: keep(network, self.dataset, split, self.device, cache, self.capacity.images, reads)
            )
            self._kept[(name, reads) if found.frontier is None else name] = found
        return found

    def judge(self, vectors: Tensor, splits: Sequence[str] = JUDGED_SPLITS) -> list[Judgement]:
        """Judges vectors (n, D) on each of `splits` (of `JUDGED_SPLITS`).

        Every image chunk passes once through what all networks share, and then through what is each one's own. When
        memory does not suffice, less is taken at a time, from then on.

        Raises:
            PdiffError: memory does not suffice for one image of one network.
        """
        return self.timed(vectors, splits)[0]

    def timed(self, vectors: Tensor, splits: Sequence[str] = JUDGED_SPLITS) -> tuple[list[Judgement], Seconds]:
        """Judges vectors as `judge` does, and returns the time that it took as well."""
        return self.capacity.with_less(lambda: self._judgements(vectors, splits))

    def predictions(self, vectors: Tensor) -> Tensor:
        """Returns the classes (n, T) that the networks of vectors (n, D) predict; memory is used as in `judge`."""
        return self.capacity.with_less(lambda: self._classes(vectors))

    def _judgements(self, vectors: Tensor, splits: Sequence[str]) -> tuple[list[Judgement], Seconds]:
        results: list[dict[str, float | bytes]] = [{} for _ in vectors]
        with self._inference(splits) as seconds:
            tensors = [self._tensors(vector) for vector in vectors.to(self.device)]
            if self.batchnorm == "recalibrated":
                measured = fresh_statistics(self.network).keys()
                names = {name: first for name, first in first_names(self.network).items() if first in measured}
                for own, result in zip(tensors, results, strict=True):
                    result["statistics"] = save_tree({name: own[first] for name, first in names.items()})
            for name in splits:
                losses = torch.zeros(len(tensors), dtype=torch.float64, device=self.device)
                # In one piece: small tensors kept between the large ones of a chunk would leave holes in memory.
                shape = (len(tensors), len(getattr(self.dataset, name)))
                wrong = torch.empty(shape, dtype=torch.bool, device=self.device)
                classes = torch.empty(shape if name == "test" else 0, dtype=torch.int32, device=self.device)
                seen = [0] * len(tensors)
                for index, logits, labels in self._logits(tensors, name, seconds):
                    losses[index] += functional.cross_entropy(logits, labels, reduction="sum").double()
                    rows = slice(seen[index], seen[index] + len(labels))
                    predicted = logits.argmax(1)
                    torch.ne(predicted, labels, out=wrong[index, rows])
                    if name == "test":
                        classes[index, rows] = predicted.int()
                    seen[index] = rows.stop
                column = "train" if name == "selection" else name
                for index, result in enumerate(results):
                    misses = wrong[index].cpu().numpy()
                    result[f"{column}_accuracy"] = 1 - float(misses.mean())
                    result[f"{column}_loss"] = losses[index].item() / len(misses)
                    if name == "test":
                        result["wrong"] = np.packbits(misses).tobytes()
                        taken_for = classes[index][wrong[index]].cpu().numpy()
                        result["wrong_classes"] = taken_for.astype(class_type(self.dataset.info.num_classes)).tobytes()
        return [Judgement(**result) for result in results], seconds  # type: ignore[arg-type]

    def _classes(self, vectors: Tensor) -> Tensor:
        predicted: list[list[Tensor]] = [[] for _ in vectors]
        with self._inference(["test"]) as seconds:
            tensors = [self._tensors(vector) for vector in vectors.to(self.device)]
            for index, logits, _ in self._logits(tensors, "test", seconds):
                predicted[index].append(logits.argmax(1))
            return torch.stack([torch.cat(parts) for parts in predicted]).cpu()

    @contextlib.contextmanager
    def _inference(self, splits: Sequence[str]) -> Iterator[Seconds]:
        """Enters inference mode, after what must be made before it: tracing fails in it, and training reads frontiers.

        Yields the time that this took, to which judging adds its own.
        """
        self.network.eval()
        started = self._now()
        for name in splits:
            self.frontier(name)
        seconds = Seconds(prefix=self._now() - started)
        with torch.inference_mode(), autocast(self.device, self.precision):
            yield seconds

    def _tensors(self, vector: Tensor) -> dict[str, Tensor]:
        tensors = self.subset.unflatten(vector)
        if self.batchnorm == "recalibrated":
            tensors |= recalibrate(self.network, tensors, self.dataset)
        return tensors

    def _logits(
        self, tensors: Sequence[dict[str, Tensor]], name: str, seconds: Seconds
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields a network's number, logits (B, M) and labels (B,), for each chunk of a split and each network."""
        kept, prefix_s, suffix_s = self.frontier(name).frontier, 0.0, 0.0
        together = self.capacity.networks
        suffix = self.partitioned.suffix if together == 1 else torch.vmap(self.partitioned.suffix, in_dims=(None, 0))
        programs = tensors if together == 1 else self._stacked(tensors, together)
        images = self.capacity.images
        chunks = self._computed(name, images) if kept is None else kept.in_order(images)
        started = self._now()
        for frontier, labels in chunks:
            between = self._now()
            index = 0
            for program in programs:
                logits = suffix(frontier, program)
                for own in logits if together > 1 else [logits]:
                    yield index, own.float(), labels
                    index += 1
            prefix_s, suffix_s = prefix_s + between - started, suffix_s + self._now() - between
            started = self._now()
        seconds.prefix += prefix_s
        seconds.suffix += suffix_s
        seconds.unshared += suffix_s + len(tensors) * (prefix_s if kept is None else kept.seconds)

    def _computed(self, name: str, batch_size: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """Yields the frontier and labels (B,) of each chunk of a split, computed from its images."""
        for images, labels in getattr(self.dataset, name).in_order(batch_size):
            yield self.partitioned.prefix(self.dataset.prepare(images, self.device)), labels.to(self.device)

    def _stacked(self, tensors: Sequence[dict[str, Tensor]], count: int) -> list[dict[str, Tensor]]:
        """Returns the tensors of networks, so many stacked at a time."""
        groups = (tensors[start : start + count] for start in range(0, len(tensors), count))
        return [
            {name: torch.stack([own[name] for own in group]) for name in self.partitioned.names} for group in groups
        ]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def judged(record: Record, judgement: Judgement) -> Record:
    """Returns the record with the judgement's fields."""
    return replace(record, **{name: value for name, value in asdict(judgement).items() if value is not None})
