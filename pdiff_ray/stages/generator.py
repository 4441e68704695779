"""Stage `generator`: learns the distribution of the zoo's vectors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pdiff_ray.common.devices import enough_memory
from pdiff_ray.common.seeds import derive_seed
from pdiff_ray.config.schema import Experiment
from pdiff_ray.evaluation.judge import Judge, judged
from pdiff_ray.generators.interface import Fitting, Generator
from pdiff_ray.generators.table import make_generator
from pdiff_ray.networks.subset import Subset
from pdiff_ray.stages.alignment import members_of
from pdiff_ray.stages.base import HISTORY_FILE, load_state
from pdiff_ray.stages.context import Context
from pdiff_ray.stages.judging import base_judge
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.matrix import StoredVectors, Vectors, rows_at_a_time
from pdiff_ray.storage.parameters import ParameterStore, Record
from pdiff_ray.storage.trees import load_tree, save_tree

GENERATOR_FILE = "generator.safetensors"


def build(
    experiment: Experiment,
    artifacts: Mapping[str, Artifact],
    context: Context,
    preview: Callable[[int, Tensor], None] | None = None,
) -> None:
    """Fits the generator to the K members of the zoo that are learned.

    Args:
        preview: see `generators.Fitting`.
    """
    artifact, settings = artifacts["generator"], experiment.generator
    started = time.monotonic()
    zoo = members_of(artifacts)
    subset = zoo.subset()
    judge = base_judge(experiment, artifacts, subset, context)

    def validation_accuracy(vectors: Tensor) -> Tensor:
        judgements = judge.judge(vectors, ["validation"])
        return torch.tensor([j.validation_accuracy for j in judgements])

    def known(name: str) -> Tensor:
        rows = zoo.records(experiment.split.learned)
        if name != "step" and any(getattr(row, name) is None for row in rows):  # as they are other code's
            rows = _judged(rows, zoo, judge, "selection" if name.startswith("train") else "validation")
        return torch.tensor([getattr(row, name) for row in rows], dtype=torch.double)

    fitting = Fitting(
        device=context.device,
        seed=derive_seed(settings.seed or 0, "fit"),
        judge=validation_accuracy,
        load=lambda name: load_state(artifact, f"{name}.safetensors"),
        save=lambda name, state: artifact.save_work(f"{name}.safetensors", save_tree(state)),
        progress=context.progress,
        preview=preview,
        due=context.due,
        known=known,
    )
    generator = make_generator(settings, subset)
    with enough_memory("training of the generator", settings.memory_fields):
        generator.fit(StoredVectors(zoo, experiment.split.learned, context.device), fitting)
    info = {**fitting.notes, "final_loss": {name: losses[-1] for name, losses in fitting.history.items()}}
    commit_generator(artifact, generator, subset, fitting.history, info, time.monotonic() - started)


def _judged(rows: Sequence[Record], zoo: ParameterStore, judge: Judge, split: str) -> list[Record]:
    """Returns rows of members with what is found of them on a split, some at a time."""
    found: list[Record] = []
    count = rows_at_a_time(zoo.subset().size)
    for chosen in (rows[start : start + count] for start in range(0, len(rows), count)):
        vectors = torch.from_numpy(zoo.vectors([row.id for row in chosen]))
        found += map(judged, chosen, judge.judge(vectors, [split]))
    return found


def commit_generator(
    artifact: Artifact,
    generator: Generator,
    subset: Subset,
    history: Mapping[str, Sequence[float]],
    info: Mapping[str, Any],
    seconds: float,
) -> None:
    """Commits a generator.

    Args:
        history: losses per step, by model.
        info: what the manifest says of it.
    """
    files = {
        GENERATOR_FILE: save_tree(generator.state()),
        HISTORY_FILE: save_tree({name: torch.tensor(losses) for name, losses in history.items()}),
        "subset.json": subset.to_json().encode(),
    }
    artifact.commit(files, dict(info), seconds)


def load_generator(
    experiment: Experiment, artifacts: Mapping[str, Artifact], members: Vectors | None = None
) -> Generator:
    """Loads the fitted generator, on the CPU.

    Args:
        members: (K, D) that it has learned from, if they are open already.
    """
    zoo = members_of(artifacts)
    generator = make_generator(experiment.generator, zoo.subset())
    state = load_tree(artifacts["generator"].read(GENERATOR_FILE), artifacts["generator"].location)
    generator.load_state(state, StoredVectors(zoo, experiment.split.learned) if members is None else members)
    return generator
