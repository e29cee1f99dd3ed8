import pytest
import torch
from torch import nn

from moert import GluExperts, MoELayer, RouterContext, TopKRouter
from moert.routers import given_context, recorded_routings, routers_in


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


def test_recorded_routings():
    model, x = Model(), torch.randn(5, 8)
    with recorded_routings(model) as calls:
        model(x)
        model.two(x)
    model(x)
    assert [name for name, _ in calls] == ["one.router", "two.router", "two.router"]
    assert torch.equal(calls[0][1].ids, model.one.router(x).ids)


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


def test_given_context_of_a_call():
    model, x = Model(), torch.randn(5, 8)

    def to_the_middle(x):
        return RouterContext(logit_bias=torch.tensor([0.0, 9, 5, 0]).expand(len(x), 4))

    with given_context(model, {"two.router": to_the_middle}), recorded_routings(model) as calls:
        model(x)
    assert calls[1][1].ids.tolist() == [[1, 2]] * 5


def test_errors():
    message = "context must name routers of the model, one.router, two.router, got three"
    with pytest.raises(ValueError, match=message), given_context(Model(), {"three": RouterContext()}):
        pass
