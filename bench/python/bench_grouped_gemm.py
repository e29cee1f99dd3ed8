import torch
import torch.nn.functional as F

from case import Case
from moert.ops.grouped_gemm import grouped_gemm
from moert.ops.permute import permute_plan
from moert.testing import Shape


def case(shape: Shape, dtype: torch.dtype) -> Case:
    """The first product of an expert, H to 2I, over rows that already lie in expert order."""
    S, N = shape.T * shape.k, 2 * shape.I
    offsets = permute_plan(shape.routing().ids, shape.E).offsets
    x = torch.randn(S, shape.H).to(dtype)
    w = torch.randn(shape.E, N, shape.H).mul(shape.H**-0.5).to(dtype)
    providers = {
        "moert": lambda x, w: grouped_gemm(x, w, offsets),
        "torch": lambda x, w: _loop(x, w, offsets.tolist()),
        "torch_grouped_mm": lambda x, w: F.grouped_mm(x, w.mT, offs=offsets[1:]),
    }
    used = (offsets.diff() > 0).sum().item() * N * shape.H * w.itemsize
    return Case((x, w), providers, 2 * S * N * shape.H, x.nbytes + used + S * N * x.itemsize)


def _loop(x, w, ends):
    busy = [(e, a, b) for e, (a, b) in enumerate(zip(ends[:-1], ends[1:], strict=True)) if b > a]
    return torch.cat([F.linear(x[a:b], w[e]) for e, a, b in busy])
