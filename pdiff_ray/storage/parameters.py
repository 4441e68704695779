"""The parameter store: networks as rows of Parquet part files, their flattened parameters beside what is known of them.

One format serves zoos, generated samples and evaluations, which leave the vectors out. A row with a vector has a row
group of its own, so that one network, or one column, is read without the rest. Pages carry checksums, which pyarrow
compares. Any number of workers may write part files at once: each is written whole, under a name that holds its digest.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


_ARROW_TYPES = {
    "int": pa.int64(),
    "float": pa.float64(),
    "str": pa.string(),
    "bytes": pa.binary(),
    "datetime": pa.timestamp("us", "UTC"),
}
_TYPES = {f.name: _ARROW_TYPES[str(f.type).removesuffix(" | None")] for f in fields(Record) if f.name != "vector"}
COLUMNS = tuple(_TYPES)


def stamp() -> dict[str, Any]:
    """Returns when and where a row is made, by column."""
    return {"created_at": datetime.now(UTC), "worker": f"{platform.node()}:{os.getpid()}"}


def encode(records: Sequence[Record], subset: Subset, about: dict[str, Any]) -> bytes:
    """Returns a Parquet file of `records`, with their vectors if the first has one.

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
    # few rows say nothing. A vector that is one plain page can be read again without decoding.
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


class _Part:
    """An open part file, its footer parsed."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.stream, remote = storage.open(name), storage.local is None
        # An object store answers few large requests sooner than many small ones.
        self.file = pq.ParquetFile(self.stream, page_checksum_verification=True, pre_buffer=remote)
        self.separate = self.file.num_row_groups == self.file.metadata.num_rows  # a row group for each row

    def read(self, rows: list[int], columns: list[str]) -> pa.Table:
        """Returns columns of some rows, after comparing their pages with their checksums."""
        if self.separate:
            return self.file.read_row_groups(rows, columns=columns)
        return self.file.read(columns=columns).take(rows)

    def find(self, row: int, vector: np.ndarray) -> int | None:
        """Returns where in the file a vector that was read begins; None unless it stands there as it is in memory."""
        if not self.separate:
            return None
        chunk = self.file.metadata.row_group(row).column(self.file.metadata.num_columns - 1)
        offset = chunk.data_page_offset + chunk.total_compressed_size - vector.nbytes  # a page's values end it
        same = offset > 0 and self.stream.read_at(vector.nbytes, offset) == vector.tobytes()
        return offset if same else None


class ParameterStore:
    """The part files of one artifact, finished or still growing.

    A store keeps the files that it has read open, and remembers where in them the vectors are: pyarrow takes ten times
    as long to read one as the file system does.

    Args:
        artifact: whose networks these are. If it is finished, the parts are those of its manifest; else all whole files
            that are there now.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.storage: Storage = artifact.storage
        self._rows: dict[int, tuple[str, int]] = {}  # id to part and row
        self._parts: dict[str, list[int]] = {}  # part to ids
        self._opened: dict[str, _Part] = {}
        # By id, of vectors that have been read: the open file, and how many bytes to read from where.
        self._found: dict[int, tuple[pa.NativeFile, int, int]] = {}
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
        """The ids of all networks, sorted."""
        return sorted(self._rows)

    def append(self, records: Sequence[Record], subset: Subset, about: Mapping[str, Any] | None = None) -> None:
        """Writes one part file. Networks that are there already are left out, as they have the same content.

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
        """Returns what `Artifact.commit` takes as `parts`: entries of the files that hold the networks `ids`."""
        needed = {self._rows[id_][0] for id_ in ids}
        return {
            name: {"path": name, "sha256": name.removesuffix(".parquet").rpartition("-")[2], "ids": self._parts[name]}
            for name in sorted(needed)
        }

    def subset(self) -> Subset:
        """Returns which parameters the vectors hold, as the metadata of a part file tells."""
        part = next(iter(self._parts), None)
        if part is None:
            raise StorageError(f"{self.artifact.location}: holds no networks")
        return Subset.from_json(json.dumps(self.about(part)["subset"]))

    def about(self, part: str) -> dict[str, Any]:
        """Returns what a part file says of its networks beside their rows."""
        with self._naming(part):
            return json.loads(self._open(part).file.schema_arrow.metadata[METADATA_KEY])

    def records(self, ids: Sequence[int] | None = None) -> list[Record]:
        """Returns rows, without their vectors, in the order of `ids` (default: all, by id)."""
        ids = self.ids if ids is None else ids
        table, _ = self._read(ids, list(COLUMNS))
        records = {row["id"]: Record(**row) for row in table.to_pylist()}
        return [records[id_] for id_ in ids]

    def vectors(self, ids: Sequence[int] | None = None) -> np.ndarray:
        """Returns flattened parameters (len(ids), D), float32, in the order of `ids` (default: all, by id)."""
        ids = self.ids if ids is None else ids
        if len(ids) and all(id_ in self._found for id_ in ids):
            with contextlib.suppress(OSError, ValueError):  # cut off meanwhile: pyarrow says what is wrong
                return self._read_again(ids)
        table, read = self._read(ids, ["vector"])
        matrix = _matrix(table)
        if self.storage.local is not None:  # elsewhere each look would be a request
            for id_, vector in zip(read, matrix, strict=True):
                part, row = self._rows[id_]
                file = self._opened.get(part)
                if file and (offset := file.find(row, vector)):
                    self._found[id_] = file.stream, vector.nbytes, offset
        position = {id_: index for index, id_ in enumerate(read)}
        return matrix[[position[id_] for id_ in ids]]

    def _read_again(self, ids: Sequence[int]) -> np.ndarray:
        """Returns vectors (len(ids), D) from where they are; their checksums were compared when they were found."""
        places = [self._found[id_] for id_ in ids]
        content = bytearray().join([file.read_at(size, offset) for file, size, offset in places])
        return np.frombuffer(content, np.float32).reshape(len(ids), places[0][1] // 4)

    def _read(self, ids: Sequence[int], columns: list[str]) -> tuple[pa.Table, list[int]]:
        """Returns the rows of `ids`, each once and part by part, and whose they are."""
        if not len(ids):
            raise StorageError(f"{self.artifact.location}: holds no networks")
        wanted: dict[str, dict[int, int]] = {}  # by part: rows and their ids
        for id_ in ids:
            if id_ not in self._rows:
                known = f"{self.ids[0]} to {self.ids[-1]}" if self.ids else "none"
                raise StorageError(f"{self.artifact.location}: holds no network {id_}; its ids are {known}")
            part, row = self._rows[id_]
            wanted.setdefault(part, {})[row] = id_
        tables = []
        for part, rows in wanted.items():
            with self._naming(part):
                tables.append(self._open(part).read(list(rows), columns))
        return pa.concat_tables(tables), [id_ for rows in wanted.values() for id_ in rows.values()]

    def _open(self, part: str) -> _Part:
        if part not in self._opened:
            if len(self._opened) == MAX_OPEN_FILES:
                del self._opened[next(iter(self._opened))]
                self._found.clear()  # which keeps files open
            self._opened[part] = _Part(self.storage, f"{self.artifact.folder}/{part}")
        return self._opened[part]

    @contextlib.contextmanager
    def _naming(self, part: str) -> Iterator[None]:
        """Turns an error of pyarrow or the file system into one that names the file and the remedy."""
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


def without_vector(record: Record) -> dict[str, Any]:
    """Returns a record's columns by name, without its vector."""
    return {name: getattr(record, name) for name in COLUMNS}
