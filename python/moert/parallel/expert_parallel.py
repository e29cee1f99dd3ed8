"""Expert parallelism: each rank of a group holds some of the experts, and tokens travel to them."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from moert.experts.base import Experts, check_added
from moert.experts.glu import GluExperts
from moert.ops.all_to_all import Splits, agree, refusing
from moert.ops.autocast import autocast
from moert.ops.dispatch import FACTS, Dispatched, dispatch, ranks_compare, start_combine
from moert.ops.kinds import expect
from moert.ops.rank_capacity import Capacity
from moert.ops.ranks import Ranks, next_layer
from moert.ops.roll_call import roll_call
from moert.parallel.copies import Copies
from moert.parallel.options import (
    OPTIONS,
    among_replicas,
    check_local_size,
    check_options,
    options_of,
    replicas_of,
    telling,
)
from moert.parallel.placed import placed
from moert.parallel.pulse import Group, Pulse, process_group
from moert.types import Onto, Routing

if TYPE_CHECKING:
    from moert.placement import ExpertPlacement


class Traffic(NamedTuple):
    """Rows that this rank sent to each rank of the group and got from each, its own included, in one call."""

    sent: list[int]
    received: list[int]


class ExpertParallel(Experts):
    """This rank's part of `experts`, which every rank of the group makes alike: same results as all of them here.

    placement is expert_to_rank [E], any sequence of integers (None: contiguous blocks), or a PlacedLayer, whose
    replicas are copies of experts on further ranks, trained as one; every rank must hold an expert.  local are the
    GluExperts that this rank holds, expert_ids which they are; the others are gone.  Every rank of the group must call
    forward, and backward where it called forward, equally often; each with tokens of its own, or none.  The same
    parameters must be frozen on every rank.

    The experts' gradients are those of the sum of the ranks' losses, as in one process with everybody's tokens; with
    gradients="mean" of their mean, as DistributedDataParallel and FSDP2 have it for the rest of a model.  replicas is
    the group of ranks that hold the same experts (the data axis of a mesh), over which gradients are added up too; they
    make their layers alike.  Where a rank is lost the others raise an error that names the ranks that are silent;
    pulse, of the same group, tells those that are gone from those that are late.

    degree: into how many parts the tokens of a call are cut, the experts at work on one while the next and the last
    travel (Tutel, arXiv 2206.03382).  payload and capacity (of each part) are those of moert.ops.dispatch; dropped is
    how many of this rank's rows the last call had to drop [], None without a capacity.  local_size: of how many ranks
    each node is, to send rows in two levels (Ranks.in_nodes); None: straight.  traffic is what the last call sent and
    got, None in a compiled graph; nothing is exchanged to know it.
    """

    def __init__(
        self,
        experts: GluExperts,
        group: Group = None,
        placement=None,
        gradients: str = "sum",
        replicas: Group = None,
        pulse: Pulse | None = None,
        degree: int = 1,
        payload: str | None = None,
        capacity: Capacity | None = None,
        local_size: int | None = None,
    ):
        super().__init__()
        self.group = process_group(group)
        self.ranks = Ranks(self.group, None if pulse is None else pulse.exchanging)
        with refusing(self.ranks, OPTIONS):
            others = replicas_of(self.group, replicas)
            with telling(others):
                check_options(experts, gradients, degree, payload, capacity)
                check_local_size(local_size, self.ranks.size)
                at = experts.num_experts, self.ranks.size, self.ranks.rank, local_size
                self.copies = Copies.placed(placement, *at)
                chosen = local_size, gradients, others, capacity, degree, payload, self.copies.map.checksum
                facts = options_of(experts, *chosen)
            if others is not None:
                agree(among_replicas(facts, self.copies.expert_ids), others)
        agree(facts, self.ranks)
        self.map, self.replicas = self.copies.map, others and others.group
        layer = next_layer(self.group)
        self.ranks = replace(self.ranks, layer=layer)
        if local_size is not None:
            self.ranks = Ranks.in_nodes(local_size, self.group, self.ranks.guard, layer)
        self.num_experts, self.gradients, self.degree = experts.num_experts, gradients, degree
        self.payload, self.capacity = payload, capacity
        self.dropped: Tensor | None = None
        self.traffic: Traffic | None = None
        self.expert_ids = self.copies.expert_ids
        self.local = _part(experts, self.expert_ids)
        self.parts = (others.size if others else 1) * self.map.num_ranks if gradients == "mean" else 1

    def forward(self, x: Tensor, routing: Routing, added: Onto | nn.Module | None = None) -> Tensor:
        """Plus what an Onto adds, or what shared experts make of x, which compute while the tokens travel."""
        # Sums over ranks of torch's own have no order among the exchanges of a graph: ranks could wait for each other.
        if self.copies.num_shared or self.replicas is not None:
            return self._outside_graphs(x, routing, added)
        return self._run(x, routing, added)

    @torch.compiler.disable
    def _outside_graphs(self, x: Tensor, routing: Routing, added: Onto | nn.Module | None) -> Tensor:
        return self._run(x, routing, added)

    def _run(self, x: Tensor, routing: Routing, added: Onto | nn.Module | None) -> Tensor:
        shared, given = isinstance(added, nn.Module), x
        onto = added if isinstance(added, Onto) else Onto()
        # Where nothing is compared nobody listens to what goes wrong here.
        with refusing(self.ranks, FACTS) if ranks_compare(x, self.capacity, self.ranks) else nullcontext():
            expect(Tensor, x=x)
            expect(Routing, routing=routing)
            expect((Onto, nn.Module, type(None)), added=added)
            check_added(onto.rows, x)
            # Under autocast rows travel in the dtype in which the experts multiply them.
            x, rows, constants = autocast(x, onto.rows, onto.constants)
            # Nothing overlaps in a graph; a capacity is that of each part.
            degree = 1 if torch.compiler.is_compiling() and self.capacity is None else self.degree
            parts = _cut(x, self.copies.routed(routing), degree)
            self.dropped, self.traffic = None, None
        plain = onto.scale is None and onto.mix is None
        there = self._dispatch(parts, 0, shared or len(parts) > 1)
        if shared:
            try:
                rows = added(given)
                check_added(rows, x)
                _, rows = autocast(x, rows)
            finally:
                there.wait()
        returning, local = [], self._local()
        for following in range(1, len(parts) + 1):
            here, there = there, self._dispatch(parts, following, True) if following < len(parts) else None
            returning.append(start_combine(local(here.wait()), here, asynchronous=len(parts) > 1))
        residuals = rows.tensor_split(len(parts)) if plain and rows is not None else [None] * len(parts)
        y = [back.wait(residual) for back, residual in zip(returning, residuals, strict=True)]
        y = y[0] if len(y) == 1 else torch.cat(y)
        return y if plain else replace(onto, rows=rows, constants=constants).added_to(y)

    def _dispatch(self, parts: list[tuple[Tensor, Routing]], number: int, asynchronous: bool) -> Dispatched:
        options = asynchronous, self.payload, self.capacity, len(parts)
        there = dispatch(*parts[number], self.map, self.ranks, *options)
        if there.dropped is not None:
            self.dropped = there.dropped if self.dropped is None else self.dropped + there.dropped
        if isinstance(there.splits, Splits):
            self.traffic = _added(self.traffic, Traffic(there.splits.sent, there.splits.received))
        return there

    def onto(self, x: Tensor, routing: Routing, onto: Onto) -> Tensor:
        return self(x, routing, onto)

    def beside(self, x: Tensor, routing: Routing, shared: nn.Module) -> Tensor:
        return self(x, routing, shared)

    def _local(self) -> Callable[[Dispatched], Tensor]:
        """The experts of a call, whose gradients are reduced once for all its parts."""
        weights = self._own()
        return lambda there: functional_call(self.local, weights, (there.x, there.routing))

    def _own(self) -> dict[str, Tensor]:
        """This rank's parameters, with what becomes of their gradients."""
        own = dict(self.local.named_parameters())
        if self.parts == 1 and self.replicas is None and not self.copies.num_shared:
            return own
        return {name: _Reduced.apply(p, self) for name, p in own.items()}

    def extra_repr(self) -> str:
        ranks = f"num_experts={self.num_experts}, num_ranks={self.map.num_ranks}, gradients={self.gradients}"
        copies = self.map.num_experts - self.num_experts
        return f"{ranks}, copies={copies}, degree={self.degree}, payload={self.payload}, capacity={self.capacity}"


