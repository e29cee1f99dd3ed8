"""The dense-to-sparse gate (EvoMoE, arXiv:2112.14397), also with an activation before the softmax (2401.13875)."""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moert.ops.gating import topk_gating
from moert.routers.base import RouterContext
from moert.routers.linear import LinearRouter, wide_dtype
from moert.types import Routing

ACTS = {"identity": lambda z: z, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu": F.gelu}
BIASES = ("outside", "inside")


def gumbel(like: Tensor) -> Tensor:
    """Standard Gumbel noise in the shape of `like`, finite."""
    return -torch.log(-torch.log(torch.rand_like(like).clamp(1e-9, 1 - 1e-7)))


class DenseToSparseRouter(LinearRouter):
    """softmax((act(x W^T) + b + noise) / tau): every expert above threshold is used, fewer and fewer as tau falls.

    tau goes linearly from tau[0] to tau[1] in total_steps; the step is context.step, else what set_step was given.
    The k_min best experts are always used; the weights are not renormalised.  granularity "batch" gives all tokens the
    same number of experts, the mean number above threshold.  In evaluation the k_min best without noise, softmax over
    these.  bias "inside" is act(x W^T + b), for the bias of the context too.  learn_tau makes log tau a parameter
    instead.  Everything is float32.
    """

    wide = ("weight", "logit_bias", "log_tau")

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        k_min: int = 1,
        act: str = "identity",
        threshold: float = 1e-3,
        tau: tuple[float, float] = (2.0, 0.3),
        total_steps: int = 10_000,
        gumbel: bool = True,
        granularity: str = "token",
        learn_tau: bool = False,
        bias: str = "outside",
        logit_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        wide = wide_dtype(dtype)
        super().__init__(hidden, num_experts, logit_bias, torch.float32, device, wide)
        if not 1 <= k_min <= num_experts:
            raise ValueError(f"k_min must be in [1, num_experts={num_experts}], got {k_min}")
        if act not in ACTS:
            raise ValueError(f"act must be one of {', '.join(ACTS)}, got {act}")
        if min(tau) <= 0:
            raise ValueError(f"tau must be above 0, got {tau}")
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        if granularity not in ("token", "batch"):
            raise ValueError(f"granularity must be token or batch, got {granularity}")
        if bias not in BIASES:
            raise ValueError(f"bias must be one of {', '.join(BIASES)}, got {bias}")
        if learn_tau and act == "identity":
            warnings.warn("learn_tau with act identity: tau and the weights scale each other away", stacklevel=2)
        self.k_min, self.act, self.threshold, self.bias = k_min, act, threshold, bias
        self.tau_range, self.total_steps, self.gumbel, self.granularity = tau, total_steps, gumbel, granularity
        self.log_tau = nn.Parameter(torch.empty((), device=device, dtype=wide)) if learn_tau else None
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.log_tau is not None:
            nn.init.constant_(self.log_tau, math.log(self.tau_range[0]))

    def set_step(self, step: int) -> None:
        self.step.fill_(step)

    def tau(self, step: int | Tensor | None = None) -> Tensor:
        """The temperature at a step, 0-dimensional; never below 0.001."""
        if self.log_tau is not None:
            return self.log_tau.exp().clamp_min(1e-3)
        step = self.step if step is None else torch.as_tensor(step, device=self.step.device)
        done = step.clamp(0, self.total_steps).to(self.weight.dtype) / self.total_steps
        start, end = self.tau_range
        return torch.lerp(torch.full_like(done, start), torch.full_like(done, end), done).clamp_min(1e-3)

    def forward(self, x: Tensor, context: RouterContext | None = None) -> Routing:
        act, z_TE = ACTS[self.act], self.unbiased_logits(x)
        z_TE = act(self.biased(z_TE, context)) if self.bias == "inside" else self.biased(act(z_TE), context)
        tau = self.tau(None if context is None else context.step)
        if not self.training:
            weights, ids = topk_gating(z_TE, self.k_min, "softmax_over_topk")
            return Routing(ids, weights, self.num_experts, z_TE / tau)
        logits_TE = (z_TE + gumbel(z_TE) if self.gumbel else z_TE) / tau
        weights, ids = topk_gating(logits_TE, self.num_experts)
        # Weights fall along a row: the experts in use are the first ones.
        above = weights > self.threshold
        place = torch.arange(self.num_experts, device=ids.device)
        if self.granularity == "batch":
            above = place < above.sum() // max(1, len(x))
        used = above | (place < self.k_min)
        return Routing(torch.where(used, ids, self.num_experts), weights, self.num_experts, logits_TE)

    @property
    def weight_is_one(self) -> bool:
        return self.k_min == 1 and not self.training

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, num_experts={self.num_experts}, k_min={self.k_min}, act={self.act}"
