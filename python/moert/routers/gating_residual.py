"""The router of MoE++ (arXiv:2410.07348): scores of the layer before count, and some experts cost nothing.

Letters: E all experts, feed-forward ones first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moert.routers.base import Router, RouterContext
from moert.routers.capacity import within_capacity
from moert.routers.linear import wide_dtype
from moert.routers.losses import balance_terms
from moert.routers.ranks import gating
from moert.types import Routing, check_kinds

RENORMS = ("released", "paper", "mixtral")
RESIDUAL_INITS = ("linear", "zero")


class GatingResidualRouter(Router):
    """logits = x W^T + (logits of context.previous) Wg^T in float32.

    two_layer puts Linear(H, 8E), tanh, Linear(8E, E) in the place of W.  The logits of the Routing, residual included,
    are what the next layer is given.  renorm "paper": softmax over all, not renormalised; "released": the zero experts'
    weights are dropped and the others divided by their sum; "mixtral": softmax over the k chosen logits.  target_std
    rescales the logits of a token to that deviation, if they differ at all.  Wg starts as a linear layer's weight, as
    released, or at zero (residual_init).  previous is the router of the layer before, if it is known: its number of
    experts must be the same.  In training losses["balance"] = beta * sum of eta_e f_e P_e, where eta is 1 for
    feed-forward experts and tau for the others, and with a capacity_factor each expert keeps the first of its tokens,
    which context.mask counts.
    """

    reads_ranks = True
    wide = ("weight", "hidden_weight", "residual_weight", "logit_bias")

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        k: int = 2,
        kinds: list[str] | None = None,
        two_layer: bool = False,
        renorm: str = "released",
        tau: float = 0.75,
        beta: float = 0.01,
        capacity_factor: float | None = None,
        target_std: float | None = None,
        residual_init: str = "linear",
        previous: Router | None = None,
        logit_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        wide = wide_dtype(dtype)
        super().__init__(num_experts, logit_bias, device, wide)
        kinds = ["ffn"] * num_experts if kinds is None else list(kinds)
        if len(kinds) != num_experts:
            raise ValueError(f"kinds must have num_experts={num_experts} entries, got {len(kinds)}")
        self.num_ffn = check_kinds(kinds)
        if not 1 <= k <= num_experts:
            raise ValueError(f"k must be in [1, num_experts={num_experts}], got {k}")
        if renorm not in RENORMS:
            raise ValueError(f"renorm must be one of {', '.join(RENORMS)}, got {renorm}")
        if residual_init not in RESIDUAL_INITS:
            raise ValueError(f"residual_init must be one of {', '.join(RESIDUAL_INITS)}, got {residual_init}")
        if previous is not None:
            self.check_previous(previous)
        if not tau > 0:
            raise ValueError(f"tau must be above 0, got {tau}")
        self.hidden, self.k, self.kinds, self.renorm = hidden, k, tuple(kinds), renorm
        self.tau, self.beta, self.capacity_factor, self.target_std = tau, beta, capacity_factor, target_std
        self.residual_init = residual_init

        def parameter(*shape):
            return nn.Parameter(torch.empty(*shape, device=device, dtype=wide))

        width = 8 * num_experts if two_layer else hidden
        self.hidden_weight = parameter(width, hidden) if two_layer else None
        self.weight = parameter(num_experts, width)
        self.residual_weight = parameter(num_experts, num_experts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.hidden_weight, self.weight, self.residual_weight):
            if weight is not None:
                nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
        if self.residual_init == "zero":
            nn.init.zeros_(self.residual_weight)
        if self.logit_bias is not None:
            nn.init.zeros_(self.logit_bias)

    def forward(self, x: Tensor, context: RouterContext | None = None) -> Routing:
        context = context or RouterContext()
        logits_TE = self._logits(x, context)
        if self.renorm == "mixtral":
            weights, ids = gating(logits_TE, self.k, context, "softmax_over_topk")
        else:
            weights, ids = gating(logits_TE, self.k, context)
        if self.renorm == "released":
            for e in (e for e, kind in enumerate(self.kinds) if kind == "zero"):
                weights = torch.where(ids == e, 0, weights)
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        routing = Routing(ids, weights, self.num_experts, logits_TE)
        if not self.training:
            return routing
        losses = {"balance": self._balance_loss(routing, context.mask)}
        if self.capacity_factor is not None:
            ids = self._within_capacity(ids, context.counted())
        return Routing(ids, weights, self.num_experts, logits_TE, losses)

    def check_previous(self, before: Router) -> None:
        if before.num_experts != self.num_experts:
            raise ValueError(f"previous must have num_experts={self.num_experts}, got {before.num_experts}")

    @property
    def weight_is_one(self) -> bool:
        return self.k == 1 and self.renorm != "paper"

    def capacity(self, T: int | Tensor) -> Tensor:
        """How many of T tokens each expert takes [E]: tau times as many for a feed-forward expert as for another."""
        one = self.capacity_factor / (self.tau * self.num_ffn + self.num_experts - self.num_ffn)
        ffn = self._is_ffn().double()
        each = one * (self.tau * ffn + 1 - ffn)
        # Less a little, lest the rounding of a product that is whole lifts it to the next integer.
        return torch.ceil(each * T - 1e-6).long()

    def _within_capacity(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return within_capacity(ids, self.capacity(len(ids)))
        # Padding takes nobody's room and keeps its experts.
        kept = within_capacity(torch.where(mask[:, None], ids, self.num_experts), self.capacity(mask.sum()))
        return torch.where(mask[:, None], kept, ids)

    def _is_ffn(self) -> Tensor:
        """[E], made on the device: a copy from the host would wait for it."""
        return torch.arange(self.num_experts, device=self.weight.device) < self.num_ffn

    def _logits(self, x: Tensor, context: RouterContext) -> Tensor:
        previous = context.previous
        x = x.to(self.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if self.hidden_weight is not None:
                x = torch.tanh(F.linear(x, self.hidden_weight))
            logits_TE = self.biased(F.linear(x, self.weight), context)
            if previous is not None:
                before = None if previous.logits is None else list(previous.logits.shape)
                if before != list(logits_TE.shape):
                    raise ValueError(f"context.previous.logits must have shape {list(logits_TE.shape)}, got {before}")
                logits_TE = logits_TE + F.linear(previous.logits.to(x.dtype), self.residual_weight)
        if self.target_std is not None:
            # The norm has a gradient of zero where it is zero, and takes no tokens as well.
            spread_TE = logits_TE - logits_TE.mean(-1, keepdim=True)
            std_T1 = spread_TE.norm(dim=-1, keepdim=True) / max(1, self.num_experts - 1) ** 0.5
            logits_TE = logits_TE * (self.target_std / torch.where(std_T1 > 0, std_T1, self.target_std))
        return logits_TE

    def _balance_loss(self, routing: Routing, mask: Tensor | None) -> Tensor:
        load, mean, _ = balance_terms(routing, routing.logits.softmax(-1), mask)
        return self.beta * (torch.where(self._is_ffn(), 1, self.tau) * load * mean).sum()

    def extra_repr(self) -> str:
        return (
            f"hidden={self.hidden}, num_experts={self.num_experts}, k={self.k}, num_ffn={self.num_ffn}, tau={self.tau}"
        )
