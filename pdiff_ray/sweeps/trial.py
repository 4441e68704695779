"""A trial of a sweep: the record of what is known about it, and the function that runs it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import ConfigDict
from torch import Tensor

from pdiff_ray.common.errors import PdiffError
from pdiff_ray.config.schema import Experiment
from pdiff_ray.config.sweep import Assignment, describe
from pdiff_ray.evaluation.metrics import named_metrics
from pdiff_ray.generators.interface import NUM_RUNGS
from pdiff_ray.stages import generator, report, zoo
from pdiff_ray.stages.checks import checked_subset
from pdiff_ray.stages.context import Context
from pdiff_ray.stages.judging import base_judge
from pdiff_ray.stages.table import Claim, artifacts_of, build_missing, unclaimed
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.files import Storage

OnChange = Callable[["Trial"], None]
RESULTS = ("evaluation", "report")  # stages whose artifacts are what comes of an experiment
FINAL_RUNG = NUM_RUNGS + 1  # the evaluation, after the rungs of the generator


@dataclass(frozen=True)
class Trial:
    """One trial of a sweep: the values that it tries, and what is known about it.

    Attributes:
        number: its position in the sweep, from 0.
        assignment: the value of each parameter that applies.
        repeats: what is added to the seeds; the trial has one experiment for each of these numbers.
        state: "running" until the trial has ended, and also after an interruption. The next launch tries the failed
            trials of a grid again.
        objective: the sweep's metric, as the mean over the repeats.
        curve: pairs of a rung and the objective that the unfinished generator had there, if a scheduler asked for them.
        reason: why the trial failed.
        crashed: whether each of its attempts was lost with its process, node or storage, or met damage. The next launch
            tries it again; until then a search takes its values for the cause, which they may be.
        seconds: how long the trial ran.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")  # where it is read from a file
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
        """The trial's values in a few words."""
        seed = f", seed +{self.repeats[0]}" if len(self.repeats) == 1 and self.repeats[0] else ""
        return describe(self.assignment) + seed


@dataclass(frozen=True)
class Setting:
    """The values that some trials have in common; each trial is of other seeds, or a search's of all."""

    trials: tuple[Trial, ...]

    @property
    def objective(self) -> float:
        """The mean over seeds."""
        return float(np.mean([trial.objective for trial in self.trials]))

    @property
    def text(self) -> str:
        """What the setting is called in a few words."""
        first, *others = self.trials
        if not others:
            return f"trial {first.number}"
        return f"{describe(first.assignment)}, mean of {len(self.trials)} seeds"


def best_setting(trials: Iterable[Trial], maximize: bool) -> Setting | None:
    """Returns the setting with the best objective, over the seeds for which all settings have one.

    A setting of which a trial failed or was stopped is left out. None if no seed is left.
    """
    found: dict[str, dict[tuple[int, ...], Trial]] = {}
    for trial in trials:
        if trial.state != "running":
            found.setdefault(repr(trial.assignment), {}).setdefault(trial.repeats, trial)
    whole = [same for same in found.values() if all(t.state == "finished" for t in same.values())]
    seeds = sorted(set.intersection(*map(set, whole))) if whole else []
    settings = [Setting(tuple(same[repeats] for repeats in seeds)) for same in whole] if seeds else []
    return max(settings, key=lambda setting: (1 if maximize else -1) * setting.objective, default=None)


def run_trial(
    experiments: list[Experiment],
    storage: Storage,
    context: Context,
    metric: str,
    claim: Claim = unclaimed,
    report_rung: Callable[[int, float], None] | None = None,
) -> float:
    """Builds the missing artifacts of a trial's experiments and returns the trial's objective.

    Args:
        experiments: one for each repeat of the trial.
        metric: the name of the objective, one of `OBJECTIVES`.
        claim: gives a context in which no other trial builds an artifact, and which yields whether to build it here.
        report_rung: called with each rung and the objective that the unfinished generator has there; it may raise an
            exception to stop the trial. It is used only if there is one experiment.

    Returns:
        The mean of the objective over the experiments.

    Raises:
        PdiffError: the objective is not finite, at a rung or at the end, or something else that the user can mend.
    """
    objectives = []
    for experiment in experiments:
        artifacts = artifacts_of(experiment, storage)
        if not artifacts["base"].exists():  # of a network that the search has chosen
            checked_subset(experiment)
        for stage in () if has_results(artifacts) else artifacts:
            build = None
            if stage == "generator" and report_rung and len(experiments) == 1:
                preview = _preview(experiment, artifacts, context, metric, report_rung)
                build = functools.partial(generator.build, preview=preview)
            build_missing(stage, experiment, artifacts, context, claim, build)
        objectives.append(objective(artifacts, metric))
    return _finite(metric, float(np.mean(objectives)))


def _finite(metric: str, value: float, where: str = "") -> float:
    """Returns an objective as schedulers, searches and MLflow can compare it.

    Raises:
        PdiffError: it is infinite or not a number, which fails the trial wherever it is found.
    """
    if not math.isfinite(value):
        raise PdiffError(f"{metric} is {value}{where}: the logits of a generated network are not finite")
    return value


def has_results(artifacts: Mapping[str, Artifact]) -> bool:
    """Tells whether an experiment has been evaluated and reported."""
    return all(artifacts[stage].exists() for stage in RESULTS)


def objective(artifacts: Mapping[str, Artifact], metric: str) -> float:
    """Returns the value of a metric, named as in `OBJECTIVES`, from a finished evaluation; NaN if it is no number."""
    return named_metrics(report.load_summary(artifacts)).get(metric, math.nan)


def _preview(
    experiment: Experiment,
    artifacts: Mapping[str, Artifact],
    context: Context,
    metric: str,
    report_rung: Callable[[int, float], None],
) -> Callable[[int, Tensor], None]:
    """Returns a function that measures the metric on vectors (n, D) from an unfinished generator, and reports it."""
    quantity = metric.partition("/mean_")[2]  # such as train_accuracy
    split = "selection" if quantity.startswith("train") else "validation"
    judge = base_judge(experiment, artifacts, zoo.zoo_subset(experiment, artifacts), context)

    def preview(rung: int, vectors: Tensor) -> None:
        values = [getattr(judgement, quantity) for judgement in judge.judge(vectors, [split])]
        report_rung(rung, _finite(metric, float(np.mean(values)), f" at rung {rung}"))

    return preview
