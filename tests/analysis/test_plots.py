import sys

import numpy as np
import pytest

from analysis.traces import random_trace
from moert.analysis.plots import plot_imbalance, plot_load, plot_traffic


def test_load_is_relative_to_an_even_share(tmp_path):
    trace = random_trace()
    figure = plot_load(trace)
    image = figure.axes[0].images[0].get_array()
    for row, recorded in zip(image, trace.layers, strict=True):
        assert np.allclose(row, recorded.loads() / recorded.loads().mean())
    figure.savefig(tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 1000


def test_imbalance_has_two_lines_a_placement():
    trace = random_trace(calls=(30, 30))
    everything = [np.zeros(8, dtype=int)] * 3
    spread = [np.arange(8) % 2] * 3
    lines = plot_imbalance(trace, {"one rank": everything, "spread": spread}, 2).axes[0].lines
    assert [list(line.get_ydata()) for line in lines[:2]] == [[2.0] * 3, [2.0] * 3]
    loads = [recorded.loads() for recorded in trace.layers]
    expected = [max(each[::2].sum(), each[1::2].sum()) / (each.sum() / 2) for each in loads]
    assert np.allclose(lines[2].get_ydata(), expected)


def test_traffic_leaves_out_what_stays():
    figure = plot_traffic({"a": np.array([[9, 2], [3, 9]]), "b": np.array([[9, 1], [0, 9]])})
    assert [axes.get_title() for axes in figure.axes[:2]] == ["a", "b"]
    shown = figure.axes[0].images[0]
    assert np.isnan(np.ma.filled(shown.get_array(), np.nan)[0, 0]) and shown.norm.vmax == 3
    figure.canvas.draw()


def test_without_matplotlib_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plots need matplotlib, got none: pip install matplotlib"):
        plot_load(random_trace())
