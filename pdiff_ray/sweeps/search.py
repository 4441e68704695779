"""Trials, and what random and Optuna searches try next from what is known of those so far.

Suggestion n is determined by the sweep's seed, n and the results that are there, and by nothing else: a search has no
state that could be lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pdiff_ray.common.seeds import derive_seed
from pdiff_ray.config.sweep import Assignment, Label, Parameter, Sweep
from pdiff_ray.sweeps.trial import Trial

if TYPE_CHECKING:
    import optuna


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
