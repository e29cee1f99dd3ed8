"""What routers exchange between the ranks of a job.  In one file, which imports little: a rank starts in seconds."""

import torch

from moert.routers import DeepSeekRouter, ExpertChoiceRouter, FrozenRandomRouter, expert_load
from ranks import ranks


def bias_and_loads() -> tuple[list[float], list[int], list[int]]:
    rank = torch.distributed.get_rank()
    router = DeepSeekRouter(4, 4, 1, "sigmoid", bias_balance=1.0)
    counts = torch.tensor([[8, 0, 0, 0], [0, 2, 4, 2]][rank])
    router.update_bias(counts)
    assert counts.sum() == 8  # the caller's own are not added up in place
    x = torch.randn([10, 30][rank], 4)
    loads = [expert_load(ExpertChoiceRouter(4, 5, scope=scope)(x)).tolist() for scope in ("rank", "world")]
    return router.expert_bias.tolist(), *loads


def test_ranks_add_up_counts_and_share_tokens():
    (bias, *loads), (other_bias, *other_loads) = ranks(2, bias_and_loads)
    assert bias == other_bias == [-1, 1, 0, 1]  # alone each rank would say otherwise
    assert loads == [[2] * 5, [4] * 5] and other_loads == [[6] * 5, [4] * 5]


def frozen_draws() -> list[list[float]]:
    """The weights of a router with a seed and of one without, which a rank alone would draw differently."""
    torch.manual_seed(torch.distributed.get_rank())
    routers = FrozenRandomRouter(3, 2, 1, seed=7), FrozenRandomRouter(3, 2, 1)
    return [[*router.weight.flatten().tolist(), *router.bias.tolist()] for router in routers]


def test_every_rank_has_the_frozen_router_of_the_first():
    (seeded, drawn), other = ranks(2, frozen_draws)
    assert other == [seeded, drawn]
    alone = FrozenRandomRouter(3, 2, 1, seed=7)
    assert seeded == [*alone.weight.flatten().tolist(), *alone.bias.tolist()]
    torch.manual_seed(0)
    first = FrozenRandomRouter(3, 2, 1)
    assert drawn == [*first.weight.flatten().tolist(), *first.bias.tolist()]
