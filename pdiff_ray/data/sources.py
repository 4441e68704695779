"""Where images come from: one table of data sets, and their undecoded samples from torchvision, Parquet or folders.

Shapes: C channels, S the edge in pixels.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from PIL import Image

from pdiff_ray.common.errors import ConfigError, PdiffError
from pdiff_ray.common.registry import Registry, imported
from pdiff_ray.config.schema import Data

SPLITS = ("train", "test")


@dataclass(frozen=True)
class DataInfo:
    """What a network must know of a data set; mean and std per channel, of pixels scaled to 0..1.

    Attributes:
        images: training and test images, where known; for estimates before the data is there.
        torchvision: the class in torchvision.datasets.
        splits: what that class calls the training and the test data, if it takes names.
    """

    channels: int
    image_size: int
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: tuple[int, int] | None = None
    torchvision: str | None = None
    splits: tuple[str, str] | None = None


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_TABLE = {
    "digits": DataInfo(1, 8, 10, (0.3076,), (0.3771,), (900, 897)),
    "mnist": DataInfo(1, 28, 10, (0.1307,), (0.3081,), (60_000, 10_000), "MNIST"),
    "fashion_mnist": DataInfo(1, 28, 10, (0.2860,), (0.3530,), (60_000, 10_000), "FashionMNIST"),
    "cifar10": DataInfo(3, 32, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), (50_000, 10_000), "CIFAR10"),
    "cifar100": DataInfo(3, 32, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), (50_000, 10_000), "CIFAR100"),
    "stl10": DataInfo(
        3, 96, 10, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713), (5000, 8000), "STL10", ("train", "test")
    ),
    "flowers102": DataInfo(3, 224, 102, *_IMAGENET, (1020, 6149), "Flowers102", ("train", "test")),
    "pets": DataInfo(3, 224, 37, *_IMAGENET, (3680, 3669), "OxfordIIITPet", ("trainval", "test")),
    "food101": DataInfo(3, 224, 101, *_IMAGENET, (75_750, 25_250), "Food101", ("train", "test")),
    "imagenet": DataInfo(3, 224, 1000, *_IMAGENET, (1_281_167, 50_000), "ImageNet", ("train", "val")),
}
DATASETS: Registry[DataInfo] = Registry("data set", _TABLE, also=["custom"])

Sample = tuple[Any, int]  # a PIL image and its label
Advance = Callable[[int, int], None]  # done, total


@runtime_checkable
class Samples(Protocol):
    """A sequence of undecoded samples: torchvision's data sets, `ParquetImages`, or the user's own."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


def describe(config: Data) -> DataInfo:
    """Returns channels, size, classes, mean and std of the configured data.

    Raises:
        ConfigError: a custom set cannot be read, or the user's own function does not give what it should.
    """
    if config.name == "custom":
        if config.source not in ("parquet", "folder"):
            raise ConfigError(f"data.source: {config.source!r} cannot be read as custom data; choose parquet or folder")
        samples = open_samples(config, "train")
        try:
            image, _ = next(iter(samples))
        except (OSError, SyntaxError, TypeError) as error:  # PIL's errors, or a null
            raise ConfigError(f"data.root: the first image under {config.root!r} cannot be read: {error}") from None
        channels = 1 if image.mode == "L" else 3
        # Pixels in -1..1, the usual choice where nothing is known about a data set.
        info = DataInfo(channels, min(image.size), _num_classes(samples), (0.5,) * channels, (0.5,) * channels)
    elif ":" in config.name:
        info = _own(config)[0]
    else:
        info = DATASETS[config.name]
    channels = config.channels or info.channels
    if channels != info.channels:
        # Grey images repeat their channel; coloured ones turn grey, whose statistics are close to the channels' mean.
        mean, std = (float(np.mean(v)) for v in (info.mean, info.std))
        info = replace(info, mean=(mean,) * channels, std=(std,) * channels)
    return replace(info, channels=channels, image_size=config.image_size or info.image_size)


def keyed(config: Data) -> dict[str, Any]:
    """Returns what of the configuration, the table, the files and the user's own code determines the images."""
    info = describe(config)
    content = {**config.keyed(), "mean": info.mean, "std": info.std}
    if config.source in ("parquet", "folder"):
        try:
            content["fingerprint"] = _fingerprint(config)
        except ConfigError:  # `check_data` says so; a plan may be for another machine
            content["fingerprint"] = "missing"
    return content


