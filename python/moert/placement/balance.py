"""Balanced clusters of a layer's experts: MoETuner's first integer program.  Letters: E experts, G clusters.

arXiv:2502.06643: minimise the sum over clusters of |load - mean load|.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

from moert.placement.milp import Program, solve

OBJECTIVES = ("deviation", "max")
SLOTS = ("equal", "any")


@dataclass(frozen=True)
class Clusters:
    """cluster_of int64 [E]; value of the objective, and the share by which an optimum could be below it at most.

    mean is the mean load of a cluster.
    """

    cluster_of: np.ndarray
    value: float
    gap: float
    mean: float


def cluster_experts(
    loads: np.ndarray,
    num_clusters: int,
    slots: str = "equal",
    objective: str = "deviation",
    time_limit: float = 20.0,
    gap: float = 0.025,
) -> Clusters:
    """loads [E] -> clusters of them; "equal" slots are E/G of each (floor or ceil), "any" at least one.

    "deviation" sums |load - mean|, "max" is the largest load.  The search ends where an optimum could be better by no
    more than gap of the value or of the mean load, or at time_limit seconds: never worse than what a greedy search
    found, and the gap to an optimum is stated.
    """
    loads = _checked(loads, num_clusters, slots, objective)
    E, G = len(loads), num_clusters
    mean = loads.sum() / G
    program = Program(
        cost=np.r_[np.zeros(G * E), np.ones(G if objective == "deviation" else 1)],
        high=np.r_[np.ones(G * E), np.full(G if objective == "deviation" else 1, np.inf)],
        integer=np.arange(G * E + (G if objective == "deviation" else 1)) < G * E,
    )
    x = np.arange(G * E).reshape(G, E)  # x[c, e]: expert e is in cluster c
    for e in range(E):
        program.add(x[:, e], 1.0, 1.0, 1.0)
    fewest, most = slot_bounds(E, G, slots)
    for c in range(G):
        program.add(x[c], 1.0, fewest, most)
        if objective == "deviation":
            program.add([*x[c], G * E + c], [*loads, -1.0], -np.inf, mean)
            program.add([*x[c], G * E + c], [*loads, 1.0], mean, np.inf)
        else:
            program.add([*x[c], G * E], [*loads, -1.0], -np.inf, 0.0)
    greedy = greedy_clusters(loads, G, slots, objective)
    start = np.zeros(len(program.cost))
    start[x[greedy, np.arange(E)]] = 1.0
    totals = np.bincount(greedy, weights=loads, minlength=G)
    start[G * E :] = np.abs(totals - mean) if objective == "deviation" else totals.max()
    found = solve(program, start, time_limit, gap, gap * mean)
    cluster_of = found.x[: G * E].reshape(G, E).argmax(0)
    return Clusters(cluster_of, value_of(loads, cluster_of, G, objective), found.gap, float(mean))


def cluster_experts_ref(loads, num_clusters: int, slots: str = "equal", objective: str = "deviation") -> float:
    """The smallest value, by trying every assignment."""
    loads = _checked(loads, num_clusters, slots, objective)
    fewest, most = slot_bounds(len(loads), num_clusters, slots)
    best = np.inf
    for clusters in product(range(num_clusters), repeat=len(loads)):
        counts = [clusters.count(c) for c in range(num_clusters)]
        if fewest <= min(counts) and max(counts) <= most:
            totals = [sum(loads[e] for e, d in enumerate(clusters) if d == c) for c in range(num_clusters)]
            mean = sum(totals) / num_clusters
            best = min(best, max(totals) if objective == "max" else sum(abs(total - mean) for total in totals))
    return float(best)


def value_of(loads: np.ndarray, cluster_of: np.ndarray, num_clusters: int, objective: str) -> float:
    totals = np.bincount(cluster_of, weights=loads, minlength=num_clusters)
    return float(totals.max() if objective == "max" else np.abs(totals - loads.sum() / num_clusters).sum())


def slot_bounds(num_experts: int, num_clusters: int, slots: str) -> tuple[int, int]:
    """The fewest and the most experts that a cluster may have."""
    if slots == "any":
        return 1, num_experts
    return num_experts // num_clusters, -(-num_experts // num_clusters)


def greedy_clusters(loads: np.ndarray, num_clusters: int, slots: str, objective: str) -> np.ndarray:
    """Heaviest first to the lightest cluster that has room, then the best swap of two experts until none helps."""
    E, G = len(loads), num_clusters
    order = np.argsort(-loads, kind="stable")
    cluster_of, totals, counts = np.zeros(E, dtype=np.int64), np.zeros(G), np.zeros(G, dtype=np.int64)
    _, most = slot_bounds(E, G, slots)
    larger = E - G * (E // G) if slots == "equal" else E  # so many clusters may have the ceil
    for place, e in enumerate(order):
        left = E - place
        room = counts < most
        if slots == "equal" and larger == 0 and E % G:
            room = counts < E // G
        if (counts == 0).sum() >= left:  # the last experts go where there is none yet
            room = counts == 0
        c = int(np.flatnonzero(room)[totals[room].argmin()])
        cluster_of[e], totals[c], counts[c] = c, totals[c] + loads[e], counts[c] + 1
        if slots == "equal" and E % G and counts[c] == most:
            larger -= 1
    return _swapped(loads, cluster_of, G, objective)


def _swapped(loads: np.ndarray, cluster_of: np.ndarray, num_clusters: int, objective: str) -> np.ndarray:
    mean = loads.sum() / num_clusters
    for _ in range(10 * len(loads)):
        totals = np.bincount(cluster_of, weights=loads, minlength=num_clusters)
        here = totals[cluster_of]
        move = loads[None, :] - loads[:, None]  # what e's cluster gains when e goes for f
        if objective == "max":
            change = np.maximum(here[:, None] + move, here[None, :] - move) - np.maximum(here[:, None], here[None, :])
            change = np.where(np.maximum(here[:, None], here[None, :]) < totals.max(), 0.0, change)
        else:
            away = np.abs(here - mean)
            change = np.abs(here[:, None] + move - mean) + np.abs(here[None, :] - move - mean) - away[:, None] - away
        change = np.where(cluster_of[:, None] == cluster_of, 0.0, change)
        e, f = np.unravel_index(change.argmin(), change.shape)
        if change[e, f] > -1e-9 * max(mean, 1.0):
            break
        cluster_of[[e, f]] = cluster_of[[f, e]]
    return cluster_of


def _checked(loads, num_clusters: int, slots: str, objective: str) -> np.ndarray:
    loads = np.asarray(loads, dtype=float)
    if loads.ndim != 1 or not np.isfinite(loads).all() or (loads < 0).any():
        raise ValueError(f"loads must be finite numbers [E] of at least 0, got {loads.tolist()}")
    if not 1 <= num_clusters <= len(loads):
        raise ValueError(f"num_clusters must be in [1, E={len(loads)}], got {num_clusters}")
    if slots not in SLOTS:
        raise ValueError(f"slots must be one of {', '.join(SLOTS)}, got {slots}")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective}")
    return loads
