"""The command line: what is typed becomes a command. Heavy imports wait until one needs them."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Sequence

import click

from pdiff_ray import __version__
from pdiff_ray.cli import experiments, results
from pdiff_ray.common import signals
from pdiff_ray.common.errors import PdiffError


def guarded(command: click.Command, arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits; what a user can mend is printed as one message, without a traceback.

    Args:
        arguments: default: those of the process, which is this command's own.
    """
    # Libraries make millions of objects that stay; with the usual threshold (700) they are searched for cycles
    # over and over.
    gc.set_threshold(10_000)
    code = 1  # of an error that is none of the user's, which has a traceback

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # to free what libraries have made, object by object, takes two seconds

    if arguments is None:
        atexit.register(end)  # before anything heavy is imported, and so called after what that registers
    try:
        with signals.ending():
            command(arguments, standalone_mode=False)
        code = 0
    except SystemExit as error:  # of a command that has said what there is to say
        code = int(error.code or 0)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except PdiffError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; the same command goes on from here", err=True)
        code = signals.exit_code()
    sys.exit(code)


def main() -> None:
    """Runs the console command `pdiff`."""
    sys.path.insert(0, "")  # as with `python -m`: a network of one's own may lie in the current folder
    if "_PDIFF_COMPLETE" in os.environ:  # a shell asks what can follow; click answers it in its own mode
        cli(prog_name="pdiff")
    guarded(cli)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="pdiff")
def cli() -> None:
    """Neural network diffusion: zoos of networks, generators of weights, and their evaluation, on Ray."""


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that lets SHELL complete commands, options, stages, presets and keys.

    For bash: pdiff completion bash > ~/.pdiff-completion && echo '. ~/.pdiff-completion' >> ~/.bashrc
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "pdiff", "_PDIFF_COMPLETE").source())


for command in (
    experiments.init,
    experiments.sweep,
    experiments.reproduce,
    experiments.run,
    experiments.import_command,
    experiments.log_command,
    experiments.doctor,
    results.show,
    results.artifacts,
    results.export,
    results.ui,
):
    cli.add_command(command)
