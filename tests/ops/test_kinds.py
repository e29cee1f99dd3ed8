"""Arguments that are no tensors: a wrong type is named, with the argument."""

import pytest
import torch

import moert
from moert import (
    Activation,
    MoELayer,
    Routing,
    TopKRouter,
    experts_in_use,
    fused_experts,
    grouped_gemm,
    permute,
    permute_plan,
    topk_gating,
    union_experts,
    unpermute,
)
from moert.experts import GluExperts
from moert.testing import random_routing

X, W1, W2 = torch.randn(3, 8), torch.randn(4, 12, 8), torch.randn(4, 8, 6)
ROUTING = random_routing(3, 4, 2)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"layout": "transposed"}, "layout must be of type ExpertLayout, got str"),
        ({"bias": torch.zeros(4, 12)}, "bias must be a pair of tensors or None, got Tensor"),
        ({"bias": (None,)}, "bias must be a pair of tensors or None, got 1 of them"),
        ({"routing": (ROUTING.ids, ROUTING.weights)}, "routing must be of type Routing, got tuple"),
        ({"activation": None}, "activation must be a name or an Activation, got NoneType"),
        ({"w1": None}, "w1 must be of type Tensor, got NoneType"),
        ({"x": [1.0]}, "x must be of type Tensor, got list"),
    ],
)
def test_fused_experts(change, text):
    arguments = {"x": X, "routing": ROUTING, "w1": W1, "w2": W2} | change
    with pytest.raises(TypeError, match=text):
        fused_experts(**arguments)


def test_other_operators():
    with pytest.raises(TypeError, match="plan must be of type DispatchPlan, got Tensor"):
        permute(X, ROUTING.ids)
    with pytest.raises(TypeError, match="plan must be of type DispatchPlan, got Routing"):
        unpermute(X, ROUTING)
    with pytest.raises(TypeError, match="layout must be of type ExpertLayout, got bool"):
        union_experts(X, torch.ones(3, 4), torch.tensor([1]), W1, W2, layout=True)


def test_modules():
    router, experts = TopKRouter(8, 4, 2), GluExperts(4, 8, 6)
    with pytest.raises(TypeError, match="router must be of type Router, got NoneType"):
        MoELayer(None, experts)
    with pytest.raises(TypeError, match="router must be of type Router, got GluExperts"):
        MoELayer(experts, router)
    with pytest.raises(TypeError, match="experts must be of type Experts, got Linear"):
        MoELayer(router, torch.nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"x must be \[T, 8\], got \[3, 7\]"):
        router(torch.randn(3, 7))
    with pytest.raises(ValueError, match=r"x must have shape \[..., H\], got \[\]"):
        MoELayer(router, experts)(torch.tensor(1.0))
    with pytest.raises(TypeError, match="context must be of type RouterContext or None, got dict"):
        MoELayer(router, experts)(X, {})
    with pytest.raises(TypeError, match="layout must be of type ExpertLayout, got dict"):
        GluExperts(4, 8, 6, layout={})
    with pytest.raises(TypeError, match="k must be of type int, got float"):
        TopKRouter(8, 5, 2.5)


def test_no_argument_may_be_none_that_must_not():
    plan = permute_plan(ROUTING.ids, 4)
    for call, name in (
        (lambda: permute(None, plan), "x"),
        (lambda: unpermute(None, plan), "rows"),
        (lambda: permute_plan(None, 4), "ids"),
        (lambda: topk_gating(None, 2), "logits"),
        (lambda: grouped_gemm(X, W1, None), "offsets"),
        (lambda: experts_in_use(None), "gains"),
        (lambda: union_experts(X, torch.ones(3, 4), None, W1, W2), "ids"),
        (lambda: fused_experts(X, Routing(None, ROUTING.weights, 4), W1, W2), "ids"),
        (lambda: fused_experts(X, Routing(ROUTING.ids, None, 4), W1, W2), "weights"),
    ):
        with pytest.raises(TypeError, match=f"^{name} must be of type Tensor, got NoneType"):
            call()


def test_optional_arguments():
    plan = permute_plan(ROUTING.ids, 4)
    with pytest.raises(TypeError, match="groups must be of type GroupLimit or None, got tuple"):
        topk_gating(torch.ones(3, 4), 2, groups=(1, 1))
    with pytest.raises(TypeError, match="weights must be of type Tensor or None, got float"):
        unpermute(torch.ones(6, 8), plan, 1.0)
    with pytest.raises(TypeError, match="tokens must be of type Tensor or None, got list"):
        grouped_gemm(X, W1, plan.offsets, tokens=[0])
    with pytest.raises(ValueError, match=r"gains must have shape \[T, E\], got \[2\]"):
        experts_in_use(torch.ones(2))


@pytest.mark.parametrize("limit", (-1.0, float("nan")))
def test_a_limit_that_clamps_nothing(limit):
    with pytest.raises(ValueError, match=f"limit must be at least 0, got {limit}"):
        Activation("swiglu_clamped", limit=limit)


def test_in_place_functions_want_a_module():
    for function in (moert.prepack_, moert.quantize_):
        with pytest.raises(TypeError, match="mod(ule|el) must be of type Module, got str"):
            function("a")
