"""How long an exchange of rows takes, flat or in two steps (2DH), by a latency and a bandwidth of each kind of link.

A rank's sends follow each other, so do its receives; the slowest rank decides.  2DH is Tutel's (arXiv:2206.03382): rows
first go to the rank of their own node that has the local index of their destination, then across.
Letters: R ranks, A nodes, m = R / A ranks of a node.
"""

from dataclasses import dataclass

import numpy as np

from moert.placement.topology import Topology


@dataclass(frozen=True)
class LinkCost:
    """A message of n bytes takes latency + n * per_byte seconds."""

    latency: float
    per_byte: float

    @classmethod
    def fit(cls, messages: np.ndarray, sizes: np.ndarray, seconds: np.ndarray) -> "LinkCost":
        """From measured exchanges of so many messages [N] of so many bytes [N] each: least squares of relative errors.

        Neither number becomes negative: where one would, the other alone is fitted.
        """
        messages, seconds = np.asarray(messages, dtype=float), np.asarray(seconds, dtype=float)
        columns = np.stack([messages, messages * np.asarray(sizes, dtype=float)], 1) / seconds[:, None]
        scale = np.maximum(np.abs(columns).max(0), 1e-300)  # seconds and seconds a byte differ by many orders
        found = np.linalg.lstsq(columns / scale, np.ones(len(seconds)), rcond=None)[0] / scale
        if found.min() < 0:
            alone = (columns.sum(0) / np.square(columns).sum(0)) * (found > 0)
            found = alone
        return cls(float(found[0]), float(found[1]))

    def seconds(self, messages, nbytes):
        """Of so many messages with so many bytes in all."""
        return messages * self.latency + nbytes * self.per_byte


@dataclass(frozen=True)
class Step:
    """One exchange: bytes [R, R] from rank to rank (0: no message), and whether it stays within nodes."""

    nbytes: np.ndarray
    within: np.ndarray

    def seconds(self, inside: LinkCost, across: LinkCost) -> float:
        """Until the slowest rank has sent and received everything."""
        sent = self.nbytes > 0
        times = [
            link.seconds((sent & part).sum(axis), (self.nbytes * part).sum(axis))
            for link, part in ((inside, self.within), (across, ~self.within))
            for axis in (1, 0)
        ]
        out, into = times[0] + times[2], times[1] + times[3]
        return float(max(out.max(initial=0.0), into.max(initial=0.0)))


def flat(nbytes: np.ndarray, num_nodes: int) -> list[Step]:
    """nbytes [R, R]: every rank writes to every rank that it has something for."""
    return [Step(_without_self(nbytes), _same_node(len(nbytes), num_nodes))]


def two_level(nbytes: np.ndarray, num_nodes: int) -> list[Step]:
    """The exchanges of 2DH: within each node by local index of the destination, then across between equal indices."""
    R, m = len(nbytes), len(nbytes) // num_nodes
    by_place = nbytes.reshape(num_nodes, m, num_nodes, m)  # [node, index] -> [node, index]
    first, second = np.zeros((num_nodes, m, num_nodes, m)), np.zeros((num_nodes, m, num_nodes, m))
    nodes, indices = np.arange(num_nodes), np.arange(m)
    first[nodes, :, nodes, :] = by_place.sum(2)
    second[:, indices, :, indices] = by_place.sum(1).transpose(2, 0, 1)
    within = _same_node(R, num_nodes)
    return [Step(_without_self(step.reshape(R, R)), within) for step in (first, second)]


def _same_node(num_ranks: int, num_nodes: int) -> np.ndarray:
    node = Topology(num_ranks, num_nodes).node_of()
    return node[:, None] == node


def _without_self(nbytes: np.ndarray) -> np.ndarray:
    return np.where(np.eye(len(nbytes), dtype=bool), 0, nbytes)
