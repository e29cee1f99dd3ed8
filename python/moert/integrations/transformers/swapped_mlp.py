"""The forwards that swap_ gives to experts which are modules of their own (Switch Transformers, NLLB-MoE)."""

import torch
from torch import Tensor, nn

from moert.integrations.transformers.gates import activation_name, untouched
from moert.integrations.transformers.stacked import Stacked, stack
from moert.ops.fused_experts import fused_experts
from moert.ops.grouped_gemm import grouped_gemm
from moert.ops.permute import permute_plan, unpermute
from moert.types import DispatchPlan, Routing


class MlpExperts(Stacked):
    """E modules of two linear layers, called `linears`, with `act` and `dropout` between them."""

    linears: tuple[str, str]

    def experts(self) -> list[nn.Module]:
        return [self[f"expert_{e}"] for e in range(self.num_experts)]

    def stacks(self) -> list[list[Tensor]]:
        layers = [[getattr(expert, name) for expert in self.experts()] for name in self.linears]
        weights, biases = ([[getattr(layer, kind) for layer in row] for row in layers] for kind in ("weight", "bias"))
        return weights + [bias for bias in biases if bias[0] is not None]

    def weights(self, ids: Tensor) -> list[Tensor]:
        """Both weights as [E, ...], then both biases where there are any; gradients go to the experts in ids."""
        return [stack(params, ids) for params in self.stacks()]

    def activation(self) -> str | None:
        """What lies between the layers; None where an expert is not what its class makes it, or they differ."""
        experts = self.experts()
        names = {activation_name(expert.act) for expert in experts}
        return names.pop() if len(names) == 1 and all(map(self._is_as_made, experts)) else None

    def _is_as_made(self, expert: nn.Module) -> bool:
        layers = [expert._modules[name] for name in self.linears]
        return (
            all(type(layer) is nn.Linear and untouched(layer) for layer in layers)
            and layers[0].weight.dtype == layers[1].weight.dtype
            and type(expert.dropout) is nn.Dropout
            and untouched(expert.dropout)
            and untouched(expert)
        )

    def drops_out(self) -> bool:
        return any(expert.dropout.training and expert.dropout.p > 0 for expert in self.experts())


class SwitchTransformersExperts(MlpExperts):
    linears = ("wi", "wo")

    def forward(self, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
        """selected_experts [T, 1, E] is one-hot, or zero where the expert was over its capacity."""
        activation = self.activation()
        if activation is None:
            return super().forward(hidden_states, selected_experts, routing_weights)
        chosen = selected_experts.bool()
        ids = chosen.int().argmax(-1).masked_fill(~chosen.any(-1), self.num_experts)
        routing = Routing(ids, routing_weights, self.num_experts)
        if self.drops_out():
            return self._with_dropout(hidden_states, routing)
        return fused_experts(hidden_states, routing, *self.weights(ids), activation=activation)

    def _with_dropout(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        w1, w2 = self.weights(routing.ids)
        plan = permute_plan(routing.ids, routing.num_experts)
        act = self.experts()[0].act
        h_SI = act(grouped_gemm(hidden_states, w1, plan.offsets, tokens=plan.tokens))
        h_SI = h_SI * self._noise(h_SI, plan)
        return unpermute(grouped_gemm(h_SI, w2, plan.offsets), plan, routing.weights)

    def _noise(self, h_SI: Tensor, plan: DispatchPlan) -> Tensor:
        """What dropout multiplies with, drawn expert by expert, so that every number is the one eager draws."""
        ends = plan.offsets.tolist()
        ones = torch.ones_like(h_SI)
        pieces = [
            expert.dropout(ones[start:end])
            for expert, start, end in zip(self.experts(), ends[:-1], ends[1:], strict=True)
            if start < end
        ]
        return torch.cat([*pieces, ones[ends[-1] :]])


class NllbMoeExperts(MlpExperts):
    linears = ("fc1", "fc2")

    def forward(self, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor) -> Tensor:
        """router_mask [T, E] holds the expert that computes for router_probs [T, E], most of which are zero."""
        activation = self.activation()
        token_dropout = self.moe_token_dropout > 0 and self.training
        if activation is None or self.drops_out() or token_dropout:
            return super().forward(hidden_states, router_mask, router_probs)
        # A weight is zero where the router chose nothing or dropped the choice; the router lets no gradient through.
        ids = router_mask.masked_fill(router_probs == 0, self.num_experts)
        weights = router_probs * (1 - self.moe_token_dropout)
        w1, w2, *bias = self.weights(router_mask)
        return fused_experts(hidden_states, Routing(ids, weights, self.num_experts), w1, w2, tuple(bias), activation)
