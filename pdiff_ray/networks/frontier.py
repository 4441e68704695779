"""What all networks share of the passes over a split's images, kept for those who read it again and again.

Zoo training reads it every epoch, and judging does for every stack of networks. On an accelerator it is kept in memory
where that has room, else in a file of the node's cache, which its workers map: memory that the system can take back.

Shapes: N images of a split, B images of a batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pdiff_ray.common.devices import free_bytes
from pdiff_ray.common.errors import PdiffError
from pdiff_ray.data.dataset import Dataset, Split
from pdiff_ray.data.kept import build_once, intact
from pdiff_ray.networks.partition import PartitionedNetwork

SMALL_BYTES = 256 * 2**20  # kept whatever it costs to compute
FLOPS_PER_BYTE = 1000  # of a prefix: with fewer, computing is as fast as a disk
DEVICE_SHARE = 0.25  # of the free memory of an accelerator, at most, for a split
LABELS_FILE, SECONDS_FILE = "labels.npy", "seconds.npy"
FORMAT = 2  # of the files; raise it when their meaning changes

Batch = tuple[tuple[Tensor, ...], Tensor]  # frontier (B, ...) and labels (B,)


@dataclass(frozen=True)
class _Layout:
    """The order in which the rows of a frontier tensor (B, ...) lie in memory: networks compute others more slowly."""

    shape: tuple[int, ...]  # of a row, in the order in memory
    dtype: torch.dtype
    order: tuple[int, ...]  # the dimensions, from outer to inner

    @classmethod
    def of(cls, tensor: Tensor) -> _Layout:
        order = (0, *sorted(range(1, tensor.ndim), key=tensor.stride().__getitem__, reverse=True))
        return cls(tuple(tensor.shape[dim] for dim in order[1:]), tensor.dtype, order)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def to_memory(self, tensor: Tensor) -> Tensor:
        return tensor.permute(self.order).contiguous()

    def from_memory(self, rows: Tensor) -> Tensor:
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return rows.permute(inverse)


@dataclass(frozen=True)
class Frontier:
    """The frontier of all images of a split, kept in memory or in mapped files.

    Attributes:
        network: whose frontier it is.
        seconds: that computing it took, perhaps in another process, without those of writing.
        device: where batches of it go.
    """

    network: PartitionedNetwork
    layouts: Sequence[_Layout]
    rows: Sequence[Tensor]
    labels: Tensor
    seconds: float
    device: torch.device

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, chosen: slice | Tensor) -> Batch:
        """Returns the frontier (B, ...) and labels (B,) of the images at the positions `chosen`, on the device."""
        pairs = zip(self.layouts, self.rows, strict=True)
        frontier = tuple(layout.from_memory(rows[chosen].to(self.device)) for layout, rows in pairs)
        return frontier, self.labels[chosen].to(self.device)

    def batches(self, positions: Iterable[np.ndarray]) -> Iterator[Batch]:
        """Yields the batch of each array of positions (B,)."""
        for chosen in positions:
            yield self.batch(torch.from_numpy(chosen).to(self.labels.device))

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Yields batches of all images, in the order of the split."""
        for start in range(0, len(self), batch_size):
            yield self.batch(slice(start, start + batch_size))


@dataclass(frozen=True)
class Kept:
    """A frontier that is kept, or the reason why none is."""

    frontier: Frontier | None = None
    reason: str | None = None


