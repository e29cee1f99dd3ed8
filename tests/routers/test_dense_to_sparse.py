import pytest
import torch

from moert import GluExperts, MoELayer, RouterContext
from moert.routers import DenseToSparseRouter
from moert.routers.dense_to_sparse import ACTS, gumbel
from moert.testing import OperatorsRan

H, E = 16, 8


def dense(routing):
    out = torch.zeros(len(routing.ids), E + 1).scatter(1, routing.ids.long(), routing.weights)
    return out[:, :E]


@pytest.mark.parametrize("act", ("identity", "sigmoid", "tanh", "gelu"))
def test_no_threshold_and_no_noise_is_the_dense_softmax(act):
    router = DenseToSparseRouter(H, E, act=act, threshold=0.0, gumbel=False)
    router.logit_bias.data.normal_()
    x = torch.randn(30, H)
    for step, tau in ((0, 2.0), (5000, 1.15), (10_000, 0.3), (99_999, 0.3)):
        router.set_step(step)
        routing = router(x)
        expected = ((ACTS[act](x @ router.weight.T) + router.logit_bias) / tau).softmax(-1)
        torch.testing.assert_close(dense(routing), expected, rtol=0, atol=1e-6)
        assert (routing.ids < E).all()  # nothing is dropped


@pytest.mark.parametrize("act", ("identity", "sigmoid", "tanh", "gelu"))
def test_the_bias_may_be_inside_the_activation(act):
    router = DenseToSparseRouter(H, E, act=act, bias="inside", threshold=0.0, gumbel=False)
    router.logit_bias.data.normal_()
    x, delta = torch.randn(30, H), torch.randn(E)
    for context, given in ((None, 0), (RouterContext(logit_bias=delta), delta)):
        expected = (ACTS[act](x @ router.weight.T + router.logit_bias + given) / 2).softmax(-1)
        torch.testing.assert_close(dense(router(x, context)), expected, rtol=0, atol=1e-6)


def test_defaults():
    router = DenseToSparseRouter(H, E)
    assert (router.k_min, router.act, router.threshold, router.tau_range) == (1, "identity", 1e-3, (2.0, 0.3))
    assert router.gumbel and router.granularity == "token" and router.log_tau is None and router.bias == "outside"


def test_temperature_is_linear_between_its_ends():
    router = DenseToSparseRouter(H, E, total_steps=100)
    assert [router.tau(s).item() for s in (0, 100, 1000)] == torch.tensor([2.0, 0.3, 0.3]).tolist()
    assert router.tau(50).item() == pytest.approx(1.15)
    router.set_step(30)
    assert router.tau() == router.tau(30) and "step" in router.state_dict()
    x = torch.randn(5, H)
    router.gumbel = False
    assert torch.equal(router(x).logits, router(x, RouterContext(step=30)).logits)
    low = DenseToSparseRouter(H, E, tau=(1.0, 1e-9), total_steps=1)
    assert low.tau(1).item() == pytest.approx(1e-3)


@pytest.mark.parametrize("k_min", (1, 3))
def test_experts_below_the_threshold_are_dropped(k_min):
    router = DenseToSparseRouter(H, E, k_min, threshold=0.1)
    router.weight.data.mul_(8)
    routing = router(torch.randn(200, H))
    p = routing.logits.softmax(-1)
    order = p.sort(descending=True, stable=True)
    expected = (order.values > 0.1) | (torch.arange(E) < k_min)
    assert torch.equal(routing.ids < E, expected)
    torch.testing.assert_close(routing.weights[expected], order.values[expected])
    assert len(set((routing.ids < E).sum(-1).tolist())) > 1  # a number of experts for each token


def test_the_best_expert_stays_whatever_the_threshold():
    router = DenseToSparseRouter(H, E, threshold=0.9)
    routing = router(torch.randn(50, H))
    assert (routing.logits.softmax(-1).amax(-1) < 0.9).any()
    assert torch.equal(routing.ids[:, 0].long(), routing.logits.argmax(-1)) and (routing.ids[:, 1:] == E).all()


