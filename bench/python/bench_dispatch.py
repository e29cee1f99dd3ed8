import torch

from case import Case
from moert.ops.expert_map import ExpertMap
from moert.testing import BENCH_SHAPES, Shape

RANKS = 4
MODES = ("forward",)  # the way back is another exchange
SHAPES = (*BENCH_SHAPES, Shape("Qwen3-30B-A3B, 4096 tokens", 4096, 128, 8, 2048, 768))


def case(shape: Shape, dtype: torch.dtype) -> Case:
    """Plan and packed rows for four ranks: what dispatch does before anything travels (bench/exchange.py: the rest).

    Providers give the rows of the slots, in order; torch packs weights and ids as well, each in a tensor of its own.
    """
    routing = shape.routing()
    experts = ExpertMap.of(None, shape.E, RANKS)
    x, where = torch.randn(shape.T, shape.H).to(dtype), experts.expert_to_rank

    def moert(x):
        offsets, tokens, _ = torch.ops.moert.dispatch_plan(routing.ids, where, RANKS)
        args = (x.detach(), routing.weights, routing.ids, where, experts.local_ids, offsets, tokens[: offsets[-1]])
        return torch.ops.moert.dispatch_pack(*args)[:, : shape.H * dtype.itemsize].view(dtype)

    def plain(x):
        ids = routing.ids.long()
        to = torch.zeros(shape.T, RANKS, dtype=torch.bool).scatter_(1, where[ids].long(), True)
        rank, token = to.T.nonzero(as_tuple=True)
        goes = where[ids[token]] == rank[:, None]
        torch.where(goes, experts.local_ids[ids[token]], -1).short()
        torch.where(goes, routing.weights[token], 0)
        return x[token]

    copies = len(plain(x))
    return Case((x,), {"moert": moert, "torch": plain}, 0, (shape.T + copies) * shape.H * dtype.itemsize)
