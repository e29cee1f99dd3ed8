"""Experts cut along their intermediate size, spread over ranks, and put together again where a call wants them.

Letters: E experts, R ranks, s slices of each expert, n of them that come together.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from moert.experts.glu import GluExperts
from moert.ops.dispatch import Dispatched
from moert.ops.ranks import Guard, subgroup
from moert.ops.roll_call import roll_call
from moert.parallel.expert_parallel import ExpertParallel
from moert.parallel.pulse import Group
from moert.types import Onto, Routing


class SlicedExperts(ExpertParallel):
    """ExpertParallel whose experts are E * s slices; the partial results of an expert's slices add up to its own.

    local holds this rank's slices; the last bias is cut along H, so that each element of a parameter lies on one rank.
    Before they compute, ranks that hold `together` neighbouring slices of an expert gather them, for this call.
    """

    def __init__(self, experts: GluExperts, s: int, group: Group = None, **options):
        super().__init__(_sliced(experts, s), group, **options)
        self.hidden, self.s, self.together = experts.hidden, s, 1
        self.neighbours = {n: self._neighbours(n) for n in divisors(s) if n > 1}

    def here(self, x: Tensor, routing: Routing, onto: Onto | None) -> Tensor:
        """All experts over this rank's tokens, on this rank."""
        return functional_call(self.local, self.whole(), (x, routing, onto))

    def whole(self) -> dict[str, Tensor]:
        """Parameters of all experts by name, [E, ...] as in GluExperts; every rank of the group must ask for them."""
        return self._joined(self.s, self.group)

    def _local(self) -> Callable[[Dispatched], Tensor]:
        n = self.together
        weights = self._own() if n == 1 else self._joined(n, self.neighbours[n])
        if "down_proj_bias" in weights and n < self.s:
            bias, first = weights["down_proj_bias"], self.ranks.rank % self.s // n * n
            before = first * self.hidden // self.s
            weights["down_proj_bias"] = F.pad(bias, (before, self.hidden - before - bias.shape[1]))
        return lambda there: functional_call(self.local, weights, (there.x, there.routing))

    def _joined(self, n: int, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
        """Of the slices of all ranks of the group n and n together."""
        guard = self.ranks.guard or partial(roll_call, group)  # of these ranks, not of all
        every = {name: _Gather.apply(p, group, guard) for name, p in self._own().items()}
        return {name: _joined(p, n, *cut_of(name, self.local)) for name, p in every.items()}

    def _neighbours(self, n: int) -> dist.ProcessGroup:
        """This rank and those with which it makes n in a row."""
        first = self.ranks.rank // n * n
        whole = dist.get_process_group_ranks(self.group or dist.group.WORLD)
        return subgroup(whole[first : first + n], self.group)


def cut_of(name: str, experts: GluExperts) -> tuple[int, int]:
    """In which dimension a parameter is cut, and into a part of how many halves there (gates, then ups)."""
    if name == "down_proj":
        return (1 if experts.layout.transposed else 2), 1
    if name == "down_proj_bias":
        return 1, 1
    dim = 2 if experts.layout.transposed and name == "gate_up_proj" else 1
    return dim, 2 if experts.activation.gated and not experts.layout.interleaved else 1


def divisors(s: int) -> tuple[int, ...]:
    return tuple(n for n in range(1, s + 1) if s % n == 0)


def _sliced(experts: GluExperts, s: int) -> GluExperts:
    """E * s experts, an expert's slices after each other; with a bias the last one is cut along H."""
    E, bias = experts.num_experts, experts.down_proj_bias is not None
    sizes = E * s, experts.hidden, experts.intermediate // s
    with torch.device("meta"):
        slices = GluExperts(*sizes, experts.activation, bias, experts.layout)
    for name, parameter in experts.named_parameters():
        dim, halves = cut_of(name, experts)
        # [E, ..., halves * s * width, ...] -> [E * s, ..., halves * width, ...]
        cut = parameter.detach().unflatten(dim, (halves, s, -1)).movedim(dim + 1, 1)
        cut = cut.flatten(dim + 1, dim + 2).flatten(0, 1)
        slices.register_parameter(name, nn.Parameter(cut, requires_grad=parameter.requires_grad))
    return slices.train(experts.training)


def _joined(slices: Tensor, n: int, dim: int, halves: int) -> Tensor:
    """[E * n, ..., halves * width, ...] -> [E, ..., halves * n * width, ...]"""
    if n == 1:
        return slices
    slices = slices.unflatten(0, (-1, n)).unflatten(dim + 1, (halves, -1))
    return slices.movedim(1, dim + 1).flatten(dim, dim + 2)


class _Gather(torch.autograd.Function):
    """slices [m, ...] of each rank of the group -> all of them, in the order of ranks.

    A gradient is the sum of the ranks'; torch adds up narrow types in float32.
    """

    @staticmethod
    def forward(ctx, slices: Tensor, group: dist.ProcessGroup | None, guard: Guard) -> Tensor:
        ctx.group, ctx.guard, R = group, guard, dist.get_world_size(group)
        slices = slices.contiguous()
        whole = slices.new_empty(R * len(slices), *slices.shape[1:])
        with guard():
            dist.all_gather(list(whole.view(torch.uint8).chunk(R)), slices.view(torch.uint8), group=group)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        R = dist.get_world_size(ctx.group)
        grad = grad.contiguous()
        parts = torch.empty_like(grad)
        with ctx.guard():
            dist.all_to_all_single(parts.view(torch.uint8), grad.view(torch.uint8), group=ctx.group)
        return parts.unflatten(0, (R, -1)).sum(0), None, None
