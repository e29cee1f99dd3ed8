"""The router of most models: a linear layer, a score, the k best experts."""

import torch
from torch import Tensor, nn

from moert.ops.gating import SCORES
from moert.ops.kinds import expect
from moert.routers.base import RouterContext
from moert.routers.linear import LinearRouter, wide_dtype
from moert.routers.ranks import gating
from moert.types import GroupLimit, Routing


class TopKRouter(LinearRouter):
    """The k best experts of x @ weight.T; weight [E, H] as in Hugging Face, see topk_gating for the scores.

    expert_bias keeps a buffer [E] that counts in the selection only and that update_expert_bias_ moves (DeepSeek-V3);
    it stays float32 in a module of lower precision.  The logits are computed in logits_dtype; its default is that of
    the models with this score: float32 for sigmoid, else the dtype of x.
    """

    reads_ranks = True
    wide = ("expert_bias",)  # in bfloat16 a bias of 1 would swallow every step of 0.001

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        k: int,
        score: str = "softmax",
        renormalize: bool = False,
        scale: float = 1.0,
        groups: GroupLimit | None = None,
        expert_bias: bool = False,
        logit_bias: bool = False,
        logits_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        inner: int | None = None,
    ):
        logits_dtype = torch.float32 if logits_dtype is None and score == "sigmoid" else logits_dtype
        super().__init__(hidden, num_experts, logit_bias, logits_dtype, device, dtype, inner)
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score}")
        most = num_experts if groups is None else _eligible(groups, num_experts)
        expect(int, k=k)
        if not 1 <= k <= most:
            raise ValueError(f"k must be in [1, {most}], got {k}")
        self.k, self.score, self.renormalize, self.scale, self.groups = k, score, renormalize, scale, groups
        bias = torch.zeros(num_experts, device=device, dtype=wide_dtype(dtype)) if expert_bias else None
        self.register_buffer("expert_bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.expert_bias is not None:
            nn.init.zeros_(self.expert_bias)

    def forward(self, x: Tensor, context: RouterContext | None = None) -> Routing:
        logits_TE = self.logits(x, context)
        bias = self.expert_bias
        if bias is not None and logits_TE.dtype != torch.float64:
            bias = bias.float()
        options = {"bias": bias, "renormalize": self.renormalize, "scale": self.scale, "groups": self.groups}
        weights, ids = gating(logits_TE, self.k, context, self.score, **options)
        return Routing(ids, weights, self.num_experts, logits=logits_TE)

    @property
    def weight_is_one(self) -> bool:
        return self.k == 1 and (self.renormalize or self.score == "softmax_over_topk")

    def extra_repr(self) -> str:
        text = f"hidden={self.hidden}, num_experts={self.num_experts}, k={self.k}, score={self.score}"
        for name, default in (("renormalize", False), ("scale", 1.0), ("groups", None)):
            if (value := getattr(self, name)) != default:
                text += f", {name}={value}"
        for name in ("expert_bias", "logit_bias"):
            if getattr(self, name) is not None:
                text += f", {name}=True"
        return text


def _eligible(groups: GroupLimit, num_experts: int) -> int:
    """How many experts a token may choose from."""
    if groups.num_groups < 1 or num_experts % groups.num_groups:
        raise ValueError(f"groups.num_groups must divide num_experts={num_experts}, got {groups.num_groups}")
    if not 1 <= groups.topk_groups <= groups.num_groups:
        raise ValueError(f"groups.topk_groups must be in [1, {groups.num_groups}], got {groups.topk_groups}")
    if groups.score not in ("top2", "max"):
        raise ValueError(f"groups.score must be top2 or max, got {groups.score}")
    size = num_experts // groups.num_groups
    if groups.score == "top2" and size < 2 <= groups.num_groups:
        raise ValueError(f"groups.num_groups must leave two experts to a group for score top2, got {groups.num_groups}")
    return groups.topk_groups * size
