"""Times of the operators beside torch, tests of them first.

Without a choice of --op, --dtype, --mode or --shapes: in --quick (one to two minutes, most of it tests) bfloat16 at the
two shapes of the model that `moert run` trains, usually (about four minutes) bfloat16 at every shape of
moert.testing.BENCH_SHAPES, which are decoding, few sequences, prefill and training, and float32 at those two; steps
forward and backward from 1024 tokens on.  With a choice, or in --full (half an hour or more), everything, which is also
larger shapes of some operators.

Rows go to build/bench (or --out), those of a --full run by commit and case by case: it goes on where it was cut off,
and what is to be committed is copied from there to bench/results.  A row: op, provider, mode, dtype, shape, seconds at
p20/p50/p80, roofline share (the time that the machine's own limits would need, sampled beside the call, over the time
taken: the median), threads, commit, date.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from moert.info import openmp_runtimes
from moert.runtime import keep_memory
from moert.testing import BENCH_SHAPES, Shape, row_error
from record import ROOT, bench_facts, commit, done_before, path_of, save, say
from revision import build
from timing import FLOP, Limits, interleaved, percentile

FILES = ROOT / "bench" / "python"
sys.path.append(str(FILES))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("forward", "forward_backward")
SECONDS = {"quick": 0.1, "usual": 0.3, "full": 1.0}  # for each provider of each row
QUICK_SHAPES = 2
STEP_TOKENS = 1024  # of a subset: with fewer nobody trains


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = facts_of(options)
    out = options.out or path_of("base" if options.base else options.size, ".json", facts)
    done = done_before(out, facts) if options.full and not options.base else []
    if not options.smoke and not options.raw:
        run_tests(options.op, options.full)
    runtimes = openmp_runtimes()
    if len(runtimes) > 1:
        sys.exit(f"OpenMP must be loaded once, got {', '.join(runtimes)}")
    if options.keep_memory:
        keep_memory()
    limits = Limits([DTYPES[name] for name in options.dtype])
    if options.raw:
        rows = [row for case in cases(options) for row in bench(*case, options, limits)]
        out.write_text(json.dumps(rows))
        return
    console = Console(width=150)
    rates = limits.rates()
    console.print(f"This machine: {said(rates)}")
    keep = partial(write, out, facts, rates)
    rows = beside_base(options) if options.base else every(options, done, limits, keep, console)
    show(rows, rates, console)
    if options.out or not options.smoke:
        keep(rows)
        say(out, rows, console)


def parse() -> argparse.Namespace:
    ops = sorted(path.stem.removeprefix("bench_") for path in FILES.glob("bench_*.py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help=f"bfloat16 and the first {QUICK_SHAPES} shapes; about a minute"
    )
    size.add_argument(
        "--full", action="store_true", help="everything, for longer, and what was measured before is kept"
    )
    size.add_argument("--smoke", action="store_true", help="smallest shape, one call each, no tests")
    parser.add_argument("--op", nargs="+", choices=ops)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES))
    parser.add_argument("--mode", nargs="+", choices=list(MODES))
    parser.add_argument("--shapes", type=int, help="only the first so many")
    parser.add_argument("--seconds", type=float, help="time for each provider of each row")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--keep-memory", action="store_true", help="so that no page is fresh")
    parser.add_argument("--warm", action="store_true", help="a call right after another, not from cold caches")
    parser.add_argument("--base", metavar="REV", help="also build and time that commit, in turns with this one")
    parser.add_argument("--out", type=Path)
    # One turn of --base: only moert, all times.
    parser.add_argument("--raw", choices=("subset", "all"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.size = next((name for name in ("quick", "full", "smoke") if getattr(options, name)), "usual")
    chosen = options.op or options.dtype or options.mode or options.shapes
    options.subset = options.raw == "subset" if options.raw else not chosen and options.size in ("quick", "usual")
    options.op, options.mode = options.op or ops, options.mode or list(MODES)
    few = {"quick": (["bfloat16"], QUICK_SHAPES), "smoke": (["float32"], 1)}.get(options.size, (list(DTYPES), 99))
    options.dtype, options.shapes = options.dtype or few[0], options.shapes or few[1]
    options.commit = commit("HEAD")  # whatever is committed during the run
    options.seconds = SECONDS.get(options.size, 0.0) if options.seconds is None else options.seconds
    return options


def facts_of(options: argparse.Namespace) -> dict:
    settings = {name: getattr(options, name) for name in ("seconds", "keep_memory")}
    return bench_facts(threads=torch.get_num_threads(), **settings) | {"commit": options.commit}


def write(path: Path, facts: dict, limits: dict, rows: list[dict]) -> None:
    save(path, {"machine": facts, "limits": limits, "rows": rows})


def run_tests(ops: list[str], full: bool) -> None:
    """No speed of an operator that is wrong.  Not full: forward and backward alone."""
    files = [str(ROOT / "tests" / "ops" / f"test_{op}.py") for op in ops]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow and not gpu"]
    command += [] if full else ["-k", "test_forward or test_backward"]
    if subprocess.call([*command, *files], cwd=ROOT):
        sys.exit("the operators' tests must pass before they are timed")


def cases(options: argparse.Namespace) -> list[tuple]:
    """op, dtype, shape, variant (or None) and modes of everything that was asked for."""
    found = []
    for op in options.op:
        module = import_module(f"bench_{op}")
        shapes = getattr(module, "SHAPES", BENCH_SHAPES)[: options.shapes]
        modes = [mode for mode in options.mode if mode in getattr(module, "MODES", MODES)]
        for dtype, shape, variant in product(options.dtype, shapes, getattr(module, "VARIANTS", (None,))):
            wanted = [mode for mode in modes if not options.subset or in_subset(dtype, shape, mode)]
            found += [(op, dtype, shape, variant, wanted)] if wanted else []
    return found


def in_subset(dtype: str, shape: Shape, mode: str) -> bool:
    """Every regime once, and the model that moert run trains in float32."""
    shapes = BENCH_SHAPES if dtype == "bfloat16" else BENCH_SHAPES[:QUICK_SHAPES]
    return shape in shapes and (mode == "forward" or shape.T >= STEP_TOKENS)


def every(
    options: argparse.Namespace, rows: list[dict], limits: Limits, keep: Callable[[list[dict]], None], console: Console
) -> list[dict]:
    """The rows of all cases, those that were measured before among them; a full run keeps each case's at once."""
    with Progress(console=console) as progress:
        task = progress.add_task("operators", total=len(todo := cases(options)))
        for op, dtype, shape, variant, modes in todo:
            name = name_of(op, variant)
            progress.update(task, description=f"{name} {dtype} {shape}")
            done = [case_of(row) for row in rows]
            if left := [mode for mode in modes if (name, str(shape), dtype, caches(options), mode) not in done]:
                rows += map(without_samples, bench(op, dtype, shape, variant, left, options, limits))
                if options.full:
                    keep(rows)
            progress.advance(task)
    return rows


