"""Graph of Tokens (arXiv:2505.00792): a token's routing is mixed with that of tokens like it, or that it attends to.

Letters: N tokens of one sequence, D hidden, h heads.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moert.ops.gating import topk_gating
from moert.routers.base import RouterContext
from moert.routers.linear import LinearRouter
from moert.routers.ranks import gating
from moert.types import Routing

ROWS = 512  # of the similarity matrix at a time


@dataclass(frozen=True)
class Tokens:
    """The tokens of B sequences so far: p [T, E]; where they are compared, their rows x [T, D]; mask [T] or None.

    Sequence b owns rows ends[b] .. ends[b + 1] - 1.  As Routing.state and context.state it is the routing cache of a
    causal model's decode: the tokens of a call come after those of its state, sequence by sequence.
    """

    p: Tensor
    ends: tuple[int, ...]
    x: Tensor | None = None
    mask: Tensor | None = None

    def parts(self) -> list[slice]:
        return [slice(first, last) for first, last in zip(self.ends, self.ends[1:], strict=False)]

    def followed_by(self, other: "Tokens") -> "Tokens":
        mine, theirs = self.parts(), other.parts()
        if len(mine) != len(theirs):
            raise ValueError(f"context.state must have {len(theirs)} sequences, got {len(mine)}")

        def join(before: Tensor, after: Tensor) -> Tensor:
            return torch.cat([part for a, b in zip(mine, theirs, strict=True) for part in (before[a], after[b])])

        mask = None
        if self.mask is not None or other.mask is not None:
            mask = join(
                *(t.p.new_ones(len(t.p), dtype=torch.bool) if t.mask is None else t.mask for t in (self, other))
            )
        ends = tuple(a + b for a, b in zip(self.ends, other.ends, strict=True))
        return Tokens(join(self.p, other.p), ends, None if self.x is None else join(self.x, other.x), mask)


class MixedRouter(LinearRouter):
    """p = softmax(W x + b), r = S p with S row-stochastic within a sequence, then the k best experts by r.

    mixed "topk" keeps of each p the k best, renormalised, before they are mixed.  Routing.logits are log r, and
    routing.state the Tokens with what was mixed, to be the context.state of the tokens that follow (continued_routers
    does it inside a model).
    """

    reads_ranks = True

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        k: int = 2,
        renorm: bool = True,
        balance_coef: float = 0.0,
        mixed: str = "all",
        logit_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden, num_experts, logit_bias, torch.float32, device, dtype)
        if not 1 <= k <= num_experts:
            raise ValueError(f"k must be in [1, {num_experts}], got {k}")
        if mixed not in ("all", "topk"):
            raise ValueError(f"mixed must be all or topk, got {mixed}")
        self.k, self.renorm, self.balance_coef, self.mixed = k, renorm, balance_coef, mixed
        self.bias = nn.Parameter(torch.zeros(num_experts, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.bias)

    @property
    def weight_is_one(self) -> bool:
        return self.k == 1 and self.renorm

    def probabilities(self, x: Tensor, context: RouterContext) -> Tensor:
        logits_TE = self.logits(x, context) + self.bias
        if self.mixed == "all":
            return logits_TE.softmax(-1)
        weights, ids = topk_gating(logits_TE, self.k, "softmax_over_topk")
        return Routing(ids, weights, self.num_experts).dense_weights()

    def chosen(self, r_TE: Tensor, tokens: Tokens, context: RouterContext) -> Routing:
        """Softmax of log r is r, so the gating operator and the loss take them as they are."""
        logits = r_TE.clamp_min(torch.finfo(r_TE.dtype).tiny).log()
        weights, ids = gating(logits, self.k, context, renormalize=self.renorm)
        routing = Routing(ids, weights, self.num_experts, logits, state=tokens)
        return self.balanced(routing, context)


class SimilarityRouter(MixedRouter):
    """S = softmax over the tokens of a sequence of similarity / tau; x [T, D], sequences are context.cu_seqlens.

    sim "bilinear": u_i W_s u_j / sqrt(D), W_s starts as the identity, tau 1; "cosine": without parameters, tau 0.3.
    causal: only tokens before count, and the token itself.  Tokens outside context.mask are nobody's neighbours.
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
        new = Tokens(p_TE, _ends(context, len(x)), u_TD, context.counted())
        keys = _after(context, new)
        mixed = []
        for own, all_of_it in zip(new.parts(), keys.parts(), strict=True):
            mask = None if keys.mask is None else keys.mask[all_of_it]
            mixed.append(self._mix(u_TD[own], keys.x[all_of_it], keys.p[all_of_it], mask))
        return self.chosen(torch.cat(mixed) if mixed else p_TE, keys, context)

    def _mix(self, u: Tensor, keys: Tensor, p: Tensor, mask: Tensor | None) -> Tensor:
        """r of the tokens u, which are the last of the keys."""
        first = len(keys) - len(u)
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


