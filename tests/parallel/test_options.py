"""What ranks compare when an ExpertParallel is made."""

import re

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
        {"capacity": Capacity(5), "degree": 2 if odd else 1},
        {"capacity": Capacity(5), "payload": "int8" if odd else None},
        {"capacity": Capacity(5), "placement": [0, 1, 2, 3, 0, 0, 1] if odd else None},
    ):
        told.append(error_of(lambda call=call: ExpertParallel(GluExperts(E, H, I), **call)))
    told.append(error_of(lambda: ExpertParallel(GluExperts(E + odd, H, I))))
    told.append(error_of(lambda: ExpertParallel(GluExperts(E, H + odd, I))))
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
            "degree must be the same on every rank, got 1 on ranks 0, 2, 3, 2 on rank 1",
            "payload must be the same on every rank, got none on ranks 0, 2, 3, int8 on rank 1",
            texts[9],
            "E must be the same on every rank, got 7 on ranks 0, 2, 3, 8 on rank 1",
            "H must be the same on every rank, got 12 on ranks 0, 2, 3, 13 on rank 1",
        ]
        assert re.fullmatch(r"the checksum of placement must be the same on every rank, got \d+ .*", texts[9])


def in_another_order() -> list[str]:
    """Two layers of the same sizes, which one rank calls the other way round."""
    layers, x = [ExpertParallel(GluExperts(E, H, I)) for _ in range(2)], torch.randn(3, H)
    routing = layer().router(x)
    told = []
    for compiled in (False, True):
        run = torch.compile(lambda a, b: a(x, routing) + b(x, routing), backend="aot_eager") if compiled else None
        run = run or (lambda a, b: a(x, routing) + b(x, routing))
        with torch.no_grad():
            run(*layers)
            told.append(error_of(run, *(layers[::-1] if dist.get_rank() else layers)))
    return told


def test_layers_in_another_order_are_refused():
    for told in ranks(2, in_another_order):
        assert len(told) == 2
        assert all("the number of the layer must be the same on every rank, got 1 on rank 0, 2 on rank 1" in text
                   for text in told), told  # fmt: skip
