"""What an experiment says of itself, and when a claim counts as shown."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

Variant = Callable[[int, Any], dict[str, float]]  # (seed, experiment.Progress)


@dataclass(frozen=True)
class Claim:
    """The system's figure is better than factor x the baseline's; the baseline is a variant or a number.

    words is what the paper claims, in one line without a full stop.
    """

    words: str
    figure: str
    better: str  # "lower" or "higher"
    system: str
    baseline: str | float
    factor: float = 1.0

    def __post_init__(self):
        if self.better not in ("lower", "higher"):
            raise ValueError(f"better must be lower or higher, got {self.better}")

    def values(self, runs: dict[str, list[dict[str, float]]]) -> tuple[list[float], list[float]]:
        """Figures of the system and what they are held to, a pair per seed."""
        system = [run[self.figure] for run in runs[self.system]]
        if isinstance(self.baseline, str):
            return system, [self.factor * run[self.figure] for run in runs[self.baseline]]
        return system, [self.factor * self.baseline] * len(system)

    def verdict(self, runs: dict[str, list[dict[str, float]]]) -> str:
        """ "shown" in every seed, "in the mean only", or "not shown"."""
        system, bound = self.values(runs)
        sign = 1 if self.better == "higher" else -1
        if all(sign * (s - b) >= 0 for s, b in zip(system, bound, strict=True)):
            return "shown"
        return "in the mean only" if sign * (mean(system) - mean(bound)) >= 0 else "not shown"


# The t quantile of a two-sided 95 % interval by degrees of freedom.
QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11)


def interval(differences: list[float]) -> tuple[float, float]:
    """95 % interval of the mean of differences between seeds' pairs (Student's t)."""
    middle, width = spread(differences)
    degrees = min(len(differences) - 1, len(QUANTILES))
    half = QUANTILES[degrees - 1] * width / math.sqrt(len(differences))
    return middle - half, middle + half


@dataclass(frozen=True)
class Experiment:
    """name is the file's, paper "arXiv:…", classes moert's; figures maps each figure to its unit.

    variants maps names to functions (seed, progress) -> figures; the runs of one seed are compared with each other.
    equal says in what the variants are equal (parameters, FLOPs); notes what was tried and how far a claim was missed.
    seeds is how many fit into two minutes of two cores.  timed names the variants whose figures are times: they run
    after the others, alone.  together: the others of a seed share a model (once), so that one process runs them.
    reads loads what all of them read, before they part, and keeps it (functools.cache).
    """

    name: str
    title: str
    paper: str
    classes: tuple[str, ...]
    figures: dict[str, str]
    claims: tuple[Claim, ...]
    equal: str
    variants: dict[str, Variant] = field(repr=False)
    notes: str = ""
    seeds: int = 3
    timed: tuple[str, ...] = ()
    together: bool = False
    reads: Callable[[], Any] | None = field(default=None, repr=False)

    def __post_init__(self):
        if unknown := set(self.timed) - set(self.variants):
            raise ValueError(f"timed must be among {', '.join(self.variants)}, got {unknown}")
        for claim in self.claims:
            if claim.figure not in self.figures:
                raise ValueError(f"figure must be one of {', '.join(self.figures)}, got {claim.figure}")
            for variant in (claim.system, claim.baseline):
                if isinstance(variant, str) and variant not in self.variants:
                    raise ValueError(f"variant must be one of {', '.join(self.variants)}, got {variant}")


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over the seeds (0 for one seed)."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def as_text(values: list[float]) -> str:
    """Mean ± standard deviation, to the second digit of the deviation."""
    middle, width = spread(values)
    if width == 0:
        return f"{middle:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(width)))
    return f"{middle:.{decimals}f} ± {width:.{decimals}f}"
