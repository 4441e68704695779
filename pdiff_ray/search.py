"""Trials, and what random and Optuna searches try next from what is known of those so far.

Suggestion n is determined by the sweep's seed, n and the results that are there, and by nothing else: a search has no
state that could be lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pdiff_ray.seeds import derive_seed
from pdiff_ray.space import Assignment, Label, Parameter, Sweep, describe

if TYPE_CHECKING:
    import optuna


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


def suggest(sweep: Sweep, number: int, done: Sequence[Trial]) -> Assignment:
    """The values of trial `number`."""
    import optuna

    seed = derive_seed(sweep.seed, "search", number) % 2**32
    study = study_of(sweep, done)
    sampler: optuna.samplers.BaseSampler = (
        optuna.samplers.RandomSampler(seed) if sweep.search == "random" else optuna.samplers.TPESampler(seed=seed)
    )
    study.sampler = sampler
    trial = study.ask()
    assignment: Assignment = {}
    for name, parameter in sweep.parameters.items():
        if sweep.applies(parameter, assignment):
            assignment[name] = _draw(trial, name, parameter)
    return assignment


def _draw(trial: optuna.Trial, name: str, parameter: Parameter) -> Label:
    if parameter.integers:
        return trial.suggest_int(name, *parameter.integers)
    if parameter.range:
        return trial.suggest_float(name, *parameter.range, log=parameter.loguniform is not None)
    return trial.suggest_categorical(name, parameter.labels)


def study_of(sweep: Sweep, done: Sequence[Trial]) -> optuna.Study:
    """The trials as an Optuna study, in memory. Those that ASHA stopped are pruned ones there."""
    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    states = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}
    study = optuna.create_study(direction="maximize" if sweep.maximize else "minimize")
    study.add_trials(
        create_trial(
            state=states[trial.state],
            value=trial.objective if trial.state == "finished" else None,
            params=dict(trial.assignment),
            distributions={name: _distribution(sweep.parameters[name]) for name in trial.assignment},
            intermediate_values=dict(trial.curve),
        )
        for trial in done
    )
    return study


def _distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.integers:
        return IntDistribution(*parameter.integers)
    if parameter.range:
        return FloatDistribution(*parameter.range, log=parameter.loguniform is not None)
    labels: list[Label] = parameter.labels
    return CategoricalDistribution(labels)
