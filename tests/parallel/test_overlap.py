"""In which order an ExpertParallel sends, computes and waits."""

import importlib

import pytest
import torch
from tests.parallel.test_expert_parallel import H, layer

from moert.parallel import shard_experts_
from ranks import ranks


def watched(model) -> list[str]:
    """Events of the model from now on: an exchange begun, one waited for, experts and shared experts at work."""
    modules = [importlib.import_module(f"moert.ops.{name}") for name in ("all_to_all", "dispatch")]
    events, real = [], modules[0].Sending

    class Watched(real):
        def __init__(self, *args):
            super().__init__(*args)
            events.append("send")

        def wait(self):
            if self._work is not None:  # a second wait waits for nothing
                events.append("wait")
            return super().wait()

    for module in modules:
        module.Sending = Watched
    model.experts.local.register_forward_hook(lambda *_: events.append("experts"))
    model.experts.local.register_full_backward_hook(lambda *_: events.append("experts"))
    if model.shared_experts is not None:
        model.shared_experts.register_forward_hook(lambda *_: events.append("shared"))
    return events


def backward() -> list[str]:
    model = shard_experts_(layer(shared=False), degree=3)
    events = watched(model)
    y = model(torch.randn(6, H, requires_grad=True))
    events.clear()
    y.sum().backward()
    return events


def test_backward_overlaps():
    """Results' gradients set out together; experts work while rows' gradients of the next part go home."""
    results, rows = ["send"] * 3 + ["wait", "experts", "send"], ["wait", "experts", "send", "wait"]
    assert ranks(2, backward) == [results + rows + rows + ["wait"]] * 2


def forward(degree: int, shared: bool) -> list[str]:
    model = shard_experts_(layer(shared=shared), degree=degree)
    events = watched(model)
    with torch.no_grad():
        model(torch.randn(8, H))
    return events


@pytest.mark.parametrize("degree", [2, 4])
def test_forward_overlaps(degree):
    """A part's rows set out before the experts work on the one before, whose results travel while they go on."""
    each, last = ["send", "wait", "experts", "send"], ["wait", "experts", "send"]
    expected = ["send"] + each * (degree - 1) + last + ["wait"] * degree
    assert ranks(2, forward, degree, False) == [expected] * 2


def test_shared_experts_compute_while_rows_travel():
    assert ranks(2, forward, 1, True) == [["send", "shared", "wait", "experts", "send"]] * 2  # the last at once
