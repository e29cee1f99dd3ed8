"""A token's bits under batch_invariant: the same alone and among others, for every operator it goes through."""

import threading

import pytest
import torch

import moert
from moert import ExpertLayout, Routing
from moert.testing import DTYPES, random_routing

BATCHES = (1, 2, 3, 7, 16, 64, 257, 1024)
H, I, E, K = 72, 40, 4, 2


@pytest.fixture(autouse=True)
def off_afterwards():
    yield
    moert.batch_invariant(False)


def experts(dtype, layout=ExpertLayout()):
    w1, w2 = torch.randn(E, 2 * I, H) / H**0.5, torch.randn(E, H, I) / I**0.5
    w1, w2 = w1.to(dtype), w2.to(dtype)
    return (w1.mT.contiguous(), w2.mT.contiguous()) if layout.transposed else (w1, w2)


def batches(whole):
    """For every size some tokens of the 1024, neither the first nor in one piece."""
    for size in BATCHES:
        yield torch.randperm(whole)[:size]


@pytest.mark.parametrize("transposed", [False, True], ids=["ENK", "EKN"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_depend_on_its_batch(dtype, transposed):
    x, gate = torch.randn(max(BATCHES), H).to(dtype), torch.randn(H, E).to(dtype)
    w1, w2 = experts(dtype, layout := ExpertLayout(transposed=transposed))
    logits = x @ gate

    def layer(rows):
        weights, ids = moert.topk_gating(logits[rows], K)
        routing = Routing(ids, weights, E)
        plan = moert.permute_plan(ids, E)
        moved = moert.unpermute(moert.permute(x[rows], plan), plan, weights)
        h = moert.grouped_gemm(x[rows], w1, plan.offsets, tokens=plan.tokens, transposed=transposed)
        h = moert.unpermute(h, plan, weights)
        gains = torch.zeros(len(rows), E).scatter(1, ids.long(), weights)
        union = moert.union_experts(x[rows], gains, torch.arange(E), w1, w2, activation="swiglu", layout=layout)
        return weights, ids, moved, h, moert.fused_experts(x[rows], routing, w1, w2, layout=layout), union

    with moert.batch_invariant(True):
        all_at_once = layer(torch.arange(len(x)))
        for rows in batches(len(x)):
            for one, among_all in zip(layer(rows), all_at_once, strict=True):
                assert torch.equal(one, among_all[rows]), (len(rows), one.shape)


@pytest.mark.parametrize("sizes", [(4112, 24), (24, 4112)], ids=["long rows of x", "long rows between the products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_sums_of_experts_with_few_and_with_many_rows(dtype, sizes):
    (H, I), E = sizes, 7
    x, routing = torch.randn(max(BATCHES), H).to(dtype), random_routing(max(BATCHES), E, K, "zipf")
    w1, w2 = (torch.randn(E, 2 * I, H) / H**0.5).to(dtype), (torch.randn(E, H, I) / I**0.5).to(dtype)

    def layer(rows):
        ids, weights = routing.ids[rows], routing.weights[rows]
        plan = moert.permute_plan(ids, E)
        h = moert.grouped_gemm(x[rows], w1, plan.offsets, tokens=plan.tokens)
        return moert.unpermute(h, plan, weights), moert.fused_experts(x[rows], Routing(ids, weights, E), w1, w2)

    with moert.batch_invariant(True):
        all_at_once = layer(torch.arange(len(x)))
        for rows in batches(len(x)):
            for one, among_all in zip(layer(rows), all_at_once, strict=True):
                assert torch.equal(one, among_all[rows]), (len(rows), one.shape)


def test_it_makes_a_difference():
    # Otherwise the test above would not see it.
    x, (w1, w2) = torch.randn(1024, H), experts(torch.float32)
    routing = Routing(torch.zeros(1024, 1, dtype=torch.int32), torch.ones(1024, 1), E)
    few = Routing(routing.ids[:7], routing.weights[:7], E)
    whole, part = moert.fused_experts(x, routing, w1, w2)[:7], moert.fused_experts(x[:7], few, w1, w2)
    torch.testing.assert_close(whole, part)
    assert not torch.equal(whole, part)


def test_flag_and_block():
    assert not moert.is_batch_invariant()
    moert.batch_invariant(True)
    assert moert.is_batch_invariant()
    with moert.batch_invariant(False):
        assert not moert.is_batch_invariant()
        with pytest.raises(KeyError), moert.batch_invariant(True):
            assert moert.is_batch_invariant()
            raise KeyError
        assert not moert.is_batch_invariant()
    assert moert.is_batch_invariant()


def test_every_thread_has_its_own():
    seen = []
    with moert.batch_invariant(True):
        other = threading.Thread(target=lambda: (seen.append(moert.is_batch_invariant()), moert.batch_invariant(True)))
        other.start()
        other.join()
        assert seen == [False] and moert.is_batch_invariant()
    assert not moert.is_batch_invariant()


def test_a_compiled_function_follows_the_thread_that_calls_it():
    x, (w1, w2) = torch.randn(1024, H), experts(torch.float32)
    ids, weights = torch.zeros(1024, 1, dtype=torch.int32), torch.ones(1024, 1)

    def layer(x, ids, weights):
        return moert.fused_experts(x, Routing(ids, weights, E), w1, w2)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for enabled in (False, True):
        with moert.batch_invariant(enabled):
            whole, part = compiled(x, ids, weights)[:7], layer(x[:7], ids[:7], weights[:7])
            assert torch.equal(whole, part) == enabled


def test_a_block_inside_a_compiled_function():
    x, (w1, w2) = torch.randn(1024, H), experts(torch.float32)
    ids, weights = torch.zeros(1024, 1, dtype=torch.int32), torch.ones(1024, 1)

    @torch.compile(backend="aot_eager")
    def layer(x, ids, weights):
        with moert.batch_invariant(True):
            return moert.fused_experts(2 * x, Routing(ids, weights, E), w1, w2)

    for _ in range(2):
        assert torch.equal(layer(x, ids, weights)[:7], layer(x[:7], ids[:7], weights[:7]))
        assert not moert.is_batch_invariant()


def test_wrong_value():
    with pytest.raises(ValueError, match="enabled must be True or False, got 'yes'"):
        moert.batch_invariant("yes")