def test_noise_draws_the_best_expert_from_the_softmax():
    """The largest of logits with Gumbel noise has the probabilities of their softmax."""
    router, x = DenseToSparseRouter(H, E, tau=(1.0, 0.5)), torch.randn(1, H)
    p = (x @ router.weight.T).softmax(-1)[0]
    best = router(x.expand(20_000, H)).ids[:, 0].long()
    assert (torch.bincount(best, minlength=E) / 20_000 - p).abs().max() < 0.02
    router.gumbel = False
    assert torch.equal(router(x).ids, router(x).ids) and router(x).ids[0, 0] == p.argmax()


def test_one_number_of_experts_for_the_batch():
    router = DenseToSparseRouter(H, E, 2, threshold=0.1, granularity="batch")
    routing = router(torch.randn(50, H))
    used = (routing.ids < E).sum(-1)
    mean = (routing.logits.softmax(-1) > 0.1).sum().item() / 50
    assert set(used.tolist()) == {max(2, int(mean))}


def test_gate_gets_sparser_and_evaluation_is_exact():
    router = DenseToSparseRouter(H, E, 2, threshold=0.01, total_steps=60)
    layer = MoELayer(router, GluExperts(E, H, 8))
    optimizer, target, counts = torch.optim.Adam(layer.parameters(), 0.01), torch.randn(H, H), []
    for step in range(60):
        router.set_step(step)
        x = torch.randn(64, H)
        y, routing = layer.forward_with_routing(x)
        (y - torch.tanh(x @ target)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        counts.append((routing.ids < E).sum(-1).double().mean().item())
    assert sum(counts[-5:]) < 0.8 * sum(counts[:5])
    layer.eval()
    x = torch.randn(20, H)
    routing, again = router(x), router(x)
    assert torch.equal(routing.ids, again.ids) and torch.equal(routing.weights, again.weights)
    z = x @ router.weight.T + router.logit_bias
    best = z.topk(2)
    assert torch.equal(routing.ids.long(), best.indices)
    torch.testing.assert_close(routing.weights, best.values.softmax(-1))


def test_learned_temperature():
    with pytest.warns(UserWarning, match="learn_tau with act identity"):
        DenseToSparseRouter(H, E, learn_tau=True)
    router = DenseToSparseRouter(H, E, act="tanh", learn_tau=True, threshold=0.0)
    assert router.tau().item() == pytest.approx(2.0)
    router(torch.randn(9, H)).weights[:, 0].sum().backward()
    assert router.log_tau.grad.abs() > 0
    router.log_tau.data.fill_(-20)
    assert router.tau().item() == pytest.approx(1e-3)


@pytest.mark.parametrize("u", (0.0, 1.0))
def test_noise_is_finite(u, monkeypatch):
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, u))
    noise = gumbel(torch.zeros(3))
    assert noise.isfinite().all() and (noise > 10 if u else noise < -2).all()


def test_bfloat16_compile_operators_and_no_tokens():
    layer = MoELayer(DenseToSparseRouter(H, E, gumbel=False), GluExperts(E, H, 8)).bfloat16()
    assert layer.router.weight.dtype == torch.float32
    x = torch.randn(9, H, dtype=torch.bfloat16)
    with OperatorsRan() as ran:
        y = layer(x)
    assert ran.names == ["topk_gating", "fused_experts"]
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), y)
    noisy = DenseToSparseRouter(H, E)
    assert torch.compile(noisy, backend="aot_eager", fullgraph=True)(x).ids.shape == (9, E)
    other = MoELayer(DenseToSparseRouter(H, E, gumbel=False), GluExperts(E, H, 8)).bfloat16()
    layer.router.set_step(77)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    for granularity in ("token", "batch"):
        router = DenseToSparseRouter(H, E, granularity=granularity)
        assert router(torch.zeros(0, H)).ids.shape == (0, E)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"k_min": 9}, r"k_min must be in \[1, num_experts=8\], got 9"),
        ({"act": "relu"}, "act must be one of identity, sigmoid, tanh, gelu, got relu"),
        ({"tau": (2.0, 0.0)}, r"tau must be above 0, got \(2.0, 0.0\)"),
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"bias": "none"}, "bias must be one of outside, inside, got none"),
        ({"granularity": "layer"}, "granularity must be token or batch, got layer"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        DenseToSparseRouter(H, E, **options)
