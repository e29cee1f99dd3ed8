"""Experts that several ranks hold: which copy a choice goes to, and one gradient for all copies.

Letters: T tokens, k choices, E experts, V of them with their copies, R ranks, S experts that have copies.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from moert.ops.expert_map import ExpertMap
from moert.types import Routing


@dataclass(frozen=True, eq=False)
class Copies:
    """The ids of copies follow those of the experts: V = E + len(replicas), map says where all of them lie.

    A choice goes to this rank's copy where it has one, else to those of its node, else to any; to several in turn, by
    the number of its token: expert e's to nearest[e, t % turns[e]].  mine are the rows of this rank's stack of experts
    that have copies, and slots their numbers among the S.
    """

    map: ExpertMap
    expert_ids: list[int]  # of this rank's stack
    nearest: Tensor  # [E, R at most]
    turns: Tensor  # [E]
    mine: Tensor
    slots: Tensor
    num_shared: int  # S

    @classmethod
    def placed(cls, placement, num_experts: int, num_ranks: int, rank: int, local_size: int | None) -> "Copies":
        """placement: expert_to_rank, any sequence of integers, a PlacedLayer, or None: contiguous blocks."""
        where = ExpertMap.of(getattr(placement, "expert_to_rank", placement), num_experts, num_ranks)
        copies = cls.of(where, getattr(placement, "replicas", ()), rank, local_size)
        if 0 in copies.map.held:
            raise ValueError(f"placement must give every rank an expert, got none for rank {copies.map.held.index(0)}")
        return copies

    @classmethod
    def of(cls, experts: ExpertMap, replicas: Sequence[tuple[int, int]], rank: int, local_size: int | None) -> "Copies":
        """replicas: further (expert, rank); every pair is another one."""
        E, R = experts.num_experts, experts.num_ranks
        holders = [{home: e} for e, home in enumerate(experts.expert_to_rank.tolist())]
        for number, (expert, holder) in enumerate(replicas, E):
            if not (0 <= expert < E and 0 <= holder < R) or holder in holders[expert]:
                asked = f"other (expert, rank) in [0, E={E}) x [0, R={R})"
                raise ValueError(f"replicas of a placement must be {asked}, got ({expert}, {holder})")
            holders[expert][holder] = number
        ranks = [*experts.expert_to_rank.tolist(), *(holder for _, holder in replicas)]
        everywhere = replace(ExpertMap.of(ranks, len(ranks), R), copy_of=tuple(expert for expert, _ in replicas))
        nearest = [_nearest(each, rank, local_size) for each in holders]
        expert_of = [*range(E), *(expert for expert, _ in replicas)]
        expert_ids = [expert_of[number] for number in everywhere.experts_of(rank)]
        shared = {e: slot for slot, e in enumerate(e for e in range(E) if len(holders[e]) > 1)}
        mine = [row for row, e in enumerate(expert_ids) if e in shared]
        longest = max(map(len, nearest), default=0)
        return cls(
            everywhere,
            expert_ids,
            torch.tensor([[each[i % len(each)] for i in range(longest)] for each in nearest]).view(E, longest),
            torch.tensor([len(each) for each in nearest]),
            torch.tensor(mine, dtype=torch.int64),
            torch.tensor([shared[expert_ids[row]] for row in mine], dtype=torch.int64),
            len(shared),
        )

    def routed(self, routing: Routing) -> Routing:
        """To the copies; ids outside [0, E) stay outside."""
        if not self.num_shared:
            return routing
        if routing.num_experts != len(self.turns):
            raise ValueError(f"routing must be to E={len(self.turns)} experts, got {routing.num_experts}")
        ids = routing.ids.long()
        known = (ids >= 0) & (ids < len(self.turns))
        ids, turns, nearest = torch.where(known, ids, 0), self.turns.to(ids.device), self.nearest.to(ids.device)
        turn = torch.arange(len(ids), device=ids.device)[:, None] % turns[ids]
        return Routing(torch.where(known, nearest[ids, turn], -1), routing.weights, self.map.num_experts)

    def add_up(self, grad: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """Of this rank's stack [held, ...]: the rows of experts with copies, summed over all of these."""
        sums = grad.new_zeros(self.num_shared, *grad.shape[1:], dtype=torch.promote_types(grad.dtype, torch.float32))
        mine, slots = self.mine.to(grad.device), self.slots.to(grad.device)
        sums[slots] = grad[mine].to(sums.dtype)
        dist.all_reduce(sums, group=group)
        return grad.index_copy(0, mine, sums[slots].to(grad.dtype))


def _nearest(holders: dict[int, int], rank: int, local_size: int | None) -> list[int]:
    """Ids of the copies, by their holders' numbers: here, else in this node, else all."""
    if rank in holders:
        return [holders[rank]]
    node = [h for h in holders if local_size is not None and h // local_size == rank // local_size]
    return [holders[holder] for holder in sorted(node or holders)]
