import pytest
import torch
import torch.nn.functional as F

from moert import MoELayer, TopKRouter
from moert.experts import BlockExperts
from moert.routers import FrozenRandomRouter, ReLUNormRouter
from moert.testing import OperatorsRan, assert_rows_close

H, E, D = 24, 6, 10


def reference(x, gains, up, down, up_bias=None, down_bias=None):
    """Token by token, block by block."""
    rows = []
    for t in range(len(x)):
        y = torch.zeros_like(x[t])
        for e in range(len(up)):
            h = up[e] @ x[t] + (0 if up_bias is None else up_bias[e])
            out = F.silu(h) @ down[e] + (0 if down_bias is None else down_bias[e])
            y = y + gains[t, e].to(x.dtype) * out
        rows.append(y)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def routing_of(x, off=True):
    router = ReLUNormRouter(H, E)
    routing = router(x)
    if off and len(x):
        routing.ids[0] = E  # a token that uses nothing
    return routing


OPERATORS = {"dense": [], "token": ["fused_experts"], "union": ["union_experts"]}


@pytest.mark.parametrize("bias", (False, True), ids=("", "bias"))
@pytest.mark.parametrize("T", (0, 1, 7, 64))
@pytest.mark.parametrize("mode", OPERATORS)
def test_modes_agree(mode, T, bias):
    experts, x = BlockExperts(H, E, D, bias=bias, mode=mode), torch.randn(T, H)
    routing = routing_of(x)
    with OperatorsRan() as ran:
        y = experts(x, routing)
    assert ran.names == OPERATORS[mode]
    gains = routing.dense_weights().detach()
    assert_rows_close(y, reference, x, gains, *experts.parameters())
    dense = BlockExperts(H, E, D, bias=bias, mode="dense")
    dense.load_state_dict(experts.state_dict())
    assert (y - dense(x, routing)).abs().max() <= 1e-5 if T else y.shape == (0, H)
    assert T == 0 or not (y[0] - 0).any()


@pytest.mark.parametrize("T", (0, 1, 7, 64))
@pytest.mark.parametrize("mode", ("token", "union"))
def test_gradients_agree(mode, T):
    router, x = ReLUNormRouter(H, E), torch.randn(T, H)

    def grads(mode):
        torch.manual_seed(3)
        experts, leaf = BlockExperts(H, E, D, bias=True, mode=mode), x.clone().requires_grad_()
        routing = router(leaf)
        routing.ids[-1:] = E  # a token that uses nothing
        y = experts(leaf, routing)
        return torch.autograd.grad(y.square().sum(), [leaf, router.weight, *experts.parameters()])

    for got, expected in zip(grads(mode), grads("dense"), strict=True):
        assert got.shape == expected.shape and ((got - expected).abs() <= 1e-4).all()


@pytest.mark.parametrize("mode", ("token", "union"))
def test_modes_agree_where_every_expert_is_used(mode):
    x, one, other = torch.randn(40, H), BlockExperts(H, E, D, mode="dense"), BlockExperts(H, E, D, mode=mode)
    other.load_state_dict(one.state_dict())
    routing = FrozenRandomRouter(H, E, E)(x)
    assert (one(x, routing) - other(x, routing)).abs().max() <= 1e-5


def test_auto():
    experts, x = BlockExperts(H, E, D), torch.randn(80, H)
    most, few = routing_of(x), TopKRouter(H, E, 2)(x)
    most.ids[:, :4] = torch.arange(4)

    def ran_for(x, routing):
        with OperatorsRan() as ran:
            experts(x, routing)
        return ran.names

    sparse = routing_of(x)
    sparse.ids[:, 1:] = E
    assert ran_for(x, most) == OPERATORS["dense"] and ran_for(x, sparse) == OPERATORS["token"]
    assert ran_for(x, few) == OPERATORS["token"] and ran_for(x, TopKRouter(H, E, E)(x)) == OPERATORS["dense"]
    assert "union_experts" not in ran_for(x[:64], routing_of(x[:64]))  # where there are gradients
    with torch.no_grad():
        assert ran_for(x[:64], routing_of(x[:64])) == OPERATORS["union"]
        assert ran_for(x, few) == OPERATORS["token"]


def test_together_the_blocks_are_a_dense_network():
    experts = BlockExperts(H, E, D, "relu", bias=True)
    x = torch.randn(9, H)
    up, down = experts.up_proj.flatten(0, 1), experts.down_proj.flatten(0, 1)
    dense = F.relu(F.linear(x, up, experts.up_proj_bias.flatten())) @ down + experts.down_proj_bias.sum(0)
    every = TopKRouter(H, E, E)(x)
    ones = type(every)(every.ids, torch.ones_like(every.weights), E)
    torch.testing.assert_close(experts(x, ones), dense)


@pytest.mark.parametrize("mode", OPERATORS)
def test_bfloat16_and_autocast(mode):
    layer, x = MoELayer(ReLUNormRouter(H, E), BlockExperts(H, E, D, bias=True, mode=mode)), torch.randn(20, H)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), expected, rtol=0.1, atol=0.05)
    low = layer.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("mode", ("auto", *OPERATORS))
def test_compile(mode):
    torch._dynamo.reset()
    layer = MoELayer(ReLUNormRouter(H, E), BlockExperts(H, E, D, mode=mode)).eval()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 80):
        x = torch.randn(T, H)
        torch.testing.assert_close(compiled(x), layer(x))


def test_state_dict_and_repr():
    experts, other = BlockExperts(H, E, D, bias=True), BlockExperts(H, E, D, bias=True)
    assert list(experts.state_dict()) == ["up_proj", "down_proj", "up_proj_bias", "down_proj_bias"]
    other.load_state_dict(experts.state_dict())
    x = torch.randn(5, H)
    routing = routing_of(x)
    assert torch.equal(experts(x, routing), other(x, routing))
    assert experts.extra_repr() == "hidden=24, num_experts=6, block=10, act=silu, mode=auto"


@pytest.mark.parametrize(
    "options,message",
    [
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"block": 0}, "block must be at least 1, got 0"),
        ({"mode": "sparse"}, "mode must be one of auto, dense, token, union, got sparse"),
        ({"act": "swiglu"}, "act must be an activation without a gate, got swiglu"),
        ({"act": "swish"}, "activation must be one of .*, got swish"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        BlockExperts(**({"hidden": H, "num_experts": E, "block": D} | options))
