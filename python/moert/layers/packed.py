"""Transformer blocks on packed rows: some of the tokens of B sequences, in their order, at their true positions.

Letters: N rows, h heads of d.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moert.layers.moe import MoELayer
from moert.ops.permute import permute, permute_plan, unpermute
from moert.routers.base import RouterContext
from moert.types import DispatchPlan, Routing


@dataclass(frozen=True)
class Rows:
    """Whose rows these are: sequence b owns offsets[b] .. offsets[b+1]-1 of N, at positions [N], ascending.

    length is the number of rows of every sequence where all have the same, else None; rows without a token come last in
    their sequence, at a position after all others.  context is what is known of the rows, for routers inside a block.
    """

    positions: Tensor
    offsets: Tensor
    length: int | None = None
    context: RouterContext | None = None


def run_chosen(
    run: Callable[[Tensor, Rows], Tensor],
    x: Tensor,
    chosen: Tensor,
    weights: Tensor | None,
    residual: Tensor | None = None,
    limit: int | None = None,
    positions: Tensor | None = None,
    context: RouterContext | None = None,
) -> Tensor:
    """residual[t] + weights[t] * run(the chosen rows)[row of t]; where nothing is chosen, residual[t].

    x [B, S, H], chosen [B*S] bool, weights [B*S, 1], residual [B*S, H] (None: x) -> [B, S, H].  limit is a bound on the
    chosen tokens of one sequence that does not depend on them: the rows are then a rectangle of a fixed shape.  Without
    one they are packed, their number is read from the device, and run is not called where it is 0.  context is what is
    known of the B*S tokens; run is given that of its rows.
    """
    B, S, H = x.shape
    x_TH = x.reshape(-1, H)
    residual = x_TH if residual is None else residual
    sequence = torch.arange(B, device=x.device)[:, None].expand(B, S).reshape(-1)
    plan = permute_plan(torch.where(chosen, sequence, B)[:, None], max(B, 1), limit)
    if limit is None:
        plan = DispatchPlan(plan.offsets, plan.tokens[: int(plan.offsets[-1])], plan.slots)
        if len(plan.tokens) == 0:
            return residual.view(x.shape)
    at = torch.arange(S, device=x.device).repeat(B) if positions is None else positions.reshape(-1)
    last = torch.iinfo(at.dtype).max
    at = torch.where(plan.tokens < 0, last, at[plan.tokens.clamp_min(0).long()] if B * S else last)
    of_rows = None if context is None else context.at(plan.tokens, plan.offsets)
    rows = Rows(at, plan.offsets, limit, of_rows)
    return unpermute(run(permute(x_TH, plan), rows), plan, weights, residual).view(x.shape)


def chosen_of(routing: Routing) -> Tensor:
    """[T] whether a token goes to the one expert."""
    return routing.ids[:, 0] == 0


def rotate(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary embedding of x [N, h, d] at positions [N]."""
    d = x.shape[-1]
    frequency = base ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float32) / d)
    angle = positions.clamp_max(2**24)[:, None, None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """Causal attention of each sequence's rows over themselves: q, k, v [N, h, d] -> [N, h, d]."""
    if rows.length is None:
        ends = rows.offsets.tolist()
        parts = [slice(first, last) for first, last in zip(ends, ends[1:], strict=False)]
        return attend(q, rows, [(k[part], v[part], rows.positions[part]) for part in parts])
    B = len(rows.offsets) - 1
    q, k, v = (t.reshape(B, rows.length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1)


def attend(q: Tensor, rows: Rows, keys: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Attention of each sequence's rows over its keys (k [M, h, d], v, positions [M]) up to its own position."""
    out = []
    ends = rows.offsets.tolist()
    for first, last, (k, v, at) in zip(ends, ends[1:], keys, strict=False):
        if first == last:
            continue
        visible = rows.positions[first:last, None] >= at
        parts = (t.transpose(0, 1) for t in (q[first:last], k, v))
        out.append(F.scaled_dot_product_attention(*parts, attn_mask=visible).transpose(0, 1))
    return torch.cat(out) if out else q


class PackedAttention(nn.Module):
    """Causal attention with rotary positions, without biases: x [N, H], rows -> [N, H].

    kv, where given, has extend(layer, k, v, rows): it takes the rows' keys and values and returns each sequence's.
    """

    def __init__(self, hidden: int, heads: int, layer: int = 0, device=None, dtype=None):
        super().__init__()
        if hidden % (2 * heads):
            raise ValueError(f"hidden must be a multiple of 2 * heads={2 * heads}, got {hidden}")
        self.heads, self.layer = heads, layer
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False, device=device, dtype=dtype)
        self.out = nn.Linear(hidden, hidden, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, rows: Rows, kv=None) -> Tensor:
        qk, v = self.qkv(x).unflatten(-1, (3 * self.heads, -1)).split([2 * self.heads, self.heads], 1)
        q, k = rotate(qk, rows.positions).chunk(2, 1)
        y = packed_attention(q, k, v, rows) if kv is None else attend(q, rows, kv.extend(self.layer, k, v, rows))
        return self.out(y.flatten(1))


class PackedBlock(nn.Module):
    """Pre-norm attention and feed-forward part on packed rows; ffn is any module from [N, H] to [N, H].

    An MoELayer is given what is known of the rows; recorded_routings has its losses.
    delta is what the block adds to its input: block(x) = x + delta(x).
    """

    def __init__(self, hidden: int, heads: int, ffn: nn.Module, layer: int = 0, device=None, dtype=None):
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden, device=device, dtype=dtype)
        self.ffn_norm = nn.RMSNorm(hidden, device=device, dtype=dtype)
        self.attention, self.ffn = PackedAttention(hidden, heads, layer, device, dtype), ffn

    def delta(self, x: Tensor, rows: Rows, kv=None) -> Tensor:
        a = self.attention(self.attention_norm(x), rows, kv)
        h = self.ffn_norm(x + a)
        return a + (self.ffn(h, rows.context) if isinstance(self.ffn, MoELayer) else self.ffn(h))

    def forward(self, x: Tensor, rows: Rows, kv=None) -> Tensor:
        return x + self.delta(x, rows, kv)


def all_rows(x: Tensor, positions: Tensor | None = None, context: RouterContext | None = None) -> Rows:
    """Rows of every token of x [B, S, H], flattened; context is what is known of them."""
    B, S = x.shape[:2]
    at = torch.arange(S, device=x.device).repeat(B) if positions is None else positions.reshape(-1)
    return Rows(at, torch.arange(B + 1, device=x.device, dtype=torch.int32) * S, S, context)
