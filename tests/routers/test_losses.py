import pytest
import torch
from torch.autograd import gradcheck
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moert import Routing, topk_gating
from moert.routers import expert_load, load_balance_loss, router_z_loss, update_expert_bias_


def routing_of(logits, k=2):
    weights, ids = topk_gating(logits, k, renormalize=True)
    return Routing(ids, weights, logits.shape[-1], logits=logits)


@pytest.mark.parametrize("layers", (1, 3))
@pytest.mark.parametrize("E,k", ((8, 2), (60, 4), (3, 3)))
def test_load_balance_is_that_of_transformers(E, k, layers):
    logits = tuple(torch.randn(40, E) for _ in range(layers))
    routings = [routing_of(x, k) for x in logits]
    expected = load_balancing_loss_func(logits, E, k)
    torch.testing.assert_close(load_balance_loss(routings), expected)
    if layers == 1:
        torch.testing.assert_close(load_balance_loss(routings[0]), expected)


@pytest.mark.parametrize("layers", (1, 2))
def test_load_balance_with_padding(layers):
    # As in transformers' own tests: 4 sequences of 10 tokens, padded on the left.
    logits = tuple(torch.randn(40, 8) for _ in range(layers))
    mask = torch.ones(4, 10)
    mask[:, :3], mask[2, :8] = 0, 0
    got = load_balance_loss([routing_of(x) for x in logits], mask)
    torch.testing.assert_close(got, load_balancing_loss_func(logits, 8, 2, mask))
    # Padding does not count: not even a NaN in it.
    broken = [torch.where(mask.view(-1, 1) == 0, torch.nan, x) for x in logits]
    assert torch.equal(load_balance_loss([routing_of(x) for x in broken], mask), got)


def test_load_balance_gradient_is_that_of_transformers():
    logits = torch.randn(40, 8, requires_grad=True)
    (mine,) = torch.autograd.grad(load_balance_loss(routing_of(logits)), logits)
    (theirs,) = torch.autograd.grad(load_balancing_loss_func((logits,), 8, 2), logits)
    torch.testing.assert_close(mine, theirs)


def test_even_load_costs_k():
    logits = torch.eye(8).repeat(4, 1)
    assert load_balance_loss(routing_of(logits, 1)).item() == pytest.approx(1)
    assert load_balance_loss(routing_of(torch.zeros(5, 4), 4)).item() == pytest.approx(4)
    collapsed = torch.zeros(5, 4)
    collapsed[:, 0] = 100
    assert load_balance_loss(routing_of(collapsed, 1)).item() == pytest.approx(4)


def test_z_loss():
    logits = torch.randn(7, 5, dtype=torch.float32)
    torch.testing.assert_close(router_z_loss(routing_of(logits)), logits.exp().sum(-1).log().square().mean())
    mask = torch.tensor([1, 1, 0, 0, 1, 1, 0])
    expected = router_z_loss(routing_of(logits[mask.bool()]))
    torch.testing.assert_close(router_z_loss(routing_of(logits), mask), expected)
    logits = logits.requires_grad_()
    (grad,) = torch.autograd.grad(router_z_loss(routing_of(logits)), logits)
    expected = 2 / 7 * logits.logsumexp(-1, keepdim=True) * logits.softmax(-1)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("dtype", (torch.int8, torch.int32, torch.int64, torch.uint8), ids=str)
def test_load_counts_only_what_is_routed(dtype):
    ids = torch.tensor([[0, 3], [1, 100], [3, 4], [3, 0]]).to(dtype)
    routing = Routing(ids, torch.ones(4, 2), 4)
    assert expert_load(routing).tolist() == [2, 1, 0, 3]
    assert expert_load(routing, torch.tensor([False, True, True, False])).tolist() == [0, 1, 0, 1]
    if dtype != torch.uint8:
        assert expert_load(Routing(-ids, torch.ones(4, 2), 4)).tolist() == [2, 0, 0, 0]


def test_no_tokens():
    routing = routing_of(torch.zeros(0, 4))
    assert load_balance_loss(routing).item() == router_z_loss(routing).item() == 0
    routing = routing_of(torch.randn(3, 4))
    nobody = torch.zeros(3)
    assert load_balance_loss(routing, nobody).item() == router_z_loss(routing, nobody).item() == 0
    assert expert_load(routing, nobody).tolist() == [0, 0, 0, 0]


def test_bias_update_evens_the_load():
    bias = torch.zeros(4)
    routing = Routing(torch.tensor([[0, 1], [0, 2], [0, 1], [0, 9]]), torch.ones(4, 2), 4)
    assert update_expert_bias_(bias, routing) is bias  # loads 4, 2, 1, 0 around a mean of 1.75
    torch.testing.assert_close(bias, torch.tensor([-0.001, -0.001, 0.001, 0.001]))

    logits = torch.randn(512, 8) + torch.linspace(-1, 1, 8)
    bias = torch.zeros(8)

    def imbalance():
        weights, ids = topk_gating(logits, 2, "sigmoid", bias)
        routing = Routing(ids, weights, 8)
        load = expert_load(routing)
        update_expert_bias_(bias, routing, rate=0.01)
        return (load.max() / load.float().mean()).item()

    first = imbalance()
    assert first > 1.8
    assert [imbalance() for _ in range(100)][-1] < 1.15


def test_losses_compile_without_a_graph_break():
    def losses(logits, mask):
        routing = routing_of(logits)
        return load_balance_loss(routing, mask) + router_z_loss(routing, mask)

    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (4, 9):
        logits, mask = torch.randn(T, 8), torch.arange(T) % 3 > 0
        torch.testing.assert_close(compiled(logits, mask), losses(logits, mask))


def test_gradcheck():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for loss in (load_balance_loss, router_z_loss):
        assert gradcheck(lambda x, loss=loss: loss(routing_of(x), torch.tensor([1, 0, 1])), logits)


def test_errors():
    routing = Routing(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1), 4)
    for loss in (load_balance_loss, router_z_loss):
        with pytest.raises(ValueError, match="routing must have logits, got none"):
            loss(routing)


def test_arguments_of_another_kind_or_size():
    routing = Routing(torch.tensor([[0, 1], [2, 0]]), torch.rand(2, 2), 3, torch.randn(2, 3))
    with pytest.raises(ValueError, match="routing must be at least one Routing, got none"):
        load_balance_loss([])
    with pytest.raises(TypeError, match="routing must be of type Routing, got Tensor"):
        load_balance_loss([routing.ids])
    for function in (expert_load, load_balance_loss, router_z_loss):
        with pytest.raises(ValueError, match=r"mask must have T=2 elements, got \[3\]"):
            function(routing, torch.ones(3))
    with pytest.raises(ValueError, match=r"bias must have shape \[E=3\], got \[4\]"):
        update_expert_bias_(torch.zeros(4), routing)
