"""Expert parallelism: each rank of a group holds some of the experts, and tokens travel to them."""

from collections.abc import Mapping
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moert.experts.base import Experts, check_added
from moert.experts.glu import GluExperts
from moert.ops.dispatch import combine, dispatch
from moert.ops.expert_map import ExpertMap
from moert.ops.kinds import expect
from moert.parallel.pulse import Pulse
from moert.types import Onto, Routing

Group = dist.ProcessGroup | DeviceMesh | None
GRADIENTS = ("sum", "mean")


class ExpertParallel(Experts):
    """This rank's part of `experts`, which every rank of the group makes alike: same results as all of them here.

    placement is expert_to_rank [E], any sequence of integers (None: contiguous blocks); every rank must hold an expert.
    local are the GluExperts that this rank holds, in the order of their ids; the others are gone.  Every rank of the
    group must call forward, and backward where it called forward, equally often; each with tokens of its own, or none.

    The experts' gradients are those of the sum of the ranks' losses, as in one process with everybody's tokens; with
    gradients="mean" of their mean, as DistributedDataParallel and FSDP2 have it for the rest of a model.  replicas is
    the group of ranks that hold the same experts (the data axis of a mesh), over which gradients are added up too.
    Where a rank is lost the others raise an error; pulse, of the same group, makes it name the rank.
    """

    def __init__(
        self,
        experts: GluExperts,
        group: Group = None,
        placement=None,
        gradients: str = "sum",
        replicas: Group = None,
        pulse: Pulse | None = None,
    ):
        super().__init__()
        expect(GluExperts, experts=experts)
        if gradients not in GRADIENTS:
            raise ValueError(f"gradients must be one of {', '.join(GRADIENTS)}, got {gradients}")
        self.group, self.replicas = process_group(group), None if replicas is None else process_group(replicas)
        self.map = ExpertMap.of(placement, experts.num_experts, dist.get_world_size(self.group))
        held = torch.bincount(self.map.expert_to_rank, minlength=self.map.num_ranks)
        if held.min() == 0:
            raise ValueError(f"placement must give every rank an expert, got none for rank {held.argmin().item()}")
        self.num_experts, self.gradients = experts.num_experts, gradients
        self.guard = nullcontext if pulse is None else pulse.exchanging
        self.expert_ids = self.map.experts_of(dist.get_rank(self.group))
        self.local = _part(experts, self.expert_ids)
        if gradients == "mean" or replicas is not None:
            for parameter in self.local.parameters():
                parameter.register_hook(self._reduce)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        there = dispatch(x, routing, self.map, self.group, guard=self.guard)
        return combine(self.local(there.x, there.routing), there)

    def onto(self, x: Tensor, routing: Routing, onto: Onto) -> Tensor:
        check_added(onto.rows, x)
        if onto.rows is None or onto.scale is not None or onto.mix is not None:
            return onto.added_to(self(x, routing))
        there = dispatch(x, routing, self.map, self.group, guard=self.guard)
        return combine(self.local(there.x, there.routing), there, onto.rows)

    def beside(self, x: Tensor, routing: Routing, shared: nn.Module) -> Tensor:
        """The shared experts compute while the tokens travel."""
        there = dispatch(x, routing, self.map, self.group, asynchronous=True, guard=self.guard)
        try:
            rows = shared(x)
            check_added(rows, x)
        finally:
            there.wait()
        return combine(self.local(there.x, there.routing), there, rows)

    def _reduce(self, grad: Tensor) -> Tensor:
        """A parameter's gradient: before it is added to what .grad holds, so that micro-batches accumulate."""
        holders = 1
        if self.replicas is not None:
            holders = dist.get_world_size(self.replicas)
            grad = grad.contiguous().clone()
            dist.all_reduce(grad, group=self.replicas)
        return grad / (holders * self.map.num_ranks) if self.gradients == "mean" else grad

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, num_ranks={self.map.num_ranks}, gradients={self.gradients}"


def shard_experts_(
    model: nn.Module,
    group: Group = None,
    placement: Mapping[str, object] | None = None,
    gradients: str = "sum",
    replicas: Group = None,
    pulse: Pulse | None = None,
) -> nn.Module:
    """Replace every GluExperts inside model by its ExpertParallel; returns model.

    placement maps names of these modules (model.named_modules) to expert_to_rank; those it leaves out lie in blocks.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, GluExperts)}
    unknown = sorted(set(placement or {}) - set(found))
    if unknown:
        raise ValueError(f"placement must name GluExperts of the model ({', '.join(found)}), got {unknown[0]}")
    for name, module in found.items():
        parent, _, last = name.rpartition(".")
        if not last:
            raise ValueError("model must hold GluExperts, got GluExperts themselves (ExpertParallel(experts, group))")
        where = (placement or {}).get(name)
        setattr(model.get_submodule(parent), last, ExpertParallel(module, group, where, gradients, replicas, pulse))
    return model


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that differs from rank to rank: what DDP and FSDP2 must leave alone.

    fully_shard(model, ignored_params=set(expert_parameters(model).values())); for DDP set
    model._ddp_params_and_buffers_to_ignore = list(expert_parameters(model)) before it is wrapped.
    """
    return {
        f"{name}.{key}" if name else key: parameter
        for name, module in model.named_modules()
        if isinstance(module, ExpertParallel)
        for key, parameter in module.named_parameters()
    }


def process_group(group: Group) -> dist.ProcessGroup | None:
    """Of a mesh of one dimension its group."""
    expect((dist.ProcessGroup, DeviceMesh, type(None)), group=group)
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group must be a mesh of one dimension (mesh['ep']), got {group.ndim}")
        return group.get_group()
    return group


def _part(experts: GluExperts, ids: list[int]) -> GluExperts:
    """Of these experts those with the ids, in memory of their own."""
    with torch.device("meta"):
        part = GluExperts(
            len(ids), experts.hidden, experts.intermediate, experts.activation,
            experts.down_proj_bias is not None, experts.layout,
        )  # fmt: skip
    for name, parameter in experts.named_parameters():
        part.register_parameter(name, nn.Parameter(parameter.detach()[ids], requires_grad=parameter.requires_grad))
    return part.train(experts.training)
