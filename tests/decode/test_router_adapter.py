from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moert import GluExperts, MoELayer, RouterContext, TopKRouter
from moert.decode import RouterAdapter
from moert.quant.quantize import FORMATS, quantize_
from moert.routers import (
    DeepSeekRouter,
    DenseToSparseRouter,
    FrozenRandomRouter,
    GatingResidualRouter,
    RecurrentRouter,
    RecurrentState,
    SimilarityRouter,
    given_context,
    recorded_routings,
)
from moert.testing import OperatorsRan

V, H, E = 12, 16, 4
NAMES = ("layers.0.router", "layers.1.router", "layers.2.router", "layers.3.router")


class Model(nn.Module):
    """A language model that sees one token at a time."""

    def __init__(self, depth=2, k=2, dtype=torch.float32):
        super().__init__()
        self.embedding, self.last = nn.Embedding(V, H), nn.Linear(H, V)
        self.layers = nn.ModuleList(MoELayer(TopKRouter(H, E, k), GluExperts(E, H, 8)) for _ in range(depth))
        self.to(dtype)

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return SimpleNamespace(logits=self.last(x))


IDS = torch.randint(V, (2, 40), generator=torch.Generator().manual_seed(1))


def adapter(model, **options):
    return RouterAdapter(model, **({"layers": NAMES[: len(model.layers)], "steps": 4} | options))


def test_neutral():
    model = Model()
    plain, sums = model(IDS).logits, [p.clone() for p in model.parameters()]
    adapt = adapter(model)
    with adapt.session():
        assert torch.equal(model(IDS).logits, plain)
        adapt.deltas = {name: torch.zeros(2, E) for name in NAMES[:2]}
        assert torch.equal(model(IDS).logits, plain)
        report = adapt.adapt(IDS)
        assert not torch.equal(model(IDS).logits, plain) and report.accepted.all()
        adapt.reset()
        assert torch.equal(model(IDS).logits, plain)
    assert torch.equal(model(IDS).logits, plain)
    for parameter, before in zip(model.parameters(), sums, strict=True):
        assert torch.equal(parameter, before) and parameter.grad is None and parameter.requires_grad


def test_the_loss_falls_and_only_frozen_operators_run():
    model, adapt = Model(), adapter(Model())
    adapt = adapter(model)
    with OperatorsRan() as ran:
        report = adapt.adapt(IDS)
    assert (report.loss_after < report.loss_before).all() and report.layers == NAMES[:2]
    assert set(ran.names) == {"topk_gating", "topk_gating_backward", "fused_experts", "fused_experts_backward"}
    norms = {name: delta.norm(dim=-1) for name, delta in adapt.deltas.items()}
    torch.testing.assert_close(report.delta_norms, norms)


@pytest.mark.parametrize("format", (*FORMATS, "sub1"))
def test_packed_experts(format):
    """Their weights have no gradient, their rows do: nothing else is needed."""
    model = Model()
    assert len(quantize_(model, format)) == 2
    with OperatorsRan() as ran:
        report = adapter(model).adapt(IDS)
    assert (report.loss_after < report.loss_before).all() and report.accepted.all()
    assert "fused_experts_quantized_backward" in ran.names


def test_deltas_of_a_bfloat16_model_are_float32():
    model = Model(dtype=torch.bfloat16)
    adapt = adapter(model, steps=1)
    assert adapt.adapt(IDS).accepted.any()
    for delta in adapt.deltas.values():  # Adam's first step is the rate, which bfloat16 would round to 0.3008
        moved = delta[delta != 0].abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.3), rtol=1e-4, atol=0)
        assert delta.dtype == torch.float32 and len(moved) >= E
    report = adapter(model).adapt(IDS)
    assert (report.loss_after < report.loss_before).all()


def test_another_optimizer_and_another_confidence():
    model, seen = Model(depth=3), []

    def largest(routing):
        seen.append(routing.logits.shape)
        return routing.logits.softmax(-1).amax(-1) * (len(seen) % 3 == 1)  # the first router's alone

    adapt = RouterAdapter(model, fraction=0.4, steps=1, lr=0.25, optimizer=torch.optim.SGD, confidence=largest)
    report = adapt.adapt(IDS)
    assert report.layers == NAMES[:1] and seen[0] == (80, E) and report.confidence[NAMES[1]] == 0
    with recorded_routings(model) as calls:
        logits = model(IDS).logits[:, :-1]
    expected = dict(calls)[NAMES[0]].logits.softmax(-1).amax(-1).mean()
    assert report.confidence[NAMES[0]] == pytest.approx(expected.item(), rel=1e-5)
    delta = torch.zeros(2, E, requires_grad=True)
    with given_context(model, {NAMES[0]: lambda x: RouterContext(logit_bias=delta.repeat_interleave(40, 0))}):
        logits = model(IDS).logits[:, :-1]
    loss = F.cross_entropy(logits.transpose(1, 2), IDS[:, 1:], reduction="none").mean(-1).sum()
    (grad,) = torch.autograd.grad(loss, delta)
    torch.testing.assert_close(adapt.deltas[NAMES[0]], -0.25 * grad * report.accepted[:, None])


