"""What routers share whose logits are a linear layer of x."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moert.routers.base import Router, RouterContext


def wide_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """What a router keeps that must not lose precision: float32, float64 in a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class LinearRouter(Router):
    """logits = x @ weight.T + biases in logits_dtype (None: that of x); weight [E, H] as in Hugging Face."""

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        logit_bias: bool = False,
        logits_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_experts, logit_bias, device, dtype)
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        self.hidden, self.logits_dtype = hidden, logits_dtype
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -(self.hidden**-0.5), self.hidden**-0.5)
        if self.logit_bias is not None:
            nn.init.zeros_(self.logit_bias)

    def unbiased_logits(self, x: Tensor) -> Tensor:
        """x @ weight.T, also under autocast in logits_dtype where there is one."""
        if self.logits_dtype is None:
            return F.linear(x, self.weight)
        dtype = torch.promote_types(x.dtype, self.logits_dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))

    def logits(self, x: Tensor, context: RouterContext | None) -> Tensor:
        """x [T, H] -> logits [T, E], biases included."""
        return self.biased(self.unbiased_logits(x), context)