def keep(
    network: PartitionedNetwork,
    dataset: Dataset,
    split: Split,
    device: torch.device,
    cache: Path,
    batch_size: int,
    reads: float = math.inf,
) -> Kept:
    """Keeps the frontier of a split's images, computed unless it is there already, if that is worth it.

    Args:
        split: of `dataset`.
        cache: a folder of this node.
        batch_size: images per pass.
        reads: images that will be read, in all; not worth it if they are fewer than the split's.
    """
    if network.reason or not network.shared:
        return Kept(reason=network.reason or "no layer is shared")
    images, _ = next(split.in_order(2))
    layouts = [_Layout.of(tensor) for tensor in network.prefix(dataset.prepare(images, device))]
    row_bytes = sum(layout.row_bytes for layout in layouts)
    size = len(split) * row_bytes
    if size > SMALL_BYTES and network.prefix_flops < FLOPS_PER_BYTE * row_bytes:
        return Kept(reason=f"computing it takes no longer than reading {_gib(size)}")

    def computed() -> Iterator[list[Tensor]]:
        """Yields the frontier as it lies in memory, and labels, batch by batch."""
        for images, labels in split.in_order(batch_size):
            frontier = network.prefix(dataset.prepare(images, device))
            rows = [*(layout.to_memory(t) for layout, t in zip(layouts, frontier, strict=True)), labels.to(device)]
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # so that its seconds are those of computing
            yield rows

    if device.type == "cuda" and reads >= len(split) and size <= DEVICE_SHARE * free_bytes(device):
        started = time.monotonic()
        # Memory may end all the same, when a process beside this one takes it.
        with contextlib.suppress(torch.OutOfMemoryError):
            *rows, labels = (torch.cat(parts) for parts in zip(*computed(), strict=True))
            return Kept(Frontier(network, layouts, rows, labels, time.monotonic() - started, device))
    found = hashlib.sha256(f"{FORMAT} {network.fingerprint()} {split.key} {device.type} {torch.__version__}".encode())
    folder = cache / f"frontier-{found.hexdigest()[:16]}"
    try:
        if not intact(folder):
            if reads < len(split):
                return Kept(reason=f"{reads:,.0f} images are read, fewer than the {len(split):,} to compute it for")
            if not _make_room(cache, size, dataset.config.max_cache_gib):
                return Kept(reason=f"{_gib(size)} exceed data.max_cache_gib or the free space in {cache}")
            build_once(folder, lambda temporary: _write(temporary, computed(), len(layouts)))
        folder.touch()  # the ones used last stay longest
        rows = [_mapped(folder / str(index), layout) for index, layout in enumerate(layouts)]
        labels = torch.from_numpy(np.load(folder / LABELS_FILE))
        return Kept(Frontier(network, layouts, rows, labels, float(np.load(folder / SECONDS_FILE)), device))
    except (PdiffError, OSError) as error:  # a full disk, or another process made room
        return Kept(reason=str(error))


def _write(folder: Path, batches: Iterable[list[Tensor]], num_tensors: int) -> None:
    """Writes the tensors, the labels behind them, and the seconds that computing took into files of a folder."""
    seconds, started, labels = 0.0, time.monotonic(), []
    with contextlib.ExitStack() as opened:  # written, not mapped: a full disk is an error then, and no signal
        files = [opened.enter_context(open(folder / str(index), "wb")) for index in range(num_tensors)]
        for *tensors, own in batches:
            seconds += time.monotonic() - started
            for file, tensor in zip(files, tensors, strict=True):
                file.write(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
            labels.append(own.cpu())
            started = time.monotonic()
    np.save(folder / LABELS_FILE, torch.cat(labels).numpy())
    np.save(folder / SECONDS_FILE, seconds)


def _mapped(file: Path, layout: _Layout) -> Tensor:
    content = torch.from_numpy(np.memmap(file, np.uint8, "c"))  # copy-on-write, as torch refuses read-only arrays
    return content.view(layout.dtype).view(-1, *layout.shape)


def _make_room(cache: Path, size: int, limit_gib: float) -> bool:
    """Returns whether `size` bytes may be kept in the cache, after removing what was not used for longest."""
    finished = (f for f in cache.glob("frontier-*") if f.is_dir() and f.suffix != ".tmp")  # which others are writing
    kept = sorted(finished, key=lambda folder: folder.stat().st_mtime)
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in kept]
    cache.mkdir(parents=True, exist_ok=True)
    limit = min(limit_gib * 2**30, sum(sizes) + shutil.disk_usage(cache).free / 2)
    while size <= limit < sum(sizes) + size:
        shutil.rmtree(kept.pop(0), ignore_errors=True)
        sizes.pop(0)
    return size <= limit


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
