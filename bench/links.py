"""What a message between two ranks of this machine costs over Gloo: latency and time a byte, fitted to exchanges.

Spawns 2, 3 and 4 ranks that exchange equal chunks by all_to_all_single; 2 and 4 are fitted, 3 is predicted.
Writes bench/results/links.json, which bench/simulate.py reads.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from moert.cli.machine import machine_facts
from moert.placement.exchange_cost import LinkCost

OUT = Path(__file__).resolve().parent / "results" / "links.json"
SIZES = (256, 4096, 16384, 65536, 262144, 1048576)  # bytes of a message


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="of measuring, for each number of ranks")
    parser.add_argument("--smoke", action="store_true", help="two ranks, an exchange of each size; writes nothing")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rows = []
    for ranks in (2,) if options.smoke else (2, 3, 4):
        times = measure(ranks, 0.0 if options.smoke else options.seconds / len(SIZES))
        rows += [{"ranks": ranks, "bytes": size, "seconds": t} for size, t in zip(SIZES, times, strict=True)]
    fitted = [row for row in rows if row["ranks"] != 3]
    link = LinkCost.fit(
        np.array([row["ranks"] - 1 for row in fitted]),
        np.array([row["bytes"] for row in fitted]),
        np.array([row["seconds"] for row in fitted]),
    )
    for row in rows:
        messages = row["ranks"] - 1
        row["modelled"] = float(link.seconds(messages, messages * row["bytes"]))
        print(f"{row['ranks']} ranks, {row['bytes']:8} bytes: {1e6 * row['seconds']:9.1f} us measured, "
              f"{1e6 * row['modelled']:9.1f} us by the fit")  # fmt: skip
    # A few calls may say that more bytes take no longer.
    bandwidth = f"{1e-9 / link.per_byte:.2f} GB/s" if link.per_byte else "no bandwidth that these calls tell"
    print(f"latency {1e6 * link.latency:.1f} us, {bandwidth}")
    if not options.smoke:
        value = {
            "date": datetime.now(timezone.utc).date().isoformat(),
            "machine": machine_facts(("torch",)),
            "what": "Gloo all_to_all_single over loopback, equal chunks, median; one thread a rank",
            "fitted_to_ranks": [2, 4],
            "latency": link.latency,
            "per_byte": link.per_byte,
            "rows": rows,
        }
        options.out.write_text(json.dumps(value, indent=1) + "\n")


def measure(ranks: int, seconds: float) -> list[float]:
    """Median seconds of an exchange at each size, of the slowest rank."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(ranks) as pool:
        jobs = [(rank, ranks, f"file://{folder}/store", seconds) for rank in range(ranks)]
        return np.max(pool.map(of_rank, jobs, chunksize=1), axis=0).tolist()


def of_rank(job: tuple[int, int, str, float]) -> list[float]:
    rank, ranks, store, seconds = job
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    # Not the default of half an hour: a rank that fails would keep the others waiting.
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    medians = []
    for size in SIZES:
        rows, out = torch.ones(ranks * size, dtype=torch.uint8), torch.empty(ranks * size, dtype=torch.uint8)
        times, count = [], 3
        while len(times) < count:
            dist.barrier()
            start = time.perf_counter()
            dist.all_to_all_single(out, rows)
            times.append(time.perf_counter() - start)
            if len(times) == 3 and seconds:
                # Rank 0 says how many more, for all ranks must agree.
                more = torch.tensor([max(5, min(2000, int(seconds / (3 * times[-1]))))])
                dist.broadcast(more, 0)
                count = 3 + int(more)
        medians.append(float(np.median(times[3 if seconds else 0 :])))
    dist.destroy_process_group()
    return medians


if __name__ == "__main__":
    main()
