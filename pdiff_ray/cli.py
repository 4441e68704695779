"""The command line: parse, plan, run. Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from pdiff_ray import __version__
from pdiff_ray.errors import ConfigError, PdiffError

if TYPE_CHECKING:
    from pdiff_ray.config import Experiment
    from pdiff_ray.pipeline import Plan

STAGE_NAMES = ("base", "zoo", "generator", "samples", "evaluation", "report")
INTERRUPTED = 130


def guarded(command: click.Command) -> None:
    """Runs a command; what a user can mend is printed as one message, without a traceback."""
    try:
        sys.exit(command(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except PdiffError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; the same command goes on from here", err=True)
        sys.exit(INTERRUPTED)


def main() -> None:
    """The console command `pdiff`."""
    guarded(cli)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="pdiff")
def cli() -> None:
    """Neural network diffusion: zoos of networks, generators of weights, and their evaluation, on Ray."""


def experiment_options(function: Any) -> Any:
    """The options of every command that reads an experiment file."""
    for decorate in (
        click.argument("file", type=click.Path()),
        click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Override a field; repeatable."),
        click.option("--storage", metavar="URI", help="Folder or URI of results (field storage)."),
        click.option("--tracking-uri", metavar="URI", help="MLflow (field tracking.uri)."),
        click.option("--address", metavar="ADDRESS", help="Ray cluster (field resources.address)."),
    )[::-1]:
        function = decorate(function)
    return function


in_process_option = click.option("--in-process", is_flag=True, help="Run without Ray, in this process; to debug.")


def load_experiment(
    file: str, overrides: tuple[str, ...], storage: str | None, tracking_uri: str | None, address: str | None
) -> Experiment:
    from pdiff_ray import config

    given = {"storage": storage, "tracking.uri": tracking_uri, "resources.address": address}
    return config.load(file, [*overrides, *(f"{path}={value}" for path, value in given.items() if value)])


@cli.command()
@experiment_options
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@in_process_option
def sweep(
    file: str,
    overrides: tuple[str, ...],
    storage: str | None,
    tracking_uri: str | None,
    address: str | None,
    dry_run: bool,
    in_process: bool,
) -> None:
    """Run the experiment of FILE from data to report; what is there already is used again."""
    from pdiff_ray import pipeline

    experiment = load_experiment(file, overrides, storage, tracking_uri, address)
    plan = pipeline.make_plan(experiment)
    if dry_run:
        print_plan(plan)
        return
    _start(plan)
    pipeline.run(plan, in_process=in_process)
    _track(plan)
    _print_result(plan)


@cli.command()
@click.argument("stage", type=click.Choice(STAGE_NAMES))
@experiment_options
@in_process_option
def run(
    stage: str,
    file: str,
    overrides: tuple[str, ...],
    storage: str | None,
    tracking_uri: str | None,
    address: str | None,
    in_process: bool,
) -> None:
    """Build one STAGE of the experiment of FILE, and what it needs: base, zoo, generator, samples, evaluation, report."""
    from pdiff_ray import pipeline

    plan = pipeline.make_plan(load_experiment(file, overrides, storage, tracking_uri, address), target=stage)
    _start(plan)
    pipeline.run(plan, in_process=in_process)
    click.echo(f"{stage}: {plan.artifacts[stage].location}")


def _start(plan: Plan) -> None:
    from pdiff_ray.console import console

    e = plan.experiment
    todo = ", ".join(plan.missing) or "nothing, all of it is there"
    console.print(f"[bold]{e.name}[/]: {e.network.name} on {e.data.name}; to build: {todo}")
    console.print(f"  storage {plan.storage.uri.split('?')[0]}")


def print_plan(plan: Plan) -> None:
    from rich.table import Table

    from pdiff_ray import pipeline
    from pdiff_ray.console import console

    table = Table("stage", "key", "state", "what", title=f"plan of {plan.experiment.name}", title_justify="left")
    for row in pipeline.describe(plan):
        table.add_row(*row)
    console.print(table)
    r = plan.experiment.resources
    console.print(
        f"storage {plan.storage.uri.split('?')[0]}\n"
        f"Ray {r.address or os.environ.get('RAY_ADDRESS') or 'local'}: {r.workers} workers x {r.cpus_per_worker} cores, "
        f"{r.actors} actors x {r.cpus_per_actor} cores; GPUs per worker {r.gpus_per_worker}, per actor {r.gpus_per_actor}"
    )
    for note in pipeline.notes(plan):
        console.print(f"[bold yellow]missing:[/] {note}")


def _track(plan: Plan) -> None:
    from pdiff_ray import tracking
    from pdiff_ray.console import console

    try:
        tracking.record(plan.experiment, plan.artifacts)
    except tracking.TrackingError as error:
        console.print(f"[bold yellow]warning:[/] {error}\n  results are safe in storage; the same command logs them later")


def _print_result(plan: Plan) -> None:
    from rich import box
    from rich.table import Table

    from pdiff_ray import report
    from pdiff_ray.console import console

    artifacts = plan.artifacts
    summary = report.load_summary(artifacts)
    head, *rows = report.table_rows(summary)
    console.print(f"\n[bold]{plan.experiment.name}[/]: original / ensemble / p-diff [bold]{report.paper_row(summary)}[/]")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in head:
        table.add_column(column, justify="left" if column == "group" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(report.LEGEND, style="dim")
    console.print(f"verdict: {summary['verdict']['text']}")
    seconds = report.stage_seconds(artifacts)
    console.print("seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items()))
    console.print(f"\nreport     {report.report_location(artifacts)}")
    console.print(f"networks   {artifacts['samples'].location}  (pdiff export {artifacts['samples'].key} FOLDER)")
    storage = f" --storage {plan.experiment.storage}" if plan.experiment.storage else ""
    console.print(f"MLflow     pdiff ui{storage}")
