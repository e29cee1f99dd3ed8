"""Pictures of a run of layers.py: made from its rows, never committed."""

import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from layers_rows import limit_name  # noqa: E402
from peers.problem import LIMITS, PRODUCT_FLOP, READ_BYTES  # noqa: E402


def plot_roofline(rows: list, title: Callable[[dict], str], folder: Path) -> Path:
    """FLOP per second over FLOP per byte of weights, under the limits measured in the same run."""
    figure, axes = plt.subplots(figsize=(9, 6))
    intensity = sorted(row.flop / row.bytes for row in rows)
    bandwidth = statistics.median(READ_BYTES / t for row in rows for t in row.times["read"])
    for product, color in zip(LIMITS[1:], ("0.2", "0.35", "0.5", "0.6", "0.7"), strict=True):
        times = [t for row in rows for t in row.times.get(product, ())]
        if times:
            rate = statistics.median(PRODUCT_FLOP / t for t in times)
            xs = [intensity[0] / 2, rate / bandwidth, max(2 * intensity[-1], 2 * rate / bandwidth)]
            ys = [min(rate, x * bandwidth) / 1e9 for x in xs]
            axes.plot(xs, ys, color=color, label=f"limit (read, {limit_name(product)})")
    names = sorted({name for row in rows for name in row.providers()}, key=lambda name: (name != "moert", name))
    for name in names:
        points = [
            (row.flop / row.bytes, row.flop / statistics.median(row.times[name]) / 1e9)
            for row in rows
            if name in row.times
        ]
        axes.scatter(*zip(*points, strict=True), s=60 if name == "moert" else 25, label=name)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of weights read", ylabel="GFLOP/s")
    axes.legend()
    return _save(figure, folder / "roofline.png")


def plot_peers(rows: list, title: Callable[[dict], str], folder: Path) -> Path:
    """Time of every provider over moert's, one group of bars per layer."""
    names = sorted({name for row in rows for name in row.providers() if name != "moert"})
    figure, axes = plt.subplots(figsize=(10, 1 + 0.6 * len(rows)))
    height = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        bars = [(y - 0.4 + i * height, row.ratio(name)) for y, row in enumerate(rows) if name in row.times]
        if bars:
            axes.barh(*zip(*bars, strict=True), height=height, label=name)
    axes.axvline(1, color="0.4")
    axes.set(yticks=range(len(rows)), yticklabels=[title(row.problem) for row in rows], xscale="log")
    axes.set_xlabel("time over moert's")
    axes.invert_yaxis()
    axes.legend()
    return _save(figure, folder / "peers.png")


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
