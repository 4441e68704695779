"""The parameter store: networks as rows of Parquet part files, their flattened parameters beside what is known of them.

One format serves zoos, generated samples and evaluations, which leave the vectors out. A row with a vector has a row
group of its own, so that one network, or one column, is read without the rest. Any number of workers may write part
files at once: each is written whole, under a name that holds its digest. A part is compared with it when it is opened,
the pages that are read later with their checksums.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import platform
import re
import resource
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pdiff_ray.common.errors import StorageError, first_line
from pdiff_ray.config.split import MEMBER_GROUPS
from pdiff_ray.networks.subset import Subset
from pdiff_ray.storage.artifacts import Artifact, FileEntry, differs
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.sealed import digest

PARTS = "networks"  # folder of the part files in an artifact
PART_BYTES = 2**26  # of vectors in a part, if there are several: to read one of them, all are compared with the digest
METADATA_KEY = b"pdiff_ray"
MAX_OPEN_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4  # of a store
UNLIKE_ITS_NAME = "its content differs from the digest in its name; delete it and run again to make its networks anew"
# What a file that is no such Parquet file causes.
_DAMAGE = (pa.ArrowException, OSError, ValueError, TypeError, LookupError, RecursionError)
MAX_FETCHED = 2**29  # bytes of the parts that a store keeps of an object store's
BLOCK = 2**14  # values of a vector with a checksum of their own, to be read again without the rest


@dataclass(frozen=True)
class Position:
    """Where a vector stands in a file as it is in memory.

    Attributes:
        name: of the file in the storage.
        offset: bytes before the vector.
        checks: checksums of its blocks.
    """

    name: str
    offset: int
    checks: list[int]


@dataclass(frozen=True)
class Record:
    """A network and what is known of it. Accuracies are fractions, losses mean cross-entropies in nats.

    `train_*` are measured on the selection split, which is training data.
    """

    id: int  # in its artifact: an evaluation counts all its networks
    group: str  # of `evaluation.groups`
    vector: np.ndarray | None = None  # (D,) float32
    parent: int | None = None  # in an evaluation, id of the member it was made from, or of the sample that it is
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
    wrong_classes: bytes | None = None  # the classes that it takes those for, in their order: see `class_type`
    statistics: bytes | None = None  # BatchNorm's that were measured for it, by `save_tree`
    asked: float | None = None  # of a sample: what it was to be, by the generator's condition
    nearest_distance: float | None = None  # L2 to the nearest (other) member over the mean distance among members
    created_at: datetime | None = None
    worker: str | None = None

    @property
    def number(self) -> int | None:
        """The id that an evaluation's network has in the zoo or the samples, to be exported by; None of baselines."""
        return {**dict.fromkeys(MEMBER_GROUPS, self.id), "generated": self.parent}.get(self.group)

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
_LATER = {"wrong_classes", "asked", "statistics"}  # columns that files of earlier versions lack


