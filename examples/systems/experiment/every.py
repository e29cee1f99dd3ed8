"""`make systems`: every experiment, each in a process of its own, then docs/systems.md.

An experiment that fails leaves its earlier result in the page; the others run all the same, and the exit status is 1.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from experiment import page
from experiment.run import BUILD, ROOT

SYSTEMS = ROOT / "examples" / "systems"


def run(files: Iterable[Path], arguments: Iterable[str] = ()) -> list[tuple[str, float, int]]:
    """(stem, seconds of the clock, exit status) of `python file arguments`, one after the other."""
    found = []
    for file in files:
        started = time.monotonic()
        status = subprocess.run([sys.executable, str(file), *arguments]).returncode
        found.append((file.stem, time.monotonic() - started, status))
    return found


def table(found: list[tuple[str, float, int]]) -> Table:
    out = Table("experiment", "seconds", "outcome", title=f"{sum(seconds for _, seconds, _ in found):.0f} s in all")
    for name, seconds, status in found:
        out.add_row(name, f"{seconds:.0f}", "through" if status == 0 else f"failed, exit status {status}")
    return out


def main(arguments: list[str] | None = None) -> int:
    stems = [path.stem for path in sorted(SYSTEMS.glob("*.py"))]
    parser = argparse.ArgumentParser(description="runs the experiments and writes docs/systems.md")
    parser.add_argument("systems", nargs="*", metavar="system", help=f"all without one, of {', '.join(stems)}")
    systems = parser.parse_args(arguments).systems or stems
    if unknown := set(systems) - set(stems):
        parser.error(f"system must be one of {', '.join(stems)}, got {', '.join(sorted(unknown))}")
    for stem in systems:  # what an earlier run left must not stand for this one
        (BUILD / f"{stem.replace('_', '-')}.json").unlink(missing_ok=True)
    found = run([SYSTEMS / f"{stem}.py" for stem in systems])
    page.main(but=[stem for stem, _, status in found if status])
    Console().print(table(found))
    return int(any(status for _, _, status in found))


if __name__ == "__main__":
    sys.exit(main())
