"""Whole MoE layers beside everything a user could pick instead.

Usually (about six minutes): Qwen3-30B-A3B at T = 1, 16, 64, 256 and 1024 in bfloat16 and float32, at 1, 16 and 256 in
int4; gpt-oss-20b at 1 and 256 in bfloat16; training steps of OLMoE at 1024 in both.  --quick (about two minutes):
Qwen3-30B-A3B in bfloat16 at 1, 16, 256 and 1024.  --full (hours): every model, dtype, T and routing of the options
below, and training at 1024 and 4096.

moert and one process per family of peers (bench/peers; environments made by `make bench-peers`, else this one where it
has the package; a family without either is left out and named) take turns, so that only one of them computes at a time.
Beside every sample the machine's limits are sampled: bytes read per second, operations per second from registers (the
FMA peak, that of int8) and torch's products in float32 and, where the CPU multiplies them, bfloat16 and int8.  A layer
is held to the fastest that its numbers can be multiplied by: float32 to the FMA peak, bfloat16 to that or the product
in bfloat16, packed weights to int8's peak or a product in int8 or bfloat16.  A share is the median over the turns of
limit over time, a ratio the median of peer over moert.  Over packed weights rows are float32 (kt-kernel's bfloat16), a
peer rounds the same weights to its own formats of those bits, and every share is of the bytes that moert stores.  Rows
go to build/bench (or --out), those of a --full run by commit and one by one: it goes on where it was cut off, and what
is to be committed is copied from there to bench/results.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from layers_plots import plot_peers, plot_roofline
from layers_rows import BASE, Row, say_limits, show, title
from peers.problem import FLOATS, LIMITS, Problem
from record import ROOT, bench_facts, commit, done_before, path_of, save, say
from revision import build

MODELS = {  # H, I, E, k
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "OLMoE": (2048, 1024, 64, 8),
    "DeepSeek-V2-Lite": (2048, 1408, 64, 6),
    "gpt-oss-20b": (2880, 2880, 32, 4),
    "Mixtral, 4 experts": (4096, 14336, 4, 2),
}
PACKED = ("int8", "int4:32", "int4:128", "mxfp4", "ternary2", "ternary5", "bit_nested", "sub1")
FORWARD = tuple((T, False) for T in (1, 4, 16, 64, 256, 1024, 4096))  # T, training
TRAINING = ((1024, True), (4096, True))
SELECTORS = {
    "model": tuple(MODELS),
    "dtype": FLOATS + PACKED,
    "T": tuple(T for T, _ in FORWARD),
    "routing": ("uniform", "zipf"),
}
SLOW = 5  # times as slow as moert: one turn says enough
FAMILIES = ("transformers", "vllm", "onnxruntime", "ggml", "kt")
# What moert.runtime.keep_memory sets, for every family alike.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62)}


class Family:
    """The process of one family, of which a program of bench/peers answers."""

    def __init__(
        self,
        name: str,
        python: Path,
        threads: int,
        keep_memory: bool,
        program: str = "worker.py",
        site: Path | None = None,
    ):
        self.name = name
        self.command = [str(python), str(ROOT / "bench" / "peers" / program), name, str(threads)]
        # A waiting thread must not spin: the next one to compute is in another process.
        self.environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
        self.environment |= KEEP_MEMORY if keep_memory else {}
        self.environment |= {"PYTHONPATH": str(site)} if site else {}  # in front of what is installed
        self.start()

    def start(self) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as the process
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log, "text": True}
        self.process = subprocess.Popen(self.command, env=self.environment, cwd=ROOT, **pipes)

    def load(self, problem: dict) -> dict:
        """What it has for the problem; a process that died of the one before begins anew."""
        if self.process.poll() is not None:
            self.close()
            self.start()
        try:
            answer = self.ask(load=problem)
        except RuntimeError as error:
            answer = {"providers": [], "missing": {self.name: str(error)}}
        self.providers: list[str] = answer["providers"]
        return answer

    def ask(self, **request) -> dict:
        if self.process.poll() is None:
            with suppress(BrokenPipeError):  # it died since: then it does not answer
                self.process.stdin.write(json.dumps(request) + "\n")
                self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            last = (self.log.read().strip().splitlines() or ["no output"])[-1]
            raise RuntimeError(f"the {self.name} process must answer, got exit {self.process.wait()}: {last}")
        return json.loads(line)

    def close(self) -> None:
        with suppress(BrokenPipeError):  # of what it died before reading
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


class Base(Family):
    """moert of another commit, installed at site: its calls are named by that commit, and the limits are moert's."""

    def __init__(self, revision: str, site: Path, options: argparse.Namespace):
        super().__init__("moert", Path(sys.executable), options.threads, options.keep_memory, site=site)
        self.name, self.suffix = BASE + revision, f" at {revision}"

    def load(self, problem: dict) -> dict:
        answer = super().load(problem)
        self.providers = [name + self.suffix for name in answer["providers"] if name not in LIMITS]
        missing = {name.removesuffix(self.suffix) + self.suffix: why for name, why in answer["missing"].items()}
        return answer | {"providers": self.providers, "missing": missing}

    def ask(self, **request) -> dict:
        asked, *more = request
        of = request[asked]
        plain = {asked: of.removesuffix(self.suffix) if isinstance(of, str) else of}
        return super().ask(**plain, **{name: request[name] for name in more})


