"""The forwards that swap_ gives to blocks outside transformers' experts interface.  Letters as in moert.types.

Routers stay transformers' own and are called as before, so jitter, capacities, recorded logits and hooks are theirs.
Where a part of a block is not what its class makes it (an adapter, a quantized layer, a hook, an unknown activation),
the block runs the forward that it had: `super().forward`.
"""

import torch
from torch import Tensor, nn

from moert.integrations.transformers.experts import experts_forward
from moert.integrations.transformers.gates import glu_name, untouched
from moert.integrations.transformers.stacked import Stacked, stack
from moert.ops.fused_experts import fused_experts
from moert.ops.grouped_gemm import grouped_gemm
from moert.ops.permute import permute_plan, unpermute
from moert.types import ExpertLayout, Routing


class DbrxExperts:
    """w1, v1 (gate and up) and w2 lie apart as [E*I, H], so the gate is three grouped GEMMs, not one operator."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if not _owns(self.mlp, "w1", "v1", "w2"):
            return super().forward(hidden_states, top_k_index, top_k_weights)
        E, H = self.num_experts, self.hidden_size
        w1, v1, w2 = (w.view(E, -1, H) for w in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
        plan, x_TH = permute_plan(top_k_index, E), hidden_states.reshape(-1, H)
        gate, up = (grouped_gemm(x_TH, w, plan.offsets, tokens=plan.tokens) for w in (w1, v1))
        y_SH = grouped_gemm(self.mlp.activation_fn(gate) * up, w2, plan.offsets, transposed=True)
        y_TH = unpermute(y_SH, plan, top_k_weights).to(hidden_states.dtype)
        return y_TH.view(hidden_states.shape[0], -1, H)


class JetMoeParallelExperts:
    """One linear layer per expert over rows that are sorted already: mixture of attention, and of unknown gates."""

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:
        ends = torch.tensor([0, *expert_size], device=inputs.device).cumsum(0)
        return grouped_gemm(inputs, self.weight, ends.int())


class JetMoeMoE:
    def forward(self, layer_input: Tensor) -> Tensor:
        activation, linears = glu_name(self.activation), (self.input_linear, self.output_linear)
        if activation is None or not all(_owns(linear, "weight") for linear in linears):
            return super().forward(layer_input)
        x_TH = layer_input.reshape(-1, self.input_size)
        routing = _unsorted(self.router(x_TH), len(x_TH), self.router.num_experts)
        y_TH = fused_experts(x_TH, routing, *(linear.weight for linear in linears), activation=activation)
        return y_TH.view(layer_input.shape) + self.bias


def _unsorted(routed: tuple, tokens: int, num_experts: int) -> Routing:
    """The routing of JetMoE's router, which gives its T*k choices sorted by expert."""
    order, _, weights_S, expert_size, _ = routed
    experts = torch.arange(num_experts, device=order.device)
    ids_S = experts.repeat_interleave(torch.tensor(expert_size, device=order.device), output_size=len(order))
    ids, weights = (torch.zeros_like(v).index_copy(0, order, v).view(tokens, -1) for v in (ids_S, weights_S))
    return Routing(ids, weights, num_experts)


class Llama4TextMoe:
    """The routing weight scales the input of an expert, and eager feeds zeros to all others."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        experts = self.experts
        activation = glu_name(experts.act_fn) if _owns(experts, "gate_up_proj", "down_proj") else None
        if activation is None:
            return super().forward(hidden_states)
        x_TH = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(x_TH)
        # Scores are sigmoids, and 0 for who is not chosen: should a chosen one round to 0 too, either adds nothing.
        chosen, ids = scores.topk(self.top_k, dim=1)
        routing = Routing(ids, chosen, self.num_experts)
        weights, layout = (experts.gate_up_proj, experts.down_proj), ExpertLayout(transposed=True)
        y_TH = fused_experts(x_TH, routing, *weights, activation=activation, layout=layout, scale_on="input")
        return self.shared_expert(x_TH) + y_TH, logits


class LongcatFlashExperts:
    """Experts from num_routed_experts on are the identity: to the operator their ids are sentinels."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        activation = glu_name(self.act_fn)
        if activation is None or self.gate_up_proj is None or not untouched(self.identity_expert):
            return super().forward(hidden_states, top_k_index, top_k_weights)
        E = self.num_routed_experts
        routing = Routing(top_k_index, top_k_weights, E)
        y = fused_experts(hidden_states, routing, self.gate_up_proj[:E], self.down_proj, activation=activation)
        kept = (top_k_weights * (top_k_index >= E)).sum(-1, keepdim=True)
        return (y + hidden_states * kept).to(hidden_states.dtype)


class Step3p7Experts:
    """An experts class of the interface in all but its decorator."""

    has_gate, has_bias, is_transposed, has_post_expert_norm = True, False, False, False
    forward = experts_forward


class VitPoseNaiveMoe(Stacked):
    """One linear layer per expert; a picture's data set chooses the expert of all its patches."""

    def stacks(self) -> list[list[nn.Parameter]]:
        return [[linear.weight for linear in self], [linear.bias for linear in self]]

    def forward(self, hidden_state: Tensor, indices: Tensor) -> Tensor:
        if not all(_is_linear(linear) for linear in self):
            return super().forward(hidden_state, indices)
        weight, bias = (stack(params.__getitem__, len(self)) for params in self.stacks())
        x_TH = hidden_state.flatten(0, 1)
        plan = permute_plan(indices.expand(hidden_state.shape[:2] + (1,)).reshape(-1, 1), len(self))
        y_SH = grouped_gemm(x_TH, weight, plan.offsets, bias, plan.tokens)
        return unpermute(y_SH, plan).view(*hidden_state.shape[:2], -1).to(hidden_state.dtype)


def _owns(module: nn.Module, *names: str) -> bool:
    """Whether the module's parameters are its own, neither parametrized nor wrapped, and its call has no hooks."""
    return untouched(module) and all(module._parameters.get(name) is not None for name in names)


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and untouched(module)
