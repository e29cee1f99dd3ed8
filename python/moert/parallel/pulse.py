"""Who is missing, when an exchange between ranks fails: a backend may only say that some connection broke."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from moert.ops.kinds import expect

BEATS = 3  # intervals without a sign of life, after which a rank counts as gone


class Pulse:
    """Each rank of the group writes a number into the group's store every `interval` seconds, from a thread.

    An exchange inside exchanging() that fails raises a RuntimeError naming the ranks whose numbers stand still, or that
    have not come to this exchange; it takes three intervals to see.  The ranks must count their exchanges alike.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, interval: float = 0.25):
        expect((dist.ProcessGroup, type(None)), group=group)
        if not interval > 0:
            raise ValueError(f"interval must be a number of seconds above zero, got {interval}")
        self.rank, self.size, self.interval = dist.get_rank(group), dist.get_world_size(group), interval
        store = _world.pg_map[group or dist.group.WORLD][1]
        self._store = dist.PrefixStore("moert.pulse", store)
        self._beats, self._exchanges, self._blamed, self._ended = 0, 0, "", threading.Event()
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

    def _beat(self) -> None:
        while not self._ended.wait(self.interval):
            self._beats += 1
            try:
                self._write()
            except RuntimeError:  # the store is gone: whoever looks for signs finds none
                return

    def _write(self) -> None:
        self._store.set(str(self.rank), f"{self._beats} {self._exchanges} {self._blamed}")

    def _read(self) -> dict[int, list[str]]:
        """Of every other rank: beats, exchanges begun, and the ranks that it blames for its end."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        known = [rank for rank in others if self._store.check([str(rank)])]
        return {rank: self._store.get(str(rank)).decode().split(" ") for rank in known}

    def _told(self, error: str) -> str:
        try:
            before = self._read()
            time.sleep(BEATS * self.interval)
            after = self._read()
        except RuntimeError:
            return f"every rank must take part in the exchange, the process that keeps the store ended: {error}"
        gone = [rank for rank in range(self.size) if rank != self.rank and self._is_gone(rank, before, after)]
        # A rank that ended because it missed another is not the cause.
        cause = [rank for rank in gone if not after.get(rank, [""] * 3)[2]] or gone
        late = [rank for rank, (_, begun, _) in after.items() if int(begun) < self._exchanges]
        if cause:
            self._blame(cause)
            return f"every rank must take part in the exchange, got no sign of life from {_ranks(cause)}: {error}"
        if late:
            self._blame(late)
            return f"every rank must take part in the exchange, {_ranks(late)} did not come to it: {error}"
        return f"every rank must take part in the exchange, all are alive: {error}"

    @staticmethod
    def _is_gone(rank: int, before: dict, after: dict) -> bool:
        return rank not in after or (rank in before and before[rank][0] == after[rank][0])

    def _blame(self, ranks: list[int]) -> None:
        self._blamed = ",".join(map(str, ranks))
        self._write()


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
