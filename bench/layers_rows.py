"""Rows of layers.py: what was measured of a problem, its shares and ratios, and the table of them."""

import statistics
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from peers.problem import LIMITS, PRODUCT_FLOP, READ_BYTES, Problem
from timing import percentile

BASE = "moert at "  # and a commit, where --base asked for it


@dataclass
class Row:
    """One problem: the seconds of every turn of every provider, and the limits of that turn; of slow ones the first."""

    problem: dict
    bytes: float = 0.0
    flop: float = 0.0
    times: dict[str, list[float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    # Of a training step, beyond the weights and their gradients.
    memory: dict[str, int] = field(default_factory=dict)
    # Of all outputs of the first routing together, relative to float32 throughout.
    errors: dict[str, float] = field(default_factory=dict)

    def ideal(self) -> list[float]:
        """Seconds that the limits of each turn leave: the bytes or the product, whichever takes longer."""
        bandwidth = (READ_BYTES / t for t in self.times["read"])
        rates = [[PRODUCT_FLOP / t for t in self.times[name]] for name in self.products()]
        best = map(max, zip(*rates, strict=True))
        return [max(self.bytes / b, self.flop / r) for b, r in zip(bandwidth, best, strict=True)]

    def products(self) -> list[str]:
        """The limits that rows of this problem are multiplied under: those that were measured, the fastest counts."""
        found = [name for name in Problem(**self.problem).products if name in self.times]
        return found or ["product"]

    def providers(self) -> list[str]:
        return [name for name in self.times if name not in LIMITS]

    def share(self, name: str) -> float:
        times = self.times[name]
        return statistics.median(i / t for i, t in zip(self.ideal()[: len(times)], times, strict=True))

    def best_peer(self) -> str | None:
        peers = [name for name in self.providers() if not name.startswith("moert")]
        return min(peers, key=lambda name: statistics.median(self.times[name]), default=None)

    def ratio(self, name: str) -> float:
        times = self.times[name]
        return statistics.median(p / m for p, m in zip(times, self.times["moert"][: len(times)], strict=True))


def say_limits(limits: dict[str, float], console: Console) -> None:
    """limits: seconds of each of LIMITS."""
    rates = [f"read {READ_BYTES / limits['read'] / 1e9:.1f} GB/s"]
    for name in LIMITS[1:]:
        if name in limits:
            unit = "GOP/s" if name.startswith("int8") else "GFLOP/s"
            rates.append(f"{limit_name(name)} {PRODUCT_FLOP / limits[name] / 1e9:.0f} {unit}")
    console.print(f"This machine, {'; '.join(rates)}")


def limit_name(name: str) -> str:
    """As it is said: whose product it is."""
    named = "float32 product" if name == "product" else name
    return f"torch's {named}" if name.endswith("product") else named


def title(problem: dict) -> str:
    step = " training" if problem["training"] else ""
    return f"{problem['model']} T={problem['T']} {problem['dtype']} {problem['routing']}{step}"


def show(rows: list[Row], absent: dict[str, str], console: Console) -> None:
    table = Table(title="ms of a layer, median (p20-p80; share of what the machine allows) of turns")
    base = next((name for row in rows for name in row.providers() if name.startswith(BASE)), None)
    of_base = (base, "moert is faster by") if base else ()
    for column in ("layer", "moert", "prepacked or int8 rows", *of_base, "best peer", "", "moert is faster by"):
        table.add_column(column, justify="left" if column in ("layer", "best peer") else "right")
    for row in rows:
        peer = row.best_peer()
        theirs = (peer, cell(row, peer), f"{row.ratio(peer):.2f}x") if peer else ("none", "", "")
        mine = [name for name in row.providers() if name.startswith("moert ") and " at " not in name]
        before = (cell(row, base), f"{row.ratio(base):.2f}x") if base in row.times else ("", "")
        other = cell(row, mine[0]) if mine else ""
        table.add_row(title(row.problem), cell(row, "moert"), other, *before[: len(of_base)], *theirs)
    console.print(table)
    for row in rows:
        if row.memory:
            taken = "; ".join(f"{name} {taken / 2**20:,.0f} MiB" for name, taken in row.memory.items())
            console.print(f"{title(row.problem)}, memory beyond the weights and their gradients: {taken}")
    gone = absent | {name: why for row in rows for name, why in row.missing.items()}
    for name, why in gone.items():
        console.print(f"{name}: not measured everywhere, {why}", style="yellow")


def cell(row: Row, name: str) -> str:
    """Share and spread beside the median: one without the other says little on a machine that others use."""
    low, middle, high = (1e3 * percentile(row.times[name], share) for share in (0.2, 0.5, 0.8))
    return f"{middle:.2f} ({low:.2f}-{high:.2f}; {row.share(name):.0%})"
