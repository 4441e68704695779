"""The choice of what random and Optuna searches try next, given the trials so far.

The values of trial n are determined by the sweep's seed, n and the results so far, and by nothing else: a search has no
state that could be lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pdiff_ray.common.seeds import derive_seed
from pdiff_ray.config.sweep import Assignment, Parameter, Sweep, Value
from pdiff_ray.sweeps.trial import Trial

if TYPE_CHECKING:
    import optuna


def suggest(sweep: Sweep, number: int, done: Sequence[Trial]) -> Assignment:
    """Returns the values that trial `number` is to try.

    Args:
        done: the trials that have ended, from which Optuna's TPE learns.
    """
    import optuna

    seed = derive_seed(sweep.seed, "search", number) % 2**32
    study = study_of(sweep, done)
    samplers = optuna.samplers
    study.sampler = samplers.RandomSampler(seed) if sweep.search == "random" else samplers.TPESampler(seed=seed)
    trial = study.ask()
    assignment: Assignment = {}
    for name, parameter in sweep.parameters.items():
        if sweep.applies(parameter, assignment):
            assignment[name] = _draw(trial, name, parameter)
    return assignment


def _draw(trial: optuna.trial.BaseTrial, name: str, parameter: Parameter) -> Value:
    """Returns the value that an Optuna trial has or chooses for a parameter."""
    if parameter.integers:
        return trial.suggest_int(name, *parameter.integers)
    if parameter.range:
        return trial.suggest_float(name, *parameter.range, log=parameter.loguniform is not None)
    return trial.suggest_categorical(name, parameter.values)


def study_of(sweep: Sweep, done: Sequence[Trial]) -> optuna.Study:
    """Returns an Optuna study in memory that holds the trials `done`.

    Those that ASHA stopped or that failed count as pruned. As failed ones TPE would leave them out of both its
    densities, and then suggest little but values that fail.
    """
    import optuna
    from optuna.trial import FixedTrial, TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize" if sweep.maximize else "minimize")
    for trial in done:
        fixed = FixedTrial(dict(trial.assignment))
        for name in trial.assignment:  # which tells it the distributions
            _draw(fixed, name, sweep.parameters[name])
        ended = create_trial(
            state=TrialState.COMPLETE if trial.state == "finished" else TrialState.PRUNED,
            value=trial.objective if trial.state == "finished" else None,
            params=fixed.params,
            distributions=fixed.distributions,
            # A pruned trial without any is worse than all that have some.
            intermediate_values={} if trial.state == "failed" else dict(trial.curve),
        )
        study.add_trial(ended)
    return study
