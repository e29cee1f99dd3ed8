"""Simulated exchanges of 64, 512 and 2,048 ranks: flat against 2DH, with uniform and skewed routing.  Nothing is sent.

By the latency and time a byte that bench/links.py measured; links between nodes are so many times slower a byte
(--across), which is an assumption.  Writes bench/results/simulated_exchange.json, and a picture to build/.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moert.analysis.plots import blank_figure
from moert.placement.exchange_cost import LinkCost, flat, two_level

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
LOCAL, K, ROW = 8, 8, 2 * 4096  # ranks of a node, choices of a token, bytes of a row: H = 4096 in bfloat16
RANKS, TOKENS = (64, 512, 2048), (1, 8, 64, 512)  # tokens of a rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--across", type=float, nargs="+", default=[1.0, 4.0], help="slower a byte between nodes")
    parser.add_argument("--links", type=Path, default=RESULTS / "links.json")
    parser.add_argument("--smoke", action="store_true", help="64 ranks, few tokens; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "simulated_exchange.json")
    options = parser.parse_args()
    links = json.loads(options.links.read_text())
    inside = LinkCost(links["latency"], links["per_byte"])
    cases = [(ranks, routing, tokens) for ranks in RANKS for routing in ("uniform", "zipf 1.0") for tokens in TOKENS]
    rows = []
    for case in track(cases[:2] if options.smoke else cases, "Simulating", console=Console(stderr=True)):
        rows += simulate(*case, inside, options.across)
    Console().print(table(rows))
    if options.smoke:
        return
    value = {
        "simulated": True,
        "links": {name: links[name] for name in ("latency", "per_byte", "what", "date", "machine")},
        "assumed": {"ranks_of_a_node": LOCAL, "experts_of_a_rank": 1, "k": K, "row_bytes": ROW, "seed": 0},
        "rows": rows,
    }
    options.out.write_text(json.dumps(value, indent=1) + "\n")
    picture = ROOT / "build" / "simulated_exchange.png"
    picture.parent.mkdir(exist_ok=True)
    plot(rows).savefig(picture, dpi=120)
    print(options.out, picture)


def simulate(ranks: int, routing: str, tokens: int, inside: LinkCost, slower: list[float]) -> list[dict]:
    """Seconds of one dispatch, flat and 2DH, for each factor between nodes."""
    nbytes = routed_rows(ranks, routing, tokens) * ROW
    nodes = ranks // LOCAL
    found = []
    for factor in slower:
        across = LinkCost(inside.latency, factor * inside.per_byte)
        times = {
            name: sum(step.seconds(inside, across) for step in steps(nbytes, nodes))
            for name, steps in (("flat", flat), ("2DH", two_level))
        }
        case = {"ranks": ranks, "routing": routing, "tokens": tokens, "across": factor}
        received = nbytes.sum(0)
        found.append({**case, **times, "largest_receive_over_mean": float(received.max() / received.mean())})
    return found


def routed_rows(ranks: int, routing: str, tokens: int) -> np.ndarray:
    """[R, R]: rows from rank to rank, one a token and rank; one expert a rank, k draws of which repeats count once."""
    rng = np.random.default_rng(0)
    popular = np.ones(ranks) if routing == "uniform" else rng.permutation(1.0 / np.arange(1, ranks + 1))
    edges = np.cumsum(popular) / popular.sum()
    rows = np.zeros((ranks, ranks))
    for home in range(ranks):
        chosen = np.sort(np.searchsorted(edges[:-1], rng.random((tokens, K)), side="right"), axis=1)
        first = np.concatenate([np.ones((tokens, 1), bool), chosen[:, 1:] != chosen[:, :-1]], axis=1)
        rows[home] = np.bincount(chosen[first], minlength=ranks)
    return rows


def table(rows: list[dict]) -> Table:
    out = Table(title="Simulated dispatch, milliseconds", title_justify="left")
    for heading in ("ranks", "routing", "tokens of a rank", "between nodes", "flat", "2DH", "flat / 2DH"):
        out.add_column(heading, justify="right")
    for row in rows:
        out.add_row(
            str(row["ranks"]),
            row["routing"],
            str(row["tokens"]),
            f"{row['across']:g} x",
            f"{1e3 * row['flat']:.2f}",
            f"{1e3 * row['2DH']:.2f}",
            f"{row['flat'] / row['2DH']:.2f}",
        )
    return out


def plot(rows: list[dict]):
    """How many times faster 2DH is, over the tokens of a rank: a panel for each routing."""
    figure = blank_figure(11, 4.4)
    routings = list(dict.fromkeys(row["routing"] for row in rows))
    for axes, routing in zip(figure.subplots(1, len(routings), sharey=True), routings, strict=True):
        for color, ranks in enumerate(dict.fromkeys(row["ranks"] for row in rows)):
            for line, across in zip(("-", "--"), dict.fromkeys(row["across"] for row in rows), strict=False):
                mine = [r for r in rows if (r["routing"], r["ranks"], r["across"]) == (routing, ranks, across)]
                gain = [row["flat"] / row["2DH"] for row in mine]
                label = f"{ranks} ranks, {across:g} x"
                axes.plot([row["tokens"] for row in mine], gain, f"o{line}", color=f"C{color}", label=label)
        axes.axhline(1.0, color="#222222", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="tokens of a rank", title=f"{routing} routing (simulated)")
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("time flat / 2DH")
    figure.axes[0].legend(frameon=False, fontsize=8, title="between nodes, a byte")
    return figure


if __name__ == "__main__":
    main()
