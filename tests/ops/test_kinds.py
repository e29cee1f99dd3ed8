"""Arguments that are no tensors: a wrong type is named, with the argument."""

import pytest
import torch

from moert import MoELayer, TopKRouter, fused_experts, permute, union_experts, unpermute
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
