"""Whether storage is whole: everything that is in an artifact's folder, compared with its digests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pydantic import JsonValue

from pdiff_ray.common.errors import StorageError
from pdiff_ray.storage.artifacts import (
    ANEW,
    KINDS,
    MANIFEST,
    WORK,
    FileEntry,
    is_finished,
    opened,
    read_file,
    read_manifest,
    read_work,
)
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.parameters import UNLIKE_ITS_NAME, ParameterStore, digest_in
from pdiff_ray.storage.sealed import digest, unseal
from pdiff_ray.storage.trees import load_tree


@dataclass
class Findings:
    """What was found in a folder.

    Attributes:
        problems: messages about what is missing, damaged or not what it says.
        notes: on what does no harm, such as files that no manifest knows.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, read: Callable[..., object], *arguments: object) -> bool:
        """Keeps the message if something cannot be read; returns whether it could."""
        try:
            read(*arguments)
        except StorageError as error:
            self.problems.append(str(error))
            return False
        return True


def folders(storage: Storage) -> list[str]:
    """Returns the folders, as `stage/key`, of all artifacts, finished or not."""
    return [folder for kind in KINDS for folder in storage.list(kind)]


def verify(storage: Storage, folder: str) -> Findings:
    """Reads all that is in an artifact's folder."""
    found = Findings()
    found.check(_finished if is_finished(storage, folder) else _unfinished, storage, folder, found)
    return found


def _finished(storage: Storage, folder: str, found: Findings) -> None:
    manifest = read_manifest(storage, folder)
    store = ParameterStore(opened(storage, manifest))
    for name, entry in manifest.files.items():
        if entry.ids is None:
            found.check(_read, storage, folder, entry)
        elif found.check(store.records, entry.ids):
            found.check(store.subset, name)
    known = {f"{folder}/{entry.path}" for entry in manifest.files.values()} | {f"{folder}/{MANIFEST}"}
    for path in storage.list(folder, recursive=True):
        if path not in known:
            found.notes.append(f"{storage.location(path)}: no manifest knows it; it can be deleted")


def _read(storage: Storage, folder: str, entry: FileEntry) -> None:
    _parse(read_file(storage, folder, entry), storage.location(f"{folder}/{entry.path}"))


def _read_work(storage: Storage, path: str) -> None:
    _parse(read_work(storage, path), storage.location(path))


def _parse(content: bytes, where: str) -> None:
    if where.endswith(".safetensors"):
        load_tree(content, where)
    elif where.endswith(".json"):
        unseal(content, JsonValue, where, ANEW)  # type: ignore[arg-type]


def _unfinished(storage: Storage, folder: str, found: Findings) -> None:
    found.notes.append(f"{storage.location(folder)}: unfinished; the command that was interrupted goes on from it")
    for path in storage.list(folder, recursive=True):
        name = path.removeprefix(f"{folder}/")
        if name.startswith(f"{WORK}/"):
            found.check(_read_work, storage, path)
        elif digest_in(name):
            found.check(_read_part, storage, path, digest_in(name))
        else:
            found.notes.append(f"{storage.location(path)}: nothing knows it; it can be deleted")


def _read_part(storage: Storage, path: str, sha256: str) -> None:
    if digest(storage.read(path)) != sha256:
        raise StorageError(f"{storage.location(path)}: damaged Parquet file: {UNLIKE_ITS_NAME}")
