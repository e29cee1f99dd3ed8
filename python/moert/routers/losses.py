"""Losses and statistics of routings.  Nothing here waits for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moert.types import Routing


def expert_load(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """How many choices each expert got: int64 [E].

    Ids outside [0, E) do not count, nor do the tokens where mask [T] is False.
    """
    ids, E = routing.ids.long(), routing.num_experts
    kept = (ids >= 0) & (ids < E)
    if mask is not None:
        kept = kept & mask.bool().reshape(-1, 1)
    # The dropped go to a bin of their own: selecting the kept ones would need their number on the host.
    bins = torch.zeros(E + 1, dtype=torch.int64, device=ids.device)
    return bins.scatter_add(0, torch.where(kept, ids, E).flatten(), torch.ones_like(ids).flatten())[:E]


def load_balance_loss(routing: Routing | Sequence[Routing], mask: Tensor | None = None) -> Tensor:
    """E * sum over e of f_e * P_e, the balance loss of GShard and Switch (arXiv:2006.16668, 2101.03961).

    f_e is the number of choices of expert e per token, P_e the mean softmax probability; k where the load is even.
    Several routings (layers) are pooled, as in transformers.  Tokens where mask [T] is False do not count.
    """
    routings = [routing] if isinstance(routing, Routing) else list(routing)
    load, probability, tokens = 0, 0, 0
    for each in routings:
        p_TE = _logits(each).softmax(-1)
        if mask is None:
            tokens = tokens + len(p_TE)
        else:
            mask_T = mask.reshape(-1)
            tokens = tokens + mask_T.bool().sum()
            p_TE = torch.where(mask_T.bool()[:, None], p_TE, 0)
        load = load + expert_load(each, mask)
        probability = probability + p_TE.sum(0)
    tokens = torch.as_tensor(tokens, device=probability.device).clamp_min(1)
    return routings[0].num_experts * ((load / tokens) * (probability / tokens)).sum()


def router_z_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2, which keeps logits small (ST-MoE, arXiv:2202.08906)."""
    z_T = _logits(routing).logsumexp(-1).square()
    if mask is None:
        return z_T.sum() / max(len(z_T), 1)
    mask_T = mask.reshape(-1).bool()
    return torch.where(mask_T, z_T, 0).sum() / mask_T.sum().clamp_min(1)


@torch.no_grad()
def update_expert_bias_(bias: Tensor, routing: Routing, rate: float = 0.001, mask: Tensor | None = None) -> Tensor:
    """bias += rate * sign(mean load - load), in place: balance without a loss (arXiv:2408.15664).

    bias [E] float32.  Once a step, with the routing of the whole batch.
    """
    load = expert_load(routing, mask).to(bias.dtype)
    return bias.add_(torch.sign(load.mean() - load), alpha=rate)


def _logits(routing: Routing) -> Tensor:
    """In float32, or float64 where they are."""
    if routing.logits is None:
        raise ValueError("routing must have logits, got none")
    return routing.logits if routing.logits.dtype == torch.float64 else routing.logits.float()
