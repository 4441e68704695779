"""Image data: one table of data sets, a tensor cache that all workers of a node share, and fixed seeded splits.

Shapes: N images, B images of a batch, C channels, S the edge in pixels. Images are uint8 (N, C, S, S), or already
standardized float32 where fixed noise was added.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pdiff_ray.config import Data
from pdiff_ray.errors import ConfigError, PdiffError, did_you_mean
from pdiff_ray.seeds import derive_seed, generator

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = ("train", "test")
ON_DEVICE_BYTES = 4 * 2**30  # sets up to this size are kept in an accelerator's memory whole


@dataclass(frozen=True)
class DataInfo:
    """What a network must know of a data set; mean and std per channel, of pixels scaled to 0..1."""

    channels: int
    image_size: int
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    torchvision: str | None = None  # class in torchvision.datasets
    arguments: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})  # of it, per split


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_TRAIN_TEST = ({"split": "train"}, {"split": "test"})
DATASETS = {
    "digits": DataInfo(1, 8, 10, (0.3076,), (0.3771,)),
    "mnist": DataInfo(1, 28, 10, (0.1307,), (0.3081,), "MNIST"),
    "fashion_mnist": DataInfo(1, 28, 10, (0.2860,), (0.3530,), "FashionMNIST"),
    "cifar10": DataInfo(3, 32, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "CIFAR10"),
    "cifar100": DataInfo(3, 32, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "CIFAR100"),
    "stl10": DataInfo(3, 96, 10, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713), "STL10", _TRAIN_TEST),
    "flowers102": DataInfo(3, 224, 102, *_IMAGENET, "Flowers102", _TRAIN_TEST),
    "pets": DataInfo(3, 224, 37, *_IMAGENET, "OxfordIIITPet", ({"split": "trainval"}, {"split": "test"})),
    "food101": DataInfo(3, 224, 101, *_IMAGENET, "Food101", _TRAIN_TEST),
    "imagenet": DataInfo(3, 224, 1000, *_IMAGENET, "ImageNet", ({"split": "train"}, {"split": "val"})),
}

Sample = tuple[Any, int]  # a PIL image and its label
Progress = Callable[[int, int], None]  # done, total


class Samples(Protocol):
    """A sequence of undecoded samples: torchvision's data sets, or `ParquetImages`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


# --- what a configuration asks for -----------------------------------------------------------------------------------


def describe(config: Data) -> DataInfo:
    """Channels, size, classes, mean and std of the configured data.

    Raises:
        ConfigError: the name is not in the table, or a custom set cannot be read.
    """
    if config.name == "custom":
        if config.source not in ("parquet", "folder"):
            raise ConfigError(f"data.source: {config.source!r} cannot be read as custom data; choose parquet or folder")
        samples = open_samples(config, "train")
        image, _ = next(iter(samples))
        channels = config.channels or (1 if image.mode == "L" else 3)
        size = config.image_size or min(image.size)
        # Pixels in -1..1, the usual choice where nothing is known about a data set.
        info = DataInfo(channels, size, _num_classes(samples), (0.5,) * channels, (0.5,) * channels)
    elif config.name not in DATASETS:
        known = [*DATASETS, "custom"]
        raise ConfigError(
            f"data.name: unknown data set {config.name!r}"
            + (did_you_mean(config.name, known) or f"; known: {', '.join(known)}")
        )
    else:
        info = DATASETS[config.name]
    channels, size = config.channels or info.channels, config.image_size or info.image_size
    if channels != info.channels:
        # Grey images repeat their channel; coloured ones turn grey, whose statistics are close to the channels' mean.
        mean, std = (float(np.mean(v)) for v in (info.mean, info.std))
        info = replace(info, mean=(mean,) * channels, std=(std,) * channels)
    return replace(info, channels=channels, image_size=size)


def keyed(config: Data) -> dict[str, Any]:
    """What of the configuration, and of custom files, determines the images."""
    content = config.keyed()
    if config.name == "custom":
        content["fingerprint"] = _fingerprint(config)
    return content


def check(config: Data) -> None:
    """Raises ConfigError unless both splits can be opened and their labels are those of the data set."""
    info = describe(config)
    for split in SPLITS:
        labels = np.asarray(getattr(open_samples(config, split), "targets", (0,)))
        if labels.min() < 0 or labels.max() >= info.num_classes:
            raise ConfigError(
                f"data.name: {config.name} has the labels 0 to {info.num_classes - 1}, but the {split} data under "
                f"{config.root!r} has {labels.min()} to {labels.max()}; correct data.name or data.root"
            )


