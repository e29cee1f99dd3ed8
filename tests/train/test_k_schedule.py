import math

import pytest
from torch import nn

from moert import TopKRouter
from moert.routers import FrozenRandomRouter
from moert.train import KSchedule, set_active_experts
from moert.train.k_schedule import MODES


def model(E=16):
    return nn.Sequential(FrozenRandomRouter(4, E, 1), TopKRouter(4, E, 2))


def test_linear_table():
    schedule = KSchedule(model(), 8, 16, 800)
    assert [schedule.k_at(s) for s in (0, 50, 400, 800, 900)] == [8, 9, 12, 16, 16]
    ks = [schedule.k_at(s) for s in range(801)]
    assert ks == sorted(ks)


def direct(mode, s, S, low, high):
    """The formulas of the released code."""
    if mode == "linear_increase":
        return (high - low) * s / S + low
    if mode == "linear_decrease":
        return (low - high) * s / S + high
    if mode == "cosine_increase":
        return (low - high) * math.cos(math.pi * s / (2 * S)) + high
    if mode == "cosine_decrease":
        return (high - low) * math.cos(math.pi * s / (2 * S)) + low
    if mode == "exp_increase":
        return (low - high) * 0.99 ** (s * 300 // S) + high
    ladder = [1, 2, 4, 8, 16, 16]
    ladder = ladder if mode == "multi_step_increase" else [16, 8, 4, 2, 1, 1]
    return ladder[5 * s // S]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode):
    schedule = KSchedule(model(), 2, 16, 1000, mode)
    for s in range(0, 1001, 100):
        k = math.floor(direct(mode, s, 1000, 2, 16) + 0.5)
        assert schedule.k_at(s) == min(max(k, 2), 16)
    assert {schedule.k_at(s) for s in range(1000, 5001, 500)} == {schedule.k_at(1000)}


def test_step_sets_every_router():
    net = model()
    schedule = KSchedule(net, 2, 4, 4)
    assert [schedule.step() for _ in range(6)] == [3, 3, 4, 4, 4, 4]
    assert [router.k for router in net] == [4, 4]
    other = KSchedule(model(), 2, 4, 4)
    other.load_state_dict({"steps": 1})
    assert other.model[0].k == 3 and other.state_dict() == {"steps": 1}
    assert KSchedule(model(), 2, 7, 0).model[0].k == 7


def test_no_step_within_a_step():
    schedule = KSchedule(model(), 2, 4, 4)
    with (
        schedule.accumulating(),
        pytest.raises(RuntimeError, match=r"step\(\) must be called outside accumulating\(\)"),
    ):
        schedule.step()
    assert schedule.step() == 3


def test_set_active_experts():
    net = model()
    assert set_active_experts(net, 5) == 2 and [router.k for router in net] == [5, 5]


@pytest.mark.parametrize(
    "args,message",
    [
        ((0, 4, 10), r"k_min must be in \[1, k_max=4\], got 0"),
        ((5, 4, 10), r"k_min must be in \[1, k_max=4\], got 5"),
        ((2, 17, 10), r"k must be in \[1, 16\], got 17"),
        ((2, 4, -1), "total_steps must not be negative, got -1"),
        ((2, 4, 10, "sine"), "mode must be one of linear_increase, .*, got sine"),
    ],
)
def test_errors(args, message):
    with pytest.raises(ValueError, match=message):
        KSchedule(model(), *args)
    with pytest.raises(ValueError, match="model must have a router with a k, got none"):
        set_active_experts(nn.Linear(2, 2), 1)
