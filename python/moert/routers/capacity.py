"""Bounds on the tokens of each expert, and on the choices of each device."""

import torch
from torch import Tensor

from moert.ops.expert_choice import expert_choice
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
