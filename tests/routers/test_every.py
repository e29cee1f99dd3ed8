"""What every router keeps: biases of a caller, dtypes, shapes that change under torch.compile, masks of any form."""

import copy
from dataclasses import replace

import pytest
import torch

from moert import RouterContext, TopKRouter
from moert.routers import (
    AttentionAwareRouter,
    DeepSeekRouter,
    DenseToSparseRouter,
    DepthRouter,
    ExpertChoiceRouter,
    FrozenRandomRouter,
    GatingResidualRouter,
    ModalityRouter,
    PrototypeRouter,
    RecurrentRouter,
    RecurrentState,
    ReLUNormRouter,
    SimilarityRouter,
    TokenDepthRouter,
)

H, E = 16, 6
KINDS = ["ffn"] * 4 + ["copy", "zero"]
ROUTERS = {
    "top-k": lambda: TopKRouter(H, E, 2),
    "deepseek v1": lambda: DeepSeekRouter.v1(H, E, 2),
    "deepseek v2": lambda: DeepSeekRouter.v2(H, E, 2, n_group=3, topk_group=2, num_devices=3, spared=0.0),
    "deepseek v3": lambda: DeepSeekRouter.v3(H, E, 2, n_group=3, topk_group=2),
    "moe++": lambda: GatingResidualRouter(H, E, kinds=KINDS, capacity_factor=1.1),
    "moe++, paper": lambda: GatingResidualRouter(H, E, renorm="paper", target_std=1.0),
    "rmoe": lambda: RecurrentRouter(H, E, 2, RecurrentState(8, std=0.5)),
    "smoe-dropout": lambda: FrozenRandomRouter(H, E, 2),
    "dense to sparse": lambda: DenseToSparseRouter(H, E, 2, gumbel=False),
    "dense to sparse, batch": lambda: DenseToSparseRouter(H, E, 2, "tanh", gumbel=False, granularity="batch"),
    "similarity": lambda: SimilarityRouter(H, E, 2),
    "similarity, causal": lambda: SimilarityRouter(H, E, 2, "cosine", causal=True, mixed="topk"),
    "attention": lambda: AttentionAwareRouter(H, E, 2),
    "promoe": lambda: PrototypeRouter(H, E - 1, 2),
    "promoe, expert choice": lambda: PrototypeRouter(H, E - 1, 2, mode="expert"),
    "expert choice": lambda: ExpertChoiceRouter(H, E),
    "modality": lambda: ModalityRouter([ExpertChoiceRouter(H, 3), TopKRouter(H, 3, 2)]),
    "depth": lambda: DepthRouter(H, 0.5),
    "token depth": lambda: TokenDepthRouter(H, 3),
    "blockffn": lambda: ReLUNormRouter(H, E),
}
every = pytest.mark.parametrize("make", ROUTERS.values(), ids=ROUTERS)


def known(T, **more):
    """What the routers that need something need."""
    attention = torch.rand(1, 2, T, T, generator=torch.Generator().manual_seed(T)).softmax(-1)
    conditional = torch.arange(T) % 3 != 0
    return RouterContext(conditional=conditional, modality=torch.arange(T) % 2, attention=attention, **more)


@every
def test_a_callers_bias_comes_before_the_choice_and_has_a_gradient(make):
    router, x = make(), torch.randn(20, H)
    bias = torch.zeros(router.num_experts, requires_grad=True)
    weights = router(x, known(20, logit_bias=bias)).weights
    (grad,) = torch.autograd.grad((weights * torch.randn_like(weights)).sum(), bias)
    assert grad.isfinite().all() and grad.any()
    drawn = torch.randn(router.num_experts)
    one, each = (router(x, known(20, logit_bias=b)) for b in (drawn, drawn.expand(20, -1)))
    assert torch.equal(one.logits, each.logits) and torch.equal(one.ids, each.ids)
    assert not torch.equal(one.logits, router(x, known(20)).logits)


@every
def test_dtypes_and_no_tokens(make):
    router, x = make(), torch.randn(20, H)
    for dtype, weights in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2):
        moved = copy.deepcopy(router).to(dtype)
        routing = moved(x.to(dtype), known(20))
        assert routing.weights.dtype == weights and routing.weights.isfinite().all()
        if routing.weights.requires_grad:
            (routing.weights.square().sum() + sum(routing.losses.values())).backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in moved.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert router(x, known(20)).weights.isfinite().all()
    empty = router(x[:0], known(0))
    assert empty.ids.shape[0] == 0 and all(loss.isfinite() for loss in empty.losses.values())


@every
def test_any_number_of_tokens_in_one_compiled_graph(make):
    """In training, with the losses."""
    torch._dynamo.reset()
    router = make()
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (7, 20):
        x, context = torch.randn(T, H), known(T)
        got, expected = compiled(x, context), router(x, context)
        assert torch.equal(got.ids, expected.ids)
        torch.testing.assert_close(got.weights, expected.weights)
        torch.testing.assert_close(got.losses, expected.losses)


@every
def test_masks_and_strides_of_any_form(make):
    router, x, mask = make(), torch.randn(H, 20).T, torch.arange(20) % 4 != 0
    flat, integers = (router(x, known(20, mask=m)) for m in (mask, mask.long()[None]))
    assert torch.equal(flat.ids, integers.ids)
    torch.testing.assert_close(flat.losses, integers.losses)
    torch.testing.assert_close(router(x.contiguous(), known(20, mask=mask)).weights, flat.weights)


@every
def test_state_dict(make):
    one, other, x = make().eval(), make().eval(), torch.randn(20, H)
    other.load_state_dict(one.state_dict())
    if isinstance(one, RecurrentRouter):
        other.state.load_state_dict(one.state.state_dict())
    context = replace(known(20), step=3)
    assert torch.equal(other(x, context).weights, one(x, context).weights)
