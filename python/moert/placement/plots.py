"""Placements beside each other: imbalance of every layer, costs, rows from rank to rank.  Needs matplotlib."""

from collections.abc import Mapping

import numpy as np

from moert.analysis.plots import blank_figure, draw_traffic
from moert.placement.replay import Replay


def plot_replays(replays: Mapping[str, Replay], title: str):
    """A figure: the imbalance of each layer, the slowest pair in both ways to travel, rows from rank to rank."""
    figure = blank_figure(13, 3.4 + 3.4)
    figure.suptitle(title)
    above, below = figure.subfigures(2, 1)
    balance, costs = above.subplots(1, 2)
    place = np.arange(2)
    for i, (name, each) in enumerate(replays.items()):
        balance.plot(each.imbalance, "o-", label=name, color=f"C{i}")
        balance.plot(each.p95, "--", color=f"C{i}", alpha=0.6)
        width = 0.8 / len(replays)
        costs.bar(place + i * width, [each.home.sum(), each.resident.sum()], width, label=name, color=f"C{i}")
    balance.set(xlabel="layer", ylabel="largest / mean load of a rank", title="Imbalance (dashed: 95 % of the calls)")
    balance.legend(frameon=False)
    costs.set(ylabel="rows x cost, sum over layers", title="Slowest pair of ranks")
    costs.set_xticks(place + 0.4 - 0.4 / len(replays), ["from home and back", "resident"])
    draw_traffic(below, {name: each.rows for name, each in replays.items()}, "rows, all layers")
    return figure