def _after(context: RouterContext, tokens: Tokens) -> Tokens:
    return tokens if context.state is None else context.state.followed_by(tokens)


def _ends(context: RouterContext, T: int) -> tuple[int, ...]:
    """Where the sequences of a call of T tokens begin and end."""
    if context.cu_seqlens is not None:
        return tuple(context.cu_seqlens.tolist())
    if context.mask is not None and context.mask.dim() == 2 and len(context.mask) > 1:
        raise ValueError(
            f"context.cu_seqlens must bound the {len(context.mask)} sequences of context.mask, got None: tokens would "
            "be mixed across them"
        )
    return (0, T)


class AttentionAwareRouter(MixedRouter):
    """S = the attention before this block, averaged over its heads, or (head_mix "learned") with simplex weights.

    context.attention is A [B, h, N, M], after its softmax and before any dropout (rows are renormalised), or a callable
    p [T, E] -> S p such as mix_probs_with_attention makes.  At decode M counts the tokens of context.state as well, and
    a callable is given the p of all of them.  A row that attends to nothing keeps its p.
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
            ends = (0, len(x)) if context.cu_seqlens is None else tuple(context.cu_seqlens.tolist())
            tokens = _after(context, Tokens(p_TE, ends))
            return self.chosen(attention(tokens.p), tokens, context)
        B, _, N, M = attention.shape
        tokens = _after(context, Tokens(p_TE, tuple(b * N for b in range(B + 1))))
        if (len(x), len(tokens.p)) != (B * N, B * M):
            want = f"B * N = T={len(x)} rows and B * M = {len(tokens.p)} columns"
            raise ValueError(f"context.attention must have {want}, got [{B}, {N}, {M}]")
        A = attention.to(p_TE.dtype)
        S = A.mean(1) if self.heads is None else torch.einsum("bhij,h->bij", A, self.heads.to(A.dtype).softmax(0))
        whole = S.sum(-1, keepdim=True)
        mixed = S @ tokens.p.view(B, M, self.num_experts) / torch.where(whole > 0, whole, 1)
        r_BNE = torch.where(whole > 0, mixed, p_TE.view(B, N, self.num_experts))
        return self.chosen(r_BNE.flatten(0, 1), tokens, context)


def mix_probs_with_attention(q: Tensor, k: Tensor, probs: Tensor, causal: bool) -> Tensor:
    """Mean over heads of softmax(q k / sqrt(d)) probs, without a matrix [N, N].

    q [B, h, N, d], k [B, h, M, d], probs [B*M, E] -> [B*N, E] in the dtype of probs: attention whose values are the
    probabilities.  At decode the N queries are the last of M tokens.
    """
    B, h, N, d = q.shape
    M, E = k.shape[2], probs.shape[-1]
    values = probs.view(B, 1, M, E).expand(-1, h, -1, -1)
    # Kernels without the matrix want one width: zeros change neither the products nor the first E columns.
    parts = (F.pad(t.to(probs.dtype), (0, max(d, E) - t.shape[-1])) for t in (q, k, values))
    seen = torch.ones(N, M, dtype=torch.bool, device=q.device).tril(M - N) if causal and N < M else None
    mixed = F.scaled_dot_product_attention(*parts, seen, is_causal=causal and N == M, scale=d**-0.5)
    return mixed.mean(1).flatten(0, 1)[:, :E]


def mixing_statistics(routing: Routing) -> dict[str, Tensor]:
    """What mixing did to the tokens of a call: mean entropy of p and of r, and the share whose best expert changed."""
    tokens: Tokens = routing.state
    r_TE = routing.logits.softmax(-1)
    before = tokens.ends[-1] - len(r_TE)
    if before:
        raise ValueError(f"routing must be of a call without context.state, got {before} tokens before it")

    def entropy(q: Tensor) -> Tensor:
        return torch.special.entr(q).sum(-1).mean()

    flips = (r_TE.argmax(-1) != tokens.p.argmax(-1)).float().mean()
    return {"entropy p": entropy(tokens.p), "entropy r": entropy(r_TE), "flips": flips}
