import pytest
import torch

from moert import GluExperts, MoELayer, TopKRouter
from moert.runtime import add_to_main_grad_


def stepped(layer):
    layer(torch.ones(5, 16)).sum().backward()
    return layer.experts.down_proj


def test_only_what_is_marked_and_has_a_buffer_is_added():
    layer = MoELayer(TopKRouter(16, num_experts=4, k=2), GluExperts(4, 16, 8))
    buffer = layer.experts.down_proj.main_grad = torch.zeros(4, 16, 8)
    gradient = stepped(layer).grad.clone()  # as frameworks give every parameter a main_grad
    assert gradient.any() and not buffer.any()
    assert add_to_main_grad_(layer) is layer
    layer.zero_grad()
    assert stepped(layer).grad is None and torch.equal(buffer, gradient)
    assert layer.experts.gate_up_proj.grad.any()  # no buffer
    add_to_main_grad_(layer, wanted=False)
    assert torch.equal(stepped(layer).grad, gradient) and torch.equal(buffer, gradient)


def test_errors():
    with pytest.raises(TypeError, match="module must be of type Module, got int"):
        add_to_main_grad_(3)
