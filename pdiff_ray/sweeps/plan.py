"""What a dry run of a sweep tells: trials, what they share, what is there already, and what the rest will take."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from rich.table import Table

from pdiff_ray.common.progress import console
from pdiff_ray.config.sweep import Parameter, format_label, label
from pdiff_ray.estimates.estimate import Estimator, Place, Sharing, duration, gib
from pdiff_ray.stages.zoo import runs_of
from pdiff_ray.sweeps.ledger import Ledger, needs
from pdiff_ray.sweeps.trial import Trial

if TYPE_CHECKING:
    from pdiff_ray.config.schema import Experiment

FIRST_SHOWN, LAST_SHOWN = 30, 5  # trials, where there are more than both
SHARING_SHOWN = 12
STATES = {"running": "begun", "finished": "done", "stopped": "stopped early", "failed": "failed"}


@dataclass
class SweepPlan:
    """The plan of a sweep.

    Attributes:
        trials: those that are known, with their states.
        counts: by stage: distinct artifacts that the trials to run need, and how many of them are there.
        concurrent: trials at a time on this machine.
        first_s: seconds of devices for the bases and zoos that are built before the trials.
        trials_s: seconds of devices in trials.
        wall_s: seconds on this machine.
        memory: bytes of the largest process.
        known: stages whose seconds are those of earlier runs.
        unknown: stages on data with an unknown number of images, which are not in the seconds.
        sharing: what networks share, by network and subset; of the first data set of each.
    """

    trials: list[tuple[Trial, str]]
    counts: dict[str, tuple[int, int]]
    concurrent: int
    first_s: float = 0.0
    trials_s: float = 0.0
    wall_s: float = 0.0
    memory: float = 0.0
    known: int = 0
    unknown: int = 0
    sharing: dict[str, Sharing] = field(default_factory=dict)


def make_plan(ledger: Ledger, estimator: Estimator) -> SweepPlan:
    """The plan of what is left. What a search will try is unknown: it is counted as the file has it."""
    sweep, resources = ledger.sweep, ledger.file.experiment.resources
    todo = ledger.planned()
    new = 0 if sweep.search == "grid" else ledger.total - sum(number < ledger.total for number in ledger.trials)
    together = {trial.number: trial for trial in todo} | ledger.trials
    plan = SweepPlan(
        trials=[(trial, _state(ledger, trial)) for _, trial in sorted(together.items())],
        counts=needs(ledger).counts,
        concurrent=_concurrent(ledger, len(todo) + new),
    )
    first = ("base", "zoo") if sweep.search == "grid" or not ledger.varies_zoos else ()
    trials = [ledger.possible(trial) for trial in todo]
    if new:
        any_trial = Trial(-1, {}, tuple(range(sweep.repeats)))
        trials.append(ledger.experiments(any_trial))
        for stage in plan.counts.keys() - set(first):
            needed, there = plan.counts[stage]
            counted = sweep.repeats if first else 0  # `needs` knows of one, where all have the same zoos
            plan.counts[stage] = (needed + new * sweep.repeats - counted, there)
    zoos_s, runs, seen = 0.0, 0, set[str]()
    durations: list[float] = []
    for experiments in trials:
        own_s = 0.0
        for experiment in experiments:
            artifacts = ledger.artifacts(experiment)
            missing = [s for s, a in artifacts.items() if a.key not in seen and not a.exists()]
            seen.update(artifact.key for artifact in artifacts.values())
            name, place = _name(experiment), Place.of_trial(experiment.resources)
            if name not in plan.sharing:
                plan.sharing[name] = estimator.sharing(experiment, place)
            for stage, cost in estimator.costs(experiment, artifacts, missing, place).items():
                plan.known += cost.source == "earlier runs"
                plan.memory = max(plan.memory, cost.memory)
                if cost.seconds is None:
                    plan.unknown += 1
                elif stage not in first:
                    own_s += cost.seconds * cost.processes
                elif stage == "base":
                    plan.first_s += cost.seconds * cost.processes
                    plan.wall_s += cost.seconds
                elif cost.source != "there":
                    zoos_s += cost.seconds * cost.processes
                    runs += len(runs_of(experiment.zoo))
        durations.append(own_s)
    if new:
        durations += [durations[-1]] * (new - 1)
    plan.first_s += zoos_s
    plan.trials_s = sum(durations)
    plan.wall_s += zoos_s / max(1, min(resources.workers, runs))  # all workers share the runs of all zoos
    plan.wall_s += max([plan.trials_s / plan.concurrent, *durations])
    return plan


def show(ledger: Ledger) -> None:
    """Prints the plan."""
    estimator = Estimator(ledger.storage)
    plan, sweep, e = make_plan(ledger, estimator), ledger.sweep, ledger.file.experiment
    _show_question(ledger)
    if plan.trials:
        _show_trials(plan)
    table = Table("stage", "needed", "there", "to build", title="distinct artifacts", title_justify="left")
    for stage, (needed, there) in plan.counts.items():
        table.add_row(stage, str(needed), str(there), str(needed - there))
    console.print(table)
    if plan.sharing:
        _show_sharing(plan)
    r = e.resources
    total = plan.first_s + plan.trials_s
    console.print(
        f"time: {duration(total)} of devices (bases and zoos that are built first {duration(plan.first_s)}, trials "
        f"{duration(plan.trials_s)}); {duration(plan.wall_s)} on this machine with {r.workers} workers, then "
        f"{plan.concurrent} trials at a time of {r.cpus_per_trial} cores and {r.gpus_per_trial} GPUs\n"
        f"memory: {gib(plan.memory)} for the largest process\n"
        f"storage {ledger.storage.place}\n"
        f"[dim]Times are {estimator.about}"
        + (f"; {plan.known} stages as long as earlier runs with other seeds" if plan.known else "")
        + "; the start of Ray is not in them.[/]"
    )
    if sweep.search != "grid":
        stops = ", and ASHA will stop some of them early" if sweep.scheduler == "asha" else ""
        console.print(f"[dim]What the search will try is unknown: its trials are taken as the file has them{stops}.[/]")
        if sweep.confirm:
            console.print(
                f"[dim]Then the best setting and the file's own are run with {sweep.confirm} new seeds each.[/]"
            )
    if sweep.time_budget:
        console.print(f"time budget: {duration(sweep.time_budget)} for a launch; the same command goes on from there")
    if plan.unknown:
        console.print(
            f"[bold yellow]missing:[/] the number of images of {e.data.name} data: its stages are in no sum of times"
        )


def _show_question(ledger: Ledger) -> None:
    """What varies, and how trials are chosen."""
    sweep = ledger.sweep
    if sweep.search == "grid":
        seeds = f", {sweep.repeats} seeds each ({', '.join(sweep.seeds)})" if sweep.repeats > 1 else ""
        console.print(f"[bold]{ledger.file.experiment.name}[/]: {ledger.total} trials of a grid{seeds}")
        return
    aim = f"to {'raise' if sweep.maximize else 'lower'} {sweep.metric}"
    repeats = f" over {sweep.repeats} seeds" if sweep.repeats > 1 else ""
    console.print(
        f"[bold]{ledger.file.experiment.name}[/]: {ledger.total} trials, {aim}{repeats}; search {sweep.search}, "
        f"scheduler {sweep.scheduler}"
    )
    table = Table("parameter", "values", "if", title="space", title_justify="left")
    for name, parameter in sweep.parameters.items():
        condition = ", ".join(f"{other} is {label(values)}" for other, values in parameter.when.items())
        table.add_row(name, _values(parameter), condition)
    console.print(table)


def _values(parameter: Parameter) -> str:
    if parameter.range is None:
        return ", ".join(format_label(value) for value in parameter.labels)
    kind = "in the logarithm" if parameter.loguniform else "whole numbers" if parameter.integers else ""
    low, high = parameter.range
    return f"{low:g} to {high:g} {kind}".rstrip()


def _show_trials(plan: SweepPlan) -> None:
    table = Table("trial", "values", "state", title="trials", title_justify="left")
    rows = [(str(trial.number), trial.text, state) for trial, state in plan.trials]
    if len(rows) > FIRST_SHOWN + LAST_SHOWN:
        left_out = len(rows) - FIRST_SHOWN - LAST_SHOWN
        rows = [*rows[:FIRST_SHOWN], ("...", f"{left_out} more", ""), *rows[-LAST_SHOWN:]]
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _show_sharing(plan: SweepPlan) -> None:
    title = "computed once for all networks: part of a pass, and how many times fewer FLOPs that takes"
    table = Table("network", "shared", "evaluation", "zoo", "why", title=title, title_justify="left")
    for name, sharing in list(plan.sharing.items())[:SHARING_SHOWN]:
        table.add_row(name, *sharing.columns)
    if len(plan.sharing) > SHARING_SHOWN:
        table.add_row(f"... {len(plan.sharing) - SHARING_SHOWN} more")
    console.print(table)


def _state(ledger: Ledger, trial: Trial) -> str:
    if trial.number not in ledger.trials:
        return "to run"
    state = STATES[ledger.trials[trial.number].state]
    return f"{state}, to run again" if trial.state == "failed" and ledger.sweep.search == "grid" else state


def _name(e: Experiment) -> str:
    return f"{e.network.name}, {e.zoo.subset}"


def _concurrent(ledger: Ledger, trials: int) -> int:
    """Trials at a time on this machine."""
    resources, most = ledger.file.experiment.resources, ledger.sweep.max_concurrent
    places = (os.cpu_count() or 1) // resources.cpus_per_trial
    if gpus := torch.cuda.device_count():
        each = resources.gpus_per_trial
        if each == "auto":  # one each, or shares for as many as are asked for
            places = min(places, max(gpus, most or 1))
        elif each:
            places = min(places, int(gpus / each))
    return max(1, min(places, trials, most or trials))
