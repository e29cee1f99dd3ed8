"""Experts by modality: each modality has its own router over its own experts (MoMa, arXiv:2407.21770)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moert.routers.base import Router, RouterContext
from moert.types import DispatchPlan, Routing


class ModalityRouter(Router):
    """routers[g] routes the tokens with context.modality [T] == g to its experts, which follow those of routers[:g].

    Every router sees all tokens, with the others' masked: shapes do not depend on the modalities, and together the
    gates cost what one gate over all experts does.  losses are named "g.name".
    """

    def __init__(self, routers: Sequence[Router]):
        if not routers:
            raise ValueError("routers must have at least one, got none")
        super().__init__(sum(router.num_experts for router in routers))
        self.routers = nn.ModuleList(routers)

    def forward(self, x: Tensor, context: RouterContext | None = None) -> Routing:
        modality = self._modality(x, context)
        routings, first, offset = [], [], 0
        for g, router in enumerate(self.routers):
            mine = modality == g
            mask = mine if context.mask is None else mine & context.counted()
            bias = context.logit_bias
            bias = None if bias is None else bias[..., offset : offset + router.num_experts]
            routings.append(router(x, replace(context, mask=mask, logit_bias=bias)))
            first.append(offset)
            offset += router.num_experts
        k = max(routing.ids.shape[1] for routing in routings)
        ids = torch.full((len(x), k), self.num_experts, device=x.device)
        weights = torch.zeros_like(ids, dtype=routings[0].weights.dtype)
        for g, routing in enumerate(routings):
            pad = (0, k - routing.ids.shape[1])
            real = (routing.ids >= 0) & (routing.ids < routing.num_experts) & (modality == g)[:, None]
            ids = torch.where(F.pad(real, pad), F.pad(routing.ids, pad) + first[g], ids)
            weights = torch.where(F.pad(real, pad), F.pad(routing.weights, pad), weights)
        plan = None
        if all(routing.plan is not None for routing in routings):
            plan = _joined([routing.plan for routing in routings], modality, k)
        logits = [routing.logits for routing in routings]
        losses = {f"{g}.{name}": loss for g, each in enumerate(routings) for name, loss in each.losses.items()}
        together = None if any(each is None for each in logits) else torch.cat(logits, -1)
        return Routing(ids, weights, self.num_experts, together, losses, plan=plan)

    def _modality(self, x: Tensor, context: RouterContext | None) -> Tensor:
        if context is None or context.modality is None:
            raise ValueError("context.modality must be given, got None")
        modality, G = context.modality.reshape(-1), len(self.routers)
        good = (modality >= 0) & (modality < G)
        # The number of bad ones would make a GPU wait for the host, and a compiled graph break.
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            if bad := int((~good).sum()):
                raise ValueError(f"context.modality must be in [0, {G}), got {bad} tokens outside")
        else:
            torch._assert_async(good.all(), "context.modality must be in [0, number of routers)")
        return modality


def _joined(plans: list[DispatchPlan], modality: Tensor, k: int) -> DispatchPlan:
    """One plan of all experts from those of each modality's, whose tokens no other has; slots in use move together."""
    S, start = sum(len(plan.tokens) for plan in plans), plans[0].offsets.new_zeros(1)
    tokens = start.new_full((S + 1,), -1)  # what is not in use goes to the last place, and away
    slots, offsets = start.new_full((len(modality), k), -1), []
    for g, plan in enumerate(plans):
        at = torch.arange(len(plan.tokens), device=start.device)
        used = at < plan.offsets[-1]
        tokens = tokens.scatter(0, torch.where(used, at + start, S), torch.where(used, plan.tokens, -1))
        padded = F.pad(plan.slots, (0, k - plan.slots.shape[1]), value=-1)
        slots = torch.where((padded >= 0) & (modality == g)[:, None], padded + start, slots)
        offsets.append(plan.offsets[:-1] + start)
        start = start + plan.offsets[-1:]
    return DispatchPlan(torch.cat([*offsets, start]), tokens[:S], slots)
