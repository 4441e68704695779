"""Images in Parquet files and in folders: which files are a split's, their classes and labels, and what the images are.

A split's files have its exact name; the others are not used. Files are surveyed once, and the cache remembers it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from PIL import Image

from pdiff_ray.common.errors import ConfigError, PdiffError
from pdiff_ray.data.images import GREY, Looks, is_plain, open_image, unreadable
from pdiff_ray.data.kept import CHECKED_APART, CHECKSUMS, build_once, default_cache, digest

SPLITS = ("train", "test")
NAMES = {
    "train": ("train",),
    "test": ("test", "validation", "val", "valid"),
}  # of files and folders; the first there is
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".gif", ".jp2", ".avif")
MAX_CLASSES = 100_000  # labels beyond are no classes
LOOKED_AT = 100_000_000  # pixels of a split that are decoded to see whether its images differ: two seconds
MANY = 100_000  # images of which to read the headers takes a while
_MIXED = "labels are text in one of {} and {}, and numbers in the other; write all alike"
_PARQUET = re.compile(
    r"(?P<name>train|test|validation|valid|val)([-_.]?(?P<number>\d{1,9})(-of-(?P<total>\d{1,9}))?)?(-[0-9a-f]{16})?\.parquet"
)

Advance = Callable[[int, int], None]  # done, total


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
        declared = _declared([file for name in SPLITS for file in files[name]])
        samples = ParquetImages(files["train"], declared)
        if split == "train":
            return samples
        test = ParquetImages(files["test"], samples.classes)
        if test.text != samples.text and not declared:
            raise ConfigError(f"data.root: {_MIXED.format(files['train'][0], files['test'][0])}")
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


def _declared(files: Sequence[str]) -> list[str] | None:
    """Returns the names of the classes as the files' metadata has them (Hugging Face's `ClassLabel`), if it does."""
    found: dict[str, list[str]] = {}
    for file in files:
        schema = _dataset(file).schema
        try:
            features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
            names = features["info"]["features"][_columns(file, schema)[1]]["names"]
        except (ValueError, KeyError, TypeError):  # it has none, or is somebody else's
            continue
        if isinstance(names, list) and names:
            found[file] = list(map(str, names))
    if len({tuple(names) for names in found.values()}) > 1:
        first = next(iter(found))
        other = next(file for file, names in found.items() if names != found[first])
        raise ConfigError(
            f"data.root: {first} and {other} declare different classes ({', '.join(found[first][:5])}, ...; "
            f"{', '.join(found[other][:5])}, ...); they are not of one data set"
        )
    return next(iter(found.values()), None)


def _dataset(file: str) -> ds.Dataset:
    try:
        return ds.dataset(file, format="parquet")
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"data.root: {file} cannot be read as Parquet images: {error}") from None


def _columns(file: str, schema: pa.Schema) -> tuple[str, str]:
    """Returns the names of the columns of images and of labels."""
    image = next((n for n in ("img", "image") if n in schema.names), None)
    label = next((n for n in ("label", "fine_label") if n in schema.names), None)
    if image is None or label is None:
        raise ConfigError(
            f"data.root: {file} has columns {', '.join(schema.names)}; wanted are img or image (struct with bytes) "
            "and label"
        )
    return image, label


class ParquetImages:
    """Images in the Hugging Face schema: `img` or `image` struct with `bytes`, and `label` (or `fine_label`).

    Parquet has no quick way to single rows: they come from a file of the encoded images one after another, which
    `write_records` makes. Mapped, it takes no memory of a process, and travels to others as a path.

    Attributes:
        classes: names of what labels stand for; None if labels are numbers and nothing declares names.
        targets: (N,) int64.
        text: whether the files have names as labels.
        kept: the folder of the cache that `write_records` has filled.
    """

    def __init__(self, files: Sequence[str], classes: Sequence[str] | None = None) -> None:
        self.files = files
        self.kept: Path | None = None
        columns = [_labels(file) for file in files]
        self.first_rows = np.cumsum([0, *map(len, columns)])  # of each file
        if not len(self):
            raise ConfigError(f"data.root: {files[0]} holds no images")
        self.classes = classes
        filled = {file: column for file, column in zip(files, columns, strict=True) if len(column)}
        kinds = {column.type: file for file, column in filled.items()}
        if len(kinds) > 1:
            raise ConfigError(f"data.root: {_MIXED.format(*kinds.values())}")
        self.text = pa.string() in kinds
        labels = pa.chunked_array([chunk for column in filled.values() for chunk in column.chunks])
        self._refuse(pc.is_null(labels), "no label", labels)
        if self.text:
            self.classes = classes or sorted(labels.unique().to_pylist())
            targets = pc.index_in(labels, pa.array(self.classes, pa.string()))
            self._refuse(pc.is_null(targets), "the label {!r}, which is none of the classes", labels)
            labels = targets
        self._refuse(pc.less(labels, 0), "the label {}, which means that it has none", labels)
        self.targets = labels.to_numpy().astype(np.int64)

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return open_image(self._record(index), self.name(index)), int(self.targets[index])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_records"}

    def name(self, index: int) -> str:
        """Returns where an image is, for messages."""
        file = int(np.searchsorted(self.first_rows, index, side="right")) - 1
        return f"{self.files[file]}, row {index - self.first_rows[file]} (counted from 0),"

    def opened(self) -> Iterator[Image.Image]:
        """Yields the undecoded images in order, few of them in memory."""
        for index, encoded in enumerate(self._encoded()):
            yield open_image(encoded, self.name(index))

    def write_records(self, folder: Path, progress: Advance = lambda *_: None) -> None:
        """Writes the encoded images, one after another, with their ends and checksums, into a folder of the cache."""
        ends, checksums, end = [], [], 0
        with (folder / f"images{CHECKED_APART}").open("wb") as stream:
            for encoded in self._encoded():
                stream.write(encoded)
                end += len(encoded)
                ends.append(end)
                checksums.append(zlib.crc32(encoded))
                if len(ends) % 256 == 0 or len(ends) == len(self):
                    progress(len(ends), len(self))
        np.save(folder / "ends.npy", np.array(ends, np.int64))
        np.save(folder / "checksums.npy", np.array(checksums, np.uint32))

    @functools.cached_property
    def _records(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        assert self.kept is not None
        ends, checksums = (np.load(self.kept / f"{name}.npy") for name in ("ends", "checksums"))
        return np.memmap(self.kept / f"images{CHECKED_APART}", np.uint8, "r"), ends, checksums

    def _record(self, index: int) -> bytes:
        """Returns an encoded image from the folder; if that is damaged, from its Parquet file."""
        assert self.kept is not None
        with contextlib.suppress(OSError, ValueError):  # not there, or empty
            content, ends, checksums = self._records
            encoded = content[ends[index - 1] if index else 0 : ends[index]].tobytes()
            if zlib.crc32(encoded) == checksums[index]:
                return encoded
        print(f"cache: {self.kept} is damaged and will be made anew", file=sys.stderr)
        (self.kept / CHECKSUMS).unlink(missing_ok=True)
        file = int(np.searchsorted(self.first_rows, index, side="right")) - 1
        dataset = _dataset(self.files[file])
        image, _ = _columns(self.files[file], dataset.schema)
        rows = [int(index - self.first_rows[file])]
        return dataset.take(rows, columns={"bytes": ds.field(image, "bytes")})["bytes"][0].as_py()

    def _encoded(self) -> Iterator[bytes]:
        """Yields the encoded images of all files, in order, one for each label."""
        index = 0
        for file, rows in zip(self.files, np.diff(self.first_rows), strict=True):
            if not rows:
                continue  # perhaps of no type
            dataset = _dataset(file)
            image, _ = _columns(file, dataset.schema)
            try:
                # Small batches and little read ahead: a set may be larger than memory.
                for batch in dataset.to_batches(
                    columns={"bytes": ds.field(image, "bytes")}, batch_size=256, batch_readahead=2
                ):
                    for value in batch["bytes"]:
                        encoded = value.as_py()
                        if index == len(self):
                            raise pa.ArrowInvalid("it has more images than labels")
                        if not isinstance(encoded, bytes):
                            raise ConfigError(
                                f"data.root: {self.name(index)} has no bytes of an image; embed it or remove the row"
                            )
                        yield encoded
                        index += 1
            except (pa.ArrowException, OSError) as error:
                raise ConfigError(f"data.root: {file} cannot be read as Parquet images: {error}") from None

    def _refuse(self, bad: pa.ChunkedArray, what: str, labels: pa.ChunkedArray) -> None:
        """Raises ConfigError if a label is marked as bad."""
        count = pc.sum(bad).as_py()
        if count:
            index = pc.index(bad, True).as_py()
            more = f", and {count - 1} more like it" if count > 1 else ""
            name = self.name(index)
            hint = " (without files named test, those named validation are taken)" if "/test" in name else ""
            raise ConfigError(
                f"data.root: {name} has {what.format(labels[index].as_py())}{more}; correct or remove it{hint}"
            )


def _labels(file: str) -> pa.ChunkedArray:
    """Returns the labels of a file as int64 or text."""
    dataset = _dataset(file)
    _, label = _columns(file, dataset.schema)
    try:
        column = dataset.to_table(columns=[label])[label]
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
        if not text and not any(matches(kind) for matches in numbers):
            raise ConfigError(
                f"data.root: {file} has labels of type {kind}; wanted is one number or one class name for each image"
            )
        return column.cast(kind).cast(pa.string() if text else pa.int64())
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"data.root: {file} cannot be read as Parquet images: {error}") from None


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


# --- what the images are ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Survey:
    """What the headers of a split's images tell.

    Attributes:
        grey: whether all images are.
        edge: the median of their shorter edges, in pixels.
        plain: whether earlier versions of this package read all of them as this one does.
        first_edge: the shorter edge of the first image, which those versions took for all.
        warnings: images that have one value everywhere or are equal, among as many as were decoded.
    """

    grey: bool
    edge: int
    plain: bool
    first_edge: int
    warnings: list[str]


def survey(found: Found, split: str) -> Survey:
    """Looks at all images of a split, unless the cache knows of it.

    Raises:
        ConfigError: an image cannot be read.
    """
    return _remembered(digest(["survey 1", found.states(split)]), lambda: _survey(found.open(split), split))


_SURVEYS: dict[str, Survey] = {}


def _remembered(key: str, make: Callable[[], Survey]) -> Survey:
    if key not in _SURVEYS:
        folder = default_cache() / f"survey-{key}"
        try:
            build_once(folder, lambda made: _write(made / "survey.json", make()))
            _SURVEYS[key] = Survey(**json.loads((folder / "survey.json").read_text(encoding="utf-8")))
        except ConfigError:
            raise
        except (PdiffError, OSError):  # a cache that cannot be written; decoding says so
            _SURVEYS[key] = make()
    return _SURVEYS[key]


def _write(file: Path, survey: Survey) -> None:
    file.write_text(json.dumps(asdict(survey)), encoding="utf-8")


def _survey(samples: FileImages, split: str) -> Survey:
    if len(samples) >= MANY:
        print(f"reading the headers of {len(samples):,} images of the {split} data, once", file=sys.stderr)
    edges, grey, plain, pixels, looks = [], True, True, 0, Looks(split, len(samples))
    for index, image in enumerate(samples.opened()):
        edges.append(min(image.size))
        grey = grey and image.mode in GREY
        plain = plain and is_plain(image)
        if pixels + image.width * image.height <= LOOKED_AT * (index + 1) / len(samples):  # evenly spread
            pixels += image.width * image.height
            looks.add(samples.name(index), image)
    return Survey(grey, int(np.sort(edges)[(len(edges) - 1) // 2]), plain, edges[0], looks.warnings())
