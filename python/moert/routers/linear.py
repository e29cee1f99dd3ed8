"""What routers share whose logits are a linear layer of x."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moert.routers.base import Router, RouterContext
from moert.routers.losses import load_balance_loss
from moert.types import Routing


def wide_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """What a router keeps that must not lose precision: float32, float64 in a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class LinearRouter(Router):
    """logits = x @ weight.T + biases in logits_dtype (None: that of x); weight [E, H] as in Hugging Face.

    inner is the width of a layer with GELU before it: logits = gelu(x @ inner_weight.T) @ weight.T, weight [E, inner].
    """

    balance_coef = 0.0

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        logit_bias: bool = False,
        logits_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        inner: int | None = None,
    ):
        super().__init__(num_experts, logit_bias, device, dtype)
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        if inner is not None and inner < 1:
            raise ValueError(f"inner must be at least 1, got {inner}")
        self.hidden, self.logits_dtype = hidden, logits_dtype
        options = {"device": device, "dtype": dtype}
        self.inner_weight = None if inner is None else nn.Parameter(torch.empty(inner, hidden, **options))
        self.weight = nn.Parameter(torch.empty(num_experts, hidden if inner is None else inner, **options))

    def reset_parameters(self) -> None:
        for weight in (self.weight, self.inner_weight):
            if weight is not None:
                nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
        if self.logit_bias is not None:
            nn.init.zeros_(self.logit_bias)

    def unbiased_logits(self, x: Tensor) -> Tensor:
        """The logits before any bias, also under autocast in logits_dtype where there is one."""
        if x.shape[-1] != self.hidden:
            raise ValueError(f"x must be [T, {self.hidden}], got {list(x.shape)}")
        if self.logits_dtype is None:
            return self._linear(x, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return self._linear(x, torch.promote_types(x.dtype, self.logits_dtype))

    def logits(self, x: Tensor, context: RouterContext | None) -> Tensor:
        """x [T, H] -> logits [T, E], biases included."""
        return self.biased(self.unbiased_logits(x), context)

    def balanced(self, routing: Routing, context: RouterContext) -> Routing:
        """In training with losses["balance"], balance_coef times the Switch loss, unless balance_coef is 0."""
        if not (self.training and self.balance_coef):
            return routing
        return replace(routing, losses={"balance": self.balance_coef * load_balance_loss(routing, context.mask)})

    def _linear(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.to(dtype)
        if self.inner_weight is not None:
            x = F.gelu(F.linear(x, self.inner_weight.to(dtype)))
        return F.linear(x, self.weight.to(dtype))
