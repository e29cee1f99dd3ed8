"""Pictures of traces: load of experts, imbalance of ranks, rows from rank to rank.  Needs matplotlib."""

from collections.abc import Mapping, Sequence

import numpy as np

from moert.analysis.load import call_loads, imbalance, rank_loads, ranks_of
from moert.analysis.trace import RoutingTrace


def plot_load(trace: RoutingTrace):
    """A figure: for each layer and expert its load over an even share."""
    widest = max(layer.num_experts for layer in trace.layers)
    relative = np.full((len(trace.layers), widest), np.nan)
    for row, layer in zip(relative, trace.layers, strict=True):
        loads = layer.loads()
        row[: len(loads)] = loads / max(loads.mean(), 1e-300)
    figure = blank_figure(max(6, 0.2 * widest + 2), 0.35 * len(relative) + 2)
    axes = figure.subplots()
    image = axes.imshow(relative, cmap="YlGnBu", vmin=0, aspect="auto")
    axes.set(xlabel="expert", ylabel="layer", title="Load of the experts (1 = an even share)")
    figure.colorbar(image, ax=axes, pad=0.01)
    return figure


def plot_imbalance(trace: RoutingTrace, placements: Mapping[str, Sequence[np.ndarray]], num_ranks: int):
    """A figure: largest over mean load of the ranks in each layer, and its 95th percentile over calls (dashed).

    placements maps a name to expert_to_rank [E] of every layer.
    """
    figure = blank_figure(8, 4.5)
    axes = figure.subplots()
    for color, (name, placement) in enumerate(placements.items()):
        overall, worst = [], []
        for layer, expert_to_rank in zip(trace.layers, placement, strict=True):
            ranks = ranks_of(layer, expert_to_rank)
            overall.append(imbalance(rank_loads(ranks, num_ranks)))
            worst.append(np.percentile(imbalance(call_loads(layer, ranks, num_ranks)), 95) if len(layer.calls) else 1.0)
        axes.plot(overall, "o-", color=f"C{color}", label=name)
        axes.plot(worst, "--", color=f"C{color}", alpha=0.6)
    axes.set(xlabel="layer", ylabel="largest / mean load of a rank", title="Imbalance (dashed: 95 % of the calls)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def plot_traffic(matrices: Mapping[str, np.ndarray]):
    """A figure: for each name a matrix [R, R] of rows from rank to rank, on one scale; what stays is left out."""
    figure = blank_figure(3.6 * len(matrices) + 1.5, 3.8)
    draw_traffic(figure, matrices, "rows")
    return figure


def draw_traffic(figure, matrices: Mapping[str, np.ndarray], label: str) -> None:
    """plot_traffic's panels, side by side in a figure or a part of one."""
    off = {name: np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix) for name, matrix in matrices.items()}
    largest = max([1.0] + [float(np.nanmax(matrix)) for matrix in off.values() if matrix.size > 1])
    panels = figure.subplots(1, len(off), squeeze=False)[0]
    for axes, (name, matrix) in zip(panels, off.items(), strict=True):
        image = axes.imshow(matrix, cmap="YlGnBu", vmin=0, vmax=largest)
        axes.set(title=name, xlabel="to rank", ylabel="from rank")
        axes.locator_params(integer=True)
    figure.colorbar(image, ax=panels, label=label)


def blank_figure(width: float, height: float):
    """A Figure without pyplot: no window, no state that other plots of the program would see."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib, got none: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")
