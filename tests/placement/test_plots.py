import numpy as np

from analysis.traces import random_trace
from moert.placement import Topology, contiguous, replay, round_robin
from moert.placement.plots import plot_replays


def test_bars_and_lines_are_the_replays(tmp_path):
    trace, topology = random_trace(), Topology(4, 2)
    replays = {
        "contiguous": replay(trace, contiguous(trace, 4), topology),
        "round-robin": replay(trace, round_robin(trace, 4), topology),
    }
    figure = plot_replays(replays, "two")
    balance, costs = figure.axes[:2]
    for i, each in enumerate(replays.values()):
        assert np.array_equal(balance.lines[2 * i].get_ydata(), each.imbalance)
        heights = [bar.get_height() for bar in costs.containers[i]]
        assert heights == [each.home.sum(), each.resident.sum()]
    figure.savefig(tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000
