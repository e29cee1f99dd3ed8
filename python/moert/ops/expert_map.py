"""Which rank holds which expert.  Letters: E experts of all ranks together, R ranks."""

import zlib
from dataclasses import dataclass, field
from functools import cached_property, reduce

import torch
from torch import Tensor

MOST_LOCAL_EXPERTS = 32767  # a local id travels in 16 bits


@dataclass(frozen=True, eq=False)
class ExpertMap:
    """expert_to_rank [E] and local_ids [E], int32 on the CPU: where each expert lies, its number among that rank's own.

    A rank's experts are numbered in the order of their ids.  A rank may hold none.  copy_of: where several ranks hold
    an expert, the experts that the last entries are further copies of.
    """

    expert_to_rank: Tensor
    local_ids: Tensor
    num_ranks: int
    copy_of: tuple[int, ...] = ()
    held: list[int] = field(init=False)  # how many experts each rank has
    _elsewhere: dict[torch.device, tuple[Tensor, Tensor]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self):
        E = len(self.expert_to_rank)
        for name in ("expert_to_rank", "local_ids"):
            ids = getattr(self, name)
            if (ids.shape, ids.dtype, ids.device.type) != ((E,), torch.int32, "cpu"):
                got = f"{ids.dtype} {list(ids.shape)} on {ids.device}"
                raise ValueError(f"{name} must be int32 [E={E}] on the CPU, got {got}")
        wrong = self.local_ids[(self.local_ids < 0) | (self.local_ids > MOST_LOCAL_EXPERTS)]
        if len(wrong):
            raise ValueError(f"local_ids must hold ids in [0, {MOST_LOCAL_EXPERTS + 1}), got {wrong[0].item()}")
        object.__setattr__(self, "held", torch.bincount(self.expert_to_rank, minlength=self.num_ranks).tolist())

    @classmethod
    def of(cls, placement, num_experts: int, num_ranks: int) -> "ExpertMap":
        """From expert_to_rank, any sequence of E ranks; None: contiguous blocks, the first E mod R longer by one."""
        if placement is None:
            ranks = torch.arange(num_ranks).repeat_interleave(_block_sizes(num_experts, num_ranks))
        else:
            ranks = torch.as_tensor(placement)
        if ranks.shape != (num_experts,):
            raise ValueError(f"placement must have shape [E={num_experts}], got {list(ranks.shape)}")
        if ranks.is_floating_point() or ranks.is_complex() or ranks.dtype == torch.bool:
            raise ValueError(f"placement must hold integers, got {ranks.dtype}")
        wrong = ranks[(ranks < 0) | (ranks >= num_ranks)]
        if len(wrong):
            raise ValueError(f"placement must hold ranks in [0, R={num_ranks}), got {wrong[0].item()}")
        counts = torch.bincount(ranks.long(), minlength=num_ranks)
        if counts.max() > MOST_LOCAL_EXPERTS:
            raise ValueError(f"placement must give a rank at most {MOST_LOCAL_EXPERTS} experts, got {counts.max()}")
        order, starts = ranks.argsort(stable=True), counts.cumsum(0) - counts
        local = torch.empty_like(order).scatter_(0, order, torch.arange(num_experts) - starts[ranks[order].long()])
        return cls(ranks.int(), local.int(), num_ranks)

    @property
    def num_experts(self) -> int:
        return len(self.expert_to_rank)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """expert_to_rank and local_ids there."""
        if device.type == "cpu":
            return self.expert_to_rank, self.local_ids
        if device not in self._elsewhere:
            self._elsewhere[device] = self.expert_to_rank.to(device), self.local_ids.to(device)
        return self._elsewhere[device]

    def experts_of(self, rank: int) -> list[int]:
        """Ids of the experts that a rank holds, in the order in which it holds them."""
        return (self.expert_to_rank == rank).nonzero().flatten().tolist()

    @cached_property
    def checksum(self) -> int:
        """A number that two different maps hardly share: ranks compare it before they exchange anything."""
        copies = torch.tensor(self.copy_of, dtype=torch.int32, device="cpu")
        parts = (part.numpy().tobytes() for part in (self.expert_to_rank, self.local_ids, copies))
        return reduce(lambda sum_so_far, part: zlib.crc32(part, sum_so_far), parts, 0)


def _block_sizes(num_experts: int, num_ranks: int) -> Tensor:
    return torch.tensor([num_experts // num_ranks + (r < num_experts % num_ranks) for r in range(num_ranks)])
