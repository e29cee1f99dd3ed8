"""Interleaved timing, and the limits of the machine measured in the same run."""

import time
from collections.abc import Callable

import torch

from moert import _C

SAMPLE = 0.1  # seconds for which a sample of the limits holds

FLOP = 2 * 1024**3  # of what is multiplied for a limit

Functions = dict[str, Callable[[], object]]


def interleaved(
    functions: Functions,
    seconds: float,
    rounds: int | None = None,
    cold: bool = True,
    limits: Functions | None = None,
) -> dict[str, list[float]]:
    """Seconds of single calls, one of each function a round, from cold caches.

    It takes about `seconds` for each function, what goes before the calls included, but for five rounds at least.
    Not cold: of a second call right after the first.  limits: functions whose times say what the machine can do; each
    round has those that were sampled last, at most SAMPLE seconds before it.

    Interleaved, because a machine that slows down for a while would otherwise slow down one of them only.
    """
    flush = torch.ones(2**24)  # 64 MiB: more than the caches that this process can hope to keep
    longest = max(_warm_up(function, 0.0 if rounds else seconds / 10) for function in functions.values())
    before = _seconds(lambda: flush.add_(1)) if cold else longest
    count = rounds or max(5, min(1000, int(seconds / max(longest + before, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in (*functions, *(limits or ()))}
    sample, due = {}, 0.0
    for _ in range(count):
        if limits and time.perf_counter() >= due:
            sample, due = {name: _seconds(limit) for name, limit in limits.items()}, time.perf_counter() + SAMPLE
        for name, taken in sample.items():
            times[name].append(taken)
        for name, function in functions.items():
            flush.add_(1) if cold else function()
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


class Limits:
    """What this machine can do with torch's threads, in a second: bytes read, bytes copied and FLOP.

    Those of float32 from registers (the FMA peak), and of torch's product in each dtype: below that peak, but where
    the CPU has arithmetic of that dtype.
    """

    def __init__(self, dtypes: list[torch.dtype]):
        source, target = torch.ones(2**26), torch.zeros(2**25)
        a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
        self.functions: Functions = {"read": source.sum, "copy": lambda: target.copy_(source[: len(target)])}
        # A copy reads half of these bytes and writes the other half.
        self.work = {"read": source.nbytes, "copy": 2 * target.nbytes}
        # Older revisions of moert, which --base times, have no peak.  Beside it a product in a dtype that the CPU does
        # not multiply is no limit, and takes torch seconds.
        has_peak, features = hasattr(_C, "multiply_floats"), _C.cpu_features()
        narrow = features.get("avx512bf16") or features.get("amx_bf16")
        for dtype in dtypes if narrow or not has_peak else {torch.float32} & set(dtypes):
            name = str(dtype).removeprefix("torch.")
            self.functions[name] = _product(a.to(dtype), b.to(dtype))
            self.work[name] = FLOP
        if has_peak:
            self.functions["FMA peak"] = lambda: _C.multiply_floats(FLOP, torch.get_num_threads())
            self.work["FMA peak"] = FLOP

    def of(self, dtype: str) -> list[str]:
        """Those that bound products in the dtype; the fastest counts."""
        return [name for name in (dtype, "FMA peak") if name in self.functions]

    def rates(self) -> dict[str, float]:
        """The best of a few samples."""
        return {name: self.work[name] / _best(function) for name, function in self.functions.items()}


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
