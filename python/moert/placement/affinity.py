"""Clusters of neighbouring layers to ranks: MoETuner's second program (arXiv:2502.06643).  Letters: L layers, G ranks.

For each pair of layers the slowest transfer between two ranks, plus 1e-3 of all remote transfers, which breaks ties.
"""

import math
import time
from dataclasses import dataclass
from itertools import pairwise, permutations, product

import numpy as np

from moert.placement.milp import Program, solve

METHODS = ("auto", "viterbi", "milp", "local")
TIES = 1e-3
_MOST_COLUMNS = 2_000_000  # of the integer program: building it takes longer than any limit on solving it
_MOST_EXACT = 5  # ranks: 120 permutations a layer
_STARTS = 10  # of the local search


@dataclass(frozen=True)
class Assignment:
    """rank_of int64 [L, G]: the rank of each cluster; value of the objective; gap is None where it is not known."""

    rank_of: np.ndarray
    value: float
    gap: float | None


def assign_clusters(
    flows: np.ndarray, row_cost: np.ndarray, method: str = "auto", time_limit: float = 20.0, gap: float = 0.025
) -> Assignment:
    """flows [L-1, G, G], rows from cluster to cluster of the next layer; row_cost [G, G] -> each cluster's rank.

    "viterbi" is exact and takes (G!)^2 a layer; "local" swaps two clusters of a layer until none helps; "milp" solves
    the integer program from there; "auto" is viterbi up to 5 ranks and local above.
    """
    flows, row_cost = np.asarray(flows, dtype=float), np.asarray(row_cost, dtype=float)
    G = len(row_cost)
    if flows.ndim != 3 or flows.shape[1:] != (G, G) or row_cost.shape != (G, G):
        shapes = f"{list(flows.shape)} and {list(row_cost.shape)}"
        raise ValueError(f"flows must have shape [L-1, G, G] and row_cost [G, G], got {shapes}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method}")
    if method == "viterbi" or (method == "auto" and G <= _MOST_EXACT):
        if G > _MOST_EXACT:
            raise ValueError(f"method must be another than viterbi above {_MOST_EXACT} ranks, got {G}")
        return _viterbi(flows, row_cost)
    columns = len(flows) * G**4
    if method == "milp" and columns > _MOST_COLUMNS:
        raise ValueError(f"method must be another than milp above {_MOST_COLUMNS} columns, got {columns} of {G} ranks")
    deadline = time.monotonic() + time_limit
    found = _local(flows, row_cost, time_limit)
    if method != "milp":
        return found
    return _milp(flows, row_cost, found, max(0.1, deadline - time.monotonic()), gap)


def objective(flows: np.ndarray, row_cost: np.ndarray, rank_of: np.ndarray) -> float:
    """What is minimised, of rank_of [L, G]."""
    return float(sum(_pair_cost(*each, row_cost) for each in zip(flows, rank_of[:-1], rank_of[1:], strict=True)))


def assign_clusters_ref(flows: np.ndarray, row_cost: np.ndarray) -> float:
    """The smallest value, by trying every permutation of every layer."""
    G, best = len(row_cost), math.inf
    for ranks in product(permutations(range(G)), repeat=len(flows) + 1):
        total = 0.0
        for flow, (here, after) in zip(flows, pairwise(ranks), strict=True):
            moved = [
                flow[c][d] * row_cost[here[c]][after[d]] for c in range(G) for d in range(G) if here[c] != after[d]
            ]
            total += max(moved, default=0.0) + TIES * sum(moved)
        best = min(best, total)
    return float(best)


def _pair_cost(flow: np.ndarray, here: np.ndarray, after: np.ndarray, row_cost: np.ndarray) -> float:
    seconds = flow * row_cost[here[:, None], after[None, :]]
    return seconds.max(initial=0.0) + TIES * seconds.sum()


def _viterbi(flows: np.ndarray, row_cost: np.ndarray) -> Assignment:
    """The cost of a pair of layers depends on their two permutations alone."""
    every = np.array(list(permutations(range(len(row_cost)))))
    best, came_from = np.zeros(len(every)), []
    for flow in flows:
        total = np.empty((len(every), len(every)))
        for i, here in enumerate(every):
            seconds = flow[None] * row_cost[here[None, :, None], every[:, None, :]]
            total[i] = best[i] + seconds.max((1, 2), initial=0.0) + TIES * seconds.sum((1, 2))
        came_from.append(total.argmin(0))
        best = total.min(0)
    path = [int(best.argmin())]
    for back in reversed(came_from):
        path.append(int(back[path[-1]]))
    return Assignment(every[path[::-1]], float(best.min()), 0.0)