def test_groups_stay_closed_to_a_token():
    """The deltas come before scores and groups, so whatever they are a token keeps to its best group."""
    model = Model()
    for layer in model.layers:
        layer.router = DeepSeekRouter(H, E, 2, "sigmoid", 2, 1, "top2sum", True, bias_balance=0.1)
        layer.router.expert_bias.normal_(std=0.1)
    adapt = adapter(model)
    assert adapt.adapt(IDS).accepted.any()  # not of both: which group is best moves with the logits
    with adapt.session(), recorded_routings(model) as calls:
        model.eval()(IDS)
    for name, routing in calls:
        assert torch.equal(routing.ids[:, 0] // 2, routing.ids[:, 1] // 2)
        router = dict(model.named_modules())[name]
        choice = (routing.logits.sigmoid() + router.expert_bias).view(-1, 2, 2).sum(-1)
        assert torch.equal(routing.ids[:, 0].long() // 2, choice.argmax(-1))


def test_gradient():
    """d loss / d delta of each layer against central differences."""
    model = Model(dtype=torch.float64)

    def loss(deltas):
        contexts = {name: RouterContext(logit_bias=d) for name, d in zip(NAMES[:2], deltas, strict=True)}
        with given_context(model, contexts):
            logits = model(IDS[:1]).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), IDS[0, 1:])

    deltas = [torch.zeros(E, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    grads = torch.autograd.grad(loss(deltas), deltas)
    for layer, grad in enumerate(grads):
        for e in range(E):
            sides = []
            for eps in (1e-5, -1e-5):  # smaller than any distance to a tie
                moved = [d.detach().clone() for d in deltas]
                moved[layer][e] += eps
                sides.append(loss(moved).item())
            assert abs((sides[0] - sides[1]) / 2e-5 - grad[e].item()) <= 1e-4 * grad.abs().max().item()


def test_sequences_do_not_notice_each_other():
    model = Model()
    together = adapter(model)
    report = together.adapt(IDS)
    assert sum(d.numel() for d in together.deltas.values()) == 2 * 2 * E
    for row in range(2):
        alone = adapter(model)
        after = alone.adapt(IDS[row : row + 1]).loss_after
        assert (after - report.loss_after[row]).abs() <= 1e-5
        for name in NAMES[:2]:
            assert (alone.deltas[name][0] - together.deltas[name][row]).abs().max() <= 1e-5


def test_the_surest_half_is_adapted():
    model = Model(depth=4)
    with torch.no_grad():
        model.layers[0].router.weight.zero_()
        model.layers[2].router.weight.mul_(20)
        model.layers[3].router.weight.mul_(10)
    adapt = RouterAdapter(model, steps=2)
    report = adapt.adapt(IDS)
    assert report.confidence[NAMES[0]] == 2 / E
    assert report.layers == NAMES[2:] and set(adapt.deltas) == set(NAMES[2:])
    with adapt.session(), recorded_routings(model) as calls:
        model(IDS)
    plain = dict(calls)[NAMES[0]]
    with recorded_routings(model) as calls:
        model(IDS)
    assert torch.equal(plain.logits, dict(calls)[NAMES[0]].logits)


def test_soft_rates_follow_confidence():
    """The first step of Adam is the rate, whatever the gradient: it shows which rate each router has."""
    model = Model(depth=3)
    with torch.no_grad():
        for layer, scale in zip(model.layers, (0, 20, 5), strict=True):
            layer.router.weight.mul_(scale)
    adapt = RouterAdapter(model, "soft", steps=1, lr=0.01)
    report = adapt.adapt(IDS)
    most = max(report.confidence.values())
    assert report.layers == NAMES[:3] and report.confidence[NAMES[1]] == most
    for name in NAMES[:3]:
        rate = 0.01 * report.confidence[name] / most
        moved = adapt.deltas[name][report.accepted].abs()
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-3, atol=0)


def test_defaults():
    adapt = RouterAdapter(Model())
    assert (adapt.layers, adapt.fraction, adapt.steps, adapt.lr) == ("confidence", 0.5, 5, 0.3)
    assert (adapt.interval, adapt.warm_start, adapt.max_context, adapt.clip) == (128, True, None, None)


def test_what_makes_it_worse_is_not_taken():
    model = Model()
    adapt = adapter(model, steps=2, lr=float("inf"))
    report = adapt.adapt(IDS)
    assert report.loss_after.isnan().all() and not report.accepted.any()
    for name in NAMES[:2]:
        assert not adapt.deltas[name][~report.accepted].any()


def test_a_rising_loss_is_not_taken():
    model = Model()
    adapt = adapter(model, lr=0.1, optimizer=lambda groups: torch.optim.SGD(groups, maximize=True))
    report = adapt.adapt(IDS)
    assert (report.loss_after > report.loss_before).all() and not report.accepted.any()
    assert not any(delta.any() for delta in adapt.deltas.values())
    better = adapter(model)
    assert better.adapt(IDS).accepted.all()
    kept = {name: delta.clone() for name, delta in better.deltas.items()}
    better.optimizer, better.lr = adapt.optimizer, 0.1
    assert not better.adapt(IDS).accepted.any()  # what was there before stays
    torch.testing.assert_close(better.deltas, kept, rtol=0, atol=0)


def test_dropout_is_off_while_adapting():
    model = Model()
    model.layers[0].shared_experts = nn.Dropout(0.9)
    before = [adapter(model.train()).adapt(IDS) for _ in range(2)]
    assert model.training and model.layers[0].shared_experts.training
    assert torch.equal(before[0].loss_before, before[1].loss_before)
    assert torch.equal(before[0].loss_before, adapter(model.eval()).adapt(IDS).loss_before) and not model.training


def test_mask_short_contexts_and_counting():
    model, mask = Model(), torch.arange(40).expand(2, 40) >= 10
    masked, cut = adapter(model), adapter(model, max_context=30)
    of_masked, of_cut = masked.adapt(IDS, mask), cut.adapt(IDS)
    assert of_masked.confidence == pytest.approx(of_cut.confidence, rel=1e-5)
    torch.testing.assert_close(of_masked.loss_before, of_cut.loss_before)
    for name in NAMES[:2]:
        torch.testing.assert_close(masked.deltas[name], cut.deltas[name], rtol=1e-4, atol=1e-5)
    assert adapter(model).adapt(IDS[:, :1]) is None
    counted = adapter(model, interval=3)
    assert [counted.step() for _ in range(3)] == [False, False, True]
    counted.adapt(IDS)
    assert not counted.step(2)


def test_warm_start_and_clip():
    model = Model()
    warm, cold = adapter(model), adapter(model, warm_start=False)
    for each in (warm, cold):
        each.adapt(IDS)
        first = {name: delta.clone() for name, delta in each.deltas.items()}
        each.adapt(IDS)
        same = all(torch.allclose(first[name], each.deltas[name]) for name in first)
        assert same == (each is cold)
    clipped = adapter(model, clip=0.1)
    assert all((norm <= 0.1001).all() for norm in clipped.adapt(IDS).delta_norms.values())


@pytest.mark.parametrize(
    "options,message",
    [
        ({"layers": ("one",)}, "layers must be among layers.0.router, layers.1.router, got one"),
        ({"fraction": 0.0}, r"fraction must be in \(0, 1\], got 0.0"),
        ({"model": nn.Linear(2, 2)}, "model must have moert routers, got none"),
        (
            {"model": TopKRouter(4, 4, 1, renormalize=True)},
            "model must have routing weights that move, got the 1",
        ),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        RouterAdapter(**({"model": Model()} | options))


@pytest.mark.parametrize(
    "constant,moving",
    [
        (lambda: TopKRouter(H, E, 1, renormalize=True), lambda: TopKRouter(H, E, 1)),
        (lambda: TopKRouter(H, E, 1, "softmax_over_topk"), lambda: TopKRouter(H, E, 2, "softmax_over_topk")),
        (
            lambda: RecurrentRouter(H, E, 1, RecurrentState(4)),
            lambda: RecurrentRouter(H, E, 1, RecurrentState(4), False),
        ),
        (lambda: SimilarityRouter(H, E, 1), lambda: SimilarityRouter(H, E, 1, renorm=False)),
        (lambda: GatingResidualRouter(H, E, 1), lambda: GatingResidualRouter(H, E, 1, renorm="paper")),
        (lambda: FrozenRandomRouter(H, E, 1), lambda: FrozenRandomRouter(H, E, 2)),
        (lambda: DenseToSparseRouter(H, E).eval(), lambda: DenseToSparseRouter(H, E, 2).eval()),
    ],
    ids=("top-1", "softmax over 1", "recurrent", "similarity", "gating residual", "frozen", "dense to sparse"),
)
def test_weights_that_cannot_move_are_refused(constant, moving):
    """Adam would blow up the rounding of a gradient that is zero."""
    router, x = constant(), torch.randn(20, H)
    assert router.weight_is_one and (router(x).weights == 1).all()
    with pytest.raises(ValueError, match=r"got the 1 of a renormalised k = 1 \(\)"):
        RouterAdapter(router)
    other = moving()
    assert not other.weight_is_one and not (other(x).weights == 1).all()
    RouterAdapter(other)
