"""Routing by rank: each token goes to the experts of given ranks (1 is its best) instead of to its k best.

Self-contrast decoding (arXiv:2405.14507) runs a model as it is and with a deliberately weak choice of ranks at once.
"""

import torch
from torch import Tensor

from moert.ops.gating import topk_gating
from moert.routers.base import RouterContext
from moert.types import GroupLimit


def gating(
    logits: Tensor, k: int, context: RouterContext | None, score: str = "softmax", **options
) -> tuple[Tensor, Tensor]:
    """topk_gating, whose options these are, or rank_gating where the context has ranks; it may say renormalize too."""
    if context is None or context.ranks is None:
        return topk_gating(logits, k, score, **options)
    if context.renormalize is not None:
        options["renormalize"] = context.renormalize
    return rank_gating(logits, context, score, **options)


def rank_gating(
    logits: Tensor,
    context: RouterContext,
    score: str = "softmax",
    bias: Tensor | None = None,
    renormalize: bool = False,
    scale: float = 1.0,
    groups: GroupLimit | None = None,
) -> tuple[Tensor, Tensor]:
    """topk_gating for the ranks of context.ranks[context.group[t]] (the first group where group is None).

    logits [T, E] -> weights [T, r], ids [T, r], r the largest number of ranks of a group; a group with fewer has id E
    and weight 0 in the rest.  Ranks count among the experts that a token may choose from.
    """
    E = logits.shape[1]
    most = E if groups is None else groups.topk_groups * (E // groups.num_groups)
    for rank in (rank for ranks in context.ranks for rank in ranks):
        if not 1 <= rank <= most:
            raise ValueError(f"ranks must be in [1, {most}], got {rank}")
    # The softmax over the chosen is not over the best, so it follows them here.
    over_chosen = score == "softmax_over_topk"
    deepest = max([1, *(rank for ranks in context.ranks for rank in ranks)])
    weights, ids = topk_gating(logits, deepest, "identity" if over_chosen else score, bias, groups=groups)
    rank_TR = _rank_of_each_token(context, len(logits), logits.device)
    index, given = (rank_TR - 1).clamp_min(0), rank_TR > 0
    weights = weights.gather(1, index)
    if over_chosen:
        # Finite, so that a token without ranks has a softmax (of nothing that counts) and not NaN for a gradient.
        weights = weights.masked_fill(~given, torch.finfo(weights.dtype).min).softmax(-1)
    weights = torch.where(given, weights, 0)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, torch.where(given, ids.gather(1, index), E)


def _rank_of_each_token(context: RouterContext, T: int, device: torch.device) -> Tensor:
    """[T, r], 0 where a token's group has fewer ranks."""
    width = max(map(len, context.ranks))
    table = torch.tensor([[*ranks, *[0] * (width - len(ranks))] for ranks in context.ranks], device=device)
    return table[0].expand(T, width) if context.group is None else table[context.group.long()]
