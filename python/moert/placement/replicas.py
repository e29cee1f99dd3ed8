"""Copies of hot experts on ranks that have less to do.  Letters: E experts, R ranks."""

import numpy as np


def replicate(loads: np.ndarray, expert_to_rank: np.ndarray, num_ranks: int, extra: int) -> tuple[tuple[int, int], ...]:
    """(expert, rank) of further copies, at most `extra` on a rank; an expert's tokens go to its holders in equal parts.

    Each step takes the copy that lowers the largest load of a rank most (ties: the sum of squares), until none does;
    copies after the last one that lowered the largest load are left out.
    """
    loads, place = np.asarray(loads, dtype=float), np.asarray(expert_to_rank)
    if extra < 0:
        raise ValueError(f"extra must be at least 0, got {extra}")
    held = np.zeros((len(loads), num_ranks), dtype=bool)
    held[np.arange(len(loads)), place] = True
    free = np.full(num_ranks, extra)
    copies: list[tuple[int, int]] = []
    useful, lowest = 0, rank_totals(loads, held).max()
    while True:
        of_rank = rank_totals(loads, held)
        steps = []
        # Only a copy of an expert on the fullest rank lowers the largest load.
        for expert in np.flatnonzero(held[:, of_rank.argmax()]):
            for rank in np.flatnonzero((free > 0) & ~held[expert]):
                held[expert, rank] = True
                after = rank_totals(loads, held)
                steps.append((after.max(), float(after @ after), int(expert), int(rank)))
                held[expert, rank] = False
        best = min(steps, default=None)
        if best is None or best[:2] >= (of_rank.max(), float(of_rank @ of_rank)):
            return tuple(copies[:useful])
        held[best[2], best[3]] = True
        free[best[3]] -= 1
        copies.append(best[2:])
        if best[0] < lowest:
            useful, lowest = len(copies), best[0]


def rank_totals(loads: np.ndarray, held: np.ndarray) -> np.ndarray:
    """float64 [R]: what each rank computes of loads [E], by held bool [E, R]."""
    return (loads / held.sum(1)) @ held
