"""`moert place`: a routing trace to a placement of experts on ranks, and what it would do beside the usual ones."""

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moert.cli.errors import CommandError, first_line


def place(
    trace: Annotated[
        list[Path],
        typer.Argument(
            metavar="TRACE...", help="Routing trace (moert.analysis.record_routings), of each rank its own."
        ),
    ],
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that share the experts.")],
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of equal size that the ranks are in, in order.")] = 1,
    across: Annotated[float, typer.Option(help="Cost of a row between nodes; within one it is 1.")] = 4.0,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Placement to write; its picture is beside it.")] = Path(
        "placement.json"
    ),
    slots: Annotated[str, typer.Option(help="Experts of a rank and layer: equal, or any number.")] = "equal",
    replicas: Annotated[int, typer.Option(min=0, help="Copies of hot experts that a rank may hold besides.")] = 0,
    method: Annotated[str, typer.Option(help="Clusters to ranks: auto, viterbi, milp or local.")] = "auto",
    time_limit: Annotated[float, typer.Option(min=0.01, help="Seconds for a layer, and for the assignment.")] = 20.0,
    gap: Annotated[float, typer.Option(min=0.0, help="Relative gap at which the solver may stop.")] = 0.025,
) -> None:
    """Decide on every other row of TRACE which rank holds which expert, write it, and replay the other rows."""
    if out.suffix == ".png":
        raise CommandError(f"out must be the placement, whose picture is beside it as .png, got {out}")
    _check_options(ranks, nodes, method)
    from moert.analysis import RoutingTrace
    from moert.placement import Topology, contiguous, moetuner_placement, replay, round_robin

    try:
        topology = Topology(ranks, nodes, across)
        decide, judge = RoutingTrace.of_ranks([RoutingTrace.load(path) for path in trace]).halves()
        _check_ranks(decide, ranks)
        with _bar() as bar:
            task = bar.add_task("", total=len(decide.layers) + 1)
            tuned = moetuner_placement(
                decide, topology, slots, method, time_limit, gap, replicas,
                lambda what: bar.update(task, description=what, advance=1),
            )  # fmt: skip
        candidates = {
            "contiguous": contiguous(decide, ranks),
            "round-robin": round_robin(decide, ranks),
            "moert": tuned.placement,
        }
        predicted = {name: replay(decide, each, topology) for name, each in candidates.items()}
        replayed = {name: replay(judge, each, topology) for name, each in candidates.items()}
        figure = _figure(replayed, f"{trace[0].name}: {ranks} ranks in {nodes} nodes, rows not used to decide")
    except OSError as error:
        raise CommandError(f"TRACE must be a readable file, got {first_line(error)}") from error
    except ValueError as error:
        raise CommandError(first_line(error)) from error
    from moert.cli.report import write_atomically

    write_atomically(out, lambda temporary: tuned.placement.save(temporary))
    picture = out.with_suffix(".png")
    write_atomically(picture, lambda temporary: figure.savefig(temporary, dpi=120))
    console = Console(highlight=False)
    console.print(_table(predicted, replayed, f"{ranks} ranks in {nodes} nodes, {len(decide.layers)} layers"))
    console.print(_solved(tuned))
    if replayed["moert"].imbalance.mean() > replayed["contiguous"].imbalance.mean():
        console.print("On rows not used to decide the loads are less even than those of contiguous experts.")
    console.print(f"Placement: {out}, {picture}", soft_wrap=True)


def _check_options(ranks: int, nodes: int, method: str) -> None:
    """Before a trace is read and clustered."""
    from moert.placement.affinity import METHODS
    from moert.placement.milp import solver

    try:
        solver()
    except ImportError as error:
        raise CommandError(first_line(error)) from error

    if ranks % nodes:
        raise CommandError(f"nodes must divide ranks={ranks}, got {nodes}")
    if method not in METHODS:
        raise CommandError(f"method must be one of {', '.join(METHODS)}, got {method}")


def _check_ranks(trace, ranks: int) -> None:
    for layer in trace.layers:
        if ranks > (E := len(layer.loads())):
            raise CommandError(f"ranks must be at most E={E}, the experts of {layer.name}, got {ranks}")


def _figure(replayed: dict, title: str):
    from moert.placement.plots import plot_replays

    return plot_replays(replayed, title)


def _table(predicted: dict, replayed: dict, title: str) -> Table:
    """Each figure for the rows that decided, and below it for the others; not wider than 80 columns."""
    caption = "predicted, → replayed; slowest pair: rows x cost of a row, sum over layers"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("placement")
    columns = {
        "largest /\nmean load": ("imbalance", "{:.3f}"),
        "95 % of\nthe calls": ("imbalance_p95", "{:.3f}"),
        "rows that\nleave home": ("remote", "{:.1%}"),
        "slowest pair\nfrom home": ("home", "{:,.0f}"),
        "slowest pair\nresident": ("resident", "{:,.0f}"),
    }
    for heading in columns:
        table.add_column(heading, justify="right")
    for name in predicted:
        before, after = predicted[name].figures(), replayed[name].figures()
        cells = [f"{form.format(before[key])}\n→ {form.format(after[key])}" for key, form in columns.values()]
        table.add_row(name, *cells)
    return table


def _solved(tuned) -> str:
    """How far from an optimum the programs stopped."""
    uneven = max(each.gap * each.value / max(each.mean, 1e-300) for each in tuned.clusters)
    gap = tuned.assignment.gap
    known = "not known (swaps)" if gap is None else _share(gap)
    clusters = f"clusters could be more even by at most {_share(uneven)} of a rank's load"
    return f"Gap to an optimum: {clusters}; for their ranks {known}."


def _share(gap: float) -> str:
    """A solver that ran out of time before it had any bound says infinity."""
    return f"{gap:.1%}" if math.isfinite(gap) else "(not known, out of time)"


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.completed}/{task.total}"))
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
