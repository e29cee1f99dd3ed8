"""MoETuner (arXiv:2502.06643): balanced clusters in every layer, then neighbouring layers' clusters to ranks."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moert.analysis.trace import RoutingTrace
from moert.placement.affinity import Assignment, assign_clusters
from moert.placement.balance import Clusters, cluster_experts
from moert.placement.expert_placement import ExpertPlacement, PlacedLayer
from moert.placement.replicas import replicate
from moert.placement.topology import Topology


@dataclass(frozen=True)
class Tuned:
    """The placement, and what the two programs said of their results."""

    placement: ExpertPlacement
    clusters: tuple[Clusters, ...]
    assignment: Assignment


def moetuner_placement(
    trace: RoutingTrace,
    topology: Topology,
    slots: str = "equal",
    method: str = "auto",
    time_limit: float = 20.0,
    gap: float = 0.025,
    extra: int = 0,
    told: Callable[[str], None] = lambda what: None,
) -> Tuned:
    """From a trace whose layers saw the same rows; time_limit seconds for each layer and for the assignment.

    extra: copies of hot experts that a rank may hold besides its own in every layer.  told is called once a layer and
    once for the assignment, when it is done.
    """
    if not trace.layers:
        raise ValueError("trace must have layers, got none")
    clusters = []
    for layer in trace.layers:
        clusters.append(cluster_experts(layer.loads(), topology.num_ranks, slots, "deviation", time_limit, gap))
        told(layer.name)
    assigned = assign_clusters(cluster_flows(trace, clusters, topology.num_ranks), topology.row_cost(), method,
                               time_limit, gap)  # fmt: skip
    told("assignment")
    placed = []
    for layer, each, rank_of in zip(trace.layers, clusters, assigned.rank_of, strict=True):
        ranks = rank_of[each.cluster_of]
        placed.append(PlacedLayer(layer.name, ranks, replicate(layer.loads(), ranks, topology.num_ranks, extra)))
    return Tuned(ExpertPlacement(topology.num_ranks, tuple(placed)), tuple(clusters), assigned)


def cluster_flows(trace: RoutingTrace, clusters: list[Clusters], num_clusters: int) -> np.ndarray:
    """float64 [L-1, G, G]: rows between clusters of neighbouring layers; a token's k x k' pairs count as k' rows."""
    flows = np.zeros((len(clusters) - 1, num_clusters, num_clusters))
    for layer, flow in enumerate(flows):
        here, after = (np.eye(num_clusters)[each.cluster_of] for each in clusters[layer : layer + 2])
        flow[:] = here.T @ trace.pairs(layer) @ after / trace.layers[layer].ids.shape[1]
    return flows
