"""moert's dispatch and combine as an exchange of transformers' expert parallelism: ep_implementation="moert"."""

from collections.abc import Mapping
from os import PathLike

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation

from moert.ops.all_to_all import Splits, all_to_all
from moert.ops.dispatch import combine, dispatch
from moert.ops.expert_map import ExpertMap
from moert.ops.ranks import Ranks, next_layer
from moert.parallel.placed import placed
from moert.placement.expert_placement import ExpertPlacement, PlacedLayer
from moert.types import Routing


class MoertEP(EPImplementation):
    """A token goes once to each rank that has any of its experts; with any implementation of the experts.

    DistributedConfig(ep_implementation="moert") selects it.  Ranks that hold the same batch (tensor parallelism) send
    a part of it each and gather the results.
    """

    def __init__(self, experts: nn.Module, ep_mesh, tp_mesh):
        super().__init__(experts, ep_mesh, tp_mesh)
        self.blocks = ExpertMap.of(None, self.num_local_experts * ep_mesh.size(), ep_mesh.size())
        self.map = self.blocks
        group = ep_mesh.get_group()
        self.ranks = Ranks(group, layer=next_layer(group))
        self.moving = False
        experts.moert_exchange = self

        def in_blocks(*_) -> None:
            self._check_whole()
            if self.map is not self.blocks:
                raise RuntimeError("experts must lie in blocks to be saved or loaded: call place_experts_(model) first")

        experts.register_state_dict_pre_hook(in_blocks)
        experts.register_load_state_dict_pre_hook(in_blocks)

    def _check_whole(self) -> None:
        if self.moving:
            raise RuntimeError("experts must lie where their map says, got a place_experts_ that failed halfway")

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self._check_whole()
        T, parts = len(hidden_states), (hidden_states, top_k_index, top_k_weights)
        if self.tp_mesh.size() == 1:
            return self._own_tokens(*parts)
        y = self._own_tokens(*(self._part(x) for x in parts))
        y = DTensor.from_local(y.contiguous(), self.tp_mesh, [Shard(0)], shape=(T, y.shape[1]), stride=(y.shape[1], 1))
        return y.full_tensor()

    def _part(self, x: Tensor) -> Tensor:
        """This rank's rows of what all ranks of the tensor-parallel group hold; its gradient is gathered from them."""
        whole = DTensor.from_local(x, self.tp_mesh, [Replicate()], run_check=False)
        return whole.redistribute(self.tp_mesh, [Shard(0)]).to_local()

    def _own_tokens(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if weights.dtype != x.dtype:  # as the operators take them beside rows of x's dtype
            weights = weights.to(torch.promote_types(x.dtype, torch.float32))
        there = dispatch(x, Routing(ids, weights, self.map.num_experts), self.map, self.ranks)
        # What has to be computed elsewhere, in the words of transformers' experts: the id after the last.
        ids = there.routing.ids.long()
        ids = torch.where(ids < 0, self.num_local_experts, ids)
        # Under autocast experts may answer in its dtype.
        return combine(self._experts(there.x, ids, there.routing.weights).to(x.dtype), there)

    def _experts(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if len(x):
            return self.experts_forward(x, ids, weights)
        # Not every implementation takes no rows at all; the empty result stays part of the graph.
        none = x.sum(0, keepdim=True), ids.new_full((1, ids.shape[1]), self.num_local_experts)
        return self.experts_forward(*none, weights.new_zeros(1, ids.shape[1]))[:0]


def place_experts_(
    model: nn.Module, placement: Mapping[str, object] | ExpertPlacement | str | PathLike | None = None
) -> nn.Module:
    """Move the experts of a model that ep_implementation="moert" has spread to the ranks of placement; returns model.

    placement is what shard_experts_ takes, without copies, as many experts of a layer on each rank; layers that it
    leaves out, and without one all, lie in blocks.  Only in blocks can they be saved or loaded.  Every rank must call
    it, while parameters have no gradients; what an optimizer knows of them does not move.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m.__dict__.get("moert_exchange"), MoertEP)}
    if not layers:
        raise ValueError(f'model must be spread with ep_implementation="moert", got {type(model).__name__}')
    group = next(iter(layers.values())).moert_exchange.ep_mesh.get_group()
    sizes = {(name,): module.moert_exchange.map.num_experts for name, module in layers.items()}
    ranks, moves = Ranks(group), {}

    def prepare(where: dict[str, object]) -> dict[str, int]:
        """How experts lie now: rows leave by this map on one rank, and come by it on another."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what a forward has left whole is a copy
        for name, module in layers.items():
            exchange = module.moert_exchange
            exchange._check_whole()
            moves[name] = exchange, _even_map(name, where.get(name), exchange), _stacks(name, module)
        return {f"{name} as it lies": module.moert_exchange.map.checksum for name, module in layers.items()}

    placed(placement, lambda: sizes, ranks, prepare)
    for exchange, following, stacks in moves.values():
        exchange.moving = True
        for rows in stacks:
            rows.copy_(_moved(rows, exchange.map, following, ranks))
        exchange.map, exchange.moving = following, False
    return model


def _even_map(name: str, given, exchange: MoertEP) -> ExpertMap:
    if given is None:
        return exchange.blocks
    if isinstance(given, PlacedLayer):
        if given.replicas:
            raise ValueError(f"placement must be without copies of experts, got {len(given.replicas)} of {name}")
        given = given.expert_to_rank
    made = ExpertMap.of(given, exchange.map.num_experts, exchange.map.num_ranks)
    if set(made.held) != {exchange.num_local_experts}:
        asked = f"placement must give every rank {exchange.num_local_experts} experts"
        raise ValueError(f"{asked}, got {', '.join(map(str, made.held))} of {name}")
    return exchange.blocks if made.checksum == exchange.blocks.checksum else made


def _stacks(name: str, experts: nn.Module) -> list[Tensor]:
    """This rank's rows of each parameter, all of which have one for each expert."""
    exchange, stacks = experts.moert_exchange, []
    counts = exchange.map.num_experts, exchange.num_local_experts
    for key, parameter in (*experts.named_parameters(), *experts.named_buffers()):
        if not parameter.dim() or parameter.shape[0] not in counts:
            continue
        if not isinstance(parameter, DTensor):
            raise ValueError(f"experts must be parameters that transformers has spread, got {name}.{key}")
        if parameter.grad is not None:
            raise ValueError(f"gradients of experts must be None while they move, got one of {name}.{key}")
        stacks.append(parameter.detach().to_local())
        if len(stacks[-1]) != exchange.num_local_experts:
            raise ValueError(f"experts must lie whole on each rank of ep, got {name}.{key} cut by FSDP2 as well")
    if not stacks:
        raise ValueError(f"experts must be parameters that transformers has spread, got none in {name}")
    return stacks


def _moved(rows: Tensor, old: ExpertMap, new: ExpertMap, ranks: Ranks) -> Tensor:
    """Rows [n, ...] of the experts that this rank had by the old map -> those that it has by the new one."""
    goes = new.expert_to_rank[old.experts_of(ranks.rank)]
    comes = old.expert_to_rank[new.experts_of(ranks.rank)]
    counts = (torch.bincount(each, minlength=ranks.size).tolist() for each in (goes, comes))
    # Both sides know the others' experts in the order of their ids.
    sent = rows.reshape(len(rows), -1)[goes.argsort(stable=True).to(rows.device)]
    came = all_to_all(sent, Splits(*counts, ranks))
    return came[comes.argsort(stable=True).argsort().to(rows.device)].view_as(rows)
