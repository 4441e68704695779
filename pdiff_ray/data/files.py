"""Images in Parquet files and in folders: which files are a split's. Those have its exact name; others are not used."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.data.images import open_image, unreadable
from pdiff_ray.data.parquet import MIXED, ParquetImages, declared_classes

SPLITS = ("train", "test")
# Of files and folders; the first there is.
NAMES = {"train": ("train",), "test": ("test", "validation", "val", "valid")}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".gif", ".jp2", ".avif")
_PARQUET = re.compile(
    r"(?P<name>train|test|validation|valid|val)([-_.]?(?P<number>\d{1,9})(-of-(?P<total>\d{1,9}))?)?(-[0-9a-f]{16})?\.parquet"
)


class File(NamedTuple):
    """A file with its size in bytes and the time of its last change."""

    path: str
    size: int
    time_ns: int


@dataclass(frozen=True)
class Found:
    """The files of a data set.

    Attributes:
        folder: that the splits lie in.
        files: Parquet files, or images in the order of their classes, by split.
        places: folders of classes, by split; none of Parquet files.
        unused: other files and folders, relative to the root.
    """

    folder: Path
    files: dict[str, list[File]]
    places: dict[str, Path]
    unused: list[str]

    def states(self, split: str) -> list[Any]:
        """Returns path, size and time of every file of a split, as JSON values."""
        return ["" if self.folder.is_absolute() else os.getcwd(), self.files[split]]

    def fingerprint(self) -> str:
        """Hashes files cheaply: names, sizes, and of Parquet files the end, whose footer changes with the data."""
        sha = hashlib.sha256()
        for split in SPLITS:
            base = str(self.places[split]) if self.places else ""
            for file in sorted(self.files[split], key=lambda file: file.path.split(os.sep)):
                name = file.path[len(base) + 1 :] if base else os.path.basename(file.path)
                sha.update(f"{split}/{name}/{file.size}".encode())
                if not base:
                    with open(file.path, "rb") as stream:
                        stream.seek(max(0, file.size - 65536))
                        sha.update(stream.read())
        return sha.hexdigest()[:16]

    def open(self, split: str) -> FileImages:
        """Opens the images of a split; the training data says what the labels of both splits stand for.

        Raises:
            ConfigError: files cannot be read, or labels are missing or of no class.
        """
        files = {name: [file.path for file in found] for name, found in self.files.items()}
        if self.places:
            train = FolderImages(self.places["train"], files["train"])
            return train if split == "train" else FolderImages(self.places["test"], files["test"], train.classes)
        declared = declared_classes([file for name in SPLITS for file in files[name]])
        samples = ParquetImages(files["train"], declared)
        if split == "train":
            return samples
        test = ParquetImages(files["test"], samples.classes)
        if test.text != samples.text and not declared:
            raise ConfigError(f"data.root: {MIXED.format(files['train'][0], files['test'][0])}")
        return test


def find(source: str, root: Path) -> Found:
    """Finds the files of a data set below a root; source is "parquet" or "folder".

    Raises:
        ConfigError: files are missing, or it is not plain which ones are meant.
    """
    try:
        return _find_parquet(root) if source == "parquet" else _find_folders(root)
    except OSError as error:
        raise ConfigError(f"data.root: {error.filename} cannot be read: {error.strerror}; correct the path") from None


def _hidden(name: str) -> bool:
    """Tells whether a file or folder is none of the user's: `.ipynb_checkpoints`, `._x.png`, `__MACOSX`."""
    return name.startswith(".") or name == "__MACOSX"


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _find_parquet(root: Path) -> Found:
    there = [file for file in sorted(root.rglob("*.parquet")) if not any(map(_hidden, file.relative_to(root).parts))]
    folders: dict[Path, dict[str, list[Path]]] = {}  # files by the name of their split, in each folder
    for file in there:
        if match := _PARQUET.fullmatch(file.name):
            of_split = file.parent != root and any(file.parent.name in names for names in NAMES.values())
            folder = file.parent.parent if of_split else file.parent
            folders.setdefault(folder, {}).setdefault(match["name"], []).append(file)
    chosen: dict[str, list[Path]] = {}
    folder = root
    for split, names in NAMES.items():
        having = [place for place, files in folders.items() if any(name in files for name in names)]
        if split == "test" and folder in having:  # beside the training data
            having = [folder]
        if not having:
            others = f", only {', '.join(_relative(there[:3], root))}" if there else ""
            raise ConfigError(
                f"data.root: no {names[0]}*.parquet under {str(root)!r}{others}; put files there or correct the path"
            )
        if len(having) > 1 or (split == "test" and having != [folder]):
            places = sorted({str(place) for place in ([folder, *having] if split == "test" else having)})
            raise ConfigError(
                f"data.root: {str(root)!r} holds several configurations of a data set: {', '.join(places)}; set "
                "data.root to one of them, or put the files that belong together into one folder"
            )
        folder = having[0]
        name = next(name for name in names if name in folders[folder])
        chosen[split] = folders[folder][name]
        _check_shards(chosen[split])
    files = {split: [_file(str(file)) for file in there] for split, there in chosen.items()}
    used = {file for files in chosen.values() for file in files}
    return Found(folder, files, {}, _relative([file for file in there if file not in used], root))


