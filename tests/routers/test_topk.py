import copy

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from transformers import DeepseekV3Config, MixtralConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from moert import GroupLimit, TopKRouter
from moert.ops.gating import topk_gating_ref


def assert_same_routing(routing, weights, ids):
    """The same experts with the same weights, in any order (transformers does not sort)."""
    mine = torch.zeros(len(ids), routing.num_experts).scatter(1, routing.ids.long(), routing.weights.float())
    theirs = torch.zeros(len(ids), routing.num_experts).scatter(1, ids, weights.float())
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_mixtral(dtype):
    config = MixtralConfig(hidden_size=32, num_local_experts=8, num_experts_per_tok=2)
    theirs, mine = MixtralTopKRouter(config).to(dtype), TopKRouter(32, 8, 2, renormalize=True, dtype=dtype)
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn(40, 32, dtype=dtype)
    logits, weights, ids = theirs(x)
    routing = mine(x)
    assert torch.equal(routing.logits, logits)
    assert_same_routing(routing, weights, ids)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_deepseek_v3(dtype):
    config = DeepseekV3Config(
        hidden_size=32, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=2.5
    )
    options = {"score": "sigmoid", "renormalize": True, "scale": 2.5, "groups": GroupLimit(4, 2), "expert_bias": True}
    theirs, mine = DeepseekV3TopkRouter(config), TopKRouter(32, 16, 4, **options)
    mine.expert_bias.normal_(std=0.1)
    theirs.load_state_dict({"weight": mine.weight, "e_score_correction_bias": mine.expert_bias})
    theirs.weight.data, mine = theirs.weight.to(dtype), mine.to(dtype)
    x = torch.randn(40, 32, dtype=dtype)
    logits, weights, ids = theirs(x)
    routing = mine(x)
    assert torch.equal(routing.logits, logits)
    assert routing.logits.dtype == torch.float32
    assert_same_routing(routing, weights, ids)


def test_logit_bias_and_gradients():
    router = TopKRouter(6, 5, 2, "softmax_over_topk", logit_bias=True, dtype=torch.float64)
    torch.nn.init.normal_(router.logit_bias)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    routing = router(x)
    weights, ids = topk_gating_ref(F.linear(x, router.weight, router.logit_bias), 2, "softmax_over_topk")
    assert torch.equal(routing.ids, ids)
    torch.testing.assert_close(routing.weights, weights)

    def weights_of(x, weight, bias):
        return torch.func.functional_call(router, {"weight": weight, "logit_bias": bias}, (x,)).weights

    assert gradcheck(weights_of, (x, router.weight, router.logit_bias))


def test_expert_bias_chooses_and_is_not_trained():
    router = TopKRouter(4, 3, 1, "sigmoid", expert_bias=True)
    x = torch.randn(5, 4)
    scores = torch.sigmoid(x @ router.weight.T)
    router.expert_bias[2] = 10
    routing = router(x)
    assert (routing.ids == 2).all()
    torch.testing.assert_close(routing.weights, scores[:, 2:])
    routing.weights.sum().backward()
    assert router.weight.grad[2].abs().sum() > 0 and router.weight.grad[:2].abs().sum() == 0
    assert not router.expert_bias.requires_grad


def test_state_dict_and_moves():
    router = TopKRouter(4, 3, 1, expert_bias=True, logit_bias=True)
    assert sorted(router.state_dict()) == ["expert_bias", "logit_bias", "weight"]
    assert sorted(TopKRouter(4, 3, 1).state_dict()) == ["weight"]
    router.expert_bias.fill_(1.001)
    low = copy.deepcopy(router).bfloat16()
    assert low.weight.dtype == torch.bfloat16
    assert low.expert_bias.tolist() == router.expert_bias.tolist()
    assert low.double().expert_bias.dtype == torch.float64
    other = TopKRouter(4, 3, 1, expert_bias=True, logit_bias=True, device="meta").to_empty(device="cpu")
    other.load_state_dict(router.state_dict())
    x = torch.randn(6, 4)
    assert torch.equal(other(x).weights, router(x).weights)


@pytest.mark.parametrize("score", ("softmax", "sigmoid"))
def test_autocast(score):
    router, x = TopKRouter(16, 8, 2, score), torch.randn(5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x)
    expected = torch.bfloat16 if score == "softmax" else torch.float32
    assert routing.logits.dtype == expected
    if expected == torch.float32:
        assert torch.equal(routing.weights, router(x).weights)


def test_no_tokens():
    router = TopKRouter(4, 3, 2, "sigmoid", expert_bias=True)
    routing = router(torch.zeros(0, 4))
    assert routing.ids.shape == routing.weights.shape == (0, 2)
    routing.weights.sum().backward()
    assert torch.equal(router.weight.grad, torch.zeros(3, 4))


def test_compile():
    router = TopKRouter(8, 16, 4, "sigmoid", True, 2.5, GroupLimit(4, 2), expert_bias=True)
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (1, 5, 64):
        x = torch.randn(T, 8)
        assert torch.equal(compiled(x).weights, router(x).weights)


def test_repr():
    assert repr(TopKRouter(4, 3, 2)) == "TopKRouter(hidden=4, num_experts=3, k=2, score=softmax)"
    text = repr(TopKRouter(4, 8, 2, "sigmoid", True, 2.5, GroupLimit(4, 2), True, True))
    assert text.endswith(
        "score=sigmoid, renormalize=True, scale=2.5, groups=GroupLimit(num_groups=4, topk_groups=2, score='top2'), "
        "expert_bias=True, logit_bias=True)"
    )


@pytest.mark.parametrize(
    "args,message",
    [
        ((0, 8, 2), "hidden must be at least 1, got 0"),
        ((4, 0, 2), "num_experts must be at least 1, got 0"),
        ((4, 8, 0), r"k must be in \[1, 8\], got 0"),
        ((4, 8, 9), r"k must be in \[1, 8\], got 9"),
        ((4, 8, 2, "tanh"), "score must be one of softmax, softmax_over_topk, sigmoid, relu, identity, got tanh"),
        ((4, 8, 2, "relu", False, 1.0, GroupLimit(3, 1)), "groups.num_groups must divide num_experts=8, got 3"),
        ((4, 8, 2, "relu", False, 1.0, GroupLimit(4, 5)), r"groups.topk_groups must be in \[1, 4\], got 5"),
        ((4, 8, 2, "relu", False, 1.0, GroupLimit(4, 1, "min")), "groups.score must be top2 or max, got min"),
        ((4, 8, 3, "relu", False, 1.0, GroupLimit(4, 1)), r"k must be in \[1, 2\], got 3"),
    ],
)
def test_errors(args, message):
    with pytest.raises(ValueError, match=message):
        TopKRouter(*args)
