from dataclasses import replace

import pytest
import torch
from torch import nn

from moert import GluExperts, MoELayer, RouterContext
from moert.routers import RecurrentRouter, RecurrentState, follow, load_balance_loss
from moert.testing import OperatorsRan

H, E, P = 10, 6, 8


def stack(layers=3, **options):
    state = RecurrentState(P)
    routers = [RecurrentRouter(H, E, 2, state, first=i == 0, **options) for i in range(layers)]
    for parameter in (*state.parameters(), *(p for r in routers for p in r.parameters())):
        nn.init.normal_(parameter, std=0.5)
    return state, routers


def run(routers, xs):
    context, routings = RouterContext(), []
    for router, x in zip(routers, xs, strict=True):
        routings.append(router(x, context))
        context = follow(context, routings[-1])
    return routings


@pytest.mark.parametrize("T", (0, 1, 65))
@pytest.mark.parametrize("cell", ("gru", "rnn"))
def test_cell_is_the_papers_step(T, cell):
    state, x, h = RecurrentState(P, cell), torch.randn(T, P, requires_grad=True), torch.randn(T, P, requires_grad=True)
    for parameter in state.parameters():
        nn.init.normal_(parameter)
    c = state.cell
    if cell == "gru":
        ir, iz, i_n = (x @ c.weight_ih.T + c.bias_ih).chunk(3, -1)
        hr, hz, hn = (h @ c.weight_hh.T + c.bias_hh).chunk(3, -1)
        z = torch.sigmoid(iz + hz)
        expected = (1 - z) * torch.tanh(i_n + torch.sigmoid(ir + hr) * hn) + z * h
    else:
        expected = torch.tanh(x @ c.weight_ih.T + c.bias_ih + h @ c.weight_hh.T + c.bias_hh)
    torch.testing.assert_close(state(x, h), expected, rtol=0, atol=1e-6)
    inputs, dy = [x, h, *c.parameters()], torch.randn(T, P)
    for got, want in zip(*(torch.autograd.grad(y, inputs, dy) for y in (state(x, h), expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_routing_agrees_with_the_formula():
    state, routers = stack()
    xs = torch.randn(3, 7, H)
    h = torch.zeros(7, P)
    for router, x, routing in zip(routers, xs, run(routers, xs), strict=True):
        h = torch.stack([state.cell(router.projection @ x[t], h[t]) for t in range(7)])
        s = (h @ router.weight.T).softmax(-1)
        ids = s.argsort(-1, descending=True)[:, :2]
        assert torch.equal(routing.ids.long(), ids)
        w = s.gather(-1, ids)
        torch.testing.assert_close(routing.weights, w / w.sum(-1, keepdim=True))
        f = torch.bincount(ids.flatten(), minlength=E) / 7
        torch.testing.assert_close(routing.losses["balance"], 1e-3 * E * (f * s.mean(0)).sum())


def test_nothing_recurs_along_the_sequence():
    _, routers = stack()
    xs, order = torch.randn(3, 16, H), torch.randperm(16)
    plain, mixed = run(routers, xs), run(routers, xs[:, order])
    for a, b in zip(plain, mixed, strict=True):
        assert torch.equal(a.ids[order], b.ids)
        # A row's last bit may depend on its place in the GEMM's tiles.
        torch.testing.assert_close(a.weights[order], b.weights, rtol=1e-6, atol=1e-6)


def test_a_batch_is_its_rows():
    _, routers = stack()
    xs = torch.randn(3, 16, H)
    whole, parts = run(routers, xs), [run(routers, xs[:, rows]) for rows in (slice(0, 5), slice(5, 16))]
    for routing, *split in zip(whole, *parts, strict=True):
        assert torch.equal(routing.ids, torch.cat([part.ids for part in split]))
        torch.testing.assert_close(routing.weights, torch.cat([part.weights for part in split]), rtol=1e-6, atol=1e-6)


def test_how_weights_and_states_start():
    state = RecurrentState(64)
    router = RecurrentRouter(128, 32, 2, state)
    for weight in (state.cell.weight_ih, state.cell.weight_hh, router.projection, router.weight):
        assert abs(weight.std() - 0.02) < 0.002
    assert not state.cell.bias_ih.any() and not state.cell.bias_hh.any() and state.start is None
    wide = RecurrentState(64, std=0.5, learned_start=True)
    assert abs(RecurrentRouter(128, 32, 2, wide).projection.std() - 0.5) < 0.05 and not wide.start.any()
    nn.init.normal_(wide.start)
    first, x = RecurrentRouter(128, 32, 2, wide, first=True), torch.randn(5, 128)
    torch.testing.assert_close(first(x).state, wide.cell(x @ first.projection.T, wide.start.expand(5, 64)))
    first(x).weights.square().sum().backward()
    assert wide.start.grad.abs().sum() > 0


@pytest.mark.parametrize("detach", (False, True))
def test_gradient_through_the_depth(detach):
    _, routers = stack(detach=detach)
    routings = run(routers, torch.randn(3, 5, H))
    (grad,) = torch.autograd.grad(routings[2].weights.square().sum(), routers[0].projection, allow_unused=True)
    assert grad is None if detach else grad.abs().sum() > 0


def test_balance_over_all_layers():
    """The release pools the tokens of all layers: what one layer prefers another may avoid."""
    _, routers = stack(3)
    routings = run(routers, torch.randn(3, 9, H))
    s = torch.cat([r.logits.softmax(-1) for r in routings])
    f = torch.bincount(torch.cat([r.ids.flatten() for r in routings]).long(), minlength=E) / 27
    torch.testing.assert_close(load_balance_loss(routings), E * (f * s.mean(0)).sum())
    own = sum(r.losses["balance"] for r in routings) / 3
    torch.testing.assert_close(1e-3 * load_balance_loss(routings, pooled=False), own)


def test_tokens_that_leave_take_their_state_along():
    _, routers = stack()
    x, kept = torch.randn(2, 9, H), torch.tensor([0, 3, 4, 8])
    first = routers[0](x[0])
    fewer = replace(first, state=first.state[kept])
    whole, pruned = routers[1](x[1], follow(None, first)), routers[1](x[1, kept], follow(None, fewer))
    torch.testing.assert_close(pruned.state, whole.state[kept], rtol=1e-6, atol=1e-6)


def test_a_cell_per_layer_and_another_scorer():
    class Cosine(RecurrentRouter):
        def unbiased_logits(self, h):
            return nn.functional.normalize(h, dim=-1) @ nn.functional.normalize(self.weight, dim=-1).T

    routers = [Cosine(H, E, 2, RecurrentState(P), first=i == 0) for i in range(2)]
    assert routers[0].state is not routers[1].state
    routings = run(routers, torch.randn(2, 4, H))
    expected = nn.functional.cosine_similarity(routings[1].state[:, None], routers[1].weight[None], dim=-1)
    torch.testing.assert_close(routings[1].logits, expected)


def test_without_recurrent_weights_the_state_only_decays():
    state, routers = stack(1)
    nn.init.zeros_(state.cell.weight_hh)
    for bias in (state.cell.bias_ih, state.cell.bias_hh):
        nn.init.zeros_(bias)
    router, x, h = RecurrentRouter(H, E, 2, state), torch.randn(4, H), torch.randn(4, P)
    previous = replace(routers[0](x), state=h)
    got = router(x, RouterContext(previous=previous)).state - router(x).state
    z = torch.sigmoid((x @ router.projection.T) @ state.cell.weight_ih[P : 2 * P].T)
    torch.testing.assert_close(got, z * h)


def test_parameters_are_counted_once():
    state, routers = stack(4)
    model = nn.ModuleList([state, *(MoELayer(r, GluExperts(E, H, 4)) for r in routers)])
    routing = sum(p.numel() for name, p in model.named_parameters() if "experts" not in name)
    assert routing == 4 * P * (H + E) + 6 * P * P + 6 * P
    assert len({id(r.state.cell) for r in routers}) == 1
    assert all(list(r.state_dict()) == ["weight", "projection"] for r in routers)  # the cell is the model's


def test_empty_dtype_compile_state_and_operators():
    _, routers = stack()
    routings = run(routers, torch.zeros(3, 0, H))
    assert routings[2].ids.shape == (0, 2) and routings[2].state.shape == (0, P)
    with OperatorsRan() as ran:
        run(routers, torch.randn(3, 4, H))
    assert ran.names == ["topk_gating"] * 3
    x = torch.randn(5, H)
    compiled = torch.compile(lambda x: run(routers, [x] * 3)[2].weights, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(routers, [x] * 3)[2].weights)
    routings = run(routers, [x] * 3)
    state, others = stack()
    state.load_state_dict(routers[0].state.state_dict())
    for mine, theirs in zip(others, routers, strict=True):
        mine.load_state_dict(theirs.state_dict())
    assert torch.equal(run(others, [x] * 3)[2].weights, run(routers, [x] * 3)[2].weights)
    low = RecurrentRouter(H, E, 2, RecurrentState(P)).bfloat16()(x.bfloat16())
    assert low.state.dtype == low.weights.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(routers[0](x).state, routings[0].state) and torch.equal(
            routers[0](x).logits, routings[0].logits
        )


def test_errors():
    _, routers = stack()
    x = torch.randn(4, H)
    routing = routers[0](x)
    with pytest.raises(ValueError, match=r"state must have shape \[T=3, p=8\], got \[4, 8\]"):
        routers[1](x[:3], follow(None, routing))
    with pytest.raises(ValueError, match="context.previous must have no state for the first router, got one"):
        routers[0](x, follow(None, routing))
    for make, message in (
        (lambda: RecurrentState(0), "p must be at least 1, got 0"),
        (lambda: RecurrentState(4, "lstm"), "cell must be gru or rnn, got lstm"),
        (lambda: RecurrentRouter(H, E), "state must be the RecurrentState of the model, got None"),
        (lambda: RecurrentRouter(H, E, 7, RecurrentState(4)), r"k must be in \[1, 6\], got 7"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
