"""Rows in two levels (2DH of Tutel, arXiv:2206.03382): within each node to the rank that has the index of their
destination, then across nodes between ranks of one index.  Fewer and longer messages between nodes.

Letters: R = A m ranks, A nodes of m ranks; N rows sent, M received.  Chunks of an order (a, b) lie by a, then by b.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from moert.ops.ranks import Levels


def send_numbers(said: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """all_to_all_single of said [R, F], and between [m, A]: the first number of what passed here.

    Where it counts rows, between[l, n] of them pass here on their way from rank l of this node to node n.
    """
    m, A, F = dist.get_world_size(levels.node), dist.get_world_size(levels.rail), said.shape[1]
    passing, heard = said.new_empty(m, A, F), said.new_empty(A, m, F)
    dist.all_to_all_single(passing, said.view(A, m, F).transpose(0, 1).contiguous(), group=levels.node)
    dist.all_to_all_single(heard, passing.transpose(0, 1).contiguous(), group=levels.rail)
    return heard.view(-1, F), passing[..., 0]


class TwoSteps:
    """An exchange under way, as the Work of torch.distributed: after wait() the rows are in `into` [M, bytes].

    sent and received are the sizes for each rank [R]; back: the way of the other direction, between being that of
    this one, so that every row passes the rank that it passed before.
    """

    def __init__(self, rows: Tensor, into: Tensor, sent: Tensor, received: Tensor, between: Tensor, levels, back: bool):
        m, A = between.shape
        sent, self._received = sent.view(A, m), received.view(A, m)
        self._into, self._between, self._levels, self._back = into, between, levels, back
        self._passing = rows.new_empty(int(between.sum()), rows.shape[1])
        if back:
            step = rows, between.sum(0), sent.sum(1), levels.rail
        else:
            step = _swapped(rows, sent), between.sum(1), sent.sum(0), levels.node
        self._rows = step[0]  # what is sent must live so long
        self._work = _exchange(self._passing, *step, asynchronous=True)

    def wait(self) -> None:
        self._work.wait()
        passing, between, received = self._passing, self._between, self._received
        if self._back:
            arrived = torch.empty_like(self._into)
            _exchange(arrived, _swapped(passing, between.T), received.sum(0), between.sum(1), self._levels.node)
            self._into.copy_(_swapped(arrived, received.T))
        else:
            _exchange(self._into, _swapped(passing, between), received.sum(1), between.sum(0), self._levels.rail)


def _swapped(rows: Tensor, sizes: Tensor) -> Tensor:
    """Chunks of sizes [a, b], in the order (a, b), in the order (b, a)."""
    (a, b), chunks = sizes.shape, rows.split(sizes.flatten().tolist())
    return torch.cat([chunks[i * b + j] for j in range(b) for i in range(a)])


def _exchange(into: Tensor, rows: Tensor, received: Tensor, sent: Tensor, group, asynchronous: bool = False):
    return dist.all_to_all_single(into, rows, received.tolist(), sent.tolist(), group, asynchronous)
