"""Where images come from: one table of data sets, and their undecoded samples from torchvision, files or own code."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from filelock import FileLock
from PIL import Image

from pdiff_ray.common.errors import ConfigError, PdiffError, first_line
from pdiff_ray.common.registry import Registry, imported
from pdiff_ray.config.schema import Data
from pdiff_ray.data.files import SPLITS, Found, find
from pdiff_ray.data.images import Looks, decode, unreadable
from pdiff_ray.data.survey import survey

FILES = ("parquet", "folder")  # sources of which each file is known
MAX_CLASSES = 100_000  # labels beyond are no classes
LOOKED_AT = 250  # samples of a split of the user's own, or up to twice as many
READING = 2  # how files become images; raise it when they become others, for those that do


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


@runtime_checkable
class Samples(Protocol):
    """A sequence of undecoded samples: torchvision's data sets, images in files, or the user's own."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


def describe(config: Data) -> DataInfo:
    """Returns channels, size, classes, mean and std of the configured data.

    Raises:
        ConfigError: a custom set cannot be read, or the user's own function does not give what it should.
    """
    if config.name == "custom" and config.source not in FILES:
        raise ConfigError(f"data.source: {config.source!r} cannot be read as custom data; choose parquet or folder")
    return _describe(config, _found(config) if config.name == "custom" else None)


def _describe(config: Data, found: Found | None) -> DataInfo:
    """Describes a data set of which the files are found, if it is read from files."""
    if config.name == "custom":
        assert found
        surveys = [survey(found, split) for split in SPLITS]
        channels = 1 if all(one.grey for one in surveys) else 3
        # Pixels in -1..1, the usual choice where nothing is known about a data set.
        info = DataInfo(channels, surveys[0].edge, _num_classes(found), (0.5,) * channels, (0.5,) * channels)
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
    found, missing = None, {}
    if _reads_files(config):
        try:
            found = _found(config)
        except ConfigError:
            if config.name == "custom":
                raise
            missing = {"fingerprint": "missing"}  # `check_data` says so; a plan may be for another machine
    info = _describe(config, found) if found else describe(config)
    content = {**config.keyed(), "mean": info.mean, "std": info.std, **missing}
    if ":" in config.name:
        content["reading"] = READING  # there are no results of earlier versions
    if found:
        content["fingerprint"] = found.fingerprint()
        if not _read_as_before(config, found):
            content["reading"] = READING
    return content


def _read_as_before(config: Data, found: Found) -> bool:
    """Tells whether results of earlier versions, which went by the first image and the highest label, still hold."""
    train, test = (survey(found, split) for split in SPLITS)
    size = config.name != "custom" or config.image_size or train.edge == train.first_edge
    samples = found.open("train")
    classes = config.name != "custom" or _num_classes(found) == int(samples.targets.max()) + 1
    return bool(train.plain and test.plain and size and classes)


def check_data(config: Data) -> None:
    """Raises ConfigError unless both splits can be opened and their labels are those of the data set."""
    info = describe(config)
    for split in SPLITS:
        samples = open_samples(config, split)
        if (classes := getattr(samples, "classes", None)) and len(classes) != info.num_classes and _reads_files(config):
            raise ConfigError(
                f"data.name: {config.name} has {info.num_classes} classes, but under {config.root!r} are "
                f"{len(classes)} ({', '.join(map(str, classes[:5]))}, ...); correct data.name or data.root"
            )
        labels = np.asarray(getattr(samples, "targets", (0,)))
        check_labels(config, info, samples, labels)


def check_labels(config: Data, info: DataInfo, samples: Samples, labels: np.ndarray) -> None:
    """Raises ConfigError if a label (N,) is of no class."""
    bad = np.flatnonzero((labels < 0) | (labels >= info.num_classes))
    if not len(bad):
        return
    whose = f"{config.name} has"
    if config.name == "custom":
        whose = "the classes have" if getattr(samples, "classes", None) else "the training data has"
    more = f", and {len(bad) - 1} more have such" if len(bad) > 1 else ""
    raise ConfigError(
        f"data.name: {whose} the labels 0 to {info.num_classes - 1}, but {_name(samples, int(bad[0]))} has the label "
        f"{labels[bad[0]]}{more}; correct the labels, data.name or data.root"
    )


