"""Feed-forward experts, gated or not, over the fused operator."""

import torch
from torch import Tensor, nn

from moert.experts.base import Experts
from moert.ops.fused_experts import fused_experts, fused_experts_onto
from moert.ops.kinds import expect
from moert.pages import in_large_pages
from moert.types import Activation, ExpertLayout, Onto, Routing


class GluExperts(Experts):
    """num_experts feed-forward networks of one shape; parameters have Hugging Face's names and layout.

    gate_up_proj [E, 2I, H], down_proj [E, H, I] (see ExpertLayout; I rows where the activation is not gated), and
    with bias gate_up_proj_bias [E, 2I], down_proj_bias [E, H].  Initialised like nn.Linear.
    """

    fuses_onto = True

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        intermediate: int,
        activation: str | Activation = "swiglu",
        bias: bool = False,
        layout: ExpertLayout = ExpertLayout(),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, size in (("num_experts", num_experts), ("hidden", hidden), ("intermediate", intermediate)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        expect(ExpertLayout, layout=layout)
        self.num_experts, self.hidden, self.intermediate = num_experts, hidden, intermediate
        self.activation = Activation.of(activation)
        self.layout = layout
        width = 2 * intermediate if self.activation.gated else intermediate

        def parameter(*shape):
            return nn.Parameter(in_large_pages(torch.empty(num_experts, *shape, device=device, dtype=dtype)))

        self.gate_up_proj = parameter(hidden, width) if layout.transposed else parameter(width, hidden)
        self.down_proj = parameter(intermediate, hidden) if layout.transposed else parameter(hidden, intermediate)
        self.gate_up_proj_bias = parameter(width) if bias else None
        self.down_proj_bias = parameter(hidden) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        pairs = (
            (self.gate_up_proj, self.gate_up_proj_bias, self.hidden),
            (self.down_proj, self.down_proj_bias, self.intermediate),
        )
        for weight, bias, fan_in in pairs:
            for parameter in (weight, bias):
                if parameter is not None:
                    nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)

    def forward(self, x: Tensor, routing: Routing, onto: Onto | None = None) -> Tensor:
        weights, bias = (self.gate_up_proj, self.down_proj), (self.gate_up_proj_bias, self.down_proj_bias)
        if onto is None:
            return fused_experts(x, routing, *weights, bias, self.activation, self.layout)
        return fused_experts_onto(x, routing, *weights, onto, bias, self.activation, self.layout)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden={self.hidden}, intermediate={self.intermediate}, "
            f"activation={self.activation.name}, bias={self.down_proj_bias is not None}"
        )
