import numpy as np
import pytest

from analysis.traces import layer, random_trace
from moert.analysis import RoutingTrace
from moert.placement import Topology, moetuner_placement, replay
from moert.placement.affinity import objective
from moert.placement.moetuner import cluster_flows


def test_what_the_programs_minimise_is_what_the_replay_sees():
    trace, topology = random_trace(layers=4, calls=(60,)), Topology(4, 2)
    told = []
    tuned = moetuner_placement(trace, topology, told=told.append)
    assert told == ["layers.0", "layers.1", "layers.2", "layers.3", "assignment"]
    seen = replay(trace, tuned.placement, topology)
    flows = cluster_flows(trace, list(tuned.clusters), 4)
    slowest = objective(flows, topology.row_cost(), tuned.assignment.rank_of)
    remote = sum(
        (flow * topology.row_cost()[a[:, None], b]).sum()
        for flow, a, b in zip(flows, tuned.assignment.rank_of, tuned.assignment.rank_of[1:], strict=False)
    )
    assert seen.resident.sum() + 1e-3 * remote == pytest.approx(slowest) == pytest.approx(tuned.assignment.value)
    for placed, recorded, clusters in zip(tuned.placement.layers, trace.layers, tuned.clusters, strict=True):
        loads = np.bincount(placed.expert_to_rank, weights=recorded.loads(), minlength=4)
        assert np.abs(loads - loads.mean()).sum() == pytest.approx(clusters.value)
        assert np.bincount(placed.expert_to_rank).tolist() == [2] * 4 and placed.replicas == ()


def test_planted_affinity_is_found():
    """Expert e of a layer is followed by expert order[e] of the next: nothing has to travel."""
    rng = np.random.default_rng(0)
    ids, layers = np.tile(np.arange(8), 40)[:, None], []
    for i in range(4):
        layers.append(layer(ids, 8, name=str(i)))
        ids = rng.permutation(8)[ids]
    trace = RoutingTrace(tuple(layers))
    tuned = moetuner_placement(trace, Topology(4), slots="equal")
    assert max(replay(trace, tuned.placement, Topology(4)).imbalance) == 1.0
    assert tuned.assignment.gap == 0.0


def test_copies_of_hot_experts():
    ids = np.where(np.arange(400) % 2 == 0, 0, np.arange(400) % 8)[:, None]
    trace, topology = RoutingTrace((layer(ids, 8),)), Topology(4)
    without = replay(trace, moetuner_placement(trace, topology).placement, topology)
    tuned = moetuner_placement(trace, topology, extra=1)
    (placed,) = tuned.placement.layers
    assert {expert for expert, _ in placed.replicas} == {0}
    assert replay(trace, tuned.placement, topology).imbalance[0] < without.imbalance[0] == pytest.approx(2.0, abs=0.3)


def test_errors():
    with pytest.raises(ValueError, match="trace must have layers, got none"):
        moetuner_placement(RoutingTrace(()), Topology(2))
    with pytest.raises(ValueError, match=r"num_clusters must be in \[1, E=8\], got 9"):
        moetuner_placement(random_trace(), Topology(9))
