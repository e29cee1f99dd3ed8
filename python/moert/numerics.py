"""Choices about the last bits of results."""

import ctypes
from importlib.util import find_spec

_set = ctypes.CDLL(find_spec("moert._ops").origin).moert_set_batch_invariant
_set.argtypes, _set.restype = [ctypes.c_bool], ctypes.c_bool


class batch_invariant:  # noqa: N801  read as torch.set_grad_enabled is
    """Give a token the same bits whatever tokens come with it: forward, in the operators that this thread calls.

    `moert.batch_invariant(True)` turns it on until it is turned off; `with moert.batch_invariant(True):` for a block.
    Every thread has its own choice, at first False.  A compiled function does as the thread that calls it has chosen.
    The price is paid by experts with more than 96 rows: see docs/performance.md.
    """

    def __init__(self, enabled: bool):
        if not isinstance(enabled, bool):
            raise ValueError(f"enabled must be True or False, got {enabled!r}")
        self.enabled, self._before = enabled, _set(enabled)

    def __enter__(self) -> None:
        _set(self.enabled)

    def __exit__(self, *error) -> None:
        _set(self._before)


def is_batch_invariant() -> bool:
    """Whether batch_invariant is on in this thread."""
    now = _set(False)
    _set(now)
    return now
