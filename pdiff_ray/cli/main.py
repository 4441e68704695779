"""The command line: parse, plan, run. Heavy imports wait until a command needs them."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from pdiff_ray import __version__
from pdiff_ray.common.errors import ConfigError, PdiffError

if TYPE_CHECKING:
    from pdiff_ray.config.schema import Experiment
    from pdiff_ray.config.sweep import SweepFile
    from pdiff_ray.running.experiment import Plan

STAGE_NAMES = ("base", "zoo", "generator", "samples", "evaluation", "report")
INTERRUPTED = 130
PLANNED = "planned"  # what a command returns that has printed a plan


def guarded(command: click.Command, arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits; what a user can mend is printed as one message, without a traceback.

    Args:
        arguments: default: those of the process, which is this command's own.
    """
    # Libraries make millions of objects that stay; with the usual threshold (700) they are searched for cycles
    # over and over.
    gc.set_threshold(10_000)
    try:
        result = command(arguments, standalone_mode=False)
        if result == PLANNED and arguments is None:
            sys.stdout.flush()
            os._exit(0)  # nothing was started; to free what libraries have made, object by object, takes a second
        sys.exit()
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
    sys.path.insert(0, "")  # as with `python -m`: a network of one's own may lie in the current folder
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
        click.option("--preset", metavar="NAME", help="Lay one of the file's presets over it, for example small."),
        click.option("--storage", metavar="URI", help="Folder or URI of results (field storage)."),
        click.option("--tracking-uri", metavar="URI", help="MLflow (field tracking.uri)."),
        click.option("--address", metavar="ADDRESS", help="Ray cluster (field resources.address)."),
    )[::-1]:
        function = decorate(function)
    return function


in_process_option = click.option(
    "--in-process", is_flag=True, help="Run without Ray, in this process, which is then the only worker; to debug."
)


def load_experiment(file: str, **options: Any) -> Experiment:
    """The experiment of a file; of a sweep's, what it varies is as the file has it."""
    from pdiff_ray.config import loading

    return loading.load(file, _overrides(**options), options["preset"])


def _overrides(
    overrides: tuple[str, ...],
    storage: str | None,
    tracking_uri: str | None,
    address: str | None,
    in_process: bool = False,
    **_: Any,
) -> list[str]:
    # A base is named after the number of workers that train it.
    workers = 1 if in_process else None
    given = {
        "storage": storage,
        "tracking.uri": tracking_uri,
        "resources.address": address,
        "resources.workers": workers,
    }
    return [*overrides, *(f"{path}={value}" for path, value in given.items() if value)]


@cli.command()
@experiment_options
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@in_process_option
def sweep(file: str, dry_run: bool, in_process: bool, **options: Any) -> str | None:
    """Run the experiment of FILE, or all trials of its sweep, from data to report; what is there is used again."""
    from pdiff_ray.config import sweep as space

    loaded = space.load(file, _overrides(**options, in_process=in_process), options["preset"])
    if isinstance(loaded, space.SweepFile):
        _sweep_trials(loaded, dry_run, in_process)
    else:
        _sweep_one(loaded, dry_run, in_process)
    return PLANNED if dry_run else None


def _sweep_one(experiment: Experiment, dry_run: bool, in_process: bool) -> None:
    from pdiff_ray.cli import printing
    from pdiff_ray.running import experiment as pipeline

    plan = pipeline.make_plan(experiment)
    if dry_run:
        printing.print_plan(plan)
        return
    printing.print_start(plan)
    pipeline.run(plan, in_process=in_process)
    _track(plan)
    printing.print_result(plan)


def _sweep_trials(file: SweepFile, dry_run: bool, in_process: bool) -> None:
    from pdiff_ray.sweeps.ledger import Ledger

    ledger = Ledger(file)
    if dry_run:
        from pdiff_ray.sweeps import plan as sweep_plan

        sweep_plan.show(ledger)
        return
    from pdiff_ray import tracking
    from pdiff_ray.cli import printing
    from pdiff_ray.running import sweep as sweeping

    with tracking.follow(ledger) as tell:
        sweeping.run(ledger, in_process=in_process, on_result=tell)
        if confirmation := ledger.confirmation():
            from pdiff_ray.sweeps import report as sweep_report

            with tracking.follow(confirmation) as tell_too:
                sweeping.run(confirmation, in_process=in_process, on_result=tell_too)
                sweep_report.write(confirmation)
        printing.print_sweep(ledger)  # MLflow takes what that writes
    if sweeping.print_failures(ledger) + (sweeping.print_failures(confirmation) if confirmation else 0):
        raise PdiffError("trials failed" + ("; the same command tries them again" if ledger.open_trials() else ""))


