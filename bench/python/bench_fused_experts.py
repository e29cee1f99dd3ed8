from dataclasses import replace

import torch
import torch.nn.functional as F

from case import Case
from moert.numerics import batch_invariant
from moert.ops.fused_experts import fused_experts
from moert.testing import Shape


def case(shape: Shape, dtype: torch.dtype) -> Case:
    """The whole expert FFN, SwiGLU, against a loop over the experts in use and against transformers' grouped_mm way."""
    routing = shape.routing()
    x = torch.randn(shape.T, shape.H).to(dtype)
    w1 = torch.randn(shape.E, 2 * shape.I, shape.H).mul(shape.H**-0.5).to(dtype)
    w2 = torch.randn(shape.E, shape.H, shape.I).mul(shape.I**-0.5).to(dtype)
    providers = {
        "moert": lambda x, weights, w1, w2: fused_experts(x, replace(routing, weights=weights), w1, w2),
        "moert_batch_invariant": lambda x, weights, w1, w2: _batch_invariant(
            x, replace(routing, weights=weights), w1, w2
        ),
        "torch": lambda x, weights, w1, w2: loop(x, routing.ids, weights, w1, w2),
        "torch_grouped_mm": lambda x, weights, w1, w2: _grouped_mm(x, routing.ids, weights, w1, w2),
    }
    used = len(routing.ids.unique()) * 3 * shape.H * shape.I * w1.itemsize
    flop = 2 * shape.T * shape.k * 3 * shape.H * shape.I
    return Case((x, routing.weights, w1, w2), providers, flop, 2 * x.nbytes + used)


def _batch_invariant(x, routing, w1, w2):
    with batch_invariant(True):
        return fused_experts(x, routing, w1, w2)


def _ffn(rows, w1, w2):
    gate, up = F.linear(rows, w1).chunk(2, -1)
    return F.linear(F.silu(gate) * up, w2)


def loop(x, ids, weights, w1, w2):
    y = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, choice = torch.where(ids == e)
        y = y.index_add(0, token, _ffn(x[token], w1[e], w2[e]) * weights[token, choice, None].to(x.dtype))
    return y


def _grouped_mm(x, ids, weights, w1, w2):
    T, k = ids.shape
    order = ids.flatten().argsort(stable=True)
    ends = ids.flatten().bincount(minlength=len(w1)).cumsum(0, dtype=torch.int32)
    gate, up = F.grouped_mm(x[order // k], w1.mT, offs=ends).chunk(2, -1)
    rows = F.grouped_mm(F.silu(gate) * up, w2.mT, offs=ends) * weights.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, order // k, rows)
