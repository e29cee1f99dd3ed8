"""MoETuner: does its placement balance ranks and shorten the slowest transfers on tokens that it has not seen?

Synthetic traces of 8 layers of 16 experts, top-2: each token has a topic, each topic its experts in every layer, some
experts are more popular than others.  Four ranks in two nodes; a row between nodes costs four times one within.
"""

import time
from functools import partial

import numpy as np

from experiment import Claim, Experiment, main, once
from moert.analysis import LayerTrace, RoutingTrace
from moert.placement import (
    ExpertPlacement,
    PlacedLayer,
    Topology,
    assign_clusters,
    cluster_experts,
    contiguous,
    moetuner_placement,
    replay,
)
from moert.placement.affinity import objective
from moert.placement.balance import Clusters
from moert.placement.moetuner import Tuned, cluster_flows

L, E, K, TOPICS, ROWS, CALLS = 8, 16, 2, 16, 8000, 20
TOPOLOGY = Topology(4, 2, across=4.0)
FIGURES = {
    "imbalance": "largest / mean load of a rank, mean over layers",
    "p95": "of it over calls",
    "slowest pair": "rows x cost, resident, sum over layers",
    "slowest from home": "the same where tokens come home",
    "remote": "share of rows that change rank, resident",
    "step 2": "slowest pair of balance alone, of MoETuner",
    "swaps / exact": "objective of step 2",
    "program / exact": "HiGHS, 10 s",
    "seconds": "a layer, step 1, gap 0.025",
}


def routed(seed: int, affinity: bool, rows: int = ROWS) -> RoutingTrace:
    """The trace; without affinity each layer's tokens are shuffled, so that only the loads remain."""
    rng = np.random.default_rng(seed)
    topic, layers = rng.integers(TOPICS, size=rows), []
    for i in range(L):
        likes = np.zeros((TOPICS, E))
        for own in likes:
            own[rng.choice(E, 3, replace=False)] = 3.0
        scores = 0.3 * rng.standard_normal(E) + likes[topic] + rng.gumbel(size=(rows, E))
        ids = np.argsort(-scores, axis=1)[:, :K].astype(np.int16)
        ids = ids if affinity else rng.permutation(ids)
        layers.append(LayerTrace(f"layer {i}", E, ids, np.full(CALLS, rows // CALLS)))
    return RoutingTrace(tuple(layers))


@once
def tuned(seed: int, progress) -> dict[bool, tuple[RoutingTrace, RoutingTrace, Tuned]]:
    """With affinity and without: rows that decide, the others, and what the first led to."""
    found = {}
    for affinity in (True, False):
        decide, judge = routed(seed, affinity, 400 if progress.quick else ROWS).halves()
        found[affinity] = decide, judge, moetuner_placement(decide, TOPOLOGY)
    return found


def remote(trace: RoutingTrace, placement: ExpertPlacement) -> float:
    where = [Clusters(layer.expert_to_rank, 0.0, 0.0, 0.0) for layer in placement.layers]
    flows = cluster_flows(trace, where, TOPOLOGY.num_ranks)
    return 1 - flows.trace(axis1=1, axis2=2).sum() / flows.sum()


def balanced(found: Tuned) -> ExpertPlacement:
    """Step 1 alone: clusters on ranks in the order in which they came."""
    layers = zip(found.placement.layers, found.clusters, strict=True)
    return ExpertPlacement(4, tuple(PlacedLayer(layer.name, each.cluster_of) for layer, each in layers))


def placed(which: str, affinity: bool, seed: int, progress) -> dict[str, float]:
    for _ in progress.steps(1):
        _, judge, found = tuned(seed, progress)[affinity]
        every = {"contiguous": contiguous(judge, 4), "balance": balanced(found), "MoETuner": found.placement}
        seen = replay(judge, every[which], TOPOLOGY).figures()
        alone = replay(judge, every["balance"], TOPOLOGY).figures()
    return {
        "imbalance": seen["imbalance"],
        "p95": seen["imbalance_p95"],
        "slowest pair": seen["resident"],
        "slowest from home": seen["home"],
        "remote": remote(judge, every[which]),
        "step 2": alone["resident"] / seen["resident"],
    }


def searched(seed: int, progress) -> dict[str, float]:
    """How near swaps, and the integer program in 10 seconds, come to what is exact."""
    decide, _, found = tuned(seed, progress)[True]
    cost = TOPOLOGY.row_cost()
    flows = cluster_flows(decide, list(found.clusters), 4)
    exact = found.assignment.value
    for _ in progress.steps(1):
        swaps = assign_clusters(flows, cost, "local")
        program = assign_clusters(flows, cost, "milp", time_limit=0.2 if progress.quick else 10.0)
    values = [objective(flows, cost, each.rank_of) / exact for each in (swaps, program)]
    return dict(zip(("swaps / exact", "program / exact"), values, strict=True))


def timed(seed: int, progress) -> dict[str, float]:
    decide, started = routed(seed, True).halves()[0], time.perf_counter()
    layers = decide.layers[: 1 if progress.quick else L]
    for _ in progress.steps(1):
        for layer in layers:
            cluster_experts(layer.loads(), 4, gap=0.025)
    return {"seconds": (time.perf_counter() - started) / len(layers)}


NULL = "no affinity, MoETuner"
EXPERIMENT = Experiment(
    name="moetuner",
    title="MoETuner",
    paper="arXiv:2502.06643",
    classes=("moetuner_placement", "cluster_experts", "assign_clusters"),
    figures=FIGURES,
    claims=(
        Claim("ranks are balanced on tokens not seen", "imbalance", "lower", "MoETuner", 1.15),
        Claim(
            "the slowest transfers are 1.2 times shorter", "slowest pair", "lower", "MoETuner", "contiguous", 1 / 1.2
        ),
        Claim("fewer rows change rank", "remote", "lower", "MoETuner", "contiguous"),
        Claim("affinity between layers adds to balance", "step 2", "higher", "MoETuner", 1.05),
        Claim("without affinity it adds nothing", "step 2", "lower", NULL, 1.05),
        Claim("swaps come within 5 % of exact", "swaps / exact", "lower", "search", 1.05),
        Claim("the integer program is never better than exact", "program / exact", "higher", "search", 1 - 1e-9),
        Claim("a layer's balance takes at most 2 s", "seconds", "lower", "solver", 2.0),
    ),
    equal="one trace per seed; every other row of a call decides, the rest is judged",
    seeds=8,
    timed=("solver",),
    together=True,
    variants={
        "contiguous": partial(placed, "contiguous", True),
        "balance alone": partial(placed, "balance", True),
        "MoETuner": partial(placed, "MoETuner", True),
        "no affinity, contiguous": partial(placed, "contiguous", False),
        "no affinity, balance alone": partial(placed, "balance", False),
        NULL: partial(placed, "MoETuner", False),
        "search": searched,
        "solver": timed,
    },
    notes="Contiguous experts' slowest pair takes 1.21 to 1.45 times as long as MoETuner's on tokens not seen, most "
    "of it by balance: the affinity between layers adds 1.04 to 1.18 times, below 1.05 in one seed of eight. "
    "Where tokens come home after each layer the gain is 1.09 to 1.22. The 95th percentile of the calls' "
    "imbalance stays at 1.16 to 1.19 (1.29 to 1.47 contiguous): calls of 200 rows are not as even as their "
    "sum. Traces are synthetic; their strength of affinity was chosen once. In 10 seconds HiGHS improved none "
    "of the swaps' results.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
