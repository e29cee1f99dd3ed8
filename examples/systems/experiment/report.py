"""Tables, verdicts and plots of a result (the dict that run.main writes as JSON)."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from rich.table import Table  # noqa: E402

from experiment.declare import Claim, as_text, interval, spread  # noqa: E402
from moert.cli.report import write_atomically  # noqa: E402


def table(result: dict) -> Table:
    """A row per variant: mean and standard deviation of its figures over the seeds."""
    title = f"{result['title']} ({result['paper']}), {len(result['seeds'])} seeds, {result['equal']}"
    out = Table(title=title, title_justify="left")
    out.add_column("variant")
    for figure, unit in result["figures"].items():
        out.add_column(f"{figure}\n{unit}", justify="right")
    out.add_column("CPU seconds", justify="right")
    for name, runs in result["runs"].items():
        cells = [as_text(values) if (values := values_of(runs, figure)) else "-" for figure in result["figures"]]
        out.add_row(name, *cells, as_text(result["cpu_seconds"][name]))
    return out


def values_of(runs: list[dict], figure: str) -> list[float]:
    return [run[figure] for run in runs if figure in run]


def measured(claim: Claim, result: dict) -> str:
    """The system's figure beside what it is held to, with the verdict."""
    system, bound = claim.values(result["runs"])
    times = "" if claim.factor == 1 else f"{claim.factor:g} x "
    named = isinstance(claim.baseline, str)
    other = f"{claim.baseline} {as_text([b / claim.factor for b in bound])}" if named else f"{claim.baseline:g}"
    sign = "≤" if claim.better == "lower" else "≥"
    ask = f"{claim.figure} of {claim.system} {as_text(system)}, asked {sign} {times}{other}"
    verdict = claim.verdict(result["runs"])
    if verdict == "in the mean only" and len(system) > 1:
        better = 1 if claim.better == "higher" else -1
        low, high = interval([better * (s - b) for s, b in zip(system, bound, strict=True)])
        verdict += f", by {low:.2g} to {high:.2g} (95 %)"
    return f"{verdict}: {ask} ({result['figures'][claim.figure]})"


def verdicts(result: dict) -> list[str]:
    claims = [Claim(**claim) for claim in result["claims"]]
    return [f"{claim.words}: {measured(claim, result)}" for claim in claims]


def plot(result: dict, path: Path) -> None:
    """A panel per figure: every seed a dot, the mean a bar."""
    figures = [f for f in result["figures"] if any(values_of(runs, f) for runs in result["runs"].values())]
    picture, panels = plt.subplots(1, len(figures), figsize=(3.6 * len(figures) + 1, 4.2), layout="constrained")
    for figure, axes in zip(figures, [panels] if len(figures) == 1 else panels, strict=True):
        named = {name: values for name, runs in result["runs"].items() if (values := values_of(runs, figure))}
        for place, values in enumerate(named.values()):
            axes.bar(place, spread(values)[0], color="#1f6fb4", alpha=0.35)
            axes.plot([place] * len(values), values, "o", color="#222222", markersize=4)
        low, high = min(map(min, named.values())), max(map(max, named.values()))
        if low > 0.5 * high > 0:  # bars from zero would hide the difference
            axes.set_ylim(low - 0.5 * (high - low) - 1e-9, high + 0.3 * (high - low) + 1e-9)
        axes.set_xticks(range(len(named)), list(named), rotation=30, ha="right")
        axes.set(title=figure, ylabel=result["figures"][figure])
    picture.suptitle(f"{result['title']} ({result['paper']})")
    write_atomically(path, lambda temporary: picture.savefig(temporary, dpi=130))
    plt.close(picture)
