"""Image data: a tensor cache that all workers of a node share, fixed seeded splits, and training batches.

Shapes: N images, B images of a batch, C channels, S the edge in pixels. Images are uint8 (N, C, S, S), or already
standardized float32 where fixed noise was added.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdiff_ray.config import Data
from pdiff_ray.devices import free_bytes
from pdiff_ray.errors import ConfigError, PdiffError
from pdiff_ray.seeds import derive_seed, generator
from pdiff_ray.sources import (
    SPLITS,
    DataInfo,
    ParquetImages,
    Progress,
    Samples,
    decoded,
    describe,
    keyed,
    open_samples,
    parquet_files,
)  # fmt: skip

# Sets up to this size, and this share of what is free, are kept in an accelerator's memory whole.
ON_DEVICE_BYTES, ON_DEVICE_SHARE = 4 * 2**30, 0.25


class _Cached:
    """All images of a split in one memory-mapped array."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, key: str) -> None:
        self.images, self.labels, self.key = torch.from_numpy(images), torch.from_numpy(labels), key

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> None:
        if device.type == "cuda" and self.images.nbytes <= min(ON_DEVICE_BYTES, ON_DEVICE_SHARE * free_bytes(device)):
            self.images, self.labels = self.images.to(device), self.labels.to(device)

    def batches(self, index_batches: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in index_batches:
            chosen = torch.from_numpy(indices).to(self.images.device)
            yield self.images[chosen], self.labels[chosen]


def random_images(info: DataInfo, config: Data, count: int) -> _Cached:
    """A source of `count` images and labels that mean nothing, always the same: to measure on."""
    random, shape = np.random.default_rng(0), (count, info.channels, info.image_size, info.image_size)
    images: np.ndarray = random.integers(256, size=shape, dtype=np.uint8)
    if config.pixel_noise:
        images = random.standard_normal(shape, dtype=np.float32)
    return _Cached(images, random.integers(info.num_classes, size=count), f"random-{_hash([shape, images.dtype.name])}")


class _Streamed(torch.utils.data.Dataset):
    """Images decoded by DataLoader processes each time they are wanted."""

    def __init__(self, samples: Samples, info: DataInfo, num_workers: int, key: str) -> None:
        self.samples, self.info, self.num_workers, self.key = samples, info, num_workers, key
        self.pinned = False

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = decoded(self.samples, index, self.info)
        return torch.from_numpy(image), label

    def to(self, device: torch.device) -> None:
        self.pinned = device.type == "cuda"  # which takes a GPU's memory, where there is one, used or not

    def batches(self, index_batches: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        # A forked child of a Ray worker inherits its threads' locks, one of a server that has imported torch does not.
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(["torch", "pdiff_ray.data"])
        loader = torch.utils.data.DataLoader(
            self,
            batch_sampler=(batch.tolist() for batch in index_batches),  # type: ignore[arg-type]
            num_workers=self.num_workers,
            multiprocessing_context=processes if self.num_workers else None,
            pin_memory=self.pinned,
        )
        yield from loader


@dataclass(frozen=True)
class Split:
    """Some images of a source, in a fixed order."""

    source: _Cached | _Streamed
    indices: np.ndarray  # (N,) int64, positions in the source

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def key(self) -> str:
        """Names the images and their order."""
        return _hash([self.source.key, hashlib.sha256(self.indices.tobytes()).hexdigest()])

    def batches(self, index_batches: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """Raw images (B, C, S, S) and labels (B,) for each array of positions (B,) in this split."""
        return self.source.batches(self.indices[batch] for batch in index_batches)

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images, in order, `batch_size` at a time."""
        starts = range(0, len(self), batch_size)
        return self.batches(np.arange(start, min(start + batch_size, len(self))) for start in starts)


@dataclass(frozen=True)
class Dataset:
    """The splits of one data set.

    Attributes:
        train: training data without the validation images.
        selection: the part of `train` on which the best network is selected.
        validation: held out of the training data.
        test: reported, and never used to choose anything.
    """

    info: DataInfo
    config: Data
    train: Split
    selection: Split
    validation: Split
    test: Split

    def prepare(self, images: Tensor, device: torch.device) -> Tensor:
        """Raw images to standardized float32 ones on `device`, channels last in memory (B, C, S, S)."""
        images = images.to(device, non_blocking=True)
        if images.dtype == torch.uint8:
            mean, std = (_per_channel(values, device) for values in (self.info.mean, self.info.std))
            images = (images.float() / 255 - mean) / std
        # Convolutions on CPUs are up to 14 times slower on NCHW; GPUs prefer channels last with bf16 too.
        return images.contiguous(memory_format=torch.channels_last)

    def training_batches(
        self,
        batch_size: int,
        start: int,
        stop: int,
        device: torch.device,
        *seed: int | str,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented training batches of the steps `start` to `stop` - 1.

        The batch of a step depends on the seed and the step alone, so that interrupted training goes on with the batch
        it would have had. Each epoch is a new permutation; its last incomplete batch is left out.

        Args:
            batch_size: images per step over all `world` ranks; this rank gets every world-th of them.
        """
        positions = (batch[rank::world] for batch in self.training_positions(batch_size, start, stop, *seed))
        for step, (images, labels) in enumerate(self.train.batches(positions), start):
            random = generator(device, *seed, "augment", step, rank)
            yield self._augment(self.prepare(images, device), random), labels.to(device)

    def training_positions(self, batch_size: int, start: int, stop: int, *seed: int | str) -> Iterator[np.ndarray]:
        """Of the images of each training batch in `train` (B,)."""
        per_epoch = steps_per_epoch(len(self.train), batch_size)
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(start, stop):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = np.random.default_rng(derive_seed(*seed, "epoch", epoch)).permutation(len(self.train))
            first = step % per_epoch * batch_size
            yield order[first : first + batch_size]

    def _augment(self, images: Tensor, random: torch.Generator) -> Tensor:
        count, device = len(images), images.device
        if self.config.augment != "none":
            flipped = torch.rand(count, generator=random, device=device) < 0.5
            images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)
        if self.config.augment == "crop_flip":
            size, margin = images.shape[-1], max(1, images.shape[-1] // 8)
            padded = torch.nn.functional.pad(images, [margin] * 4, mode="reflect")
            top, left = torch.randint(0, 2 * margin + 1, (2, count, 1, 1), generator=random, device=device)
            pixels = torch.arange(size, device=device)
            rows, columns = top + pixels.view(1, -1, 1), left + pixels.view(1, 1, -1)
            # Two advanced indices around the channels: (B, S, S, C), which is channels last already.
            images = padded[torch.arange(count, device=device).view(-1, 1, 1), :, rows, columns].permute(0, 3, 1, 2)
        if self.config.train_noise:
            noise = torch.randn(images.shape, generator=random, device=device)
            images = images + self.config.train_noise * noise
        return images


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One number per channel (C, 1, 1); kept, as a copy to a GPU for each batch would wait for it."""
    with torch.inference_mode(False):  # training reads it as well
        return torch.tensor(values, device=device).view(-1, 1, 1)


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    if batch_size > num_images:
        raise ConfigError(f"batch_size is {batch_size}, but there are only {num_images} training images; lower it")
    return num_images // batch_size


def load(config: Data, cache: Path, progress: Progress | None = None) -> Dataset:
    """Opens the data set, decoding it into `cache` first if that was not done yet.

    Args:
        cache: a folder of this node; its workers map the same pages.
    """
    info = describe(config)
    train, test = (_open_source(config, info, split, cache, progress) for split in SPLITS)
    order = np.random.default_rng(derive_seed(config.seed, "validation")).permutation(len(train))
    held_out = max(1, round(len(train) * config.validation_fraction))
    training = np.sort(order[held_out:])
    chosen = np.random.default_rng(derive_seed(config.seed, "selection")).permutation(len(training))
    return Dataset(
        info=info,
        config=config,
        train=Split(train, training),
        selection=Split(train, np.sort(training[chosen[: config.selection_images]])),
        validation=Split(train, np.sort(order[:held_out])),
        test=Split(test, np.arange(len(test))),
    )


# --- the cache --------------------------------------------------------------------------------------------------------


def default_cache() -> Path:
    """The folder of decoded images: PDIFF_CACHE, else the user's cache folder."""
    chosen = os.environ.get("PDIFF_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pdiff_ray"


def _open_source(
    config: Data, info: DataInfo, split: str, cache: Path, progress: Progress | None
) -> _Cached | _Streamed:
    files = parquet_files(config, split) if config.source == "parquet" else []
    states = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    determining = ("name", "source", "fingerprint", "pixel_noise", "seed")
    what = {
        "data": {name: value for name, value in keyed(config).items() if name in determining},
        "info": [info.channels, info.image_size, info.mean, info.std],
        "root": states or str(Path(config.root).resolve()),
        "split": split,
    }
    key = _hash(what)
    folder = cache / f"{config.name}-{split}-{key}"
    if not folder.exists():
        samples = open_samples(config, split)
        width = 4 if config.pixel_noise else 1
        gib = len(samples) * info.channels * info.image_size**2 * width / 2**30
        if gib > config.max_cache_gib:
            if config.pixel_noise:
                raise ConfigError(
                    f"data.pixel_noise needs decoded images in the cache, {gib:.1f} GiB; data.max_cache_gib is "
                    f"{config.max_cache_gib:g}"
                )
            if isinstance(samples, ParquetImages):
                encoded, write = cache / f"{config.name}-{split}-encoded-{_hash(states)}", samples.write_arrow
                build_once(encoded, lambda temporary: write(temporary / "images.arrow", progress))
                samples.arrow = encoded / "images.arrow"
            return _Streamed(samples, info, config.loader_workers, key)
        build_once(folder, lambda temporary: _decode_all(config, info, split, samples, temporary, progress))
    # Copy-on-write mapping: torch refuses read-only arrays, and nobody writes.
    images = np.load(folder / "images.npy", mmap_mode="c", allow_pickle=False)
    return _Cached(images, np.load(folder / "labels.npy", allow_pickle=False), key)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Lets `build` fill a folder of the cache, unless another worker of this node has done so or does it now."""
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if folder.exists():
                return
            for left in folder.parent.glob(f"{folder.name}.*.tmp"):  # by a worker that was killed
                shutil.rmtree(left, ignore_errors=True)
            temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
            temporary.mkdir()
            try:
                build(temporary)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise PdiffError(
            f"cache {folder.parent}: {error.strerror or error}; free space or set PDIFF_CACHE to another folder"
        ) from None


def _decode_all(
    config: Data, info: DataInfo, split: str, samples: Samples, folder: Path, progress: Progress | None
) -> None:
    count, shape = len(samples), (info.channels, info.image_size, info.image_size)
    dtype = np.dtype(np.float32 if config.pixel_noise else np.uint8)
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", dtype, (count, *shape))
    labels = np.empty(count, dtype=np.int64)
    noise = np.random.default_rng(derive_seed(config.seed, "pixel_noise", split))
    mean, std = (np.array(v, dtype=np.float32).reshape(-1, 1, 1) for v in (info.mean, info.std))
    encoded = folder / "encoded.arrow"
    if isinstance(samples, ParquetImages):
        samples.write_arrow(encoded)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # PIL decodes without holding the interpreter
        for start in range(0, count, 256):  # so that few decoded images wait at a time
            chunk = range(start, min(start + 256, count))
            images_and_labels = pool.map(lambda index: decoded(samples, index, info), chunk)
            for index, (image, label) in zip(chunk, images_and_labels, strict=True):
                labels[index] = label
                if config.pixel_noise:
                    image = (image.astype(np.float32) / 255 - mean) / std
                    image = image + config.pixel_noise * noise.standard_normal(shape, dtype=np.float32)
                images[index] = image
            if progress:
                progress(chunk.stop, count)
    encoded.unlink(missing_ok=True)
    images.flush()
    np.save(folder / "labels.npy", labels, allow_pickle=False)