def class_type(num_classes: int) -> str:
    """Returns the type of a class's number in `Record.wrong_classes`, as numpy names it."""
    return "u1" if num_classes <= 2**8 else "<u2"


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
    """An open part file that is the one its digest says, its footer parsed.

    Args:
        stream: of the file.
        sha256: the digest; None: it has none.
        otherwise: what to say of a file with another one.
    """

    def __init__(self, stream: pa.NativeFile, sha256: str | None = None, otherwise: str = "") -> None:
        self.stream, self.size = stream, stream.size()
        found = hashlib.sha256()
        while block := self.stream.read_buffer(2**20):
            found.update(block)
        if sha256 is not None and found.hexdigest() != sha256:
            raise StorageError(otherwise)
        self.stream.seek(0)
        self.file = pq.ParquetFile(self.stream, page_checksum_verification=True, pre_buffer=False)
        self.num_rows, schema = self.file.metadata.num_rows, self.file.schema_arrow
        self.separate = self.file.num_row_groups == self.num_rows  # a row group for each row
        self.columns = {field.name: field.type for field in schema}
        if len(self.columns) < len(schema):
            raise pa.ArrowInvalid("several of its columns have one name")
        earlier = _LATER.difference(self.columns)
        if odd := [n for n, kind in _TYPES.items() if self.columns.get(n) != kind and n not in earlier]:
            raise pa.ArrowInvalid(f"its column {odd[0]} is {self.columns.get(odd[0])}, and not {_TYPES[odd[0]]}")
        self.width = 0  # values of a vector
        if vector := self.columns.get("vector"):
            if not (pa.types.is_fixed_size_list(vector) and vector.value_type == pa.float32()):
                raise pa.ArrowInvalid(f"its column vector is {vector}")
            self.width = vector.list_size
        if self.num_rows * max(1, 4 * self.width) > self.size:
            raise pa.ArrowInvalid(f"{self.num_rows} rows of {self.width} values are more than it can hold")

    def read(self, rows: list[int], columns: list[str]) -> pa.Table:
        """Returns columns of some rows, after comparing their pages with their checksums.

        Of so few values; to hand them to threads takes longer than to read them.
        """
        if self.separate:
            return self.file.read_row_groups(rows, columns=columns, use_threads=False)
        return self.file.read(columns=columns, use_threads=False).take(rows)

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
        # By id, of vectors that have been read: the open file, how many bytes to read, and where.
        self._found: dict[int, tuple[pa.NativeFile, int, Position]] = {}
        self._listed: dict[str, FileEntry] = {}  # by the manifest
        if artifact.exists():
            for name, entry in artifact.manifest().files.items():
                if entry.ids is not None:
                    self._listed[name] = entry
                    self._add(name, entry.ids)
        else:
            for path in self.storage.list(f"{artifact.folder}/{PARTS}"):
                name = path.removeprefix(f"{artifact.folder}/")
                if digest_in(name):
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
        """Writes a part file, or several of long vectors. Networks that are there already, the same, are left out.

        Args:
            about: what else is to be known of the part; JSON values.
        """
        records = [r for r in records if r.id not in self._rows]
        about = {"stage": self.artifact.stage, "key": self.artifact.key, **(about or {})}
        longest = max((r.vector.nbytes for r in records if r.vector is not None), default=0)
        count = max(1, PART_BYTES // longest) if longest else len(records)
        for chosen in (records[start : start + count] for start in range(0, len(records), count or 1)):
            content = encode(chosen, subset, about)
            name = f"{PARTS}/part-{digest(content)}.parquet"
            self.storage.write(f"{self.artifact.folder}/{name}", content)
            self._add(name, [r.id for r in chosen])

    def manifest_entries(self, ids: Iterable[int]) -> dict[str, dict[str, Any]]:
        """Returns what `Artifact.commit` takes as `parts`: entries of the files that hold the networks `ids`."""
        needed = {self._rows[id_][0] for id_ in ids}
        return {name: {"path": name, "sha256": digest_in(name), "ids": self._parts[name]} for name in sorted(needed)}

    def subset(self, part: str | None = None) -> Subset:
        """Returns which parameters the vectors hold, as the metadata of a part file tells (default: of the first)."""
        part = part or next(iter(self._parts), None)
        if part is None:
            raise StorageError(f"{self.artifact.location}: holds no networks")
        about = self.about(part)
        with self._naming(part):
            subset = Subset.from_json(json.dumps(about["subset"]))
            offsets = [0, *itertools.accumulate(entry.size for entry in subset.entries)]
            width = self._open(part).width or subset.size
            if [*(entry.offset for entry in subset.entries), width] != offsets:
                raise ValueError("the tensors that its metadata names do not make up a vector")
            return subset

    def about(self, part: str) -> dict[str, Any]:
        """Returns what a part file says of its networks beside their rows."""
        with self._naming(part):
            about: dict[str, Any] = json.loads(self._open(part).file.schema_arrow.metadata[METADATA_KEY])
            return about

    def records(self, ids: Sequence[int] | None = None, columns: Sequence[str] = COLUMNS) -> list[Record]:
        """Returns rows, without their vectors, in the order of `ids` (default: all, by id).

        Args:
            columns: what is read of them beside id and group.
        """
        ids = self.ids if ids is None else ids
        table, read = self._read(ids, [name for name in COLUMNS if name in {"id", "group", *columns}])
        records = {}
        for id_, row in zip(read, table.to_pylist(), strict=True):
            if row["id"] != id_ or not is_group(row["group"]):
                with self._naming(self._rows[id_][0]):
                    raise ValueError(f"network {id_} stands there as number {row['id']} of group {row['group']!r}")
            records[id_] = Record(**row)
        return [records[id_] for id_ in ids]

    def vectors(self, ids: Sequence[int] | None = None) -> np.ndarray:
        """Returns flattened parameters (len(ids), D), float32, in the order of `ids` (default: all, by id)."""
        ids = self.ids if ids is None else ids
        if len(ids) and all(id_ in self._found for id_ in ids):
            with contextlib.suppress(OSError):  # cut off meanwhile: to open it again says what is wrong
                if (again := self._read_again(ids)) is not None:
                    return again
            self.forget()
        table, read = self._read(ids, ["vector"])
        matrix = _matrix(table)
        if self.storage.local is not None:  # elsewhere each look would be a request
            for id_, vector in zip(read, matrix, strict=True):
                part, row = self._rows[id_]
                file = self._opened.get(part)
                if file and (offset := file.find(row, vector)):
                    where = Position(self._name(part), offset, checksums(vector.data))
                    self._found[id_] = file.stream, vector.nbytes, where
        position = {id_: index for index, id_ in enumerate(read)}
        return matrix[[position[id_] for id_ in ids]]

    def position(self, id_: int) -> Position | None:
        """Returns where a network's vector stands; None if it cannot be read from there, as of an object store."""
        if id_ not in self._found:
            self.vectors([id_])
        found = self._found.get(id_)
        return found[2] if found else None

    def forget(self) -> None:
        """Closes all files, of which one has changed: to open it again says what is wrong."""
        self._opened.clear()
        self._found.clear()

    def _read_again(self, ids: Sequence[int]) -> np.ndarray | None:
        """Returns vectors (len(ids), D) from where they were found; None if one has changed since."""
        read = []
        for id_ in ids:
            file, size, position = self._found[id_]
            content = file.read_at(size, position.offset)
            if checksums(content) != position.checks:
                return None
            read.append(content)
        return np.frombuffer(bytearray().join(read), np.float32).reshape(len(ids), -1)

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
        tables, width = [], None
        for part, rows in wanted.items():
            with self._naming(part):
                file = self._open(part)
                if lacking := set(columns).difference(file.columns, _LATER):
                    raise ValueError(f"it has no column {min(lacking)}")
                if file.num_rows != len(self._parts[part]):
                    raise ValueError(f"it has {file.num_rows} rows, for {len(self._parts[part])} numbers")
                width = file.width if width is None else width
                if "vector" in columns and file.width != width:
                    raise ValueError(f"its vectors have {file.width} values, those of another part {width}")
                tables.append(file.read(list(rows), [column for column in columns if column in file.columns]))
        return pa.concat_tables(tables, promote_options="default"), [
            id_ for rows in wanted.values() for id_ in rows.values()
        ]

    def _open(self, part: str) -> _Part:
        if part not in self._opened:
            fetched = sum(file.size for file in self._opened.values()) if self.storage.local is None else 0
            if len(self._opened) == MAX_OPEN_FILES or fetched > MAX_FETCHED:
                del self._opened[next(iter(self._opened))]
                self._found.clear()  # which keeps files open
            entry = self._listed.get(part) or FileEntry(path=part, sha256=digest_in(part))
            name = self._name(part)
            # An object store answers one large request sooner than many small ones.
            remote = self.storage.local is None
            stream = pa.BufferReader(self.storage.read(name)) if remote else self.storage.open(name)
            otherwise = f"{self.storage.location(name)}: damaged Parquet file: {self._differs(part)}"
            self._opened[part] = _Part(stream, entry.sha256, otherwise)
        return self._opened[part]

    def _name(self, part: str) -> str:
        """Returns the name of a part's file in the storage."""
        return f"{self.artifact.folder}/{self._listed[part].path if part in self._listed else part}"

    def _differs(self, part: str) -> str:
        """Returns what is said of a part file that is not the one that was written."""
        if part in self._listed:
            return differs(self.storage, self.artifact.folder)
        return UNLIKE_ITS_NAME

    @contextlib.contextmanager
    def _naming(self, part: str) -> Iterator[None]:
        """Turns what a part file's content causes into an error that names the file and the remedy."""
        try:
            yield
        except StorageError:
            raise
        except _DAMAGE as error:
            file, said = self.storage.location(f"{self.artifact.folder}/{part}"), first_line(error)
            raise StorageError(
                f"{file}: damaged Parquet file ({said}); delete {self.artifact.location} and run again to build it anew"
            ) from None


def read_lone(file: Path) -> tuple[Subset, np.ndarray]:
    """Returns the tensors that a part file outside of an artifact holds, and its vectors (n, D), row by row.

    Raises:
        StorageError: it is damaged, or no part file with vectors.
    """
    try:
        part = _Part(pa.OSFile(str(file)))
        about = json.loads(part.file.schema_arrow.metadata[METADATA_KEY])
        return Subset.from_json(json.dumps(about["subset"])), _matrix(part.file.read(columns=["vector"]))
    except _DAMAGE as error:
        raise StorageError(f"{file}: no Parquet file of networks with vectors ({error!r})") from None


def checksums(vector: memoryview | bytes) -> list[int]:
    """Returns the checksums of the blocks of a vector of float32."""
    content = memoryview(vector).cast("B")
    return [zlib.crc32(content[start : start + 4 * BLOCK]) for start in range(0, len(content), 4 * BLOCK)]


def digest_in(part: str) -> str:
    """Returns the digest in the name of a part file, an empty text if it has none."""
    found = re.fullmatch(rf"{PARTS}/part-([0-9a-f]{{64}})\.parquet", part)
    return found[1] if found else ""


def is_group(name: object) -> bool:
    """Returns whether something is the name of a group of networks, which becomes part of names of files."""
    return isinstance(name, str) and re.fullmatch(r"\w[\w-]*", name) is not None


def _matrix(table: pa.Table) -> np.ndarray:
    column = table["vector"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # pyarrow keeps the chunks where there is none
        column = column.chunk(0)
    return column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), -1)


def without_vector(record: Record) -> dict[str, Any]:
    """Returns a record's columns by name, without its vector."""
    return {name: getattr(record, name) for name in COLUMNS}
