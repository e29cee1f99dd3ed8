"""Who is missing when an exchange fails: those of whose failing nobody hears.

A backend may only say that some connection broke.  A rank on which an exchange fails writes so into the group's store;
nothing is written, and no thread runs, while all goes well.  moert.parallel.Pulse knows more: who is alive.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

PATIENCE = 10.0  # seconds for the others to come to the exchange that failed, and to fail in it
LAST = 0.75  # seconds for the last of them alone: it may be the cause, or only slower than its peers
PAUSE = 0.05  # between two looks into the store

_seen: WeakSet[dist.ProcessGroup] = WeakSet()
_failed: WeakSet[dist.ProcessGroup] = WeakSet()  # on which this rank's last exchange did


@contextmanager
def roll_call(group: dist.ProcessGroup | None) -> Iterator[None]:
    """A RuntimeError inside, of an exchange among the group's ranks, is raised anew and names the silent ones.

    They have ended, hang, or are late: the others are given PATIENCE to fail as well.
    """
    group = group or dist.group.WORLD
    if group not in _seen:  # the store may be older than this process, which another may have been before
        _seen.add(group)
        _take_back(group)
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # of this rank alone
    except RuntimeError as error:
        raise RuntimeError(_told(str(error), group)) from error
    if group in _failed:  # it goes on: what it said before is no word on a later failure
        _failed.discard(group)
        _take_back(group)


def _take_back(group: dist.ProcessGroup) -> None:
    if group in _world.pg_map and dist.get_world_size(group) > 1:
        roll(group).delete_key(str(dist.get_rank(group)))


def roll(group: dist.ProcessGroup) -> dist.Store:
    """Where a rank of the group writes that an exchange failed on it, under its number."""
    return dist.PrefixStore("moert.roll", store_of(group))


def store_of(group: dist.ProcessGroup) -> dist.Store:
    return _world.pg_map[group][1]


def _told(error: str, group: dist.ProcessGroup) -> str:
    from moert.ops.ranks import named  # which imports this module

    if group not in _world.pg_map or dist.get_world_size(group) == 1:
        return error
    try:
        silent = _silent(roll(group), dist.get_rank(group), dist.get_world_size(group))
    except RuntimeError:
        return f"every rank must take part in the exchange, the process that keeps the store ended: {error}"
    _failed.add(group)
    if silent:
        return f"every rank must take part in the exchange, got no word from {named(silent, group)}: {error}"
    return f"every rank must take part in the exchange, it failed on all of them: {error}"


def _silent(store: dist.Store, rank: int, size: int) -> list[int]:
    """Of the other ranks those on which nothing has failed when patience ends."""
    store.set(str(rank), "failed")
    end = time.monotonic() + PATIENCE
    while True:
        silent = [other for other in range(size) if other != rank and not store.check([str(other)])]
        if len(silent) == 1:
            end = min(end, time.monotonic() + LAST)
        if not silent or time.monotonic() >= end:
            return silent
        time.sleep(PAUSE)
