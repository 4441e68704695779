"""Storage and the content-addressed artifacts in it.

An artifact lives under `<stage>/<key>/`; the key is a hash of everything that determines it. Every file carries a
digest of its content in its name and is written whole or not at all; `manifest.json`, written last and once, says which
files belong. So whoever builds the same artifact at the same time can only ever produce one of two whole ones, and what
a crash leaves behind is never mistaken for a result.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pyarrow as pa

import pdiff_ray
from pdiff_ray.common.errors import StorageError

if TYPE_CHECKING:
    from pdiff_ray.storage.files import Storage

FORMAT = 2  # part of every key: raise it when a stage's meaning changes
KINDS = ("base", "zoo", "generator", "samples", "evaluation", "report")  # a folder each, as they are made
WORK = "work"  # folder of an artifact that is being made


def artifact_key(stage: str, config: dict[str, Any], inputs: dict[str, str]) -> str:
    """Returns the hash that names an artifact: of its configuration, its inputs' keys and the format version."""
    text = json.dumps([FORMAT, stage, config, inputs], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Artifact:
    """One stage's result in storage, there or still to be built."""

    storage: Storage
    stage: str
    config: dict[str, Any] = field(hash=False)
    inputs: dict[str, str] = field(hash=False)

    @functools.cached_property
    def key(self) -> str:
        """The hash of all that determines the artifact, 16 hexadecimal digits."""
        return artifact_key(self.stage, self.config, self.inputs)

    @property
    def folder(self) -> str:
        """Where it is in storage, as `stage/key`."""
        return f"{self.stage}/{self.key}"

    @property
    def location(self) -> str:
        """Where a user finds it."""
        return self.storage.location(self.folder)

    def exists(self) -> bool:
        """Returns whether the artifact is finished."""
        return is_finished(self.storage, self.folder)

    def manifest(self) -> dict[str, Any]:
        """Returns the manifest, which is not to be changed.

        Raises:
            StorageError: the artifact is not finished, or its manifest is damaged.
        """
        return read_manifest(self.storage, self.folder)

    def read(self, name: str) -> bytes:
        """Returns the content of the file that the manifest lists under `name`, after comparing it with its digest.

        Raises:
            StorageError: the file is missing, damaged or not listed.
        """
        entry = self.manifest()["files"].get(name)
        if entry is None:
            raise StorageError(f"{self.location}: its manifest lists no file {name!r}")
        return _read_whole(self.storage, self.folder, entry)

    def commit(
        self,
        files: dict[str, bytes],
        info: dict[str, Any],
        seconds: float,
        parts: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """Writes the artifact's files and, last, its manifest, with which it is finished.

        Args:
            files: content by name.
            info: what a reader wants to know at a glance, as JSON values.
            seconds: that building it took.
            parts: entries of part files that are there already, as `ParameterStore.manifest_entries` returns them.
        """
        entries = dict(parts or {})
        for name, content in files.items():
            sha = digest(content)
            stem, dot, ending = name.rpartition(".")
            path = f"{stem}-{sha[:12]}{dot}{ending}"
            self.storage.write(f"{self.folder}/{path}", content)
            entries[name] = {"path": path, "sha256": sha}
        manifest = {
            "format": FORMAT,
            "stage": self.stage,
            "key": self.key,
            "config": self.config,
            "inputs": self.inputs,
            "files": entries,
            "info": info,
            "seed": self.config.get("seed"),
            "seconds": round(seconds, 3),
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
        }
        text = json.dumps(manifest, indent=1).encode()
        self.storage.write(f"{self.folder}/manifest.json", text, exclusive=True)
        for name in self.storage.list(f"{self.folder}/{WORK}", recursive=True):
            self.storage.delete(name)

    # State of work in progress: replaced again and again, gone once the artifact exists.

    def save_work(self, name: str, content: bytes) -> None:
        """Writes a file of the unfinished artifact, in place of an earlier one of this name."""
        self.storage.write(self._work(name), content)

    def load_work(self, name: str) -> bytes | None:
        """Returns what was saved under `name`, None if there is nothing."""
        path = self._work(name)
        try:
            return self.storage.read(path)
        except StorageError:
            if self.storage.exists(path):
                raise
            return None  # it never was, or another builder has finished meanwhile

    def _work(self, name: str) -> str:
        return f"{self.folder}/{WORK}/{name}"


def is_finished(storage: Storage, folder: str) -> bool:
    """Returns whether the artifact in `folder` is finished. One that is stays so: it is looked for until it is seen."""
    if folder not in storage.manifests and storage.exists(f"{folder}/manifest.json"):
        storage.manifests[folder] = None
    return folder in storage.manifests


def read_manifest(storage: Storage, folder: str) -> dict[str, Any]:
    """Returns the manifest of a finished artifact. It never changes, so that it is read once.

    Raises:
        StorageError: there is none, or it is damaged.
    """
    manifest = storage.manifests.get(folder)
    if manifest is None:
        name = f"{folder}/manifest.json"
        content = storage.read(name)
        try:
            manifest = storage.manifests[folder] = json.loads(content)
        except ValueError as error:  # not JSON, or not even text
            where = storage.location(name)
            raise StorageError(f"{where}: damaged ({error}); delete its folder to build it again") from None
    return manifest


def find(storage: Storage, prefix: str) -> tuple[str, dict[str, Any]]:
    """Returns folder and manifest of the one finished artifact whose key, or `stage/key`, starts with `prefix`.

    Raises:
        StorageError: there is none, or several.
    """
    folders = finished(storage)
    found = [f for f in folders if (f if "/" in prefix else f.partition("/")[2]).startswith(prefix)]
    if len(found) != 1:
        what = "no finished artifact" if not found else f"{len(found)} artifacts ({', '.join(found)})"
        raise StorageError(f"{prefix}: {what} in {storage.place}; `pdiff artifacts list` shows the keys")
    return found[0], read_manifest(storage, found[0])


def finished(storage: Storage) -> list[str]:
    """Returns the folders, as `stage/key`, of all finished artifacts."""
    return [folder for kind in KINDS for folder in storage.list(kind) if is_finished(storage, folder)]


def verify(storage: Storage, folder: str) -> list[str]:
    """Returns messages about files of an artifact that are missing or differ from their digest."""
    problems = []
    for entry in read_manifest(storage, folder)["files"].values():
        try:
            _read_whole(storage, folder, entry)
        except StorageError as error:
            problems.append(str(error))
    return problems


def _read_whole(storage: Storage, folder: str, entry: dict[str, Any]) -> bytes:
    """Returns the content of a file that a manifest lists as `entry`, after comparing it with its digest."""
    name = f"{folder}/{entry['path']}"
    content = storage.read(name)
    if digest(content) != entry["sha256"]:
        raise StorageError(
            f"{storage.location(name)}: damaged, its content differs from the digest in the manifest; delete "
            f"{storage.location(folder)} and run again to build it anew"
        )
    return content


def digest(content: bytes | pa.Buffer) -> str:
    """Returns the SHA-256 of `content` in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def versions() -> dict[str, str]:
    """Returns the versions of the packages that numbers depend on."""
    found = {"pdiff_ray": pdiff_ray.__version__, "python": platform.python_version()}
    for package in ("torch", "torchvision", "timm", "numpy", "ray", "pyarrow"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
