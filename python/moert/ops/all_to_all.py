"""Rows from every rank to every rank, over torch.distributed, each rank with as many for another as it likes.

Counts go first, in one collective of a few numbers that also says what each rank is about to send: split sizes that
disagree would end a Gloo process (std::terminate), so they are compared before any row travels.  Letters: R ranks,
N rows sent, M rows received.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moert.ops.ranks import Ranks, named
from moert.ops.two_level import TwoSteps, send_numbers
from moert.pages import in_large_pages

FAILED = -1  # as a rank's number of rows: it raised an error of its own instead
NOTHING = -1  # as a fact that a rank does not have
Fact = int | str | None


@dataclass(frozen=True)
class Splits:
    """How many rows this rank has for each rank of the group (R numbers, N in all), and each for it (M in all).

    Where ranks are reached in two levels, between [m, A] is what passes here (see two_level), back the way home.
    """

    sent: list[int]
    received: list[int]
    ranks: Ranks = field(default=Ranks(), compare=False)
    between: Tensor | None = field(default=None, compare=False)
    back: bool = field(default=False, compare=False)

    @property
    def reversed(self) -> "Splits":
        return Splits(self.received, self.sent, self.ranks, self.between, not self.back)

    @property
    def others(self) -> "Splits":
        """The same without what this rank has for itself."""
        sent, received = list(self.sent), list(self.received)
        sent[self.ranks.rank] = received[self.ranks.rank] = 0
        return Splits(sent, received, self.ranks, self.between, self.back)


class Part(NamedTuple):
    """Of rows for all ranks, or of all, those that this rank has for itself, and the others."""

    own: slice
    others: slice


def at_home(counts: list[int], ranks: Ranks, device: torch.device) -> Part | None:
    """Of rows of which so many are of each rank: this rank's own need not travel if the others are in one piece.

    They are on the first and on the last rank, sent straight.  On a CPU a group copies own rows like any others; on a
    GPU they may travel.
    """
    rank, total, own = ranks.rank, sum(counts), counts[ranks.rank]
    if device.type != "cpu" or ranks.levels is not None or 0 < rank < len(counts) - 1:
        return None
    if rank == 0:
        return Part(slice(0, own), slice(own, total))
    return Part(slice(total - own, total), slice(0, total - own))


def all_to_all(rows: Tensor, splits: Splits) -> Tensor:
    """Rows [N, H], those for rank 0 first -> rows [M, H], those of rank 0 first.

    Any dtype; bytes travel, so nothing is rounded.  The gradient goes back the same way.  splits are those of
    exchange_counts, which compares the ranks: sizes that disagree end a Gloo process.  In a graph of torch.compile it
    is torch's functional collective (in two levels an operator), which Inductor knows.  That names no lost rank, calls
    no guard, and has no order beside a dispatch or combine of the same graph that neither waits for.
    """
    if torch.compiler.is_compiling():
        return _in_graph(rows, splits)
    return AllToAll(rows, splits, asynchronous=False).wait()


def _in_graph(rows: Tensor, splits: Splits) -> Tensor:
    from torch.distributed._functional_collectives import all_to_all_single_autograd

    _check_rows(rows, splits)
    ranks, M = splits.ranks, sum(splits.received)
    if ranks.levels is not None:  # of compiled_dispatch, which imports this module
        way = torch.tensor(splits.sent), torch.tensor(splits.received), splits.between, ranks.name, splits.back
        return torch.ops.moert.dispatch_exchange(rows.contiguous(), *way, M)
    # Of what has gradients the numbers travel, for a view as bytes would end them; a backend need not know others.
    sent = rows.contiguous() if rows.requires_grad else _in_one_piece(rows).view(torch.uint8)
    got = all_to_all_single_autograd(sent, splits.received, splits.sent, ranks.group or dist.group.WORLD)
    return got if rows.requires_grad else got.view(rows.dtype)


def _check_rows(rows: Tensor, splits: Splits) -> None:
    if rows.dim() != 2 or rows.shape[0] != sum(splits.sent):
        raise ValueError(f"rows must have shape [N={sum(splits.sent)}, H], got {list(rows.shape)}")


class AllToAll:
    """all_to_all, begun: wait() gives the rows [M, H].  Those sent must not be written before it.

    The gradient is sent by the node of wait(), made there, and waited for by one made here.
    """

    def __init__(self, rows: Tensor, splits: Splits, asynchronous: bool = True):
        _check_rows(rows, splits)
        self._flight, self._rows = _Flight(rows, splits, asynchronous), None
        (self._held,) = Hold.apply(self._flight.home, rows)

    def wait(self) -> Tensor:
        if self._rows is None:
            with torch.set_grad_enabled(self._held.requires_grad):  # as where it was begun
                self._rows = _Arrive.apply(self._held, self._flight)
        return self._rows


def all_to_all_ref(rows: Tensor, splits: Splits) -> Tensor:
    """The same by giving every rank the rows of all."""
    rank, everything = splits.ranks.rank, [None] * splits.ranks.size
    dist.all_gather_object(everything, (rows.detach(), splits.sent), splits.ranks.group)
    return torch.cat([theirs.split(sent)[rank] for theirs, sent in everything])


class Counting:
    """How many rows each rank has for each, begun: wait() gives Splits.  counts [R] are this rank's, integers.

    facts say what must be the same on every rank, by name: a size, or one of a few words; they travel with the counts.
    Where they differ every rank raises the same RuntimeError, which names the ranks; so it does for a rank whose counts
    are None, which says by this that it is about to raise an error of its own.
    """

    def __init__(self, counts: Tensor | list[int] | None, facts: dict[str, Fact], ranks: Ranks):
        self._ranks, self._facts = ranks, facts
        self._numbers = [_number(value) for value in facts.values()]
        self._failed = counts is None
        counts = [FAILED] * ranks.size if counts is None else counts.tolist() if isinstance(counts, Tensor) else counts
        self._counts = counts
        self._said = torch.tensor([[n, *self._numbers] for n in counts], dtype=torch.int64, device=ranks.device)
        self._heard, self._between = torch.empty_like(self._said), None
        with ranks.guarded():
            if ranks.levels is None:
                self._work = dist.all_to_all_single(self._heard, self._said, group=ranks.group, async_op=True)
            else:
                self._heard, self._between = send_numbers(self._said, ranks.levels)

    def wait(self) -> Splits:
        with self._ranks.guarded():
            if self._ranks.levels is None:
                self._work.wait()
            heard = self._heard.tolist()  # of a GPU's numbers: here the host waits for them
        received = [count for count, *_ in heard]
        if not self._failed and (FAILED in received or any(numbers != self._numbers for _, *numbers in heard)):
            _raise_difference(heard, self._facts, self._ranks.group)
        between = self._between if self._between is None else self._between.cpu()
        return Splits(self._counts, received, self._ranks, between)


def exchange_counts(
    counts: Tensor | list[int] | None,
    facts: dict[str, Fact] | None = None,
    group: dist.ProcessGroup | Ranks | None = None,
) -> Splits:
    """Counting, waited for: the Splits that all_to_all takes, which must be as the other ranks have them.

    The names of the facts must be those of the others, in their order.
    """
    facts, ranks = facts or {}, Ranks.of(group)
    with refusing(ranks, facts):
        for value in facts.values():
            _number(value)
    return Counting(counts, facts, ranks).wait()


def agree(facts: dict[str, Fact], ranks: Ranks) -> None:
    """Every rank of the group must call it; where the facts differ all raise an error that says on which ranks."""
    exchange_counts([0] * ranks.size, facts, ranks)


@contextmanager
def refusing(ranks: Ranks, facts: Iterable[str]) -> Iterator[None]:
    """Before exchange_counts with facts of these names: an error inside is raised, and the others raise one too."""
    try:
        yield
    except Exception:
        exchange_counts(None, dict.fromkeys(facts, 0), ranks)  # the others must not wait for this rank
        raise


def fresh_rows(like: Tensor, num_rows: int) -> Tensor:
    """Memory for rows like these [N, H] -> [num_rows, H], in large pages: of small ones megabytes take many."""
    return in_large_pages(like.new_empty(num_rows, like.shape[1]))


def send_rows(
    rows: Tensor, splits: Splits, asynchronous: bool = False, into: Tensor | None = None
) -> tuple[Tensor, dist.Work | TwoSteps | None]:
    """The exchange itself, without gradient: the rows that arrive (`into`), and what to wait for before they are read.

    rows must live until then.
    """
    rows = _in_one_piece(rows)
    received, ranks = fresh_rows(rows, sum(splits.received)) if into is None else into, splits.ranks
    given, taken = rows.view(torch.uint8), received.view(torch.uint8)
    with ranks.guarded():
        if ranks.levels is None:
            work = _send_straight(given, taken, splits)
        else:
            sizes = torch.tensor(splits.sent), torch.tensor(splits.received), splits.between
            work = TwoSteps(given, taken, *sizes, ranks.levels, splits.back)
        if not asynchronous:
            work.wait()
    return received, work if asynchronous else None


def _send_straight(given: Tensor, taken: Tensor, splits: Splits) -> dist.Work:
    ranks, device = splits.ranks, given.device
    mine, came = (at_home(counts, ranks, device) for counts in (splits.sent, splits.received))
    if mine is None:
        return dist.all_to_all_single(taken, given, splits.received, splits.sent, ranks.group, async_op=True)
    sizes = splits.others
    work = dist.all_to_all_single(
        taken[came.others], given[mine.others], sizes.received, sizes.sent, ranks.group, async_op=True
    )
    taken[came.own] = given[mine.own]  # while the others travel
    return work


def _in_one_piece(rows: Tensor) -> Tensor:
    """Without rows any strides are contiguous, but not all can be seen as bytes."""
    return rows.contiguous() if len(rows) else rows.new_empty(rows.shape)


class Sending:
    """send_rows, begun: wait() gives the rows that arrive."""

    def __init__(self, rows: Tensor, splits: Splits, asynchronous: bool = True, into: Tensor | None = None):
        self._sent, self._guard = rows.contiguous(), splits.ranks.guarded  # what is sent must live so long
        self._received, self._work = send_rows(self._sent, splits, asynchronous, into)

    def wait(self) -> Tensor:
        if self._work is not None:
            with self._guard():
                self._work.wait()
        self._work = self._sent = None
        return self._received


class Hold(torch.autograd.Function):
    """Tensors as they are; their gradients are what home() gives, which a later node has sent for.

    Autograd runs nodes in the reverse order of their making: what lies between the two overlaps with the exchange.
    """

    @staticmethod
    def forward(ctx, home: Callable[[], tuple[Tensor | None, ...]], *tensors: Tensor):
        ctx.home = home
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *_):
        return None, *ctx.home()


def stand_in(shape: torch.Size, like: Tensor) -> Tensor:
    """For a gradient that Hold replaces."""
    return like.new_zeros(1).expand(shape)


class _Flight:
    """What the two nodes of an AllToAll share: rows on their way, then their gradient on its way home."""

    def __init__(self, rows: Tensor, splits: Splits, asynchronous: bool):
        self.shape, self._splits = rows.shape, splits
        self._there, self._back = Sending(rows.detach(), splits, asynchronous), None

    def arrive(self) -> Tensor:
        rows, self._there = self._there.wait(), None
        return rows

    def send_back(self, drows: Tensor) -> None:
        self._back = Sending(drows, self._splits.reversed)

    def home(self) -> tuple[Tensor]:
        back, self._back = self._back, None
        return (back.wait(),)


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, held, flight):
        ctx.flight = flight
        return flight.arrive()

    @staticmethod
    @once_differentiable
    def backward(ctx, drows):
        ctx.flight.send_back(drows)
        return stand_in(ctx.flight.shape, drows), None


WORDS = ("no", "yes", "none", "sum", "mean", "int8", "float8_e4m3", *(str(dtype).removeprefix("torch.") for dtype in (
    torch.float32, torch.bfloat16, torch.float16, torch.float64
)))  # fmt: skip


def _number(value: Fact) -> int:
    if value is None:
        return NOTHING
    if isinstance(value, str) and value not in WORDS:
        raise ValueError(f"facts must be integers, None or some of {', '.join(WORDS)}, got {value}")
    return WORDS.index(value) if isinstance(value, str) else value


def _told(number: int, own: Fact) -> Fact:
    """What a number stands for, of a fact that is this on this rank."""
    return WORDS[number] if isinstance(own, str) else None if number == NOTHING else number


def _raise_difference(heard: list[list[int]], facts: dict[str, Fact], group: dist.ProcessGroup | None) -> None:
    failed = [rank for rank, (count, *_) in enumerate(heard) if count == FAILED]
    if failed:
        raise RuntimeError(f"every rank must be able to go on, got an error on {named(failed, group)} (see there)")
    for column, (name, own) in enumerate(facts.items(), 1):
        holders: dict[int, list[int]] = {}
        for rank, row in enumerate(heard):
            holders.setdefault(row[column], []).append(rank)
        if len(holders) > 1:
            # What most ranks say comes first, so that the odd one out is the last word.
            told = sorted(holders.items(), key=lambda item: -len(item[1]))
            got = ", ".join(f"{_told(v, own)} on {named(ranks, group)}" for v, ranks in told)
            raise RuntimeError(f"{name} must be the same on every rank, got {got}")
