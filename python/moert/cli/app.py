"""The commands of the moert program and how they fail: one line on stderr, never a traceback for bad input."""

import functools
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from moert.cli import bench, info, place, quantize, run
from moert.cli.errors import CommandError


def _one_line(command):
    @functools.wraps(command)
    def wrapped(*args, **options):
        try:
            return command(*args, **options)
        except CommandError as error:
            typer.echo(f"moert {command.__name__}: {error}", err=True)
            sys.exit(2)
        except KeyboardInterrupt as error:
            told = "".join(f"; {each}" for each in error.args)
            typer.echo(f"moert {command.__name__}: interrupted{told}", err=True)
            sys.exit(130)

    return wrapped


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moert {version('moert')}")
        raise typer.Exit()


app = typer.Typer(
    name="moert",
    help="The Mixture-of-Experts runtime for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _program(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="The version of moert.")
    ] = False,
) -> None:
    pass


app.command()(_one_line(run.run))
app.command()(_one_line(quantize.quantize))
app.command()(_one_line(place.place))
app.command()(_one_line(info.info))
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(
    _one_line(bench.bench)
)
