"""What routers exchange between the ranks of a job.  In one file, which imports little: a rank starts in seconds."""

import torch

from moert.routers import DeepSeekRouter, ExpertChoiceRouter, expert_load
from ranks import ranks


def bias_and_loads() -> tuple[list[float], list[int], list[int]]:
    rank = torch.distributed.get_rank()
    router = DeepSeekRouter(4, 4, 1, "sigmoid", bias_balance=1.0)
    router.update_bias(torch.tensor([[8, 0, 0, 0], [0, 2, 4, 2]][rank]))
    x = torch.randn([10, 30][rank], 4)
    loads = [expert_load(ExpertChoiceRouter(4, 5, scope=scope)(x)).tolist() for scope in ("rank", "world")]
    return router.expert_bias.tolist(), *loads


def test_ranks_add_up_counts_and_share_tokens():
    (bias, *loads), (other_bias, *other_loads) = ranks(2, bias_and_loads)
    assert bias == other_bias == [-1, 1, 0, 1]  # alone each rank would say otherwise
    assert loads == [[2] * 5, [4] * 5] and other_loads == [[6] * 5, [4] * 5]
