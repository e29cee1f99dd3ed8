"""Times on a GPU: replays of a CUDA graph from cold caches, in turns, and the card's own limits in the same run."""

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

FLUSH_BYTES = 2**28  # more than the second-level cache of any card


@dataclass
class Timed:
    """One provider of one problem."""

    call: Callable[[], object]
    graph: bool = False  # replayed as a graph; else called, because it reads from the GPU while it runs
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Clock:
    """CUDA events around graph replays; on a CPU, where this is only tried out, the time of the call."""

    def __init__(self, device: str, rounds: int):
        self.on_gpu = device == "cuda"
        self.rounds = rounds
        self.flush = torch.zeros(FLUSH_BYTES if self.on_gpu else 1, dtype=torch.uint8, device=device)

    def prepare(self, call: Callable[[], object]) -> Timed:
        """Warm, and captured where it can be."""
        for _ in range(3):
            call()
        if not self.on_gpu:
            return Timed(call)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with contextlib.suppress(RuntimeError):
            with torch.cuda.graph(graph):
                call()
            return Timed(graph.replay, graph=True)
        # A capture that broke off leaves an error behind that the next call would be given.
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
        return Timed(call)

    def run(self, providers: list[Timed]) -> None:
        """One sample of each in every round."""
        for _ in range(self.rounds):
            for provider in providers:
                provider.seconds.append(self.sample(provider.call))

    def sample(self, call: Callable[[], object]) -> float:
        self.flush.zero_()
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def limits(self, size: int) -> dict[str, float]:
        """Bytes per second, copied (read and written) and read, and FLOP per second of a bfloat16 product [size, size].

        Random numbers: products of zeros draw less power and run faster.
        """
        device = self.flush.device
        source = torch.randn(size * size * 8, device=device)
        target = torch.empty_like(source)
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        copy, read, product = (self.prepare(call) for call in (lambda: target.copy_(source), source.sum, lambda: a @ b))
        self.run([copy, read, product])
        return {
            "copy_bytes_per_second": 2 * source.nbytes / copy.median,
            "read_bytes_per_second": source.nbytes / read.median,
            "bfloat16_flop_per_second": 2 * size**3 / product.median,
        }
