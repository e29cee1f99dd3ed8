import pytest
import torch
from torch import nn

from moert import ExpertLayout, GluExperts, QuantizedExperts
from moert.experts.calibrated import FloatGluExperts
from moert.ops.fused_experts import fused_experts_ref
from moert.quant import Int4
from moert.testing import random_routing, row_error


@pytest.mark.parametrize("layout", [ExpertLayout(), ExpertLayout(True, True)], ids=["ENK", "EKN-interleaved"])
@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai", "relu2"])
def test_matrices_and_middle_are_the_experts(layout, activation):
    module = GluExperts(3, 24, 16, activation, True, layout)
    experts = FloatGluExperts(nn.ModuleDict({"experts": module}), "experts")
    assert experts.shapes == ((3, 16 if activation == "relu2" else 32, 24), (3, 24, 16))
    x, routing = torch.randn(9, 24), random_routing(9, 3, 1)
    assert experts.inputs(x, routing)[0] is x and experts.inputs(x, routing=routing)[1] is routing.ids
    y = torch.zeros(9, 24)
    for e in range(3):
        rows = (routing.ids == e).any(1)
        h = experts.middle(x[rows] @ experts.matrix(0, e).T, e)
        y[rows] = (h @ experts.matrix(1, e).T + module.down_proj_bias[e]) * routing.weights[rows]
    weights, bias = (module.gate_up_proj, module.down_proj), (module.gate_up_proj_bias, module.down_proj_bias)
    assert row_error(y, fused_experts_ref(x, routing, *weights, bias, module.activation, layout)) < 1e-5


def test_replace():
    owner = nn.ModuleDict({"experts": GluExperts(3, 24, 16, bias=True).bfloat16()}).eval()
    float_experts = owner["experts"]
    experts = FloatGluExperts(owner, "experts", "full")
    packed = [Int4().pack(torch.stack([experts.matrix(place, e) for e in range(3)])) for place in (0, 1)]
    experts.replace(tuple(packed))
    mine, plain = owner["experts"], QuantizedExperts.pack(float_experts, (Int4(), Int4()), "full")
    assert isinstance(mine, QuantizedExperts) and mine.precision == "full" and not mine.training
    state = plain.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in mine.state_dict().items())
