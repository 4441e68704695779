"""The stages of an experiment. Each turns a section of the configuration and its input artifacts into one artifact:

    base -> zoo -> generator -> samples -> evaluation -> report

A stage is a plain function `build(experiment, artifacts, context)`; Ray runs it on workers, tests call it directly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdiff_ray.artifacts import STAGES, Artifact, Storage
from pdiff_ray.config import Experiment

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, int, int, str], None]  # task, done, total, note


def silent(task: str, done: int, total: int, note: str = "") -> None:
    pass


@dataclass(frozen=True)
class Context:
    """Where a stage runs.

    Attributes:
        cache: folder of this node for decoded images.
        rank, world: this worker among those that build the stage together (torch.distributed where world > 1).
        checkpoint_s: seconds between the states that interrupted work resumes from.
    """

    device: torch.device
    cache: Path
    rank: int = 0
    world: int = 1
    progress: Progress = field(default=silent, compare=False)
    checkpoint_s: float = 10.0


def artifacts_of(experiment: Experiment, storage: Storage) -> dict[str, Artifact]:
    """The artifact of every stage: what the experiment's results are stored under, whether they are there or not."""
    from pdiff_ray import sources

    found: dict[str, Artifact] = {}

    def add(stage: str, config: dict[str, Any], *inputs: str) -> None:
        found[stage] = Artifact(storage, stage, config, {name: found[name].key for name in inputs})

    zoo = experiment.zoo.keyed()
    images, network, training = sources.keyed(experiment.data), experiment.network.keyed(), experiment.training.keyed()
    if experiment.zoo.imported:  # base and zoo came together, from files
        training, zoo = (
            {"imported": experiment.zoo.imported},
            {k: zoo[k] for k in ("members", "subset", "batchnorm", "imported")},
        )
    add("base", {"data": images, "network": network, "training": training, "seed": experiment.training.seed})
    add("zoo", zoo, "base")
    generator = experiment.generator.keyed()
    generator["members"] = experiment.num_members
    del generator["recipe"]  # its values are filled in
    add("generator", generator, "zoo")
    add("samples", experiment.sampling.keyed(), "generator")
    add("evaluation", experiment.evaluation.keyed(), "samples")
    add("report", {}, "evaluation")
    assert tuple(found) == STAGES
    return found
