"""Two nodes of two ranks on this machine: network namespaces joined by a link of a given rate, unshaped inside.

    python bench/two_nodes.py [--rate 100mbit] [--smoke]        (as root, with ip and tc)

Dispatch and combine straight, in two levels (2DH), and two exchanges of the same bytes, sizes known; the gain of an
ExpertParallel's parts (degree), forward and with its backward.  Writes bench/results/two_nodes.json.  Each rank is a
process with one thread; the link has a queue, and no latency beyond this machine's own.  Letters: T tokens of a rank,
k choices, E experts, H hidden, I intermediate.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from datetime import datetime, timedelta, timezone
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from exchange import bytes_alone, figures, interleaved
from moert import GluExperts
from moert.cli.machine import machine_facts
from moert.ops import ExpertMap, Ranks, combine, dispatch
from moert.parallel import ExpertParallel
from moert.testing import random_routing

OUT = Path(__file__).resolve().parent / "results" / "two_nodes.json"
NODES, LOCAL = 2, 2
SHAPES = ((1, 16, 4, 1024), (4, 16, 4, 1024), (64, 16, 4, 1024), (256, 16, 4, 1024), (256, 64, 8, 2048))  # T, E, k, H
LAYER, DEGREES = (256, 16, 4, 1024, 768), (1, 2, 4, 8)  # T, E, k, H, I
SMOKE = ((2, 4, 2, 64),), (8, 4, 2, 64, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="100mbit", help="of the link, each way, in tc's words")
    parser.add_argument("--seconds", type=float, default=6.0, help="for all ways of a shape together")
    parser.add_argument("--smoke", action="store_true", help="small shapes, a few calls; writes nothing")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        return rank_main(options)
    if os.geteuid() != 0:
        sys.exit("two_nodes.py needs root, to make network namespaces; bench/simulate.py has a model of the same")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        names = two_namespaces(stack, options.rate)
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "link0", "STORE": f"file://{folder}/store"}
        processes = [
            subprocess.Popen(
                ["ip", "netns", "exec", names[rank // LOCAL], sys.executable, *sys.argv, "--rank", str(rank)],
                env=environment,
            )
            for rank in range(NODES * LOCAL)
        ]
        sys.exit(max(process.wait() for process in processes))


def rank_main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=120)  # a rank that fails must not keep the others for half an hour
    size = NODES * LOCAL
    dist.init_process_group("gloo", os.environ["STORE"], rank=options.rank, world_size=size, timeout=limit)
    shapes, layer = SMOKE if options.smoke else (SHAPES, LAYER)
    seconds = 0.0 if options.smoke else options.seconds
    rows = [row for shape in shapes for row in bench_ways(*shape, seconds)]
    rows += [row for backward in (False, True) for row in bench_degrees(*layer, backward, seconds)]
    if options.rank == 0:
        show(rows, options.rate)
        if not options.smoke:
            save(options, rows)
    dist.destroy_process_group()


def bench_ways(T: int, E: int, k: int, H: int, seconds: float) -> list[dict]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(T, H, generator=generator).bfloat16()
    routing, experts = random_routing(T, E, k, generator=generator), ExpertMap.of(None, E, NODES * LOCAL)
    ways = {"straight": Ranks(), "two levels": Ranks.in_nodes(LOCAL)}
    calls = {
        name: lambda way=way: combine((there := dispatch(x, routing, experts, way)).x, there)
        for name, way in ways.items()
    }
    calls["bytes alone"] = bytes_alone(x, routing, experts)
    return told("dispatch and combine", f"T{T}-E{E}-k{k}-H{H}", interleaved(calls, seconds))


def bench_degrees(T: int, E: int, k: int, H: int, I: int, backward: bool, seconds: float) -> list[dict]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(T, H, generator=generator).bfloat16().requires_grad_(backward)
    routing, experts = random_routing(T, E, k, generator=generator), GluExperts(E, H, I).bfloat16()
    layers = {f"{degree} parts": ExpertParallel(experts, degree=degree) for degree in DEGREES}

    def call(layer):
        with torch.set_grad_enabled(backward):
            y = layer(x, routing)
            if backward:
                y.sum().backward()

    local, there = layers["1 parts"].local, dispatch(x.detach(), routing, layers["1 parts"].map)

    def experts_alone():
        with torch.set_grad_enabled(backward):
            y = local(there.x.detach().requires_grad_(backward), there.routing)
            if backward:
                y.sum().backward()

    calls = {name: lambda layer=layer: call(layer) for name, layer in layers.items()} | {"experts alone": experts_alone}
    what = "forward and backward" if backward else "forward"
    return told(what, f"T{T}-E{E}-k{k}-H{H}-I{I}", interleaved(calls, seconds))


def told(what: str, shape: str, times: dict[str, list[float]]) -> list[dict]:
    """A row for each way, beside the first."""
    rows = [{"what": what, "shape": shape, "way": name, **figures(values)} for name, values in times.items()]
    return [row | {"p50_beside_the_first": row["p50"] / rows[0]["p50"]} for row in rows]


def show(rows: list[dict], rate: str) -> None:
    table = Table(title=f"{NODES} nodes of {LOCAL} ranks, {rate} between them, bfloat16")
    for column in ("what", "shape", "way", "ms p50 (p20-p80)", "beside the first"):
        table.add_column(column)
    for row in rows:
        ms = f"{1e3 * row['p50']:.1f} ({1e3 * row['p20']:.1f}-{1e3 * row['p80']:.1f})"
        table.add_row(row["what"], row["shape"], row["way"], ms, f"{row['p50_beside_the_first']:.2f}x")
    Console(width=130).print(table)


def save(options: argparse.Namespace, rows: list[dict]) -> None:
    value = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine_facts(("torch",)),
        "what": "Gloo, two network namespaces of two ranks, tbf on the link between; s of the slowest rank",
        "rate": options.rate,
        "rows": rows,
    }
    options.out.write_text(json.dumps(value, indent=1) + "\n")


def two_namespaces(stack: ExitStack, rate: str) -> list[str]:
    """Names; they end with the stack."""
    names = [f"moert{os.getpid()}n{node}" for node in range(NODES)]
    for name in names:
        run("ip", "netns", "add", name)
        stack.callback(run, "ip", "netns", "del", name)
    run("ip", "link", "add", "link0", "netns", names[0], "type", "veth", "peer", "name", "link0", "netns", names[1])
    for node, name in enumerate(names):
        inside = ("ip", "netns", "exec", name)
        run(*inside, "ip", "addr", "add", f"10.77.0.{node + 1}/24", "dev", "link0")
        run(*inside, "ip", "link", "set", "lo", "up")
        run(*inside, "ip", "link", "set", "link0", "up")
        run(
            *inside, "tc", "qdisc", "add", "dev", "link0", "root", "tbf", "rate", rate, "burst", "64kb", "latency", "2s"
        )
    return names


def run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