@cli.command()
@click.argument("stage", type=click.Choice(STAGE_NAMES))
@experiment_options
@in_process_option
def run(stage: str, file: str, in_process: bool, **options: Any) -> None:
    """Build one STAGE of the experiment of FILE and what it needs; of a sweep's, with what varies as FILE has it."""
    from pdiff_ray.cli import printing
    from pdiff_ray.running import experiment as pipeline

    plan = pipeline.make_plan(load_experiment(file, in_process=in_process, **options), target=stage)
    printing.print_start(plan)
    pipeline.run(plan, in_process=in_process)
    click.echo(f"{stage}: {plan.artifacts[stage].location}")


def _track(plan: Plan) -> None:
    from pdiff_ray import tracking

    try:
        tracking.record(plan.experiment, plan.artifacts)
    except tracking.TrackingError as error:
        tracking.warn(error)


storage_option = click.option(
    "--storage",
    "storage_uri",
    envvar="PDIFF_STORAGE",
    default="pdiff-storage",
    show_default=True,
    help="Folder or URI.",
)


@cli.group()
def artifacts() -> None:
    """What storage holds: list, show, verify."""


@artifacts.command("list")
@storage_option
def list_artifacts(storage_uri: str) -> None:
    """List finished artifacts, oldest first."""
    from rich import box
    from rich.table import Table

    from pdiff_ray.common.progress import console
    from pdiff_ray.storage.artifacts import finished, read_manifest
    from pdiff_ray.storage.files import Storage

    storage = Storage(storage_uri)
    manifests = [read_manifest(storage, folder) for folder in finished(storage)]
    if not manifests:
        console.print(f"nothing finished in {storage.place}")
        return
    table = Table("stage", "key", "made", "seconds", "about", box=box.SIMPLE_HEAD, pad_edge=False)
    for m in sorted(manifests, key=lambda m: m["created_at"]):
        table.add_row(m["stage"], m["key"], m["created_at"], f"{m['seconds']:.1f}", _about(m["info"]))
    console.print(table)


def _about(info: dict[str, Any]) -> str:
    shown = {k: v for k, v in info.items() if isinstance(v, int | float | str) and not isinstance(v, bool)}
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in list(shown.items())[:4])


@artifacts.command("show")
@click.argument("key")
@storage_option
def show_artifact(key: str, storage_uri: str) -> None:
    """Show the manifest of the artifact whose key starts with KEY, and what it was made from."""
    import json

    from pdiff_ray.stages.checkpoints import lineage
    from pdiff_ray.storage.artifacts import find
    from pdiff_ray.storage.files import Storage

    storage = Storage(storage_uri)
    folder, manifest = find(storage, key)
    manifest["files"] = {name: entry["sha256"][:12] for name, entry in manifest["files"].items()}
    click.echo(json.dumps(manifest, indent=2))
    click.echo("made from: " + " <- ".join(f"{f}{'' if m else ' (gone)'}" for f, m in lineage(storage, folder)))


@artifacts.command("verify")
@click.argument("keys", nargs=-1)
@storage_option
def verify_artifacts(keys: tuple[str, ...], storage_uri: str) -> None:
    """Compare every file of the artifacts KEYS (default: all) with its digest."""
    from pdiff_ray.common.errors import StorageError
    from pdiff_ray.storage.artifacts import find, finished, verify
    from pdiff_ray.storage.files import Storage

    storage = Storage(storage_uri)
    folders = [find(storage, key)[0] for key in keys] or finished(storage)
    problems = []
    for folder in folders:
        found = verify(storage, folder)
        problems += found
        click.echo(f"{folder}: {'whole' if not found else f'{len(found)} damaged'}")
    if problems:
        raise StorageError("\n".join(problems))


@cli.command("import")
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@experiment_options
@click.option(
    "--base", type=click.Path(exists=True, dir_okay=False), help="Whole network, if FOLDER holds subsets alone."
)
def import_command(folder: str, file: str, base: str | None, **options: Any) -> None:
    """Make the zoo of FILE (which names it in zoo.imported) from the checkpoints in FOLDER: .pth, .pt or .safetensors.

    Weights only: files that would run code when loaded are refused.
    """
    from pathlib import Path

    from pdiff_ray.common.progress import display
    from pdiff_ray.running import experiment as pipeline
    from pdiff_ray.stages.checkpoints import import_zoo

    plan = pipeline.make_plan(load_experiment(file, **options), target="zoo")
    if not plan.missing:
        click.echo(f"zoo: there already, {plan.artifacts['zoo'].location}")
        return
    plan.storage.check_writable()
    with display() as progress:
        import_zoo(Path(folder), plan.experiment, plan.artifacts, Path(base) if base else None, progress)
    click.echo(f"zoo: {plan.artifacts['zoo'].location}")


