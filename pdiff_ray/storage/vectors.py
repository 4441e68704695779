"""Flattened parameters in files that other code wrote: NumPy's, safetensors and torch.save's, and Parquet as ours is.

Shapes: n vectors of D values.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pdiff_ray.common.errors import ConfigError, first_line, some_of
from pdiff_ray.networks.subset import Subset
from pdiff_ray.storage import weights
from pdiff_ray.storage.parameters import read_lone
from pdiff_ray.storage.weights import Weight


def read_vectors(file: Path, subset: Subset, key: str | None = None) -> Tensor:
    """Returns the vectors (n, D), float32, of a file; the order of a vector's values is the subset's.

    Args:
        key: name of the tensor, of several in the file.

    Raises:
        ConfigError: the file is damaged, has another number of values in a vector, or some that are not finite.
    """
    if not file.is_file():  # to open a named pipe would wait for ever
        raise ConfigError(f"{file}: is no regular file")
    if file.suffix.lower() == ".npy":
        vectors = _of_numpy(file)
    elif file.suffix.lower() == ".parquet":
        found, values = read_lone(file)
        if (theirs := _described(found)) != (ours := _described(subset)):
            raise ConfigError(f"{file}: holds other tensors ({some_of(theirs)}) than the zoo ({some_of(ours)})")
        vectors = torch.tensor(values)
    else:
        vectors = _of_tensors(file, key)
    if vectors.ndim != 2 or vectors.shape[1] != subset.size or not len(vectors):
        raise ConfigError(
            f"{file}: has the shape {tuple(vectors.shape)}; vectors are wanted of the {subset.size:,} values of "
            f"zoo.subset, so (n, {subset.size})"
        )
    if odd := (~vectors.isfinite()).any(1).nonzero()[:, 0].tolist():
        raise ConfigError(
            f"{file}: {len(odd)} of {len(vectors)} vectors hold values that are not finite in float32 (the first: "
            f"{odd[0]}, counted from 0); leave them out"
        )
    return vectors.contiguous()


def _described(subset: Subset) -> list[str]:
    return [f"{entry.name} {entry.shape}" for entry in subset.entries]


def _of_numpy(file: Path) -> Tensor:
    try:
        array = np.lib.format.open_memmap(file, mode="r")  # which reads no pickles, and no more than the file has
    except Exception as error:  # whatever the bytes lead it to
        raise ConfigError(f"{file}: cannot be read as an array of numbers: {first_line(error)}") from None
    _check_type(file, array.dtype, array.dtype.kind == "f")
    with np.errstate(over="ignore"):  # infinite values are told of
        return torch.from_numpy(array.astype(np.float32))


def _of_tensors(file: Path, key: str | None) -> Tensor:
    content = weights.read(file)
    content = content if isinstance(content, dict) else {"": content}
    there = {str(name): weight for name, weight in content.items() if isinstance(weight, Weight)}
    if key is not None and key not in there:
        raise ConfigError(f"{file}: holds no tensor {key!r} (--weights); it has {some_of(there) or 'none'}")
    if key is None and len(there) != 1:
        raise ConfigError(
            f"{file}: holds {len(there)} tensors, and not one of vectors (n, D); choose it with --weights, or give the "
            "folder of the file if it is a checkpoint"
        )
    chosen = there[next(iter(there)) if key is None else key]
    _check_type(file, chosen.dtype, chosen.dtype.is_floating_point)
    return weights.load({"vectors": chosen})["vectors"].float()


def _check_type(file: Path, dtype: object, floating: bool) -> None:
    if not floating:
        raise ConfigError(f"{file}: holds {dtype}; vectors of floating-point numbers are wanted")