def bench(op: str, dtype: str, shape: Shape, variant: str | None, modes: list[str], options, limits: Limits):
    """The rows of one case."""
    torch.manual_seed(0)
    case = import_module(f"bench_{op}").case(shape, DTYPES[dtype], *([variant] if variant else []))
    name = name_of(op, variant)
    check(name, shape, case)
    return [row for mode in modes for row in measure(name, case, mode, dtype, shape, options, limits)]


def name_of(op: str, variant: str | None) -> str:
    return f"{op} {variant}" if variant else op


def caches(options: argparse.Namespace) -> str:
    return "warm" if options.warm else "cold"


def without_samples(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in ("times", "ideals")}


def check(op: str, shape: Shape, case) -> None:
    """A provider that computes something else is not a baseline; the operator's own accuracy is its tests' matter."""
    outputs = {name: provider(*case.inputs) for name, provider in case.providers.items()}
    for name, output in outputs.items():
        if (error := row_error(output, outputs["torch"])) > 0.05:
            sys.exit(f"{op} {shape}: {name} must agree with torch, got a row that is off by {error:.2g}")


def measure(op, case, mode: str, dtype: str, shape: Shape, options, limits: Limits) -> list[dict]:
    providers = {"moert": case.providers["moert"]} if options.raw else case.providers
    calls = {name: call(provider, case.inputs, mode) for name, provider in providers.items()}
    products = limits.of(dtype)
    bounds = {name: limits.functions[name] for name in (case.like, *products)}
    rounds = 1 if options.smoke else None
    times = interleaved(calls, options.seconds, rounds, cold=not options.warm, limits=bounds)
    work = 1 if mode == "forward" else 3
    forward = mode == "forward" or case.step_bytes is None
    moved = (work * case.bytes if forward else case.step_bytes) / limits.work[case.like]
    computed = work * case.flop / FLOP
    fastest = map(min, zip(*(times[name] for name in products), strict=True))
    ideals = [max(moved * m, computed * c) for m, c in zip(times[case.like], fastest, strict=True)]
    key = {"op": op, "mode": mode, "dtype": dtype, "shape": str(shape), "caches": caches(options)}
    key["commit"] = options.commit
    return [row({**key, "provider": name}, times[name], ideals) for name in calls]


