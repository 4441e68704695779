"""The Python API: load an experiment, plan it, run it, and work with what came of it.

import pdiff_ray as pd

experiment = pd.load_experiment("sweeps/quickstart.yaml", zoo={"members": 50})
result = pd.run(experiment)
print(result)
vectors = result.zoo.vectors(experiment.split.learned)  # (K, D)
samples = pd.fit(vectors, "gaussian").sample(100)      # (100, D)
print(pd.judge(experiment, samples).to_pandas())
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import torch
from torch import Tensor

from pdiff_ray.common.errors import ConfigError, PdiffError
from pdiff_ray.common.progress import display
from pdiff_ray.common.seeds import derive_seed
from pdiff_ray.config import loading, schema
from pdiff_ray.config import sweep as sweeps
from pdiff_ray.config.schema import Experiment
from pdiff_ray.config.section import merge
from pdiff_ray.config.sweep import SweepFile
from pdiff_ray.evaluation.judge import JUDGED_SPLITS
from pdiff_ray.generators.interface import Fitting
from pdiff_ray.generators.table import make_generator
from pdiff_ray.networks.subset import Entry, Subset
from pdiff_ray.running import experiment as experiments
from pdiff_ray.running import sweep as running_sweeps
from pdiff_ray.running.experiment import Plan, here
from pdiff_ray.running.results import Result
from pdiff_ray.running.results import open_result as open_result
from pdiff_ray.running.sweep import SweepResult
from pdiff_ray.stages.judging import base_judge
from pdiff_ray.stages.stored import Networks
from pdiff_ray.stages.zoo import zoo_subset
from pdiff_ray.storage.files import Storage
from pdiff_ray.sweeps.ledger import Ledger


def load_experiment(file: str | Path | None = None, *, preset: str | None = None, **sections: Any) -> Experiment:
    """Loads an experiment.

    Args:
        file: a YAML file; of a sweep's, what it varies is as the file has it. Default: the defaults of every field.
        preset: lays one of the file's presets over it.
        sections: fields of the top level, laid over the file: `seed=1`, `zoo={"members": 50}`, `storage="results"`.

    Raises:
        ConfigError: naming the file, the dotted path of the field, its value and the remedy.
    """
    raw, where = _read(file, preset, sections)
    raw.pop("sweep", None)
    return loading.parse_experiment(raw, where)


def load_sweep(file: str | Path | None = None, *, preset: str | None = None, **sections: Any) -> SweepFile:
    """Loads a sweep: an experiment with a section `sweep`, which says what of it varies. Takes the arguments of
    `load_experiment`.

    Raises:
        ConfigError
    """
    raw, where = _read(file, preset, sections)
    return sweeps.parse_sweep(raw, where)


def _read(file: str | Path | None, preset: str | None, sections: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    if file is None and preset is not None:
        raise ConfigError(f"preset: {preset!r} is given without the file that has it")
    raw = loading.with_site({"name": "experiment"}) if file is None else loading.read(file, preset=preset)
    return merge(raw, dict(sections)), "experiment" if file is None else str(file)


def plan(experiment: Experiment) -> Plan:
    """Tells which stages of an experiment are in storage and which are to be built; print it to see them."""
    return experiments.make_plan(experiment)


@overload
def run(what: Experiment, *, in_process: bool = ..., track: bool = ...) -> Result: ...


@overload
def run(what: SweepFile, *, in_process: bool = ..., track: bool = ...) -> SweepResult: ...


def run(what: Experiment | SweepFile, *, in_process: bool = False, track: bool = True) -> Result | SweepResult:
    """Runs an experiment or a sweep from data to report; what is in storage is used again.

    Args:
        in_process: runs without Ray, in this process, which is then the only worker.
        track: records it in MLflow.

    Raises:
        PdiffError: something that can be mended; the same call goes on from where it was.
    """
    if isinstance(what, SweepFile):
        return running_sweeps.run(Ledger(what), in_process=in_process, track=track)
    plan = experiments.make_plan(what)
    experiments.run(plan, in_process=in_process, track=track)
    return Result(what.name, plan.artifacts)


def open_networks(storage: str, key: str) -> Networks:
    """Opens the networks of a zoo or of samples by the start of their artifact's key.

    Raises:
        StorageError: there is none, or several, or it holds no networks.
    """
    return Networks.find(Storage(storage), key)


class FittedGenerator:
    """A generator that has learned the distribution of some vectors; made by `fit`.

    Attributes:
        history: losses per step, by model.
        notes: findings, such as the variance that reconstructions leave unexplained.
    """

    def __init__(
        self,
        vectors: Tensor,
        settings: schema.Generator,
        subset: Subset,
        known: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self._generator = make_generator(settings, subset)
        with display() as progress:
            self._device = here(progress).device
            fitting = Fitting(self._device, derive_seed(settings.seed or 0, "fit"), progress=progress)
            if settings.condition:
                fitting = replace(fitting, known=lambda name: _known(known or {}, name, len(vectors)))
            self._generator.fit(vectors.to(self._device), fitting)
        self.history, self.notes = fitting.history, fitting.notes

    def sample(self, count: int, *, seed: int = 0, **sampling: Any) -> Tensor:
        """Draws vectors (count, D), float32, on the CPU.

        Args:
            seed: determines them.
            sampling: fields of the section `sampling`, such as `sampler="ddim"` and `steps=50`.
        """
        section = loading.parse(schema.Sampling, {"samples": count, "seed": seed, **sampling}, "sampling")
        return self._generator.sample(count, section, self._device).cpu()


def fit(
    vectors: Tensor,
    generator: str = "latent_diffusion",
    *,
    seed: int = 0,
    subset: Subset | None = None,
    known: Mapping[str, Sequence[float]] | None = None,
    **settings: Any,
) -> FittedGenerator:
    """Fits a generator to vectors (K, D), float32, on a GPU if there is one.

    Args:
        generator: its name (field `generator.name`).
        seed: of its initialisation and training.
        subset: where tensors begin and end in a vector, for normalization by tensor; default: one tensor.
        known: of each vector, by the name that `process.condition` has: `{"validation_accuracy": [...]}`.
        settings: further fields of the section `generator`, such as `diffusion={"steps": 1000}`, or of the generator
            `latent` `encoder={"name": "subspace"}` and `process={"name": "flow"}`.

    Raises:
        ConfigError: unknown name or setting.
        PdiffError: the vectors have another shape, or values that are not finite.
    """
    if vectors.ndim != 2 or not vectors.numel() or not vectors.isfinite().all():
        raise PdiffError(f"vectors: shape {tuple(vectors.shape)}; (K, D) with values that are finite is wanted")
    section = loading.parse(schema.Generator, {"name": generator, "seed": seed, **settings}, "generator")
    whole = subset or Subset((Entry("values", (vectors.shape[1],), 0, "parameter"),))
    return FittedGenerator(vectors.float(), section, whole, known)


def _known(known: Mapping[str, Sequence[float]], name: str, count: int) -> Tensor:
    """Returns what is known of so many vectors by a name (K,)."""
    values = torch.as_tensor(known.get(name, ()), dtype=torch.double)
    if values.shape != (count,):
        raise ConfigError(f"known: {name!r} has shape {tuple(values.shape)}; ({count},) is wanted, a number per vector")
    return values


def judge(experiment: Experiment, vectors: Tensor, splits: Sequence[str] = JUDGED_SPLITS) -> pa.Table:
    """Judges networks that differ from an experiment's base in the vectors of its subset.

    Args:
        experiment: whose base network has been trained.
        vectors: (n, D).
        splits: of `selection` (training images), `validation` and `test`.

    Returns:
        A row per network: accuracies as fractions, losses in nats, and the wrong test predictions as packed bits.

    Raises:
        PdiffError: the base network is not in storage, the vectors have another shape, or there is no such split.
    """
    if odd := [split for split in splits if split not in JUDGED_SPLITS]:
        raise PdiffError(f"splits: {odd[0]!r} is none of {', '.join(JUDGED_SPLITS)}")
    found = experiments.make_plan(experiment, "base")
    if found.missing:
        raise PdiffError(f"{experiment.name}: base missing in {found.storage.place}; run the experiment first")
    subset = zoo_subset(experiment, found.artifacts)
    if vectors.ndim != 2 or vectors.shape[1] != subset.size:
        raise PdiffError(f"vectors: shape {tuple(vectors.shape)}; (n, {subset.size}) is wanted, as zoo.subset has it")
    with display() as progress:
        judge = base_judge(experiment, found.artifacts, subset, here(progress))
        return pa.Table.from_pylist([vars(judgement) for judgement in judge.judge(vectors.float(), splits)])
