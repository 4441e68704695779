"""Folders of the node's cache: each is built once, by one of the node's processes, and compared with its checksums."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import sys
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from pdiff_ray.common.errors import UnavailableError

CHECKSUMS = "checksums.txt"
CHECKED_APART = ".records"  # suffix of files, larger than memory perhaps, of which each record has a checksum elsewhere


def default_cache() -> Path:
    """Returns the folder for decoded images: PDIFF_CACHE or, if that is not set, one in the user's cache folder."""
    chosen = os.environ.get("PDIFF_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pdiff_ray"


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Has `build` fill a folder of the cache, unless another worker of this node has done so or is doing so.

    A folder with a file that is not as it was written is made anew.

    Raises:
        UnavailableError: the cache cannot be written.
    """
    if intact(folder):
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if intact(folder):
                return
            if folder.exists():
                print(f"cache: {folder} is damaged and is made anew", file=sys.stderr)
                folder.rename(folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp"))
            for remnant in folder.parent.glob(f"{folder.name}.*.tmp"):  # left by a worker that was killed
                shutil.rmtree(remnant, ignore_errors=True)
            temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
            temporary.mkdir()
            try:
                build(temporary)
                (temporary / CHECKSUMS).write_bytes(_checksums(temporary))
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UnavailableError(
            f"cache {folder.parent}: {error.strerror or error}; free space or set PDIFF_CACHE to another folder"
        ) from None


def intact(folder: Path) -> bool:
    """Tells whether a folder of the cache is there and every byte in it is as it was written."""
    try:
        return (folder / CHECKSUMS).read_bytes() == _checksums(folder)
    except OSError:
        return False


def _checksums(folder: Path) -> bytes:
    """Returns a line with the CRC-32 of each file: damage is by accident here, and SHA-256 takes twice as long."""
    lines = []
    for file in sorted(folder.iterdir()):
        if file.name != CHECKSUMS and file.suffix != CHECKED_APART:
            state = file.stat()
            lines.append(f"{_checksum(file, state.st_ino, state.st_size, state.st_ctime_ns):08x} {file.name}\n")
    return "".join(lines).encode()


@functools.lru_cache(maxsize=256)  # a process compares a file once
def _checksum(file: Path, *state: int) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while content := stream.read(2**22):
            checksum = zlib.crc32(content, checksum)
    return checksum


def digest(value: Any) -> str:
    """Returns a hash of a JSON value, as 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
