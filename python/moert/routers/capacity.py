"""A bound on the tokens of each expert."""

import torch
from torch import Tensor

from moert.ops.permute import permute_plan


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
