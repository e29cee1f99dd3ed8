"""The pictures: of a training its loss and how evenly the experts were used, of packed experts what they change."""

from pathlib import Path

import matplotlib
import matplotlib.ticker

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from moert.cli.report import write_atomically  # noqa: E402

_INK, _BLUE, _RED = "#222222", "#1f6fb4", "#c4442f"


def plot_loss(record: dict, path: Path) -> None:
    """Training and held-out loss over the bytes seen; the dashed line is what the bigram model reaches."""
    settings, losses = record["settings"], np.asarray(record["losses"])
    bytes_per_step = settings["batch"] * settings["sequence"]
    seen = np.arange(1, len(losses) + 1) * bytes_per_step / 1e3
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    axes.plot(seen, losses, color=_BLUE, alpha=0.25, linewidth=1, label="training, each step")
    axes.plot(seen, _smooth(losses), color=_BLUE, linewidth=2, label="training, running mean")
    steps, heldout = np.asarray(record["heldout"]).T
    axes.plot(steps * bytes_per_step / 1e3, heldout, "o-", color=_INK, markersize=5, label="held-out files")
    axes.axhline(record["bigram_loss"], color=_RED, linestyle="--", label="bigram model, same held-out text")
    axes.annotate(
        f"{heldout[-1]:.2f}",
        (steps[-1] * bytes_per_step / 1e3, heldout[-1]),
        xytext=(0, 8),
        textcoords="offset points",
        ha="right",  # the last point lies at the edge
        color=_INK,
    )
    axes.annotate(f"{record['bigram_loss']:.2f}", (seen[0], record["bigram_loss"]), xytext=(0, -13),
                  textcoords="offset points", color=_RED)  # fmt: skip
    axes.set(
        xlabel="text seen (thousand bytes)",
        ylabel="loss (nats per byte)",
        title=f"Byte-level MoE on Python's standard library: {record['parameters'] / 1e6:.1f} M parameters, "
        f"{settings['experts']} experts, top-{settings['top_k']}",
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_expert_load(record: dict, path: Path) -> None:
    """A cell per layer and expert: its share of the held-out choices, over an even share."""
    load = np.asarray(record["expert_load"])
    relative = load * load.shape[1]
    figure, axes = plt.subplots(
        figsize=(max(6, 0.36 * load.shape[1] + 2), 0.5 * load.shape[0] + 2), layout="constrained"
    )
    image = axes.imshow(relative, cmap="YlGnBu", vmin=0, vmax=max(2, relative.max()), aspect="auto")
    for layer, expert in np.ndindex(*relative.shape):
        value = relative[layer, expert]
        shade = "white" if value > 0.6 * image.norm.vmax else _INK
        axes.text(expert, layer, f"{value:.1f}", ha="center", va="center", fontsize=7, color=shade)
    axes.set(
        xlabel="expert",
        ylabel="layer",
        xticks=range(load.shape[1]),
        yticks=range(load.shape[0]),
        title=f"Expert load on held-out text (1.0 = an even share, {100 / load.shape[1]:.1f} % of the choices)",
    )
    axes.tick_params(axis="x", labelsize=8)
    figure.colorbar(image, ax=axes, label="load / even share", pad=0.01)
    _save(figure, path)


def plot_quantization(report: dict, path: Path) -> None:
    """Per layer the relative error of the experts' output, and the share of tokens with the same choices."""
    layers, perplexity = report["layers"], report["perplexity"]
    place = np.arange(len(layers))
    nan = float("nan")  # a layer that stayed float has no error
    errors = [nan if layer["output_error"] is None else layer["output_error"] for layer in layers]
    agreement = [nan if layer["router_agreement"] is None else 100 * layer["router_agreement"] for layer in layers]
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    above.bar(place, errors, color=_BLUE)
    above.set(
        ylabel="relative error of the output",
        title=f"{report['options']['format']} experts: perplexity {perplexity['before']:.3f} → "
        f"{perplexity['after']:.3f} on {report['text']['tokens']} tokens",
    )
    below.plot(place, agreement, "o-", color=_INK)
    below.set(xlabel="experts, in the order of the model", ylabel="tokens with the same top-k (%)")
    below.set_ylim(top=100.5)
    below.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    for axes in (above, below):
        axes.grid(alpha=0.25)
    _save(figure, path)


def _smooth(values: np.ndarray, window: int = 20) -> np.ndarray:
    """Mean of about `window` values around each, as many before it as behind: it does not lag."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(window // 2, np.minimum(index, len(values) - 1 - index))
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)


def _save(figure, path: Path) -> None:
    try:
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150))
    finally:
        plt.close(figure)
