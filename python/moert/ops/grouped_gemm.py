"""Grouped GEMM: y[s] = x[s] @ w[expert of s].T.  S slots (rows in expert order), N and K the sizes of one product."""

import torch
from torch import Tensor

from moert.ops.autocast import autocast
from moert.ops.kinds import OPTIONAL, expect
from moert.ops.once_differentiable import once_differentiable
from moert.ops.precision import rounds_to_tf32
from moert.ops.same_device import same_device


def grouped_gemm(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    tokens: Tensor | None = None,
    scale: Tensor | None = None,
    scale_on: str = "output",
    transposed: bool = False,
) -> Tensor:
    """One product per expert over rows that lie in expert order.

    x [S, K], w [E, N, K] ([E, K, N] if transposed), offsets [E+1] int32, bias [E, N] -> y [S, N] in x's dtype.
    With tokens [S] int32, row s is x[tokens[s]] and x is [T, K].  scale [S] multiplies each row of the input or the
    output (after the bias).  Rows from offsets[E] on are zero.  Sums are float32 (float64 for float64).  On a GPU
    float32 factors are rounded to tf32, in backward too, where torch's own float32 matrix products may be.
    """
    expect(Tensor, x=x, w=w, offsets=offsets)
    expect(OPTIONAL, bias=bias, tokens=tokens, scale=scale)
    x, w, bias = autocast(x, w, bias)
    tf32 = rounds_to_tf32(x)
    return torch.ops.moert.grouped_gemm(x, w, offsets, bias, tokens, scale, scale_on, transposed, tf32)


def grouped_gemm_ref(x, w, offsets, bias=None, tokens=None, scale=None, scale_on="output", transposed=False):
    rows = x if tokens is None else x[tokens.clamp_min(0).long()]
    if scale is not None and scale_on == "input":
        rows = rows * scale[:, None].to(rows.dtype)
    N = w.shape[2] if transposed else w.shape[1]
    ends = offsets.tolist()
    pieces = []
    for e, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        y = rows[start:end] @ (w[e] if transposed else w[e].T)
        pieces.append(y if bias is None else y + bias[e])
    pieces.append(rows.new_zeros(len(rows) - ends[-1], N))
    y = torch.cat(pieces)
    return y if scale is None or scale_on == "input" else y * scale[:, None].to(y.dtype)


@torch.library.register_fake("moert::grouped_gemm")
def _(x, w, offsets, bias, tokens, scale, scale_on, transposed, tf32=False):
    same_device(x=x, w=w, offsets=offsets, bias=bias, tokens=tokens, scale=scale)
    S = x.shape[0] if tokens is None else tokens.shape[0]
    return x.new_empty(S, w.shape[2] if transposed else w.shape[1])


@torch.library.register_fake("moert::grouped_gemm_wgrad")
def _(dy, x, offsets, tokens, transposed, tf32=False):
    same_device(dy=dy, x=x, offsets=offsets, tokens=tokens)
    E, N, K = offsets.shape[0] - 1, dy.shape[1], x.shape[1]
    return dy.new_empty((E, K, N) if transposed else (E, N, K))


def _setup_context(ctx, inputs, output):
    x, w, offsets, bias, tokens, scale, ctx.scale_on, ctx.transposed, *tf32 = inputs
    ctx.tf32 = bool(tf32 and tf32[0])
    ctx.save_for_backward(x, w, offsets, bias, tokens, scale)


def _backward(ctx, dy):
    x, w, offsets, bias, tokens, scale = ctx.saved_tensors
    needs_x, needs_w, _, needs_bias, _, needs_scale, *_ = ctx.needs_input_grad
    op, wgrad = torch.ops.moert.grouped_gemm, torch.ops.moert.grouped_gemm_wgrad
    scaled = dy if scale is None else (dy * scale[:, None]).to(dy.dtype)
    dx = dw = dbias = dscale = None
    if needs_x:
        dx = op(dy, w, offsets, None, None, scale, "output", not ctx.transposed, ctx.tf32)
        if tokens is not None:
            # Rows outside the slots in use are zero, so it does not matter which token their -1 becomes.
            total = torch.promote_types(x.dtype, torch.float32)
            index = tokens.clamp_min(0).long()
            dx = torch.zeros_like(x, dtype=total).index_add(0, index, dx.to(total)).to(x.dtype)
    if needs_w:
        dw = wgrad(scaled, x, offsets, tokens, ctx.transposed, ctx.tf32)
    if needs_bias:
        ones = dy.new_ones(dy.shape[0], 1)
        dbias = wgrad(dy if ctx.scale_on == "input" else scaled, ones, offsets, None, False).squeeze(2)
    if needs_scale:
        inside = bias if ctx.scale_on == "output" else None
        y = op(x, w, offsets, inside, tokens, None, "output", ctx.transposed, ctx.tf32)
        dscale = (dy * y).sum(-1, dtype=torch.promote_types(y.dtype, torch.float32)).to(scale.dtype)
    return (dx, dw, None, dbias, None, dscale, None, None, None)[: len(ctx.needs_input_grad)]


torch.library.register_autograd("moert::grouped_gemm", _backward, setup_context=_setup_context)
once_differentiable("moert::grouped_gemm_wgrad", "grouped_gemm")
