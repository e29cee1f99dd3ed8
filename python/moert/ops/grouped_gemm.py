"""Grouped GEMM: y[s] = x[s] @ w[expert of s].T.  S slots (rows in expert order), N and K the sizes of one product."""

import torch
from torch import Tensor


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
    output (after the bias).  Rows from offsets[E] on are zero.  Sums are float32 (float64 for float64).
    """
    return torch.ops.moert.grouped_gemm(x, w, offsets, bias, tokens, scale, scale_on, transposed)


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
