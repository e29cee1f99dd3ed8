"""How evenly a trace's choices fall on experts and ranks, and how many rows go from rank to rank.

Letters: T tokens, k choices, R ranks.  ranks [T, k] is the rank of each choice, -1 where it was dropped.
"""

import numpy as np

from moert.analysis.trace import LayerTrace


def imbalance(loads: np.ndarray) -> np.ndarray:
    """Largest over mean of the last dimension, [..., n] -> [...]; 1 is even, and so is nothing at all."""
    mean = loads.mean(-1)
    return np.divide(loads.max(-1), mean, out=np.ones_like(mean), where=mean > 0)


def ranks_of(layer: LayerTrace, expert_to_rank: np.ndarray) -> np.ndarray:
    """[T, k]: where each choice's expert is, by expert_to_rank [E]."""
    return np.where(layer.ids >= 0, np.asarray(expert_to_rank)[layer.ids], -1)


def rank_loads(ranks: np.ndarray, num_ranks: int) -> np.ndarray:
    """int64 [R]: how many choices each rank computes."""
    return np.bincount(ranks[ranks >= 0], minlength=num_ranks)


def call_loads(layer: LayerTrace, ranks: np.ndarray, num_ranks: int) -> np.ndarray:
    """int64 [n, R]: the same of each of the n calls."""
    n, index = len(layer.calls), layer.call_of_row()[:, None] * num_ranks + ranks
    return np.bincount(index[ranks >= 0], minlength=n * num_ranks).reshape(n, num_ranks)


def homes_of(layer: LayerTrace, num_ranks: int) -> np.ndarray:
    """int64 [T]: the rank a token comes from, where each call's rows are cut into R equal blocks, one for a rank."""
    calls, call = layer.calls, layer.call_of_row()
    place = np.arange(len(layer.ids)) - (np.cumsum(calls) - calls)[call]
    return place * num_ranks // np.maximum(calls[call], 1)


def traffic(ranks: np.ndarray, homes: np.ndarray, num_ranks: int) -> np.ndarray:
    """int64 [R, R]: rows from home to rank, one a (token, rank) however many of its experts are there.

    The diagonal is what stays; combine sends the transpose back.
    """
    goes = np.zeros((len(ranks), num_ranks + 1), dtype=bool)
    np.put_along_axis(goes, np.where(ranks >= 0, ranks, num_ranks), True, axis=1)
    total = np.zeros((num_ranks, num_ranks), dtype=np.int64)
    np.add.at(total, homes, goes[:, :num_ranks])
    return total
