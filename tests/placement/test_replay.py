import numpy as np
import pytest

from analysis.traces import layer, random_trace
from moert.analysis import RoutingTrace
from moert.placement import ExpertPlacement, PlacedLayer, Topology, contiguous, replay, round_robin


def test_figures_are_those_of_a_loop():
    trace, topology = random_trace(layers=2, k=2, calls=(20, 40)), Topology(4, 2)
    found = replay(trace, round_robin(trace, 4), topology)
    cost, total = topology.row_cost(), np.zeros((4, 4), int)
    between = np.zeros((4, 4))
    for i, recorded in enumerate(trace.layers):
        moved, loads = np.zeros((4, 4), int), np.zeros((2, 4), int)
        for t, ids in enumerate(recorded.ids):
            home = t * 4 // 20 if t < 20 else (t - 20) * 4 // 40
            for rank in {e % 4 for e in ids if e >= 0}:
                moved[home, rank] += 1
            for e in ids[ids >= 0]:
                loads[int(t >= 20), e % 4] += 1
        total += moved
        assert found.home[i] == (moved * cost).max()
        assert found.imbalance[i] == pytest.approx(loads.sum(0).max() / loads.sum(0).mean())
        assert found.p95[i] == pytest.approx(np.percentile(loads.max(1) / loads.mean(1), 95))
    for one, two in zip(trace.layers[0].ids, trace.layers[1].ids, strict=True):
        for e in one[one >= 0]:
            for f in two[two >= 0]:
                between[e % 4, f % 4] += 1 / 2
    assert found.resident.tolist() == [(between * cost).max()]
    assert np.array_equal(found.rows, total) and found.remote == pytest.approx(1 - np.trace(total) / total.sum())


def test_one_rank_has_nothing_to_send():
    trace = random_trace()
    found = replay(trace, contiguous(trace, 1), Topology(1))
    assert found.figures() == {"imbalance": 1, "imbalance_p95": 1, "home": 0, "resident": 0, "remote": 0}


def test_no_tokens():
    trace = random_trace(T=0, calls=())
    figures = replay(trace, contiguous(trace, 2), Topology(2)).figures()
    assert figures == {"imbalance": 1, "imbalance_p95": 1, "home": 0, "resident": 0, "remote": 0}


def test_a_copy_at_home_stays_there():
    recorded = layer(np.zeros((8, 1)), 2)
    placed = PlacedLayer("a", np.array([0, 1]), ((0, 1),))
    found = replay(RoutingTrace((recorded,)), ExpertPlacement(2, (placed,)), Topology(2))
    assert found.rows.tolist() == [[4, 0], [0, 4]] and found.imbalance.tolist() == [1.0] and found.remote == 0


def test_a_placement_that_does_not_fit():
    trace = random_trace(layers=2)
    with pytest.raises(ValueError, match="placement must have 4 ranks, got 2"):
        replay(trace, contiguous(trace, 2), Topology(4))
    other = contiguous(random_trace(layers=2, E=7), 2)
    with pytest.raises(ValueError, match=r"placement must fit the trace, got \('layers.0', 7\) for \('layers.0', 8\)"):
        replay(trace, other, Topology(2))
    with pytest.raises(ValueError, match="placement must fit the trace, got 3 layers for 2"):
        replay(trace, contiguous(random_trace(layers=3), 2), Topology(2))