def _local(flows: np.ndarray, row_cost: np.ndarray, time_limit: float) -> Assignment:
    """The best end of a few starts: each layer greedily after the one before, the identity, random orders."""
    G, L, deadline = len(row_cost), len(flows) + 1, time.monotonic() + time_limit
    rng, found = np.random.default_rng(0), []
    for start in range(_STARTS):
        if found and time.monotonic() > deadline:
            break
        rank_of = np.tile(np.arange(G), (L, 1)) if start < 2 else rng.permuted(np.tile(np.arange(G), (L, 1)), axis=1)
        if start == 0:
            for layer, flow in enumerate(flows):
                rank_of[layer + 1] = _following(flow, rank_of[layer])
        while _sweep(flows, row_cost, rank_of, deadline):
            pass
        found.append(Assignment(rank_of, objective(flows, row_cost, rank_of), None))
    return min(found, key=lambda each: each.value)


def _following(flow: np.ndarray, here: np.ndarray) -> np.ndarray:
    """Each cluster on the rank that most of its rows come from, the largest flows first."""
    after, taken = np.full(len(here), -1), np.zeros(len(here), dtype=bool)
    for index in np.argsort(-flow, axis=None, kind="stable"):
        c, d = divmod(int(index), len(here))
        if after[d] < 0 and not taken[here[c]]:
            after[d], taken[here[c]] = here[c], True
    return after


def _sweep(flows: np.ndarray, row_cost: np.ndarray, rank_of: np.ndarray, deadline: float) -> bool:
    """Every swap of every layer once, kept where it helps; whether any was."""
    better = False
    for layer in range(len(rank_of)):
        near = range(max(0, layer - 1), min(len(flows), layer + 1))
        cost = lambda: sum(_pair_cost(flows[i], rank_of[i], rank_of[i + 1], row_cost) for i in near)  # noqa: E731
        value = cost()
        for a in range(len(row_cost)):
            for b in range(a):
                if time.monotonic() > deadline:
                    return False
                rank_of[layer, [a, b]] = rank_of[layer, [b, a]]
                if (other := cost()) < value - 1e-9:
                    value, better = other, True
                else:
                    rank_of[layer, [a, b]] = rank_of[layer, [b, a]]
    return better


def _milp(flows: np.ndarray, row_cost: np.ndarray, start: Assignment, time_limit: float, gap: float) -> Assignment:
    """y[l, c, g]: cluster c of layer l on rank g; z[l, c, d, g, h] = y[l, c, g] y[l+1, d, h], t[l] the slowest pair."""
    G, L = len(row_cost), len(flows) + 1
    y = np.arange(L * G * G).reshape(L, G, G)
    z = y.size + np.arange((L - 1) * G**4).reshape(L - 1, G, G, G, G)
    t = y.size + z.size + np.arange(L - 1)
    seconds = flows[:, :, :, None, None] * row_cost
    program = Program(
        cost=np.r_[np.zeros(y.size), TIES * seconds.ravel(), np.ones(L - 1)],
        high=np.r_[np.ones(y.size + z.size), np.full(L - 1, np.inf)],
        integer=np.arange(y.size + z.size + L - 1) < y.size,
    )
    for layer, a in product(range(L), range(G)):
        program.add(y[layer, a], 1.0, 1.0, 1.0)
        program.add(y[layer, :, a], 1.0, 1.0, 1.0)
    for layer, c, d, g in product(range(L - 1), range(G), range(G), range(G)):
        program.add([*z[layer, c, d, g], y[layer, c, g]], [1.0] * G + [-1.0], 0.0, 0.0)
        program.add([*z[layer, c, d, :, g], y[layer + 1, d, g]], [1.0] * G + [-1.0], 0.0, 0.0)
    for layer, g, h in product(range(L - 1), range(G), range(G)):
        if g != h:
            columns = [*z[layer, :, :, g, h].ravel(), t[layer]]
            program.add(columns, [*seconds[layer, :, :, g, h].ravel(), -1.0], -np.inf, 0.0)
    found = solve(program, _as_columns(start, flows, row_cost), time_limit, gap)
    rank_of = found.x[: y.size].reshape(L, G, G).argmax(-1)
    return Assignment(rank_of, objective(flows, row_cost, rank_of), found.gap)


def _as_columns(start: Assignment, flows: np.ndarray, row_cost: np.ndarray) -> np.ndarray:
    y = np.eye(len(row_cost))[start.rank_of]
    z = np.einsum("lcg,ldh->lcdgh", y[:-1], y[1:])
    placed = zip(flows, start.rank_of[:-1], start.rank_of[1:], strict=True)
    t = [(flow * row_cost[here[:, None], after]).max(initial=0.0) for flow, here, after in placed]
    return np.r_[y.ravel(), z.ravel(), t]
