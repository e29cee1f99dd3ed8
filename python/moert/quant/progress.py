"""A line that says how far long work has come, where someone watches: only on a terminal."""

import sys
import time
from typing import TextIO

_WIDTH = 24


class Progress:
    """`with Progress(100, "experts") as progress: … progress.advance(1, text="layer 3")` on stderr."""

    def __init__(self, total: int, unit: str, stream: TextIO | None = None):
        self.total, self.unit, self.stream = total, unit, sys.stderr if stream is None else stream
        self.done, self.started, self.width = 0, time.monotonic(), 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.width:
            self.stream.write("\n")

    def advance(self, count: int, text: str = "") -> None:
        self.done += count
        if not self.stream.isatty():
            return
        elapsed = time.monotonic() - self.started
        left = elapsed / self.done * (self.total - self.done) if self.done else 0.0
        filled = _WIDTH * self.done // max(self.total, 1)
        bar = "█" * filled + "·" * (_WIDTH - filled)
        line = f"{bar} {self.done}/{self.total} {self.unit}, {_clock(elapsed)} gone, {_clock(left)} left  {text}"
        self.stream.write("\r" + line.ljust(self.width))
        self.stream.flush()
        self.width = len(line)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
