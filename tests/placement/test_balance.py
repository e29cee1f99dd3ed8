import numpy as np
import pytest

from moert.placement import cluster_experts
from moert.placement.balance import cluster_experts_ref, greedy_clusters, slot_bounds, value_of


@pytest.mark.parametrize("objective", ["deviation", "max"])
@pytest.mark.parametrize("slots", ["equal", "any"])
@pytest.mark.parametrize("E,G", [(8, 4), (7, 3), (6, 1), (5, 5), (6, 4)], ids=lambda n: str(n))
def test_optimum_is_that_of_every_assignment(E, G, slots, objective):
    rng = np.random.default_rng(E * G)
    for loads in (rng.integers(0, 100, E), np.zeros(E, int), np.r_[1000, rng.integers(0, 9, E - 1)]):
        found = cluster_experts(loads, G, slots, objective, gap=0.0)
        assert found.value == pytest.approx(cluster_experts_ref(loads, G, slots, objective)) and found.gap == 0.0
        assert found.value == value_of(loads, found.cluster_of, G, objective)
        counts = np.bincount(found.cluster_of, minlength=G)
        fewest, most = slot_bounds(E, G, slots)
        assert fewest <= counts.min() and counts.max() <= most


@pytest.mark.parametrize("slots", ["equal", "any"])
def test_greedy_keeps_the_slots(slots):
    rng = np.random.default_rng(0)
    for _ in range(100):
        E = int(rng.integers(1, 20))
        G = int(rng.integers(1, E + 1))
        loads = rng.zipf(1.5, E).astype(float)
        for objective in ("deviation", "max"):
            counts = np.bincount(greedy_clusters(loads, G, slots, objective), minlength=G)
            fewest, most = slot_bounds(E, G, slots)
            assert fewest <= counts.min() and counts.max() <= most


def test_without_time_greedy_is_the_answer_at_worst():
    loads = np.random.default_rng(1).zipf(1.3, 96).clip(max=10**5).astype(float)
    found = cluster_experts(loads, 16, time_limit=1e-6)
    greedy = value_of(loads, greedy_clusters(loads, 16, "equal", "deviation"), 16, "deviation")
    assert found.value <= greedy and found.gap > 0
    assert np.bincount(found.cluster_of).tolist() == [6] * 16


def test_the_search_ends_where_loads_are_even_enough():
    loads = (np.random.default_rng(0).dirichlet(np.full(256, 3.0)) * 1e5).round()
    found = cluster_experts(loads, 32)  # would search for 20 s, the bound being 0
    assert found.value <= 0.025 * found.mean and found.mean == loads.sum() / 32


@pytest.mark.parametrize("num_experts", [8, 16])
def test_rows_not_used_to_decide_are_balanced_too(num_experts):
    rng = np.random.default_rng(2)
    popular = np.sort(rng.dirichlet(np.full(num_experts, 30.0)))
    decide, judge = rng.multinomial(20000, popular), rng.multinomial(20000, popular)
    found = cluster_experts(decide, 4)
    totals = np.bincount(found.cluster_of, weights=judge, minlength=4)
    contiguous = judge.reshape(4, -1).sum(1)
    assert found.gap * found.value <= 0.025 * max(found.value, found.mean) and totals.max() / totals.mean() <= 1.15
    assert totals.max() < 0.9 * contiguous.max()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (([1.0, -1.0], 1), "loads must be finite numbers"),
        (([1.0, np.nan], 1), "loads must be finite numbers"),
        (([[1.0]], 1), "loads must be finite numbers"),
        (([1, 2], 3), r"num_clusters must be in \[1, E=2\], got 3"),
        (([1, 2], 0), r"num_clusters must be in \[1, E=2\], got 0"),
        (([1, 2], 2, "some"), "slots must be one of equal, any, got some"),
        (([1, 2], 2, "any", "mean"), "objective must be one of deviation, max, got mean"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        cluster_experts(*arguments)