def _added(before: Traffic | None, part: Traffic) -> Traffic:
    if before is None:
        return part
    return Traffic(*([a + b for a, b in zip(*both, strict=True)] for both in zip(before, part, strict=True)))


def _cut(x: Tensor, routing: Routing, degree: int) -> list[tuple[Tensor, Routing]]:
    """Parts of nearly as many tokens each; on every rank as many parts, some of them without tokens."""
    if degree == 1:
        return [(x, routing)]
    cut = zip(
        x.tensor_split(degree), routing.ids.tensor_split(degree), routing.weights.tensor_split(degree), strict=True
    )
    return [(rows, Routing(ids, weights, routing.num_experts)) for rows, ids, weights in cut]


def shard_experts_(
    model: nn.Module,
    group: Group = None,
    placement: "Mapping[str, object] | ExpertPlacement | str | PathLike | None" = None,
    **options,
) -> nn.Module:
    """Replace every GluExperts inside model by its ExpertParallel, whose options these are; returns model.

    placement maps names of these modules (model.named_modules) to expert_to_rank or a PlacedLayer, or is an
    ExpertPlacement, or the path of its file; modules it leaves out lie in blocks.  A module that has several names in
    the model stays one, and placement has one of them.  Every rank of the group must call this: where a placement does
    not fit on one rank, or is another one there, all raise an error.
    """
    names: dict[GluExperts, list[str]] = {}

    def sizes() -> dict[tuple[str, ...], int]:
        before.enter_context(telling(replicas_of(group, options.get("replicas"))))  # what it raises the group is told
        names.update(_to_shard(model))
        return {tuple(each): module.num_experts for module, each in names.items()}

    pulse, group = options.get("pulse"), process_group(group)
    with ExitStack() as before:
        where = placed(placement, sizes, Ranks(group, None if pulse is None else pulse.exchanging))
    for module, (first, *others) in names.items():
        spread = ExpertParallel(module, group, where.get(first), **options)
        for name in (first, *others):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, spread)
    return model


