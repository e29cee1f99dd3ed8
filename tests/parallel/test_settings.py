import math
from typing import NamedTuple

import pytest

from moert.parallel.settings import DEGREES, Setting, SettingsCache

S = 64  # slices of each expert: one expert on 64 ranks
RS = (0, 1, 2, 4, 8, 16, 32, 64)
H, I = 1024, 4096


class Machine(NamedTuple):
    latency: float  # seconds a message
    bandwidth: float  # bytes a second
    flops: float


# bench/results/links.json and docs/performance.md: Gloo over loopback, a core a rank.
MEASURED = Machine(2.14e-4, 1 / 6.37e-10, 9e10)
FAST = Machine(1e-6, 5e10, 2e13)  # an assumption


def seconds(tokens: int, setting: Setting, machine: Machine) -> float:
    """Of a forward with so many tokens a rank: parameters and tokens over links of a latency and a bandwidth.

    Tutel's volumes: all parameters for r = 0, else those of S / r slices, and each token r times there and back.  The
    part of the exchange that the experts' work can hide is that of the parts before the last.
    """
    (r, degree, levels), (latency, bandwidth, flops) = setting, machine
    weights = 3 * H * I * 2  # bytes of the expert
    gathered = weights if r == 0 else weights / r
    gather = (S if r == 0 else S / r) * latency + gathered / bandwidth if gathered > weights / S else 0.0
    work = 6 * tokens * H * I / flops
    if r == 0:
        return gather + work
    messages = S if levels == 1 else 2 * math.isqrt(S)
    exchange = 2 * (degree * messages * latency + levels * tokens * r * H * 2 / bandwidth)
    hidden = min(work, exchange) * (1 - 1 / degree)
    return gather + work + exchange - hidden


def learn(cache: SettingsCache, size: int, cost) -> list[Setting]:
    tried = []
    while not cache.knows(size):
        tried.append(cache.choose(size))
        assert len(tried) <= 200
        cache.record(size, cost(tried[-1]))
    return tried


def test_within_5_percent_of_exhaustive_search():
    """30 loads and links, each searched among all r, degrees and levels."""
    found = set()
    for tokens in (16, 128, 1024, 8192, 65536):
        for latency in (2e-6, 5e-5):
            for bandwidth in (1e8, 5e9, 1e11):
                cache, machine = SettingsCache(RS, DEGREES, (1, 2)), Machine(latency, bandwidth, 2e13)

                def cost(setting, machine=machine, tokens=tokens):
                    return seconds(tokens, setting, machine)

                tried = learn(cache, tokens, cost)
                every = [Setting(r, degree, levels) for r in RS for degree in DEGREES for levels in (1, 2)]
                assert cost(cache.choose(tokens)) <= 1.05 * min(map(cost, every))
                assert len(tried) == len(set(tried)) <= min((math.log(S, 1.5) + 2) * 4 * 2, len(every) - 1)
                found.add(cache.choose(tokens))
    assert len(found) >= 5  # it is not one answer for all


@pytest.mark.parametrize(("machine", "kinds"), [(MEASURED, 2), (FAST, 4)])
def test_fewer_slices_travel_to_as_tokens_grow(machine, kinds):
    """Few tokens travel to all slices, then to fewer of them; to many the parameters travel."""
    best = []
    for tokens in (2**n for n in range(21)):
        cache = SettingsCache(RS)
        learn(cache, tokens, lambda setting, tokens=tokens: seconds(tokens, setting, machine))
        best.append(cache.choose(tokens).r)
    assert best == sorted(best, reverse=True)
    assert best[0] == S and best[-1] == 0 and len(set(best)) >= kinds


def test_any_convex_cost_is_searched_to_its_minimum():
    for length in range(1, 12):
        rs = (0, *(2**n for n in range(length)))
        for lowest in range(length):
            costs = {r: (abs(n - lowest) + 0.1 * n) for n, r in enumerate(rs[1:])} | {0: 100.0}
            cache = SettingsCache(rs, (1,))
            learn(cache, 0, lambda setting, costs=costs: costs[setting.r])
            assert costs[cache.choose(0).r] == min(costs.values())
        ends = SettingsCache(rs, (1,))
        learn(ends, 0, lambda setting: float(setting.r))
        assert ends.choose(0).r == 0


def test_each_load_has_its_own():
    cache = SettingsCache((0, 1), (1, 2), window=10)
    assert learn(cache, 9, lambda setting: setting.degree) == [(0, 1, 1), (1, 1, 1), (1, 2, 1)]
    assert cache.best == {0: Setting(0, 1, 1)} and cache.knows(0) and not cache.knows(10)
    # What is not recorded is tried again; searches of two loads do not mix.
    assert cache.choose(10) == cache.choose(19) == Setting(0, 1) == cache.choose(25)
    cache.record(12, 2.0)
    assert cache.choose(10) == Setting(1, 1) and cache.choose(25) == Setting(0, 1)
    learn(cache, 10, lambda setting: 1 / setting.degree)
    assert cache.best == {0: Setting(0, 1), 1: Setting(1, 2)}


def test_errors():
    for window in (0, 1.5):
        with pytest.raises(ValueError, match=f"window must be a whole number of at least 1, got {window}"):
            SettingsCache((0, 1), window=window)
