"""Plans a sweep and runs the trials that are left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rich.text import Text

from pdiff_ray.common.errors import PdiffError
from pdiff_ray.common.progress import console
from pdiff_ray.running import experiment as pipeline
from pdiff_ray.running.progress import SweepDisplay, sweep_display
from pdiff_ray.sweeps.ledger import Ledger, Needs, needs
from pdiff_ray.sweeps.trial import Trial, run_trial

OnChange = Callable[[Trial], None]


def check(ledger: Ledger) -> None:
    """Everything that can be found wrong before work starts, once for each distinct data set, network and subset.

    Raises:
        PdiffError
    """
    seen: set[str] = set()
    # What a search will try is not known, and what it has begun to try may be what cannot be built.
    for trial in (ledger.planned() if ledger.sweep.search == "grid" else []) or [Trial(-1, {}, (0,))]:
        for experiment in ledger.experiments(trial):
            # What decides whether it can be built; the seeds do not.
            zoo = experiment.zoo.model_dump(include={"subset", "batchnorm", "imported", "members"})
            same = repr((experiment.data, experiment.network, zoo, experiment.generator.autoencoder))
            if same not in seen:
                seen.add(same)
                pipeline.check(pipeline.make_plan(experiment))


def run(ledger: Ledger, *, in_process: bool = False, on_result: OnChange = lambda trial: None) -> None:
    """Runs what is left, on Ray or, for debugging, in this process.

    Args:
        on_result: is given every trial that has ended.
    """
    if not ledger.open_trials() and len(ledger.done()) == ledger.total:
        return
    check(ledger)
    with sweep_display(ledger.total, ledger.sweep.metric, ledger.sweep.maximize, ledger.done()) as shown:

        def on_change(trial: Trial) -> None:
            shown.change(trial)
            if trial.state != "running":
                on_result(trial)

        (_run_here if in_process else _run_on_ray)(ledger, needs(ledger), shown, on_change)


def _run_here(ledger: Ledger, _: Needs, shown: SweepDisplay, on_change: OnChange) -> None:
    import torch

    torch.set_num_threads(ledger.file.experiment.resources.cpus_per_trial)
    started = time.monotonic()
    budget = ledger.sweep.time_budget
    while (budget is None or time.monotonic() - started < budget) and (trial := ledger.ask()):
        on_change(trial)
        context = pipeline.here(shown.of(trial.number))
        began = time.monotonic()
        outcome: dict[str, Any]
        try:
            objective = run_trial(ledger.experiments(trial), ledger.storage, context, ledger.sweep.metric)
            outcome = {"state": "finished", "objective": objective}
        except PdiffError as error:
            outcome = {"state": "failed", "reason": str(error)}
        ended = replace(trial, seconds=round(time.monotonic() - began, 3), **outcome)
        ledger.record(ended)
        on_change(ended)


def _run_on_ray(ledger: Ledger, needed: Needs, shown: SweepDisplay, on_change: OnChange) -> None:
    from pdiff_ray import distributed

    started, resources = time.monotonic(), ledger.file.experiment.resources
    shown("Ray", 0, 1, "starting")
    distributed.prepare(resources)
    from pdiff_ray.distributed import session

    with session.connect(resources, shown) as events:
        shown("Ray", 1, 1, "running")
        unbuildable: dict[str, str] = {}
        if needed.jobs:
            from pdiff_ray.distributed.train import Job, train

            jobs = [Job(experiment, ledger.artifacts(experiment), stages) for experiment, stages in needed.jobs]
            unbuildable = train(jobs, events)
            shown.clear()
            if unbuildable and ledger.sweep.search != "grid":  # all trials need it
                raise PdiffError(next(iter(unbuildable.values())))
        from pdiff_ray.distributed import tune

        tune.run(ledger, events, unbuildable, on_change, time.monotonic() - started)


def print_failures(ledger: Ledger) -> int:
    """Prints the reasons of failed trials; gives their number."""
    failed = [trial for trial in ledger.done() if trial.state == "failed"]
    for trial in failed:
        console.print("[bold red]failed[/]:", Text(f"trial {trial.number} ({trial.text}): {trial.reason}"))
    return len(failed)
