"""SMoE-Dropout's router: random, frozen, with a number of experts that changes in training (arXiv:2303.01610)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moert.routers.base import Router, RouterContext
from moert.routers.ranks import gating
from moert.types import Routing


class FrozenRandomRouter(Router):
    """The k best experts of x @ weight.T + bias, weighted by the softmax of the k logits; nothing in it is trained.

    weight [E, H] and bias [E] are buffers, drawn as nn.Linear draws its own, from `seed` if given (give each layer
    another).  All ranks of a process group hold rank 0's.  k may be set at any time between forward and forward:
    KSchedule and set_active_experts do.
    """

    reads_ranks = True

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        k: int,
        seed: int | None = None,
        logit_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_experts, logit_bias, device, dtype)
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        self.hidden, self.k = hidden, k
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        # Drawn in float32 on the CPU, so that a seed gives the same router everywhere.
        drawn = torch.rand(num_experts, hidden + 1, generator=generator, device="cpu", dtype=torch.float32)
        drawn = ((2 * drawn - 1) * hidden**-0.5).to(device=device, dtype=dtype or torch.get_default_dtype())
        if dist.is_available() and dist.is_initialized() and not drawn.is_meta:
            dist.broadcast(drawn, src=0)
        self.register_buffer("weight", drawn[:, :hidden].clone())
        self.register_buffer("bias", drawn[:, hidden].clone())

    @property
    def k(self) -> int:
        return self._k

    @k.setter
    def k(self, k: int) -> None:
        if not 1 <= k <= self.num_experts:
            raise ValueError(f"k must be in [1, {self.num_experts}], got {k}")
        self._k = k

    def forward(self, x: Tensor, context: RouterContext | None = None) -> Routing:
        logits_TE = self.biased(F.linear(x, self.weight, self.bias), context)
        weights, ids = gating(logits_TE, self.k, context, "softmax_over_topk")
        return Routing(ids, weights, self.num_experts, logits_TE)

    @property
    def weight_is_one(self) -> bool:
        return self.k == 1

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, num_experts={self.num_experts}, k={self.k}"
