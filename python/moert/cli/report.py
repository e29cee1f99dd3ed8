"""What a run leaves behind: tables for the terminal, report.json and the pictures, each written whole or not at all."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moert import files
from moert.cli.errors import CommandError
from moert.cli.generation import Difference

MIB = 2**20


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """write() makes a temporary file or directory beside path, which then takes path's place in one rename."""
    try:
        files.write_atomically(path, write)
    except OSError as error:
        raise CommandError(f"{path} must be writable: {error.strerror or error}") from error


def write_json(path: Path, value: dict) -> None:
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


@contextmanager
def waiting(console: Console, what: str) -> Iterator[Callable[[str], None]]:
    """A spinner on a terminal; elsewhere a line on stderr, so that a log too says what takes so long.

    What it yields tells of a step of it in the same place.
    """
    if console.is_terminal:
        with console.status(what) as status:
            yield lambda step: status.update(f"{what} {step}")
    else:
        print(what, file=sys.stderr, flush=True)
        yield lambda step: print(f"  {step}", file=sys.stderr, flush=True)


def speed_table(rows: dict[str, dict], title: str) -> Table:
    """rows maps a provider to generation.summarize's numbers."""
    prompt = next(iter(rows.values()))["prefill_tokens"]
    table = Table(title=title, title_justify="left")
    table.add_column("experts", overflow="fold")
    # Three lines of heading and numbers that are never cut: all fits into 80 columns.
    for heading in (
        f"prefill\n{prompt} tokens\ntokens/s",
        "decode\n\ntokens/s",
        "a token, ms\np50\n(p20-p80)",
        "memory,\npeak\nMiB",
        "of it to\ngenerate\nMiB",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        times = row["milliseconds_per_token"]
        table.add_row(
            name,
            f"{row['prefill_tokens_per_second']:,.0f}",
            f"{row['decode_tokens_per_second']:,.1f}" if times else "-",
            f"{_digits(times['p50'])} ({_digits(times['p20'])}-{_digits(times['p80'])})" if times else "-",
            f"{row['peak_bytes'] / MIB:,.0f}",
            f"{row['generation_bytes'] / MIB:,.1f}",
        )
    return table


def _digits(x: float) -> str:
    """Three digits, or more where the whole number has more."""
    return f"{x:,.{2 if x < 10 else 1 if x < 100 else 0}f}"


def training_table(rows: dict[str, dict], title: str) -> Table:
    """Of the rows that have trained: the speed, and how many times as fast as the slowest."""
    trained = {name: row["training"] for name, row in rows.items() if "training" in row}
    slowest = min(row["tokens_per_second"] for row in trained.values())
    table = Table(title=title, title_justify="left", min_width=min(80, len(title)))
    table.add_column("experts")
    for heading in ("training\ntokens/s", "a step, ms\np50 (p20-p80)", "faster\nby"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in trained.items():
        times = row["milliseconds_per_step"]
        spread = f"{_digits(times['p50'])} ({_digits(times['p20'])}-{_digits(times['p80'])})"
        table.add_row(name, f"{row['tokens_per_second']:,.0f}", spread, f"{row['tokens_per_second'] / slowest:.2f} x")
    return table


def weights_table(rows: dict[str, dict], title: str, reference: str = "moert") -> Table:
    """What each row weighs and, where it was measured, how well it predicts, beside the reference."""
    table = Table(title=title, title_justify="left", min_width=len(title))  # rich breaks a title that is wider
    table.add_column("experts")
    table.add_column("weights\nMiB", justify="right")
    measured = all("perplexity" in row for row in rows.values())
    if measured:
        table.add_column("perplexity", justify="right")
        table.add_column(f"beside {reference}", justify="right")
    for name, row in rows.items():
        cells = [name, f"{row['weight_bytes'] / MIB:,.1f}"]
        if measured:
            change = row["perplexity"] / rows[reference]["perplexity"] - 1
            cells += [f"{row['perplexity']:.4f}", f"{100 * change:+.3f} %"]
        table.add_row(*cells)
    return table


def sameness(differences: list[Difference], tokens: int, names: tuple[str, ...]) -> str:
    """One sentence: the tokens are the same, or where they part and how close the call was."""
    if not differences:
        return f"Same tokens: {' = '.join(names)}, {tokens} of {tokens}."
    parts = []
    for d in differences:
        gap = "" if d.gap is None else f", where the two best logits of {names[0]} are {d.gap:.2g} apart"
        parts.append(f"{d.provider} chose {d.got} instead of {d.expected} at token {d.position + 1} of {tokens}{gap}")
    return f"Different tokens: {'; '.join(parts)}."
