"""The parameter store: networks as rows of Parquet part files, their flattened parameters beside what is known of them.

One format serves zoos, generated samples and evaluations (which leave the vectors out). A row has a row group of its
own, so that one network, or one column, is read without the rest; pages carry checksums. Part files are written whole,
under a name that holds their digest, by any number of workers at once.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pdiff_ray.artifacts import Artifact, Storage, digest
from pdiff_ray.errors import StorageError
from pdiff_ray.subset import Subset

PARTS = "networks"  # folder of the part files in an artifact
METADATA_KEY = b"pdiff_ray"


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
    # Random floats neither repeat nor compress: a dictionary makes them larger, a codec only slower.
    pq.write_table(table, sink, row_group_size=1, use_dictionary=False, compression="none", write_page_checksum=True)
    return sink.getvalue()


class ParameterStore:
    """The part files of one artifact, finished or still growing.

    Args:
        artifact: whose networks these are. If it is finished, the parts are those of its manifest; else all whole files
            that are there now.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.storage: Storage = artifact.storage
        self._rows: dict[int, tuple[str, int]] = {}  # id to part and row
        self._parts: dict[str, list[int]] = {}  # part to ids
        if artifact.exists():
            for name, entry in artifact.manifest()["files"].items():
                if name.startswith(f"{PARTS}/"):
                    self._add(name, entry["ids"])
        else:
            for path in self.storage.list(f"{artifact.folder}/{PARTS}"):
                name = path.removeprefix(f"{artifact.folder}/")
                with self._reader(name) as file:
                    self._add(name, file.read(columns=["id"])["id"].to_pylist())

    def _add(self, part: str, ids: list[int]) -> None:
        self._parts[part] = ids
        for row, id_ in enumerate(ids):
            self._rows.setdefault(id_, (part, row))

    @property
    def ids(self) -> list[int]:
        return sorted(self._rows)

    def append(self, records: Sequence[Record], subset: Subset) -> None:
        """Writes one part file; networks that are there already are left out, as they have the same content."""
        records = [r for r in records if r.id not in self._rows]
        if not records:
            return
        content = encode(records, subset, {"stage": self.artifact.stage, "key": self.artifact.key})
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
        with self._reader(part) as file:
            about = json.loads(file.schema_arrow.metadata[METADATA_KEY])
        return Subset.from_json(json.dumps(about["subset"]))

    def records(self, ids: Sequence[int] | None = None, *, vectors: bool = False) -> list[Record]:
        """Rows in the order of `ids` (default: all, by id)."""
        table, ids = self._read(ids, [*COLUMNS, "vector"] if vectors else list(COLUMNS))
        rows = table.drop_columns(["vector"]).to_pylist() if vectors else table.to_pylist()
        if vectors:
            for row, vector in zip(rows, _matrix(table), strict=True):
                row["vector"] = vector
        by_id = {row["id"]: Record(**row) for row in rows}
        return [by_id[id_] for id_ in ids]

    def vectors(self, ids: Sequence[int] | None = None) -> np.ndarray:
        """Flattened parameters (len(ids), D), float32, in the order of `ids` (default: all, by id)."""
        table, ids = self._read(ids, ["id", "vector"])
        matrix, rows = _matrix(table), {id_: row for row, id_ in enumerate(table["id"].to_pylist())}
        return matrix[[rows[id_] for id_ in ids]]

    def _read(self, ids: Sequence[int] | None, columns: list[str]) -> tuple[pa.Table, Sequence[int]]:
        ids = self.ids if ids is None else ids
        wanted: dict[str, list[int]] = {}
        for id_ in ids:
            if id_ not in self._rows:
                raise StorageError(f"{self.artifact.location}: holds no network {id_}; its ids are {_span(self.ids)}")
            part, row = self._rows[id_]
            wanted.setdefault(part, []).append(row)
        tables = []
        for part, rows in wanted.items():
            with self._reader(part) as file:
                tables.append(file.read_row_groups(sorted(rows), columns=columns))
        if not tables:
            raise StorageError(f"{self.artifact.location}: holds no networks")
        return pa.concat_tables(tables), ids

    @contextlib.contextmanager
    def _reader(self, part: str) -> Iterator[pq.ParquetFile]:
        name = f"{self.artifact.folder}/{part}"
        try:
            with self.storage.open(name) as stream:
                yield pq.ParquetFile(stream, page_checksum_verification=True)
        except StorageError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise StorageError(
                f"{self.storage.location(name)}: damaged Parquet file ({error}); delete {self.artifact.location} "
                "and run again to build it anew"
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
