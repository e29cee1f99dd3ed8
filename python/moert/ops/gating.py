"""Gating: which experts a token goes to, and with what weights.  G expert groups.

Scores of Switch (arXiv:2101.03961), Mixtral (2401.04088), DeepSeek-V2 and V3 (2405.04434, 2412.19437), ReMoE
(2412.14711).
"""

import torch
from torch import Tensor

from moert.ops.kinds import OPTIONAL, expect
from moert.types import GroupLimit

_NO_LIMIT = GroupLimit(1, 1, "max")


def topk_gating(
    logits: Tensor,
    k: int,
    score: str = "softmax",
    bias: Tensor | None = None,
    renormalize: bool = False,
    scale: float = 1.0,
    groups: GroupLimit | None = None,
) -> tuple[Tensor, Tensor]:
    """The k experts of the highest score, and their scores as weights.

    logits [T, E], bias [E] -> weights [T, k] float32 in the order of selection, ids [T, k] int32; ties go to the lower
    id.  score: "softmax", "softmax_over_topk" (of the k chosen logits), "sigmoid", "relu" or "identity" (the logits).
    The bias counts in the selection only and has no gradient; renormalize divides by the sum + 1e-20; scale comes last.
    Arithmetic and weights are float64 for float64 logits.  A NaN loses to everything; the ids of a row are distinct,
    come what may.
    """
    expect(Tensor, logits=logits)
    expect(OPTIONAL, bias=bias)
    expect((GroupLimit, type(None)), groups=groups)
    limit = groups or _NO_LIMIT
    return torch.ops.moert.topk_gating(
        logits, k, score, bias, renormalize, scale, limit.num_groups, limit.topk_groups, limit.score
    )


def topk_gating_ref(logits, k, score="softmax", bias=None, renormalize=False, scale=1.0, groups=None):
    logits = logits if logits.dtype == torch.float64 else logits.float()
    limited = groups is not None and groups.topk_groups < groups.num_groups
    scores = SCORES[score](logits)
    # Scores grow with their logits: where nothing is added to them the logits decide, which rounding does not tie.
    by_logit = bias is None and score != "relu" and not (limited and groups.score == "top2")
    select = logits if by_logit else scores if bias is None else scores + bias
    barred = _barred(select, groups) if limited else torch.zeros_like(select, dtype=torch.bool)
    ids = _ranking(select, barred)[:, :k]
    weights = scores.gather(-1, ids)
    if score == "softmax_over_topk":
        weights = weights.softmax(-1)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, ids.int()


SCORES = {
    "softmax": lambda logits: logits.softmax(-1),
    "softmax_over_topk": lambda logits: logits,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "identity": lambda logits: logits,
}


def _ranking(scores, barred):
    """[T, n] -> the columns of each row from best to worst: numbers, then NaN, then what is barred; ties by column."""
    last = torch.where(barred, 2, scores.isnan().int())
    order = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    return order.gather(-1, last.gather(-1, order).sort(dim=-1, stable=True).indices)


def _barred(scores, groups):
    """[T, E] -> whether an expert is outside the best groups of its token."""
    T, E = scores.shape
    by_group = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).view(T, groups.num_groups, E // groups.num_groups)
    best = by_group.amax(-1) if groups.score == "max" else by_group.topk(2, -1).values.sum(-1)
    chosen = _ranking(best, torch.zeros_like(best, dtype=torch.bool))[:, : groups.topk_groups]
    barred = torch.ones_like(best, dtype=torch.bool).scatter(-1, chosen, False)
    return barred.repeat_interleave(E // groups.num_groups, -1)


def weights_dtype(logits):
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@torch.library.register_fake("moert::topk_gating")
def _(logits, k, score, bias, renormalize, scale, num_groups, topk_groups, group_score):
    torch._check(logits.dim() == 2, lambda: f"logits must be [T, E], got shape {list(logits.shape)}")
    T, E = logits.shape
    torch._check(0 <= k <= E, lambda: f"k must be in [0, E={E}], got {k}")
    if bias is not None:
        torch._check(bias.device == logits.device, lambda: f"bias must be on {logits.device}, got {bias.device}")
    return logits.new_empty(T, k, dtype=weights_dtype(logits)), logits.new_empty(T, k, dtype=torch.int32)


@torch.library.register_fake("moert::topk_gating_backward")
def _(dweights, logits, ids, score, renormalize, scale):
    for name, x in (("dweights", dweights), ("ids", ids)):
        torch._check(x.device == logits.device, lambda: f"{name} must be on {logits.device}, got {x.device}")  # noqa: B023
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    logits, _, score, _, renormalize, scale = inputs[:6]
    _, ids = output
    ctx.save_for_backward(logits, ids)
    ctx.mark_non_differentiable(ids)
    ctx.options = (score, renormalize, scale)


def _backward(ctx, dweights, _):
    logits, ids = ctx.saved_tensors
    dlogits = torch.ops.moert.topk_gating_backward(dweights, logits, ids, *ctx.options)
    return (dlogits,) + (None,) * 8


def _refuse(ctx, *grads):
    raise RuntimeError("create_graph must be False, got True: the gradient of topk_gating has no gradient of its own")


torch.library.register_autograd("moert::topk_gating", _backward, setup_context=_setup_context)
torch.library.register_autograd("moert::topk_gating_backward", _refuse)