@dataclass(frozen=True)
class Inventory:
    """What a data set is found to be.

    Attributes:
        images: by split.
        classes: that have images, by split; None where that takes reading all of them.
        where: what kind of files, and their folder.
        unused: files and folders below the root that belong to no split.
        warnings: what may be wrong with the images.
    """

    info: DataInfo
    images: dict[str, int]
    classes: dict[str, int | None]
    where: str = ""
    unused: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def inventory(config: Data) -> Inventory:
    """Returns what is found of a data set; of those in torchvision's format and the digits, what the table has.

    Raises:
        ConfigError: it cannot be read.
    """
    if not _reads_files(config):
        counts, warnings = count_images(config) or (0, 0), []
        if ":" in config.name:
            warnings = [warning for split in SPLITS for warning in _look(open_samples(config, split), split)]
        return Inventory(
            describe(config), dict(zip(SPLITS, counts, strict=True)), dict.fromkeys(SPLITS), warnings=warnings
        )
    found = _found(config)
    info = _describe(config, found)
    targets = {split: found.open(split).targets for split in SPLITS}
    kind = "folders of classes" if found.places else "Parquet files"
    return Inventory(
        info,
        {split: len(labels) for split, labels in targets.items()},
        {split: len(np.unique(labels)) for split, labels in targets.items()},
        f"{kind} in {found.folder}",
        found.unused,
        [warning for split in SPLITS for warning in survey(found, split).warnings],
    )


def _look(samples: Samples, split: str) -> list[str]:
    """Returns warnings of samples of the user's own, of which some are looked at."""
    looks = Looks(split, len(samples))
    for index in range(0, len(samples), max(1, len(samples) // LOOKED_AT)):
        looks.add(_name(samples, index), samples[index][0])
    return looks.warnings()


def _reads_files(config: Data) -> bool:
    return config.source in FILES and ":" not in config.name


def _found(config: Data) -> Found:
    return find(config.source, Path(config.root))


def file_states(config: Data, split: str) -> list[Any]:
    """Returns path, size and time of the files of a split, if the data is in Parquet files or folders."""
    return _found(config).states(split) if _reads_files(config) else []


def _num_classes(found: Found) -> int:
    """Returns the number of declared classes, of class folders, or of labels from 0 to the highest."""
    samples = found.open("train")
    count = len(samples.classes) if samples.classes else int(samples.targets.max()) + 1
    if count > MAX_CLASSES:
        raise ConfigError(
            f"data.root: {samples.name(int(samples.targets.argmax()))} has the label {count - 1}, which would make "
            f"{count:,} classes; number the classes from 0"
        )
    return count


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
    try:
        if _reads_files(config) or config.name not in DATASETS:
            train, test = (len(open_samples(config, split)) for split in SPLITS)
            return train, test
    except PdiffError:  # `check_data` says so
        pass
    return DATASETS[config.name].images if config.name in DATASETS else None


def open_samples(config: Data, split: str) -> Samples:
    """Opens the undecoded samples of a split ("train" or "test")."""
    if _reads_files(config):
        return _found(config).open(split)
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
        with _downloading(config) if kwargs.get("download") else contextlib.nullcontext():
            return getattr(datasets, str(info.torchvision))(root=config.root, **kwargs)
    except Exception as error:  # of any kind, as its readers meet damaged files
        reason = first_line(error)
        raise ConfigError(
            f"data.root: {config.name} is not under {config.root!r} ({reason}); put it there, set data.download: true "
            "to let torchvision fetch it, or name another data.source"
        ) from None


@contextlib.contextmanager
def _downloading(config: Data) -> Iterator[None]:
    """Has one process at a time fetch a data set: torchvision writes where it stays."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # nothing can be written there, so that nothing will be fetched
            Path(config.root).mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(Path(config.root) / f".{config.name}.lock"))
        yield


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


def decoded(samples: Samples, index: int, info: DataInfo) -> tuple[np.ndarray, int]:
    """Returns an image as uint8 (C, S, S), and its label.

    Raises:
        PdiffError: it cannot be decoded.
    """
    try:
        image, label = samples[index]
        if info.torchvision and type(samples).__module__.startswith("torchvision."):  # as they lie in the files
            image.info.clear()
        return decode(image, info.channels, info.image_size), int(label)
    except PdiffError:
        raise
    except Exception as error:  # of any kind, as readers meet damaged files
        raise PdiffError(unreadable(_name(samples, index), error)) from error


def _name(samples: Samples, index: int) -> str:
    """Returns where an image is, for messages."""
    if name := getattr(samples, "name", None):
        return name(index)
    if known := getattr(samples, "samples", None):  # files and labels of torchvision's image folders
        return known[index][0]
    known = getattr(samples, "_image_files", getattr(samples, "_images", None))  # Flowers102, Food101; OxfordIIITPet
    return str(known[index]) if known else f"image {index}, counted from 0,"
