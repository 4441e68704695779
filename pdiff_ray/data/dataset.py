"""The splits of a data set, which are fixed by a seed, and its training batches.

Shapes: N images in a split, B images in a batch, C channels, S pixels along an edge. Images are uint8 (N, C, S, S), or
already standardized float32 if fixed noise was added to them.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.common.seeds import derive_seed, rng
from pdiff_ray.config.schema import Data
from pdiff_ray.data.cache import Cached, Progress, Streamed, open_source
from pdiff_ray.data.files import SPLITS
from pdiff_ray.data.kept import digest
from pdiff_ray.data.sources import DataInfo, describe


@dataclass(frozen=True)
class Split:
    """Some of the images of a source, in a fixed order."""

    source: Cached | Streamed
    indices: np.ndarray  # (N,) int64, positions in the source

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def key(self) -> str:
        """A hash that names the images and their order."""
        return digest([self.source.key, hashlib.sha256(self.indices.tobytes()).hexdigest()])

    def batches(self, index_batches: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images (B, C, S, S) as stored and labels (B,), for each array (B,) of positions in this split."""
        return self.source.batches(self.indices[batch] for batch in index_batches)

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields all images and labels in order, `batch_size` at a time."""
        starts = range(0, len(self), batch_size)
        return self.batches(np.arange(start, min(start + batch_size, len(self))) for start in starts)


@dataclass(frozen=True)
class Dataset:
    """The splits of one data set.

    Attributes:
        train: the training data without the validation images.
        selection: the part of `train` on which the best network is selected.
        validation: the images held out of the training data.
        test: the images for reported results, never used to choose anything.
    """

    info: DataInfo
    config: Data
    train: Split
    selection: Split
    validation: Split
    test: Split

    def prepare(self, images: Tensor, device: torch.device) -> Tensor:
        """Returns stored images as standardized float32 (B, C, S, S) on `device`, channels last in memory."""
        images = images.to(device, non_blocking=device.type == "cuda")  # a copy to the CPU has to be there at once
        if images.dtype == torch.uint8:
            mean, std = (_per_channel(values, device) for values in (self.info.mean, self.info.std))
            images = (images.float() / 255 - mean) / std
        # On CPUs, convolutions of NCHW are up to 14 times slower; GPUs prefer channels last in bfloat16, too.
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
        """Yields this rank's augmented images and labels for the training steps from `start` to `stop` - 1.

        The batch of a step depends only on the seed and the step, so that resumed training sees the batches that it
        would have seen without the interruption. Each epoch is a new permutation, whose last incomplete batch is left
        out.

        Args:
            batch_size: images per step over all `world` ranks; each rank gets every world-th of them.

        Raises:
            ConfigError: a batch has more images than there are.
        """
        positions = (batch[rank::world] for batch in self.training_positions(batch_size, start, stop, *seed))
        for step, (images, labels) in enumerate(self.train.batches(positions), start):
            random = rng(device, *seed, "augment", step, rank)
            yield self._augment(self.prepare(images, device), random), labels.to(device)

    def training_positions(self, batch_size: int, start: int, stop: int, *seed: int | str) -> Iterator[np.ndarray]:
        """Yields the positions (B,) in `train` of the images of each training step, over all ranks."""
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
            padded = functional.pad(images, [margin] * 4, mode="reflect")
            top, left = torch.randint(0, 2 * margin + 1, (2, count, 1, 1), generator=random, device=device)
            pixels = torch.arange(size, device=device)
            rows, columns = top + pixels.view(1, -1, 1), left + pixels.view(1, 1, -1)
            # Advanced indices around a slice give (B, S, S, C), so the images are channels last in memory already.
            images = padded[torch.arange(count, device=device).view(-1, 1, 1), :, rows, columns].permute(0, 3, 1, 2)
        if self.config.augment == "resized_crop_flip":
            images = _resized_crops(images, random)
        if self.config.train_noise:
            noise = torch.randn(images.shape, generator=random, device=device)
            images = images + self.config.train_noise * noise
        return images


def _resized_crops(images: Tensor, random: torch.Generator) -> Tensor:
    """Returns a random part of each image (B, C, S, S), resized to the whole (Szegedy et al. 2015).

    Its area is 8 % to 100 % of the image's, and its width 3/4 to 4/3 of its height where the image allows.
    """
    area, ratio, *place = torch.rand(4, len(images), generator=random, device=images.device)
    root, shape = (0.08 + 0.92 * area).sqrt(), (4 / 3) ** (ratio - 0.5)
    sides = torch.stack([root * shape, root / shape], 1).clamp(max=1)  # of 1: width and height, then the centre's
    centres = (torch.stack(place, 1) * 2 - 1) * (1 - sides)
    transforms = torch.cat([torch.diag_embed(sides), centres.unsqueeze(2)], 2)
    grid = functional.affine_grid(transforms, list(images.shape), align_corners=False)
    parts = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return parts.contiguous(memory_format=torch.channels_last)


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Returns one number per channel (C, 1, 1); cached, because a copy for each batch would wait for the GPU."""
    with torch.inference_mode(False):  # training uses the cached tensor as well
        return torch.tensor(values, device=device).view(-1, 1, 1)


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Returns the number of whole batches in an epoch; raises ConfigError if there is none."""
    if batch_size > num_images:
        raise ConfigError(f"batch_size is {batch_size}, but there are only {num_images} training images; lower it")
    return num_images // batch_size


def load(config: Data, cache: Path, progress: Progress = lambda *_: None) -> Dataset:
    """Opens a data set, and decodes it into `cache` first if that has not been done yet.

    Args:
        cache: a folder on this node, whose workers all map the same pages of it into memory.
        progress: called with the number of images decoded, the number of all images, and a note.
    """
    info = describe(config)
    train, test = (open_source(config, info, split, cache, progress) for split in SPLITS)
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
