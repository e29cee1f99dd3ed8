"""`moert bench`: the benches of a checkout, which are not part of the installed package."""

import subprocess
import sys
from pathlib import Path

import typer

from moert.cli.errors import CommandError


def bench(context: typer.Context) -> None:
    """Time the operators against PyTorch: runs bench/run.py of the checkout in the current directory."""
    script = Path("bench/run.py")
    if not script.is_file():
        raise CommandError(f"the current directory must be a checkout of moert with bench/run.py, got {Path.cwd()}")
    raise typer.Exit(subprocess.call([sys.executable, str(script), *context.args]))
