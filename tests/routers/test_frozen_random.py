import pytest
import torch

from moert import MoELayer, RouterContext
from moert.experts import BlockExperts
from moert.routers import FrozenRandomRouter
from moert.testing import OperatorsRan, assert_rows_close

H, E = 16, 8


def reference(x, weight, bias, k):
    """Dense weights [T, E], by a mask over the logits."""
    logits = x @ weight.T + bias
    kept = logits >= logits.sort(-1).values[:, -k:][:, :1]
    return logits.masked_fill(~kept, -torch.inf).softmax(-1)


@pytest.mark.parametrize("k", (1, 3, 8))
def test_forward(k):
    router, x = FrozenRandomRouter(H, E, k), torch.randn(30, H)
    with OperatorsRan() as ran:
        routing = router(x)
    assert ran.names == ["topk_gating"] and routing.ids.shape == (30, k)
    assert_rows_close(routing.dense_weights(), lambda *a: reference(*a, k), x, router.weight, router.bias)


def test_k_is_read_at_every_forward():
    router, x = FrozenRandomRouter(H, E, 2), torch.randn(5, H)
    router.k = 5
    assert router(x).ids.shape == (5, 5)


def test_frozen():
    layer = MoELayer(FrozenRandomRouter(H, E, 2), BlockExperts(H, E, 4))
    before = {name: buffer.clone() for name, buffer in layer.router.named_buffers()}
    assert list(layer.router.parameters()) == []
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1, weight_decay=0.5)
    for _ in range(3):
        layer(torch.randn(20, H)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.router.named_buffers())


def test_gradient_of_x():
    router = FrozenRandomRouter(H, E, 3, dtype=torch.float64)
    x = torch.randn(4, H, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: router(x).weights, x)


def test_the_draw():
    one, same, other = (FrozenRandomRouter(H, E, 2, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(one.weight, same.weight) and torch.equal(one.bias, same.bias)
    assert not torch.equal(one.weight, other.weight)
    before = torch.get_rng_state()
    FrozenRandomRouter(H, E, 2, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    many = FrozenRandomRouter(64, 200, 2, seed=0)
    assert many.weight.abs().max() <= 1 / 8 and abs(many.weight.std() - 1 / 8 / 3**0.5) < 1e-3


def test_loads_a_checkpoint_of_a_linear_gate():
    gate, router = torch.nn.Linear(H, E), FrozenRandomRouter(H, E, 2)
    router.load_state_dict(gate.state_dict())
    x = torch.randn(5, H)
    assert torch.equal(router(x).logits, gate(x))


def test_context_bias_low_precision_and_no_tokens():
    router = FrozenRandomRouter(H, E, 1)
    context = RouterContext(logit_bias=torch.eye(E)[3] * 100)
    assert (router(torch.randn(5, H), context).ids == 3).all()
    assert router(torch.zeros(0, H)).ids.shape == (0, 1)
    low = router.bfloat16()(torch.randn(5, H).bfloat16())
    assert low.logits.dtype == torch.bfloat16 and low.weights.tolist() == [[1.0]] * 5


def test_compile():
    router, x = FrozenRandomRouter(H, E, 2), torch.randn(9, H)
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True, dynamic=True)
    for router.k in (2, 5):
        assert torch.equal(compiled(x).weights, router(x).weights)


@pytest.mark.parametrize("args,message", [((0, 8, 2), "hidden must be at least 1, got 0"),
                                          ((4, 8, 9), r"k must be in \[1, 8\], got 9"),
                                          ((4, 8, 0), r"k must be in \[1, 8\], got 0")])  # fmt: skip
def test_errors(args, message):
    with pytest.raises(ValueError, match=message):
        FrozenRandomRouter(*args)
