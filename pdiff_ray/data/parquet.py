"""Images in Parquet files of the Hugging Face schema: their bytes, labels and declared classes."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from PIL import Image

from pdiff_ray.common.errors import ConfigError, first_line
from pdiff_ray.data.images import open_image
from pdiff_ray.data.kept import CHECKED_APART, CHECKSUMS

MIXED = "labels are text in one of {} and {}, and numbers in the other; write all alike"

Advance = Callable[[int, int], None]  # done, total


def declared_classes(files: Sequence[str]) -> list[str] | None:
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


@contextlib.contextmanager
def _reading(file: str) -> Iterator[None]:
    """Turns what pyarrow raises into one message, also of names and labels that are no text."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.root: {file} cannot be read as Parquet images: {first_line(error)}") from None


def _dataset(file: str) -> ds.Dataset:
    with _reading(file):
        return ds.dataset(file, format="parquet")


def _columns(file: str, schema: pa.Schema) -> tuple[str, str]:
    """Returns the names of the columns of images and of labels."""
    with _reading(file):
        names = schema.names
    image = next((n for n in ("img", "image") if n in names), None)
    label = next((n for n in ("label", "fine_label") if n in names), None)
    if image is None or label is None:
        raise ConfigError(
            f"data.root: {file} has columns {', '.join(names)}; wanted are img or image (struct with bytes) and label"
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
            raise ConfigError(f"data.root: {MIXED.format(*kinds.values())}")
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
            with _reading(file):
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
    with _reading(file):
        column = dataset.to_table(columns=[label])[label]
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
        if not text and not any(matches(kind) for matches in numbers):
            raise ConfigError(
                f"data.root: {file} has labels of type {kind}; wanted is one number or one class name for each image"
            )
        column = column.cast(kind).cast(pa.string() if text else pa.int64())
        column.validate(full=text)
        return column
