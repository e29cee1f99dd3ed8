"""dispatch and combine beside the exchanges that one would write by hand; each rank of torchrun is a process.

    torchrun --nproc-per-node 4 bench/exchange.py [--keep-memory] [--dtype float32] [--smoke]

Writes bench/results/exchange.json, where rows of another number of ranks or dtype, and of memory kept or not, stay.

No experts in the first table: rows go there and back; lines that begin with "of it" are pieces of moert's way, alone.
In the second an ExpertParallel's forward, its tokens cut into 1, 2, 4 and 8 parts.
Letters: T tokens of a rank, k choices, E experts, R ranks, H hidden, I intermediate.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moert import GluExperts
from moert.cli.machine import machine_facts
from moert.ops import Dispatched, ExpertMap, combine, dispatch
from moert.ops.all_to_all import at_home, exchange_counts, send_rows
from moert.ops.dispatch import FACTS, record_bytes
from moert.ops.permute import unpermute
from moert.ops.ranks import Ranks
from moert.parallel import ExpertParallel
from moert.runtime import keep_memory
from moert.testing import random_routing
from moert.types import Routing

OUT = Path(__file__).resolve().parent / "results" / "exchange.json"
DEGREES, LAYER = (1, 2, 4, 8), (1024, 16, 4, 2048, 512)  # T, E, k, H, I
SHAPES = ((256, 64, 8, 2048), (1024, 64, 8, 2048), (4096, 64, 8, 2048), (1024, 8, 2, 4096))  # T, E, k, H
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="for all providers of a shape together")
    parser.add_argument("--smoke", action="store_true", help="the smallest shape, a few calls; writes nothing")
    parser.add_argument("--keep-memory", action="store_true", help="as moert.runtime.keep_memory() does, for all ways")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.keep_memory:
        keep_memory()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    shapes, seconds = (SHAPES[:1], 0.0) if options.smoke else (SHAPES, options.seconds)
    rows = [row for shape in shapes for row in bench(*shape, DTYPES[options.dtype], seconds)]
    rows += bench_degrees(*((16, 4, 2, 64, 32) if options.smoke else LAYER), DTYPES[options.dtype], seconds)
    if dist.get_rank() == 0:
        show([row for row in rows if "degree" not in row])
        show([row for row in rows if "degree" in row])
        if not options.smoke:
            save(options.out, [row | {"kept_memory": options.keep_memory} for row in rows])
    dist.destroy_process_group()


def bench(T: int, E: int, k: int, H: int, dtype: torch.dtype, seconds: float) -> list[dict]:
    rank, R = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(T, H, generator=generator).to(dtype)
    routing, experts = random_routing(T, E, k, generator=generator), ExpertMap.of(None, E, R)
    got = dispatch(x, routing, experts)
    y = got.x.contiguous()  # what experts would make of it
    calls = {
        "bytes alone": bytes_alone(x, routing, experts),
        "moert": lambda: combine(y, dispatch(x, routing, experts)),
        **pieces(x, routing, experts, got),
        "moert, int8 there": lambda: combine(y, dispatch(x, routing, experts, payload="int8")),
        "by hand": lambda: by_hand(x, y, got),
        "a copy a choice": lambda: choice_copies(x, routing, experts),
        "all-gather, reduce-scatter": lambda: everything(x),
    }
    away = sum(n for r, n in enumerate(got.splits.sent) if r != rank)
    choices = sum(1 for e in routing.ids.flatten().tolist() if experts.expert_to_rank[e] != rank)
    sent = {
        "of it: the others' bytes alone": away,
        "of it: counts": 0,
        "of it: packing": 0,
        "of it: adding up": 0,
        "moert": away,
        "moert, int8 there": away,
        "by hand": away,
        "bytes alone": away,
        "a copy a choice": choices,
        "all-gather, reduce-scatter": T * (R - 1),
    }
    times = interleaved(calls, seconds)
    base = statistics.median(times["bytes alone"])
    key = {"shape": f"T{T}-E{E}-k{k}-H{H}", "ranks": R, "dtype": str(dtype).removeprefix("torch.")}
    return [
        {
            **key,
            "provider": name,
            "rows_sent_by_rank_0": sent[name],
            **figures(values),
            "p50_beside_bytes_alone": statistics.median(values) / base,
            **({"bytes_beside_rows": bytes_beside_rows(x, routing, got)} if name == "moert" else {}),
        }
        for name, values in times.items()
    ]


def bench_degrees(T: int, E: int, k: int, H: int, I: int, dtype: torch.dtype, seconds: float) -> list[dict]:
    rank, R = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(T, H, generator=generator).to(dtype)
    routing, experts = random_routing(T, E, k, generator=generator), GluExperts(E, H, I).to(dtype)
    layers = {f"{degree} parts": ExpertParallel(experts, degree=degree) for degree in DEGREES}
    with torch.no_grad():
        times = interleaved({name: lambda layer=layer: layer(x, routing) for name, layer in layers.items()}, seconds)
        sent = dispatch(x, routing, layers["1 parts"].map).splits.sent
    base = statistics.median(times["1 parts"])
    key = {"shape": f"T{T}-E{E}-k{k}-H{H}-I{I}", "ranks": R, "dtype": str(dtype).removeprefix("torch.")}
    return [
        {
            **key,
            "provider": name,
            "degree": degree,
            "rows_sent_by_rank_0": sum(n for r, n in enumerate(sent) if r != rank),
            **figures(values),
            "p50_beside_one_part": statistics.median(values) / base,
        }
        for degree, (name, values) in zip(DEGREES, times.items(), strict=True)
    ]


def bytes_beside_rows(x: Tensor, routing: Routing, got: Dispatched) -> float:
    """All that rank 0 sends, counts included, over the rows that it must send: one a token and rank, there and back."""
    there, back = (sum(n) - n[got.splits.ranks.rank] for n in (got.splits.sent, got.splits.received))
    record = record_bytes(x.dtype, routing.weights.dtype, x.shape[1], routing.ids.shape[1])
    counts = 8 * (1 + len(FACTS)) * (got.splits.ranks.size - 1)
    return (there * record + back * x[0].nbytes + counts) / ((there + back) * x[0].nbytes)


def figures(values: list[float]) -> dict:
    values, n = sorted(values), len(values)
    return {"p50": statistics.median(values), "p20": values[n // 5], "p80": values[n * 4 // 5], "samples": n}


def bytes_alone(x: Tensor, routing: Routing, experts: ExpertMap) -> Callable[[], None]:
    """The same bytes there and back by two all_to_all_single, sizes known and buffers ready."""
    got = dispatch(x, routing, experts)
    size = torch.ops.moert.dispatch_pack(
        x, routing.weights, routing.ids, experts.expert_to_rank, experts.local_ids, got.plan.offsets, got.plan.tokens
    ).shape[1]
    there, back = (torch.zeros(sum(got.splits.sent), n, dtype=torch.uint8) for n in (size, x.shape[1] * x.itemsize))
    arrived, results = (there.new_empty(sum(got.splits.received), n) for n in (size, back.shape[1]))

    def run():
        dist.all_to_all_single(arrived, there, got.splits.received, got.splits.sent)
        dist.all_to_all_single(back, results, got.splits.sent, got.splits.received)

    return run


def pieces(x: Tensor, routing: Routing, experts: ExpertMap, got: Dispatched) -> dict[str, Callable]:
    """What dispatch and combine consist of, each alone: on the first and last rank own rows do not travel."""
    plan, counts = got.plan, got.plan.offsets.diff()
    args = routing.weights, routing.ids, experts.expert_to_rank, experts.local_ids, plan.offsets, plan.tokens
    records, y = torch.ops.moert.dispatch_pack(x, *args), got.x.contiguous()
    mine, came = (at_home(each, got.splits.ranks, x.device) for each in (got.splits.sent, got.splits.received))
    there, back = records if mine is None else records[mine.others], y if came is None else y[came.others]
    splits = got.splits if mine is None else got.splits.others
    arrived, results = there.new_empty(sum(splits.received), there.shape[1]), back.new_empty(len(there), back.shape[1])
    bytes_back, into_back = back.view(torch.uint8), results.view(torch.uint8)
    rows = torch.zeros(len(records), x.shape[1], dtype=x.dtype)

    def others():
        dist.all_to_all_single(arrived, there, splits.received, splits.sent)
        dist.all_to_all_single(into_back, bytes_back, splits.sent, splits.received)

    return {
        "of it: the others' bytes alone": others,
        "of it: counts": lambda: exchange_counts(counts, dict.fromkeys(FACTS, 0), got.splits.ranks),
        "of it: packing": lambda: torch.ops.moert.dispatch_pack_(records, x, *args, 0, "none"),
        "of it: adding up": lambda: unpermute(rows, plan),
    }


def by_hand(x: Tensor, y: Tensor, got: Dispatched) -> Tensor:
    """The same rows without their routing, which both sides know already: gathered, sent, sent back, added up."""
    tokens = got.plan.tokens.long()
    send_rows(x[tokens], got.splits)
    back, _ = send_rows(y, got.splits.reversed)
    return torch.zeros(x.shape).index_add_(0, tokens, back.float()).to(x.dtype)


def choice_copies(x: Tensor, routing: Routing, experts: ExpertMap) -> Tensor:
    """A row for each choice, sorted by expert, and the weighted sum at home."""
    T, k = routing.ids.shape
    where = experts.expert_to_rank[routing.ids.long()].flatten()
    order = where.argsort(stable=True)
    splits = exchange_counts(torch.bincount(where, minlength=dist.get_world_size()), {"H": x.shape[1]}, Ranks())
    arrived, _ = send_rows(x[order // k], splits)
    back, _ = send_rows(arrived, splits.reversed)
    rows = torch.empty_like(back)
    rows[order] = back
    return (rows.view(T, k, -1) * routing.weights[..., None].to(x.dtype)).sum(1)


def everything(x: Tensor) -> Tensor:
    """All tokens to all ranks, and every rank's partial sums of all tokens added up (in float32: Gloo's)."""
    whole = x.new_empty(len(x) * dist.get_world_size(), x.shape[1])
    dist.all_gather_into_tensor(whole, x)
    partial, y = whole.float(), torch.empty(x.shape)
    dist.reduce_scatter_tensor(y, partial)
    return y.to(x.dtype)


def interleaved(calls: dict[str, Callable], seconds: float) -> dict[str, list[float]]:
    """Seconds of the slowest rank, one call of each in turn, from a barrier on."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = torch.tensor([time.monotonic() + seconds])
    while True:
        go_on = torch.tensor([float(time.monotonic() < end)])
        dist.broadcast(go_on, 0)
        if not go_on and len(next(iter(times.values()))) >= 5:
            return times
        for name, call in calls.items():
            dist.barrier()
            start = time.perf_counter()
            call()
            took = torch.tensor([time.perf_counter() - start])
            dist.all_reduce(took, dist.ReduceOp.MAX)
            times[name].append(took.item())


