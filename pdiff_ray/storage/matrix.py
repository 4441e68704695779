"""Vectors of networks as a matrix that need not be in memory: read by rows, or by chunks of columns.

Shapes: n vectors of D values.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pdiff_ray.storage.parameters import BLOCK, ParameterStore, Position, checksums

CHUNK_BYTES = 2**24  # of columns that are read at a time, if a block of them is not more
CHUNK_VALUES = 2**22  # of several matrices that work on some columns of them holds at a time
ROWS_BYTES = 2**27  # of whole vectors that are held at a time
HELD_BYTES = 2**28  # of vectors that are held, as long as they are used; more of them stay in files
CPU = torch.device("cpu")


class Vectors(ABC):
    """Vectors (n, D), float32.

    Attributes:
        shape: n and D.
        device: that rows and columns are given on.
        in_memory: whether they are held.
    """

    shape: tuple[int, int]
    device: torch.device = CPU
    in_memory: bool = False

    @staticmethod
    def of(vectors: Tensor | np.ndarray | Vectors) -> Vectors:
        """Returns vectors, which may be a tensor or an array (n, D), as such."""
        if isinstance(vectors, Vectors):
            return vectors
        return HeldVectors(vectors if isinstance(vectors, Tensor) else torch.from_numpy(vectors))

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, chosen: Sequence[int]) -> Tensor:
        """Reads some vectors (len(chosen), D)."""
        rows, picks = torch.empty(len(chosen), self.shape[1], device=self.device), list(chosen)
        for columns, values in self.chunks():
            rows[:, columns] = values[picks]
        return rows

    @abstractmethod
    def columns(self, start: int, stop: int) -> Tensor:
        """Reads the values from `start` to `stop` of all vectors (n, stop - start)."""

    def all(self) -> Tensor:
        """Reads all vectors (n, D)."""
        return self.rows(range(len(self)))

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields all columns, some at a time (n, c), and which they are."""
        count, dimension = self.shape
        width = max(1, CHUNK_BYTES // (4 * BLOCK * max(1, count))) * BLOCK
        for start in range(0, dimension, width):
            stop = min(start + width, dimension)
            yield slice(start, stop), self.columns(start, stop)


def pieces(*matrices: Vectors, values: int) -> Iterator[slice]:
    """Yields columns that vectors have in common, so many at a time that all of them have about as many values."""
    width = max(1, values // max(1, sum(map(len, matrices))))
    if not all(vectors.in_memory for vectors in matrices):
        width = max(1, width // BLOCK) * BLOCK  # as files are read
    for start in range(0, matrices[0].shape[1], width):
        yield slice(start, min(start + width, matrices[0].shape[1]))


def is_held(count: int, dimension: int) -> bool:
    """Returns whether so many vectors of D values are held in memory, however often they are used."""
    return 4 * count * dimension <= HELD_BYTES


def rows_at_a_time(dimension: int) -> int:
    """Returns how many vectors of D values are drawn or decoded at a time."""
    rows = max(1, ROWS_BYTES // (4 * dimension))
    # Normal numbers come in sixteens, an autoencoder's rows in fifties.
    return rows - rows % 400 if rows > 400 else rows


class HeldVectors(Vectors):
    """Vectors that are a tensor (n, D)."""

    in_memory = True

    def __init__(self, vectors: Tensor) -> None:
        self._vectors, self.device = vectors, vectors.device
        self.shape = (vectors.shape[0], vectors.shape[1])

    def rows(self, chosen: Sequence[int]) -> Tensor:
        return self._vectors[list(chosen)]

    def columns(self, start: int, stop: int) -> Tensor:
        return self._vectors[:, start:stop]

    def all(self) -> Tensor:
        return self._vectors


class StoredVectors(Vectors):
    """Vectors of a store's networks, which stay in its files.

    Columns are read from where the vectors stand in the files, after comparing them with checksums. What cannot be read
    so, from an object store for one, is first copied to a temporary file.

    Args:
        ids: of the networks, in the order of the rows; default: all.

    Raises:
        StorageError: a file is damaged, also if that happens while they are in use.
    """

    def __init__(self, store: ParameterStore, ids: Sequence[int] | None = None, device: torch.device = CPU) -> None:
        self.store, self.ids, self.device = store, list(store.ids if ids is None else ids), device
        self.shape = (len(self.ids), store.subset().size)
        self._last: tuple[tuple[int, int], Tensor] | None = None  # columns, as several take the same ones in turn

    @staticmethod
    def open(store: ParameterStore, ids: Sequence[int], device: torch.device = CPU) -> Vectors:
        """Returns vectors of a store's networks: held where they are few or short, else in its files."""
        stored = StoredVectors(store, ids, device)
        return HeldVectors(stored.all()) if is_held(*stored.shape) else stored

    def rows(self, chosen: Sequence[int]) -> Tensor:
        return torch.from_numpy(self.store.vectors([self.ids[row] for row in chosen])).to(self.device)

    def columns(self, start: int, stop: int) -> Tensor:
        if self._last is None or self._last[0] != (start, stop):
            self._last = None  # before the next ones are read
            self._last = (start, stop), self._columns(start, stop)
        return self._last[1]

    def _columns(self, start: int, stop: int) -> Tensor:
        values = np.empty((len(self.ids), stop - start), np.float32)
        positions = self._positions
        if positions is None:
            for row, into in enumerate(values):
                self._copied.seek(4 * (row * self.shape[1] + start))
                self._copied.readinto(into.data)  # type: ignore[attr-defined]
            return torch.from_numpy(values).to(self.device)
        for name, rows in itertools.groupby(range(len(self.ids)), lambda row: positions[row].name):
            with self.store.storage.open(name) as file:
                for row in rows:
                    values[row] = self._piece(file, row, positions[row], start, stop)
        return torch.from_numpy(values).to(self.device)

    def _piece(self, file: pa.NativeFile, row: int, position: Position, start: int, stop: int) -> np.ndarray:
        """Returns values of a vector, whose blocks are the same as before."""
        first, last = start // BLOCK, min(-(-stop // BLOCK), len(position.checks))
        begin, end = first * BLOCK, min(last * BLOCK, self.shape[1])
        content = file.read_at(4 * (end - begin), position.offset + 4 * begin)
        if checksums(content) != position.checks[first:last]:
            self.store.forget()
            content = self.store.vectors([self.ids[row]])[0, begin:end].tobytes()
        return np.frombuffer(content, np.float32)[start - begin : stop - begin]

    @functools.cached_property
    def _positions(self) -> list[Position] | None:
        """Where all vectors stand; None if one of them cannot be read from there."""
        positions = []
        for id_ in self.ids:
            if (position := self.store.position(id_)) is None:
                return None
            positions.append(position)
        return positions

    @functools.cached_property
    def _copied(self) -> IO[bytes]:
        """A temporary file of all vectors, row by row."""
        file = tempfile.TemporaryFile()  # noqa: SIM115  # it goes with its last reference
        for id_ in self.ids:
            file.write(self.store.vectors([id_]).data)
        return file
