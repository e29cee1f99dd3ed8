import pytest
import torch

from moert import RouterContext, Routing, TopKRouter
from moert.routers import GatingResidualRouter, linked_routers

KINDS = ["ffn"] * 8 + ["const"] * 2 + ["copy", "zero"]


def router(**options):
    return GatingResidualRouter(16, 12, **({"kinds": KINDS} | options))


def test_no_residual_is_the_plain_router_bit_for_bit():
    plain, mine, x = TopKRouter(16, 12, 2), router(renorm="paper"), torch.randn(30, 16)
    torch.nn.init.zeros_(mine.residual_weight)
    plain.weight = mine.weight
    previous = router()(torch.randn(30, 16))
    for context in (None, RouterContext(), RouterContext(previous=previous)):
        got, expected = mine(x, context), plain(x)
        assert torch.equal(got.ids, expected.ids) and torch.equal(got.weights, expected.weights)


def test_residual_alone_routes_like_the_first_layer():
    routing, x = router()(torch.randn(30, 16)), torch.randn(30, 16)
    first = routing
    for _ in range(3):
        layer = router()
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.eye_(layer.residual_weight)
        routing = layer(x, RouterContext(previous=routing))
        assert torch.equal(routing.ids, first.ids) and torch.equal(routing.weights, first.weights)


def test_raw_logits_add_up():
    one, two, x = router(two_layer=True), router(target_std=1.0), torch.randn(9, 16)
    first = one(x)
    torch.testing.assert_close(first.logits, torch.tanh(x @ one.hidden_weight.T) @ one.weight.T)
    sum_ = x @ two.weight.T + first.logits @ two.residual_weight.T
    torch.testing.assert_close(two(x, RouterContext(previous=first)).logits, sum_ / sum_.std(-1, keepdim=True))


def test_logits_that_do_not_differ_have_no_scale():
    mine, x = router(target_std=1.0), torch.zeros(3, 16, requires_grad=True)
    routing = mine(x)
    assert (routing.logits == 0).all() and routing.weights.isfinite().all()
    routing.weights.square().sum().backward()
    assert x.grad.isfinite().all() and mine.weight.grad.isfinite().all()


def test_the_residual_may_start_at_zero():
    assert router().residual_weight.abs().max() > 0
    first, second, x = router(), router(residual_init="zero"), torch.randn(9, 16)
    assert torch.equal(second(x, RouterContext(previous=first(x))).logits, second(x).logits)
    second(x, RouterContext(previous=first(x))).weights.square().sum().backward()
    assert second.residual_weight.grad.abs().sum() > 0


@pytest.mark.parametrize("renorm", ("paper", "released", "mixtral"))
def test_weights(renorm):
    mine, x = router(renorm=renorm, k=3), torch.randn(200, 16)
    mine.weight.data.mul_(4)
    routing = mine(x)
    for t in range(200):
        logits = routing.logits[t].double()
        p, ids = logits.softmax(-1), logits.sort(descending=True, stable=True).indices[:3]
        w = p[ids]
        if renorm == "released":
            w = torch.where(ids == 11, 0, w)
            w = w / w.sum()
        elif renorm == "mixtral":
            w = logits[ids].softmax(-1)
        assert torch.equal(routing.ids[t].long(), ids)
        torch.testing.assert_close(routing.weights[t].double(), w, rtol=1e-5, atol=1e-6)


def test_a_zero_expert_alone_gives_no_nan():
    mine = router(k=1)
    torch.nn.init.zeros_(mine.weight)
    mine.weight.data[11] = 1
    routing = mine(torch.ones(3, 16))
    assert (routing.ids == 11).all() and (routing.weights == 0).all()
    routing.weights.sum().backward()
    assert mine.weight.grad.isfinite().all()


def test_balance_loss_against_a_loop():
    mine, x, mask = router(tau=0.3, beta=0.5), torch.randn(20, 16), torch.arange(20) < 15
    routing = mine(x, RouterContext(mask=mask))
    p, total = routing.logits.softmax(-1)[:15], 0
    for e in range(12):
        f = sum((row == e).any().item() for row in routing.ids[:15]) / 15
        total += (1 if e < 8 else 0.3) * f * p[:, e].mean()
    torch.testing.assert_close(routing.losses["balance"], 0.5 * total)
    assert not mine.eval()(x).losses


