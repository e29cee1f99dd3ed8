"""Losses and statistics of routings.  Nothing here waits for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moert.ops.kinds import OPTIONAL, expect
from moert.routers.documents import document_of_token, tokens_per_document
from moert.types import Routing


def expert_load(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """How many choices each expert got: int64 [E].

    Ids outside [0, E) do not count, nor do the tokens where mask [T] is False.
    """
    _check(routing, mask)
    ids, E = routing.ids.long(), routing.num_experts
    kept = (ids >= 0) & (ids < E)
    if mask is not None:
        kept = kept & mask.bool().reshape(-1, 1)
    # The dropped go to a bin of their own: selecting the kept ones would need their number on the host.
    bins = torch.zeros(E + 1, dtype=torch.int64, device=ids.device)
    return bins.scatter_add(0, torch.where(kept, ids, E).flatten(), torch.ones_like(ids).flatten())[:E]


def load_balance_loss(routing: Routing | Sequence[Routing], mask: Tensor | None = None, pooled: bool = True) -> Tensor:
    """E * sum over e of f_e * P_e, the balance loss of GShard and Switch (arXiv:2006.16668, 2101.03961).

    f_e is the number of choices of expert e per token, P_e the mean softmax probability; k where the load is even.
    The tokens of several routings (layers) are pooled, as in transformers and RMoE's release, so that one layer may
    make up for another; not pooled, it is the mean of their losses.  Tokens where mask [T] is False do not count.
    """
    routings = [routing] if isinstance(routing, Routing) else list(routing)
    if not routings:
        raise ValueError("routing must be at least one Routing, got none")
    for each in routings:
        _check(each, mask)
    if not pooled:
        return sum(load_balance_loss(each, mask) for each in routings) / len(routings)
    terms = [balance_terms(each, _logits(each).softmax(-1), mask) for each in routings]
    tokens = sum(count for _, _, count in terms).clamp_min(1)
    load = sum(load * count for load, _, count in terms) / tokens
    mean = sum(mean * count for _, mean, count in terms) / tokens
    return routings[0].num_experts * (load * mean).sum()


def balance_terms(
    routing: Routing, p_TE: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What balance losses are made of, for each of the D documents that cu_seqlens bounds (one where it is None).

    Choices of each expert per token [D, E], mean of p_TE over the tokens [D, E] and the number of tokens [D]; tokens
    where mask [T] is False do not count, and a document without tokens has zeros.
    """
    _check(routing, mask)
    T, E = p_TE.shape
    ids = routing.ids.long()
    document, D = document_of_token(cu_seqlens, T, p_TE.device)
    counts = torch.ones_like(document) if mask is None else mask.reshape(-1).to(torch.int64)
    kept = (ids >= 0) & (ids < E)
    bins = document[:, None] * E + torch.where(kept, ids, 0)
    load = p_TE.new_zeros(D * E).scatter_add(0, bins.flatten(), (kept * counts[:, None]).to(p_TE.dtype).flatten())
    p_TE = torch.where(counts.bool()[:, None], p_TE, 0)
    mean = p_TE.new_zeros(D, E).index_add(0, document, p_TE)
    tokens = tokens_per_document(torch.where(counts.bool(), document, -1), D)
    divisor = tokens.clamp_min(1)[:, None]
    return load.view(D, E) / divisor, mean / divisor, tokens


def router_z_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2, which keeps logits small (ST-MoE, arXiv:2202.08906)."""
    _check(routing, mask)
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
    load = expert_load(routing, mask)
    expect(Tensor, bias=bias)
    if bias.shape != load.shape:
        raise ValueError(f"bias must have shape [E={len(load)}], got {list(bias.shape)}")
    return step_expert_bias_(bias, load, rate)


@torch.no_grad()
def step_expert_bias_(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """update_expert_bias_ where the load [E] has been counted, over ranks or steps."""
    # E * load against their sum: whole numbers, which no rounding ties or unties.
    return bias.add_(torch.sign(load.sum() - len(load) * load).to(bias.dtype), alpha=rate)


def _check(routing: Routing, mask: Tensor | None) -> None:
    expect(Routing, routing=routing)
    expect(OPTIONAL, mask=mask)
    if mask is not None and mask.numel() != len(routing.ids):
        raise ValueError(f"mask must have T={len(routing.ids)} elements, got {list(mask.shape)}")


def _logits(routing: Routing) -> Tensor:
    """In float32, or float64 where they are."""
    if routing.logits is None:
        raise ValueError("routing must have logits, got none")
    return routing.logits if routing.logits.dtype == torch.float64 else routing.logits.float()
