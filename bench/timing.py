"""Interleaved timing, and the limits of the machine measured in the same run."""

import time
from collections.abc import Callable

import torch


def interleaved(
    functions: dict[str, Callable[[], object]], seconds: float, rounds: int | None = None, cold: bool = True
) -> dict[str, list[float]]:
    """Seconds of single calls, one of each function a round, from cold caches; about `seconds` for each function.

    Not cold: of a second call right after the first.

    Interleaved, because a machine that slows down for a while would otherwise slow down one of them only.
    """
    flush = torch.zeros(2**24)  # 64 MiB: more than the caches that this process can hope to keep
    longest = max(_warm_up(function, 0.0 if rounds else seconds / 10) for function in functions.values())
    count = rounds or max(5, min(1000, int(seconds / max(longest, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(count):
        for name, function in functions.items():
            flush.add_(1) if cold else function()
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


def limits(dtypes: list[torch.dtype]) -> dict:
    """What this machine can do now, with torch's threads: bytes read per second, FLOP per second of a product."""
    source = torch.ones(2**26)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return {
        "read_bytes_per_second": source.nbytes / _best(source.sum),
        "flop_per_second": {
            str(dtype).removeprefix("torch."): 2 * 1024**3 / _best(_product(a.to(dtype), b.to(dtype)))
            for dtype in dtypes
        },
    }


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _product(a: torch.Tensor, b: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: a @ b


def _best(function: Callable[[], object], repeats: int = 10) -> float:
    return min(_seconds(function) for _ in range(repeats))


def _warm_up(function: Callable[[], object], seconds: float) -> float:
    """Calls for `seconds`, at least once; the time of the last call."""
    end = time.perf_counter() + seconds
    while True:
        last = _seconds(function)
        if time.perf_counter() >= end:
            return last


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
