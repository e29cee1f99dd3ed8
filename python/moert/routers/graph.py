"""Graph of Tokens (arXiv:2505.00792): a token's routing is mixed with that of tokens like it, or that it attends to.

Letters: N tokens of one sequence, D hidden, h heads.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moert.ops.gating import topk_gating
from moert.routers.base import RouterContext
from moert.routers.linear import LinearRouter
from moert.routers.losses import balance_terms
from moert.types import Routing

ROWS = 512  # of the similarity matrix at a time


class MixedRouter(LinearRouter):
    """p = softmax(W x + b), r = S p with S row-stochastic within a sequence, then the k best experts by r.

    Routing.logits are log r; state is p [T, E], which a causal model's decode keeps (see SimilarityRouter).
    """

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        k: int = 2,
        renorm: bool = True,
        balance_coef: float = 0.0,
        logit_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden, num_experts, logit_bias, torch.float32, device, dtype)
        if not 1 <= k <= num_experts:
            raise ValueError(f"k must be in [1, {num_experts}], got {k}")
        self.k, self.renorm, self.balance_coef = k, renorm, balance_coef
        self.bias = nn.Parameter(torch.zeros(num_experts, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.bias)

    def probabilities(self, x: Tensor, context: RouterContext) -> Tensor:
        return (self.logits(x, context) + self.bias).softmax(-1)

    def chosen(self, p_TE: Tensor, r_TE: Tensor, context: RouterContext) -> Routing:
        """Softmax of log r is r, so the gating operator takes them as they are."""
        logits = r_TE.clamp_min(torch.finfo(r_TE.dtype).tiny).log()
        weights, ids = topk_gating(logits, self.k, "softmax", renormalize=self.renorm)
        routing = Routing(ids, weights, self.num_experts, logits, state=p_TE)
        if self.training and self.balance_coef:
            load, mean, _ = balance_terms(routing, r_TE, context.mask)
            routing = replace(routing, losses={"balance": self.balance_coef * self.num_experts * (load * mean).sum()})
        return routing


class SimilarityRouter(MixedRouter):
    """S = softmax over the tokens of a sequence of similarity / tau; x [T, D], sequences are context.cu_seqlens.

    sim "bilinear": u_i W_s u_j / sqrt(D), W_s starts as the identity, tau 1; "cosine": without parameters, tau 0.3.
    causal: only tokens before count, and the token itself.  Tokens outside context.mask are nobody's neighbours.
    At decode context.state holds (past x, past p) of one sequence, and routing.state the p to append.
    """

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        k: int = 2,
        sim: str = "bilinear",
        tau: float | None = None,
        causal: bool = False,
        renorm: bool = True,
        **options,
    ):
        super().__init__(hidden, num_experts, k, renorm, **options)
        if sim not in ("bilinear", "cosine"):
            raise ValueError(f"sim must be bilinear or cosine, got {sim}")
        if tau is not None and tau <= 0:
            raise ValueError(f"tau must be above 0, got {tau}")
        self.sim, self.causal = sim, causal
        self.tau = (1.0 if sim == "bilinear" else 0.3) if tau is None else tau
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.similarity = nn.Parameter(torch.eye(hidden, **like)) if sim == "bilinear" else None

    def forward(self, x: Tensor, context: RouterContext | None = None) -> Routing:
        context = context or RouterContext()
        p_TE = self.probabilities(x, context)
        u_TD = x.to(p_TE.dtype)
        if self.sim == "cosine":
            u_TD = F.normalize(u_TD, dim=-1)
        if context.state is not None:
            past_x, past_p = context.state
            keys = past_x.to(p_TE.dtype) if self.sim == "bilinear" else F.normalize(past_x.to(p_TE.dtype), dim=-1)
            first = len(past_x)
            r_TE = self._mix(u_TD, torch.cat([keys, u_TD]), torch.cat([past_p, p_TE]), None, first)
            return self.chosen(p_TE, r_TE, context)
        ends = [0, len(x)] if context.cu_seqlens is None else context.cu_seqlens.tolist()
        mask = None if context.mask is None else context.mask.reshape(-1).bool()
        parts = [slice(first, last) for first, last in zip(ends, ends[1:], strict=False)]
        mixed = [self._mix(u_TD[s], u_TD[s], p_TE[s], None if mask is None else mask[s], 0) for s in parts]
        return self.chosen(p_TE, torch.cat(mixed) if mixed else p_TE, context)

    def _mix(self, u: Tensor, keys: Tensor, p: Tensor, mask: Tensor | None, first: int) -> Tensor:
        """r of the tokens u, which stand at first, first + 1, … among the keys."""
        if self.similarity is not None:
            keys = keys @ self.similarity.to(u.dtype).T / self.hidden**0.5
        out = []
        for i in range(0, len(u), ROWS):
            scores = u[i : i + ROWS] @ keys.T / self.tau
            at = first + i + torch.arange(len(scores), device=u.device)[:, None]
            j = torch.arange(len(keys), device=u.device)
            seen = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
            if self.causal:
                seen = seen & (j <= at)
            # Whom nobody may influence keeps its own distribution.
            seen = seen | (~seen.any(-1, keepdim=True) & (j == at))
            out.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ p)
        return torch.cat(out) if out else p[:0]


class AttentionAwareRouter(MixedRouter):
    """S = the attention before this block, averaged over its heads, or (head_mix "learned") with simplex weights.

    context.attention is A [B, h, N, N], after its softmax and before any dropout (rows are renormalised), or a callable
    p [T, E] -> S p such as mix_probs_with_attention makes.  A row that attends to nothing keeps its p.
    """

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        k: int = 2,
        heads: int | None = None,
        head_mix: str = "mean",
        renorm: bool = True,
        **options,
    ):
        super().__init__(hidden, num_experts, k, renorm, **options)
        if head_mix not in ("mean", "learned"):
            raise ValueError(f"head_mix must be mean or learned, got {head_mix}")
        if head_mix == "learned" and heads is None:
            raise ValueError("heads must be a number for head_mix learned, got None")
        self.heads = nn.Parameter(torch.zeros(heads, device=self.weight.device)) if head_mix == "learned" else None

    def forward(self, x: Tensor, context: RouterContext | None = None) -> Routing:
        context = context or RouterContext()
        p_TE = self.probabilities(x, context)
        attention = context.attention
        if attention is None:
            raise ValueError("context.attention must be a tensor or a callable, got None")
        if callable(attention):
            return self.chosen(p_TE, attention(p_TE), context)
        B, _, N, _ = attention.shape
        if len(x) != B * N:
            raise ValueError(f"context.attention must have B * N = T={len(x)} tokens, got {B} * {N}")
        A = attention.to(p_TE.dtype)
        S = A.mean(1) if self.heads is None else torch.einsum("bhij,h->bij", A, self.heads.to(A.dtype).softmax(0))
        whole = S.sum(-1, keepdim=True)
        p_BNE = p_TE.view(B, N, -1)
        r_BNE = torch.where(whole > 0, S @ p_BNE / torch.where(whole > 0, whole, 1), p_BNE)
        return self.chosen(p_TE, r_BNE.flatten(0, 1), context)


def mix_probs_with_attention(q: Tensor, k: Tensor, probs: Tensor, causal: bool) -> Tensor:
    """Mean over heads of softmax(q k / sqrt(d)) probs, without a matrix [N, N].

    q, k [B, h, N, d], probs [B*N, E] -> [B*N, E] in the dtype of probs: attention whose values are the probabilities.
    """
    B, h, N, d = q.shape
    E = probs.shape[-1]
    values = probs.view(B, 1, N, E).expand(-1, h, -1, -1)
    # Kernels without the matrix want one width: zeros change neither the products nor the first E columns.
    parts = (F.pad(t.to(probs.dtype), (0, max(d, E) - t.shape[-1])) for t in (q, k, values))
    mixed = F.scaled_dot_product_attention(*parts, is_causal=causal, scale=d**-0.5)
    return mixed.mean(1).flatten(0, 1)[:, :E]
