"""The CUDA operators beside the card's limits and every peer that can be imported; `--help` says the options.

Every provider is compared with moert before it is timed, captured as a CUDA graph where it can be, and started from
cold caches, in turns.  A floor is the larger of bytes over read bandwidth and FLOP over the rate of a dense product.
Rows go to bench/results/<gpu>.json with GPU, driver, torch and commit.
"""

import argparse
import subprocess
import sys
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import gpu_cases
from gpu_clock import Clock
from moert import cuda
from moert.cli.machine import machine_facts
from moert.testing import row_error
from record import commit, default_path, save, say

DECODE, PREFILL = (1, 4, 8, 16, 64), (256, 1024, 8192)
PERSISTENT = "moert persistent"  # moert with MOERT_PERSISTENT_GEMM=1
# moert in another way, a line of its own: with MOERT_FUSED_COMBINE=1, weights that lie turned, gradients added, rows of
# packed experts rounded.
ROWS = (" int8", " int8_group32", " fp8_group128")
WAYS = ("", " fused combine", " turned", " main_grad", *ROWS)
OWN = tuple(name + way for name in ("moert", PERSISTENT) for way in WAYS)  # no peers
AGREE = 0.05  # the worst row's error: bfloat16 twice over; a wrong expert is off by 1
LAYER = gpu_cases.Layer("small", 32, 16, 8, 2, turned=True)  # --smoke


def main() -> None:
    options = parse()
    if options.device == "cuda":
        refuse()
    clock = Clock(options.device, 2 if options.smoke else 20)
    console = Console(width=150)
    limits = clock.limits(64 if options.smoke else 8192)
    show_limits(limits, console)
    todo, rows = chosen(options), []
    with Progress(console=console) as progress:
        task = progress.add_task("GPU", total=len(todo))
        for layer, T, routing in todo:
            progress.update(task, description=f"{layer.name} T={T} {routing}")
            for problem in gpu_cases.problems(layer, T, routing, options.device, step=T >= 1024 or options.smoke):
                rows.append(measure(problem, clock, limits))
            progress.advance(task)
    show(rows, console)
    if options.out or not options.smoke:
        facts = gpu_facts() if options.device == "cuda" else machine_facts(("torch",))
        out = options.out or default_path(facts.get("gpu", "cpu")).with_suffix(".gpu.json")
        save(out, {"machine": {**facts, "commit": commit("HEAD")}, "limits": limits, "rows": rows})
        say(out, rows, console)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two models, few T: about three minutes")
    parser.add_argument("--smoke", action="store_true", help="a tiny layer, two samples")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this out")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def refuse() -> None:
    if not torch.cuda.is_available():
        sys.exit("a GPU must be there, got none that torch can use")
    if not cuda.is_built():
        sys.exit("moert must be built with MOERT_CUDA=ON, got a build for the CPU alone: docs/build.md")


def chosen(options) -> list[tuple[gpu_cases.Layer, int, str]]:
    """Layers of the models by tokens and routing."""
    if options.smoke:
        return [(LAYER, T, "uniform") for T in (1, 24)]
    if options.quick:
        return [(layer, T, "uniform") for layer, T in product(gpu_cases.MODELS[:2], (1, 4, 16, 64, 1024, 8192))]
    models = list(product(gpu_cases.MODELS, DECODE + PREFILL, ("uniform", "zipf")))
    return models + [(layer, 32768, "uniform") for layer in (gpu_cases.MODELS[0], *gpu_cases.SONIC)]


def measure(problem: gpu_cases.Problem, clock: Clock, limits: dict) -> dict:
    """The providers that agree, timed in turns; why the others were left out."""
    wanted, timed, left_out = problem.providers["moert"]().float(), {}, {}
    for name, call in problem.providers.items():
        try:
            got = call().float()
            error = float(not torch.equal(got, wanted)) if problem.exact else row_error(got, wanted)
            if error > AGREE:
                left_out[name] = f"a row is off by {error:.2g}"
            else:
                timed[name] = clock.prepare(call)
        except Exception as error:  # a peer's: whatever it is, it is no reason to lose the run
            if name == "moert":
                raise
            left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    clock.run(list(timed.values()))
    floor = max(problem.bytes / limits["read_bytes_per_second"], problem.flop / limits["bfloat16_flop_per_second"])
    seconds = {name: provider.median for name, provider in timed.items()}
    return {
        "op": problem.op,
        "shape": problem.shape,
        "bytes": problem.bytes,
        "flop": problem.flop,
        "floor": floor,
        "seconds": seconds,
        "share": floor / seconds["moert"],
        "tflops": problem.flop / seconds["moert"] / 1e12,
        "graph": {name: provider.graph for name, provider in timed.items()},
        "left_out": left_out,
    }


def gpu_facts() -> dict:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = None
    facts = machine_facts(("torch", "transformers", "liger-kernel", "megatron-core", "scattermoe"))
    return {"gpu": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda, **facts}


def show_limits(limits: dict, console: Console) -> None:
    console.print(
        f"copy {limits['copy_bytes_per_second'] / 1e12:.2f} TB/s, read {limits['read_bytes_per_second'] / 1e12:.2f} "
        f"TB/s, dense bfloat16 {limits['bfloat16_flop_per_second'] / 1e12:.0f} TFLOP/s"
    )


def show(rows: list[dict], console: Console) -> None:
    table = Table(
        "operator", "layer", "floor us", "moert us", "persistent us", "share", "TFLOP/s", "best peer", "peer / moert"
    )
    for row in rows:
        for way in WAYS:
            if f"moert{way}" in row["seconds"]:
                table.add_row(*cells(row, way))
    console.print(table)
    for name, why in sorted({(name, why) for row in rows for name, why in row["left_out"].items()}):
        console.print(f"left out: {name}: {why}")


def cells(row: dict, way: str) -> tuple[str, ...]:
    """A line of the table."""
    seconds = row["seconds"]
    own, persistent = seconds[f"moert{way}"], seconds.get(PERSISTENT + way)
    peers = {name: time for name, time in seconds.items() if name not in OWN}
    best = min(peers, key=peers.get, default=None)
    name = f"{best}{'' if row['graph'].get(best) else ' (no graph)'}" if best else "-"
    return (
        row["op"] + way,
        row["shape"],
        f"{row['floor'] * 1e6:.1f}",
        f"{own * 1e6:.1f}",
        f"{persistent * 1e6:.1f}" if persistent else "-",
        f"{row['floor'] / own:.2f}",
        f"{row['flop'] / own / 1e12:.0f}" if row["flop"] else "-",
        name,
        f"{peers[best] / own:.2f}" if best else "-",
    )


if __name__ == "__main__":
    main()
