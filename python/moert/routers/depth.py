"""Which tokens a block processes (Mixture-of-Depths, arXiv:2404.02258), and how often (Recursions, 2507.10524)."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moert.ops.expert_choice import expert_choice
from moert.ops.gating import SCORES
from moert.routers.base import RouterContext
from moert.routers.expert_choice import AuxiliaryRouter
from moert.routers.linear import LinearRouter
from moert.routers.losses import document_of_token, load_balance_loss, router_z_loss
from moert.routers.topk import TopKRouter
from moert.types import Routing

GATES = ("raw", "sigmoid", "softmax2")


class DepthRouter(LinearRouter):
    """Of each sequence the share `capacity` of its tokens, those with the largest r = w . x, go to the one expert.

    Ids [T, 1] are 0 or 1, which is no expert; weights are gate(r): "raw" r, "sigmoid" alpha * sigmoid(r), "softmax2"
    the second of two probabilities (w has two rows then).  Sequences are context.cu_seqlens; tokens outside
    context.mask are not chosen, and a sequence with too few others has fewer.  causal_() makes each token decide for
    itself: by the predictor, an MLP of width hidden_predictor on the detached x (causal "predictor"), or by r ("aux"),
    whose sigmoid must be above the threshold.  losses["depth_bce"] trains that, loss_coef times the mean over the
    tokens of the mask; z_coef adds losses["z"].  In the first `warmup` training steps (context.step) the share falls
    from 1 by a cosine.  inner puts a layer with GELU before w; stochastic replaces r by N(0, 1), the paper's control.
    """

    def __init__(
        self,
        hidden: int,
        capacity: float = 0.125,
        gate: str = "raw",
        causal: str = "predictor",
        hidden_predictor: int | None = None,
        alpha: float = 1.0,
        loss_coef: float = 1.0,
        z_coef: float = 0.0,
        warmup: int = 0,
        inner: int | None = None,
        stochastic: bool = False,
        threshold: float = 0.5,
        logit_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden, 1, logit_bias, torch.float32, device, dtype, inner)
        if not 0 < capacity <= 1:
            raise ValueError(f"capacity must be in (0, 1], got {capacity}")
        if gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)}, got {gate}")
        if causal not in ("predictor", "aux", "none"):
            raise ValueError(f"causal must be predictor, aux or none, got {causal}")
        if warmup < 0:
            raise ValueError(f"warmup must be at least 0, got {warmup}")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be in (0, 1), got {threshold}")
        self.capacity, self.gate, self.aid, self.alpha, self.loss_coef = capacity, gate, causal, alpha, loss_coef
        self.z_coef, self.warmup, self.stochastic, self.causal = z_coef, warmup, stochastic, False
        self.threshold = threshold
        if gate == "softmax2":
            self.weight = nn.Parameter(torch.empty(2, self.weight.shape[1], device=device, dtype=dtype))
        self.predictor = AuxiliaryRouter(hidden, 1, hidden_predictor, device) if causal == "predictor" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.weight, std=0.02)

    def causal_(self, on: bool = True) -> "DepthRouter":
        """From here on a token's choice depends on the token alone; the weights stay what they were."""
        if on and self.aid == "none":
            raise ValueError("causal must be predictor or aux for causal_, got none")
        self.causal = on
        return self

    def share(self, step: int | Tensor | None = None) -> float:
        """The share of the tokens at a training step: capacity, unless it is still warming up."""
        if not self.training or step is None or step >= self.warmup:
            return self.capacity
        return self.capacity + (1 - self.capacity) * (1 + math.cos(math.pi * step / self.warmup)) / 2

    def limit(self, length: int, step: int | Tensor | None = None) -> int:
        """The number of tokens of a sequence of this length that are chosen, unless causal."""
        # A little more, lest the rounding of a product that is whole lowers it to the next integer.
        return max(1, int(self.share(step) * length + 1e-6))

    def forward(self, x: Tensor, context: RouterContext | None = None) -> Routing:
        context = context or RouterContext()
        r_T = self.unbiased_logits(x)
        r_T = self.biased(r_T[:, 1:] - r_T[:, :1] if self.gate == "softmax2" else r_T, context)
        r_T = torch.randn_like(r_T) if self.stochastic else r_T
        mask = torch.ones_like(r_T[:, 0], dtype=torch.bool) if context.mask is None else context.counted()
        ids = self._alone(x, r_T, mask) if self.causal else self._best(r_T, mask, context)
        routing = Routing(ids, self._weights(r_T), 1, r_T)
        return replace(routing, losses=self._losses(x, routing, mask)) if self.training and not self.causal else routing

    def _best(self, r_T: Tensor, mask: Tensor, context: RouterContext) -> Tensor:
        segment, B = document_of_token(context.cu_seqlens, len(r_T), r_T.device)
        if context.cu_seqlens is None:
            count = torch.full((1,), self.limit(len(r_T), context.step), device=r_T.device)
        else:
            lengths = context.cu_seqlens.to(r_T.device).diff()
            count = (self.share(context.step) * lengths.double() + 1e-6).long().clamp_min(1)
        return expert_choice(r_T.detach(), torch.where(mask, segment, B), count[:, None].long(), 1)[1]

    def _alone(self, x: Tensor, r_T: Tensor, mask: Tensor) -> Tensor:
        logits = r_T if self.predictor is None else self.predictor(x)
        yes = logits > math.log(self.threshold / (1 - self.threshold))
        return torch.where(yes & mask[:, None], 0, 1).int()

    def _weights(self, r_T: Tensor) -> Tensor:
        if self.gate == "raw":
            return r_T
        return r_T.sigmoid() * self.alpha if self.gate == "sigmoid" else r_T.sigmoid()

    def _losses(self, x: Tensor, routing: Routing, mask: Tensor) -> dict[str, Tensor]:
        losses = {"z": self.z_coef * router_z_loss(routing, mask)} if self.z_coef else {}
        if self.aid == "none":
            return losses
        logits = routing.logits if self.predictor is None else self.predictor(x.detach())
        chosen = (routing.ids == 0).to(logits.dtype)
        each = F.binary_cross_entropy_with_logits(logits, chosen, reduction="none")[:, 0]
        bce = self.loss_coef * torch.where(mask, each, 0).sum() / mask.sum().clamp_min(1)
        return losses | {"depth_bce": bce}

    def extra_repr(self) -> str:
        return f"capacity={self.capacity}, gate={self.gate}, causal={self.aid}"


