"""Rows through packed weights one product at a time, where the fused operator cannot look in between.

S slots, E experts, N and K the sizes of one product, as in grouped_gemm.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moert.ops.grouped_gemm import grouped_gemm
from moert.quant.format import PackedTensor
from moert.quant.sub1 import SubOneBitTensor

_UNPACKED = 2**27  # bytes of float32 weights that are there at once


def packed_linear(
    x: Tensor,
    w: PackedTensor | SubOneBitTensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """grouped_gemm over packed w [E, N, K]: x [S, K] (or [T, K] with tokens [S]) -> y [S, N]; x and bias get gradients.

    A few experts are unpacked at a time, those without rows not at all, and again in the backward pass: the float
    weights of a layer are never there together, and autograd keeps none.
    """
    return _PackedLinear.apply(x, offsets, tokens, bias, w)


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, offsets, tokens, bias, w):
        ctx.weight, ctx.rows = w, x.shape[0]
        ctx.save_for_backward(offsets, tokens)
        S = x.shape[0] if tokens is None else tokens.shape[0]
        y = x.new_zeros(S, w.shape[1])
        for first, last, rows, weight, part in _groups(w, offsets, x.dtype):
            chosen = (x[rows], None) if tokens is None else (x, tokens[rows])
            bias_part = None if bias is None else bias[first:last]
            y[rows] = grouped_gemm(chosen[0], weight, part, bias_part, chosen[1])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        offsets, tokens = ctx.saved_tensors
        dx = dy.new_zeros(dy.shape[0], ctx.weight.columns)
        for _, _, rows, weight, part in _groups(ctx.weight, offsets, dy.dtype):
            dx[rows] = grouped_gemm(dy[rows], weight, part, transposed=True)
        if tokens is not None:
            total = torch.promote_types(dy.dtype, torch.float32)
            # Slots without a token (-1) have zero rows.
            of_tokens = torch.zeros(ctx.rows, dx.shape[1], dtype=total, device=dx.device)
            dx = of_tokens.index_add(0, tokens.clamp_min(0).long(), dx.to(total)).to(dy.dtype)
        dbias = None
        if ctx.needs_input_grad[3]:
            ones = dy.new_ones(dy.shape[0], 1)
            dbias = torch.ops.moert.grouped_gemm_wgrad(dy, ones, offsets, None, False).squeeze(2)
        return dx, None, None, dbias, None


def _groups(
    w: PackedTensor | SubOneBitTensor, offsets: Tensor, dtype: torch.dtype
) -> Iterator[tuple[int, int, slice, Tensor, Tensor]]:
    """(first expert, last + 1, their slots, their float weights, their offsets) of neighbours that have rows."""
    E, N, K = w.shape
    together, ends = max(1, _UNPACKED // (4 * N * K or 1)), offsets.tolist()
    first = 0
    while first < E:
        if ends[first] == ends[first + 1]:
            first += 1
            continue
        last = first + 1
        while last < min(E, first + together) and ends[last] < ends[last + 1]:
            last += 1
        weight = w.format.unpack(w.part(first, last)).to(dtype)
        yield first, last, slice(ends[first], ends[last]), weight, offsets[first : last + 1] - ends[first]
        first = last