def open_samples(config: Data, split: str) -> Samples:
    """The undecoded samples of a split ("train" or "test")."""
    if config.source == "parquet":
        return ParquetImages(_parquet_files(config, split))
    if config.source == "folder":
        from torchvision.datasets import ImageFolder

        folder = _first_folder(config, split)
        try:
            return ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise ConfigError(f"data.root: {folder} has to hold a folder of images per class: {error}") from None
    if config.name == "digits":
        return _Digits(split)
    from torchvision import datasets

    info = DATASETS[config.name]
    kwargs = dict(info.arguments[SPLITS.index(split)])
    if config.name != "imagenet":  # which nobody may download
        kwargs["download"] = config.download
    try:
        return getattr(datasets, str(info.torchvision))(root=config.root, **kwargs)
    except (RuntimeError, FileNotFoundError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"data.root: {config.name} is not under {config.root!r} ({reason}); put it there, set data.download: true "
            "to let torchvision fetch it, or name another data.source"
        ) from None


class _Digits:
    """The 1,797 handwritten 8 x 8 digits that scikit-learn carries: the first 900 to train on, the others to test."""

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits

        digits, part = load_digits(), slice(0, 900) if split == "train" else slice(900, None)
        self.images = np.round(digits.images[part] * (255 / 16)).astype(np.uint8)
        self.targets = digits.target[part].astype(np.int64)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Sample:
        from PIL import Image

        return Image.fromarray(self.images[index]), int(self.targets[index])


class ParquetImages:
    """Images in the Hugging Face schema: `img` or `image` struct with `bytes`, and `label` (or `fine_label`).

    Parquet has no quick way to single rows: they come from a memory-mapped Arrow file of the encoded images, which
    `write_arrow` makes. Mapped, it takes no memory of a process, and travels to others as a path.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.arrow: Path | None = None
        batches = [batch["label"].to_numpy(zero_copy_only=False) for batch in self._batches("label")]
        self.targets = np.concatenate([*batches, []]).astype(np.int64)
        if not len(self.targets):
            raise ConfigError(f"data.root: {self.files[0]} holds no images")

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Sample:
        return _open_image(self._encoded[index]), int(self.targets[index])

    def __iter__(self) -> Iterator[Sample]:
        """All in order, few of them in memory."""
        for batch in self._batches("bytes", "label"):
            for encoded, label in zip(batch["bytes"], batch["label"], strict=True):
                yield _open_image(encoded), label.as_py()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_encoded"}

    @functools.cached_property
    def _encoded(self) -> pa.ChunkedArray:
        import pyarrow as pa

        assert self.arrow is not None
        return pa.ipc.open_file(pa.memory_map(str(self.arrow))).read_all()["bytes"]

    def write_arrow(self, path: Path, progress: Progress | None = None) -> None:
        """Copies the encoded images to a new Arrow file and reads them from there."""
        import pyarrow as pa

        self.arrow = path
        done, schema = 0, pa.schema({"bytes": pa.binary()})
        with pa.ipc.new_file(str(path), schema) as writer:
            for batch in self._batches("bytes"):
                writer.write_batch(batch.cast(schema))
                done += len(batch)
                if progress:
                    progress(done, len(self))

    def _batches(self, *columns: str) -> Iterator[pa.RecordBatch]:
        """The files' rows, with "bytes", "label" or both."""
        import pyarrow as pa
        import pyarrow.dataset as ds

        for file in self.files:
            try:
                dataset = ds.dataset(str(file), format="parquet")
                names = dataset.schema.names
                image = next((n for n in ("img", "image") if n in names), None)
                label = next((n for n in ("label", "fine_label") if n in names), None)
                if image is None or label is None:
                    raise ConfigError(
                        f"data.root: {file} has columns {', '.join(names)}; wanted are img or image (struct with "
                        "bytes) and label"
                    )
                fields = {"bytes": ds.field(image, "bytes"), "label": ds.field(label).cast(pa.int64())}
                # Small batches and little read ahead: a set may be larger than memory.
                yield from dataset.to_batches(
                    columns={name: fields[name] for name in columns}, batch_size=256, batch_readahead=2
                )
            except (pa.ArrowException, OSError) as error:
                raise ConfigError(f"data.root: {file} cannot be read as Parquet images: {error}") from None


def _open_image(encoded: pa.Scalar) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(encoded.as_py()))


def _num_classes(samples: Samples) -> int:
    classes = getattr(samples, "classes", None)
    return len(classes) if classes else int(max(samples.targets)) + 1  # type: ignore[attr-defined]


def _parquet_files(config: Data, split: str) -> list[Path]:
    root = Path(config.root)
    names = ("test", "validation", "valid") if split == "test" else ("train",)
    for name in names:
        if files := sorted(root.glob(f"**/{name}*.parquet")):
            return files
    raise ConfigError(f"data.root: no {names[0]}*.parquet under {config.root!r}; put files there or correct the path")


def _first_folder(config: Data, split: str) -> Path:
    names = ("test", "val", "validation") if split == "test" else ("train",)
    for name in names:
        if (folder := Path(config.root) / name).is_dir():
            return folder
    raise ConfigError(f"data.root: no folder {' or '.join(names)} under {config.root!r}")


