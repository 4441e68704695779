"""Zoos and samples from files that other code wrote. Weights only: no code is run."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pdiff_ray.common.errors import ConfigError, some_of
from pdiff_ray.common.progress import Progress, silent
from pdiff_ray.config.schema import Experiment
from pdiff_ray.data.kept import default_cache
from pdiff_ray.generators.imported import Imported, ImportedSettings
from pdiff_ray.networks.subset import Subset, first_names
from pdiff_ray.stages.alignment import members_of
from pdiff_ray.stages.base import (
    NETWORK_FILE,
    describe_base,
    files_of,
    load_network,
    open_dataset,
    untrained_network,
)
from pdiff_ray.stages.context import Context
from pdiff_ray.stages.generator import commit_generator
from pdiff_ray.stages.zoo import commit, subset_of
from pdiff_ray.storage import weights
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.matching import match
from pdiff_ray.storage.matrix import StoredVectors, is_held, rows_at_a_time
from pdiff_ray.storage.parameters import PARTS, ParameterStore, Record, stamp
from pdiff_ray.storage.trees import load_tree
from pdiff_ray.storage.vectors import read_vectors
from pdiff_ray.storage.weights import Weight

SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".pth.tar", ".pt.tar")
INDEX = ".index.json"  # ends the name of what says which of several files has which tensor of one network
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
# What trainers write beside the weights, with the same suffixes.
COMPANIONS = ("optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*", "training_args*")
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
STEPS = ("global_step", "step", "steps", "iteration", "iter")  # names under which trainers keep the step
MAX_NUMBERS = 32  # of a file, in the manifest
MAX_LEFT_OUT = 1000  # files that it names as left out
IMPORT_STACK = 20


@dataclass(frozen=True)
class Options:
    """What of a folder's files is taken, where that is not plain.

    Attributes:
        pattern: glob on the files' names, or on their paths below the folder.
        weights: key under which the weights are in each file, for example ema.
        prefix: what stands before the network's names in each file, for example "model.".
        order: name of a number in each file, for example epoch, that orders them; default: their names do.
        base: file of the whole network; default: the first member's.
    """

    pattern: str | None = None
    weights: str | None = None
    prefix: str | None = None
    order: str | None = None
    base: Path | None = None


@dataclass
class Report:
    """What an import has taken and what not; files are named by their paths below the folder."""

    base: str = ""
    what: str = "members"
    members: list[str] = field(default_factory=list)
    order: str = "their names"
    found: Counter[str] = field(default_factory=Counter)  # of members: where in them the weights were
    ignored: Counter[str] = field(default_factory=Counter)  # of members: what else was there
    left_out: dict[str, str] = field(default_factory=dict)  # reasons by file

    def __str__(self) -> str:
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            by_reason.setdefault(reason, []).append(name)
        lines = [
            f"base: {self.base}" if self.base else "",
            f"{self.what}: {len(self.members)}, in the order of {self.order}: {some_of(self.members)}",
            *(f"weights: {how}, in {count} of them" for how, count in self.found.items()),
            *(f"ignored: {what}, in {count} of them" for what, count in self.ignored.items()),
            *(f"left out: {some_of(names)}: {reason}" for reason, names in by_reason.items()),
        ]
        return "\n".join(line for line in lines if line)

    @property
    def manifest(self) -> dict[str, Any]:
        """What a manifest says of the files that are left out, of which there may be any number."""
        first = dict(itertools.islice(self.left_out.items(), MAX_LEFT_OUT))
        return {"left_out": first, "num_left_out": len(self.left_out)}

    def take(self, checkpoint: Checkpoint) -> None:
        self.members.append(checkpoint.name)
        self.found[checkpoint.found] += 1
        if checkpoint.ignored:
            self.ignored[checkpoint.ignored] += 1


@dataclass(frozen=True)
class Checkpoint:
    """A network in a file, or in those of an index.

    Attributes:
        name: of the file, for the report.
        tensors: those that the network has, by its names.
        numbers: what else the file says, such as an epoch.
        found: where in the file the tensors are, in words.
        ignored: what else is there, in words; empty if nothing.
    """

    file: Path
    name: str
    tensors: dict[str, Weight]
    numbers: dict[str, float]
    found: str
    ignored: str


def import_zoo(
    folder: Path,
    experiment: Experiment,
    artifacts: Mapping[str, Artifact],
    options: Options | None = None,
    progress: Progress = silent,
) -> Report:
    """Makes the experiment's base and zoo from the checkpoint files in a folder and in those below it.

    The files hold whole networks, or the subset alone beside a base (`Options.base`) of the whole network.

    Raises:
        ConfigError: naming the file and what is wrong with it; nothing is stored then.
    """
    if not experiment.zoo.imported:
        raise ConfigError("zoo.imported: name the zoo, for example --set zoo.imported=my-zoo")
    options, started, count = options or Options(), time.monotonic(), experiment.zoo.members
    network = untrained_network(experiment)
    report, wanted = Report(), _Wanted(experiment, options, network, subset_of(experiment, network))
    checkpoints = wanted.checkpoints(folder, report)
    if options.base:
        report.base = f"{options.base} (--base)"
        wanted.take_base(wanted.read(options.base, options.base.name))
    members, vectors = list[Checkpoint](), list[Tensor]()
    held = is_held(count, wanted.subset.size)  # else files are read once more
    seen: dict[bytes, str] = {}
    for checkpoint in checkpoints:  # all are read before anything is stored
        if len(members) == count:
            report.left_out[checkpoint.name] = f"the first {count} are taken (zoo.members)"
            continue
        if not report.base:
            report.base = f"{checkpoint.name}, the first member"
            wanted.take_base(checkpoint)
        vector = wanted.vector(checkpoint)
        digest = hashlib.sha256(vector.numpy().tobytes()).digest()
        if digest in seen:
            report.left_out[checkpoint.name] = f"equal to {seen[digest]} in zoo.subset"
            continue
        seen[digest] = checkpoint.name
        members.append(checkpoint)
        vectors += [vector] if held else []
    for checkpoint in members:
        report.take(checkpoint)
    if len(members) < count:
        raise ConfigError(
            f"{folder}: holds {len(members)} different checkpoints ({', '.join(SUFFIXES)}), but zoo.members is "
            f"{count}; lower it, or choose other files with --pattern\n{report}"
        )
    wanted.check_base(artifacts["base"], experiment.zoo.imported, report.base)
    context = Context(torch.device("cpu"), default_cache(), progress=progress)
    dataset = open_dataset(experiment, context)
    info = describe_base(experiment, wanted.network, dataset, context)
    storage = artifacts["zoo"].storage
    for name in storage.list(f"{artifacts['zoo'].folder}/{PARTS}"):  # of an import that was interrupted
        storage.delete(name)
    store = ParameterStore(artifacts["zoo"])
    stack_size = min(IMPORT_STACK, rows_at_a_time(wanted.subset.size))
    for start in range(0, count, stack_size):
        stack = range(start, min(start + stack_size, count))
        read = (vectors[i] if held else wanted.vector(members[i]) for i in stack)
        records = [
            Record(i, "original", vector=vector.numpy(), step=_step(members[i]), **stamp())
            for i, vector in zip(stack, read, strict=True)
        ]
        store.append(records, wanted.subset)
        progress("import", stack.stop, count, "")
    origin = {"imported_from": str(folder)}
    artifacts["base"].commit(files_of(wanted.network, dataset), {**info, **origin, "file": report.base}, 0.0)
    said = [{"file": member.name, **member.numbers} for member in members]
    seconds = time.monotonic() - started
    commit(artifacts["zoo"], wanted.subset, experiment.zoo, seconds, {**origin, "files": said, **report.manifest})
    return report


def import_samples(
    source: Path, experiment: Experiment, artifacts: Mapping[str, Artifact], options: Options | None = None
) -> Report:
    """Makes the experiment's generator from samples that another tool has drawn for its zoo, all of them.

    Args:
        source: a folder of checkpoints, as for a zoo, which may hold the subset alone, or a file of vectors.

    Raises:
        ConfigError: naming the file and what is wrong with it, or other samples have this label. Nothing is stored.
    """
    options, started, settings, report = options or Options(), time.monotonic(), experiment.generator, Report()
    if not isinstance(settings, ImportedSettings):
        raise ConfigError(
            f"generator.name is {settings.name}; name the samples, for example --set generator.name=imported --set "
            "generator.label=my-samples"
        )
    if options.base:
        raise ConfigError("--base is for zoos; samples stand beside the experiment's own base")
    zoo = ParameterStore(artifacts["zoo"])
    subset, report.what, files = zoo.subset(), "samples", list[dict[str, Any]]()
    if source.is_dir():
        wanted = _Wanted(experiment, options, load_network(experiment, artifacts), subset)
        wanted.base = wanted.tensors
        rows = []
        for checkpoint in wanted.checkpoints(source, report):
            rows.append(wanted.vector(checkpoint))
            report.take(checkpoint)
            files.append({"file": checkpoint.name, **checkpoint.numbers})
        vectors = torch.stack(rows) if rows else torch.empty(0, subset.size)
    elif odd := [name for name in ("pattern", "prefix", "order") if getattr(options, name) is not None]:
        raise ConfigError(f"--{odd[0]} is for the checkpoints of a folder; {source} is a file of vectors")
    else:
        vectors = read_vectors(source, subset, options.weights)
        report.members, report.order = [f"row {i}" for i in range(len(vectors))], "the file"
    if len(vectors) < (count := experiment.sampling.samples):
        raise ConfigError(
            f"{source}: holds {len(vectors)} samples, but sampling.samples is {count}; lower it, or choose other files "
            f"with --pattern\n{report}"
        )
    artifact, sha256 = artifacts["generator"], hashlib.sha256(vectors.numpy().data).hexdigest()
    if artifact.exists():
        if (info := artifact.manifest().info).get("sha256") != sha256:
            raise ConfigError(
                f"{source}: holds other samples than {info.get('imported_from')}, which the label {settings.label!r} "
                "stands for; choose another one (generator.label)"
            )
        return report
    generator = Imported(settings, subset)
    generator.load_state({"vectors": vectors}, StoredVectors(members_of(artifacts), experiment.split.learned))
    info = {"imported_from": str(source), "sha256": sha256, "files": files, **report.manifest}
    commit_generator(artifact, generator, subset, {}, info, time.monotonic() - started)
    return report


def find(folder: Path, pattern: str | None, report: Report) -> dict[str, Path]:
    """Returns the checkpoint files in a folder and below it, in natural order of their names below the folder.

    Hidden files never count. Without a pattern, files that are named in another way than the rest are left out, such as
    `best.pt` beside `epoch_1.pt`, `epoch_2.pt` and so on. A network in several files is its index.

    Args:
        report: is told what is left out.

    Raises:
        ConfigError: files are named in several ways, none of which stands out.
        ConfigError: an index is damaged, or missing.
    """
    there = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    there = {name: file for name, file in there.items() if not re.search(r"(^|/)(\.|__MACOSX/)", name)}
    index_of: dict[str, str] = {}
    for name, file in there.items():
        if name.lower().endswith(INDEX):
            beside = name.rpartition("/")[0]
            index_of |= {f"{beside}/{part}".lstrip("/"): name for part in weights.read_index(file).values()}
    if pattern:
        chosen = [name for name in there if fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(Path(name).name, pattern)]
    else:
        chosen = [name for name in there if name.lower().endswith(SUFFIXES)]
        for name in [n for n in chosen if any(fnmatch.fnmatch(Path(n).name.lower(), c) for c in COMPANIONS)]:
            report.left_out[name] = "named like what trainers keep beside weights; --pattern takes it"
            chosen.remove(name)
    if parts := [name for name in chosen if SHARD.search(name) and name not in index_of]:
        raise ConfigError(
            f"{folder / parts[0]}: is a part of a network, and the index of the parts (*{INDEX}) is not beside it; "
            "copy it as well, or choose other files with --pattern"
        )
    chosen = sorted({index_of.get(name, name) for name in chosen}, key=_natural)
    if not pattern:
        chosen = _named_alike(chosen, folder, report)
    return {name: there[name] for name in chosen}


def _named_alike(names: Sequence[str], folder: Path, report: Report) -> list[str]:
    """Returns the names that are alike but for numbers, where there are such; tells a report of the others."""
    forms = {name: NUMBER.sub("#", _stem(name)) for name in names}
    counts = Counter(forms.values())
    several = [form for form, count in counts.items() if count > 1]
    if len(several) > 1:
        kinds = ", ".join(f"{form} ({counts[form]} files)" for form in several)
        example = f"{several[0].replace('#', '*').rstrip('*')}*"
        raise ConfigError(
            f"{folder}: holds checkpoints that are named in several ways: {kinds}; choose with --pattern, for example "
            f"--pattern '{example}', or take all with --pattern '*'"
        )
    kept = set(several or [form for form in counts if "#" in form] or counts)
    for name in names:
        if forms[name] not in kept:
            report.left_out[name] = f"named in another way than {some_of(sorted(kept))}; --pattern takes it"
    return [name for name in names if forms[name] in kept]


class _Wanted:
    """The experiment's network, and what of it the files are to hold.

    Attributes:
        network: filled with the base's tensors by `take_base`, unless it has them.
        subset: of the network, in a member's vector.
    """

    def __init__(self, experiment: Experiment, options: Options, network: nn.Module, subset: Subset) -> None:
        self.network, self.options, self.subset = network, options, subset
        self.parameters = [name for name, _ in self.network.named_parameters()]
        self.tensors: dict[str, Tensor] = dict(self.network.state_dict())
        self.statistics = {name for name in self.tensors if name.endswith(("running_mean", "running_var"))}
        self.base: dict[str, Tensor] = {}
        self.first = first_names(self.network)
        # What is neither in the vector nor measured anew is the base's.
        others = set(self.parameters) | (self.statistics if experiment.zoo.batchnorm == "frozen" else set())
        self.others = {name for name, first in self.first.items() if first in others - set(self.subset.names)}

    def checkpoints(self, folder: Path, report: Report) -> Iterable[Checkpoint]:
        """Returns the checkpoints in a folder, in order; tells a report of it."""
        found = (self.read(file, name) for name, file in find(folder, self.options.pattern, report).items())
        if not (order := self.options.order):
            return found
        report.order = f"{order} in them"
        return sorted(found, key=lambda checkpoint: _number(checkpoint, order))

    def read(self, file: Path, label: str) -> Checkpoint:
        """Reads what a file describes; no tensors yet.

        Args:
            label: names the file in the report.

        Raises:
            ConfigError: the network's weights are not in it, or of other shapes or types.
        """
        content = weights.read_parts(file) if label.lower().endswith(INDEX) else weights.read(file)
        try:
            found = match(content, self.parameters, self.subset.names, self.options.weights, self.options.prefix)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None
        named = found.named()
        tensors = {name: weight for name, weight in named.items() if name in self.tensors}
        for name, weight in tensors.items():
            if weight.shape != (shape := tuple(self.tensors[name].shape)):
                raise ConfigError(
                    f"{file}: {name} has shape {weight.shape}, the network's has {shape}; the file is of another "
                    "network, or network.args or the number of classes are other ones"
                )
            if (weight.dtype.is_floating_point, weight.dtype.is_complex) != (
                self.tensors[name].is_floating_point(),
                self.tensors[name].is_complex(),
            ):
                raise ConfigError(
                    f"{file}: {name} is {weight.dtype}, the network's {self.tensors[name].dtype}; if it is quantized, "
                    "save the weights before that"
                )
        others = [name for name in found.tensors if name.removeprefix(found.prefix) not in tensors]
        ignored = f"what the network has not: {some_of(others)}" if others else ""
        return Checkpoint(file, label, tensors, _numbers(content), str(found), ignored)

    def take_base(self, checkpoint: Checkpoint) -> None:
        """Fills the network with a checkpoint.

        Raises:
            ConfigError: parameters or statistics are missing, or are not finite.
        """
        for name in [*self.parameters, *sorted(self.statistics)]:
            if name not in checkpoint.tensors:
                raise ConfigError(
                    f"{checkpoint.file}: lacks {name}; if the files hold the subset alone, give the whole network with "
                    "--base"
                )
        self.base = weights.load(checkpoint.tensors)
        with torch.no_grad():
            for name, tensor in self.base.items():
                self.tensors[name].copy_(tensor)
        for name, tensor in self.base.items():
            if not torch.equal(self.tensors[name], tensor.to(self.tensors[name].dtype)):
                reason = (
                    "holds values that are not finite" if tensor.isnan().any() else "is tied to a tensor that differs"
                )
                raise ConfigError(f"{checkpoint.file}: {name} {reason}")

    def check_base(self, artifact: Artifact, label: str, file: str) -> None:
        """Raises ConfigError if the base is there, of an import that was interrupted, and is not the network."""
        if not artifact.exists():
            return
        there = load_tree(artifact.read(NETWORK_FILE), artifact.location)
        own = self.network.state_dict()
        if there.keys() != own.keys() or not all(torch.equal(there[name], tensor) for name, tensor in own.items()):
            raise ConfigError(
                f"{artifact.location}: the base of zoo.imported {label!r} is there, from "
                f"{artifact.manifest().info.get('file')}, and differs from {file}; choose another label, or delete it"
            )

    def vector(self, checkpoint: Checkpoint) -> Tensor:
        """Returns the subset of a checkpoint, flattened (D,).

        Raises:
            ConfigError: something of the subset is missing or not finite, or what is not in it differs from the base's.
        """
        taken = self.others | {name for entry in self.subset.entries for name in entry.names}
        tensors = weights.load({name: w for name, w in checkpoint.tensors.items() if name in taken})
        for name in sorted(self.others & set(tensors)):
            base = self.base.get(name, self.base[self.first[name]])
            if not torch.equal(tensors[name], base.to(tensors[name].dtype)):
                raise ConfigError(
                    f"{checkpoint.file}: {name} is not in zoo.subset but differs from the base's; widen the subset "
                    "(all), set zoo.batchnorm to included if it is a running statistic, or leave the file out "
                    "(--pattern)"
                )
        for name in tensors.keys() - set(self.subset.names) - self.others:
            if not torch.equal(tensors[name], tensors.get(first := self.first[name], tensors[name])):
                raise ConfigError(
                    f"{checkpoint.file}: {first} and {name} differ, but are one tensor in the network; the file is of "
                    "a network that does not tie them"
                )
        try:
            vector = self.subset.flatten(tensors)
        except ConfigError as error:
            raise ConfigError(f"{checkpoint.file}: {error}") from None
        if not vector.isfinite().all():
            raise ConfigError(f"{checkpoint.file}: holds values that are not finite")
        return vector


def _numbers(content: Any) -> dict[str, float]:
    """Returns the numbers that a file keeps beside its tensors, by name; of mappings in it by dotted names."""
    found: dict[str, float] = {}
    outer = content if isinstance(content, dict) else {}
    inner = {f"{key}.{k}": v for key, value in outer.items() if isinstance(value, dict) for k, v in value.items()}
    for name, value in [*outer.items(), *inner.items()]:
        try:
            number = float(value) if isinstance(value, int | float | str) and len(str(name)) < 100 else math.nan
        except (ValueError, OverflowError):  # text, or a number of very many digits
            continue
        if math.isfinite(number) and not isinstance(value, bool) and len(found) < MAX_NUMBERS:
            found[str(name)] = int(number) if number.is_integer() else number
    return found


def _number(checkpoint: Checkpoint, name: str) -> float:
    if name not in checkpoint.numbers:
        raise ConfigError(
            f"{checkpoint.file}: keeps no number {name!r} (--order); it has {', '.join(checkpoint.numbers) or 'none'}"
        )
    return checkpoint.numbers[name]


def _step(checkpoint: Checkpoint) -> int | None:
    """Returns the training step that a checkpoint says it is of."""
    steps = [checkpoint.numbers[name] for name in STEPS if name in checkpoint.numbers]
    return int(steps[0]) if steps and 0 <= steps[0] < 2**62 else None


def _stem(name: str) -> str:
    """Returns a name without what says that it is a checkpoint."""
    name = name.lower().removesuffix(INDEX)
    return name.removesuffix(next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s)), ""))


def _natural(name: str) -> list[Any]:
    """Returns what orders names by the numbers in them."""
    return [int(piece) if i % 2 else piece for i, piece in enumerate(re.split(r"(\d+)", name))]
