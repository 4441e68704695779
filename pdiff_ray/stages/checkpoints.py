"""Zoos from checkpoint files that other code wrote. Weights only: no code is run."""

from __future__ import annotations

import pickle
import re
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdiff_ray.common.errors import ConfigError, PdiffError, StorageError, did_you_mean
from pdiff_ray.common.progress import Progress, silent
from pdiff_ray.config.schema import Experiment
from pdiff_ray.data.cache import default_cache
from pdiff_ray.networks.subset import Subset
from pdiff_ray.stages.base import NETWORK_FILE, describe_base, open_dataset, untrained_network
from pdiff_ray.stages.context import Context
from pdiff_ray.stages.zoo import commit, subset_of
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.parameters import PARTS, ParameterStore, Record, stamp
from pdiff_ray.storage.trees import load_tree, save_tree

SUFFIXES = (".pth", ".pt", ".safetensors")
IMPORT_STACK = 20
WRAPPERS = ("state_dict", "model_state_dict", "model")  # under which training scripts put the weights


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a `.pth`, `.pt` or safetensors file, by name.

    Raises:
        PdiffError: the file is damaged, holds anything but tensors, or would run code when loaded.
    """
    try:
        if path.suffix == ".safetensors":
            return load_tree(path.read_bytes(), str(path))
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, Mapping):
            raise ValueError(f"holds a {type(content).__name__}, not tensors by name")
    except pickle.UnpicklingError:
        raise PdiffError(
            f"{path}: holds pickled objects that are not tensors, and unpickling could run code; refused. Save its "
            "weights alone: torch.save(network.state_dict(), FILE), or as safetensors"
        ) from None
    except StorageError:
        raise
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise PdiffError(f"{path}: cannot be read as a checkpoint: {reason}") from None
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = {k.removeprefix("module."): v for k, v in content.items() if isinstance(v, Tensor) and isinstance(k, str)}
    if not tensors:
        raise PdiffError(f"{path}: holds no tensors by name; a state dict is wanted")
    return tensors


def import_zoo(
    folder: Path,
    experiment: Experiment,
    artifacts: Mapping[str, Artifact],
    base_checkpoint: Path | None = None,
    progress: Progress = silent,
) -> None:
    """Makes the experiment's base and zoo from the checkpoint files of a folder, in natural order of their names.

    The files hold whole networks, or the subset alone beside a `base_checkpoint` of the whole network.

    Raises:
        PdiffError: naming the file and what is wrong with it; nothing is stored then.
    """
    if not experiment.zoo.imported:
        raise ConfigError("zoo.imported: name the zoo, for example --set zoo.imported=my-zoo")
    files = sorted((p for p in folder.glob("*") if p.suffix in SUFFIXES), key=_natural)
    count = experiment.zoo.members
    if len(files) < count:
        raise ConfigError(
            f"{folder}: holds {len(files)} checkpoints ({', '.join(SUFFIXES)}), but zoo.members is {count}"
        )
    started = time.monotonic()
    files, network = files[:count], untrained_network(experiment)
    subset = subset_of(experiment, network)
    parameters = [name for name, _ in network.named_parameters()]
    base = read_checkpoint(base_checkpoint or files[0])
    if absent := [name for name in parameters if name not in base]:
        raise PdiffError(
            f"{base_checkpoint or files[0]}: lacks {absent[0]}{did_you_mean(absent[0], base)}; if the files hold the "
            "subset alone, give the whole network with --base"
        )
    try:
        network.load_state_dict(base, strict=False)
    except RuntimeError as error:
        raise PdiffError(f"{base_checkpoint or files[0]}: {str(error).splitlines()[-1].strip()}") from None
    # All are read before anything is stored.
    others = set(parameters) - set(subset.names)
    if experiment.zoo.batchnorm == "frozen":  # statistics that are neither in the vector nor measured anew
        others |= {name for name, _ in network.named_buffers() if name.endswith(("running_mean", "running_var"))}
    vectors = [_vector(file, subset, base, others) for file in files]
    context = Context(torch.device("cpu"), default_cache(), progress=progress)
    info = describe_base(experiment, network, open_dataset(experiment, context), context)
    storage = artifacts["zoo"].storage
    for name in storage.list(f"{artifacts['zoo'].folder}/{PARTS}"):  # of an import that was interrupted
        storage.delete(name)
    store = ParameterStore(artifacts["zoo"])
    for start in range(0, count, IMPORT_STACK):
        stack = range(start, min(start + IMPORT_STACK, count))
        store.append([Record(i, "original", vector=vectors[i].numpy(), **stamp()) for i in stack], subset)
        progress("import", stack.stop, count, "")
    origin = {"imported_from": str(folder)}
    artifacts["base"].commit({NETWORK_FILE: save_tree(dict(network.state_dict()))}, {**info, **origin}, 0.0)
    commit(artifacts["zoo"], subset, count, time.monotonic() - started)


def _vector(file: Path, subset: Subset, base: Mapping[str, Tensor], others: Collection[str]) -> Tensor:
    tensors = read_checkpoint(file)
    for name in sorted(others):
        if name in tensors and not torch.equal(tensors[name], base[name]):
            raise PdiffError(
                f"{file}: {name} is not in zoo.subset but differs from the base's; widen the subset (all), set "
                "zoo.batchnorm to included if it is a running statistic, or remove the file"
            )
    try:
        vector = subset.flatten(tensors)
    except ConfigError as error:
        raise PdiffError(f"{file}: {error}") from None
    if not vector.isfinite().all():
        raise PdiffError(f"{file}: holds values that are not finite")
    return vector


def _natural(path: Path) -> list[Any]:
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", path.name)]
