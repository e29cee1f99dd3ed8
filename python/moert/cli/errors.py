"""What a command tells its user in one line: wrong paths, models that do not fit, broken files."""

import os
from pathlib import Path


class CommandError(Exception):
    """Ends the command with its text on one line and exit code 2; anything else is a fault of moert and shows where."""


def first_line(error: BaseException) -> str:
    """What went wrong, short enough for one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def check_directory(model: Path) -> None:
    """Models are read from local directories, not fetched by name."""
    if not model.is_dir():
        raise CommandError(f"model must be a local directory, got {model}")


def check_writable(directory: Path) -> None:
    """Before the work rather than after it: what is there of `directory` is a directory that can be written to."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise CommandError(f"out must be a writable directory, got {directory}")
