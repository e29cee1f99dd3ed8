import torch

from case import Case
from moert.ops.gating import topk_gating
from moert.testing import BENCH_SHAPES, Shape
from moert.types import GroupLimit

SHAPES = (*BENCH_SHAPES, Shape("prefill of 4096 tokens, 128 experts", 4096, 128, 8, 2048, 768))
VARIANTS = ("softmax", "sigmoid", "grouped")
COMPILED = 1024  # tokens from which it is worth the wait


def case(shape: Shape, dtype: torch.dtype, variant: str = "softmax") -> Case:
    """Renormalised weights: of the softmax; of sigmoids that are chosen with a bias; of the same in the best groups."""
    logits = torch.randn(shape.T, shape.E).to(dtype)
    bias = None if variant == "softmax" else torch.randn(shape.E) * 0.1
    groups = min(8, shape.E // 2)
    limit = GroupLimit(groups, groups // 2, "top2") if variant == "grouped" else None
    score = "softmax" if variant == "softmax" else "sigmoid"

    def plain(logits):
        scores = logits.float().softmax(-1) if bias is None else logits.float().sigmoid()
        chosen = scores if bias is None else scores + bias
        if limit:
            chosen = _best_groups(chosen, limit)
        weights = scores.gather(-1, chosen.topk(shape.k).indices)
        return weights / weights.sum(-1, keepdim=True)

    providers = {
        "moert": lambda logits: topk_gating(logits, shape.k, score, bias, renormalize=True, groups=limit)[0],
        "torch": plain,
    }
    if shape.T >= COMPILED:
        providers["torch_compiled"] = torch.compile(plain)
    written = shape.T * shape.k * 8  # a float32 weight and an int32 id
    return Case((logits,), providers, 5 * logits.numel(), logits.nbytes + written)


def _best_groups(scores, limit):
    by_group = scores.view(len(scores), limit.num_groups, -1)
    best = by_group.topk(2).values.sum(-1).topk(limit.topk_groups).indices
    barred = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter(-1, best, False)
    return by_group.masked_fill(barred[..., None], -torch.inf).flatten(1)
