"""Content that carries a digest of itself: JSON records, and the state of unfinished work.

What was written by earlier versions has no digest; it is read as it is.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar, cast

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from pdiff_ray.common.errors import StorageError
from pdiff_ray.storage.files import Storage

MAX_JSON = 2**24  # bytes of a record: as objects they take up to 25 times as much
MARK = b',\n "sha256": "'  # begins the last member of a sealed record
LISTING = "files.json"
HEX = 64  # digits of a digest

T = TypeVar("T")


def digest(content: bytes | pa.Buffer) -> str:
    """Returns the SHA-256 of `content` in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def seal(fields: Mapping[str, Any]) -> bytes:
    """Returns fields (JSON values) as JSON whose last member is a digest of the rest."""
    return _sealed(json.dumps(fields, indent=1).encode())


def _sealed(text: bytes) -> bytes:
    return text.removesuffix(b"\n}") + MARK + digest(text).encode() + b'"\n}'


def read_sealed(storage: Storage, name: str, kind: type[T], remedy: str) -> T:
    """Returns the record in a JSON file, after comparing it with its digest.

    Args:
        kind: its type, for pydantic.
        remedy: what to do about a damaged file.

    Raises:
        StorageError: there is no such file, it differs from its digest, or is no record of this kind.
    """
    return unseal(storage.read(name, MAX_JSON), kind, storage.location(name), remedy)


def unseal(content: bytes, kind: type[T], where: str, remedy: str) -> T:
    """Returns the record that `seal` has made `content` of; `where` names it in messages."""
    head, mark, _ = content.rpartition(MARK)
    if len(content) > MAX_JSON:
        raise StorageError(f"{where}: has {len(content):,} bytes, more than the {MAX_JSON:,} of a record; {remedy}")
    text = head + b"\n}" if mark else content
    try:
        if mark and content != _sealed(text):
            raise ValueError("it differs from its digest")
        # A digest whose mark is damaged is a member that no record has.
        found: T = _adapter(cast(Hashable, kind)).validate_json(text, strict=True)
        return found
    except ValidationError as error:
        reason = _explain(error)
    except ValueError as error:
        reason = str(error)
    raise StorageError(f"{where}: damaged or of another version ({reason}); {remedy}")


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _explain(error: ValidationError) -> str:
    """Returns field, value and what is wrong of the first of pydantic's problems."""
    problem = error.errors()[0]
    field, message = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
    if not field or problem["type"] in ("missing", "extra_forbidden"):
        return f"{field}: {message}" if field else message
    value = repr(problem["input"])
    return f"{field}: {value if len(value) <= 80 else value[:77] + '...'}: {message}"


class _Listing(BaseModel):
    model_config = ConfigDict(extra="forbid")
    files: dict[str, str]


def write_listed(storage: Storage, folder: str, files: Mapping[str, bytes]) -> None:
    """Writes files into a folder, in place of earlier ones, and last a list of their digests."""
    for name, content in files.items():
        storage.write(f"{folder}/{name}", content)
    storage.write(f"{folder}/{LISTING}", seal({"files": {name: digest(files[name]) for name in files}}))


def read_listed(storage: Storage, folder: str) -> dict[str, bytes]:
    """Returns the files that `write_listed` has written, by name; nothing if it has not.

    Raises:
        StorageError: one is missing or damaged.
    """
    if not storage.exists(f"{folder}/{LISTING}"):
        return {}
    remedy = "the command that wrote it writes it again"
    files = {}
    for name, sha256 in read_sealed(storage, f"{folder}/{LISTING}", _Listing, remedy).files.items():
        files[name] = storage.read(f"{folder}/{name}")
        if digest(files[name]) != sha256:
            raise StorageError(f"{storage.location(f'{folder}/{name}')}: damaged or altered; {remedy}")
    return files


def with_digest(content: bytes) -> bytes:
    """Returns content below a line with its digest."""
    return digest(content).encode() + b"\n" + content


def without_digest(content: bytes) -> bytes | None:
    """Returns what `with_digest` was given; None if that differs from the digest."""
    line, newline, rest = content[:HEX], content[HEX : HEX + 1], content[HEX + 1 :]
    if newline != b"\n":  # of an earlier version
        return content
    return rest if digest(rest).encode() == line else None