@pytest.mark.parametrize("tau", (0.1, 0.75))
def test_capacity(tau):
    T = 256
    mine = router(tau=tau, capacity_factor=1.1)
    routing = mine(torch.randn(T, 16))
    load = torch.bincount(routing.ids.flatten().long(), minlength=13)[:12]
    size = mine.capacity(T)
    bound = 1.1 * T / (tau * 8 + 4)
    assert size.tolist() == [-int(-(tau if e < 8 else 1) * bound // 1) for e in range(12)]
    assert (load <= size).all() and (routing.ids == 12).any()
    assert abs(size[:8].sum() / size.sum() - tau * 8 / (tau * 8 + 4)) < 0.01
    assert (mine.eval()(torch.randn(T, 16)).ids < 12).all()


def test_padding_takes_nobodys_room():
    mine, x, mask = router(capacity_factor=0.5), torch.randn(90, 16), torch.rand(90) < 0.6
    routing, alone = mine(x, RouterContext(mask=mask)), mine(x[mask])
    assert torch.equal(routing.ids[mask], alone.ids) and (alone.ids == 12).any()
    assert torch.equal(routing.ids[~mask], mine.eval()(x).ids[~mask])
    whole = router(tau=1.0, capacity_factor=1.2)
    assert whole.capacity(100).tolist() == [10] * 12  # 1.2 * 100 / 12, a little more in floating point


def test_defaults():
    mine = GatingResidualRouter(16, 4)
    assert (mine.k, mine.renorm, mine.tau, mine.beta, mine.capacity_factor) == (2, "released", 0.75, 0.01, None)
    assert mine.kinds == ("ffn",) * 4 and mine.hidden_weight is None and mine.target_std is None
    assert router(two_layer=True).hidden_weight.shape == (8 * 12, 16)


def test_stays_float32_and_compiles():
    mine = router(two_layer=True).half()
    assert {p.dtype for p in mine.parameters()} == {torch.float32}
    x = torch.randn(7, 16, dtype=torch.bfloat16)
    expected = mine(x.float()).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mine(x).logits, expected) and torch.equal(mine(x.float()).logits, expected)
    mine = router(capacity_factor=1.1)
    compiled = torch.compile(mine, backend="aot_eager", fullgraph=True)
    previous = mine(x)
    got, expected = compiled(x, RouterContext(previous=previous)), mine(x, RouterContext(previous=previous))
    assert torch.equal(got.ids, expected.ids) and torch.equal(got.losses["balance"], expected.losses["balance"])


def test_gradients_and_no_tokens():
    mine, x = router(two_layer=True), torch.randn(9, 16)
    mine(x, RouterContext(previous=mine(x))).weights.square().sum().backward()
    assert all(p.grad.norm() > 0 for p in mine.parameters())
    routing = mine(x[:0])
    assert routing.ids.shape == (0, 2) and routing.losses["balance"] == 0


@pytest.mark.parametrize(
    "options,message",
    [
        ({"kinds": ["ffn", "zero", "ffn"] + ["copy"] * 9}, r"kinds\[2\] must be zero, copy, const after .*, got ffn"),
        ({"kinds": KINDS[1:]}, "kinds must have num_experts=12 entries, got 11"),
        ({"k": 13}, r"k must be in \[1, num_experts=12\], got 13"),
        ({"renorm": "none"}, "renorm must be one of released, paper, mixtral, got none"),
        ({"tau": 0}, "tau must be above 0, got 0"),
        ({"residual_init": "one"}, "residual_init must be one of linear, zero, got one"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        router(**options)


def test_layers_of_different_size_are_refused_before_anything_runs():
    with pytest.raises(ValueError, match="previous must have num_experts=12, got 4"):
        router(previous=TopKRouter(16, 4, 2))
    assert router(previous=router()).num_experts == 12
    model = torch.nn.ModuleList([router(), GatingResidualRouter(16, 4), GatingResidualRouter(16, 4)])
    with pytest.raises(ValueError, match="previous must have num_experts=4, got 12"), linked_routers(model):
        pass
    with linked_routers(model[1:]):
        assert model[2](torch.randn(3, 16)).ids.shape == (3, 2)


@pytest.mark.parametrize("logits,got", [(None, "None"), (torch.zeros(3, 4), r"\[3, 4\]")])
def test_layers_of_different_size_are_refused(logits, got):
    previous = Routing(torch.zeros(3, 1).int(), torch.zeros(3, 1), 4, logits)
    with pytest.raises(ValueError, match=rf"context.previous.logits must have shape \[3, 12\], got {got}"):
        router()(torch.randn(3, 16), RouterContext(previous=previous))
