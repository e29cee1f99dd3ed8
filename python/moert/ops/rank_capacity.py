"""As many rows for every rank, whatever the routing: sizes that no rank has to ask another for (GShard, 2006.16668).

Letters: T tokens, k choices, E experts of R ranks, C rows of each rank for each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moert.ops.expert_map import ExpertMap
from moert.ops.kinds import expect
from moert.ops.permute import permute_plan
from moert.types import DispatchPlan, Routing

DROPS = ("position", "weight")


@dataclass(frozen=True)
class Capacity:
    """Rows that every rank sends to every other; of more the last are dropped, or (drop="weight") the lightest."""

    rows: int
    drop: str = "position"

    def __post_init__(self):
        expect(int, rows=self.rows)
        if self.rows < 0:
            raise ValueError(f"rows must be at least 0, got {self.rows}")
        if self.drop not in DROPS:
            raise ValueError(f"drop must be one of {', '.join(DROPS)}, got {self.drop}")


def plan_within(routing: Routing, experts: ExpertMap, capacity: Capacity) -> tuple[DispatchPlan, Tensor]:
    """dispatch_plan with C slots for each rank: offsets [R+1], tokens [R*C] (-1: none), slots [T, k]; rows dropped [].

    Of the tokens that a rank has too many of the first stay, or those whose choices there weigh most (ties: the first).
    """
    E, R = experts.num_experts, experts.num_ranks
    ids = routing.ids.long()
    known = (ids >= 0) & (ids < E)
    # [T, k]: the rank of each choice, R where it has none.
    where = (
        torch.where(known, experts.on(ids.device)[0][ids.clamp(0, E - 1)].long(), R) if E else torch.full_like(ids, R)
    )
    again = (where[:, :, None] == where[:, None, :]).tril(-1).any(-1)
    wanted = torch.where(again, R, where)
    if capacity.drop == "weight":
        mass = routing.weights.new_zeros(len(ids), R + 1).scatter_add(1, where, routing.weights.detach())
        goes = torch.zeros_like(mass, dtype=torch.bool).scatter(1, wanted, True)
        order = mass.masked_fill(~goes, -torch.inf).argsort(stable=True, dim=0, descending=True)
        place = torch.empty_like(order).scatter(
            0, order, torch.arange(len(ids), device=ids.device)[:, None].expand_as(order)
        )
        stays = torch.where(place.gather(1, wanted) < capacity.rows, wanted, R)
    else:
        stays = wanted
    plan = permute_plan(stays, R, capacity.rows)
    return plan, (wanted < R).sum() - (plan.slots >= 0).sum()


def plan_within_ref(routing: Routing, experts: ExpertMap, capacity: Capacity) -> tuple[DispatchPlan, Tensor]:
    (T, k), R = routing.ids.shape, experts.num_ranks
    tokens, slots, dropped = [-1] * (R * capacity.rows), [[-1] * k for _ in range(T)], 0
    for r in range(R):
        mine, found = set(experts.experts_of(r)), []
        for t, (ids, weights) in enumerate(zip(routing.ids.tolist(), routing.weights.tolist(), strict=True)):
            here = [j for j, e in enumerate(ids) if e in mine]
            if here:
                found.append((-sum(weights[j] for j in here) if capacity.drop == "weight" else t, t, here[0]))
        dropped += max(0, len(found) - capacity.rows)
        kept = sorted(found)[: capacity.rows]
        for n, (_, t, j) in enumerate(sorted(kept, key=lambda copy: copy[1]), r * capacity.rows):
            tokens[n], slots[t][j] = t, n
    offsets = torch.arange(R + 1) * capacity.rows
    plan = DispatchPlan(offsets.int(), torch.tensor(tokens).int(), torch.tensor(slots).int().reshape(T, k))
    return plan, torch.tensor(dropped)
