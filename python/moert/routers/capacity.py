"""Bounds on the tokens of each expert, and on the choices of each device."""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from moert.ops.expert_choice import expert_choice
from moert.ops.permute import permute_plan
from moert.types import Routing


def within_capacity(ids: Tensor, capacity: Tensor) -> Tensor:
    """ids [T, k], capacity [E] integers -> ids of which each expert keeps its first capacity[e] tokens; the rest are E.

    First in token order, so that a later token never displaces an earlier one.
    """
    E = len(capacity)
    plan = permute_plan(ids, E)
    kept = plan.slots >= 0
    expert = torch.where(kept, ids.long(), 0)
    place = plan.slots - plan.offsets[expert]
    return torch.where(kept & (place < capacity[expert]), ids, E)


def within_device_capacity(
    ids: Tensor, affinity: Tensor, num_experts: int, num_devices: int, capacity: Tensor, kept: Tensor
) -> Tensor:
    """ids [T, k] of which each device keeps the `capacity` choices of the largest affinity [T, k]; the rest are E.

    A device is a contiguous group of experts.  The choices of tokens where kept [T] is True stay whatever comes and
    count first; ties go to the earlier token.
    """
    device = torch.where((ids >= 0) & (ids < num_experts), ids // (num_experts // num_devices), num_devices)
    # A device takes its best choices as an expert takes its best tokens: every choice is a row, every device a segment.
    scores = torch.where(kept[:, None], torch.finfo(affinity.dtype).max, affinity.detach())
    limit = capacity.expand(num_devices, 1)
    taken = expert_choice(scores.reshape(-1, 1), device.flatten(), limit, 1)[1].view_as(ids) == 0
    return torch.where(taken | kept[:, None], ids, num_experts)


@dataclass(frozen=True)
class CapacityPolicy:
    """Room for C choices of each expert, as Tutel counts it (arXiv 2206.03382): the choices beyond it are dropped.

    With q = ceil(T / E): C = k * int(factor * q) for a factor above 0; for 0 as many as the expert that most tokens
    chose has, so that none is dropped; below 0 as many as that, but at most k * int(-factor * q).  C is then rounded up
    to a multiple of align, and align before to one of 128 where it exceeds 256.

    All first choices come before all second ones, and so on; among them tokens in their order, or, prioritized, in that
    of their largest probability (softmax of the routing's logits; their largest weight where it has none), ties in
    theirs.  The weights stay as they are.
    """

    factor: float
    align: int = 1
    prioritized: bool = False

    def __post_init__(self):
        if not (isinstance(self.align, int) and self.align >= 1):
            raise ValueError(f"align must be a whole number of at least 1, got {self.align}")

    def __call__(self, routing: Routing, group: dist.ProcessGroup | None = None) -> Routing:
        """The routing with -1 (int32) for choices that are dropped; where capacity does, reads on the host."""
        ids, E = routing.ids.int(), routing.num_experts
        room = ids.new_full((E,), self.capacity(routing, group))
        order = torch.arange(len(ids), device=ids.device)
        if self.prioritized:
            probs = routing.weights if routing.logits is None else routing.logits.softmax(-1)
            order = probs.detach().amax(-1).argsort(descending=True, stable=True)
        turns = ids[order].T
        kept = within_capacity(turns.reshape(-1, 1), room).view(turns.shape).T
        kept = torch.where((kept >= 0) & (kept < E), kept, -1)
        return replace(routing, ids=torch.empty_like(kept).index_copy_(0, order, kept), plan=None)

    def capacity(self, routing: Routing, group: dist.ProcessGroup | None = None) -> int:
        """C; with a group, every rank of which must call it, T and the most tokens of an expert are its largest.

        Nothing is read on the host for a factor above 0 without a group.
        """
        (T, k), E = routing.ids.shape, routing.num_experts
        most = 0
        if self.factor <= 0 or group is not None:
            counted = torch.bincount(routing._columns().flatten(), minlength=E + 1)[:E].max()
            largest = torch.stack([torch.full_like(counted, T), counted])
            if group is not None:
                dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
            T, most = largest.tolist()
        room = k * int(abs(self.factor) * -(-T // E))
        C = room if self.factor > 0 else most if self.factor == 0 else min(most, room)
        align = -(-self.align // 128) * 128 if self.align > 256 else self.align
        return -(-C // align) * align
