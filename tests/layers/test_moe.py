import pytest
import torch
from torch import nn

from moert import GluExperts, MoELayer, TopKRouter
from moert.ops.fused_experts import fused_experts_ref
from moert.testing import assert_rows_close

H, I, E, k = 16, 24, 8, 2


def layer(**options):
    return MoELayer(TopKRouter(H, E, k, renormalize=True), GluExperts(E, H, I), **options)


def test_forward():
    moe, x = layer(shared_experts=nn.Linear(H, H)), torch.randn(13, H)
    y, routing = moe.forward_with_routing(x)
    shared, w1, w2 = moe.shared_experts, moe.experts.gate_up_proj, moe.experts.down_proj

    def ref(x, w1, w2, weight, bias):
        return fused_experts_ref(x, routing, w1, w2) + nn.functional.linear(x, weight, bias)

    assert_rows_close(y, ref, x, w1, w2, shared.weight, shared.bias)
    assert torch.equal(moe(x), y)


@pytest.mark.parametrize("shape", [(H,), (0, H), (2, 3, H), (2, 0, H)], ids=str)
def test_any_leading_dimensions(shape):
    moe, x = layer(), torch.randn(shape)
    y, routing = moe.forward_with_routing(x)
    assert y.shape == x.shape and routing.ids.shape == (x.numel() // H, k)
    assert torch.equal(y.reshape(-1, H), moe(x.reshape(-1, H)))


def test_gradients_reach_everything():
    moe = layer(shared_experts=nn.Linear(H, H))
    x = torch.randn(2, 5, H, requires_grad=True)
    moe(x).square().sum().backward()
    assert x.grad.abs().min() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in moe.parameters())


def test_state_dict_goes_there_and_back():
    one, other = layer(), layer()
    other.load_state_dict(one.state_dict())
    x = torch.randn(7, H)
    assert torch.equal(one(x), other(x))
    assert list(one.state_dict()) == ["router.weight", "experts.gate_up_proj", "experts.down_proj"]


def test_dtype_moves():
    x = torch.randn(7, H)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        y = layer().to(dtype)(x.to(dtype))
        assert y.dtype == dtype and y.isfinite().all()


def test_compile():
    torch._dynamo.reset()
    moe, x = layer(), torch.randn(9, H)
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(x), moe(x))


def test_repr_names_the_parts():
    text = repr(layer())
    assert "TopKRouter" in text and "num_experts=8, hidden=16, intermediate=24" in text


def test_x_of_another_size_is_an_error_of_x():
    with pytest.raises(ValueError, match=r"x must be \[T, 16\], got \[5, 17\]"):
        layer()(torch.randn(5, H + 1))
    with pytest.raises(ValueError, match="x must have H=16 columns, as w1 and w2 have, got 17"):
        MoELayer(TopKRouter(H + 1, E, k), GluExperts(E, H, I))(torch.randn(5, H + 1))


def test_shared_experts_of_another_shape_are_an_error():
    moe = layer(shared_experts=nn.Linear(H, 1))
    expected = r"rows added to experts \(shared_experts\) must have shape \[5, 16\], got \[5, 1\]"
    with pytest.raises(ValueError, match=expected):
        moe(torch.randn(5, H))
