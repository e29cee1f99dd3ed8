"""Ranks in nodes, and what a row costs between two of them.  Letter: R ranks."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Topology:
    """num_ranks in num_nodes of equal size, in order; a row costs 1 within a node, `across` between two, 0 at home."""

    num_ranks: int
    num_nodes: int = 1
    across: float = 4.0

    def __post_init__(self):
        if self.num_ranks < 1:
            raise ValueError(f"num_ranks must be at least 1, got {self.num_ranks}")
        if self.num_nodes < 1 or self.num_ranks % self.num_nodes:
            raise ValueError(f"num_nodes must divide num_ranks={self.num_ranks}, got {self.num_nodes}")
        if not 0 < self.across < float("inf"):
            raise ValueError(f"across must be positive and finite, got {self.across}")

    def node_of(self) -> np.ndarray:
        """int64 [R]."""
        return np.arange(self.num_ranks) * self.num_nodes // self.num_ranks

    def row_cost(self) -> np.ndarray:
        """float64 [R, R]: the inverse bandwidth from rank to rank."""
        node = self.node_of()
        cost = np.where(node[:, None] == node, 1.0, self.across)
        np.fill_diagonal(cost, 0.0)
        return cost
