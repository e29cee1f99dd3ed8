"""The forwards that swap_ gives to experts which are modules of their own (Switch Transformers, NLLB-MoE).

What a forward checks and stacks it does for the experts that were chosen only: of 128 experts a token meets one or two.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moert.integrations.transformers.gates import activation_name, untouched
from moert.integrations.transformers.stacked import Stacked, stack
from moert.ops.fused_experts import fused_experts
from moert.ops.grouped_gemm import grouped_gemm
from moert.ops.permute import plan_of, unpermute
from moert.types import DispatchPlan, Routing


class MlpExperts(Stacked):
    """E modules of two linear layers, called `linears`, with `act` and `dropout` between them."""

    linears: tuple[str, str]
    has_bias: bool

    def expert(self, e: int) -> nn.Module:
        return self._modules[f"expert_{e}"]

    def stacks(self) -> list[list[nn.Parameter]]:
        return [[param(e) for e in range(self.num_experts)] for param in self._params()]

    def weights(self, chosen: Sequence[int]) -> list[Tensor]:
        """Both weights as [E, ...], then both biases where there are any."""
        return [stack(param, self.num_experts, chosen) for param in self._params()]

    def _params(self) -> list[Callable[[int], nn.Parameter]]:
        kinds = ("weight", "bias") if self.has_bias else ("weight",)
        return [
            lambda e, linear=linear, kind=kind: self.expert(e)._modules[linear]._parameters[kind]
            for kind in kinds
            for linear in self.linears
        ]

    def chosen(self, ids: Tensor) -> Sequence[int]:
        """The experts in ids; all of them under torch.compile, which does not know the ids."""
        if torch.compiler.is_compiling():
            return range(self.num_experts)
        return [e for e in ids.unique().tolist() if 0 <= e < self.num_experts]

    def activation(self, chosen: Sequence[int]) -> str | None:
        """What lies between the layers; None where an expert is not what its class makes it, or they differ."""
        experts = [self.expert(e) for e in chosen]
        names = {activation_name(expert.act) for expert in experts}
        return names.pop() if len(names) == 1 and all(map(self._is_as_made, experts)) else None

    def _is_as_made(self, expert: nn.Module) -> bool:
        first, second, dropout = (expert._modules[name] for name in (*self.linears, "dropout"))
        return (
            (type(first), type(second), type(dropout)) == (nn.Linear, nn.Linear, nn.Dropout)
            and first.weight.dtype == second.weight.dtype
            and all(map(untouched, (expert, first, second, dropout)))
        )

    def drops_out(self, chosen: Sequence[int]) -> bool:
        dropouts = [self.expert(e).dropout for e in chosen]
        return any(dropout.training and dropout.p > 0 for dropout in dropouts)


class SwitchTransformersExperts(MlpExperts):
    linears, has_bias = ("wi", "wo"), False

    def forward(self, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
        """selected_experts [T, 1, E] is one-hot, or zero where the expert was over its capacity."""
        one_hot = selected_experts.bool()
        ids = one_hot.int().argmax(-1).masked_fill(~one_hot.any(-1), self.num_experts)
        chosen, routing = self.chosen(ids), Routing(ids, routing_weights, self.num_experts)
        activation = self.activation(chosen)
        if activation is None:
            return super().forward(hidden_states, selected_experts, routing_weights)
        if self.drops_out(chosen):
            y = self._with_dropout(hidden_states, routing, chosen)
        else:
            y = fused_experts(hidden_states, routing, *self.weights(chosen), activation=activation)
        return y.to(hidden_states.dtype)

    def _with_dropout(self, hidden_states: Tensor, routing: Routing, chosen: Sequence[int]) -> Tensor:
        w1, w2 = self.weights(chosen)
        plan = plan_of(routing)
        act = self.expert(chosen[0]).act
        h_SI = act(grouped_gemm(hidden_states, w1, plan.offsets, tokens=plan.tokens))
        y_SH = grouped_gemm(h_SI * self._noise(h_SI, plan), w2, plan.offsets)
        return unpermute(y_SH, plan, routing.weights)

    def _noise(self, h_SI: Tensor, plan: DispatchPlan) -> Tensor:
        """What dropout multiplies with, drawn expert by expert, so that every number is the one eager draws."""
        ends, ones = plan.offsets.tolist(), torch.ones_like(h_SI)
        spans = zip(range(self.num_experts), ends[:-1], ends[1:], strict=True)
        drawn = [self.expert(e).dropout(ones[start:end]) for e, start, end in spans if start < end]
        return torch.cat([*drawn, ones[ends[-1] :]])


class NllbMoeExperts(MlpExperts):
    linears, has_bias = ("fc1", "fc2"), True

    def forward(self, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor) -> Tensor:
        """router_mask [T, E] holds the expert that computes for each of router_probs [T, E], of which two are not zero.

        Of the others the router lets no gradient through, so that they need not be computed.
        """
        chosen = self.chosen(router_mask)
        activation = self.activation(chosen)
        if activation is None or self.drops_out(chosen) or (self.training and self.moe_token_dropout > 0):
            return super().forward(hidden_states, router_mask, router_probs)
        weights, columns = router_probs.topk(min(2, self.num_experts), dim=-1)
        ids = router_mask.gather(1, columns).masked_fill(weights == 0, self.num_experts)
        routing = Routing(ids, weights * (1 - self.moe_token_dropout), self.num_experts)
        w1, w2, *bias = self.weights(chosen)
        y = fused_experts(hidden_states, routing, w1, w2, tuple(bias), activation)
        return y.to(hidden_states.dtype)
