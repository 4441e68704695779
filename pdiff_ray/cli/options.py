"""Options and arguments that commands share, with their completion in a shell."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from pdiff_ray.common.errors import ConfigError, PdiffError, did_you_mean

if TYPE_CHECKING:
    from pdiff_ray.config.schema import Experiment
    from pdiff_ray.config.sweep import SweepFile

DEFAULT_STORAGE = "pdiff-storage"


class Stage(click.ParamType):
    """The type of an argument that names a stage."""

    name = "stage"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from pdiff_ray.stages.table import STAGES

        if value not in STAGES:
            near = did_you_mean(value, STAGES)
            self.fail(f"{value!r} is no stage{near or '; they are ' + ', '.join(STAGES)}", param, ctx)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from pdiff_ray.stages.table import STAGES

        return [CompletionItem(stage) for stage in STAGES if stage.startswith(incomplete)]


def _complete_preset(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from pdiff_ray.config import loading

    # While the last option has no value yet, click does not parse the words before it, so the file may be among them.
    file = next((word for word in (ctx.params.get("file"), *ctx.args) if word and not word.startswith("-")), None)
    try:
        return [name for name in loading.presets(file) if name.startswith(incomplete)] if file else []
    except PdiffError:  # the file cannot be read
        return []


def _complete_key(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from pdiff_ray.storage.artifacts import finished
    from pdiff_ray.storage.files import Storage

    uri = ctx.params.get("storage_uri") or os.environ.get("PDIFF_STORAGE") or DEFAULT_STORAGE
    keys = [folder.rpartition("/")[2] for folder in finished(Storage(uri))]
    return [key for key in keys if key.startswith(incomplete)]


def complete_cell(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Returns the cells of the paper's tables that begin as what is typed."""
    from pdiff_ray.running.reproduce import published

    return [cell.name for cell in published() if cell.name.startswith(incomplete)]


def override_options(function: Any) -> Any:
    """Adds the options that override fields of experiments."""
    for decorate in (
        click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Override a field; repeatable."),
        click.option("--storage", metavar="URI", help="Folder or URI of results (field storage)."),
        click.option("--tracking-uri", metavar="URI", help="MLflow (field tracking.uri)."),
        click.option("--address", metavar="ADDRESS", help="Ray cluster (field resources.address)."),
    )[::-1]:
        function = decorate(function)
    return function


def experiment_options(function: Any) -> Any:
    """Adds the argument and the options of every command that reads an experiment file."""
    for decorate in (
        click.argument("file", type=click.Path()),
        click.option(
            "--preset",
            metavar="NAME",
            shell_complete=_complete_preset,
            help="Lay one of the file's presets over it, for example small.",
        ),
        override_options,
    )[::-1]:
        function = decorate(function)
    return function


in_process_option = click.option(
    "--in-process", is_flag=True, help="Run without Ray, in this process, which is then the only worker; to debug."
)
storage_option = click.option(
    "--storage",
    "storage_uri",
    envvar="PDIFF_STORAGE",
    default=DEFAULT_STORAGE,
    show_default=True,
    help="Folder or URI.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON on the standard output, and nothing else."
)


def key_argument(name: str, **options: Any) -> Callable[[Any], Any]:
    """Returns the decorator for an argument that is the key of an artifact."""
    return click.argument(name, shell_complete=_complete_key, **options)


def print_json(content: Any) -> None:
    """Prints JSON on the standard output."""
    click.echo(json.dumps(content, indent=2, default=str))


@contextlib.contextmanager
def standard_output_for(as_json: bool) -> Iterator[None]:
    """Sends text for humans to the standard error if the standard output is for JSON."""
    from pdiff_ray.common.progress import console

    before, console.stderr = console.stderr, console.stderr or as_json
    try:
        yield
    finally:
        console.stderr = before


def load(file: str, **options: Any) -> Experiment | SweepFile:
    """Loads a file as a sweep, or as an experiment if it has no section `sweep`."""
    from pdiff_ray.config import sweep

    return sweep.load(file, overrides_of(**options), options["preset"])


def load_experiment(file: str, **options: Any) -> Experiment:
    """Loads the experiment of a file; a sweep in the file is ignored."""
    from pdiff_ray.config import loading

    return loading.load(file, overrides_of(**options), options["preset"])


def overrides_of(
    *,
    overrides: tuple[str, ...],
    storage: str | None,
    tracking_uri: str | None,
    address: str | None,
    in_process: bool = False,
    **_: Any,
) -> list[str]:
    """Returns the overrides that a command's options stand for, as `--set` takes them."""
    given = {
        "storage": storage,
        "tracking.uri": tracking_uri,
        "resources.address": address,
        "resources.workers": 1 if in_process else None,  # as there are; the key of a base depends on their number
    }
    return [*overrides, *(f"{path}={value}" for path, value in given.items() if value)]


def ids_of(text: str | None) -> list[int] | None:
    """Parses a comma-separated list of numbers of networks."""
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--ids: {text!r} is not a comma-separated list of numbers") from None
