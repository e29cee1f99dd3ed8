"""Experts of transformers' experts interface as calibration reads them (moert.quant.calibration)."""

from torch import Tensor, nn

from moert.experts.quantized import gates_first
from moert.integrations.transformers.gates import fused_activation
from moert.integrations.transformers.quantized import quantized_, weight_names
from moert.ops.fused_experts import apply_activation
from moert.quant.float_experts import FloatExperts, Packed, PackFormat


class FloatHfExperts(FloatExperts):
    """An experts module of transformers; matrices have their gate rows first where fused_experts knows the gate."""

    def __init__(self, module: nn.Module, fmt: PackFormat, precision: str):
        self.module, self.format, self.precision = module, fmt, precision
        self.names = weight_names(module)
        self.fused = None if module.has_post_expert_norm else fused_activation(module)
        weights = (getattr(module, name) for name in self.names)
        self.shapes = tuple(w.mT.shape if module.is_transposed else w.shape for w in weights)

    def inputs(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_states, top_k_index

    def matrix(self, place: int, e: int) -> Tensor:
        w = getattr(self.module, self.names[place]).detach()[e].float()
        w = w.mT if self.module.is_transposed else w
        return gates_first(w, 0) if place == 0 and self._mixed else w

    def middle(self, h: Tensor, e: int) -> Tensor:
        if self.module.has_bias:
            bias = getattr(self.module, f"{self.names[0]}_bias").detach()[e].float()
            h = h + (gates_first(bias, 0) if self._mixed else bias)
        if self.fused is not None:
            return apply_activation(h, self.fused[0])
        h = h.to(getattr(self.module, self.names[1]).dtype)  # the class's own gate may have parameters
        return (self.module._apply_gate(h) if self.module.has_gate else self.module.act_fn(h)).float()

    def replace(self, packed: tuple[Packed, Packed]) -> None:
        quantized_(self.module, self.format, self.precision)
        for place, weight in zip(("w1", "w2"), packed, strict=True):
            self.module.hold_(place, weight)

    @property
    def _mixed(self) -> bool:
        return self.fused is not None and self.fused[1]
