"""The same inputs give the same bits: forward and backward of every operator, repeated, with 1, 2, 3 and 7 threads."""

import pytest
import torch

from moert import (
    Routing,
    expert_choice,
    fused_experts,
    grouped_gemm,
    permute,
    permute_plan,
    topk_gating,
    union_experts,
    unpermute,
)
from moert.ops.fused_experts import fused_experts_ref
from moert.testing import Shape

SHAPE = Shape("several tiles, uneven experts, dropped choices", 150, 8, 2, 136, 72, "zipf")
REPEATS = {1: 10, 2: 80, 3: 5, 7: 5}  # threads: how often, a hundred in all; many are slow on two cores


def gradients(y, *leaves):
    return y, *torch.autograd.grad(y, leaves, torch.cos(torch.arange(y.numel())).view_as(y).to(y.dtype))


def leaf(*shape, dtype):
    return torch.randn(shape).to(dtype).requires_grad_()


def gating(dtype, routing):
    logits = leaf(SHAPE.T, 67, dtype=dtype)

    def run():
        weights, ids = topk_gating(logits, 6, renormalize=True)
        return ids, *gradients(weights, logits)

    return run


def choosing(dtype, routing):
    scores, capacity = leaf(SHAPE.T, 67, dtype=dtype), torch.full((2, 67), 9)

    def run():
        weights, ids, _ = expert_choice(scores, torch.arange(SHAPE.T) % 2, capacity)
        return ids, *gradients(weights, scores)

    return run


def there_and_back(dtype, routing):
    x, weights = leaf(SHAPE.T, SHAPE.H, dtype=dtype), routing.weights.requires_grad_()

    def run():
        plan = permute_plan(routing.ids, SHAPE.E)
        y = unpermute(permute(x, plan), plan, weights)
        return plan.offsets, plan.tokens, plan.slots, *gradients(y, x, weights)

    return run


def packing(dtype, routing):
    where, local = torch.arange(SHAPE.E, dtype=torch.int32) % 3, torch.arange(SHAPE.E, dtype=torch.int32) // 3
    x = torch.randn(SHAPE.T, SHAPE.H).to(dtype)

    def run():
        offsets, tokens, slots = torch.ops.moert.dispatch_plan(routing.ids, where, 3)
        sent = tokens[: offsets[-1]]
        records = torch.ops.moert.dispatch_pack(x, routing.weights, routing.ids, where, local, offsets, sent)
        others, own = torch.cat([records[:5], records[9:]]), records[5:9]
        width = x.itemsize * SHAPE.H
        rows = (others[:, :width].view(dtype), own[:, :width].view(dtype))
        return offsets, tokens, slots, records, torch.ops.moert.dispatch_combine(*rows, 5, slots)

    return run


def gemm(dtype, routing):
    plan = permute_plan(routing.ids, SHAPE.E)
    x, w, bias = leaf(SHAPE.T, 136, dtype=dtype), leaf(8, 144, 136, dtype=dtype), leaf(8, 144, dtype=dtype)
    scale = torch.rand(len(plan.tokens)).requires_grad_()
    return lambda: gradients(grouped_gemm(x, w, plan.offsets, bias, plan.tokens, scale), x, w, bias, scale)


def experts(dtype, routing):
    x, w1, w2 = leaf(SHAPE.T, 136, dtype=dtype), leaf(8, 144, 136, dtype=dtype), leaf(8, 136, 72, dtype=dtype)
    bias, weights = (leaf(8, 144, dtype=dtype), leaf(8, 136, dtype=dtype)), routing.weights.requires_grad_()

    def run():
        y = fused_experts(x, Routing(routing.ids, weights, SHAPE.E), w1, w2, bias)
        return gradients(y, x, weights, w1, w2, *bias)

    return run


def union(dtype, routing):
    x, w1, w2 = leaf(SHAPE.T, 136, dtype=dtype), leaf(8, 72, 136, dtype=dtype), leaf(8, 136, 72, dtype=dtype)
    bias, gains = (leaf(8, 72, dtype=dtype), leaf(8, 136, dtype=dtype)), leaf(SHAPE.T, 8, dtype=torch.float32)
    return lambda: gradients(union_experts(x, gains, torch.tensor([6, 0, 8, 3]), w1, w2, bias), x, gains, w1, w2, *bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "operator", [gating, choosing, there_and_back, packing, gemm, experts, union], ids=lambda f: f.__name__
)
def test_a_hundred_repeats_for_any_number_of_threads(operator, dtype):
    routing = SHAPE.routing()
    routing.ids[::7, 0] = -1
    run = operator(dtype, routing)
    before, first = torch.get_num_threads(), run()
    try:
        for threads, times in REPEATS.items():
            torch.set_num_threads(threads)
            for _ in range(times):
                assert all(map(torch.equal, run(), first)), f"{threads} threads"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_and_streamed_gradients(dtype):
    """Rows of which the combine takes several slices of columns, and gradients that are written past the caches."""
    shape = Shape("64 MB of rows, 16 MB or more of every gradient", 2048, 64, 4, 2048, 64)
    x, w1, w2 = leaf(shape.T, 2048, dtype=dtype), leaf(64, 128, 2048, dtype=dtype), leaf(64, 2048, 64, dtype=dtype)
    routing, before, results = shape.routing(), torch.get_num_threads(), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        try:
            results.append(gradients(fused_experts(x, routing, w1 / 45, w2 / 8), x, w1, w2))
        finally:
            torch.set_num_threads(before)
        assert all(map(torch.equal, results[-1], results[0])), f"{threads} threads"
    exact = [a.detach().double().requires_grad_() for a in (x, w1, w2)]
    wide = gradients(fused_experts_ref(exact[0], routing, exact[1] / 45, exact[2] / 8), *exact)
    # Sums of 2048 products, whose roundings add up by chance; bfloat16: of weights, of rows between, of the result.
    for got, expected in zip(results[0], wide, strict=True):
        error = (got.detach().double() - expected).norm() / expected.norm()
        assert error < (2048**0.5 * 2**-24 if dtype == torch.float32 else 2**-7)
