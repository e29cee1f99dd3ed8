import pytest
import torch

from moert import GroupLimit, RouterContext, TopKRouter, topk_gating
from moert.ops.gating import SCORES
from moert.routers import (
    DeepSeekRouter,
    FrozenRandomRouter,
    GatingResidualRouter,
    RecurrentRouter,
    RecurrentState,
    SimilarityRouter,
)
from moert.routers.ranks import rank_gating
from moert.testing import OperatorsRan

E = 8


def reference(logits, ranks):
    """Sorted by hand: (experts, softmax weights) of the ranks, token by token."""
    out = []
    for row in logits.double().softmax(-1).tolist():
        order = sorted(range(len(row)), key=lambda e: -row[e])
        out.append(([order[r - 1] for r in ranks], [row[order[r - 1]] for r in ranks]))
    return out


@pytest.mark.parametrize("score", ("softmax", "softmax_over_topk"))
@pytest.mark.parametrize("ranks", ((2,), (1, 2), (8, 3, 5)), ids=str)
def test_forward(ranks, score):
    logits = torch.randn(13, E)
    weights, ids = rank_gating(logits, RouterContext(ranks=(ranks,)), score)
    experts, expected = zip(*reference(logits, ranks), strict=True)
    expected = torch.tensor(expected)
    if score == "softmax_over_topk":
        expected = expected / expected.sum(-1, keepdim=True)
    assert ids.tolist() == list(map(list, experts))
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize(
    "options",
    ({"renormalize": True}, {}, {"score": "sigmoid", "renormalize": True, "scale": 2.5, "groups": GroupLimit(4, 2)}),
    ids=("renormalized", "plain", "groups"),
)
def test_the_first_k_ranks_are_the_ordinary_routing(options):
    router, x = TopKRouter(16, E, 3, **options), torch.randn(40, 16)
    plain, ranked = router(x), router(x, RouterContext(ranks=((1, 2, 3),)))
    assert torch.equal(plain.ids, ranked.ids)
    torch.testing.assert_close(plain.weights, ranked.weights, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("groups", (None, GroupLimit(4, 2)), ids=str)
@pytest.mark.parametrize("bias", (None, torch.linspace(-1, 1, E)), ids=("", "bias"))
@pytest.mark.parametrize("score", SCORES)
def test_the_first_k_ranks_are_topk_gating(score, bias, groups):
    logits, options = torch.randn(40, E), {"score": score, "bias": bias, "groups": groups}
    plain, ranked = topk_gating(logits, 3, **options), rank_gating(logits, RouterContext(ranks=((1, 2, 3),)), **options)
    assert torch.equal(plain[1], ranked[1])
    torch.testing.assert_close(plain[0], ranked[0], rtol=1e-6, atol=1e-7)


def test_ranks_far_below_the_best_are_weighed_by_their_own_softmax():
    weights, ids = rank_gating(
        torch.tensor([[0.0, -200, -201, -203]]), RouterContext(ranks=((2, 3),)), "softmax_over_topk"
    )
    assert ids.tolist() == [[1, 2]]
    torch.testing.assert_close(weights, torch.tensor([[0.0, -1.0]]).softmax(-1))


def test_groups_of_tokens():
    router, x = TopKRouter(16, E, 2, renormalize=True), torch.randn(6, 16)
    context = RouterContext(ranks=((1, 2), (3,), ()), group=torch.tensor([0, 1, 2, 0, 1, 1]))
    with OperatorsRan() as ran:
        routing = router(x, context)
    assert ran.names == ["topk_gating"]
    strong, weak = (router(x, RouterContext(ranks=(r,))) for r in ((1, 2), (3,)))
    for t, group in enumerate((0, 1, 2, 0, 1, 1)):
        expected = (strong.ids[t].tolist(), [weak.ids[t].item(), E], [E, E])[group]
        assert routing.ids[t].tolist() == expected
    torch.testing.assert_close(routing.weights.sum(-1), torch.tensor([1.0, 1, 0, 1, 1, 1]))
    assert routing.weights[1].tolist() == [1, 0]


def test_weights_are_renormalised_as_the_router_does_or_as_the_context_says():
    x, ranks = torch.randn(6, 16), ((2, 4),)
    for own in (False, True):
        router = TopKRouter(16, E, 2, renormalize=own)
        p = router(x, RouterContext(ranks=ranks)).logits.softmax(-1).sort(descending=True).values[:, [1, 3]]
        for given in (None, False, True):
            routing = router(x, RouterContext(ranks=ranks, renormalize=given))
            ones = own if given is None else given
            torch.testing.assert_close(routing.weights, p / p.sum(-1, keepdim=True) if ones else p)


@pytest.mark.parametrize("make", (
    lambda: TopKRouter(16, E, 2),
    lambda: TopKRouter(16, E, 2, "softmax_over_topk"),
    lambda: DeepSeekRouter.v1(16, E, 2),
    lambda: RecurrentRouter(16, E, 2, RecurrentState(4)),
    lambda: SimilarityRouter(16, E, 2, "cosine"),
    lambda: FrozenRandomRouter(16, E, 2),
    lambda: GatingResidualRouter(16, E, kinds=["ffn"] * 6 + ["copy", "zero"]),
    lambda: GatingResidualRouter(16, E, renorm="paper"),
    lambda: GatingResidualRouter(16, E, renorm="mixtral"),
), ids=("top-k", "over k", "deepseek", "rmoe", "similarity", "frozen", "residual", "paper", "mixtral"))  # fmt: skip
def test_every_router_of_the_k_best_reads_ranks(make):
    router, x = make().eval(), torch.randn(30, 16)
    if hasattr(router, "projection"):
        torch.nn.init.normal_(router.projection)
    assert router.reads_ranks
    plain, first = router(x), router(x, RouterContext(ranks=((1, 2),)))
    assert torch.equal(plain.ids, first.ids)
    torch.testing.assert_close(first.weights, plain.weights, rtol=1e-5, atol=1e-7)
    groups = torch.arange(30) % 2
    mixed = router(x, RouterContext(ranks=((1, 2), (3,)), group=groups))
    third = plain.logits.sort(descending=True, stable=True).indices[:, 2]
    assert torch.equal(mixed.ids[::2], plain.ids[::2]) and torch.equal(mixed.ids[1::2, 0].long(), third[1::2])
    assert (mixed.ids[1::2, 1] == E).all() and not mixed.weights[1::2, 1].any()
    alone = router(x, RouterContext(ranks=((3,),))).weights
    torch.testing.assert_close(mixed.weights[1::2, :1], alone[1::2])


def test_gradients():
    logits = torch.randn(5, E, dtype=torch.float64, requires_grad=True)
    context = RouterContext(ranks=((2, 4), (1,)), group=torch.tensor([0, 1, 0, 1, 1]))
    for options in ({}, {"renormalize": True}, {"score": "softmax_over_topk"}):
        assert torch.autograd.gradcheck(lambda x, options=options: rank_gating(x, context, **options)[0], logits)


def test_compile_and_no_tokens():
    router, context = TopKRouter(16, E, 2), RouterContext(ranks=((1, 2), (3,)))
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (4, 9):
        x, group = torch.randn(T, 16), torch.arange(T) % 2
        filled = RouterContext(ranks=context.ranks, group=group)
        assert torch.equal(compiled(x, filled).weights, router(x, filled).weights)
    assert router(torch.zeros(0, 16), context).ids.shape == (0, 2)


@pytest.mark.parametrize("rank,most,groups", ((0, 8, None), (9, 8, None), (5, 4, GroupLimit(4, 2))))
def test_errors(rank, most, groups):
    with pytest.raises(ValueError, match=rf"ranks must be in \[1, {most}\], got {rank}"):
        rank_gating(torch.randn(2, E), RouterContext(ranks=((1, rank),)), groups=groups)
