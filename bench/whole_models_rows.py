"""The rows of bench/whole_models.py: one model in one format under one runtime, and their table."""

from dataclasses import dataclass, field
from statistics import median

from rich.console import Console
from rich.table import Table

MIB = 2**20
FLOAT = "moert bfloat16"
# What llama.cpp has and moert's format of the same bits, by the names of their rows.
PAIRS = {
    "llama.cpp BF16": FLOAT,
    "llama.cpp F16": FLOAT,
    "llama.cpp Q8_0": "moert int8:32",
    "llama.cpp Q4_0": "moert int4:32",
    "llama.cpp MXFP4": "moert mxfp4",
    "llama.cpp TQ2_0": "moert ternary2",
    "llama.cpp TQ1_0": "moert ternary5",
}


@dataclass
class Row:
    """prefill, decode: seconds of the prompt and of a token, of every turn; parts: of a token, of every turn.

    error is that of the logits against the float weights in float32, own_error that against the numbers that the file
    holds: the medians over the tokens.  peak_bytes and held_bytes are above what the imports took.
    """

    name: str
    weight_bytes: int = 0
    peak_bytes: int | None = None
    held_bytes: int | None = None
    error: float | None = None
    own_error: float | None = None
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    parts: list[dict] = field(default_factory=list)
    missing: str | None = None

    def part(self, name: str) -> float | None:
        """Seconds of a token in the experts, or in the forward."""
        return median(turn[name] for turn in self.parts) if self.parts else None


def faster(row: Row, other: Row, what: str) -> float:
    """How many times as fast as the other row, the median over the turns."""
    pairs = zip(getattr(row, what), getattr(other, what), strict=True)
    return median(theirs / ours for ours, theirs in pairs)


def show(rows: list[Row], prompt: int, title: str, console: Console) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    for heading in (
        "weights\nMiB", "peak\nMiB", "held\nMiB", f"prefill of {prompt}\ntokens/s", "decode\ntokens/s",
        "a token, ms\n(least-most)", "of it\nexperts, ms", "faster by, moert:\nprefill, decode", "error of\nthe logits",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    found = {row.name: row for row in rows if not row.missing}
    for row in found.values():
        table.add_row(row.name, *cells(row, found.get(PAIRS.get(row.name, FLOAT)), prompt))
    console.print(table)
    for row in rows:
        if row.missing:
            console.print(f"{row.name}: not measured, {row.missing}")


def cells(row: Row, moert: Row | None, prompt: int) -> list[str]:
    """moert: its row in the bits of llama.cpp's, else in bfloat16, which the last ratios compare with this one."""
    experts = row.part("experts")
    milliseconds = [1e3 * seconds for seconds in row.decode]
    ratios = [f"{faster(moert, row, what):.2f}" for what in ("prefill", "decode")] if moert else ["-"]
    return [
        f"{row.weight_bytes / MIB:.0f}",
        *("-" if size is None else f"{size / MIB:.0f}" for size in (row.peak_bytes, row.held_bytes)),
        f"{prompt / median(row.prefill):,.0f}",
        f"{1 / median(row.decode):,.1f}",
        f"{median(milliseconds):.1f} ({min(milliseconds):.1f}-{max(milliseconds):.1f})",
        "-" if experts is None else f"{1e3 * experts:.1f}",
        ", ".join(ratios),
        "-" if row.error is None else f"{row.error:.4f}",
    ]
