"""The forward of every experts class of transformers' experts interface.  Letters as in moert.types."""

import torch
from torch import Tensor, nn

from moert.integrations.transformers import lora
from moert.integrations.transformers.gates import fused_activation
from moert.ops.autocast import autocast_dtype
from moert.ops.fused_experts import fused_experts
from moert.ops.grouped_gemm import grouped_gemm
from moert.ops.permute import plan_of, unpermute
from moert.types import ExpertLayout, Routing


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states [T, H], top_k_index [T, k] of any integer dtype, top_k_weights [T, k] -> [T, H].

    Fused where the class's gate is known, else grouped_gemm, the class's own gate, grouped_gemm.  Ids outside [0, E)
    are dropped: the sentinels of expert parallelism, and negative ids.
    """
    w1 = "gate_up_proj" if self.has_gate else "up_proj"
    w2 = lora.weight(self, "down_proj")  # read once: a parametrization makes it anew each time
    routing = Routing(top_k_index, _weights(top_k_weights, autocast_dtype(w2)), w2.shape[0])
    fused = fused_activation(self)
    if fused is None or self.has_post_expert_norm or lora.adapts(self):
        y = _unfused(self, hidden_states, routing, w1)
    else:
        activation, interleaved = fused
        x, weight1, weight2, *bias = _cast(hidden_states, lora.weight(self, w1), w2, *_biases(self, w1))
        layout = ExpertLayout(transposed=self.is_transposed, interleaved=interleaved)
        y = fused_experts(x, routing, weight1, weight2, tuple(bias), activation, layout)
    return y.to(hidden_states.dtype)


def prepackable(self: nn.Module) -> tuple[str, str, ExpertLayout] | None:
    """What moert.prepack_ asks: the names of the two weights and their layout; None where they are not fused."""
    w1, w2 = ("gate_up_proj" if self.has_gate else "up_proj"), "down_proj"
    fused = fused_activation(self)
    in_parameters = w1 in self._parameters and w2 in self._parameters
    if fused is None or self.has_post_expert_norm or lora.adapts(self) or not in_parameters:
        return None
    return w1, w2, ExpertLayout(self.is_transposed, fused[1])


def fp8_experts_forward(self: nn.Module, *args, **kwargs) -> Tensor:
    raise RuntimeError(
        'experts_implementation must be "grouped_mm", "batched_mm" or "eager" for a checkpoint of float8 experts, got '
        '"moert" (or load it with FineGrainedFP8Config(dequantize=True))'
    )


def _unfused(self: nn.Module, hidden_states: Tensor, routing: Routing, w1: str) -> Tensor:
    """Each step on its own, in slots: GEMM, the class's gate, GEMM, the class's norm, weighted sum over the choices."""
    b1, b2 = _biases(self, w1)
    plan = plan_of(routing)
    h_SI = _linear(self, w1, hidden_states, plan.offsets, b1, tokens=plan.tokens)
    h_SI = self._apply_gate(h_SI) if self.has_gate else self.act_fn(h_SI)
    y_SH = _linear(self, "down_proj", h_SI, plan.offsets, b2)
    if self.has_post_expert_norm:
        y_SH = self.post_expert_norm(y_SH)
    return unpermute(y_SH, plan, routing.weights)


def _linear(self: nn.Module, name: str, x: Tensor, offsets: Tensor, bias: Tensor | None, tokens=None) -> Tensor:
    """x through the weight called name, and through the low-rank adapters on it: W x + sum of scaling * B (A x)."""
    transposed = self.is_transposed
    x, weight, bias = _cast(x, lora.weight(self, name), bias)
    y = grouped_gemm(x, weight, offsets, bias, tokens, transposed=transposed)
    for lhs, rhs, scaling in lora.factors(self, name):
        # The adapter's delta is lhs @ rhs in the layout of the weight, so the factor next to x comes first.
        near, far = _cast(x, *((lhs, rhs) if transposed else (rhs, lhs)))[1:]
        low = grouped_gemm(x, near, offsets, tokens=tokens, transposed=transposed)
        y = y + scaling * grouped_gemm(low, far, offsets, transposed=transposed)
    return y


def _biases(self: nn.Module, w1: str) -> tuple[Tensor | None, Tensor | None]:
    return (getattr(self, f"{w1}_bias"), self.down_proj_bias) if self.has_bias else (None, None)


def _cast(x: Tensor, weight: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """All in the dtype in which torch would multiply: autocast's, else the weight's (as transformers' grouped_mm)."""
    dtype = autocast_dtype(weight)
    return [None if tensor is None else tensor.to(dtype) for tensor in (x, weight, *others)]


def _weights(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """As the operators take them beside rows of this dtype: in the same, or in float32 (float64 for float64)."""
    return weights if weights.dtype == dtype else weights.to(torch.promote_types(dtype, torch.float32))