def row(key: dict, times: list[float], ideals: list[float]) -> dict:
    p20, p50, p80 = (percentile(times, share) for share in (0.2, 0.5, 0.8))
    share = statistics.median(ideal / t for ideal, t in zip(ideals, times, strict=True))
    today = datetime.now(timezone.utc).date().isoformat()
    facts = {"threads": torch.get_num_threads(), "date": today}
    measured = {"metric": "seconds", "p20": p20, "p50": p50, "p80": p80, "samples": len(times), "times": times}
    return {**key, **measured, "ideals": ideals, "roofline_share": share, **facts}


def call(provider, inputs, mode: str):
    if mode == "forward":
        return lambda: provider(*inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]

    def step():
        y = provider(*leaves)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return step


def beside_base(options: argparse.Namespace) -> list[dict]:
    """moert of this tree and of another commit, in turns: two builds cannot be in one process."""
    revision = commit(options.base)
    rows: dict[tuple, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        site = build(revision, Path(folder))
        turns = 1 if options.smoke else 3
        for op in options.op:
            for _ in range(turns):
                for provider, path in (("moert", None), ("base", site)):
                    for got in turn(options, op, path, Path(folder) / "rows.json", turns):
                        key = (got["op"], got["dtype"], got["shape"], got["mode"], provider)
                        before = rows.get(key, {"times": [], "ideals": []})
                        samples = (before[name] + got[name] for name in ("times", "ideals"))
                        rows[key] = row({**got, "provider": provider}, *samples)
                        rows[key]["commit"] = revision if path else got["commit"]
    for key, found in rows.items():
        if key[-1] == "base":  # an older commit has no peak to be held to: the limits are this one's
            this = rows[(*key[:-1], "moert")]
            found["roofline_share"] = this["roofline_share"] * this["p50"] / found["p50"]
    return [without_samples(row) for row in rows.values()]


def turn(options: argparse.Namespace, op: str, site: Path | None, out: Path, turns: int) -> list[dict]:
    command = [sys.executable, str(ROOT / "bench" / "run.py"), "--raw", "subset" if options.subset else "all"]
    command += ["--out", str(out), "--op", op]
    command += ["--dtype", *options.dtype, "--mode", *options.mode, "--shapes", str(options.shapes)]
    command += ["--seconds", str(options.seconds / turns), "--threads", str(torch.get_num_threads())]
    command += [f"--{name}" for name, on in (("keep-memory", options.keep_memory), ("warm", options.warm)) if on]
    environment = {**os.environ, **({"PYTHONPATH": str(site)} if site else {})}
    subprocess.check_call(command + (["--smoke"] if options.smoke else []), env=environment)
    return json.loads(out.read_text())


def said(rates: dict) -> str:
    known = {"FMA peak": "FMA peak"} | {name: f"torch's {name} product" for name in DTYPES}
    products = (f"{said} {rates[name] / 1e9:.0f} GFLOP/s" for name, said in known.items() if name in rates)
    moves = (f"{name} {rates[name] / 1e9:.1f} GB/s" for name in ("read", "copy"))
    return "; ".join((*moves, *products))


def show(rows: list[dict], rates: dict, console: Console) -> None:
    """Milliseconds, and how many times as fast as torch (or the base commit) at the median."""
    table = Table(title=said(rates))
    for column in ("op", "shape", "dtype", "mode", "provider", "ms p50 (p20-p80)", "roofline", "speedup"):
        table.add_column(column, justify="right" if column in ("roofline", "speedup") else "left")
    base = {case_of(r): r["p50"] for r in rows if r["provider"] in ("torch", "base")}
    for r in rows:
        ms = f"{1e3 * r['p50']:.3f} ({1e3 * r['p20']:.3f}-{1e3 * r['p80']:.3f})"
        cells = (f"{r['roofline_share']:.0%}", f"{base[case_of(r)] / r['p50']:.2f}x")
        table.add_row(r["op"], r["shape"], r["dtype"], r["mode"], r["provider"], ms, *cells)
    console.print(table)


def case_of(row: dict) -> tuple:
    return row["op"], row["shape"], row["dtype"], row["caches"], row["mode"]


if __name__ == "__main__":
    main()
