"""moert's dispatch and combine as an exchange of transformers' expert parallelism: ep_implementation="moert"."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation

from moert.ops.dispatch import combine, dispatch
from moert.ops.expert_map import ExpertMap
from moert.types import Routing


class MoertEP(EPImplementation):
    """A token goes once to each rank that has any of its experts; with any implementation of the experts.

    DistributedConfig(ep_implementation="moert") selects it.  Ranks that hold the same batch (tensor parallelism) send
    a part of it each and gather the results.
    """

    def __init__(self, experts: nn.Module, ep_mesh, tp_mesh):
        super().__init__(experts, ep_mesh, tp_mesh)
        self.map = ExpertMap.of(None, self.num_local_experts * ep_mesh.size(), ep_mesh.size())

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
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
        there = dispatch(x, Routing(ids, weights, self.map.num_experts), self.map, self.ep_mesh.get_group())
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
