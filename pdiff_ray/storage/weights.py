"""Tensors in files that other code wrote, read as data: safetensors, and what torch.save writes.

torch.save's files hold a pickle, a program that builds objects. It is not run: its instructions are followed on
numbers, text, lists, dicts and descriptions of tensors alone, and what would be of any other class becomes a `Foreign`,
which has a name and no content. So nothing is imported, and a file costs no more than its bytes. The tensors themselves
are read when they are asked for.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickletools
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pdiff_ray.common.errors import ConfigError, first_line

# Of all that a file says of its tensors: names, shapes, places. 40,000 tensors fit; reading it takes a second.
MAX_DESCRIPTION_BYTES = 4 * 2**20
MAX_EXPANDED = 2**24  # bytes of a tensor that has more values than the file, which `expand` makes
MAX_FILE_NAME = 255  # bytes, as systems have it
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
TORCH_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
ALONE = "save the weights alone: torch.save(network.state_dict(), FILE), or as safetensors"


@dataclass(frozen=True)
class Foreign:
    """What a pickle takes from some module, a class, a function or an object of it; it is known by name alone."""

    name: str


@dataclass(frozen=True)
class Weight:
    """A tensor in a file.

    Attributes:
        place: its name in a safetensors file, or that of its storage in torch.save's.
        offset: of its first value in the storage, in values, as strides are.
    """

    file: Path
    place: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0
    stride: tuple[int, ...] | None = None  # None: in a safetensors file


def read(file: Path) -> Any:
    """Returns what a file holds: numbers, text, lists and dicts, with a `Weight` for each tensor.

    Which format it has is told by its content. Of a safetensors file it is a flat dict.

    Raises:
        ConfigError: it is damaged, of another format, or says more of its tensors than any network needs.
    """
    try:
        if not file.is_file():
            raise ValueError("it is no regular file")
        with file.open("rb") as stream:
            start = stream.read(64)
        if start.startswith(b"PK"):
            return _read_archive(file)
        if start[8:9] == b"{":
            return _read_safetensors(file, int.from_bytes(start[:8], "little"))
    except Exception as error:  # zipfile, pickletools and safetensors raise whatever the bytes lead them to
        raise ConfigError(f"{file}: cannot be read as a checkpoint: {first_line(error)}") from None
    raise ConfigError(f"{file}: {_format(start)}")


def load(weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """Returns tensors by name; those that are views of one storage in the file are views here.

    Raises:
        ConfigError: a file is damaged, or changed since it was read.
    """
    tensors: dict[str, Tensor] = {}
    for file in dict.fromkeys(weight.file for weight in weights.values()):
        there = {name: weight for name, weight in weights.items() if weight.file == file}
        try:
            if any(weight.stride is None for weight in there.values()):
                with safe_open(file, "pt") as stream:
                    tensors |= {name: stream.get_tensor(weight.place) for name, weight in there.items()}
            else:
                with zipfile.ZipFile(file) as archive:
                    tensors |= _loaded(archive, there)
        except Exception as error:  # as above
            raise ConfigError(f"{file}: damaged: {first_line(error)}; copy it anew") from None
    return {name: tensors[name] for name in weights}


def _loaded(archive: zipfile.ZipFile, weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """Returns tensors of one archive of torch.save."""
    storages: dict[str, bytearray] = {}
    tensors = {}
    for name, weight in weights.items():
        if weight.place not in storages:
            storages[weight.place] = bytearray(archive.read(weight.place))
        content, stride = storages[weight.place], weight.stride or ()
        empty = torch.empty(0, dtype=weight.dtype)
        values = torch.frombuffer(content, dtype=weight.dtype) if content else empty
        tensors[name] = values.as_strided(weight.shape, stride, weight.offset)
    return tensors


def _read_safetensors(file: Path, header: int) -> dict[str, Any]:
    _check_description(header)
    with safe_open(file, "pt") as stream:
        found: dict[str, Any] = {}
        for name in filter(str.isprintable, stream.keys()):
            piece = stream.get_slice(name)
            dtype = SAFETENSORS_DTYPES.get(piece.get_dtype())
            found[name] = Weight(file, name, dtype, tuple(piece.get_shape())) if dtype else Foreign(piece.get_dtype())
        said = {key: text for key, text in (stream.metadata() or {}).items() if key.isprintable()}
        return {**said, **found}


class _Directory(io.FileIO):
    """A file of which no more is read at a time than a description may have."""

    def read(self, size: int | None = -1, /) -> bytes:
        most = MAX_DESCRIPTION_BYTES + 1
        content = super().read(most if size is None or size < 0 else min(size, most))
        _check_description(len(content))
        return content


def _read_archive(file: Path) -> Any:
    """Returns what an archive of torch.save describes, after comparing that with what its directory says is there."""
    with _Directory(file) as stream, zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        records = {entry.filename.partition("/")[2]: entry for entry in entries}
        if {"constants.pkl", "code"} & {name.partition("/")[0] for name in records}:
            raise ValueError(f"it is a TorchScript archive (torch.jit.save), a program beside its weights; {ALONE}")
        if "data.pkl" not in records:
            raise ValueError(f"it is a zip archive, but not one of torch.save; {ALONE}")
        if len(records) < len(entries) or sum(entry.file_size for entry in entries) > file.stat().st_size:
            raise ValueError("its directory lists entries twice, or more bytes than it has")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its entries are compressed, which torch.save never does")
        if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
            raise ValueError("it was written by a big-endian machine")
        _check_description(records["data.pkl"].file_size)
        return _Program(file, records).follow(archive.read(records["data.pkl"]))


def _check_description(size: int) -> None:
    if size > MAX_DESCRIPTION_BYTES:
        raise ValueError(
            f"it spends {size:,} bytes on describing its tensors, more than {MAX_DESCRIPTION_BYTES:,}; {ALONE}"
        )


def _format(start: bytes) -> str:
    """Returns what is wrong with a file that begins so."""
    if not start:
        return "is empty; copy it anew"
    if start.startswith(b"version https://git-lfs"):
        return "is the pointer that Git LFS leaves in place of a file; fetch it with `git lfs pull`"
    if start[:1] == b"\x80":
        return (
            "is a bare pickle, or of the format that torch wrote before version 1.6; to unpickle it could run code; "
            "refused. Write it anew: torch.save(torch.load(FILE, weights_only=True), NEW)"
        )
    return f"is neither of torch.save nor safetensors; {ALONE}"


class _Mark:
    """Where on the stack a group of values begins."""


class _Program:
    """A pickle's instructions, followed without running what they name.

    Args:
        records: entries of the archive that it stands in, by name without the leading folder.
    """

    def __init__(self, file: Path, records: Mapping[str, zipfile.ZipInfo]) -> None:
        self.file, self.records = file, records

    def follow(self, program: bytes) -> Any:
        """Returns what the instructions describe.

        Raises:
            ValueError, LookupError, TypeError, AttributeError: they make no sense.
        """
        stack: list[Any] = []
        memo: dict[int, Any] = {}

        def group() -> list[Any]:
            """Takes the values above the last mark from the stack, and the mark."""
            position = len(stack) - 1
            while not isinstance(stack[position], _Mark):
                position -= 1
                if position < 0:
                    raise ValueError("its pickle is damaged")
            values = stack[position + 1 :]
            del stack[position:]
            return values

        argument: Any
        for opcode, argument, _ in pickletools.genops(program):
            name = opcode.name
            if name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in ("EMPTY_DICT", "EMPTY_LIST"):
                stack.append({} if name == "EMPTY_DICT" else [])
            elif name == "MARK":
                stack.append(_Mark())
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            elif name == "TUPLE":
                stack.append(tuple(group()))
            elif name in ("SETITEM", "SETITEMS"):
                items = group() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                _set_items(stack[-1], items)
            elif name in ("APPEND", "APPENDS"):
                values = group() if name == "APPENDS" else [stack.pop()]
                if isinstance(stack[-1], list):
                    stack[-1].extend(values)
            elif name in ("ADDITEMS", "FROZENSET"):
                group()
                if name == "FROZENSET":
                    stack.append(Foreign("frozenset"))
            elif name in ("GLOBAL", "STACK_GLOBAL"):
                words = argument.split(" ") if argument else [stack.pop(-2), stack.pop()]
                named = all(isinstance(word, str) and word.isprintable() for word in words)
                stack.append(Foreign(".".join(words) if named else "no name"))
            elif name == "BINPERSID":
                stack.append(("persistent", stack.pop()))
            elif name in ("REDUCE", "NEWOBJ"):
                arguments, kind = stack.pop(), stack.pop()
                stack.append(self._made(kind, arguments))
            elif name == "NEWOBJ_EX":
                _, arguments, kind = stack.pop(), stack.pop(), stack.pop()
                stack.append(self._made(kind, arguments))
            elif name == "BUILD":
                stack.pop()  # attributes of an object
            elif name == "STOP":
                return stack.pop()
            elif opcode.arg is not None and opcode.stack_before == [] and name not in _UNUSED:
                stack.append(argument)  # a number, text or bytes
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"its pickle has an instruction that torch.save does not write ({name})")
        raise ValueError("its pickle has no end")

    def _made(self, kind: Any, arguments: Any) -> Any:
        """Returns what a call gives where that is a dict or a tensor, else a `Foreign` named by what is called."""
        if not isinstance(kind, Foreign) or not isinstance(arguments, tuple):
            return Foreign("an object")
        if kind.name in ("collections.OrderedDict", "collections.defaultdict"):
            return {}
        if kind.name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return arguments[0]
        if kind.name == "torch._tensor._rebuild_from_type_v2":  # of a class derived from Tensor
            return self._made(arguments[0], arguments[2])
        if kind.name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            return self._weight(*arguments[:4])
        return kind

    def _weight(self, storage: Any, offset: Any, shape: Any, stride: Any) -> Weight | Foreign:
        """Returns the tensor that a storage, from an offset on, holds in this shape.

        Raises:
            ValueError: the archive does not hold all of its values.
        """
        _, (_, kind, key, _, _) = storage
        dtype = TORCH_DTYPES.get(kind.name.removeprefix("torch.").removesuffix("Storage"))
        if dtype is None:
            return kind
        counts = (offset, *shape, *stride)
        if (
            not all(isinstance(count, int) and 0 <= count < 2**48 for count in counts)
            or not len(shape) == len(stride) <= 64
            or not isinstance(key, str)
        ):
            raise ValueError("a tensor in it has no shape, or strides that no tensor has")
        entry = self.records.get(f"data/{key}")
        if entry is None:
            raise ValueError(f"its archive has no entry {key!r} in data/")
        reach = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1 if math.prod(shape) else 0
        if reach * dtype.itemsize > entry.file_size or entry.file_size % dtype.itemsize:
            raise ValueError(f"a tensor of shape {shape} reaches beyond its {entry.file_size} bytes ({entry.filename})")
        if math.prod(shape) * dtype.itemsize > max(entry.file_size, MAX_EXPANDED):
            raise ValueError(f"a tensor of shape {shape} repeats its {entry.file_size} bytes ({entry.filename})")
        return Weight(self.file, entry.filename, dtype, tuple(shape), offset, tuple(stride))


_CONSTANTS = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
    "EMPTY_SET": Foreign("set"),
}
_UNUSED = {"PROTO", "FRAME", "GET", "PERSID", "INST", "EXT1", "EXT2", "EXT4"}


def _set_items(target: Any, items: list[Any]) -> None:
    """Sets keys of a dict that are text or numbers and can be printed; others name no tensors."""
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            if (isinstance(key, str) and key.isprintable()) or (isinstance(key, int) and abs(key) < 2**63):
                target[key] = value


def read_index(file: Path) -> dict[str, str]:
    """Returns, for each tensor of a network in several files, the name of the one that its index says has it.

    Raises:
        ConfigError: the index is damaged.
    """
    try:
        if file.stat().st_size > MAX_DESCRIPTION_BYTES:
            raise ValueError(f"it has more than {MAX_DESCRIPTION_BYTES:,} bytes")
        places = dict(json.loads(file.read_bytes())["weight_map"])
        if odd := [
            name
            for name in places.values()
            if not isinstance(name, str)
            or name != Path(name).name
            or not name.isprintable()
            or len(os.fsencode(name)) > MAX_FILE_NAME
        ]:
            raise ValueError(f"{odd[0]!r:.80} is no name of a file beside it")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file}: cannot be read as the index of a checkpoint: {first_line(error)}") from None
    return places


def read_parts(file: Path) -> dict[str, Any]:
    """Returns what the files of an index hold together, as `read` does.

    Raises:
        ConfigError: the index is damaged, or a file or a tensor that it names is not there.
    """
    places = read_index(file)
    parts = {}
    for name in sorted(set(places.values())):
        if not (file.parent / name).is_file():
            raise ConfigError(f"{file}: names {name}, which is not there; copy it anew")
        parts[name] = read(file.parent / name)
    for tensor, name in places.items():
        if not isinstance(parts[name], dict) or tensor not in parts[name]:
            raise ConfigError(f"{file}: says that {name} has {tensor!r}, which it has not; copy both anew")
    return {tensor: parts[name][tensor] for tensor, name in places.items()}
