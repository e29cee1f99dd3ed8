import torch
import torch.nn.functional as F

from case import Case
from moert.ops.union_experts import union_experts
from moert.testing import Shape


def case(shape: Shape, dtype: torch.dtype) -> Case:
    """The k experts that a chunk of tokens uses, of a feed-forward network cut in E, against the whole network."""
    E, I, H = shape.E, shape.I, shape.H
    x, ids = torch.randn(shape.T, H).to(dtype), torch.randperm(E)[: shape.k].sort().values.int()
    gains = torch.zeros(shape.T, E).index_fill(1, ids.long(), 1.0) * torch.rand(shape.T, E)
    w1 = torch.randn(E, I, H).mul(H**-0.5).to(dtype)
    w2 = torch.randn(E, I, H).mul(I**-0.5).to(dtype)
    providers = {
        "moert": lambda x, gains, w1, w2: union_experts(x, gains, ids, w1, w2.mT),
        "torch": lambda x, gains, w1, w2: _loop(x, gains, w1, w2, ids.tolist()),
        "torch_dense": _dense,
    }
    used = shape.k * 2 * H * I * w1.itemsize
    return Case((x, gains, w1, w2), providers, 4 * shape.T * shape.k * H * I, 2 * x.nbytes + used)


def _loop(x, gains, w1, w2, ids):
    return sum((F.silu(F.linear(x, w1[e])) * gains[:, e, None].to(x.dtype)) @ w2[e] for e in ids)


def _dense(x, gains, w1, w2):
    h = F.silu(F.linear(x, w1.flatten(0, 1))).unflatten(-1, w1.shape[:2]) * gains[..., None].to(x.dtype)
    return h.flatten(1) @ w2.flatten(0, 1)
