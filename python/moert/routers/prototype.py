"""The router of ProMoE (arXiv:2510.24711): tokens go to the prototypes nearest in angle, those without a label apart.

Letters: N routed experts; D samples, as context.cu_seqlens bounds them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moert.ops.expert_choice import expert_choice
from moert.ops.gating import SCORES, topk_gating
from moert.routers.base import Router, RouterContext
from moert.routers.documents import document_of_token, tokens_per_document
from moert.routers.linear import wide_dtype
from moert.types import Routing


class PrototypeRouter(Router):
    """Cosines of x and prototypes [N, H], in float32; the k largest scores are the weights, not renormalised.

    With uncond_expert expert N, the last, takes every token that context.conditional [T] says has no label, once and
    with weight 1.  score "identity" weighs by the cosine itself, which may be negative.
    In training losses["rcl"], the contrastive loss, draws each prototype to the mean of its tokens and away from the
    means of the others; rcl_topk counts all k choices of a token, not the first alone, and rcl_detach_tokens keeps the
    gradient from x.  Every parameter is in the graph, also of a batch that has no token for it.
    """

    wide = ("prototypes", "logit_bias")

    def __init__(
        self,
        hidden: int,
        num_routed: int,
        k: int = 1,
        score: str = "identity",
        uncond_expert: bool = True,
        rcl_coef: float = 1.0,
        rcl_tau: float = 0.07,
        rcl_topk: bool = True,
        mode: str = "token",
        rcl_detach_tokens: bool = False,
        logit_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        wide = wide_dtype(dtype)
        super().__init__(num_routed + bool(uncond_expert), logit_bias, device, wide)
        if not 1 <= k <= num_routed:
            raise ValueError(f"k must be in [1, num_routed={num_routed}], got {k}")
        if score not in ("identity", "sigmoid", "softmax"):
            raise ValueError(f"score must be identity, sigmoid or softmax, got {score}")
        if mode not in ("token", "expert"):
            raise ValueError(f"mode must be token or expert, got {mode}")
        self.hidden, self.num_routed, self.k, self.score = hidden, num_routed, k, score
        self.uncond_expert, self.mode = uncond_expert, mode
        self.rcl_coef, self.rcl_tau, self.rcl_topk, self.rcl_detach_tokens = (
            rcl_coef,
            rcl_tau,
            rcl_topk,
            rcl_detach_tokens,
        )
        self.prototypes = nn.Parameter(torch.empty(num_routed, hidden, device=device, dtype=wide))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.prototypes, std=0.02)
        if self.logit_bias is not None:
            nn.init.zeros_(self.logit_bias)

    def forward(self, x: Tensor, context: RouterContext | None = None) -> Routing:
        context = context or RouterContext()
        if self.uncond_expert and context.conditional is None:
            raise ValueError("context.conditional must be given with uncond_expert, got None")
        N = self.num_routed
        cosine_TN = self._cosine(x, context)
        labelled = torch.ones(len(x), dtype=torch.bool, device=x.device)
        if self.uncond_expert:
            labelled = context.conditional.reshape(-1).bool()
        counted = labelled if context.mask is None else labelled & context.counted()
        if self.mode == "token":
            weights, ids = topk_gating(cosine_TN, self.k, self.score)
            sample, D = torch.zeros_like(counted, dtype=torch.int64), 1
            members = torch.where(counted[:, None], ids if self.rcl_topk else ids[:, :1], N)
        else:
            sample, D = document_of_token(context.cu_seqlens, len(x), x.device)
            weights, ids = self._choose(cosine_TN, torch.where(counted, sample, -1), D)
            members = ids
        losses = {"rcl": self._contrast(x, members, sample, D)} if self.training and self.rcl_coef else {}
        ids = torch.where(labelled[:, None] & (ids < N), ids, self.num_experts)
        if self.uncond_expert:
            alone = ~labelled[:, None] & (torch.arange(ids.shape[1], device=x.device) == 0)
            ids = torch.where(alone, N, ids)
            weights = torch.where(alone, 1, torch.where(labelled[:, None], weights, 0))
        return Routing(ids, weights, self.num_experts, cosine_TN, losses)

    def _cosine(self, x: Tensor, context: RouterContext) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            cosine_TN = F.normalize(x.to(self.prototypes.dtype), dim=-1) @ F.normalize(self.prototypes, dim=-1).T
        # The bias has an entry for every expert, the last included, which is not chosen by score.
        return self.biased(F.pad(cosine_TN, (0, self.num_experts - self.num_routed)), context)[:, : self.num_routed]

    def _choose(self, cosine_TN: Tensor, sample: Tensor, D: int) -> tuple[Tensor, Tensor]:
        """Expert choice: each expert takes the share k / N of every sample's tokens, at least one."""
        capacity = (tokens_per_document(sample, D) * self.k // self.num_routed).clamp_min(1)
        capacity = capacity[:, None].expand(D, self.num_routed)
        return expert_choice(SCORES[self.score](cosine_TN), sample, capacity)[:2]

    def _contrast(self, x: Tensor, members: Tensor, sample: Tensor, D: int) -> Tensor:
        """Cross entropy between prototypes and their members' mean, by sample; ids from N on are no members."""
        N = self.num_routed
        x = (x.detach() if self.rcl_detach_tokens else x).to(self.prototypes.dtype)
        bins = torch.where(members < N, sample[:, None] * N + members, D * N).flatten()
        rows = x[:, None].expand(-1, members.shape[1], -1).flatten(0, 1)
        total = x.new_zeros(D * N + 1, self.hidden).index_add(0, bins, rows)[: D * N].view(D, N, self.hidden)
        count = x.new_zeros(D * N + 1).index_add(0, bins, torch.ones_like(bins, dtype=x.dtype))[: D * N].view(D, N)
        # The direction of the sum is that of the mean.
        s_DEF = F.normalize(self.prototypes, dim=-1) @ F.normalize(total, dim=-1).mT / self.rcl_tau
        used = count > 0
        s_DEF = s_DEF.masked_fill(~used[:, None], torch.finfo(s_DEF.dtype).min)
        each = s_DEF.logsumexp(-1) - s_DEF.diagonal(dim1=-2, dim2=-1)
        number = used.sum(-1)
        loss_D = torch.where(used, each, 0).sum(-1) / number.clamp_min(1)
        samples = (number > 0).sum().clamp_min(1)
        return self.rcl_coef * torch.where(number > 1, loss_D, 0).sum() / samples

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, num_routed={self.num_routed}, k={self.k}, score={self.score}, mode={self.mode}"