def _fingerprint(config: Data) -> str:
    """A cheap hash of custom files: names, sizes, and of Parquet files the end, whose footer changes with the data."""
    sha = hashlib.sha256()
    for split in SPLITS:
        if config.source == "parquet":
            for file in _parquet_files(config, split):
                sha.update(f"{split}/{file.name}/{file.stat().st_size}".encode())
                with file.open("rb") as stream:
                    stream.seek(max(0, file.stat().st_size - 65536))
                    sha.update(stream.read())
        else:
            folder = _first_folder(config, split)
            for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                sha.update(f"{split}/{file.relative_to(folder)}/{file.stat().st_size}".encode())
    return sha.hexdigest()[:16]


# --- images in memory or streamed -------------------------------------------------------------------------------------


class _Cached:
    """All images of a split in one memory-mapped array."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> None:
        if device.type != "cpu" and self.images.nbytes <= ON_DEVICE_BYTES:
            self.images, self.labels = self.images.to(device), self.labels.to(device)

    def batches(self, index_batches: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in index_batches:
            chosen = torch.from_numpy(indices).to(self.images.device)
            yield self.images[chosen], self.labels[chosen]


class _Streamed(torch.utils.data.Dataset):
    """Images decoded by DataLoader processes each time they are wanted."""

    def __init__(self, samples: Samples, info: DataInfo, num_workers: int) -> None:
        self.samples, self.info, self.num_workers = samples, info, num_workers

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = _decoded(self.samples, index, self.info)
        return torch.from_numpy(image), label

    def to(self, device: torch.device) -> None:
        pass

    def batches(self, index_batches: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        # A forked child of a Ray worker inherits its threads' locks, one of a server that has imported torch does not.
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(["torch", "pdiff_ray.data"])
        loader = torch.utils.data.DataLoader(
            self,
            batch_sampler=(batch.tolist() for batch in index_batches),  # type: ignore[arg-type]
            num_workers=self.num_workers,
            multiprocessing_context=processes if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        yield from loader


@dataclass(frozen=True)
class Split:
    """Some images of a source, in a fixed order."""

    source: _Cached | _Streamed
    indices: np.ndarray  # (N,) int64, positions in the source

    def __len__(self) -> int:
        return len(self.indices)

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
            mean = torch.tensor(self.info.mean, device=device).view(-1, 1, 1)
            std = torch.tensor(self.info.std, device=device).view(-1, 1, 1)
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
        per_epoch = steps_per_epoch(len(self.train), batch_size)

        def positions() -> Iterator[np.ndarray]:
            epoch, order = -1, np.empty(0, dtype=np.int64)
            for step in range(start, stop):
                if step // per_epoch != epoch:
                    epoch = step // per_epoch
                    order = np.random.default_rng(derive_seed(*seed, "epoch", epoch)).permutation(len(self.train))
                first = step % per_epoch * batch_size
                yield order[first : first + batch_size][rank::world]

        for step, (images, labels) in enumerate(self.train.batches(positions()), start):
            random = generator(device, *seed, "augment", step, rank)
            yield self._augment(self.prepare(images, device), random), labels.to(device)

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
    files = _parquet_files(config, split) if config.source == "parquet" else []
    states = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    determining = ("name", "source", "fingerprint", "pixel_noise", "seed")
    what = {
        "data": {name: value for name, value in keyed(config).items() if name in determining},
        "info": [info.channels, info.image_size, info.mean, info.std],
        "root": states or str(Path(config.root).resolve()),
        "split": split,
    }
    folder = cache / f"{config.name}-{split}-{_hash(what)}"
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
                _build_once(encoded, lambda temporary: write(temporary / "images.arrow", progress))
                samples.arrow = encoded / "images.arrow"
            return _Streamed(samples, info, config.loader_workers)
        _build_once(folder, lambda temporary: _decode_all(config, info, split, samples, temporary, progress))
    # Copy-on-write mapping: torch refuses read-only arrays, and nobody writes.
    images = np.load(folder / "images.npy", mmap_mode="c", allow_pickle=False)
    return _Cached(images, np.load(folder / "labels.npy", allow_pickle=False))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Lets `build` fill a folder of the cache, unless another worker of this node has done so or does it now."""
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if folder.exists():
                return
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
            decoded = pool.map(lambda index: _decoded(samples, index, info), chunk)
            for index, (image, label) in zip(chunk, decoded, strict=True):
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


def _decoded(samples: Samples, index: int, info: DataInfo) -> tuple[np.ndarray, int]:
    try:
        image, label = samples[index]
        return _decode(image, info), label
    except (OSError, SyntaxError) as error:  # PIL's errors
        known = getattr(samples, "samples", None)  # files and labels of an image folder
        name = known[index][0] if known else f"image {index}, counted from 0,"
        raise PdiffError(f"data.root: {name} cannot be decoded: {error}; replace or remove it") from None


def _decode(image: Any, info: DataInfo) -> np.ndarray:
    """A PIL image to uint8 (C, S, S): shorter edge resized to S, centre cropped."""
    image = image.convert("L" if info.channels == 1 else "RGB")
    size = info.image_size
    if image.size != (size, size):
        scale = size / min(image.size)
        width, height = (max(size, round(edge * scale)) for edge in image.size)
        image = image.resize((width, height), resample=2)  # bilinear
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))
