"""What ranks compare when an ExpertParallel is made."""

import torch
import torch.distributed as dist
from tests.parallel.test_expert_parallel import E, H, I, layer

from moert import GluExperts
from moert.ops.rank_capacity import Capacity
from moert.parallel import ExpertParallel
from ranks import error_of, ranks


def options_differ() -> list[str]:
    """What only the making of a layer can compare; and a rank that cannot make it."""
    odd, told = dist.get_rank() == 1, []
    for call in (
        {"local_size": 2 if odd else None},
        {"local_size": 1 if odd else 2},
        {"gradients": "mean" if odd else "sum"},
        {"capacity": Capacity(5) if odd else None},
        {"replicas": dist.group.WORLD if odd else None},
        {"local_size": "2" if odd else 2},
        {"placement": [0] * E if odd else None},
    ):
        told.append(error_of(lambda call=call: ExpertParallel(GluExperts(E, H, I), **call)))
    x = torch.randn(3, H)
    ExpertParallel(GluExperts(E, H, I))(x, layer().router(x))  # the group is as it was
    return told


def test_ranks_with_other_options_are_refused():
    told = ranks(4, options_differ)
    elsewhere = "every rank must be able to go on, got an error on rank 1 (see there)"
    for rank, texts in enumerate(told):
        assert texts == [
            "local_size must be the same on every rank, got None on ranks 0, 2, 3, 2 on rank 1",
            "local_size must be the same on every rank, got 2 on ranks 0, 2, 3, 1 on rank 1",
            "gradients must be the same on every rank, got sum on ranks 0, 2, 3, mean on rank 1",
            "capacity must be the same on every rank, got None on ranks 0, 2, 3, 5 on rank 1",
            "the number of replicas must be the same on every rank, got None on ranks 0, 2, 3, 4 on rank 1",
            "local_size must be of type int or None, got str" if rank == 1 else elsewhere,
            "placement must give every rank an expert, got none for rank 1" if rank == 1 else elsewhere,
        ]
