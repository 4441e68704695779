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

    from pdiff_ray.judge import Judge

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
        judges: the one that a stage has made, for the next one (`judging.base_judge`).
    """

    device: torch.device
    cache: Path
    rank: int = 0
    world: int = 1
    progress: Progress = field(default=silent, compare=False)
    checkpoint_s: float = 10.0
    judges: dict[Any, Judge] = field(default_factory=dict, compare=False, repr=False)


def artifacts_of(experiment: Experiment, storage: Storage) -> dict[str, Artifact]:
    """The artifact of every stage: what the experiment's results are stored under, whether they are there or not."""
    from pdiff_ray import networks, sources

    found: dict[str, Artifact] = {}

    def add(stage: str, config: dict[str, Any], *inputs: str) -> None:
        found[stage] = Artifact(storage, stage, config, {name: found[name].key for name in inputs})

    zoo, evaluation = experiment.zoo.keyed(), experiment.evaluation.keyed()
    base: dict[str, Any] = {
        "data": sources.keyed(experiment.data),
        "network": experiment.network.keyed(),
        "training": experiment.training.keyed(),
        "seed": experiment.training.seed,
    }
    if ":" in experiment.network.name:
        base["code"] = networks.fingerprint(experiment.network)
    if experiment.resources.workers > 1:  # their BatchNorm layers see shares of the batches
        base["workers"] = experiment.resources.workers
    if experiment.zoo.imported:  # base and zoo came together, from files; training is for the fine-tuned baseline only
        kept = {key: zoo[key] for key in ("members", "subset", "batchnorm", "imported")}
        evaluation["fine_tuning"] = {key: zoo[key] for key in zoo if key not in kept}
        base, zoo = {"data": base["data"], "network": base["network"], "imported": experiment.zoo.imported}, kept
    add("base", base)
    add("zoo", zoo, "base")
    generator = experiment.generator.keyed()
    generator["members"] = experiment.num_members
    del generator["recipe"]  # its values are filled in
    add("generator", generator, "zoo")
    add("samples", experiment.sampling.keyed(), "generator")
    add("evaluation", evaluation, "samples")
    add("report", {"name": experiment.name}, "evaluation")
    assert tuple(found) == STAGES
    return found
