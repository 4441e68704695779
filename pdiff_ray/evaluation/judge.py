"""Accuracy, loss and wrong predictions of networks that differ in a subset of their parameters.

Shapes: n networks, D values in the subset, B images of a batch, T test images, M classes.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pdiff_ray.common.devices import autocast, differentiable_in_vmap, enough_memory, free_bytes
from pdiff_ray.data.dataset import Dataset
from pdiff_ray.networks.frontier import Frontier, keep
from pdiff_ray.networks.split import SplitNetwork, split_network
from pdiff_ray.networks.subset import Subset
from pdiff_ray.storage.parameters import Record

JUDGED_SPLITS = ("selection", "validation", "test")
CALIBRATION_IMAGES, CALIBRATION_BATCH = 2048, 128
EXAMPLE_IMAGES = 4  # to trace a network with
# Images of a chunk. On a CPU their largest tensor stays in its caches, without which prefixes and wide suffixes take up
# to twice as long; an accelerator wants much work at a time.
CPU_IMAGES, CPU_TENSOR_BYTES = (32, 500), 16 * 2**20
GPU_IMAGES, GPU_SHARE = 4096, 0.25
FEW_IMAGES = 64  # with fewer at a time, networks are taken apart first where memory ends
LIVE_TENSORS = 4  # of the largest size, at a time: input, output, shortcut and workspace of a layer

T = TypeVar("T")


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


@dataclass
class Seconds:
    """Time spent judging, and what it would have been without sharing: a prefix for each network, as measured."""

    prefix: float = 0.0
    suffix: float = 0.0
    unshared: float = 0.0


class Judge:
    """Evaluates networks that share everything but a subset.

    Args:
        network: has the shared parameters; moved to `device`.
        batchnorm: "recalibrated" measures BatchNorm's running statistics anew for each network, on training images;
            the other policies use the network's, or those in the vector.
        batch_size: images per forward pass; default: by memory.
        precision: "bfloat16" for autocast.
        cache: folder of this node where frontiers are kept; default: they are computed for every call.
        stacked: networks whose suffixes run as one program; default: as many as fit on an accelerator, one on a CPU,
            where it takes up to four times as long (grouped convolutions).
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
        stacked: int | None = None,
    ) -> None:
        self.network, self.subset, self.dataset, self.device = network.to(device), subset, dataset, device
        self.batchnorm, self.precision, self.cache = batchnorm, precision, cache
        self.seconds = Seconds()
        self._batch_size, self._stacked = batch_size, stacked
        self._frontiers: dict[str, Frontier] = {}
        self._refusals: dict[tuple[str, float], str] = {}
        self._others: dict[str, Judge] = {}

    def at(self, precision: str) -> Judge:
        """The judge of the same networks in a precision."""
        if precision == self.precision:
            return self
        if precision not in self._others:
            about = (self.subset, self.dataset, self.device, self.batchnorm, self._batch_size)
            self._others[precision] = Judge(self.network, *about, precision, self.cache, self._stacked)
        return self._others[precision]

    @functools.cached_property
    def split(self) -> SplitNetwork:
        """The network, split at what differs."""
        names = set(self.subset.names)
        if self.batchnorm == "recalibrated":
            names |= {f"{layer}.{kind}" for layer, statistics in self._statistics().items() for kind in statistics}
        with autocast(self.device, self.precision):
            return split_network(self.network.eval(), sorted(names), self._examples)

    def frontier(self, name: str, reads: float = math.inf) -> Frontier | str:
        """The kept frontier of a split of the data set, or why there is none; see `frontier.keep`."""
        if self.cache is None:
            return "no cache is given"
        if name not in self._frontiers and (name, reads) not in self._refusals:
            network, cache, started = self.split, self.cache, self._now()
            split = getattr(self.dataset, name)
            kept = self._with_less(
                lambda: keep(network, self.dataset, split, self.device, cache, self.batch_size, reads)
            )
            if isinstance(kept, Frontier):
                self._frontiers[name] = kept
            else:
                self._refusals[name, reads] = kept
            self.seconds.prefix += self._now() - started
        return self._frontiers[name] if name in self._frontiers else self._refusals[name, reads]

    def judge(self, vectors: Tensor, splits: Sequence[str] = JUDGED_SPLITS) -> list[Judgement]:
        """Judges vectors (n, D) on each of `splits` (of `JUDGED_SPLITS`).

        Every image chunk passes once through what all networks share, and then through what is each one's own. Where
        memory does not suffice, less is taken at a time, from then on.

        Raises:
            PdiffError: it does not suffice for one image of one network.
        """
        return self._with_less(lambda: self._judgements(vectors, splits))

    def predictions(self, vectors: Tensor) -> Tensor:
        """The classes (n, T) that the networks of vectors (n, D) give to the test images; memory as in `judge`."""
        return self._with_less(lambda: self._classes(vectors))

    def _with_less(self, work: Callable[[], T]) -> T:
        """What `work` gives, with fewer images at a time where memory ends, then fewer networks, then single images."""
        with enough_memory("judging", "evaluation.stack"):
            while self.batch_size > 1 or self.stacked > 1:
                before = replace(self.seconds)
                with contextlib.suppress(torch.OutOfMemoryError):
                    return work()
                self.seconds = before
                if self.batch_size > FEW_IMAGES or self.stacked == 1:
                    self.batch_size //= 2
                else:
                    self.stacked //= 2
            return work()

    def _judgements(self, vectors: Tensor, splits: Sequence[str]) -> list[Judgement]:
        results: list[dict[str, float | bytes]] = [{} for _ in vectors]
        with self._inference(splits):
            tensors = self._tensors_of(vectors)
            for name in splits:
                losses = torch.zeros(len(tensors), dtype=torch.float64, device=self.device)
                # In one piece: small tensors kept between the large ones of a chunk would leave holes in memory.
                shape = (len(tensors), len(getattr(self.dataset, name)))
                wrong = torch.empty(shape, dtype=torch.bool, device=self.device)
                seen = [0] * len(tensors)
                for index, logits, labels in self._logits(tensors, name):
                    losses[index] += functional.cross_entropy(logits, labels, reduction="sum").double()
                    rows = slice(seen[index], seen[index] + len(labels))
                    torch.ne(logits.argmax(1), labels, out=wrong[index, rows])
                    seen[index] = rows.stop
                column = "train" if name == "selection" else name
                for index, result in enumerate(results):
                    misses = wrong[index].cpu().numpy()
                    result[f"{column}_accuracy"] = 1 - float(misses.mean())
                    result[f"{column}_loss"] = losses[index].item() / len(misses)
                    if name == "test":
                        result["wrong"] = np.packbits(misses).tobytes()
        return [Judgement(**result) for result in results]  # type: ignore[arg-type]

    def _classes(self, vectors: Tensor) -> Tensor:
        with self._inference(["test"]):
            predicted: list[list[Tensor]] = [[] for _ in vectors]
            for index, logits, _ in self._logits(self._tensors_of(vectors), "test"):
                predicted[index].append(logits.argmax(1))
            return torch.stack([torch.cat(parts) for parts in predicted]).cpu()

    @contextlib.contextmanager
    def _inference(self, splits: Sequence[str]) -> Iterator[None]:
        """Inference mode, and what must be made before it: tracing fails in it, and training may read the frontier."""
        self.network.eval()
        _ = (self.split, self.batch_size, self.stacked)
        for name in splits:
            self.frontier(name)
        with torch.inference_mode(), autocast(self.device, self.precision):
            yield

    def _logits(self, tensors: Sequence[dict[str, Tensor]], name: str) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The number of a network, its logits (B, M) and labels (B,), for each chunk of a split and each network."""
        kept, prefix_s, suffix_s = self.frontier(name), 0.0, 0.0
        programs = self._programs(tensors)
        started = self._now()
        for frontier, labels in self._chunks(name, kept):
            between = self._now()
            for index, logits in enumerate(self._suffixes(frontier, programs)):
                yield index, logits.float(), labels
            prefix_s, suffix_s = prefix_s + between - started, suffix_s + self._now() - between
            started = self._now()
        self.seconds.prefix += prefix_s
        self.seconds.suffix += suffix_s
        self.seconds.unshared += suffix_s + len(tensors) * (kept.seconds if isinstance(kept, Frontier) else prefix_s)

    def _chunks(self, name: str, kept: Frontier | str) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """Frontier and labels (B,) of each chunk of a split."""
        if isinstance(kept, Frontier):
            for start in range(0, len(kept), self.batch_size):
                yield kept.batch(slice(start, start + self.batch_size))
        else:
            for images, labels in getattr(self.dataset, name).in_order(self.batch_size):
                yield self.split.prefix(self.dataset.prepare(images, self.device)), labels.to(self.device)

    def _programs(self, tensors: Sequence[dict[str, Tensor]]) -> Sequence[dict[str, Tensor]]:
        """The tensors of networks that run as one program, stacked; of each network, where all run alone."""
        if self.stacked == 1:
            return tensors
        some = (tensors[start : start + self.stacked] for start in range(0, len(tensors), self.stacked))
        return [{name: torch.stack([own[name] for own in group]) for name in self.split.names} for group in some]

    def _suffixes(self, frontier: Sequence[Tensor], programs: Sequence[dict[str, Tensor]]) -> Iterator[Tensor]:
        """Logits (B, M) of each network."""
        suffix = functools.partial(self.split.suffix, frontier)
        for tensors in programs:
            if self.stacked == 1:
                yield suffix(tensors)
            else:
                yield from torch.vmap(suffix)(tensors)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    # How much at a time.

    @functools.cached_property
    def batch_size(self) -> int:
        """Images per forward pass."""
        if self._batch_size:
            return self._batch_size
        own = self._own()
        per_image = max(self._bytes_per_image(lambda images: self.split(*images, own), [self._examples]))
        if self.device.type == "cuda":
            return max(1, min(GPU_IMAGES, int(self._free_bytes() / per_image)))
        fewest, most = CPU_IMAGES
        return max(fewest, min(most, int(CPU_TENSOR_BYTES / per_image)))

    @functools.cached_property
    def stacked(self) -> int:
        """Networks whose suffixes run as one program; one if that fails."""
        if self._stacked == 1 or (self._stacked is None and self.device.type != "cuda"):
            return 1
        frontier = self.split.prefix(self._examples)
        with torch.no_grad():
            if not self._stackable(torch.vmap(functools.partial(self.split.suffix, frontier))):
                return 1
        if self._stacked:
            return self._stacked
        activations = max(self._suffix_bytes_per_image()) * self.batch_size
        return max(1, int(self._free_bytes() / (activations + 4 * self.subset.size)))

    def trained_together(self, batch_size: int, most: int | None = None) -> int:
        """Networks whose training steps, each on a batch of its own, run as one program; one if that fails.

        Args:
            most: default: as many as fit on an accelerator, one on a CPU.
        """
        if most == 1 or (most is None and self.device.type != "cuda"):
            return 1
        frontiers = tuple(torch.stack([tensor, tensor]) for tensor in self.split.prefix(self._examples))
        with differentiable_in_vmap(self.device):
            if not self._stackable(functools.partial(torch.vmap(self.split.suffix), frontiers)):
                return 1
        if most:
            return most
        # Every tensor is kept for the backward pass, which makes a gradient of about each one's size.
        activations = 2 * sum(self._suffix_bytes_per_image()) * batch_size
        weights = 6 * 4 * self.subset.size  # with gradient, an optimizer's state and what its step makes
        return max(1, int(GPU_SHARE * free_bytes(self.device) / (activations + weights)))

    def _stackable(self, together: Callable[[dict[str, Tensor]], Tensor]) -> bool:
        """Whether `together` turns stacked tensors into the logits of two networks, and gradients if they are on."""
        own = self._own()
        stacked = {
            name: torch.stack([tensor, tensor]).requires_grad_(tensor.is_floating_point())
            for name, tensor in own.items()
        }
        tolerance = 1e-3 if self.precision == "float32" else 3e-2  # of the largest logit
        try:
            with autocast(self.device, self.precision):
                expected, logits = self.split(self._examples, own).float(), together(stacked).float()
            torch.testing.assert_close(
                logits, expected.expand_as(logits), rtol=0, atol=tolerance * float(expected.abs().max())
            )
            if logits.requires_grad:
                logits.sum().backward()
        except (torch.OutOfMemoryError, torch.AcceleratorError):  # say nothing of the network
            raise
        except Exception:  # whatever vmap meets in a network
            return False
        return True

    @functools.cached_property
    def _examples(self) -> Tensor:
        images, _ = next(self.dataset.train.batches([np.arange(EXAMPLE_IMAGES)]))
        return self.dataset.prepare(images, self.device)

    def _own(self) -> dict[str, Tensor]:
        """The network's own values of what is generated."""
        state = dict([*self.network.named_parameters(remove_duplicate=False), *self.network.named_buffers()])
        return {name: state[name].detach() for name in self.split.names}

    def _suffix_bytes_per_image(self) -> list[float]:
        own = self._own()
        return self._bytes_per_image(lambda inputs: self.split.suffix(inputs, own), self.split.prefix(self._examples))

    def _bytes_per_image(self, run: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[Tensor]) -> list[float]:
        """Sizes of the tensors on the way from inputs (B, ...), as far as they grow with the batch."""
        sizes = []
        for count in (EXAMPLE_IMAGES // 2, EXAMPLE_IMAGES):
            with torch.no_grad(), autocast(self.device, self.precision), _Sizes() as found:
                run([tensor[:count] for tensor in inputs])
            sizes.append(found.nbytes)
        if len(sizes[0]) != len(sizes[1]):  # a network that branches has computed other tensors: all of them count
            return [size / EXAMPLE_IMAGES for size in sizes[1]]
        return [(large - small) / (EXAMPLE_IMAGES // 2) for small, large in zip(*sizes, strict=True)]

    def _free_bytes(self) -> float:
        """For one of the tensors that are alive at a time, on an accelerator."""
        return GPU_SHARE * free_bytes(self.device) / LIVE_TENSORS

    # The networks.

    def _tensors_of(self, vectors: Tensor) -> list[dict[str, Tensor]]:
        return [self._tensors(vector) for vector in vectors.to(self.device)]

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


class _Sizes(TorchDispatchMode):
    """Notes the size of every tensor that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.nbytes += [leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result


def judged(record: Record, judgement: Judgement) -> Record:
    """The record with the judgement's fields."""
    return replace(record, **{name: value for name, value in asdict(judgement).items() if value is not None})
