"""The benches' only entry: tests first, then times.  `bench/run.py --help` says the options.

Rows go to bench/results/<machine>.json (or --out): op, provider, mode, dtype, shape, seconds at p20/p50/p80, roofline
share (the time that the machine's own limits would need, sampled beside the call, over the time taken: the median),
threads, commit, date.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from importlib import import_module
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from moert.cli.machine import machine_facts
from moert.info import openmp_runtimes
from moert.runtime import keep_memory
from moert.testing import BENCH_SHAPES, Shape, row_error
from timing import Limits, interleaved, percentile

ROOT = Path(__file__).resolve().parents[1]
FILES = ROOT / "bench" / "python"
sys.path.append(str(FILES))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("forward", "forward_backward")


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.smoke:
        options.dtype, options.shapes = ["float32"], 1
    elif not options.raw:
        run_tests(options.op)
    runtimes = openmp_runtimes()
    if len(runtimes) > 1:
        sys.exit(f"OpenMP must be loaded once, got {', '.join(runtimes)}")
    facts = {**machine_facts(("torch",)), "threads": torch.get_num_threads(), "commit": commit("HEAD")}
    if options.keep_memory:
        keep_memory()
    limits = Limits([DTYPES[name] for name in options.dtype])
    rows = beside_base(options) if options.base else [row for op in options.op for row in bench(op, options, limits)]
    if options.raw:
        options.out.write_text(json.dumps(rows))
        return
    rows = [{name: value for name, value in row.items() if name not in ("times", "ideals")} for row in rows]
    rates = limits.rates()
    show(rows, rates)
    if options.out or not options.smoke:
        save(options.out or default_path(facts["processor"]), {"machine": facts, "limits": rates, "rows": rows})


def parse() -> argparse.Namespace:
    ops = sorted(path.stem.removeprefix("bench_") for path in FILES.glob("bench_*.py"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", nargs="+", default=ops, choices=ops)
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--mode", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--shapes", type=int, default=99, help="only the first so many")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each provider of each row")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--keep-memory", action="store_true", help="so that no page is fresh")
    parser.add_argument("--warm", action="store_true", help="a call right after another, not from cold caches")
    parser.add_argument("--base", metavar="REV", help="also build and time that commit, in turns with this one")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="smallest shape, one call each, no tests")
    parser.add_argument(
        "--raw", action="store_true", help=argparse.SUPPRESS
    )  # one turn of --base: only moert, all times
    return parser.parse_args()


def run_tests(ops: list[str]) -> None:
    """No speed of an operator that is wrong."""
    files = [str(ROOT / "tests" / "ops" / f"test_{op}.py") for op in ops]
    if subprocess.call([sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow and not gpu", *files], cwd=ROOT):
        sys.exit("the operators' tests must pass before they are timed")


def bench(op: str, options: argparse.Namespace, limits: Limits) -> list[dict]:
    """The rows of one operator."""
    module = import_module(f"bench_{op}")
    shapes = getattr(module, "SHAPES", BENCH_SHAPES)[: options.shapes]
    rows = []
    for dtype, shape, variant in product(options.dtype, shapes, getattr(module, "VARIANTS", (None,))):
        torch.manual_seed(0)
        case = module.case(shape, DTYPES[dtype], *([variant] if variant else []))
        name = f"{op} {variant}" if variant else op
        check(name, shape, case)
        for mode in (mode for mode in options.mode if mode in getattr(module, "MODES", MODES)):
            rows += measure(name, case, mode, dtype, shape, options, limits)
    return rows


def check(op: str, shape: Shape, case) -> None:
    """A provider that computes something else is not a baseline; the operator's own accuracy is its tests' matter."""
    outputs = {name: provider(*case.inputs) for name, provider in case.providers.items()}
    for name, output in outputs.items():
        if (error := row_error(output, outputs["torch"])) > 0.05:
            sys.exit(f"{op} {shape}: {name} must agree with torch, got a row that is off by {error:.2g}")


def measure(op, case, mode: str, dtype: str, shape: Shape, options, limits: Limits) -> list[dict]:
    providers = {"moert": case.providers["moert"]} if options.raw else case.providers
    calls = {name: call(provider, case.inputs, mode) for name, provider in providers.items()}
    bounds = {name: limits.functions[name] for name in (case.like, dtype)}
    rounds = 1 if options.smoke else None
    times = interleaved(calls, options.seconds, rounds, cold=not options.warm, limits=bounds)
    work = 1 if mode == "forward" else 3
    forward = mode == "forward" or case.step_bytes is None
    moved = (work * case.bytes if forward else case.step_bytes) / limits.work[case.like]
    computed = work * case.flop / limits.work[dtype]
    ideals = [max(moved * m, computed * c) for m, c in zip(times[case.like], times[dtype], strict=True)]
    key = {"op": op, "mode": mode, "dtype": dtype, "shape": str(shape), "caches": "warm" if options.warm else "cold"}
    return [row({**key, "provider": name}, times[name], ideals) for name in calls]


def row(key: dict, times: list[float], ideals: list[float]) -> dict:
    p20, p50, p80 = (percentile(times, share) for share in (0.2, 0.5, 0.8))
    share = statistics.median(ideal / t for ideal, t in zip(ideals, times, strict=True))
    today = datetime.now(timezone.utc).date().isoformat()
    facts = {"threads": torch.get_num_threads(), "commit": commit("HEAD"), "date": today}
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
    return list(rows.values())


def build(revision: str, folder: Path) -> Path:
    """Installs that commit under folder; returns what to put on PYTHONPATH."""
    tree, site = folder / "tree", folder / "site"
    subprocess.check_call(["git", "worktree", "add", "--quiet", "--detach", str(tree), revision], cwd=ROOT)
    try:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
        subprocess.check_call([*pip, "--target", str(site), str(tree)])
    finally:
        subprocess.check_call(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT)
    return site


def turn(options: argparse.Namespace, op: str, site: Path | None, out: Path, turns: int) -> list[dict]:
    command = [sys.executable, str(ROOT / "bench" / "run.py"), "--raw", "--out", str(out), "--op", op]
    command += ["--dtype", *options.dtype, "--mode", *options.mode, "--shapes", str(options.shapes)]
    command += ["--seconds", str(options.seconds / turns), "--threads", str(torch.get_num_threads())]
    command += [f"--{name}" for name, on in (("keep-memory", options.keep_memory), ("warm", options.warm)) if on]
    # In front of everything, also of an editable install's finder: its hooks only answer what the path does not.
    environment = {**os.environ, **({"PYTHONPATH": str(site)} if site else {})}
    subprocess.check_call(command + (["--smoke"] if options.smoke else []), env=environment)
    return json.loads(out.read_text())


def show(rows: list[dict], rates: dict) -> None:
    """Milliseconds, and how many times as fast as torch (or the base commit) at the median."""
    products = (f"{name} product {rates[name] / 1e9:.0f} GFLOP/s" for name in DTYPES if name in rates)
    moves = (f"{name} {rates[name] / 1e9:.1f} GB/s" for name in ("read", "copy"))
    table = Table(title="; ".join((*moves, *products)))
    for column in ("op", "shape", "dtype", "mode", "provider", "ms p50 (p20-p80)", "roofline", "speedup"):
        table.add_column(column, justify="right" if column in ("roofline", "speedup") else "left")
    base = {case_of(r): r["p50"] for r in rows if r["provider"] in ("torch", "base")}
    for r in rows:
        ms = f"{1e3 * r['p50']:.3f} ({1e3 * r['p20']:.3f}-{1e3 * r['p80']:.3f})"
        cells = (f"{r['roofline_share']:.0%}", f"{base[case_of(r)] / r['p50']:.2f}x")
        table.add_row(r["op"], r["shape"], r["dtype"], r["mode"], r["provider"], ms, *cells)
    Console(width=150).print(table)


def case_of(row: dict) -> tuple:
    return row["op"], row["shape"], row["dtype"], row["mode"]


def save(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)
    Console().print(f"{len(value['rows'])} rows in {path}")


def default_path(processor: str) -> Path:
    return ROOT / "bench" / "results" / (re.sub(r"[^a-z0-9]+", "-", processor.lower()).strip("-") + ".json")


def commit(revision: str) -> str | None:
    """The commit's short name; None for HEAD outside a repository."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "--verify", revision], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode and revision != "HEAD":
        sys.exit(f"base must be a commit, got {revision}")
    return done.stdout.strip() or None


if __name__ == "__main__":
    main()