def save(out: Path, rows: list[dict]) -> None:
    old = json.loads(out.read_text())["rows"] if out.exists() else []
    value = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine_facts(("torch",)),
        "what": "dispatch and combine (degree: experts between) over Gloo, loopback, a thread a rank; s of the slowest",
        "rows": [row for row in old if _kind(row) != _kind(rows[0])] + rows,
    }
    out.write_text(json.dumps(value, indent=1) + "\n")


def _kind(row: dict) -> tuple:
    return row["ranks"], row.get("kept_memory", False), row["dtype"]


def show(rows: list[dict]) -> None:
    table = Table(title=f"{rows[0]['ranks']} ranks on this machine, {rows[0]['dtype']}, one thread each")
    beside = next(key for key in rows[0] if key.startswith("p50_beside"))
    columns = (
        "shape",
        "provider",
        "rows sent by rank 0",
        "ms p50 (p20-p80)",
        beside.removeprefix("p50_").replace("_", " "),
    )
    for column in columns:
        table.add_column(column)
    for row in rows:
        ms = f"{1e3 * row['p50']:.1f} ({1e3 * row['p20']:.1f}-{1e3 * row['p80']:.1f})"
        sent = str(row["rows_sent_by_rank_0"])
        table.add_row(row["shape"], row["provider"], sent, ms, f"{row[beside]:.2f}x")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