def main() -> None:
    options = parse()
    problems = chosen(options)
    console = Console(width=230 if options.base else 170)
    pythons, absent = found()
    base = [BASE + commit(options.base)] if options.base else []
    facts = bench_facts(families=[*pythons, *base], **settings_of(options))
    out = options.out or path_of(options.size, ".layers.json", facts)
    rows = [Row(**row) for row in done_before(out, facts)] if options.full else []
    with ExitStack() as stack:
        families = started(pythons, options, stack)
        limits = limits_of(families[0], options)
        say_limits(limits, console)
        with Progress(console=console) as progress:
            task = progress.add_task("layers", total=len(problems))
            for problem in problems:
                progress.update(task, description=title(asdict(problem)))
                if asdict(problem) not in [row.problem for row in rows]:
                    rows.append(measure(problem, families, options))
                    if options.full:
                        write(out, facts, limits, rows, absent)
                progress.advance(task)
    show(rows, absent, console)
    if not options.smoke:
        write(out, facts, limits, rows, absent)
        say(out, rows, console)
        for plot in (plot_roofline, plot_peers):
            console.print(f"Plot: {plot(rows, title, ROOT / 'build' / 'bench')}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one model in bfloat16; about two minutes")
    size.add_argument("--full", action="store_true", help="every model, dtype, T and routing; hours, resumes")
    size.add_argument("--smoke", action="store_true", help="one tiny layer, one call each, writes nothing")
    for name, values in SELECTORS.items():
        kind = type(values[0])
        parser.add_argument(f"--{name}", nargs="+", type=kind, choices=values, help="of the rows above, these alone")
    parser.add_argument("--turns", type=int, help="7, in --quick 5")
    parser.add_argument("--seconds", type=float, default=0.3, help="of one turn of one provider")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--keep-memory", action="store_true", help="in every family, so that no page is fresh")
    parser.add_argument(
        "--base", metavar="REV", help="also build that commit and time its moert, in turns with this one"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.size = next((name for name in ("quick", "full", "smoke") if getattr(options, name)), "usual")
    options.turns = options.turns or (5 if options.quick else 7)
    if options.smoke:
        options.turns, options.seconds = 1, 0.0
    return options


def settings_of(options: argparse.Namespace) -> dict:
    return {name: getattr(options, name) for name in ("threads", "keep_memory", "turns", "seconds")}


def chosen(options: argparse.Namespace) -> list[Problem]:
    """Those with the same weights follow each other."""
    if options.smoke:
        kinds = (("float32", False), ("float32", True), ("int4:32", False))
        return [Problem("tiny", 64, 32, 8, 2, 5, dtype, training=step) for dtype, step in kinds]
    problems = every() if options.full else usual(options.quick)
    for name in SELECTORS:
        if wanted := getattr(options, name):
            problems = [problem for problem in problems if getattr(problem, name) in wanted]
    if not problems:
        sys.exit("model, dtype, T and routing must select a row, got none (--full has all of them)")
    return problems


def every() -> list[Problem]:
    return [
        Problem(model, *MODELS[model], T, dtype, routing, training)
        for model, dtype, routing in product(MODELS, FLOATS + PACKED, SELECTORS["routing"])
        for T, training in FORWARD + (() if dtype in PACKED else TRAINING)
    ]


def usual(quick: bool) -> list[Problem]:
    wanted = [("Qwen3-30B-A3B", "bfloat16", (1, 16, 256, 1024) if quick else (1, 16, 64, 256, 1024), False)]
    if not quick:
        wanted += [("Qwen3-30B-A3B", "float32", (1, 16, 64, 256, 1024), False)]
        wanted += [("Qwen3-30B-A3B", "int4:32", (1, 16, 256), False)]
        wanted += [("gpt-oss-20b", "bfloat16", (1, 256), False)]
        wanted += [("OLMoE", dtype, (1024,), True) for dtype in FLOATS]
    return [
        Problem(model, *MODELS[model], T, dtype, training=training)
        for model, dtype, sizes, training in wanted
        for T in sizes
    ]


def found() -> tuple[dict[str, Path], dict[str, str]]:
    """The Python of moert, first, and of the families that have an environment; why the others are absent."""
    pythons, absent = {"moert": Path(sys.executable)}, {}
    for name in FAMILIES:
        python = ROOT / "build" / "peers" / name / "bin" / "python"
        if not python.exists() and find_spec(name):
            python = Path(sys.executable)
        if python.exists():
            pythons[name] = python
        else:
            absent[name] = "no environment (make bench-peers)"
    return pythons, absent


def started(pythons: dict[str, Path], options: argparse.Namespace, stack: ExitStack) -> list[Family]:
    """moert's process first; the stack ends them."""
    if options.base:  # before there are processes that would wait for it
        site = build(revision := commit(options.base), Path(stack.enter_context(tempfile.TemporaryDirectory())))
    families: list[Family] = []
    for name, python in pythons.items():
        families.append(Family(name, python, options.threads, options.keep_memory))
        stack.callback(families[-1].close)
    if options.base:
        families.append(Base(revision, site, options))
        stack.callback(families[-1].close)
    return families


def limits_of(moert: Family, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of each of LIMITS that this CPU has, before anything else is in memory."""
    answer = moert.ask(limits=4 * seconds_of("read", options))
    if "error" in answer:
        sys.exit(f"the machine's limits must be measured, got {answer['error']}")
    return answer["limits"]


def measure(problem: Problem, families: list[Family], options: argparse.Namespace) -> Row:
    answers = {family: family.load(asdict(problem)) for family in families}
    missing = {name: why for answer in answers.values() for name, why in answer["missing"].items()}
    row = Row(asdict(problem), missing=missing)
    require_moert(row)
    weight_bytes = answers[families[0]]["weight_bytes"]
    row.bytes, row.flop = problem.bytes(weight_bytes), problem.flop
    calls = [(family, name) for family, answer in answers.items() for name in answer["providers"]]
    check(problem, calls, row)
    if problem.training and not options.keep_memory:  # kept memory is there before the step that takes it
        for name, answer in asked(calls, row, lambda name: {"memory": name}, LIMITS):
            if answer["bytes"] is not None:
                row.memory[name] = answer["bytes"] - weight_bytes
    for _ in range(options.turns):
        for name, answer in asked(calls, row, lambda name: {"time": name, "seconds": seconds_of(name, options)}):
            row.times.setdefault(name, []).append(statistics.median(answer["times"]))
        slow = {name for name in row.providers() if row.times[name][0] > SLOW * row.times["moert"][0]}
        calls = [call for call in calls if call[1] not in slow]
    return row


def seconds_of(name: str, options: argparse.Namespace) -> float:
    return options.seconds / 4 if name in LIMITS else options.seconds


def asked(
    calls: list[tuple[Family, str]], row: Row, request: Callable[[str], dict], without: Iterable[str] = ()
) -> Iterator[tuple[str, dict]]:
    """The answer to every call; a call that fails is named, as are all of a family that dies, and taken out."""
    for family, name in list(calls):
        if name in without or (family, name) not in calls:
            continue
        try:
            answer = family.ask(**request(name))
        except RuntimeError as error:
            gone, why = family.providers, str(error)
        else:
            if "error" not in answer:
                yield name, answer
                continue
            gone, why = [name], answer["error"]
        for lost in gone:
            row.missing[lost] = why
            for values in (row.times, row.memory, row.errors):
                values.pop(lost, None)
        calls[:] = [call for call in calls if call[0] is not family or call[1] not in gone]
        require_moert(row)


def check(problem: Problem, calls: list[tuple[Family, str]], row: Row) -> None:
    """What computes something else is no peer: left out and named.  moert must compute it."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: f"{folder}/{i}.npy" for i, (_, name) in enumerate(calls)}
        saved = asked(calls, row, lambda name: {"save": name, "path": paths[name]}, LIMITS)
        outputs = {name: np.load(answer["saved"]) for name, answer in saved}
    expected = problem.gradients() if problem.training else problem.reference()
    size = np.linalg.norm(expected, axis=-1)
    # Experts without rows have none, and what nearly cancels is rounding: a row of a tenth of the median was off by
    # 0.13 in bfloat16, whatever computed it.
    size = np.maximum(size, max(np.median(size) / 4 if problem.training else 0, np.finfo(np.float32).tiny))
    for name, output in outputs.items():
        error = np.linalg.norm(output - expected, axis=-1) / size
        row.errors[name] = float(np.linalg.norm(output - expected) / np.linalg.norm(expected))
        if error.max() < problem.tolerance:
            continue
        row.missing[name] = f"a row is off by {error.max():.2g}"
        calls[:] = [call for call in calls if call[1] != name]
    require_moert(row)


def require_moert(row: Row) -> None:
    if "moert" in row.missing:
        sys.exit(f"{title(row.problem)}: moert must run and be right, got {row.missing['moert']}")


def write(path: Path, facts: dict, limits: dict, rows: list[Row], absent: dict[str, str]) -> None:
    save(path, {"machine": facts, "limits": limits, "absent": absent, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
