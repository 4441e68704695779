"""What commands print of an experiment or a sweep: its plan, its results, and where they are.

What takes seconds to import waits until it is needed: the first line comes before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from pdiff_ray import distributed
from pdiff_ray.common.progress import console
from pdiff_ray.running import experiment as pipeline
from pdiff_ray.storage.files import Storage

if TYPE_CHECKING:
    from pdiff_ray.config.schema import Experiment
    from pdiff_ray.sweeps.ledger import Ledger

MAX_TRIALS = 15  # of a search


def print_start(plan: pipeline.Plan) -> None:
    e = plan.experiment
    todo = ", ".join(plan.missing) or "nothing, all of it is there"
    console.print(f"[bold]{e.name}[/]: {e.network.name} on {e.data.name}; to build: {todo}")
    console.print(f"  storage {plan.storage.place}")


def print_plan(plan: pipeline.Plan) -> None:
    from pdiff_ray.estimates.estimate import Estimator, Place, duration

    e, estimator = plan.experiment, Estimator(plan.storage)
    table = Table(title=f"plan of {e.name}", title_justify="left")
    for column in ("stage", "key", "state", "what", "time", "memory"):
        table.add_column(column, justify="right" if column in ("time", "memory") else "left")
    for row in pipeline.describe(plan, estimator):
        table.add_row(*row)
    console.print(table)
    if plan.missing:
        costs = pipeline.costs(plan, estimator).values()
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
    for note in pipeline.notes(plan):
        console.print(f"[bold yellow]missing:[/] {note}")


def _sum(seconds: Iterable[float | None]) -> float | None:
    """None, if one of them is unknown."""
    known = list(seconds)
    return None if None in known else sum(s for s in known if s is not None)


def print_result(plan: pipeline.Plan) -> None:
    from pdiff_ray.stages import report

    artifacts = plan.artifacts
    summary = report.load_summary(artifacts)
    head, *rows = report.table_rows(summary)
    console.print(
        f"\n[bold]{plan.experiment.name}[/]: original / ensemble / p-diff [bold]{report.paper_row(summary)}[/]"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in head:
        table.add_column(column, justify="left" if column == "group" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(report.LEGEND, style="dim")
    console.print(f"verdict: {summary['verdict']['text']}")
    if sharing := report.achieved_sharing(artifacts):
        console.print(f"shared: {sharing}", markup=False)
    seconds = report.stage_seconds(artifacts)
    console.print("seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items()))
    console.print(f"\nreport     {report.report_location(artifacts)}")
    samples = artifacts["samples"]
    console.print(f"networks   {samples.location}  (uv run pdiff export {samples.key} FOLDER)")
    _print_ui(plan.experiment)


def print_sweep(ledger: Ledger) -> None:
    """Writes a sweep's report, and prints its table and where it is."""
    from pdiff_ray.sweeps import report as sweep_report
    from pdiff_ray.sweeps import table as sweep_table

    rows = sweep_report.write(ledger)
    shown = rows if ledger.sweep.search == "grid" else rows[:MAX_TRIALS]
    head, *body = sweep_table.cells(ledger, shown, console.width)
    console.print(f"\n[bold]{ledger.file.experiment.name}[/]: {sweep_report.headline(ledger)}\n")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for index, column in enumerate(head):
        table.add_column(Text(sweep_table.broken(column)), justify="right" if index else "left", overflow="fold")
    for row in body:
        table.add_row(*map(Text, row))
    console.print(table)
    if len(shown) < len(rows):
        console.print(f"{len(rows) - len(shown)} more trials in the report")
    console.print(f"\n{sweep_table.legend(ledger)}", style="dim")
    if verdict := sweep_report.verdict(ledger):
        console.print(f"verdict: {verdict}", markup=False)
    if warning := sweep_report.warning(rows):
        console.print("[bold red]WARNING[/]:", Text(warning))
    place = ledger.storage.location(ledger.folder)
    console.print(f"\nreport     {place}/{sweep_report.REPORT_FILE}")
    console.print(f"tables     {place}/{sweep_report.SUMMARY_FILE}, {sweep_report.TRIALS_FILE}")
    _print_ui(ledger.file.experiment)


def _print_ui(experiment: Experiment) -> None:
    storage = f" --storage {Storage(experiment.storage_uri).place}" if experiment.storage else ""
    console.print(f"MLflow     uv run pdiff ui{storage}")
