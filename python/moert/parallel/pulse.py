"""Who is missing, when an exchange between ranks fails: a backend may only say that some connection broke."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moert.ops.kinds import expect
from moert.ops.ranks import named
from moert.ops.roll_call import store_of

Group = dist.ProcessGroup | DeviceMesh | None
BEATS = 3  # intervals without a sign of life, after which a rank counts as gone


class _Sign(NamedTuple):
    """Of life, as it stands in the store; blamed: the ranks that this one ends for."""

    beats: str
    exchanges: str
    interval: str
    blamed: str = ""


class Pulse:
    """Each rank of the group writes a number into the group's store every `interval` seconds, from a thread.

    An exchange inside exchanging() that fails raises a RuntimeError naming the ranks whose numbers stand still, or that
    have not come to this exchange; it takes three intervals to see, the longest of any rank.  The ranks must count
    their exchanges alike.  stop() it, or leave its with block, before dist.destroy_process_group.
    """

    def __init__(self, group: Group = None, interval: float = 0.25):
        group = process_group(group)
        if not interval > 0:
            raise ValueError(f"interval must be a number of seconds above zero, got {interval}")
        self.group, self.interval = group, interval
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._store = dist.PrefixStore("moert.pulse", store_of(group or dist.group.WORLD))
        self._beats, self._exchanges, self._blamed, self._ended = 0, 0, "", threading.Event()
        self._writing = threading.Lock()  # what one thread read before the other changed it must not be written after
        self._write()
        self._thread = threading.Thread(target=self._beat, name="moert.pulse", daemon=True)
        self._thread.start()

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        self._exchanges += 1
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(self._told(str(error))) from error

    def stop(self) -> None:
        """No more signs of life from here."""
        self._ended.set()
        self._thread.join()

    def __enter__(self) -> "Pulse":
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def _beat(self) -> None:
        while not self._ended.wait(self.interval):
            self._beats += 1
            try:
                self._write()
            except RuntimeError:  # the store is gone: whoever looks for signs finds none
                return

    def _write(self) -> None:
        with self._writing:
            self._store.set(str(self.rank), f"{self._beats} {self._exchanges} {self.interval} {self._blamed}")

    def _read(self) -> dict[int, _Sign]:
        """Of every other rank that has given one."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        known = [rank for rank in others if self._store.check([str(rank)])]
        return {rank: _Sign(*self._store.get(str(rank)).decode().split(" ")) for rank in known}

    def _told(self, error: str) -> str:
        try:
            before = self._read()
            # Each is judged by its own interval: after three of the longest all have had their time.
            time.sleep(BEATS * max([self.interval, *(float(sign.interval) for sign in before.values())]))
            after = self._read()
        except RuntimeError:
            return f"every rank must take part in the exchange, the process that keeps the store ended: {error}"
        gone = [rank for rank in range(self.size) if rank != self.rank and self._is_gone(rank, before, after)]
        late = [rank for rank, sign in after.items() if rank not in gone and int(sign.exchanges) < self._exchanges]
        # A rank that ended because it missed another is not the cause.
        cause = [rank for rank in gone if rank not in after or not after[rank].blamed] or ([] if late else gone)
        if cause:
            self._blame(cause)
            who = named(cause, self.group)
            return f"every rank must take part in the exchange, got no sign of life from {who}: {error}"
        if late:
            self._blame(late)
            return f"every rank must take part in the exchange, {named(late, self.group)} did not come to it: {error}"
        return f"every rank must take part in the exchange, all are alive: {error}"

    @staticmethod
    def _is_gone(rank: int, before: dict[int, _Sign], after: dict[int, _Sign]) -> bool:
        return rank not in after or (rank in before and before[rank].beats == after[rank].beats)

    def _blame(self, ranks: list[int]) -> None:
        self._blamed = ",".join(map(str, ranks))
        self._write()


def process_group(group: Group, name: str = "group") -> dist.ProcessGroup | None:
    """Of a mesh of one dimension its group; name: of the argument."""
    expect((dist.ProcessGroup, DeviceMesh, type(None)), **{name: group})
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"{name} must be a mesh of one dimension (mesh['ep']), got {group.ndim}")
        return group.get_group()
    return group