def _to_shard(model: nn.Module) -> dict[GluExperts, list[str]]:
    """Each of the model's experts with its names."""
    modules = list(model.named_modules(remove_duplicate=False))
    found = {name: module for name, module in modules if isinstance(module, GluExperts)}
    sharded = tuple(f"{name}." if name else "" for name, module in modules if isinstance(module, ExpertParallel))
    again = [name for name in found if name.startswith(sharded)]
    if again:
        raise ValueError(f"model must hold GluExperts that are not sharded already, got {again[0]}")
    if not found:
        raise ValueError(f"model must hold GluExperts, got none in {type(model).__name__}")
    if "" in found:
        raise ValueError("model must hold GluExperts, got GluExperts themselves (ExpertParallel(experts, group))")
    return {module: [name for name in found if found[name] is module] for module in found.values()}


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


class _Reduced(torch.autograd.Function):
    """A parameter as it is; its gradient added up over copies and replicas, and divided by parts.

    In the graph: hooks would be lost with the parameter that load_state_dict(assign=True) or to_empty replaces.
    """

    @staticmethod
    def forward(ctx, parameter, spread):
        ctx.spread = spread
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        spread = ctx.spread
        if spread.copies.num_shared:
            with spread.ranks.guarded():
                grad = spread.copies.add_up(grad, spread.group)
        if spread.replicas is not None:
            grad = grad.contiguous().clone()
            with roll_call(spread.replicas):
                dist.all_reduce(grad, group=spread.replicas)
        return grad / spread.parts, None


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