class TokenDepthRouter(TopKRouter):
    """Each token chooses its depth once: ids [T, 1] in [0, depths), weights alpha * the score of that depth.

    balance "loss" adds losses["balance"], balance_coef * depths * sum of f_d P_d, and losses["z"]; "bias" keeps
    expert_bias instead, for update_expert_bias_.  inner puts a layer with GELU before the scores.  As the router of a
    MoDBlock (depths 2) it is the paper's token choice: depth 0 is the block, depth 1 the identity.
    """

    causal = True  # a token's choice depends on the token alone

    def __init__(
        self,
        hidden: int,
        depths: int,
        score: str = "softmax",
        alpha: float | None = None,
        balance: str = "loss",
        balance_coef: float = 0.1,
        z_coef: float = 1e-5,
        inner: int | None = None,
        logit_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if score not in ("softmax", "sigmoid"):
            raise ValueError(f"score must be softmax or sigmoid, got {score}")
        if balance not in ("loss", "bias"):
            raise ValueError(f"balance must be loss or bias, got {balance}")
        scale = (1.0 if score == "softmax" else 0.1) if alpha is None else alpha
        super().__init__(
            hidden, depths, 1, score, scale=scale, expert_bias=balance == "bias", logit_bias=logit_bias,
            logits_dtype=torch.float32, device=device, dtype=dtype, inner=inner,
        )  # fmt: skip
        self.balance_coef, self.z_coef = balance_coef, z_coef

    def forward(self, x: Tensor, context: RouterContext | None = None) -> Routing:
        routing = super().forward(x, context)
        mask = None if context is None else context.mask
        if not self.training or self.expert_bias is not None:
            return routing
        losses = {
            "balance": self.balance_coef * load_balance_loss(routing, mask),
            "z": self.z_coef * router_z_loss(routing, mask),
        }
        return Routing(routing.ids, routing.weights, self.num_experts, routing.logits, losses)

    def weight_of(self, routing: Routing, depth: int) -> Tensor:
        """[T, 1]: alpha times every token's score of this depth, whichever it chose."""
        return self.scale * SCORES[self.score](routing.logits)[:, depth : depth + 1]
