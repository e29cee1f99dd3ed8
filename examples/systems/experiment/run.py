"""Runs an experiment: every variant with every seed, a bar, a table, a JSON file and a plot."""

import argparse
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import rich.progress
import torch
from rich.console import Console

from experiment.declare import Experiment
from experiment.report import plot, table, verdicts
from moert.cli.machine import machine_facts
from moert.cli.report import write_json

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build" / "systems"


class Progress:
    """What a variant is given beside its seed: the bar, and how much is asked for.

    quick is a smoke test; times is how many times as long as usual to train.
    """

    def __init__(self, bar: rich.progress.Progress, task: int, quick: bool = False, times: int = 1):
        self.bar, self.task, self.quick, self.times = bar, task, quick, times

    def steps(self, count: int) -> Iterator[int]:
        """0 .. count-1, a tick each; 0 alone in a quick run.  A variant may loop more than once."""
        count = 1 if self.quick else count
        self.bar.update(self.task, total=(self.bar.tasks[self.task].total or 0) + count)
        for step in range(count):
            yield step
            self.bar.advance(self.task)


def main(experiment: Experiment, arguments: list[str] | None = None) -> dict:
    """The command line of one system's file; returns what was written to <out>/<name>.json."""
    parser = argparse.ArgumentParser(description=f"{experiment.title} ({experiment.paper})")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one tiny step of every variant: does it run?")
    parser.add_argument("--variant", nargs="+", choices=list(experiment.variants), help="only these; writes nothing")
    parser.add_argument("--times", type=int, default=1, help="train so many times as long; writes nothing")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=BUILD)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console()
    names = options.variant or list(experiment.variants)
    seeds = [0] if options.quick else [options.first_seed + i for i in range(options.seeds)]
    result = {**describe(experiment), "seeds": seeds, **measure(experiment, names, seeds, options, console)}
    console.print(table(result))
    if options.variant or options.times > 1:
        return result
    for line in verdicts(result):
        console.print(line)
    write_json(options.out / f"{experiment.name}.json", result)
    plot(result, options.out / f"{experiment.name}.png")
    console.print(f"{options.out / experiment.name}.json and .png", style="dim")
    return result


def measure(experiment: Experiment, names: list[str], seeds: list[int], options, console: Console) -> dict:
    """runs: variant -> a dict of figures per seed; cpu_seconds: variant -> time of all threads per seed."""
    runs: dict[str, list] = {name: [] for name in names}
    seconds: dict[str, list] = {name: [] for name in names}
    with rich.progress.Progress(*rich.progress.Progress.get_default_columns(), console=console) as bar:
        # Seed by seed, so that a machine that slows down slows all variants alike.
        for seed in seeds:
            for name in names:
                task = bar.add_task(f"{name}, seed {seed}", total=None)
                started = time.process_time()
                torch.manual_seed(seed)
                figures = experiment.variants[name](seed, Progress(bar, task, options.quick, options.times))
                if unknown := set(figures) - set(experiment.figures):
                    raise ValueError(f"figures must be among {', '.join(experiment.figures)}, got {unknown}")
                runs[name].append({figure: float(value) for figure, value in figures.items()})
                seconds[name].append(round(time.process_time() - started, 1))
    return {"runs": runs, "cpu_seconds": seconds}


def describe(experiment: Experiment) -> dict:
    """Everything but the figures."""
    about = {name: value for name, value in vars(experiment).items() if name not in ("variants", "claims")}
    return {
        **about,
        "classes": list(experiment.classes),
        "claims": [asdict(claim) for claim in experiment.claims],
        "machine": {**machine_facts(("torch",)), "threads": torch.get_num_threads()},
        "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def commit() -> str:
    """The commit that was run, with a + where the tree differs from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    return (head or "unknown") + ("+" if changed else "")
