import sys

import numpy as np
import pytest

from moert.placement.milp import Program, solve


def knapsack(values, weights, room):
    program = Program(-np.array(values, float), np.ones(len(values)), np.ones(len(values), bool))
    program.add(range(len(values)), weights, -np.inf, room)
    return program


def test_optimum_of_every_subset():
    values, weights = np.array([4, 7, 1, 9, 5]), np.array([3, 4, 1, 6, 2])
    found = solve(knapsack(values, weights, 9), np.zeros(5), 10, 0.0)
    subsets = [np.array([i >> j & 1 for j in range(5)]) for i in range(32)]
    best = max(values @ s for s in subsets if weights @ s <= 9)
    assert found.value == -best and found.gap == 0.0
    assert weights @ found.x <= 9 and values @ found.x == pytest.approx(best)


def test_without_time_the_start_is_kept_and_the_gap_says_what_is_open():
    rng = np.random.default_rng(0)
    values, weights = rng.integers(1, 1000, 60), rng.integers(1, 1000, 60)
    start = (np.arange(60) < 2).astype(float)
    found = solve(knapsack(values, weights, 15000), start, 1e-9, 0.0)
    best = solve(knapsack(values, weights, 15000), start, 10, 0.0)
    assert best.value <= found.value <= -(values @ start)
    assert found.gap == float("inf") or found.value - best.value <= found.gap * abs(found.value) + 1e-6


def test_enough_is_enough():
    values, weights = np.random.default_rng(0).integers(1, 1000, (2, 60))
    start = (np.arange(60) < 2).astype(float)
    best = solve(knapsack(values, weights, 15000), start, 10, 0.0)
    found = solve(knapsack(values, weights, 15000), start, 10, 0.0, enough=1e9)
    assert (
        best.value <= found.value <= -(values @ start) and found.value - best.value <= found.gap * abs(found.value) + 1
    )


def test_nothing_is_printed(capfd):
    solve(knapsack([1], [1], 1), np.zeros(1), 1, 0.0)
    assert capfd.readouterr() == ("", "")


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "highspy", None)
    with pytest.raises(ImportError, match=r"placement needs highspy, got none: pip install 'moert\[place\]'"):
        solve(knapsack([1], [1], 1), np.zeros(1), 1, 0.0)
