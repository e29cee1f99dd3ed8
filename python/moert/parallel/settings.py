"""The best settings for each load, learnt while training goes on (Tutel, arXiv 2206.03382, section 3.3).

Nothing here knows of ranks or clocks: whoever asks says what a setting took.
"""

from collections.abc import Generator, Sequence
from itertools import product
from typing import NamedTuple

DEGREES = (1, 2, 4, 8)


class Setting(NamedTuple):
    """r, degree and levels of AdaptiveExperts."""

    r: int
    degree: int
    levels: int = 1


def check_window(window: int) -> None:
    if not (isinstance(window, int) and window >= 1):
        raise ValueError(f"window must be a whole number of at least 1, got {window}")


class SettingsCache:
    """The best of rs x degrees x levels for each load; loads of the same size // window share one.

    rs are in ascending order, and what a call takes is taken to be convex in all but the first and the last of them.
    At r = 0 no token travels, so that the first degree and level stand for all.
    """

    def __init__(
        self,
        rs: Sequence[int],
        degrees: Sequence[int] = DEGREES,
        levels: Sequence[int] = (1,),
        window: int = 128,
    ):
        check_window(window)
        self.candidates, self.window = (tuple(rs), tuple(degrees), tuple(levels)), window
        self.best: dict[int, Setting] = {}  # by size // window
        self._searches: dict[int, tuple[Generator[Setting, float, Setting], Setting]] = {}

    def choose(self, size: int) -> Setting:
        """The best setting for a load of this size; while that is not known the one to try next."""
        key = size // self.window
        if key in self.best:
            return self.best[key]
        if key not in self._searches:
            search = _search(*self.candidates)
            self._searches[key] = search, next(search)
        return self._searches[key][1]

    def knows(self, size: int) -> bool:
        return size // self.window in self.best

    def record(self, size: int, seconds: float) -> None:
        """What the setting of choose(size) took."""
        key = size // self.window
        search, _ = self._searches[key]
        try:
            self._searches[key] = search, search.send(seconds)
        except StopIteration as end:
            self.best[key] = end.value
            del self._searches[key]


def _search(
    rs: tuple[int, ...], degrees: tuple[int, ...], levels: tuple[int, ...]
) -> Generator[Setting, float, Setting]:
    """Gives settings to try, is sent what each took, and returns the best: both ends of rs, between them by thirds."""
    seconds: dict[Setting, float] = {}

    def trial(r: int, *way: int) -> Generator[Setting, float, float]:
        setting = Setting(r, *(way if r else (degrees[0], levels[0])))
        if setting not in seconds:
            seconds[setting] = yield setting
        return seconds[setting]

    for way in product(degrees, levels):
        yield from trial(rs[0], *way)
        yield from trial(rs[-1], *way)
        low, high = 1, len(rs) - 2
        while low <= high:
            third = (high - low) // 3
            left, right = low + third, high - third
            if (yield from trial(rs[left], *way)) <= (yield from trial(rs[right], *way)):
                high = right - 1
            else:
                low = left + 1
    return min(seconds, key=seconds.get)
