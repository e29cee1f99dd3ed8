"""What ranks compare when an ExpertParallel is made."""

import re

import torch
import torch.distributed as dist
from tests.parallel.test_expert_parallel import E, H, I, layer
from torch.distributed.device_mesh import init_device_mesh

from moert import GluExperts, MoELayer
from moert.ops.rank_capacity import Capacity
from moert.ops.ranks import subgroup
from moert.parallel import AdaptiveExperts, ExpertParallel, shard_experts_
from moert.types import Activation, ExpertLayout
from ranks import error_of, ranks


def options_differ() -> list[str]:
    """What only the making of a layer can compare; and a rank that cannot make it."""
    odd, told, alone = dist.get_rank() == 1, [], subgroup([dist.get_rank()], None)
    for call in (
        {"local_size": 2 if odd else None},
        {"local_size": 1 if odd else 2},
        {"gradients": "mean" if odd else "sum"},
        {"capacity": Capacity(5) if odd else None},
        {"replicas": alone if odd else None},
        {"replicas": dist.group.WORLD if odd else None},
        {"replicas": 3 if odd else None},
        {"local_size": "2" if odd else 2},
        {"placement": [0] * E if odd else None},
        {"capacity": Capacity(5), "degree": 2 if odd else 1},
        {"capacity": Capacity(5), "payload": "int8" if odd else None},
        {"capacity": Capacity(5), "placement": [0, 1, 2, 3, 0, 0, 1] if odd else None},
    ):
        told.append(error_of(lambda call=call: ExpertParallel(GluExperts(E, H, I), **call)))
    told.append(error_of(lambda: ExpertParallel(GluExperts(E + odd, H, I))))
    told.append(error_of(lambda: ExpertParallel(GluExperts(E, H + odd, I))))
    for experts in (
        GluExperts(E, H, 2 * I if odd else I),
        GluExperts(E, H, I, dtype=torch.float64 if odd else torch.float32),
        GluExperts(E, H, I, bias=odd),
        GluExperts(E, H, I, Activation("swiglu_oai", limit=6.0 if odd else 7.0)),
        GluExperts(E, H, I, layout=ExpertLayout(interleaved=odd)),
    ):
        told.append(error_of(lambda experts=experts: ExpertParallel(experts)))
    model = MoELayer(layer().router, GluExperts(E, H, I))
    told.append(error_of(lambda: shard_experts_(model, replicas=3 if odd else None)))
    x = torch.randn(3, H)
    ExpertParallel(GluExperts(E, H, I))(x, layer().router(x))  # the group is as it was
    return told


def test_ranks_with_other_options_are_refused():
    told = ranks(4, options_differ)
    elsewhere = "every rank must be able to go on, got an error on rank 1 (see there)"
    of_type = "replicas must be of type ProcessGroup or DeviceMesh or None, got int"
    for rank, texts in enumerate(told):
        assert texts == [
            "local_size must be the same on every rank, got None on ranks 0, 2, 3, 2 on rank 1",
            "local_size must be the same on every rank, got 2 on ranks 0, 2, 3, 1 on rank 1",
            "gradients must be the same on every rank, got sum on ranks 0, 2, 3, mean on rank 1",
            "capacity must be the same on every rank, got None on ranks 0, 2, 3, 5 on rank 1",
            "the number of replicas must be the same on every rank, got None on ranks 0, 2, 3, 1 on rank 1",
            "replicas must be ranks outside the group, got ranks 0, 2, 3" if rank == 1 else elsewhere,
            of_type if rank == 1 else elsewhere,
            "local_size must be of type int or None, got str" if rank == 1 else elsewhere,
            "placement must give every rank an expert, got none for rank 1" if rank == 1 else elsewhere,
            "degree must be the same on every rank, got 1 on ranks 0, 2, 3, 2 on rank 1",
            "payload must be the same on every rank, got none on ranks 0, 2, 3, int8 on rank 1",
            texts[11],
            "E must be the same on every rank, got 7 on ranks 0, 2, 3, 8 on rank 1",
            "H must be the same on every rank, got 12 on ranks 0, 2, 3, 13 on rank 1",
            f"I must be the same on every rank, got {I} on ranks 0, 2, 3, {2 * I} on rank 1",
            "the dtype of weights must be the same on every rank, got float32 on ranks 0, 2, 3, float64 on rank 1",
            "bias must be the same on every rank, got no on ranks 0, 2, 3, yes on rank 1",
            *texts[17:19],
            f"placement must fit on every rank, got an error on rank 1: {of_type}" if rank != 1 else of_type,
        ]
        numbers = r"must be the same on every rank, got \d+ on ranks 0, 2, 3, \d+ on rank 1"
        assert re.fullmatch(f"the checksum of placement {numbers}", texts[11])
        for text in texts[17:19]:
            assert re.fullmatch(f"the checksum of activation, layout and parameters {numbers}", text)


