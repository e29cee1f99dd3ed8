"""The feed-forward network that every token goes through: dense layers, shared experts."""

import torch
from torch import Tensor, nn

from moert.ops.fused_experts import apply_activation
from moert.types import Activation


class FeedForward(nn.Module):
    """x [..., H] -> [..., H]; gate_proj (where the activation is gated), up_proj and down_proj as in Hugging Face."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        activation: str | Activation = "swiglu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.activation = Activation.of(activation)
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(hidden, intermediate, **options) if self.activation.gated else None
        self.up_proj = nn.Linear(hidden, intermediate, **options)
        self.down_proj = nn.Linear(intermediate, hidden, **options)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up_proj(x)
        if self.gate_proj is not None:
            h = torch.cat([self.gate_proj(x), h], -1)
        return self.down_proj(apply_activation(h, self.activation))
