"""The moert command: one file per command, and main(), the console script."""

import sys


def main() -> None:
    try:
        from moert.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"the moert command needs {error.name}: pip install 'moert[cli]'")
    app()
