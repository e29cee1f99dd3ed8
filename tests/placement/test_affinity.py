import numpy as np
import pytest

from moert.placement import Topology, assign_clusters
from moert.placement.affinity import assign_clusters_ref, objective


def random_flows(L, G, seed=0):
    return np.random.default_rng(seed).integers(0, 100, (L - 1, G, G)).astype(float)


@pytest.mark.parametrize("L,G", [(3, 3), (2, 4), (1, 3), (4, 2), (2, 1)])
def test_exact_methods_are_those_of_every_permutation(L, G):
    for seed, topology in ((0, Topology(G)), (1, Topology(G, 2 if G % 2 == 0 else 1))):
        flows = random_flows(L, G, seed)
        best = assign_clusters_ref(flows, topology.row_cost())
        for method in ("viterbi", "milp", "auto"):
            found = assign_clusters(flows, topology.row_cost(), method, gap=0.0)
            assert found.value == pytest.approx(best) and found.gap == 0.0, method
            assert found.value == pytest.approx(objective(flows, topology.row_cost(), found.rank_of))
            assert np.array_equal(np.sort(found.rank_of), np.tile(np.arange(G), (L, 1)))


def test_costs_of_links_may_differ_by_direction():
    cost = np.array([[0.0, 1, 9], [2, 0, 3], [4, 1, 0]])
    flows = random_flows(3, 3)
    assert assign_clusters(flows, cost, "viterbi").value == pytest.approx(assign_clusters_ref(flows, cost))


def test_local_search_comes_near_on_planted_affinity():
    """Each cluster sends most of its rows to one of the next layer's, so that a chain of ranks is right."""
    rng = np.random.default_rng(3)
    flows = rng.integers(10, 30, (7, 4, 4)).astype(float)
    for flow in flows:
        flow[np.arange(4), rng.permutation(4)] += 200
    cost = Topology(4, 2).row_cost()
    best = assign_clusters(flows, cost, "viterbi").value
    local = assign_clusters(flows, cost, "local")
    assert best <= local.value <= 1.05 * best and local.gap is None
    assert objective(flows, cost, np.tile(np.arange(4), (8, 1))) > 2 * best
    assert best - 1e-9 <= assign_clusters(flows, cost, "milp", time_limit=2).value <= local.value


def test_many_ranks_by_local_search():
    flows = random_flows(3, 8)
    found = assign_clusters(flows, Topology(8, 2).row_cost())
    assert found.gap is None and np.array_equal(np.sort(found.rank_of), np.tile(np.arange(8), (3, 1)))
    assert found.value <= objective(flows, Topology(8, 2).row_cost(), np.tile(np.arange(8), (3, 1)))


def test_errors():
    cost = Topology(3).row_cost()
    with pytest.raises(ValueError, match=r"flows must have shape \[L-1, G, G\] and row_cost \[G, G\], got \[2, 3\]"):
        assign_clusters(np.zeros((2, 3)), cost)
    with pytest.raises(ValueError, match="method must be one of auto, viterbi, milp, local, got best"):
        assign_clusters(random_flows(2, 3), cost, "best")
    with pytest.raises(ValueError, match="method must be another than viterbi above 5 ranks, got 6"):
        assign_clusters(random_flows(2, 6), Topology(6).row_cost(), "viterbi")
    with pytest.raises(
        ValueError, match="method must be another than milp above 2000000 columns, got 16777216 of 64 ranks"
    ):
        assign_clusters(np.ones((1, 64, 64)), Topology(64).row_cost(), "milp")
