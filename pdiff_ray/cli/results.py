"""Commands that look at storage: show, artifacts, export, ui."""

from __future__ import annotations

import itertools
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from pdiff_ray.cli.options import ids_of, json_option, key_argument, print_json, storage_option
from pdiff_ray.common import signals
from pdiff_ray.common.errors import ConfigError, PdiffError, StorageError, printable


@click.command()
@click.argument("what")
@click.option("--preset", metavar="NAME", help="Of a file: lay one of its presets over it.")
@click.option(
    "--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Of a file: override a field; repeatable."
)
@click.option("--storage", "storage_uri", envvar="PDIFF_STORAGE", help="Folder or URI of results.")
@json_option
def show(what: str, preset: str | None, overrides: tuple[str, ...], storage_uri: str | None, as_json: bool) -> None:
    """Show a result again: WHAT is an experiment or sweep file, or the key of a report."""
    from pdiff_ray.cli import printing
    from pdiff_ray.cli.options import DEFAULT_STORAGE, load
    from pdiff_ray.config.sweep import SweepFile
    from pdiff_ray.running.results import Result, open_result
    from pdiff_ray.running.sweep import open_sweep
    from pdiff_ray.storage.files import Storage
    from pdiff_ray.sweeps.ledger import Ledger

    if not what.endswith((".yaml", ".yml")):
        printing.print_result(Result.find(Storage(storage_uri or DEFAULT_STORAGE), what), as_json)
        return
    loaded = load(what, overrides=overrides, preset=preset, storage=storage_uri, tracking_uri=None, address=None)
    if isinstance(loaded, SweepFile):
        ledger = Ledger(loaded)
        if not ledger.done():
            raise PdiffError(f"no trial has ended yet in {ledger.storage.location(ledger.folder)}; run the sweep first")
        printing.print_sweep(open_sweep(ledger), as_json)
    else:
        printing.print_result(open_result(loaded), as_json)


@click.group()
def artifacts() -> None:
    """What storage holds: list, show, verify."""


@artifacts.command("list")
@storage_option
@json_option
def list_artifacts(storage_uri: str, as_json: bool) -> None:
    """List finished artifacts, oldest first."""
    from rich import box
    from rich.table import Table

    from pdiff_ray.common.progress import console
    from pdiff_ray.storage.artifacts import Manifest, finished, read_manifest
    from pdiff_ray.storage.files import Storage

    storage, damaged = Storage(storage_uri), list[str]()

    def read(folder: str) -> list[Manifest]:
        try:
            return [read_manifest(storage, folder)]
        except StorageError as error:  # which does not hide the others
            damaged.append(str(error))
            return []

    found = storage.map(read, finished(storage))
    manifests = sorted(itertools.chain.from_iterable(found), key=lambda m: m.created_at)
    if as_json:
        print_json([m.model_dump(exclude_unset=True) for m in manifests])
    elif manifests:
        table = Table("stage", "key", "made", "seconds", "about", box=box.SIMPLE_HEAD, pad_edge=False)
        for m in manifests:
            table.add_row(m.stage, m.key, m.created_at, f"{m.seconds:.1f}", _about(m.info))
        console.print(table)
    elif not damaged:
        console.print(f"nothing finished in {storage.place}")
    if damaged:
        raise StorageError("\n".join(damaged))


def _about(info: dict[str, Any]) -> str:
    from rich.markup import escape

    shown = {k: v for k, v in info.items() if isinstance(v, int | float | str) and not isinstance(v, bool)}
    text = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in list(shown.items())[:4])
    return escape(printable(text))


@artifacts.command("show")
@key_argument("key")
@storage_option
@json_option
def show_artifact(key: str, storage_uri: str, as_json: bool) -> None:
    """Show the manifest of the artifact whose key starts with KEY, and what it was made from."""
    from pdiff_ray.stages.stored import lineage
    from pdiff_ray.storage.artifacts import find
    from pdiff_ray.storage.files import Storage

    storage = Storage(storage_uri)
    manifest = find(storage, key)
    chain, fields = lineage(storage, manifest.folder), manifest.model_dump(exclude_unset=True)
    if as_json:
        print_json({**fields, "made_from": [name for name, _ in chain[1:]]})
        return
    print_json({**fields, "files": {name: entry.sha256[:12] for name, entry in manifest.files.items()}})
    click.echo("made from: " + " <- ".join(f"{name}{'' if found else ' (gone)'}" for name, found in chain))