def on_a_mesh() -> list[str]:
    """(data, ep) = (2, 2): what only replicas can compare, and what is wrong on one rank or in one row alone."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "ep"))
    row, odd, told = mesh["data"].get_local_rank(), dist.get_rank() == 3, []
    blocks = [0, 0, 1, 1]
    for call in (
        {"placement": [0, 1, 1, 0] if row else blocks},
        {"experts": GluExperts(4, H, 2 * I if row else I)},
        {"gradients": "mean" if row else "sum"},
        {"gradients": "mean" if odd else "sum"},
        {"degree": 0 if odd else 1},
        {"experts": GluExperts(4, H, I, dtype=torch.float64 if row else torch.float32)},
    ):
        options = {"experts": GluExperts(4, H, I), **call}
        told.append(error_of(lambda o=options: ExpertParallel(group=mesh["ep"], replicas=mesh["data"], **o)))
    for placement in ({"experts": [0, 0, 1] if odd else blocks}, {"experts": [0, 1, 1, 0] if row else blocks}):
        model = MoELayer(layer().router, GluExperts(4, H, I))
        told.append(error_of(lambda m=model, p=placement: shard_experts_(m, mesh["ep"], p, replicas=mesh["data"])))
    for options in (
        {"degree": 3 if odd else 1},
        {"window": 64 if odd else 128},
        {"gradients": "mean" if row else "sum"},
    ):
        told.append(
            error_of(lambda o=options: AdaptiveExperts(GluExperts(4, H, I), mesh["ep"], replicas=mesh["data"], **o))
        )
    ExpertParallel(GluExperts(4, H, I), mesh["ep"], replicas=mesh["data"])  # the groups are as they were
    return told


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


def test_replicas_that_differ_are_refused():
    same, on = "must be the same on every rank, got", [(0, 2), (1, 3), (0, 2), (1, 3)]
    held = f"the checksum of the experts that replicas hold {same} "
    failed = [f"every rank must be able to go on, got an error on rank {rank} (see there)" for rank in range(4)]
    gradients = [f"gradients {same} sum on rank {a}, mean on rank {b}" for a, b in on]
    short, wide = "placement must have shape [E=4], got [3]", 'degree must be "auto" or one of 1, 2, 4, 8, got 3'
    window = f"window {same} 128 on rank 2, 64 on rank 3"
    everybody = ranks(4, on_a_mesh, timeout=60)
    for moved in (7, 0):
        for told, (a, b) in zip(everybody, on, strict=True):
            assert re.fullmatch(rf"{held}\d+ on rank {a}, \d+ on rank {b}", told.pop(moved))
    assert [list(told) for told in zip(*everybody, strict=True)] == [
        [f"I {same} {I} on rank {a}, {2 * I} on rank {b}" for a, b in on],
        gradients,
        [failed[1], gradients[1], failed[3], gradients[3]],
        [failed[1], failed[3], failed[3], "degree must be at least 1, got 0"],
        [f"the dtype of weights {same} float32 on rank {a}, float64 on rank {b}" for a, b in on],
        [failed[2], failed[3], f"placement must fit on every rank, got an error on rank 3: {short}", short],
        [failed[2], failed[3], failed[3], wide],
        [failed[2], failed[3], window, window],
        gradients,
    ]
