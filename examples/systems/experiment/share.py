"""What experiments do alike: a model for several variants, calls timed beside each other."""

import functools
import time
from collections.abc import Callable, Iterable, Sequence

import torch


def once(train: Callable) -> Callable:
    """train(seed, progress), run once a seed: the variants share what it returns and the random numbers after it."""
    latest: dict = {}

    @functools.wraps(train)
    def shared(seed: int, progress):
        key = seed, progress.quick
        if key not in latest:
            latest.clear()  # a seed comes once
            latest[key] = train(seed, progress)
        torch.manual_seed(seed + 1)
        return latest[key]

    return shared


def medians(calls: Sequence[Callable], rounds: Iterable) -> list[float]:
    """Seconds of each call, the median over the rounds.  They take turns: what slows the machine slows all alike."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in rounds:
        for call, times in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    return [sorted(times)[len(times) // 2] for times in seconds]