def _relative(files: Iterable[Path], root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in files]


def _file(path: str) -> File:
    try:
        state = os.stat(path)
    except OSError as error:
        raise ConfigError(unreadable(path, error.strerror)) from None
    if not stat.S_ISREG(state.st_mode):  # to open a named pipe would wait for ever
        raise ConfigError(unreadable(path, "it is no regular file"))
    return File(path, state.st_size, state.st_mtime_ns)


def _check_shards(files: Sequence[Path]) -> None:
    """Raises ConfigError unless shards that say how many they are are so many, each once."""
    matches = [_PARQUET.fullmatch(file.name) for file in files]
    totals = {match["total"] for match in matches if match}
    numbers = Counter(int(match["number"] or -1) for match in matches if match)
    where, total = f"data.root: the shards in {files[0].parent}", next(iter(totals))
    first = 1 if total and int(total) in numbers else 0
    expected = range(first, first + int(total)) if total else numbers
    if len(totals) > 1 or max(numbers.values()) > 1 or not all(number in expected for number in numbers):
        raise ConfigError(
            f"{where} do not belong together: {', '.join(file.name for file in files[:6])}; remove those that are of "
            "another version of the data"
        )
    if missing := len(expected) - len(numbers):
        name = files[0].name.partition("-")[0]
        some = itertools.islice((number for number in expected if number not in numbers), 6)
        names = ", ".join(f"{name}-{number:05d}-of-{total}" for number in some)
        raise ConfigError(
            f"{where} are {len(files)} of {len(expected)}; put those that are missing there: {names}"
            + (f" and {missing - 6} more" if missing > 6 else "")
        )


# --- folders ----------------------------------------------------------------------------------------------------------


def _find_folders(root: Path) -> Found:
    places: dict[str, Path] = {}
    for split, names in NAMES.items():
        place = next((root / name for name in names if (root / name).is_dir()), None)
        if place is None:
            raise ConfigError(f"data.root: no folder {' or '.join(names)} under {str(root)!r}")
        places[split] = place
    files: dict[str, list[File]] = {}
    unused = [entry.name for entry in sorted(root.iterdir()) if entry.is_dir() and entry not in places.values()]
    for split, place in places.items():
        images, others = list[str](), list[str]()
        for folder in sorted(entry for entry in place.iterdir()):
            for path in _walk(folder) if folder.is_dir() else [str(folder)]:
                image = folder.is_dir() and path.lower().endswith(SUFFIXES)
                (images if image else others).append(path)
        files[split] = [_file(path) for path in images]
        unused += _relative(map(Path, others), root)
    return Found(root, files, places, [name for name in unused if not _hidden(name.rpartition("/")[2])])


def _walk(folder: Path) -> list[str]:
    """Returns all files below a folder in the order of folders and names, also through links, but hidden ones."""

    def refuse(error: OSError) -> None:
        raise error

    if _hidden(folder.name):
        return []
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        seen.add(os.path.realpath(place))  # a link may lead back
        folders[:] = [f for f in folders if not _hidden(f) and os.path.realpath(os.path.join(place, f)) not in seen]
        found.append((place, sorted(name for name in names if not _hidden(name))))
    return [os.path.join(place, name) for place, names in sorted(found) for name in names]


class FolderImages:
    """Images in a folder per class.

    Attributes:
        classes: names of the folders, sorted; of the training data.
        targets: (N,) int64.
    """

    def __init__(self, place: Path, files: Sequence[str], classes: Sequence[str] | None = None) -> None:
        self.files = files
        folders = sorted(entry.name for entry in place.iterdir() if entry.is_dir() and not _hidden(entry.name))
        if not folders:
            raise ConfigError(f"data.root: {place} has to hold a folder of images per class")
        own = [file[len(str(place)) + 1 :].partition(os.sep)[0] for file in files]
        if empty := sorted({*folders} - {*own}):
            raise ConfigError(
                f"data.root: the class folder {place / empty[0]} holds no image ({', '.join(SUFFIXES)}); add some or "
                "remove it"
            )
        self.classes = list(classes or folders)
        if unknown := sorted({*folders} - {*self.classes}):
            raise ConfigError(
                f"data.root: the class folder {place / unknown[0]} is none of the training data's; add training "
                "images of it or remove it"
            )
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.targets = np.array([numbers[name] for name in own], np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return open_image(Path(self.files[index]), self.name(index)), int(self.targets[index])

    def name(self, index: int) -> str:
        """Returns where an image is, for messages."""
        return self.files[index]

    def opened(self) -> Iterator[Image.Image]:
        """Yields the undecoded images in order."""
        for index in range(len(self)):
            with self[index][0] as image:
                yield image


FileImages = ParquetImages | FolderImages