@cli.command("export")
@click.argument("key")
@click.argument("folder", type=click.Path(file_okay=False))
@click.option("--ids", help="Comma-separated ids; default: all.")
@click.option("--subset-only", is_flag=True, help="The generated tensors alone, for load_state_dict(strict=False).")
@storage_option
def export_command(key: str, folder: str, ids: str | None, subset_only: bool, storage_uri: str) -> None:
    """Write the networks of a zoo or of samples (KEY) into FOLDER as safetensors state dicts."""
    from pathlib import Path

    from pdiff_ray.stages.checkpoints import export
    from pdiff_ray.storage.files import Storage

    try:
        chosen = None if ids is None else [int(part) for part in ids.split(",")]
    except ValueError:
        raise ConfigError(f"--ids: {ids!r} is not a comma-separated list of numbers") from None
    count = sum(1 for _ in export(Storage(storage_uri), key, Path(folder), chosen, subset_only))
    click.echo(f"{count} networks in {folder}")


@cli.command("log")
@experiment_options
def log_command(file: str, **options: Any) -> None:
    """Write to MLflow what it lacks of the results of FILE, for example of a server that was away."""
    from pdiff_ray import tracking
    from pdiff_ray.config import sweep as space
    from pdiff_ray.running import experiment as pipeline
    from pdiff_ray.sweeps.ledger import Ledger

    loaded = space.load(file, _overrides(**options), options["preset"])
    if isinstance(loaded, space.SweepFile):
        ledger = Ledger(loaded)
        if not ledger.done():
            raise PdiffError(f"no trial has ended yet in {ledger.storage.location(ledger.folder)}")
        written = tracking.log(ledger)
        if (confirmation := ledger.confirmation()) and confirmation.done():
            tracking.log(confirmation)
        click.echo(f"{written} of {len(ledger.done())} trials written; the others were there")
        return
    plan = pipeline.make_plan(loaded)
    if plan.missing:
        raise PdiffError(f"not finished: {', '.join(plan.missing)} missing in {plan.storage.place}")
    written = tracking.record(plan.experiment, plan.artifacts, anew=True)
    click.echo("written" if written else "was there already")


@cli.command()
@click.option("--storage", "storage_uri", envvar="PDIFF_STORAGE", help="Folder whose SQLite file is shown.")
@click.option("--tracking-uri", help="MLflow database, if it is elsewhere.")
@click.option("--port", default=5000, show_default=True, help="On the loopback interface.")
def ui(storage_uri: str | None, tracking_uri: str | None, port: int) -> None:
    """Open MLflow's pages on the recorded runs; prints links to them."""
    from pathlib import Path

    from pdiff_ray import tracking
    from pdiff_ray.config.schema import Experiment, Tracking
    from pdiff_ray.storage.files import Storage

    experiment = Experiment(name="ui", storage=storage_uri, tracking=Tracking(uri=tracking_uri))
    uri = tracking.tracking_uri(experiment, Storage(experiment.storage_uri))
    remote = uri.startswith(("http://", "https://"))
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise ConfigError(
            f"{uri.removeprefix('sqlite:///')}: nothing is recorded yet; run `pdiff sweep FILE`, or name --storage"
        )
    tracking.reachable(uri)
    for links in tracking.links(uri, uri.rstrip("/") if remote else f"http://127.0.0.1:{port}"):
        click.echo(links.experiment)
        for name, address in links.pages.items():
            click.echo(f"  {name:8} {address}")
    if not remote:
        click.echo("serving until Ctrl-C")
        tracking.serve(uri, port)


@cli.command()
@click.argument("file", type=click.Path(), required=False)
@click.option("--storage", "storage_uri", help="Folder or URI of results.")
def doctor(file: str | None, storage_uri: str | None) -> None:
    """Check what an experiment (FILE, or the defaults) needs: versions, devices, storage, data, Ray, MLflow."""
    from pdiff_ray.cli.doctor import examine
    from pdiff_ray.config import loading
    from pdiff_ray.config import schema as config

    overrides = [f"storage={storage_uri}"] if storage_uri else []
    experiment = loading.load(file, overrides) if file else config.Experiment(name="doctor", storage=storage_uri)
    failed = 0
    for finding in examine(experiment):
        failed += not finding.ok
        click.echo(f"{'ok     ' if finding.ok else 'MISSING'} {finding.what}: {finding.text}")
    if failed:
        raise PdiffError(f"{failed} of these need attention")
