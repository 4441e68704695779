"""Commands that take an experiment file: init, sweep, reproduce, run, import, log, doctor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from pdiff_ray.cli.options import (
    DEFAULT_STORAGE,
    Stage,
    complete_cell,
    experiment_options,
    in_process_option,
    json_option,
    load,
    load_experiment,
    override_options,
    overrides_of,
    print_json,
    standard_output_for,
)
from pdiff_ray.common.errors import ConfigError, PdiffError


@click.command()
@click.argument("data")
@click.argument("network")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write; default: NETWORK.yaml.")
def init(data: str, network: str, output: Path | None) -> None:
    """Write a commented experiment for DATA, a folder of images or a data set's name, and NETWORK, a network's name."""
    from pdiff_ray.cli.init import write

    file = write(data, network, output)
    click.echo(f"{file}: written; look at it, then\n  uv run pdiff sweep {file} --dry-run\n  uv run pdiff sweep {file}")


@click.command()
@experiment_options
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@in_process_option
@json_option
def sweep(file: str, dry_run: bool, in_process: bool, as_json: bool, **options: Any) -> None:
    """Run the experiment of FILE, or all trials of its sweep, from data to report; what is there is used again."""
    from pdiff_ray.config.sweep import SweepFile

    loaded = load(file, in_process=in_process, **options)  # before the imports that take longer
    from pdiff_ray.cli import printing
    from pdiff_ray.running import experiment as experiments
    from pdiff_ray.running import sweep as sweeps
    from pdiff_ray.running.results import Result
    from pdiff_ray.sweeps.ledger import Ledger

    with standard_output_for(as_json):
        if isinstance(loaded, SweepFile):
            ledger = Ledger(loaded)
            if dry_run:
                printing.print_sweep_plan(ledger, as_json)
                return
            result = sweeps.run(ledger, in_process=in_process)
            printing.print_sweep(result, as_json)
            if result.failed:
                again = "; the same command tries them again" if ledger.open_trials() else ""
                raise PdiffError(f"trials failed{again}")
        else:
            plan = experiments.make_plan(loaded)
            if dry_run:
                printing.print_plan(plan, as_json)
                return
            printing.print_start(plan)
            experiments.run(plan, in_process=in_process, track=True)
            printing.print_result(Result(loaded.name, plan.artifacts), as_json)


@click.command()
@click.argument("names", metavar="[CELL]...", nargs=-1, shell_complete=complete_cell)
@override_options
@click.option("--list", "only_list", is_flag=True, help="Print the cells, default all, with our results so far; stop.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option(
    "--sweeps",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default="sweeps",
    show_default=True,
    help="Folder of the project's sweeps.",
)
@in_process_option
def reproduce(
    names: tuple[str, ...], only_list: bool, dry_run: bool, folder: Path, in_process: bool, **options: Any
) -> None:
    """Run CELLs of the paper's tables, such as v1/mnist/s-2 or "final/cifar10/*", and compare ours with the published.

    A cell is a trial, with its seeds, of one of the project's sweeps of the paper's networks. What is there is used
    again.
    """
    from pdiff_ray.running import reproduce

    if not names and not only_list:
        raise click.UsageError("name CELLs; `pdiff reproduce --list` shows them")
    cells, overrides = reproduce.choose(names or ["*"]), overrides_of(in_process=in_process, **options)
    files = [] if only_list else reproduce.load(folder, cells, overrides)  # before the imports that take longer
    from pdiff_ray.cli import printing
    from pdiff_ray.storage.files import Storage
    from pdiff_ray.sweeps.ledger import Ledger

    if only_list:
        uri = options["storage"] or os.environ.get("PDIFF_STORAGE") or DEFAULT_STORAGE
        printing.print_cells(reproduce.lines(Storage(uri), cells))
        return
    if dry_run:
        for file in files:
            printing.print_sweep_plan(Ledger(file))
        return
    failed = []
    for file, plain in zip(files, reproduce.load(folder, cells, ()), strict=True):
        failed += reproduce.run(file, plain, in_process=in_process)
    storage = Storage(files[0].experiment.storage_uri)
    printing.print_cells(reproduce.lines(storage, cells), reproduce.write_page(storage))
    if failed:
        raise PdiffError(f"trials failed: {'; '.join(f'{trial.text}: {trial.reason}' for trial in failed)}")


@click.command()
@click.argument("stage", type=Stage())
@experiment_options
@in_process_option
def run(stage: str, file: str, in_process: bool, **options: Any) -> None:
    """Build one STAGE of the experiment of FILE and what it needs; of a sweep's, with what varies as FILE has it.

    STAGE is one of base, zoo, alignment, generator, samples, evaluation, report.
    """
    from pdiff_ray.cli import printing
    from pdiff_ray.running import experiment as experiments

    plan = experiments.make_plan(load_experiment(file, in_process=in_process, **options), target=stage)
    printing.print_start(plan)
    experiments.run(plan, in_process=in_process)
    click.echo(f"{stage}: {plan.artifacts[stage].location}")


@click.command("import")
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@experiment_options
@click.option(
    "--as", "kind", type=click.Choice(["zoo", "samples"]), default="zoo", show_default=True, help="What they are."
)
@click.option("--pattern", metavar="GLOB", help="Take the files of these names, or paths below FOLDER.")
@click.option("--weights", metavar="KEY", help="Take the weights under this key of each file, for example ema.")
@click.option("--prefix", metavar="PREFIX", help="Take the weights whose names begin so, for example model.")
@click.option("--order", metavar="NUMBER", help="Order by a number in each file, for example epoch; default: by name.")
@click.option(
    "--base",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Whole network; default: the first of the files.",
)
def import_command(
    folder: Path,
    file: str,
    kind: str,
    pattern: str | None,
    weights: str | None,
    prefix: str | None,
    order: str | None,
    base: Path | None,
    **options: Any,
) -> None:
    """Make the zoo of FILE (which names it in zoo.imported) from the checkpoints in FOLDER and below it.

    Files of torch.save (.pth, .pt, .ckpt, .bin, .pth.tar) and safetensors. Weights only: no code in them is run.

    With --as samples they are another tool's samples for the zoo of FILE, which is there already, and are judged in
    place of generated ones (generator.name: imported, generator.label). FOLDER may then be a file of vectors (n, D):
    .npy, safetensors, torch.save's, or a Parquet file of a storage.
    """
    from pdiff_ray.common.progress import display
    from pdiff_ray.running.experiment import make_plan
    from pdiff_ray.stages.checkpoints import Options, import_samples, import_zoo
    from pdiff_ray.stages.checks import checked_subset

    taken = Options(pattern, weights, prefix, order, base)
    experiment = load_experiment(file, **options)
    target = "alignment" if kind == "samples" and experiment.alignment.method != "none" else "zoo"
    plan = make_plan(experiment, target)
    zoo = plan.artifacts["zoo"]
    if kind == "samples":
        if plan.missing:
            raise ConfigError(
                f"{zoo.location}: the samples' zoo is not there; make it with `pdiff run {target} {file}`"
            )
        plan.storage.check_writable()
        report: object = import_samples(folder, plan.experiment, plan.artifacts, taken)
        click.echo(f"{report}\nsamples: {plan.artifacts['generator'].location}")
        return
    if folder.is_file():
        raise ConfigError(f"{folder}: is a file; the checkpoints of a zoo are in a folder")
    if not plan.missing:
        origin = zoo.manifest().info.get("imported_from", "another folder")
        click.echo(
            f"zoo: there already, from {origin}, {zoo.location}; zoo.imported with another label makes a new one"
        )
        return
    plan.storage.check_writable()
    checked_subset(plan.experiment)
    with display() as progress:
        report = import_zoo(folder, plan.experiment, plan.artifacts, taken, progress)
    click.echo(f"{report}\nzoo: {zoo.location}")


@click.command("log")
@experiment_options
def log_command(file: str, **options: Any) -> None:
    """Write to MLflow what it lacks of the results of FILE, for example of a server that was away."""
    from pdiff_ray import tracking
    from pdiff_ray.config.sweep import SweepFile
    from pdiff_ray.running.experiment import make_plan
    from pdiff_ray.sweeps.ledger import Ledger

    loaded = load(file, **options)
    if isinstance(loaded, SweepFile):
        ledger = Ledger(loaded)
        if not ledger.done():
            raise PdiffError(f"no trial has ended yet in {ledger.storage.location(ledger.folder)}")
        written = tracking.log(ledger)
        if (confirmation := ledger.confirmation()) and confirmation.done():
            tracking.log(confirmation)
        click.echo(f"{written} of {len(ledger.done())} trials written; the others were there")
        return
    plan = make_plan(loaded)
    if plan.missing:
        raise PdiffError(f"not finished: {', '.join(plan.missing)} missing in {plan.storage.place}")
    recorded = tracking.record(plan.experiment, plan.artifacts, anew=True)
    click.echo("written" if recorded else "was there already")


@click.command()
@click.argument("file", type=click.Path(), required=False)
@click.option("--storage", "storage_uri", help="Folder or URI of results.")
@click.option("--address", help="Ray cluster, of which every node is looked at.")
@json_option
def doctor(file: str | None, storage_uri: str | None, address: str | None, as_json: bool) -> None:
    """Check what an experiment (FILE, or the defaults) needs: versions, devices, storage, data, Ray, MLflow."""
    from pdiff_ray.cli.doctor import examine
    from pdiff_ray.config import loading
    from pdiff_ray.config.schema import Experiment, Resources

    given = {"storage": storage_uri, "resources.address": address}
    overrides = [f"{name}={value}" for name, value in given.items() if value]
    default = Experiment(name="doctor", storage=storage_uri, resources=Resources(address=address))
    experiment = loading.load(file, overrides) if file else default
    findings = []
    for finding in examine(experiment):
        findings.append(finding)
        if not as_json:
            click.echo(f"{'ok     ' if finding.ok else 'MISSING'} {finding.what}: {finding.text}")
    if as_json:
        print_json([vars(finding) for finding in findings])
    if failed := sum(not finding.ok for finding in findings):
        raise PdiffError(f"{failed} of these need attention")