def check_data(config: Data) -> None:
    """Raises ConfigError unless both splits can be opened and their labels are those of the data set."""
    info = describe(config)
    if config.source == "folder":
        first, second = (open_samples(config, split).classes for split in SPLITS)  # type: ignore[attr-defined]
        if first != second:
            odd = min(set(first) ^ set(second))
            raise ConfigError(
                f"data.root: the class folder {odd!r} is not in both splits under {config.root!r}, which would number "
                "the classes differently; add an image of it or remove it"
            )
    for split in SPLITS:
        labels = np.asarray(getattr(open_samples(config, split), "targets", (0,)))
        if labels.min() < 0 or labels.max() >= info.num_classes:
            raise ConfigError(
                f"data.name: {config.name} has the labels 0 to {info.num_classes - 1}, but the {split} data under "
                f"{config.root!r} has {labels.min()} to {labels.max()}; correct data.name or data.root"
            )


def _own(config: Data) -> tuple[DataInfo, Samples, Samples]:
    """Returns what the user's own function gives for data.root: the data's description, training and test samples."""
    if config.source != "auto":
        raise ConfigError(
            f"data.source: {config.source!r} says nothing about {config.name}, which reads its own; remove it"
        )
    found = _called(imported(config.name), config.root)
    kinds = [DataInfo, Samples, Samples]
    if not (isinstance(found, tuple) and len(found) == 3 and all(map(isinstance, found, kinds))):
        raise ConfigError(
            f"data.name: {config.name} returned {found!r:.100}, not a DataInfo, training samples and test samples"
        )
    return found


@functools.lru_cache(maxsize=4)  # a description is asked for often
def _called(function: Callable[[str], Any], root: str) -> Any:
    return function(root)


def count_images(config: Data) -> tuple[int, int] | None:
    """Returns the numbers of training and test images; None of custom data that cannot be read."""
    if config.name in DATASETS:
        return DATASETS[config.name].images
    try:
        train, test = (len(open_samples(config, split)) for split in SPLITS)
    except PdiffError:
        return None
    return train, test


def open_samples(config: Data, split: str) -> Samples:
    """Opens the undecoded samples of a split ("train" or "test")."""
    if config.source == "parquet":
        return ParquetImages(parquet_files(config, split))
    if config.source == "folder":
        from torchvision.datasets import ImageFolder

        folder = _first_folder(config, split)
        try:
            return ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise ConfigError(f"data.root: {folder} has to hold a folder of images per class: {error}") from None
    if ":" in config.name:
        _, train, test = _own(config)
        return train if split == "train" else test
    if config.name == "digits":
        return _Digits(split)
    from torchvision import datasets

    info = DATASETS[config.name]
    kwargs: dict[str, Any] = {"split": info.splits[SPLITS.index(split)]} if info.splits else {"train": split == "train"}
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
        assert self.arrow is not None
        return pa.ipc.open_file(pa.memory_map(str(self.arrow))).read_all()["bytes"]

    def write_arrow(self, path: Path, progress: Advance | None = None) -> None:
        """Copies the encoded images to a new Arrow file and reads them from there."""
        self.arrow = path
        done, schema = 0, pa.schema({"bytes": pa.binary()})
        with pa.ipc.new_file(str(path), schema) as writer:
            for batch in self._batches("bytes"):
                writer.write_batch(batch.cast(schema))
                done += len(batch)
                if progress:
                    progress(done, len(self))

    def _batches(self, *columns: str) -> Iterator[pa.RecordBatch]:
        """Yields the files' rows in batches, with the columns "bytes", "label" or both."""
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
    return Image.open(io.BytesIO(encoded.as_py()))


def _num_classes(samples: Samples) -> int:
    classes = getattr(samples, "classes", None)
    return len(classes) if classes else int(max(samples.targets)) + 1  # type: ignore[attr-defined]


def parquet_files(config: Data, split: str) -> list[Path]:
    """Returns the Parquet files of a split under the root."""
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
    """Hashes custom files cheaply: names, sizes, and of Parquet files the end, whose footer changes with the data."""
    sha = hashlib.sha256()
    for split in SPLITS:
        if config.source == "parquet":
            for file in parquet_files(config, split):
                sha.update(f"{split}/{file.name}/{file.stat().st_size}".encode())
                with file.open("rb") as stream:
                    stream.seek(max(0, file.stat().st_size - 65536))
                    sha.update(stream.read())
        else:
            folder = _first_folder(config, split)
            for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                sha.update(f"{split}/{file.relative_to(folder)}/{file.stat().st_size}".encode())
    return sha.hexdigest()[:16]


def decoded(samples: Samples, index: int, info: DataInfo) -> tuple[np.ndarray, int]:
    try:
        image, label = samples[index]
        return decode(image, info), label
    except (OSError, SyntaxError) as error:  # PIL's errors
        known = getattr(samples, "samples", None)  # files and labels of an image folder
        name = known[index][0] if known else f"image {index}, counted from 0,"
        raise PdiffError(f"data.root: {name} cannot be decoded: {error}; replace or remove it") from None


def decode(image: Any, info: DataInfo) -> np.ndarray:
    """Turns a PIL image into uint8 (C, S, S): shorter edge resized to S, centre cropped."""
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
