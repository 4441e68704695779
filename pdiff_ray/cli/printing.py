"""What commands print of an experiment or a sweep: its plan, its results, and where they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from pdiff_ray import distributed
from pdiff_ray.cli.options import DEFAULT_STORAGE, print_json
from pdiff_ray.common.progress import console
from pdiff_ray.reports import tables
from pdiff_ray.running import experiment as experiments
from pdiff_ray.running.experiment import Plan
from pdiff_ray.running.results import Result
from pdiff_ray.running.sweep import SweepResult
from pdiff_ray.storage.files import Storage
from pdiff_ray.sweeps import report as sweep_report
from pdiff_ray.sweeps import table as sweep_table

if TYPE_CHECKING:
    from pdiff_ray.sweeps.ledger import Ledger

MAX_TRIALS = 15  # of a search


def print_start(plan: Plan) -> None:
    """Prints what is about to be built, and where."""
    e = plan.experiment
    todo = ", ".join(plan.missing) or "nothing, all of it is there"
    console.print(f"[bold]{e.name}[/]: {e.network.name} on {e.data.name}; to build: {todo}")
    console.print(f"  storage {plan.storage.place}")


def print_plan(plan: Plan, as_json: bool = False) -> None:
    """Prints what an experiment needs, what of it is there, and what the rest will take."""
    if as_json:
        print_json(plan.to_dict())
        return
    from pdiff_ray.estimates.estimate import Estimator, Place, duration

    e, estimator = plan.experiment, Estimator(plan.storage)
    table = Table(title=f"plan of {e.name}", title_justify="left")
    for column in ("stage", "key", "state", "what", "time", "memory"):
        table.add_column(column, justify="right" if column in ("time", "memory") else "left")
    for row in experiments.describe(plan, estimator):
        table.add_row(*row)
    console.print(table)
    if plan.missing:
        costs = experiments.costs(plan, estimator).values()
        known = sum(cost.source == "earlier runs" for cost in costs)
        console.print(
            f"shared: {estimator.sharing(e, Place.of_plan(e.resources))}\n"
            f"time: {duration(_sum(cost.device_s for cost in costs))} of devices, "
            f"{duration(_sum(cost.seconds for cost in costs))} with the processes below, one stage after another\n"
            f"[dim]Times are {estimator.about}"
            + (f"; {known} stages as long as earlier runs with other seeds" if known else "")
            + "; the start of Ray is not in them. Memory is of one process.[/]"
        )
    r = e.resources
    console.print(
        f"storage {plan.storage.place}\n"
        f"Ray {distributed.ray_address(r) or 'local'}: {r.workers} workers x {r.cpus_per_worker} cores and "
        f"{r.gpus_per_worker} GPUs, {r.actors} actors x {r.cpus_per_actor} cores and {r.gpus_per_actor} GPUs"
    )
    for note in experiments.notes(plan):
        console.print(f"[bold yellow]missing:[/] {note}")


def print_sweep_plan(ledger: Ledger, as_json: bool = False) -> None:
    """Prints the trials of a sweep, what they share, what of it is there, and what the rest will take."""
    from pdiff_ray.sweeps import plan as sweep_plan

    sweep_plan.show(ledger)


def _sum(seconds: Iterable[float | None]) -> float | None:
    """None, if one of them is unknown."""
    known = list(seconds)
    return None if None in known else sum(s for s in known if s is not None)


def print_result(result: Result, as_json: bool = False) -> None:
    """Prints the table and the verdict of a finished experiment, and where everything is."""
    if as_json:
        print_json(result.to_dict())
        return
    head, *rows = tables.table_rows(result.summary)
    console.print(f"\n[bold]{result.name}[/]: original / ensemble / p-diff [bold]{tables.paper_row(result.summary)}[/]")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in head:
        table.add_column(column, justify="left" if column == "group" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(tables.LEGEND, style="dim")
    console.print(f"verdict: {result.verdict}", markup=False)
    if sharing := result.sharing:
        console.print(f"shared: {sharing}", markup=False)
    console.print("seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in result.seconds.items()))
    console.print(f"\nreport     {result.report}")
    samples = result.artifacts["samples"]
    console.print(f"networks   {samples.location}  (uv run pdiff export {samples.key} FOLDER)")
    _print_ui(samples.storage)


def print_sweep(result: SweepResult, as_json: bool = False) -> None:
    """Prints a sweep's table and verdict, which trials failed, and where everything is."""
    if as_json:
        print_json(result.to_dict())
        return
    ledger = result.ledger
    shown = result.rows if ledger.sweep.search == "grid" else result.rows[:MAX_TRIALS]
    head, *body = sweep_table.cells(ledger, shown, console.width)
    console.print(f"\n[bold]{ledger.file.experiment.name}[/]: {sweep_report.headline(ledger)}\n")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for index, column in enumerate(head):
        table.add_column(Text(sweep_table.broken(column)), justify="right" if index else "left", overflow="fold")
    for row in body:
        table.add_row(*map(Text, row))
    console.print(table)
    if len(shown) < len(result.rows):
        console.print(f"{len(result.rows) - len(shown)} more trials in the report")
    console.print(f"\n{sweep_table.legend(ledger)}", style="dim")
    if result.verdict:
        console.print(f"verdict: {result.verdict}", markup=False)
    if warning := sweep_report.warning(result.rows):
        console.print("[bold red]WARNING[/]:", Text(warning))
    place = ledger.storage.location(ledger.folder)
    console.print(f"\nreport     {result.report}")
    console.print(f"tables     {place}/{sweep_report.SUMMARY_FILE}, {sweep_report.TRIALS_FILE}")
    _print_ui(ledger.storage)
    for trial in result.failed:
        console.print("[bold red]failed[/]:", Text(f"trial {trial.number} ({trial.text}): {trial.reason}"))


def _print_ui(storage: Storage) -> None:
    option = "" if storage.place == Storage(DEFAULT_STORAGE).place else f" --storage {storage.place}"
    console.print(f"MLflow     uv run pdiff ui{option}")
