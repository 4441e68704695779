"""The parameter store: networks as rows of Parquet part files, their flattened parameters beside what is known of them.

One format serves zoos, generated samples and evaluations (which leave the vectors out). A row with a vector has a row
group of its own, so that one network, or one column, is read without the rest; pages carry checksums. Part files are
written whole, under a name that holds their digest, by any number of workers at once. A store keeps the files that it
has read open, their footers parsed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import platform
import resource
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pdiff_ray.common.errors import StorageError
from pdiff_ray.networks.subset import Subset
from pdiff_ray.storage.artifacts import Artifact, digest
from pdiff_ray.storage.files import Storage

PARTS = "networks"  # folder of the part files in an artifact
METADATA_KEY = b"pdiff_ray"
MAX_OPEN_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4  # of a store


@dataclass(frozen=True)
class Record:
    """A network and what is known of it. Accuracies are fractions, losses mean cross-entropies in nats.

    `train_*` are measured on the selection split, which is training data.
    """

    id: int
    group: str  # original, ensemble, noise_added, fine_tuned or generated
    vector: np.ndarray | None = None  # (D,) float32
    parent: int | None = None  # id of the member it was made from
    sigma: float | None = None  # of the noise added to the parent
    seed: int | None = None
    step: int | None = None  # of training
    train_accuracy: float | None = None
    train_loss: float | None = None
    validation_accuracy: float | None = None
    validation_loss: float | None = None
    test_accuracy: float | None = None
    test_loss: float | None = None
    wrong: bytes | None = None  # which test images it gets wrong: np.packbits over the test set
    nearest_distance: float | None = None  # L2 to the nearest (other) member over the mean distance among members
    created_at: datetime | None = None
    worker: str | None = None

    @property
    def judged(self) -> bool:
        return self.wrong is not None


_TYPES = {
    "id": pa.int64(),
    "group": pa.string(),
    "parent": pa.int64(),
    "sigma": pa.float64(),
    "seed": pa.int64(),
    "step": pa.int64(),
    "train_accuracy": pa.float64(),
    "train_loss": pa.float64(),
    "validation_accuracy": pa.float64(),
    "validation_loss": pa.float64(),
    "test_accuracy": pa.float64(),
    "test_loss": pa.float64(),
    "wrong": pa.binary(),
    "nearest_distance": pa.float64(),
    "created_at": pa.timestamp("us", "UTC"),
    "worker": pa.string(),
}
COLUMNS = tuple(_TYPES)


def stamp() -> dict[str, Any]:
    """When and where a row is made."""
    return {"created_at": datetime.now(UTC), "worker": f"{platform.node()}:{os.getpid()}"}


def encode(records: Sequence[Record], subset: Subset, about: dict[str, Any]) -> bytes:
    """A Parquet file of `records`; with vectors if the first has one.

    Args:
        about: what else a lone file should say of its networks; JSON values.
    """
    columns = {name: pa.array([getattr(r, name) for r in records], kind) for name, kind in _TYPES.items()}
    if records[0].vector is not None:
        flat = np.concatenate([np.asarray(r.vector, dtype=np.float32) for r in records])
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(flat), subset.size)
    metadata = {METADATA_KEY: json.dumps({"format": 1, "subset": json.loads(subset.to_json()), **about})}
    table = pa.table(columns).replace_schema_metadata(metadata)
    sink = io.BytesIO()
    # Random floats neither repeat nor compress: a dictionary makes them larger, a codec only slower. Statistics of so
    # few rows say nothing, and a vector in one page can be read without Parquet's machinery.
    pq.write_table(
        table,
        sink,
        row_group_size=1 if "vector" in columns else len(records),
        use_dictionary=False,
        compression="none",
        write_statistics=False,
        data_page_size=2**30,
        write_page_checksum=True,
    )
    return sink.getvalue()


_Page = tuple[Callable[[int, int], bytes], int, int]  # reads an open file; bytes of a vector, and where they begin


class _Part:
    """An open part file."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.stream = storage.open(name)
        self._remote = storage.local is None

    @functools.cached_property
    def file(self) -> pq.ParquetFile:
        # An object store answers few large requests sooner than many small ones.
        return pq.ParquetFile(self.stream, page_checksum_verification=True, pre_buffer=self._remote)

    def read(self, rows: list[int], columns: list[str]) -> pa.Table:
        """Columns of some rows."""
        if self.file.num_row_groups == self.file.metadata.num_rows:
            return self.file.read_row_groups(rows, columns=columns)
        return self.file.read(columns=columns).take(rows)

    @functools.cached_property
    def _floats(self) -> int:
        return self.file.schema_arrow.field("vector").type.list_size

    def first(self, row: int) -> tuple[_Page, np.ndarray]:
        """Where a vector is, and itself (D,), straight from its page, which takes a tenth of pyarrow's time.

        Raises:
            ArrowException, OSError, IndexError: it does not fit its checksum, or is not as `encode` writes it.
        """
        metadata = self.file.metadata
        group = metadata.row_group(row)
        if group.num_rows != 1:
            raise OSError("not a row group of its own")
        column = group.column(metadata.num_columns - 1)
        offset, length, size = column.data_page_offset, column.total_compressed_size, 4 * self._floats
        chunk = self.stream.read_at(length, offset)
        if size > length or len(chunk) < length or not _whole_page(chunk):
            raise OSError("not a whole page")
        begin = length - size
        return (self.stream.read_at, size, offset + begin), np.frombuffer(chunk, np.float32, offset=begin)


