"""Every operator against float64 over many sizes: absolute bounds beside the relative rule of the operators' own tests.

Inputs are scaled so that the reference has a root mean square in [0.1, 10], which is asserted; the errors are
max |d| / max |ref| and the normalised mean square of d.
"""

import pytest
import torch

from moert import (
    Routing,
    experts_in_use,
    fused_experts,
    grouped_gemm,
    permute,
    permute_plan,
    topk_gating,
    union_experts,
    unpermute,
)
from moert.ops.fused_experts import fused_experts_ref
from moert.ops.gating import topk_gating_ref
from moert.ops.grouped_gemm import grouped_gemm_ref
from moert.ops.union_experts import union_experts_ref
from moert.testing import Shape

BOUNDS = {torch.float32: (1e-5, 1e-11), torch.float16: (2e-3, 1e-6), torch.bfloat16: (8e-3, 1e-5)}
KINDS = ("uniform", "zipf", "one_expert", "empty_experts", "sentinels")


def shapes():
    """25 sizes: each of T, E, H, I walks over small, primes, powers of two and their neighbours, out of step."""
    tokens, experts = (1, 2, 3, 17, 31, 64, 100, 257), (1, 2, 3, 8, 13, 64, 129)
    hidden, inner = (1, 7, 16, 33, 64, 100, 129, 256, 300), (4, 5, 16, 31, 48, 96, 130, 257)
    for i in range(25):
        E = experts[i % len(experts)]
        sizes = (tokens[i % len(tokens)], E, min(1 + i % 8, E), hidden[i % len(hidden)], inner[(3 * i) % len(inner)])
        yield Shape("walks over sizes", *sizes, kind=KINDS[i % len(KINDS)])


def assert_bounds(out, ref):
    worst, mean = BOUNDS[out.dtype]
    if not ref.any():  # every choice of every token was dropped
        return torch.testing.assert_close(out.double(), ref, rtol=0, atol=0)
    rms = ref[ref.any(-1)].square().mean().sqrt()
    assert 0.1 <= rms <= 10, f"the reference has a root mean square of {rms:.3g}: scale the inputs"
    d = out.double() - ref
    assert d.abs().max() <= worst * ref.abs().max()
    assert d.square().sum() <= mean * ref.square().sum()
    return None


def assert_union_bounds(x, gains, w1, w2):
    """Of union_experts, where what lies between the two products may be rounded to bfloat16, gains included.

    Each number there is then off by up to u = 2^-8 of itself (8 bits of significand), and y by up to u times
    the sum of its terms' sizes |gain * activation * w2|, which cancel in y itself: with H = 1 there may be no larger y
    beside it to measure the error by.  The roundings are independent, so that 6 u times the root of the sum of squares
    is exceeded with a probability below 2 exp(-6^2 / 2) = 3e-8 (Hoeffding).  y's own rounding adds u of y.
    """
    ids, exact = experts_in_use(gains), [t.double() for t in (x, gains, w1, w2)]
    out = union_experts(x, gains, ids, w1, w2, activation="swiglu")
    ref = union_experts_ref(exact[0], exact[1], ids, *exact[2:], activation="swiglu")
    if x.dtype != torch.bfloat16:
        return assert_bounds(out, ref)
    gate, up = (exact[0] @ exact[2].mT).chunk(2, -1)  # [E, T, I]
    between = exact[1].T[..., None] * torch.nn.functional.silu(gate) * up
    terms = (between.abs() @ exact[3].abs().mT).sum(0)
    root = (between.square() @ exact[3].square().mT).sum(0).sqrt()
    u, sums = 2**-8, 1e-5 * terms  # those of float32, and the activation
    assert ((out.double() - ref).abs() <= u * ref.abs() + (1 + u) * u * torch.minimum(terms, 6 * root) + sums).all()
    return None


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", list(shapes()), ids=str)
def test_numbers(shape, dtype):
    T, E, H, I = shape.T, shape.E, shape.H, shape.I
    routing = shape.routing(dtype=torch.float32)
    routing = Routing(routing.ids, routing.weights / routing.weights.square().sum(-1, keepdim=True).sqrt(), E)
    exact = Routing(routing.ids, routing.weights.double(), E)
    x = torch.randn(T, H).sign() * (0.5 + torch.rand(T, H))  # no value so small that a sum of one could vanish
    x, w1, w2 = (t.to(dtype) for t in (x, torch.randn(E, 2 * I, H) * (4 / H) ** 0.5, torch.randn(E, H, I) / I**0.5))

    assert_bounds(fused_experts(x, routing, w1, w2), fused_experts_ref(x.double(), exact, w1.double(), w2.double()))

    assert_union_bounds(x, routing.dense_weights(), w1, w2)

    plan = permute_plan(routing.ids, E)
    rows = permute(x, plan)
    args = rows, w1, plan.offsets
    assert_bounds(grouped_gemm(*args), grouped_gemm_ref(*(a.double() if a.is_floating_point() else a for a in args)))
    kept = ((routing.ids >= 0) & (routing.ids < E)) * exact.weights
    assert_bounds(unpermute(rows, plan, routing.weights), x.double() * kept.sum(-1, keepdim=True))

    logits = torch.randn(T, E).to(dtype)
    weights, ids = topk_gating(logits, shape.k, "softmax", renormalize=True)
    ref, ref_ids = topk_gating_ref(logits.double(), shape.k, "softmax", renormalize=True)
    assert torch.equal(ids, ref_ids)
    assert (weights.double() - ref).abs().max() <= 1e-6  # float32 inside and out, whatever the logits are
