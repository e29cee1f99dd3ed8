import torch

from case import Case
from moert.ops.gating import topk_gating
from moert.testing import Shape


def case(shape: Shape, dtype: torch.dtype) -> Case:
    logits = torch.randn(shape.T, shape.E).to(dtype)
    providers = {
        "moert": lambda logits: topk_gating(logits, shape.k, renormalize=True)[0],
        "torch": lambda logits: _torch(logits, shape.k),
    }
    written = shape.T * shape.k * 8  # a float32 weight and an int32 id
    return Case((logits,), providers, 5 * logits.numel(), logits.nbytes + written)


def _torch(logits, k):
    weights, _ = logits.float().softmax(-1).topk(k)
    return weights / weights.sum(-1, keepdim=True)
