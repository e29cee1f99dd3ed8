"""The operators of bench/gpu.py that have no part in a plain layer: gradients, expert choice, unions, exchanges.

`made` is the inputs of gpu_cases: one layer, its tokens and their routing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import moert
from moert.types import DispatchPlan

OPS = torch.ops.moert
RANKS = 8
UNION = 16  # tokens up to which a union of experts is for


@dataclass
class Problem:
    """Providers compute the same; bytes and flop are what none of them can avoid.  `exact`: integers are compared."""

    op: str
    shape: str
    bytes: float
    flop: float
    providers: dict[str, Callable[[], Tensor]]
    exact: bool = False


def more(made, step: bool) -> Iterator[Problem]:
    """step: also gradients."""
    yield expert_choice(made)
    if made.T <= UNION:
        yield union_experts(made)
    yield from exchange(made)
    if step:
        yield gating_backward(made)
        yield unpermute_backward(made)
        yield wgrad(made)


def expert_choice(made) -> Problem:
    """As many choices as the tokens have, the same for every expert."""
    E, T, scores = made.layer.E, made.T, made.logits
    each = max(1, T * made.layer.k // E)
    segments = torch.zeros(T, dtype=torch.int64, device=scores.device)
    capacity = torch.full((1, E), each, device=scores.device)
    providers = {
        "moert": lambda: moert.expert_choice(scores, segments, capacity, E, E * each)[2].tokens,
        "torch": lambda: scores.topk(each, dim=0).indices.T.sort().values.flatten().int(),
    }
    return Problem("expert_choice", made.shape, scores.nbytes + T * E * 8, 0, providers, exact=True)


def union_experts(made) -> Problem:
    """The experts that the tokens use, for all of them."""
    layer, ids = made.layer, made.ids.unique().int()
    x, w1, w2, gains = made.x, made.w1, made.w2, torch.rand(made.T, layer.E, device=made.x.device)
    listed = ids.tolist()

    def loop():
        sums = torch.zeros(x.shape, device=x.device)
        for e in listed:
            gate, up = (x @ w1[e].T).chunk(2, -1)
            sums += gains[:, e, None] * ((F.silu(gate) * up) @ w2[e].T)
        return sums

    n = len(listed)
    moved, flop = n * (w1[0].nbytes + w2[0].nbytes) + 2 * x.nbytes, 6.0 * made.T * n * layer.H * layer.I
    providers = {"moert": lambda: moert.ops.union_experts(x, gains, ids, w1, w2, activation="swiglu"), "loop": loop}
    return Problem("union_experts", made.shape, moved, flop, providers)


def exchange(made) -> Iterator[Problem]:
    """What an exchange with 8 ranks has a GPU do, beside plain copies and sums."""
    x, E, H = made.x, made.layer.E, made.layer.H
    ranks = (torch.arange(E, device=x.device) * RANKS // E).int()
    local = torch.arange(E, device=x.device).int() - torch.searchsorted(ranks, ranks).int()
    routed = x, made.weights, made.ids, ranks, local
    offsets, tokens, slots = OPS.dispatch_plan(made.ids, ranks, RANKS)
    N = int(offsets[-1])
    tokens, wide = tokens[:N].contiguous(), tokens[:N].long()
    yield Problem(
        "dispatch_plan",
        made.shape,
        3 * made.ids.nbytes,
        0,
        {"moert": lambda: OPS.dispatch_plan(made.ids, ranks, RANKS)[1][:N]},
        exact=True,
    )
    records = OPS.dispatch_pack(*routed, offsets, tokens)
    yield Problem(
        "dispatch_pack",
        made.shape,
        x.nbytes + records.nbytes,
        0,
        {
            "moert": lambda: OPS.dispatch_pack(*routed, offsets, tokens)[:, : 2 * H].view(x.dtype),
            "index_select": lambda: x[wide],
        },
    )
    rounded, rows = OPS.dispatch_pack(*routed, offsets, tokens, "float8_e4m3"), x.new_empty(N, H)
    yield Problem(
        "dispatch_unpack_",
        made.shape,
        rounded.nbytes + rows.nbytes,
        0,
        {"moert": lambda: OPS.dispatch_unpack_(rows, rounded, "float8_e4m3") or rows},
    )
    rows, plan = x[wide], DispatchPlan(offsets, tokens, slots)
    own = N // RANKS
    yield Problem(
        "dispatch_combine",
        made.shape,
        x.nbytes + rows.nbytes,
        0,
        {
            "moert": lambda: OPS.dispatch_combine(rows[own:], rows[:own], 0, slots),
            "moert unpermute": lambda: moert.unpermute(rows, plan, None),
            "index_add": lambda: torch.zeros_like(x).index_add_(0, wide, rows),
        },
    )


def gating_backward(made) -> Problem:
    logits, ids, dweights = made.logits, made.ids, torch.rand_like(made.weights)
    leaf = logits.detach().requires_grad_()
    chosen = leaf.softmax(-1).gather(1, ids.long())
    weights = chosen / chosen.sum(-1, keepdim=True)
    providers = {
        "moert": lambda: OPS.topk_gating_backward(dweights, logits, ids, "softmax", True, 1.0),
        "torch": lambda: torch.autograd.grad(weights, leaf, dweights, retain_graph=True)[0],
    }
    return Problem("topk_gating_backward", made.shape, 2 * logits.nbytes + made.T * made.layer.k * 8, 0, providers)


def unpermute_backward(made) -> Problem:
    plan, weights, rows, dy = made.plan_, made.weights, made.rows, torch.randn_like(made.x)
    tokens, shares = plan.tokens.long(), weights.flatten()[made.order, None]
    providers = {
        "moert": lambda: OPS.unpermute_backward(dy, rows, plan.tokens, plan.slots, weights)[0],
        "torch": lambda: _with_dots(dy[tokens], rows, shares),
    }
    return Problem("unpermute_backward", made.shape, dy.nbytes + 2 * rows.nbytes, 0, providers)


def _with_dots(dy: Tensor, rows: Tensor, shares: Tensor) -> Tensor:
    (dy.float() * rows).sum(-1)
    return (dy * shares).to(dy.dtype)


def wgrad(made) -> Problem:
    """The gradient of w1."""
    offsets, x, w = made.plan_.offsets, made.rows, made.w1
    dy, ends = torch.randn(len(x), w.shape[1], device=x.device, dtype=x.dtype), offsets[1:].contiguous()
    bounds = offsets.tolist()

    def loop():
        return torch.stack([dy[begin:end].T @ x[begin:end] for begin, end in zip(bounds[:-1], bounds[1:], strict=True)])

    providers = {"moert": lambda: OPS.grouped_gemm_wgrad(dy, x, offsets, None, False), "loop": loop}
    if hasattr(F, "grouped_mm"):
        providers["grouped_mm"] = lambda: F.grouped_mm(dy.T, x, offs=ends)
    moved = dy.nbytes + x.nbytes + w.nbytes
    return Problem("grouped_gemm_wgrad", made.shape, moved, 2.0 * len(x) * w.shape[1] * w.shape[2], providers)
