"""Storage and the content-addressed artifacts in it.

An artifact lives under `<stage>/<key>/`; the key is a hash of everything that determines it. Every file carries a
digest of its content in its name and is written whole or not at all; `manifest.json`, written last and once, says which
files belong. So whoever builds the same artifact at the same time can only ever produce one of two whole ones, and what
a crash leaves behind is never mistaken for a result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import fs as pafs

import pdiff_ray
from pdiff_ray.errors import StorageError

if TYPE_CHECKING:
    import torch

FORMAT = 2  # part of every key: raise it when a stage's meaning changes
STAGES = ("base", "zoo", "generator", "samples", "evaluation", "report")
WORK = "work"  # folder of an artifact that is being made
STALE_TEMPORARY_S = 24 * 3600


class Storage:
    """A folder or object store: small atomic operations on whole files, through `pyarrow.fs`.

    Args:
        uri: a local path, or any URI that `pyarrow.fs.FileSystem.from_uri` takes (`s3://bucket/prefix`, `gs://`, ...).
    """

    def __init__(self, uri: str) -> None:
        if re.match(r"[a-z0-9]{2,}:/[^/]", uri):  # one letter is a drive
            raise StorageError(
                f"storage: {_without_secrets(uri)!r} is neither a folder nor a URI, which has two slashes"
            )
        try:
            if "://" in uri:
                self.fs, self.root = pafs.FileSystem.from_uri(uri)
                self.uri = uri.rstrip("/")
            else:
                self.fs, self.root = pafs.LocalFileSystem(), str(Path(uri).expanduser().resolve())
                self.uri = self.root
        except (pa.ArrowInvalid, OSError) as error:
            reason = _without_secrets(f"{uri!r} is not a folder or a URI that pyarrow.fs knows: {error}")
            raise StorageError(f"storage: {reason}") from None

    @property
    def local(self) -> Path | None:
        """The folder, if storage is one of this machine."""
        return Path(self.root) if isinstance(self.fs, pafs.LocalFileSystem) else None

    @property
    def place(self) -> str:
        """The URI as it may be shown."""
        return _without_secrets(self.uri.split("?")[0]) if self.local is None else self.root

    def path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def location(self, name: str) -> str:
        """Where a user finds `name`."""
        return f"{self.place}/{name}"

    def check_writable(self) -> None:
        """Raises StorageError unless a file can be written, read and deleted here."""
        probe = f"tmp/probe-{uuid.uuid4().hex}"
        self.write(probe, b"probe")
        self.delete(probe)
        self._remove_stale_temporaries()

    def exists(self, name: str) -> bool:
        with self._translated(name):
            return self.fs.get_file_info(self.path(name)).type == pafs.FileType.File

    def read(self, name: str) -> bytes:
        with self._translated(name), self.open(name) as file:
            return file.read()

    def open(self, name: str) -> pa.NativeFile:
        with self._translated(name):
            return self.fs.open_input_file(self.path(name))

    def write(self, name: str, content: bytes | pa.Buffer, *, exclusive: bool = False) -> bool:
        """Writes a whole file; readers see the old one, or none, until all of it is there.

        Args:
            exclusive: leave a file that is already there as it is.

        Returns:
            False if `exclusive` and the file was there before.
        """
        with self._translated(name):
            if self.local is None:  # an object appears when its upload is complete
                if exclusive and self.exists(name):
                    return False
                with self.fs.open_output_stream(self.path(name)) as stream:
                    stream.write(content)
                return True
            target, temporary = Path(self.path(name)), Path(self.path(f"tmp/{uuid.uuid4().hex}"))
            temporary.parent.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                if exclusive:
                    return _place_new(temporary, target)
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
            return True

    def delete(self, name: str) -> None:
        with self._translated(name), contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(self.path(name))

    def list(self, folder: str, *, recursive: bool = False) -> list[str]:
        """Names of the files (`recursive`: at any depth; else: and folders) in `folder`, sorted."""
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True, recursive=recursive)
        with self._translated(folder):
            infos = self.fs.get_file_info(selector)
        prefix = len(self.path(""))
        return sorted(i.path[prefix:] for i in infos if not recursive or i.type == pafs.FileType.File)

    @contextlib.contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        """Turns the file system's errors into one message with a remedy."""
        try:
            yield
        except FileNotFoundError:
            raise StorageError(f"{self.location(name)}: no such file in storage") from None
        except (OSError, pa.ArrowInvalid) as error:
            raise StorageError(
                f"storage {self.location(name)}: {getattr(error, 'strerror', None) or error}; free space or choose "
                "another folder with storage: (or --storage)"
            ) from None

    def _remove_stale_temporaries(self) -> None:
        if self.local is not None:
            for file in (self.local / "tmp").glob("*"):
                with contextlib.suppress(OSError):
                    if time.time() - file.stat().st_mtime > STALE_TEMPORARY_S:
                        shutil.rmtree(file) if file.is_dir() else file.unlink()