@artifacts.command("verify")
@key_argument("keys", nargs=-1)
@storage_option
@json_option
def verify_artifacts(keys: tuple[str, ...], storage_uri: str, as_json: bool) -> None:
    """Compare all that storage holds of the artifacts KEYS (default: of all artifacts and sweeps) with its digests."""
    from pdiff_ray.running import reproduce
    from pdiff_ray.storage.artifacts import find
    from pdiff_ray.storage.checks import folders, verify
    from pdiff_ray.storage.files import Storage
    from pdiff_ray.sweeps.ledger import verify_sweep

    storage = Storage(storage_uri)
    if keys:
        checks = {find(storage, key).folder: verify for key in keys}
    else:
        checks = dict.fromkeys(folders(storage), verify) | dict.fromkeys(storage.list("sweeps"), verify_sweep)
        if storage.list(reproduce.FOLDER):
            checks[reproduce.FOLDER] = reproduce.verify
    problems, notes = dict[str, list[str]](), dict[str, list[str]]()
    for folder, check in checks.items():
        found = check(storage, folder)
        problems[folder], notes[folder] = found.problems, found.notes
        if not as_json:
            click.echo(f"{folder}: {f'{len(found.problems)} damaged' if found.problems else 'whole'}")
            for note in found.notes:
                click.echo(printable(f"  note: {note}"))
    if as_json:
        print_json({"problems": problems, "notes": notes})
    if any(problems.values()):
        raise StorageError("\n".join(problem for found in problems.values() for problem in found))


@click.command()
@key_argument("key")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--ids", help="Comma-separated ids; default: all.")
@click.option("--subset-only", is_flag=True, help="The generated tensors alone, for load_state_dict(strict=False).")
@click.option("--overwrite", is_flag=True, help="Replace files of FOLDER that have another content.")
@storage_option
def export(key: str, folder: Path, ids: str | None, subset_only: bool, overwrite: bool, storage_uri: str) -> None:
    """Write the networks of a zoo or of samples (KEY) into FOLDER as safetensors state dicts."""
    from pdiff_ray.stages.stored import Networks
    from pdiff_ray.storage.files import Storage

    networks = Networks.find(Storage(storage_uri), key)
    count = sum(1 for _ in networks.export(folder, ids_of(ids), subset_only=subset_only, overwrite=overwrite))
    click.echo(f"{count} networks in {folder}")


@click.command()
@click.option("--storage", "storage_uri", envvar="PDIFF_STORAGE", help="Folder whose SQLite file is shown.")
@click.option("--tracking-uri", help="MLflow database, if it is elsewhere.")
@click.option("--port", default=5000, show_default=True, help="On the loopback interface.")
def ui(storage_uri: str | None, tracking_uri: str | None, port: int) -> None:
    """Serve MLflow's pages of the recorded runs, and print links to them."""
    from pdiff_ray import tracking
    from pdiff_ray.config.schema import Experiment, Tracking
    from pdiff_ray.storage.files import Storage

    experiment = Experiment(name="ui", storage=storage_uri, tracking=Tracking(uri=tracking_uri))
    uri = tracking.tracking_uri(experiment, Storage(experiment.storage_uri))
    file = tracking.database(uri)
    if file and not file.exists():
        raise ConfigError(f"{file}: nothing is recorded yet; run `pdiff sweep FILE`, or name --storage")
    tracking.reachable(uri)
    if uri.startswith(("http://", "https://")):
        _print_links(tracking.links(uri, uri.rstrip("/")))
        return
    try:
        with tracking.Server(uri, port) as server:
            click.echo(f"starting MLflow at {server.address}, which can take a minute")
            links = tracking.links(uri, server.address)
            server.wait_until_ready()
            _print_links(links)
            click.echo("serving until Ctrl-C")
            server.wait()
    except KeyboardInterrupt:
        if (code := signals.exit_code()) != 128 + signal.SIGINT:
            sys.exit(code)


def _print_links(links: Mapping[str, Mapping[str, str]]) -> None:
    for experiment, pages in links.items():
        click.echo(experiment)
        for name, address in pages.items():
            click.echo(f"  {name:8} {address}")
    if not links:
        click.echo("no experiment of pdiff is recorded here yet")