def _whole_page(chunk: bytes) -> bool:
    """Whether a column chunk is one uncompressed data page that fits its checksum.

    Its header, in Thrift's compact encoding, begins with four 32-bit integers, each after a byte 0x15: the page's kind
    (0), its size uncompressed and compressed, and its CRC-32. Its data end the chunk.
    """
    if not chunk.startswith(b"\x15\x00\x15"):
        return False
    size, end = _zigzag(chunk, 3)
    again = end + 1 + end - 3
    if chunk[end : again + 1] != b"\x15" + chunk[3:end] + b"\x15":
        return False
    checksum, _ = _zigzag(chunk, again + 1)
    return zlib.crc32(memoryview(chunk)[-size:]) == checksum & 0xFFFFFFFF


def _zigzag(chunk: bytes, position: int) -> tuple[int, int]:
    """A signed integer of variable length, and where it ends."""
    value = shift = 0
    while True:
        byte = chunk[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value >> 1 ^ -(value & 1), position
        shift += 7


class ParameterStore:
    """The part files of one artifact, finished or still growing.

    Args:
        artifact: whose networks these are. If it is finished, the parts are those of its manifest; else all whole files
            that are there now.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.storage: Storage = artifact.storage
        self._local = self.storage.local is not None
        self._rows: dict[int, tuple[str, int]] = {}  # id to part and row
        self._parts: dict[str, list[int]] = {}  # part to ids
        self._opened: dict[str, _Part] = {}
        self._pages: dict[int, _Page] = {}  # by id, of vectors that have been read from files that are open
        if artifact.exists():
            for name, entry in artifact.manifest()["files"].items():
                if name.startswith(f"{PARTS}/"):
                    self._add(name, entry["ids"])
        else:
            for path in self.storage.list(f"{artifact.folder}/{PARTS}"):
                name = path.removeprefix(f"{artifact.folder}/")
                with self._naming(name):
                    self._add(name, self._open(name).file.read(columns=["id"])["id"].to_pylist())

    def _add(self, part: str, ids: list[int]) -> None:
        self._parts[part] = ids
        for row, id_ in enumerate(ids):
            self._rows.setdefault(id_, (part, row))

    @property
    def ids(self) -> list[int]:
        return sorted(self._rows)

    def append(self, records: Sequence[Record], subset: Subset, about: Mapping[str, Any] | None = None) -> None:
        """Writes one part file; networks that are there already are left out, as they have the same content.

        Args:
            about: what else is to be known of the part; JSON values.
        """
        records = [r for r in records if r.id not in self._rows]
        if not records:
            return
        content = encode(records, subset, {"stage": self.artifact.stage, "key": self.artifact.key, **(about or {})})
        name = f"{PARTS}/part-{digest(content)}.parquet"
        self.storage.write(f"{self.artifact.folder}/{name}", content)
        self._add(name, [r.id for r in records])

    def manifest_entries(self, ids: Iterable[int]) -> dict[str, dict[str, Any]]:
        """What `Artifact.commit` takes as parts: the fewest files that hold each of `ids`."""
        needed = {self._rows[id_][0] for id_ in ids}
        return {
            name: {"path": name, "sha256": name.removesuffix(".parquet").rpartition("-")[2], "ids": self._parts[name]}
            for name in sorted(needed)
        }

    def subset(self) -> Subset:
        """The manifest of the vectors, from a file's own metadata."""
        part = next(iter(self._parts), None)
        if part is None:
            raise StorageError(f"{self.artifact.location}: holds no networks")
        return Subset.from_json(json.dumps(self.about(part)["subset"]))

    def about(self, part: str) -> dict[str, Any]:
        """What a part file says of its networks beside their rows."""
        with self._naming(part):
            return json.loads(self._open(part).file.schema_arrow.metadata[METADATA_KEY])

    def records(self, ids: Sequence[int] | None = None, *, vectors: bool = False) -> list[Record]:
        """Rows in the order of `ids` (default: all, by id)."""
        table, order = self._read(self._places(ids), [*COLUMNS, "vector"] if vectors else list(COLUMNS))
        rows = table.drop_columns(["vector"]).to_pylist() if vectors else table.to_pylist()
        if vectors:
            for row, vector in zip(rows, _matrix(table), strict=True):
                row["vector"] = vector
        records = [Record(**row) for row in rows]
        return [records[position] for position in order]

    def vectors(self, ids: Sequence[int] | None = None) -> np.ndarray:
        """Flattened parameters (len(ids), D), float32, in the order of `ids` (default: all, by id)."""
        ids = self.ids if ids is None else ids
        if self._local and len(ids):
            try:
                if len(ids) == 1:  # sooner than through a list of one
                    return self._vector(ids[0]).copy()[None]
                return np.concatenate([self._vector(id_) for id_ in ids]).reshape(len(ids), -1)
            except (pa.ArrowException, OSError, LookupError):
                pass  # pyarrow reads it, or it is said what is wrong
        places = self._places(ids)
        table, order = self._read(places, ["vector"])
        return _matrix(table)[order]

    def _vector(self, id_: int) -> np.ndarray:
        """One vector (D,); its checksum is compared when it is read for the first time.

        Raises:
            ArrowException, OSError, LookupError: it is damaged, not there, or not as `encode` writes it.
        """
        page = self._pages.get(id_)
        if page is None:
            part, row = self._rows[id_]
            self._pages[id_], vector = self._open(part).first(row)
            return vector
        read_at, size, offset = page
        content = read_at(size, offset)
        if len(content) < size:
            raise OSError("cut off")
        return np.frombuffer(content, np.float32)

    def _places(self, ids: Sequence[int] | None) -> list[tuple[str, int]]:
        """Part and row of each network."""
        try:
            places = [self._rows[id_] for id_ in (self.ids if ids is None else ids)]
        except KeyError as error:
            raise StorageError(
                f"{self.artifact.location}: holds no network {error}; its ids are {_span(self.ids)}"
            ) from None
        if not places:
            raise StorageError(f"{self.artifact.location}: holds no networks")
        return places

    def _read(self, places: Sequence[tuple[str, int]], columns: list[str]) -> tuple[pa.Table, list[int]]:
        """The rows at `places`, each once, and which of them each place is."""
        wanted: dict[str, set[int]] = {}
        for part, row in places:
            wanted.setdefault(part, set()).add(row)
        tables: list[pa.Table] = []
        positions: dict[tuple[str, int], int] = {}
        for part, rows in wanted.items():
            with self._naming(part):
                tables.append(self._open(part).read(sorted(rows), columns))
            positions.update({(part, row): len(positions) + i for i, row in enumerate(sorted(rows))})
        return pa.concat_tables(tables), [positions[place] for place in places]

    def _open(self, part: str) -> _Part:
        if part not in self._opened:
            if len(self._opened) == MAX_OPEN_FILES:
                del self._opened[next(iter(self._opened))]
                self._pages.clear()  # which keep files open
            self._opened[part] = _Part(self.storage, f"{self.artifact.folder}/{part}")
        return self._opened[part]

    @contextlib.contextmanager
    def _naming(self, part: str) -> Iterator[None]:
        """Says of an error which file it is about, and what to do."""
        try:
            yield
        except StorageError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise StorageError(
                f"{self.storage.location(f'{self.artifact.folder}/{part}')}: damaged Parquet file ({error}); delete "
                f"{self.artifact.location} and run again to build it anew"
            ) from None


def _matrix(table: pa.Table) -> np.ndarray:
    column = table["vector"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # pyarrow keeps the chunks where there is none
        column = column.chunk(0)
    return column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), -1)


def _span(ids: list[int]) -> str:
    return f"{ids[0]} to {ids[-1]}" if ids else "none"


def without_vector(record: Record) -> dict[str, Any]:
    """The record's columns as a dict, the vector left out."""
    return {f.name: getattr(record, f.name) for f in fields(record) if f.name != "vector"}
