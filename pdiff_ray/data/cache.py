"""Decoded images: a cache that all workers of a node share, or a stream if the data set is too large for it."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pdiff_ray.common.devices import free_bytes
from pdiff_ray.common.errors import ConfigError
from pdiff_ray.common.seeds import derive_seed
from pdiff_ray.config.schema import Data
from pdiff_ray.data.kept import build_once, digest, intact
from pdiff_ray.data.parquet import Advance, ParquetImages
from pdiff_ray.data.sources import DataInfo, Samples, check_labels, decoded, file_states, keyed, open_samples

FORMAT = 2  # of the cache; raise it when images are decoded otherwise
Progress = Callable[[int, int, str], None]  # images done, all images, a note

# A split is moved to a GPU as a whole if it takes no more than this, and no more than this share of the free memory.
ON_DEVICE_BYTES, ON_DEVICE_SHARE = 4 * 2**30, 0.25


class Cached:
    """All images of a split, decoded, in one array: memory-mapped, or moved to a GPU.

    Attributes:
        images: (N, C, S, S), uint8, or float32 with fixed noise.
        labels: (N,), int64.
        key: a hash that names the images.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, key: str) -> None:
        self.images, self.labels, self.key = torch.from_numpy(images), torch.from_numpy(labels), key

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> None:
        """Moves the images to a GPU if they are small enough."""
        if device.type == "cuda" and self.images.nbytes <= min(ON_DEVICE_BYTES, ON_DEVICE_SHARE * free_bytes(device)):
            self.images, self.labels = self.images.to(device), self.labels.to(device)

    def batches(self, index_batches: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images (B, C, S, S) and labels (B,) for each array (B,) of indices."""
        for indices in index_batches:
            chosen = torch.from_numpy(indices).to(self.images.device)
            yield self.images[chosen], self.labels[chosen]


class Streamed(torch.utils.data.Dataset):
    """All images of a split, decoded by DataLoader processes each time that they are needed."""

    def __init__(self, samples: Samples, info: DataInfo, num_workers: int, key: str) -> None:
        self.samples, self.info, self.num_workers, self.key = samples, info, num_workers, key
        self.pinned = False

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = decoded(self.samples, index, self.info)
        return torch.from_numpy(image), label

    def to(self, device: torch.device) -> None:
        """Prepares the batches for transfer to a GPU."""
        self.pinned = device.type == "cuda"  # for no other device, as pinning itself takes memory of a GPU

    def batches(self, index_batches: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images (B, C, S, S) and labels (B,) for each array (B,) of indices."""
        # A forked child would inherit the locks of a Ray worker's threads; a child of the fork server does not.
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(["torch", "pdiff_ray.data.dataset"])
        loader = torch.utils.data.DataLoader(
            self,
            batch_sampler=(batch.tolist() for batch in index_batches),  # type: ignore[arg-type]
            num_workers=self.num_workers,
            multiprocessing_context=processes if self.num_workers else None,
            pin_memory=self.pinned,
        )
        yield from loader


def open_source(config: Data, info: DataInfo, split: str, cache: Path, progress: Progress) -> Cached | Streamed:
    """Opens the images of a split, decoding them into `cache` first if they are not there.

    Returns:
        The decoded images, or a stream if they would take more than `data.max_cache_gib`.

    Raises:
        ConfigError: the images would take more, and `data.pixel_noise` needs them in the cache.
        UnavailableError: the cache cannot be written.
    """
    states = file_states(config, split)
    determining = ("name", "source", "fingerprint", "reading", "code", "pixel_noise", "seed")
    identity = {
        "format": FORMAT,
        "data": {name: value for name, value in keyed(config).items() if name in determining},
        "info": [info.channels, info.image_size, info.num_classes, info.mean, info.std],
        "root": states or str(Path(config.root).resolve()),
        "split": split,
    }
    key = digest(identity)
    folder = cache / f"{config.name}-{split}-{key}"
    if not intact(folder):
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
                encoded, write = cache / f"{config.name}-{split}-encoded-{digest(states)}", samples.write_records
                told = _telling(encoded, progress)
                build_once(encoded, lambda made: write(made, told))
                samples.kept = encoded
            return Streamed(samples, info, config.loader_workers, key)
        told = _telling(folder, progress)
        build_once(folder, lambda made: _decode_all(config, info, split, samples, made, told))
    # The mapping is copy-on-write because torch warns of read-only arrays; nothing writes to it.
    images = np.load(folder / "images.npy", mmap_mode="c", allow_pickle=False)
    return Cached(images, np.load(folder / "labels.npy", allow_pickle=False), key)


def _telling(folder: Path, progress: Progress) -> Advance:
    """Returns what tells of a folder that is built; one that is there is not as it was written."""
    note = "anew, as the cache was damaged" if folder.exists() else ""
    return lambda done, total: progress(done, total, note)


def _decode_all(config: Data, info: DataInfo, split: str, samples: Samples, folder: Path, progress: Advance) -> None:
    count, shape = len(samples), (info.channels, info.image_size, info.image_size)
    dtype = np.dtype(np.float32 if config.pixel_noise else np.uint8)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count, *shape)}
    labels = np.empty(count, dtype=np.int64)
    noise = np.random.default_rng(derive_seed(config.seed, "pixel_noise", split))
    mean, std = (np.array(v, dtype=np.float32).reshape(-1, 1, 1) for v in (info.mean, info.std))
    encoded = folder / "encoded"
    if isinstance(samples, ParquetImages):
        encoded.mkdir()
        samples.write_records(encoded)
        samples.kept = encoded
    # Written, not mapped: a full disk is an error then, and no signal. PIL releases Python's lock while it decodes.
    with (folder / "images.npy").open("wb") as file, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, count, 256):  # so that only a few decoded images are in memory
            chunk = range(start, min(start + 256, count))
            images = np.empty((len(chunk), *shape), dtype)
            images_and_labels = pool.map(lambda index: decoded(samples, index, info), chunk)
            for index, (image, label) in zip(chunk, images_and_labels, strict=True):
                labels[index] = label
                if config.pixel_noise:
                    image = (image.astype(np.float32) / 255 - mean) / std
                    image = image + config.pixel_noise * noise.standard_normal(shape, dtype=np.float32)
                images[index - start] = image
            file.write(images.data)
            progress(chunk.stop, count)
    shutil.rmtree(encoded, ignore_errors=True)
    check_labels(config, info, samples, labels)
    np.save(folder / "labels.npy", labels, allow_pickle=False)
