"""What a placement would do with a trace: loads, rows between ranks, the slowest transfers.  Letters: R ranks.

Two ways for tokens to travel.  "home": from the rank that a token belongs to and back, in every layer, as
moert.parallel does.  "resident": a token stays where its experts are until the next layer's, MoETuner's assumption.
"""

from dataclasses import dataclass

import numpy as np

from moert.analysis.load import call_loads, homes_of, imbalance, rank_loads, traffic
from moert.analysis.trace import RoutingTrace
from moert.placement.expert_placement import ExpertPlacement
from moert.placement.topology import Topology


@dataclass(frozen=True)
class Replay:
    """imbalance [L]: largest over mean load of a rank; p95 over calls; home [L] and resident [L-1] cost: the slowest
    pair of ranks, in rows times the cost of a row; remote: share of rows that leave their home; rows [R, R], home,
    of all layers.
    """

    imbalance: np.ndarray
    p95: np.ndarray
    home: np.ndarray
    resident: np.ndarray
    remote: float
    rows: np.ndarray

    def figures(self) -> dict[str, float]:
        """Means over the layers of the imbalances, sums of the costs."""
        return {
            "imbalance": float(self.imbalance.mean()),
            "imbalance_p95": float(self.p95.mean()),
            "home": float(self.home.sum()),
            "resident": float(self.resident.sum()),
            "remote": self.remote,
        }


def replay(trace: RoutingTrace, placement: ExpertPlacement, topology: Topology) -> Replay:
    """The placement's layers must be the trace's, with the same numbers of experts."""
    _check_fits(trace, placement, topology)
    R, cost = topology.num_ranks, topology.row_cost()
    even, worst, home, resident, before = [], [], [], [], None
    rows = np.zeros((R, R), dtype=np.int64)
    for layer, placed in zip(trace.layers, placement.layers, strict=True):
        homes = homes_of(layer, R)
        ranks = placed.ranks(layer.ids, homes, topology)
        even.append(imbalance(rank_loads(ranks, R)))
        worst.append(np.percentile(imbalance(call_loads(layer, ranks, R)), 95) if len(layer.calls) else 1.0)
        moved = traffic(ranks, homes, R)
        home.append((moved * cost).max())
        rows += moved
        if before is not None:
            resident.append((_between(before, ranks, R) * cost).max())
        before = ranks
    stays = float(np.trace(rows))
    remote = 1 - stays / rows.sum() if rows.sum() else 0.0
    return Replay(np.array(even), np.array(worst), np.array(home), np.array(resident), float(remote), rows)


def _between(here: np.ndarray, after: np.ndarray, num_ranks: int) -> np.ndarray:
    """float64 [R, R]: rows of the next layer by where they were, each of a token's k places giving 1/k of them."""
    if len(here) != len(after):
        raise ValueError(f"layers must have seen the same rows, got {len(here)} and {len(after)}")
    total = np.zeros((num_ranks, num_ranks))
    for one in here.T:
        for two in after.T:
            both = (one >= 0) & (two >= 0)
            np.add.at(total, (one[both], two[both]), 1.0)
    return total / here.shape[1]


def _check_fits(trace: RoutingTrace, placement: ExpertPlacement, topology: Topology) -> None:
    if placement.num_ranks != topology.num_ranks:
        raise ValueError(f"placement must have {topology.num_ranks} ranks, got {placement.num_ranks}")
    wanted = [(layer.name, layer.num_experts) for layer in trace.layers]
    found = [(layer.name, len(layer.expert_to_rank)) for layer in placement.layers]
    if wanted != found:
        differ = [pair for pair in zip(wanted, found, strict=False) if pair[0] != pair[1]]
        what = f"{differ[0][1]} for {differ[0][0]}" if differ else f"{len(found)} layers for {len(wanted)}"
        raise ValueError(f"placement must fit the trace, got {what}")
