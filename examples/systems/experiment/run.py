"""Runs an experiment: every variant with every seed, a bar, a table, a JSON file and a plot."""

import argparse
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import rich.progress
import torch
import torch._dynamo  # the first optimizer does, which takes a second: here once, not in every process
from rich.console import Console

from experiment.declare import Experiment
from experiment.processes import spread
from experiment.report import plot, table, verdicts
from moert.cli.machine import machine_facts
from moert.cli.report import write_json

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build" / "systems"


class Progress:
    """What a variant is given beside its seed: the bar, and how much is asked for.

    tell(total, done) adds to both ends of the bar; quick is a smoke test; times is how many times as long as usual to
    train.
    """

    def __init__(self, tell: Callable[[int, int], None], quick: bool = False, times: int = 1):
        self.tell, self.quick, self.times = tell, quick, times

    def steps(self, count: int) -> Iterator[int]:
        """0 .. count-1, a tick each; 0 alone in a quick run.  A variant may loop more than once."""
        count = 1 if self.quick else count
        self.tell(count, 0)
        for step in range(count):
            yield step
            self.tell(0, 1)


def main(experiment: Experiment, arguments: list[str] | None = None) -> dict:
    """The command line of one system's file; returns what was written to <out>/<name>.json."""
    parser = argparse.ArgumentParser(description=f"{experiment.title} ({experiment.paper})")
    parser.add_argument("--seeds", type=int, default=experiment.seeds)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one tiny step of every variant: does it run?")
    parser.add_argument("--variant", nargs="+", choices=list(experiment.variants), help="only these; writes nothing")
    parser.add_argument("--times", type=int, default=1, help="train so many times as long; writes nothing")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="of a thread each")
    parser.add_argument("--threads", type=int, help="of what is timed, and of all where --processes is 1")
    parser.add_argument("--out", type=Path, default=BUILD)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console()
    names = options.variant or list(experiment.variants)
    seeds = [0] if options.quick else [options.first_seed + i for i in range(options.seeds)]
    started = time.monotonic()
    measured = measure(experiment, names, seeds, options, console)
    measured["wall_seconds"] = round(time.monotonic() - started, 1)
    how = {**circumstances(), "command": command(experiment, options), "seeds": seeds}
    result = {**said(experiment), **how, **measured}
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

    def work(job: list[tuple[str, int]], send: Callable) -> None:
        for name, seed in job:
            started = time.process_time()
            torch.manual_seed(seed)
            progress = Progress(lambda *ticks: send((name, seed, ticks)), options.quick, options.times)
            figures = {figure: float(value) for figure, value in experiment.variants[name](seed, progress).items()}
            if unknown := set(figures) - set(experiment.figures):
                raise ValueError(f"figures must be among {', '.join(experiment.figures)}, got {unknown}")
            send((name, seed, (figures, round(time.process_time() - started, 1))))

    if experiment.reads is not None:
        experiment.reads()
    with Bars(console) as bars:
        jobs = jobs_of(experiment, [name for name in names if name not in experiment.timed], seeds)
        if options.quick or options.processes == 1:
            work(sum(jobs, []), bars.take)
        else:
            for _, message in spread(work, jobs, options.processes):
                bars.take(message)
        # With nothing beside it; seed by seed, so that a machine that slows down slows all variants alike.
        work([(name, seed) for seed in seeds for name in names if name in experiment.timed], bars.take)
    figures, seconds = ({name: [bars.found[name, s][i] for s in seeds] for name in names} for i in (0, 1))
    return {"runs": figures, "cpu_seconds": seconds}


def jobs_of(experiment: Experiment, names: list[str], seeds: list[int]) -> list[list[tuple[str, int]]]:
    """Lists of (variant, seed), a process each."""
    if experiment.together:
        return [[(name, seed) for name in names] for seed in seeds]
    return [[(name, seed)] for seed in seeds for name in names]


class Bars(rich.progress.Progress):
    """A bar per run; found: (variant, seed) -> (figures, seconds) of those that are through.

    No thread draws them: a lock that it held would stay locked in a process that is forked meanwhile.
    """

    def __init__(self, console: Console):
        columns = rich.progress.Progress.get_default_columns()
        super().__init__(*columns, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self.found: dict[tuple[str, int], tuple[dict[str, float], float]] = {}
        self.ids: dict[tuple[str, int], rich.progress.TaskID] = {}
        self.drawn = 0.0

    def take(self, message: tuple) -> None:
        """(variant, seed, (figures, seconds)), or (variant, seed, (steps more to do, steps done))."""
        name, seed, news = message
        if isinstance(news[0], dict):
            self.found[name, seed] = news
        else:
            if (name, seed) not in self.ids:
                self.ids[name, seed] = self.add_task(f"{name}, seed {seed}", total=0)
            task = self.ids[name, seed]
            self.update(task, total=self.tasks[task].total + news[0], advance=news[1])
        if time.monotonic() - self.drawn > 0.1:
            self.drawn = time.monotonic()
            self.refresh()


def command(experiment: Experiment, options) -> str:
    """What gives these figures."""
    parts = ["python", f"examples/systems/{experiment.name.replace('-', '_')}.py"]
    parts += ["--quick"] if options.quick else []
    parts += [f"--seeds {options.seeds}"] if options.seeds != experiment.seeds else []
    parts += [f"--first-seed {options.first_seed}"] if options.first_seed else []
    parts += [f"--threads {options.threads}"] if options.threads else []
    return " ".join(parts)


def said(experiment: Experiment) -> dict:
    """What the experiment says of itself, as JSON has it: a note needs no new run (page.py)."""
    names = ("name", "title", "paper", "figures", "equal", "notes")
    return {
        **{name: getattr(experiment, name) for name in names},
        "classes": list(experiment.classes),
        "claims": [asdict(claim) for claim in experiment.claims],
    }


def circumstances() -> dict:
    return {
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
