import numpy as np
import pytest

from moert.placement import replicate
from moert.placement.replicas import rank_totals


def held(expert_to_rank, num_ranks, copies):
    found = np.zeros((len(expert_to_rank), num_ranks), dtype=bool)
    found[np.arange(len(expert_to_rank)), expert_to_rank] = True
    for expert, rank in copies:
        assert not found[expert, rank]
        found[expert, rank] = True
    return found


def test_totals_are_equal_parts():
    everyone = held([0, 1, 1], 3, [(0, 2)])
    assert rank_totals(np.array([10.0, 3, 4]), everyone).tolist() == [5, 7, 5]


def test_the_first_copy_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(30):
        loads, place = rng.zipf(1.5, 6).astype(float), np.array([0, 0, 1, 1, 2, 2])
        every = [
            (rank_totals(loads, held(place, 3, [(e, r)])).max(), (e, r))
            for e in range(6)
            for r in range(3)
            if r != place[e]
        ]
        before = rank_totals(loads, held(place, 3, [])).max()
        copies = replicate(loads, place, 3, 1)
        after = rank_totals(loads, held(place, 3, copies[:1])).max() if copies else before
        assert after == min(before, min(every)[0])


def test_a_hot_expert_is_spread():
    loads, place = np.array([90.0, 10, 10, 10]), np.arange(4)
    copies = replicate(loads, place, 4, 1)
    assert {expert for expert, _ in copies} == {0} and len(copies) == 3
    assert rank_totals(loads, held(place, 4, copies)).tolist() == [22.5, 32.5, 32.5, 32.5]
    assert replicate(loads, place, 4, 0) == () and replicate(np.ones(4), place, 4, 2) == ()
    assert replicate(np.zeros(4), place, 4, 2) == ()


def test_budget_and_errors():
    copies = replicate(np.random.default_rng(1).zipf(1.3, 16).astype(float), np.arange(16) % 4, 4, 2)
    assert max(np.bincount([rank for _, rank in copies])) <= 2 and len(set(copies)) == len(copies)
    with pytest.raises(ValueError, match="extra must be at least 0, got -1"):
        replicate(np.ones(2), np.arange(2), 2, -1)