def _place_new(temporary: Path, target: Path) -> bool:
    """Gives a file its name unless that is taken."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links; the moment between the two lines is the price
        if target.exists():
            return False
        temporary.replace(target)
    return True


def _without_secrets(text: str) -> str:
    """The text without the user and password of the URI in it."""
    return re.sub("://[^/]*@", "://", text)


def artifact_key(stage: str, config: dict[str, Any], inputs: dict[str, str]) -> str:
    """The hash that names an artifact: of its configuration, its inputs' keys and the format version."""
    text = json.dumps([FORMAT, stage, config, inputs], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Artifact:
    """One stage's result in storage, there or still to be built."""

    storage: Storage
    stage: str
    config: dict[str, Any] = field(hash=False)
    inputs: dict[str, str] = field(hash=False)

    @property
    def key(self) -> str:
        return artifact_key(self.stage, self.config, self.inputs)

    @property
    def folder(self) -> str:
        return f"{self.stage}/{self.key}"

    @property
    def location(self) -> str:
        return self.storage.location(self.folder)

    def exists(self) -> bool:
        return self.storage.exists(f"{self.folder}/manifest.json")

    def manifest(self) -> dict[str, Any]:
        return read_manifest(self.storage, self.folder)

    def read(self, name: str) -> bytes:
        """The content of the file that the manifest lists under `name`, checked against its digest."""
        entry = self.manifest()["files"].get(name)
        if entry is None:
            raise StorageError(f"{self.location}: its manifest lists no file {name!r}")
        content = self.storage.read(f"{self.folder}/{entry['path']}")
        if digest(content) != entry["sha256"]:
            raise StorageError(_damaged(self.storage, f"{self.folder}/{entry['path']}"))
        return content

    def commit(
        self,
        files: dict[str, bytes],
        info: dict[str, Any],
        seconds: float,
        parts: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """Makes the artifact exist.

        Args:
            files: content by name.
            info: what a reader wants to know at a glance; JSON values.
            seconds: time that building it took.
            parts: entries of part files that are there already (`ParameterStore.manifest_entries`).
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
        self.storage.write(self._work(name), content)

    def load_work(self, name: str) -> bytes | None:
        path = self._work(name)
        try:
            return self.storage.read(path)
        except StorageError:
            if self.storage.exists(path):
                raise
            return None  # it never was, or another builder has finished meanwhile

    def _work(self, name: str) -> str:
        return f"{self.folder}/{WORK}/{name}"


def read_manifest(storage: Storage, folder: str) -> dict[str, Any]:
    name = f"{folder}/manifest.json"
    content = storage.read(name)
    try:
        return json.loads(content)
    except ValueError as error:  # not JSON, or not even text
        where = storage.location(name)
        raise StorageError(f"{where}: damaged ({error}); delete its folder to build it again") from None


def find(storage: Storage, prefix: str) -> tuple[str, dict[str, Any]]:
    """The folder and manifest of the one finished artifact whose key (or stage/key) starts with `prefix`."""
    stage, slash, key = prefix.rpartition("/")
    split = [folder.split("/") for folder in finished(storage)]
    found = ["/".join(f) for f in split if f[1].startswith(key) and (not slash or f[0] == stage)]
    if len(found) != 1:
        what = "no finished artifact" if not found else f"{len(found)} artifacts ({', '.join(found)})"
        raise StorageError(f"{prefix}: {what} in {storage.place}; `pdiff artifacts list` shows the keys")
    return found[0], read_manifest(storage, found[0])


def finished(storage: Storage) -> list[str]:
    """Folders (`stage/key`) of all finished artifacts."""
    folders = [folder for stage in STAGES for folder in storage.list(stage)]
    return [folder for folder in folders if storage.exists(f"{folder}/manifest.json")]


def verify(storage: Storage, folder: str) -> list[str]:
    """Messages about files of an artifact that are missing or differ from their digest; empty if it is whole."""
    problems = []
    for entry in read_manifest(storage, folder)["files"].values():
        name = f"{folder}/{entry['path']}"
        try:
            whole = digest(storage.read(name)) == entry["sha256"]
        except StorageError as error:
            problems.append(str(error))
            continue
        if not whole:
            problems.append(_damaged(storage, name))
    return problems


def _damaged(storage: Storage, name: str) -> str:
    folder = "/".join(name.split("/")[:2])  # the artifact's, whatever the file's
    return (
        f"{storage.location(name)}: damaged, its content differs from the digest in the manifest; delete "
        f"{storage.location(folder)} and run again to build it anew"
    )


def digest(content: bytes | pa.Buffer) -> str:
    return hashlib.sha256(content).hexdigest()


def versions() -> dict[str, str]:
    """Versions of what numbers depend on."""
    found = {"pdiff_ray": pdiff_ray.__version__, "python": platform.python_version()}
    for package in ("torch", "torchvision", "timm", "numpy", "diffusers", "ray", "pyarrow"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def save_tree(tree: dict[str, Any]) -> bytes:
    """A nested dict of tensors and JSON values as safetensors: data without code.

    Keys must not contain `|`. Lists, scalars and empty dicts travel as JSON in the file's metadata. The order of keys
    is not kept.
    """
    import torch
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}

    def visit(node: dict[Any, Any], prefix: str) -> None:
        for key, value in node.items():
            path = f"{prefix}{key}"
            if isinstance(value, torch.Tensor):
                # Copies: safetensors refuses tensors that share memory.
                tensors[path] = value.detach().cpu().contiguous().clone()
            elif isinstance(value, dict) and value:
                visit(value, f"{path}|")
            else:
                scalars[path] = value

    visit(tree, "")
    return save(tensors, metadata={"scalars": json.dumps(scalars)})


def load_tree(content: bytes, where: str = "state") -> dict[str, Any]:
    """The inverse of `save_tree`; keys are text."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        scalars = json.loads(header.get("__metadata__", {}).get("scalars", "{}"))
    except (SafetensorError, ValueError) as error:
        raise StorageError(f"{where}: not a whole safetensors file: {error}") from None
    tree: dict[str, Any] = {}
    for path, value in {**scalars, **tensors}.items():
        *parents, leaf = path.split("|")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
