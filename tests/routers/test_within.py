import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moert import GluExperts, MoELayer, RouterContext, TopKRouter
from moert.layers import MoDBlock, PackedBlock, RecursiveStack
from moert.routers import (
    DepthRouter,
    ExpertChoiceRouter,
    ModalityRouter,
    RecurrentRouter,
    RecurrentState,
    SimilarityRouter,
    TokenDepthRouter,
    causal_routers_,
    continued_routers,
    given_context,
    heard,
    linked_routers,
    recorded_routings,
    routers_in,
)


class Model(nn.Module):
    """Two MoE layers that are called without a context, or the first one with one."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (MoELayer(TopKRouter(8, 4, 2), GluExperts(4, 8, 6)) for _ in range(2))

    def forward(self, x, context=None):
        return self.two(self.one(x, context))


def test_routers_in():
    model = Model()
    assert routers_in(model) == {"one.router": model.one.router, "two.router": model.two.router}
    assert list(routers_in(model.one.router)) == [""]


def test_causal_routers():
    routers = nn.ModuleList([DepthRouter(8), TopKRouter(8, 4, 2), TokenDepthRouter(8, 2)])
    assert causal_routers_(routers) is routers and routers[0].causal
    assert not causal_routers_(routers, False)[0].causal
    with pytest.raises(ValueError, match="auxiliary must be given for causal_, got None"):
        causal_routers_(ExpertChoiceRouter(8, 4))


def test_recorded_routings():
    model, x = Model(), torch.randn(5, 8)
    with recorded_routings(model) as calls:
        model(x)
        model.two(x)
    model(x)
    assert [name for name, _ in calls] == ["one.router", "two.router", "two.router"]
    assert torch.equal(calls[0][1].ids, model.one.router(x).ids)


def test_whoever_came_first_may_leave_first():
    router = TopKRouter(4, 3, 1)
    first, second = recorded_routings(router), recorded_routings(router)
    calls = [first.__enter__(), second.__enter__()]
    first.__exit__(None, None, None)
    router(torch.randn(2, 4))
    second.__exit__(None, None, None)
    router(torch.randn(2, 4))
    assert [len(each) for each in calls] == [0, 1] and not router.hears


def test_given_context_reaches_every_router():
    model, x = Model(), torch.randn(5, 8)
    bias = torch.tensor([0.0, 9.0, 0.0, 5.0])
    with given_context(model, RouterContext(logit_bias=bias)), recorded_routings(model) as calls:
        model(x)
    assert all(routing.ids.tolist() == [[1, 3]] * 5 for _, routing in calls)
    with recorded_routings(model) as calls:
        model(x)
    assert any(routing.ids.tolist() != [[1, 3]] * 5 for _, routing in calls)


def test_given_context_by_name_and_beside_a_passed_one():
    model, x = Model(), torch.randn(5, 8)
    to_first, to_last = torch.tensor([20.0, 10, 0, 0]), torch.tensor([0.0, 0, 10, 20])
    given = {name: RouterContext(logit_bias=to_first) for name in ("one.router", "two.router")}
    passed = RouterContext(logit_bias=to_last, step=3)
    with given_context(model, given), recorded_routings(model) as calls:
        model(x, passed)
    assert [routing.ids[0].tolist() for _, routing in calls] == [[3, 2], [0, 1]]


@pytest.mark.parametrize("root", (True, False))
@pytest.mark.parametrize("make", (
    lambda block: MoDBlock(block, DepthRouter(8, 0.5)),
    lambda block: RecursiveStack([block], 2, 8),
), ids=("mod", "mor"))  # fmt: skip
def test_a_block_hands_on_what_is_known_of_its_rows(make, root):
    """Routers within are not given the context of all tokens, but that of the ones that enter."""
    moe = MoELayer(ModalityRouter([ExpertChoiceRouter(8, 2) for _ in range(2)]), GluExperts(4, 8, 6))
    layer, x, modality = make(PackedBlock(8, 2, moe)), torch.randn(2, 6, 8), torch.arange(12) % 2
    model = layer if root else nn.ModuleDict({"layer": layer, "after": TopKRouter(8, 4, 2)})
    with recorded_routings(layer) as calls:
        expected = layer(x, RouterContext(modality=modality))[0]
    seen = []
    for context in (
        RouterContext(modality=modality),
        lambda x: seen.append(x.shape) or RouterContext(modality=modality),
    ):
        with given_context(model, context), recorded_routings(layer) as got:
            assert torch.equal(layer(x)[0], expected)
            assert torch.equal(layer(x, None)[0], expected)
        assert [name for name, _ in got] == 2 * [name for name, _ in calls]
    assert seen == [(12, 8)] * 2


def test_given_context_of_a_call():
    model, x = Model(), torch.randn(5, 8)

    def to_the_middle(x):
        return RouterContext(logit_bias=torch.tensor([0.0, 9, 5, 0]).expand(len(x), 4))

    with given_context(model, {"two.router": to_the_middle}), recorded_routings(model) as calls:
        model(x)
    assert calls[1][1].ids.tolist() == [[1, 2]] * 5


def test_linked_routers_hand_on_routings_in_every_forward():
    model, x, states = Model(), torch.randn(5, 8), []

    class Seeing(TopKRouter):
        def forward(self, x, context=None):
            states.append(context.previous)
            return super().forward(x, context)

    model.one.router, model.two.router = Seeing(8, 4, 2), Seeing(8, 4, 2)
    with linked_routers(model), recorded_routings(model) as calls:
        for _ in range(2):
            model(x)
    assert states[0] is None and states[2] is None
    assert states[1] is calls[0][1] and states[3] is calls[2][1]


def test_linked_routers_under_checkpointing():
    """A layer that runs again has the state that it had."""
    state = RecurrentState(6)
    model = nn.ModuleList(
        MoELayer(RecurrentRouter(8, 4, 2, state, first=i == 0), GluExperts(4, 8, 6)) for i in range(3)
    )
    for parameter in (*state.parameters(), *(p for layer in model for p in layer.router.parameters())):
        nn.init.normal_(parameter, std=0.5)
    x, wanted = torch.randn(7, 8), [*state.parameters(), *model.parameters()]

    def grads(run):
        y = x
        with linked_routers(model):
            for layer in model:
                y = y + run(layer, y)
            return torch.autograd.grad(y.square().sum(), wanted)

    again = grads(lambda layer, y: checkpoint(layer, y, use_reentrant=False))
    for plain, got in zip(grads(lambda layer, y: layer(y)), again, strict=True):
        torch.testing.assert_close(got, plain)


def test_continued_routers_hand_on_states():
    layer, x = SimilarityRouter(8, 4, 2, causal=True), torch.randn(6, 8)
    whole = layer(x)
    for _ in range(2):  # what is inside begins anew each time
        with continued_routers(layer):
            steps = [layer(x[:4]), layer(x[4:5]), layer(x[5:])]
        torch.testing.assert_close(torch.cat([step.logits for step in steps]), whole.logits)


def test_what_is_given_and_heard_reaches_a_model_that_was_compiled_before():
    torch._dynamo.reset()
    model, x = Model(), torch.randn(5, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    plain = compiled(x)
    assert torch.equal(plain, model(x))
    for _ in range(12):  # more often than a function may be compiled again
        bias = 3 * torch.randn(4)
        for context in (RouterContext(logit_bias=bias), lambda x, bias=bias: RouterContext(logit_bias=bias)):
            with given_context(model, context), linked_routers(model), recorded_routings(compiled) as calls:
                assert torch.equal(compiled(x), model(x)) and not torch.equal(model(x), plain)
            assert len(calls) == 6 and torch.equal(calls[0][1].logits, calls[2][1].logits)
    assert torch.equal(compiled(x), plain)


def test_what_is_heard():
    model, x, seen = Model(), torch.randn(2, 8), []
    routers, context = {"first": model.one.router}, RouterContext(step=3)
    with heard(routers, lambda *call: seen.append(call)), given_context(model, RouterContext(logit_bias=torch.ones(4))):
        model(x, context)
    model(x)
    ((name, rows, full, routing),) = seen
    assert name == "first" and rows.shape == (2, 8) and full.step == 3 and full.logit_bias.sum() == 4
    assert torch.equal(routing.logits, model.one.router(x).logits + 1)
    assert model.one.router.given == model.one.router.hears == ()


def test_errors():
    message = "context must name routers of the model, one.router, two.router, got three"
    with pytest.raises(ValueError, match=message), given_context(Model(), {"three": RouterContext()}):
        pass
