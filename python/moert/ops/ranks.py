"""The ranks of a group, how to reach them, and what to say when one is not there.

Letters: R ranks, on A nodes of m ranks each where there are two levels.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from typing import ClassVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.distributed as dist

from moert.ops.kinds import expect
from moert.ops.roll_call import roll_call

Guard = Callable[[], AbstractContextManager]  # inside it a rank waits for others: it may say more of what goes wrong


HANDLES: "WeakValueDictionary[str, Ranks]" = WeakValueDictionary()
_NUMBERS = count()
_LAYERS: "WeakKeyDictionary[dist.ProcessGroup, count]" = WeakKeyDictionary()
_SUBGROUPS: "WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Levels:
    """The groups of this rank for an exchange in two levels: the m ranks of its node, the A ranks with its index."""

    node: dist.ProcessGroup
    rail: dist.ProcessGroup

    @property
    def shape(self) -> tuple[int, int]:
        """(m, A)"""
        return dist.get_world_size(self.node), dist.get_world_size(self.rail)


@dataclass(frozen=True, eq=False)
class Ranks:
    """A group (None: all), and the way to its ranks: straight, or within nodes first.

    Waits happen inside guard(); None: roll_call's, which names the ranks that are silent when an exchange fails.  layer
    is compared in every dispatch: two layers that one rank calls in another order would take each other's rows.
    """

    group: dist.ProcessGroup | None = None
    guard: Guard | None = None
    levels: Levels | None = None
    layer: int = 0

    handle: ClassVar[str | None] = None  # of an object that says more than its group does

    def __post_init__(self):
        if self.guard is not None or self.levels is not None:
            object.__setattr__(self, "handle", f"moert.ranks.{next(_NUMBERS)}")
            HANDLES[self.handle] = self

    @property
    def name(self) -> str:
        """By which compiled code finds it."""
        return self.handle or ("" if self.group is None else self.group.group_name)

    @classmethod
    def of(cls, group: "dist.ProcessGroup | Ranks | None") -> "Ranks":
        return group if isinstance(group, Ranks) else cls(group)

    @classmethod
    def in_nodes(
        cls, local_size: int, group: dist.ProcessGroup | None = None, guard: Guard | None = None, layer: int = 0
    ) -> "Ranks":
        """Ranks r of node r // local_size: what goes to another node goes to one rank of each node (Tutel's 2DH).

        Every rank of the group must call it: the first call makes two groups.  A single node, or nodes of a single
        rank, are reached straight.
        """
        R = dist.get_world_size(group)
        expect(int, local_size=local_size)
        if local_size < 1 or R % local_size:
            raise ValueError(f"local_size must divide the R={R} ranks, got {local_size}")
        if local_size in (1, R):
            return cls(group, guard, None, layer)
        ranks = torch.tensor(dist.get_process_group_ranks(group or dist.group.WORLD)).view(-1, local_size)
        node, index = divmod(dist.get_rank(group), local_size)
        groups = (subgroup(members.tolist(), group) for members in (ranks[node], ranks[:, index]))
        return cls(group, guard, Levels(*groups), layer)

    def guarded(self) -> AbstractContextManager:
        """Inside it this rank waits for the others."""
        return roll_call(self.group) if self.guard is None else self.guard()

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def device(self) -> torch.device:
        """Where numbers for the host travel from: the CPU, or the device of a backend that knows no other."""
        kinds = (self.group or dist.group.WORLD)._device_types
        return torch.device("cpu") if torch.device("cpu") in kinds else torch.empty(0, device=kinds[0]).device

    @property
    def through_host(self) -> bool:
        """Whether all that travels waits for the host: the same on every rank, whatever each of them holds."""
        backends = dist.get_backend_config(self.group).split(",")  # such as cpu:gloo,cuda:nccl
        return {name.partition(":")[2] for name in backends} == {"gloo"}


def next_layer(group: dist.ProcessGroup | None) -> int:
    """The number of a layer among those of the group, which every rank of it makes: 1, 2 and so on."""
    return next(_LAYERS.setdefault(group or dist.group.WORLD, count(1)))


def named(ranks: list[int], group: dist.ProcessGroup | None) -> str:
    """Ranks of the group by their numbers among all processes, as logs and launchers have them."""
    numbers = [dist.get_global_rank(group or dist.group.WORLD, rank) for rank in ranks]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, numbers))}"


def subgroup(members: list[int], whole: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Of ranks by their numbers among all processes: they alone make it, once; it has the whole group's time limit."""
    whole = whole or dist.group.WORLD
    made = _SUBGROUPS.setdefault(whole, {})  # layers share them: a group has threads and connections of its own
    if tuple(members) not in made:
        made[tuple(members)] = _new_group(members, whole)
    return made[tuple(members)]


def _new_group(members: list[int], whole: dist.ProcessGroup) -> dist.ProcessGroup:
    limit = whole._get_backend(whole._device_types[0]).options._timeout
    # torch 2.11 knows no order but the rising one.
    order = {} if members == sorted(members) else {"sort_ranks": False}
    return dist.new_group(members, timeout=limit, use_local_synchronization=True, **order)
