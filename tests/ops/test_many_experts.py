"""1024 experts, most of them without a row, forward and backward of every operator that knows experts by number."""

import pytest
import torch

from moert import Routing, fused_experts, grouped_gemm, permute, permute_plan, unpermute
from moert.ops.fused_experts import fused_experts_ref
from moert.ops.fused_experts_quantized import fused_experts_quantized, fused_experts_quantized_ref
from moert.ops.grouped_gemm import grouped_gemm_ref
from moert.ops.permute import permute_plan_ref, permute_ref, unpermute_ref
from moert.quant import Int4, Int8, Ternary2
from moert.testing import Shape, assert_grads_close, assert_rows_close, row_error

SHAPE = Shape("a tenth of 1024 experts, the first and the last among them", 21, 1024, 8, 40, 24)
DTYPES = (torch.float32, torch.bfloat16)


def routed():
    routing = SHAPE.routing()
    routing.ids[3, 5], routing.ids[17, 0] = 0, SHAPE.E - 1
    return routing


def weights(dtype):
    w1, w2 = torch.randn(SHAPE.E, 2 * SHAPE.I, SHAPE.H) / SHAPE.H**0.5, torch.randn(SHAPE.E, SHAPE.H, SHAPE.I) / 5
    return w1.to(dtype), w2.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_experts(dtype):
    routing, (w1, w2), x = routed(), weights(dtype), torch.randn(SHAPE.T, SHAPE.H).to(dtype)
    used, ids = routing.ids.unique(return_inverse=True)

    def mine(x, shares, w1, w2):
        return fused_experts(x, Routing(routing.ids, shares, SHAPE.E), w1, w2)

    def ref(x, shares, w1, w2):  # of the experts in use: a loop over all of them takes seconds
        return fused_experts_ref(x, Routing(ids.int(), shares, len(used)), w1[used], w2[used])

    args = (x, routing.weights, w1, w2)
    assert_rows_close(mine(*args), ref, *args)
    dy = torch.randn_like(x)
    assert_grads_close(mine, ref, dy, *args)
    leaves = [a.detach().requires_grad_() for a in args]
    unused = torch.ones(SHAPE.E, dtype=torch.bool).index_fill(0, used.long(), False)
    for gradient in torch.autograd.grad(mine(*leaves), leaves[2:], dy):
        assert not gradient[unused].any() and gradient[~unused].flatten(1).any(1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_gemm(dtype):
    plan, (w, _), x = permute_plan(routed().ids, SHAPE.E), weights(dtype), torch.randn(SHAPE.T, SHAPE.H).to(dtype)
    used = plan.offsets.diff().nonzero().flatten()
    offsets = torch.cat([plan.offsets[:1], plan.offsets[1:][used]])

    def mine(x, w):
        return grouped_gemm(x, w, plan.offsets, tokens=plan.tokens)

    def ref(x, w):
        return grouped_gemm_ref(x, w[used], offsets, tokens=plan.tokens)

    assert_rows_close(mine(x, w), ref, x, w)
    assert_grads_close(mine, ref, torch.randn(len(plan.tokens), 2 * SHAPE.I).to(dtype), x, w)


@pytest.mark.parametrize("capacity", [None, 1])
def test_permute(capacity):
    routing, x = routed(), torch.randn(SHAPE.T, SHAPE.H)
    plan, expected = (make(routing.ids, SHAPE.E, capacity) for make in (permute_plan, permute_plan_ref))
    for name in ("offsets", "tokens", "slots"):
        assert torch.equal(getattr(plan, name), getattr(expected, name)), name
    assert torch.equal(permute(x, plan), permute_ref(x, plan))
    rows = torch.randn(len(plan.tokens), SHAPE.H)
    assert_grads_close(lambda x: permute(x, plan), lambda x: permute_ref(x, plan), torch.randn_like(rows), x)

    def there_and_back(fn):
        return lambda rows, shares: fn(rows, plan, shares)

    args = (rows, routing.weights)
    assert_rows_close(unpermute(rows, plan, routing.weights), there_and_back(unpermute_ref), *args)
    assert_grads_close(there_and_back(unpermute), there_and_back(unpermute_ref), torch.randn_like(x), *args)


@pytest.mark.parametrize("fmt", [Int8(), Int4(), Ternary2()], ids=str)
def test_fused_experts_quantized(fmt):
    routing, x = routed(), torch.randn(SHAPE.T, SHAPE.H)
    packed = [fmt.pack(w) for w in weights(torch.float32)]

    def run(fn, precision):
        def call(x, shares):
            return fn(x, Routing(routing.ids, shares, SHAPE.E), *packed, precision=precision)

        return call

    args, ref = (x, routing.weights), run(fused_experts_quantized_ref, "full")
    assert_rows_close(run(fused_experts_quantized, "full")(*args), ref, *args)
    assert_grads_close(run(fused_experts_quantized, "full"), ref, torch.randn_like(x), *args)
    # Rows in 8 bits or bfloat16: an expert taken for another would be off by about 1.
    assert row_error(run(fused_experts_quantized, "auto")(*args), ref(*args)) < 0.05
