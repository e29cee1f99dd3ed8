import dataclasses

import pytest
import torch

from moert import Activation, DispatchPlan, ExpertLayout, Routing


@pytest.mark.parametrize(
    "value", [Routing(None, None, 4), DispatchPlan(None, None, None), Activation(), ExpertLayout()]
)
def test_values_are_frozen(value):
    field = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, None)


def test_routings_do_not_share_their_losses():
    a, b = (Routing(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1), 2) for _ in range(2))
    a.losses["balance"] = torch.ones(())
    assert b.losses == {}


@pytest.mark.parametrize("name,gated", [("swiglu", True), ("reglu", True), ("swiglu_oai", True), ("relu2", False)])
def test_gated_activations(name, gated):
    assert Activation(name).gated == gated


def test_unknown_activation():
    with pytest.raises(ValueError, match=r"activation must be one of swiglu, geglu, .*identity, got swish"):
        Activation("swish")


def test_members():
    ids = torch.tensor([[2, 0], [3, -1], [1, 1]])
    routing = Routing(ids, torch.zeros(3, 2), 3)
    assert routing.members().tolist() == [[True, False, True], [False] * 3, [False, True, False]]
    assert Routing(ids[:0], torch.zeros(0, 2), 3).members().shape == (0, 3)


def test_dense_weights():
    ids = torch.tensor([[2, 0], [3, -1], [1, 1]])
    weights = torch.tensor([[0.5, 0.25], [9.0, 8.0], [1.0, 2.0]], requires_grad=True)
    dense = Routing(ids, weights, 3).dense_weights()
    assert dense.tolist() == [[0.25, 0, 0.5], [0, 0, 0], [0, 3, 0]]
    dense.sum().backward()
    assert weights.grad.tolist() == [[1, 1], [0, 0], [1, 1]]
    assert Routing(ids[:0], weights[:0], 3).dense_weights().shape == (0, 3)
