"""Which rank holds which expert: decided from a trace of routing, judged by replaying one, kept in a file."""

from moert.placement.affinity import assign_clusters
from moert.placement.balance import cluster_experts
from moert.placement.expert_placement import ExpertPlacement, PlacedLayer, contiguous, round_robin
from moert.placement.moetuner import moetuner_placement
from moert.placement.replay import replay
from moert.placement.replicas import replicate
from moert.placement.topology import Topology

__all__ = [
    "ExpertPlacement",
    "PlacedLayer",
    "Topology",
    "assign_clusters",
    "cluster_experts",
    "contiguous",
    "moetuner_placement",
    "replay",
    "replicate",
    "round_robin",
]
