"""Storage: small atomic operations on whole files, in a folder or an object store."""

from __future__ import annotations

import builtins
import contextlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs as pafs

from pdiff_ray.common.errors import StorageError, UnavailableError, first_line
from pdiff_ray.common.secrets import without_secrets

TEMPORARY = "tmp"  # folder of files that are being written
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # bytes of this machine
STALE_TEMPORARY_S = 24 * 3600
# For which object storage is asked again, after growing pauses. Arrow itself does so for 6 s, and gives an answer 3 s.
PATIENCE_S, FIRST_PAUSE_S, LONGEST_PAUSE_S = 120.0, 0.5, 10.0

AT_A_TIME = 16  # requests to an object store that are waited for together

A = TypeVar("A")
T = TypeVar("T")


class Storage:
    """A folder or object store: small atomic operations on whole files, through `pyarrow.fs`.

    Object storage that has answered before, and then does not, is waited for: everything here can be done twice.

    Args:
        uri: a local path, or any URI that `pyarrow.fs.FileSystem.from_uri` takes (`s3://bucket/prefix`, `gs://`, ...).
        answered: it has, to whom the URI comes from.

    Attributes:
        manifests: of finished artifacts that were seen, by folder; None of one that has not been read. For `artifacts`.

    Raises:
        StorageError: there can be no such folder or store.
    """

    def __init__(self, uri: str, answered: bool = False) -> None:
        if re.match(r"[a-z0-9]{2,}:/[^/]", uri):  # one letter is a drive
            raise StorageError(f"storage: {uri!r} is neither a folder nor a URI, which has two slashes")
        try:
            if "://" in uri:
                self.fs, self.root = pafs.FileSystem.from_uri(_with_single_requests(uri))
                self.uri = uri.rstrip("/")
            else:
                self.fs, self.root = pafs.LocalFileSystem(), str(Path(uri).expanduser().resolve())
                self.uri = self.root
        except (pa.ArrowInvalid, OSError, RuntimeError) as error:  # the last if no user has the home that it names
            raise StorageError(
                f"storage: {uri!r} is not a folder or a URI that pyarrow.fs knows: {first_line(error)}"
            ) from None
        self.manifests: dict[str, Any] = {}
        self.answered = answered

    def __reduce__(self) -> tuple[type[Storage], tuple[str, bool]]:
        return Storage, (self.uri, True)  # another process looks for itself

    @property
    def local(self) -> Path | None:
        """The folder, if storage is one of this machine."""
        return Path(self.root) if isinstance(self.fs, pafs.LocalFileSystem) else None

    @property
    def place(self) -> str:
        """The URI as it may be shown."""
        return without_secrets(self.uri) if self.local is None else self.root

    def path(self, name: str) -> str:
        """Returns `name` as a path of the file system `fs`: the one place where names, whoever gave them, become paths.

        Raises:
            StorageError: it leads out of storage, by its words or by a symbolic link.
        """
        if name:
            try:
                check_below(name)
            except ValueError as error:
                raise StorageError(f"storage {self.place}: {error}") from None
        top = f"{self.root.rstrip('/')}/"
        if name and self.local is not None and not os.path.realpath(top + name).startswith(os.path.realpath(top) + "/"):
            raise StorageError(
                f"{top}{name}: a symbolic link leads out of the storage; put what it leads to in its place, or remove "
                "it (the folder of a storage may itself be a link)"
            )
        return top + name

    def location(self, name: str) -> str:
        """Returns where a user finds `name`."""
        return f"{self.place}/{name}"

    def check_writable(self) -> None:
        """Raises StorageError unless a file can be written, read and deleted here; now, and not after a while."""
        probe, storage = f"{TEMPORARY}/probe-{uuid.uuid4().hex}", Storage(self.uri)
        storage.write(probe, b"probe")
        storage.delete(probe)
        self._remove_stale_temporaries()

    def exists(self, name: str) -> bool:
        """Returns whether there is a file `name`."""
        path = self.path(name)
        return self._ask(name, lambda: self.fs.get_file_info(path).type == pafs.FileType.File)

    def read(self, name: str, most: int = MEMORY) -> bytes:
        """Returns the content of a file.

        Args:
            most: bytes that a whole one can have.
        """

        def read() -> bytes:
            with self._open(name) as file:
                if file.size() > most:
                    raise StorageError(f"{self.location(name)}: damaged, it has {file.size():,} bytes; delete it")
                return file.read()

        return self._ask(name, read)

    def open(self, name: str) -> pa.NativeFile:
        """Opens a file for random access; an object store is read with `read`, which asks again."""
        return self._ask(name, lambda: self._open(name))

    def _open(self, name: str) -> pa.NativeFile:
        path = self.path(name)
        if self.local is not None and not os.path.isfile(path):  # to open a named pipe would wait for ever
            raise FileNotFoundError
        return self.fs.open_input_file(path)

    def write(self, name: str, content: bytes | pa.Buffer, *, exclusive: bool = False) -> bool:
        """Writes a whole file; readers see the old one, or none, until all of it is there.

        Args:
            exclusive: leave a file that is already there as it is. An object store may miss one that another process
                writes at the same time.

        Returns:
            False if `exclusive` and the file was there before.
        """
        if self.local is None:  # an object appears when its upload is complete
            if exclusive and self.exists(name):
                return False
            self._ask(name, lambda: self._upload(name, content))
            return True
        return self._ask(name, lambda: self._write_beside(name, content, exclusive))

    def _upload(self, name: str, content: bytes | pa.Buffer) -> None:
        def upload() -> None:
            with self.fs.open_output_stream(self.path(name)) as stream:
                stream.write(content)

        # In another thread, which Ctrl-C does not reach: between the two lines it would leave an empty object.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(upload).result()

    def _write_beside(self, name: str, content: bytes | pa.Buffer, exclusive: bool) -> bool:
        target, temporary = Path(self.path(name)), Path(self.path(f"{TEMPORARY}/{uuid.uuid4().hex}"))
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
        """Deletes a file if it is there."""
        path = self.path(name)

        def delete() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.fs.delete_file(path)

        self._ask(name, delete)

    def list(self, folder: str, *, recursive: bool = False) -> list[str]:
        """Returns the sorted names of files and folders in `folder`; if `recursive`, of files alone, at any depth."""
        infos = self._list(folder, recursive)
        prefix = len(f"{self.root.rstrip('/')}/")
        return sorted(i.path[prefix:] for i in infos if not recursive or i.type == pafs.FileType.File)

    def _list(self, folder: str, recursive: bool) -> Sequence[pafs.FileInfo]:
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True, recursive=recursive)
        return self._ask(folder, lambda: self.fs.get_file_info(selector))

    def map(self, function: Callable[[A], T], items: Sequence[A]) -> builtins.list[T]:
        """Returns what a function that waits for storage gives for each item; of an object store several at a time."""
        if self.local is not None or len(items) < 2:
            return [function(item) for item in items]
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            return [*pool.map(function, items)]

    def _ask(self, name: str, request: Callable[[], T]) -> T:
        """Returns what a request gives, and turns the file system's errors into one message with a remedy."""
        until, pause = time.monotonic() + PATIENCE_S, FIRST_PAUSE_S
        while True:
            try:
                answer = request()
            except FileNotFoundError:
                raise StorageError(f"{self.location(name)}: no such file in storage") from None
            except (OSError, pa.ArrowInvalid) as error:
                remedy = "free space" if self.local is not None else "type the command again when it can be used"
                message = (
                    f"storage {self.location(name)}: {getattr(error, 'strerror', None) or error}; {remedy} or choose "
                    "another folder with storage: (or --storage)"
                )
                if self.local is not None or not self.answered or time.monotonic() + pause > until:
                    raise UnavailableError(message) from None
            else:
                self.answered = True
                return answer
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _remove_stale_temporaries(self) -> None:
        oldest = datetime.now(UTC) - timedelta(seconds=STALE_TEMPORARY_S)
        if self.local is None:
            for info in self._list(TEMPORARY, recursive=True):
                if info.type == pafs.FileType.File and info.mtime < oldest:
                    self.delete(info.path.removeprefix(f"{self.root.rstrip('/')}/"))
            return
        for file in Path(self.path(TEMPORARY)).glob("*"):
            with contextlib.suppress(OSError):
                if datetime.fromtimestamp(file.stat().st_mtime, UTC) < oldest:
                    shutil.rmtree(file) if file.is_dir() else file.unlink()


def _with_single_requests(uri: str) -> str:
    """Returns a URI of S3 with which a small object is written by one request instead of three."""
    if not uri.startswith("s3://") or "allow_delayed_open=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}allow_delayed_open=true"


def check_below(name: str) -> str:
    """Returns a name of a file that someone else may have given, if it stays below the folder it will be joined to.

    Raises:
        ValueError: it does not, on this system or on another one.
    """
    parts = name.split("/")
    if not name.isprintable() or re.search(r"\\|^[A-Za-z]:", name) or not {"", ".", ".."}.isdisjoint(parts):
        raise ValueError(f"the name {name[:80]!r} leads out of its folder")
    return name


def _place_new(temporary: Path, target: Path) -> bool:
    """Renames a file unless the name is taken; returns whether it was free."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links; the moment between the two lines is the price
        if target.exists():
            return False
        temporary.replace(target)
    return True
