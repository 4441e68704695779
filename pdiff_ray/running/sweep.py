"""Checks a sweep, runs the trials that are left, and opens its results."""

from __future__ import annotations

import contextlib
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pdiff_ray import distributed, tracking
from pdiff_ray.common.devices import limit_threads
from pdiff_ray.common.errors import PdiffError, StorageError, UnavailableError
from pdiff_ray.running.experiment import check_plan, here, make_plan
from pdiff_ray.running.progress import SweepDisplay, sweep_display
from pdiff_ray.sweeps import report
from pdiff_ray.sweeps.ledger import Ledger, needs
from pdiff_ray.sweeps.table import Row, table
from pdiff_ray.sweeps.trial import OnChange, Trial, run_trial


def check_sweep(ledger: Ledger) -> None:
    """Checks all that can be checked before work starts, once for each distinct data set, network, subset, code of
    the user's own and import.

    Raises:
        PdiffError: something is wrong.
    """
    sizes: dict[str, int] = {}  # of the subsets, by what decides whether an experiment can be built
    # Of a search, the file's own setting is checked: its trials are not known yet, and may well be impossible ones.
    for trial in (ledger.planned() if ledger.sweep.search == "grid" else []) or [Trial(-1, {}, (0,))]:
        for experiment in ledger.experiments(trial):
            zoo = experiment.zoo.model_dump(include={"subset", "batchnorm", "imported", "members"})
            own = experiment.evaluation.baselines, experiment.evaluation.metrics
            brought = experiment.generator if experiment.generator.name == "imported" else None
            same = repr((experiment.data, experiment.network, zoo, experiment.alignment.method, own, brought))
            if same not in sizes:
                sizes[same] = check_plan(make_plan(experiment, storage=ledger.storage))
            experiment.generator.check_dimension(sizes[same])


@dataclass(frozen=True)
class SweepResult:
    """The results of a sweep.

    Attributes:
        ledger: the trials of the sweep.
        confirmation: the trials that compare the best setting of a search with the file's own; None if there are none.
        rows: the rows of the result table, one for each combination of a grid or trial of a search.
    """

    ledger: Ledger
    confirmation: Ledger | None
    rows: list[Row]

    @property
    def failed(self) -> list[Trial]:
        """The trials that failed, with those of the confirmation last."""
        ledgers = filter(None, (self.ledger, self.confirmation))
        return [trial for ledger in ledgers for trial in ledger.done() if trial.state == "failed"]

    @property
    def verdict(self) -> str | None:
        """The answer, in words, to whether a search has found a better setting than the file's own; None for a grid."""
        return report.verdict(self.ledger)

    @property
    def report(self) -> str:
        """The location of the HTML page."""
        return self.ledger.storage.location(f"{self.ledger.folder}/{report.REPORT_FILE}")

    def table(self) -> pa.Table:
        """Returns the rows with means of all metrics over seeds, standard deviations (`_std`) and counts (`_n`)."""
        return pa.Table.from_pylist(report.summary_lines(self.ledger, self.rows))

    def to_dict(self) -> dict[str, Any]:
        """Returns the results as JSON values."""
        return {
            "name": self.ledger.file.experiment.name,
            "rows": report.summary_lines(self.ledger, self.rows),
            "verdict": self.verdict,
            "failed": [{"trial": trial.number, "values": trial.text, "reason": trial.reason} for trial in self.failed],
            "report": self.report,
        }


def run(ledger: Ledger, *, in_process: bool = False, track: bool = True) -> SweepResult:
    """Runs the trials that are left, compares a search's best setting with the file's own, and writes the report.

    Args:
        in_process: runs the trials in this process, for debugging, and not on Ray.
        track: logs everything to MLflow while the sweep goes on; if the server cannot be reached, there is a warning.

    Raises:
        PdiffError: something is wrong that the user can mend. Failed trials do not raise it; see `SweepResult.failed`.
    """

    usage = tracking.Usage(distributed.driver_name(ledger.file.experiment.resources))

    def follow(ledger: Ledger) -> AbstractContextManager[OnChange]:
        return tracking.follow(ledger, usage) if track else contextlib.nullcontext(lambda trial: None)

    started = time.monotonic()
    with usage if track and len(ledger.done()) < ledger.total else contextlib.nullcontext(), follow(ledger) as tell:
        run_trials(ledger, in_process=in_process, on_result=tell, started=started)
        if confirmation := ledger.confirmation():
            with follow(confirmation) as tell_too:
                run_trials(confirmation, in_process=in_process, on_result=tell_too, started=started)
                report.write(confirmation)
        rows = report.write(ledger)  # in the context, as MLflow takes what is written
        return SweepResult(ledger, confirmation, rows)


def open_sweep(ledger: Ledger) -> SweepResult:
    """Opens the results of a sweep so far, without running anything."""
    return SweepResult(ledger, ledger.confirmation(), table(ledger))


def run_trials(
    ledger: Ledger,
    *,
    in_process: bool = False,
    on_result: OnChange = lambda trial: None,
    started: float | None = None,
) -> None:
    """Runs the trials that are left.

    Args:
        on_result: called with every trial that has ended.
        started: when the time budget began, by `time.monotonic`; default: now.
    """
    started = time.monotonic() if started is None else started
    if not ledger.open_trials() and len(ledger.done()) == ledger.total:
        return
    if ledger.sweep.time_budget is not None and time.monotonic() - started >= ledger.sweep.time_budget:
        return
    check_sweep(ledger)
    with sweep_display(ledger) as shown:

        def on_change(trial: Trial) -> None:
            shown.change(trial)
            if trial.state != "running":
                on_result(trial)

        (_run_here if in_process else _run_on_ray)(ledger, shown, on_change, started)


def _run_here(ledger: Ledger, shown: SweepDisplay, on_change: OnChange, started: float) -> None:
    limit_threads(ledger.file.experiment.resources.cpus_per_trial)
    budget = ledger.sweep.time_budget
    while (budget is None or time.monotonic() - started < budget) and (trial := ledger.ask()):
        on_change(trial)
        context = here(shown.of(trial.number))
        began = time.monotonic()
        outcome: dict[str, Any]
        for _ in range(1 + ledger.sweep.max_retries):
            try:
                objective = run_trial(ledger.experiments(trial), ledger.storage, context, ledger.sweep.metric)
                outcome = {"state": "finished", "objective": objective}
            except PdiffError as error:
                outcome = {"state": "failed", "reason": str(error), "crashed": isinstance(error, StorageError)}
                if isinstance(error, UnavailableError):  # at the next attempt, it may be back
                    continue
            break
        ended = replace(trial, seconds=round(time.monotonic() - began, 3), **outcome)
        ledger.record(ended)
        on_change(ended)


def _run_on_ray(ledger: Ledger, shown: SweepDisplay, on_change: OnChange, started: float) -> None:
    resources, missing = ledger.file.experiment.resources, needs(ledger).jobs
    shown("Ray", 0, 1, "starting")
    distributed.prepare(resources)
    from pdiff_ray.distributed import session, train, tune

    with session.connect(resources, shown) as events:
        shown("Ray", 1, 1, "running")
        unbuildable: dict[str, str] = {}
        jobs = [train.Job(experiment, ledger.artifacts(experiment), stages) for experiment, stages in missing]
        if jobs:
            unbuildable = train.train(jobs, events)
            shown.clear()
            if unbuildable and ledger.sweep.search != "grid":  # all trials of a search need it
                raise PdiffError(next(iter(unbuildable.values())))
        tune.run(ledger, events, unbuildable, on_change, time.monotonic() - started)
