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
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, field_validator

import pdiff_ray
from pdiff_ray.common.errors import StorageError
from pdiff_ray.storage.files import Storage, check_below
from pdiff_ray.storage.sealed import digest, read_sealed, seal, unseal, with_digest, without_digest

FORMAT = 2  # part of every key: raise it when a stage's meaning changes
KINDS = ("base", "zoo", "alignment", "generator", "samples", "evaluation", "report")  # a folder each, as they are made
MANIFEST = "manifest.json"
WORK = "work"  # folder of an artifact that is being made
ANEW = "delete its folder to build it again"

Kind = Annotated[str, StringConstraints(pattern=f"^({'|'.join(KINDS)})$")]
Name = Annotated[str, AfterValidator(check_below)]
Key = Annotated[str, StringConstraints(pattern="^[0-9a-f]{16}$")]
Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Id = Annotated[int, Field(ge=0, lt=2**63)]


class FileEntry(BaseModel):
    """A file of an artifact.

    Attributes:
        path: below the artifact's folder.
        sha256: of its content.
        ids: of the networks in a part file, row by row.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: Name
    sha256: Digest
    ids: list[Id] | None = None


class Manifest(BaseModel):
    """What is known of a finished artifact.

    Attributes:
        config, inputs: what its key is a hash of, with the format and the stage.
        files: by name.
        info: what a reader wants to know at a glance, as JSON values.
        seconds: that building it took.
        versions: of the packages that numbers depend on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int
    stage: Kind
    key: Key
    config: dict[str, Any]
    inputs: Annotated[dict[Kind, Key], Field(max_length=1)]
    files: dict[Name, FileEntry]
    info: dict[str, Any]
    seed: int | None
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    created_at: str
    versions: dict[str, str]

    @field_validator("format")
    @classmethod
    def _known(cls, value: int) -> int:
        if value != FORMAT:
            raise ValueError(f"this version of pdiff_ray reads format {FORMAT}")
        return value

    @field_validator("created_at")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        datetime.fromisoformat(value)
        return value

    @property
    def folder(self) -> str:
        """Where the artifact is in storage, as `stage/key`."""
        return f"{self.stage}/{self.key}"

    @property
    def input(self) -> str | None:
        """The folder of the artifact that it was made from."""
        return next(("/".join(item) for item in self.inputs.items()), None)


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

    def manifest(self) -> Manifest:
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
        entry = self.manifest().files.get(name)
        if entry is None:
            raise StorageError(f"{self.location}: its manifest lists no file {name!r}")
        return read_file(self.storage, self.folder, entry)

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
        name, content = f"{self.folder}/{MANIFEST}", seal(manifest)
        unseal(content, Manifest, self.storage.location(name), "this is a bug")  # what is written can be read
        self.storage.write(name, content, exclusive=True)
        for name in self.storage.list(f"{self.folder}/{WORK}", recursive=True):
            self.storage.delete(name)

    # State of work in progress: replaced again and again, gone once the artifact exists.

    def save_work(self, name: str, content: bytes) -> None:
        """Writes a file of the unfinished artifact, in place of an earlier one of this name."""
        self.storage.write(self.work(name), with_digest(content))

    def load_work(self, name: str) -> bytes | None:
        """Returns what was saved under `name`, None if there is nothing.

        Raises:
            StorageError: it is damaged.
        """
        try:
            return read_work(self.storage, self.work(name))
        except StorageError:
            if self.storage.exists(self.work(name)):
                raise
            return None  # it never was, or another builder has finished meanwhile

    def work(self, name: str) -> str:
        """Returns where in storage what is saved under `name` is."""
        return f"{self.folder}/{WORK}/{name}"


def read_work(storage: Storage, name: str) -> bytes:
    """Returns what was saved of unfinished work in a file, after comparing it with its digest."""
    content = without_digest(storage.read(name))
    if content is None:
        raise StorageError(
            f"{storage.location(name)}: damaged, its content differs from its digest; delete it, and what it is the "
            "state of is made again from the beginning"
        )
    return content


def is_finished(storage: Storage, folder: str) -> bool:
    """Returns whether the artifact in `folder` is finished. One that is stays so: it is looked for until it is seen."""
    if folder not in storage.manifests and storage.exists(f"{folder}/{MANIFEST}"):
        storage.manifests[folder] = None
    return folder in storage.manifests


def read_manifest(storage: Storage, folder: str) -> Manifest:
    """Returns the manifest of a finished artifact. It never changes, so that it is read once.

    Raises:
        StorageError: there is none; or it is damaged, of another format, or not of the configuration and inputs whose
            hash the folder's name is.
    """
    manifest: Manifest | None = storage.manifests.get(folder)
    if manifest is None:
        name = f"{folder}/{MANIFEST}"
        manifest = read_sealed(storage, name, Manifest, ANEW)
        key = artifact_key(manifest.stage, manifest.config, manifest.inputs)
        if not folder == manifest.folder == f"{manifest.stage}/{key}":
            raise StorageError(
                f"{storage.location(name)}: damaged or altered: it calls itself {manifest.folder}, and its "
                f"configuration and inputs make {key}; {ANEW}"
            )
        storage.manifests[folder] = manifest
    return manifest


def find(storage: Storage, prefix: str) -> Manifest:
    """Returns the manifest of the one finished artifact whose key, or `stage/key`, starts with `prefix`.

    Raises:
        StorageError: there is none, or several.
    """
    folders = finished(storage)
    found = [f for f in folders if (f if "/" in prefix else f.partition("/")[2]).startswith(prefix)]
    if len(found) != 1:
        what = "no finished artifact" if not found else f"{len(found)} artifacts ({', '.join(found)})"
        raise StorageError(f"{prefix}: {what} in {storage.place}; `pdiff artifacts list` shows the keys")
    return read_manifest(storage, found[0])


def finished(storage: Storage) -> list[str]:
    """Returns the folders, as `stage/key`, of all finished artifacts."""
    folders = [folder for kind in KINDS for folder in storage.list(kind)]
    there = storage.map(lambda folder: is_finished(storage, folder), folders)
    return [folder for folder, whole in zip(folders, there, strict=True) if whole]


def opened(storage: Storage, manifest: Manifest) -> Artifact:
    """Returns the artifact that a manifest is of."""
    return Artifact(storage, manifest.stage, manifest.config, manifest.inputs)


def read_file(storage: Storage, folder: str, entry: FileEntry) -> bytes:
    """Returns the content of a file that a manifest lists as `entry`, after comparing it with its digest."""
    name = f"{folder}/{entry.path}"
    content = storage.read(name)
    if digest(content) != entry.sha256:
        raise StorageError(f"{storage.location(name)}: damaged, {differs(storage, folder)}")
    return content


def differs(storage: Storage, folder: str) -> str:
    """Returns what is said of a finished artifact's file that is not the one it was made with."""
    return (
        "its content differs from the digest in the manifest; delete "
        f"{storage.location(folder)} and run again to build it anew"
    )


@functools.cache  # to look them up takes longer than to write an artifact
def versions() -> dict[str, str]:
    """Returns the versions of the packages that numbers depend on; not to be changed."""
    found = {"pdiff_ray": pdiff_ray.__version__, "python": platform.python_version()}
    for package in ("torch", "torchvision", "timm", "numpy", "ray", "pyarrow"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
