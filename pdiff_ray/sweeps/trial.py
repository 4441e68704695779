"""A trial of a sweep: what is known of it, and how it is run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from pdiff_ray.common.errors import PdiffError
from pdiff_ray.config.schema import Experiment
from pdiff_ray.config.sweep import Assignment, describe
from pdiff_ray.evaluation.metrics import named_metrics
from pdiff_ray.generators.interface import NUM_RUNGS
from pdiff_ray.stages import generator, report, zoo
from pdiff_ray.stages.context import Context
from pdiff_ray.stages.judging import base_judge
from pdiff_ray.stages.table import STAGES, Claim, artifacts_of, build_missing, unclaimed
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.files import Storage

FINAL_RUNG = NUM_RUNGS + 1  # after the generator's: the evaluation


@dataclass(frozen=True)
class Trial:
    """One trial: its values, and what is known of it.

    Attributes:
        assignment: the parameters that vary.
        repeats: what is added to the seeds; an experiment each.
        state: failed ones of a grid are tried again by the next launch, interrupted ones remain "running".
        objective: the sweep's metric, mean over repeats.
        curve: (rung, objective) of the unfinished generator, where a scheduler asked for it.
        reason: why it failed.
        crashed: failed by the loss of its process, node or storage, not by its values.
        seconds: that it ran.
    """

    number: int
    assignment: Assignment
    repeats: tuple[int, ...]
    state: Literal["running", "finished", "stopped", "failed"] = "running"
    objective: float | None = None
    curve: tuple[tuple[int, float], ...] = ()
    reason: str | None = None
    crashed: bool = False
    seconds: float | None = None

    @property
    def text(self) -> str:
        """Its values in a few words."""
        seed = f", seed +{self.repeats[0]}" if len(self.repeats) == 1 and self.repeats[0] else ""
        return describe(self.assignment) + seed


def run_trial(
    experiments: list[Experiment],
    storage: Storage,
    context: Context,
    metric: str,
    claim: Claim = unclaimed,
    report_rung: Callable[[int, float], None] | None = None,
) -> float:
    """Builds all that a trial lacks.

    Args:
        claim: holds other trials off while this one builds an artifact; gives whether it is to be built.
        report_rung: is given the objective of the unfinished generator at each rung, and may raise to stop the trial;
            only with one experiment.

    Returns:
        The objective, mean over the experiments.
    """
    objectives = []
    for experiment in experiments:
        artifacts = artifacts_of(experiment, storage)
        for stage in () if has_results(artifacts) else STAGES:
            build = None
            if stage == "generator" and report_rung and len(experiments) == 1:
                preview = _preview(experiment, artifacts, context, metric, report_rung)
                build = functools.partial(generator.build, preview=preview)
            build_missing(stage, experiment, artifacts, context, claim, build)
        objectives.append(objective(artifacts, metric))
    found = float(np.mean(objectives))
    if not math.isfinite(found):
        raise PdiffError(f"{metric} is {found}: the logits of a generated network are not finite")
    return found


def has_results(artifacts: Mapping[str, Artifact]) -> bool:
    """Returns whether an experiment has been evaluated and reported."""
    return artifacts["evaluation"].exists() and artifacts["report"].exists()


def objective(artifacts: Mapping[str, Artifact], metric: str) -> float:
    """Returns the metric of a finished evaluation."""
    return named_metrics(report.load_summary(artifacts))[metric]


def _preview(
    experiment: Experiment,
    artifacts: Mapping[str, Artifact],
    context: Context,
    metric: str,
    report_rung: Callable[[int, float], None],
) -> Callable[[int, Tensor], None]:
    """Judges the vectors of an unfinished generator as the metric does those of the finished one."""
    field_of = metric.partition("/mean_")[2]  # such as train_accuracy
    split = "selection" if field_of.startswith("train") else "validation"
    judge = base_judge(experiment, artifacts, zoo.zoo_subset(experiment), context)

    def preview(rung: int, vectors: Tensor) -> None:
        values = [getattr(judgement, field_of) for judgement in judge.judge(vectors, [split])]
        mean = float(np.mean(values))
        report_rung(rung, math.inf if math.isnan(mean) else mean)  # a loss; as a number that a scheduler can compare

    return preview
