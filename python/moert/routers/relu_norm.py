"""BlockFFN's router: ReLU, then RMSNorm, so that each token decides how many experts it uses (arXiv:2507.08771).

Its two losses make consecutive tokens use the same experts, so that a chunk of tokens needs few weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moert.routers.base import RouterContext
from moert.routers.chunks import chunks_of, same_document
from moert.routers.linear import LinearRouter
from moert.types import Routing


class ReLUNormRouter(LinearRouter):
    """weights [T, E] = gain * RMSNorm(ReLU(x @ weight.T)); an expert whose ReLU is zero is off (id E).

    In training, losses["al"] and losses["cs"] are activation_locality_loss and chunk_sparsity_loss times their
    coefficients, which may be changed at any time; a coefficient of zero leaves its loss out.  Rows are one document
    unless the context has cu_seqlens.  Nothing limits the number of experts of a token: ids are [T, E].
    """

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        eps: float = 1e-5,
        al_coef: float = 2e-3,
        al_steep: float = 100.0,
        cs_coef: float = 5e-2,
        chunk: int = 64,
        al_detach_target: bool = False,
        logit_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden, num_experts, logit_bias, None, device, dtype)
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        if al_steep <= 0:
            raise ValueError(f"al_steep must be positive, got {al_steep}")
        self.eps, self.chunk = eps, chunk
        self.al_coef, self.al_steep, self.al_detach_target, self.cs_coef = al_coef, al_steep, al_detach_target, cs_coef
        self.gain = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.gain)

    def forward(self, x: Tensor, context: RouterContext | None = None) -> Routing:
        logits_TE = self.logits(x, context)
        if logits_TE.dtype != torch.float64:
            logits_TE = logits_TE.float()
        on_TE = logits_TE.relu()
        weights_TE = F.rms_norm(on_TE, (self.num_experts,), self.gain.to(on_TE.dtype), self.eps)
        every = torch.arange(self.num_experts, device=x.device, dtype=torch.int32)
        ids_TE = torch.where(on_TE > 0, every, self.num_experts)
        losses = self._losses(logits_TE, on_TE, context or RouterContext()) if self.training else {}
        return Routing(ids_TE, weights_TE, self.num_experts, logits_TE, losses)

    def _losses(self, logits: Tensor, on: Tensor, context: RouterContext) -> dict[str, Tensor]:
        where = (context.cu_seqlens, context.counted())
        losses = {}
        if self.al_coef:
            steep = (self.al_steep, self.al_detach_target)
            losses["al"] = self.al_coef * activation_locality_loss(logits, *where, *steep)
        if self.cs_coef:
            losses["cs"] = self.cs_coef * chunk_sparsity_loss(on, self.chunk, *where)
        return losses

    def extra_repr(self) -> str:
        return (
            f"hidden={self.hidden}, num_experts={self.num_experts}, al_coef={self.al_coef}, cs_coef={self.cs_coef}, "
            f"chunk={self.chunk}"
        )


def activation_locality_loss(
    logits: Tensor,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    steep: float = 100.0,
    detach_target: bool = False,
) -> Tensor:
    """Mean cross-entropy between sigmoid(steep * logits) of a token and of its left neighbour in the same document.

    logits [T, E] -> scalar, 0 where there are no neighbours.  The token is the target; both sides carry gradient, as
    in the published training code, unless detach_target.
    """
    if len(logits) < 2:
        return logits.sum() * 0
    pair = same_document(len(logits), cu_seqlens, logits.device)
    if mask is not None:
        pair = pair & mask[1:] & mask[:-1]
    left, target = steep * logits[:-1], (steep * logits[1:]).sigmoid()
    if detach_target:
        target = target.detach()
    # BCE with logits, spelled out: its gradient by the target is needed as well.
    entropy = (F.softplus(left) - left * target).mean(-1)
    return torch.where(pair, entropy, 0).sum() / pair.sum().clamp_min(1)


def chunk_sparsity_loss(
    on: Tensor, chunk: int, cu_seqlens: Tensor | None = None, mask: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Mean over chunks and experts of the "probability" that the expert fires in the chunk: 1 - product of (1 - p).

    on [T, E] are the router's activations before normalisation, p their share in the token's sum; tokens outside the
    mask have p = 0.  A chunk is `chunk` tokens of a document or what is left at its end -> scalar, 0 without tokens.
    """
    p = on / (on.sum(-1, keepdim=True) + eps)
    if mask is not None:
        p = p * mask[:, None]
    index, most, count = chunks_of(len(on), chunk, cu_seqlens, on.device)
    silent = p.new_zeros(most, p.shape[1]).index_add(0, index, torch.log(1 - p + eps)).exp()
    # Rows beyond the last chunk are 1: no expert fires in them.
    return (1 - silent).sum() / (count * p.shape[1]).clamp_min(1)
