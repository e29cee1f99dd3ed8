"""What ranks compare when a layer of experts is made: those of its group, and its replicas."""

import zlib
from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist

from moert.experts.glu import GluExperts
from moert.ops.all_to_all import Fact, refusing
from moert.ops.kinds import expect
from moert.ops.payload import check_payload
from moert.ops.rank_capacity import Capacity
from moert.ops.ranks import Ranks, named
from moert.parallel.pulse import Group, process_group

GRADIENTS = ("sum", "mean")
# Ranks that differ in these would wait in exchanges that the others do not make, end in one whose sizes disagree, or
# add up what does not belong together; and with a capacity nothing is compared later on a GPU.
OPTIONS = (
    "local_size",
    "gradients",
    "the number of replicas",
    "capacity",
    "degree",
    "payload",
    "E",
    "H",
    "I",
    "the dtype of weights",
    "bias",
    "the checksum of activation, layout and parameters",
    "the checksum of placement",
)
HELD = "the checksum of the experts that replicas hold"  # among replicas the last of these


def check_options(experts, gradients, degree, payload, capacity) -> None:
    expect(GluExperts, experts=experts)
    if gradients not in GRADIENTS:
        raise ValueError(f"gradients must be one of {', '.join(GRADIENTS)}, got {gradients}")
    expect(int, degree=degree)
    if degree < 1:
        raise ValueError(f"degree must be at least 1, got {degree}")
    check_payload(payload)
    expect((Capacity, type(None)), capacity=capacity)


def check_local_size(local_size: int | None, num_ranks: int) -> None:
    expect((int, type(None)), local_size=local_size)
    if local_size is not None and (local_size < 1 or num_ranks % local_size):
        raise ValueError(f"local_size must divide the R={num_ranks} ranks, got {local_size}")


def replicas_of(group: dist.ProcessGroup | None, replicas: Group) -> Ranks | None:
    """The ranks that hold what this one holds: of the group none but this one."""
    if replicas is None:
        return None
    ranks = Ranks(process_group(replicas, "replicas"))
    inside = dist.get_process_group_ranks(group or dist.group.WORLD)
    both = [
        rank for rank in range(ranks.size) if rank != ranks.rank and dist.get_global_rank(ranks.group, rank) in inside
    ]
    if both:
        raise ValueError(f"replicas must be ranks outside the group, got {named(both, ranks.group)}")
    return ranks


def telling(replicas: Ranks | None) -> AbstractContextManager:
    """Before they compare options: where a rank fails inside, its replicas raise an error too."""
    return nullcontext() if replicas is None else refusing(replicas, OPTIONS)


def options_of(
    experts: GluExperts, local_size, gradients, replicas, capacity, degree, payload, placed
) -> dict[str, Fact]:
    """By name; placed: the checksum of where the experts lie."""
    parameters = [(name, [*p.shape], p.dtype) for name, p in experts.named_parameters()]
    facts = (
        local_size,
        gradients,
        replicas and replicas.size,
        capacity and capacity.rows,
        degree,
        payload or "none",
        experts.num_experts,
        experts.hidden,
        experts.intermediate,
        str(experts.down_proj.dtype).removeprefix("torch."),
        "no" if experts.down_proj_bias is None else "yes",
        checksum(experts.activation, experts.layout, parameters),
        placed,
    )
    return dict(zip(OPTIONS, facts, strict=True))


def among_replicas(facts: dict[str, Fact], expert_ids: list[int]) -> dict[str, Fact]:
    """The same, but for where experts lie those that this rank holds."""
    *same, placed = facts
    return {name: facts[name] for name in same} | {HELD: checksum(expert_ids)}


def checksum(*things) -> int:
    """Of how they are written: a number that two which differ hardly share."""
    return zlib.crc32(repr(things).encode())
