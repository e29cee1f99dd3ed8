"""The gates of DeepSeekMoE, DeepSeek-V2 and DeepSeek-V3 with their balance (arXiv:2401.06066, 2405.04434, 2412.19437).

Letters: D devices, contiguous groups of experts; M the groups that a token may use.
"""

import torch
import torch.distributed
from torch import Tensor

from moert.ops.gating import SCORES
from moert.routers.base import RouterContext
from moert.routers.capacity import within_device_capacity
from moert.routers.documents import document_of_token
from moert.routers.losses import balance_terms, expert_load, step_expert_bias_
from moert.routers.topk import TopKRouter
from moert.types import GroupLimit, Routing

_GROUP_SCORES = {"max": "max", "top2sum": "top2"}


class DeepSeekRouter(TopKRouter):
    """Scores in float32, groups of experts, balance by losses or by a bias; v1, v2 and v3 have the papers' values.

    aux "batch" gives losses["expert"], aux_alpha * sum of f_e P_e over the tokens of the call; "sequence" gives
    losses["sequence"], the mean over context.cu_seqlens of the same; device_alpha and comm_alpha give "device" and
    "comm".  bias_balance is the rate of update_bias, whose bias counts in the choice only.  Tokens outside context.mask
    do not count.  renorm divides by the sum of the chosen scores; V2 either renormalises or scales, never both.
    In training device_capacity bounds the choices of each device at that share of an even load over the call's tokens:
    those of the lowest affinity are dropped (id E), but never in a random share spared of the sequences.
    """

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        k: int,
        score: str = "softmax",
        n_group: int = 1,
        topk_group: int = 1,
        group_score: str = "max",
        renorm: bool = False,
        scale: float = 1.0,
        bias_balance: float | None = None,
        aux: str = "none",
        aux_alpha: float = 0.0,
        device_alpha: float = 0.0,
        comm_alpha: float = 0.0,
        num_devices: int = 1,
        device_capacity: float | None = None,
        spared: float = 0.1,
        logit_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if score not in ("softmax", "sigmoid"):
            raise ValueError(f"score must be softmax or sigmoid, got {score}")
        if group_score not in _GROUP_SCORES:
            raise ValueError(f"group_score must be max or top2sum, got {group_score}")
        if aux not in ("none", "batch", "sequence"):
            raise ValueError(f"aux must be none, batch or sequence, got {aux}")
        if num_devices < 1 or num_experts % num_devices:
            raise ValueError(f"num_devices must divide num_experts={num_experts}, got {num_devices}")
        if device_capacity is not None and not device_capacity > 0:
            raise ValueError(f"device_capacity must be above 0, got {device_capacity}")
        if not 0 <= spared <= 1:
            raise ValueError(f"spared must be in [0, 1], got {spared}")
        groups = (
            GroupLimit(n_group, topk_group, _GROUP_SCORES[group_score]) if (n_group, topk_group) != (1, 1) else None
        )
        biased = bias_balance is not None
        super().__init__(
            hidden, num_experts, k, score, renorm, scale, groups, biased, logit_bias, torch.float32, device, dtype
        )
        self.bias_balance, self.aux, self.num_devices = bias_balance, aux, num_devices
        self.aux_alpha, self.device_alpha, self.comm_alpha = aux_alpha, device_alpha, comm_alpha
        self.device_capacity, self.spared = device_capacity, spared
        load = torch.zeros(num_experts, dtype=torch.int64, device=device) if biased else None
        self.register_buffer("load", load, persistent=False)

    @classmethod
    def v1(cls, hidden: int = 2048, num_experts: int = 64, k: int = 6, **options) -> "DeepSeekRouter":
        """DeepSeekMoE 16B: softmax, not renormalised, balanced within each sequence."""
        return cls(hidden, num_experts, k, **({"aux": "sequence", "aux_alpha": 0.001} | options))

    @classmethod
    def v2(cls, hidden: int = 5120, num_experts: int = 160, k: int = 6, **options) -> "DeepSeekRouter":
        """DeepSeek-V2: three of eight groups (devices), weights times 16, losses and a bound for the devices' load."""
        groups = {"n_group": 8, "topk_group": 3, "scale": 16.0, "num_devices": 8, "device_capacity": 1.0}
        losses = {"aux": "sequence", "aux_alpha": 0.003, "device_alpha": 0.05, "comm_alpha": 0.02}
        return cls(hidden, num_experts, k, **(groups | losses | options))

    @classmethod
    def v3(cls, hidden: int = 7168, num_experts: int = 256, k: int = 8, **options) -> "DeepSeekRouter":
        """DeepSeek-V3: sigmoid, four of eight groups, renormalised times 2.5, balanced by the bias."""
        gate = {
            "score": "sigmoid",
            "n_group": 8,
            "topk_group": 4,
            "group_score": "top2sum",
            "renorm": True,
            "scale": 2.5,
        }
        balance = {"bias_balance": 0.001, "aux": "sequence", "aux_alpha": 1e-4}
        return cls(hidden, num_experts, k, **(gate | balance | options))

    def forward(self, x: Tensor, context: RouterContext | None = None) -> Routing:
        context = context or RouterContext()
        routing = super().forward(x, context)
        if not self.training:
            return routing
        if self.load is not None:
            self.load += expert_load(routing, context.mask)
        ids = routing.ids if self.device_capacity is None else self._within_capacity(routing, context)
        return Routing(ids, routing.weights, self.num_experts, routing.logits, self._losses(routing, context))

    def _within_capacity(self, routing: Routing, context: RouterContext) -> Tensor:
        ids = routing.ids
        mask = torch.ones_like(ids[:, 0], dtype=torch.bool) if context.mask is None else context.counted()
        document, D = document_of_token(context.cu_seqlens, len(ids), ids.device)
        spared = (torch.rand(D, device=ids.device) < self.spared)[document]
        budget = torch.ceil(mask.sum() * (self.device_capacity * self.k / self.num_devices) - 1e-6).long()
        affinity = SCORES[self.score](routing.logits).gather(-1, ids.long().clamp_max(self.num_experts - 1))
        counted = torch.where(mask[:, None], ids, self.num_experts)  # padding takes no device's room
        kept = within_device_capacity(counted, affinity, self.num_experts, self.num_devices, budget, spared)
        return torch.where(mask[:, None], kept, ids)

    @torch.no_grad()
    def update_bias(self, counts: Tensor | None = None, group=None) -> None:
        """Once per optimizer step: biases of experts above the mean load fall by bias_balance, the others' rise.

        counts [E] is the load of the step; None takes what the forward passes in training have added up since the last
        call (recomputed passes count again, which no sign sees).  Summed over the ranks of group, the default group
        where torch.distributed is initialised.
        """
        if self.load is None:
            raise ValueError("bias_balance must be a rate for update_bias, got None")
        counts = (self.load if counts is None else counts).clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts, group=group)
        step_expert_bias_(self.expert_bias, counts, self.bias_balance)
        self.load.zero_()

    def _losses(self, routing: Routing, context: RouterContext) -> dict[str, Tensor]:
        E, k, losses = self.num_experts, self.k, {}
        alphas = (self.aux_alpha if self.aux != "none" else 0, self.device_alpha, self.comm_alpha)
        if not any(alphas):
            return losses
        p_TE = SCORES[self.score](routing.logits)
        if self.score == "sigmoid":
            p_TE = p_TE / (p_TE.sum(-1, keepdim=True) + 1e-20)
        if alphas[0]:
            sequences = context.cu_seqlens if self.aux == "sequence" else None
            load, mean, counted = balance_terms(routing, p_TE, context.mask, sequences)
            each = (load * mean).sum(-1) * E / k
            name = "sequence" if self.aux == "sequence" else "expert"
            losses[name] = self.aux_alpha * each.sum() / (counted > 0).sum().clamp_min(1)
        if self.device_alpha or self.comm_alpha:
            losses |= self._device_losses(routing, p_TE, context.mask)
        return losses

    def _device_losses(self, routing: Routing, p_TE: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        D, size = self.num_devices, self.num_experts // self.num_devices
        load, mean, tokens = balance_terms(routing, p_TE, mask)
        p_D = mean.view(D, size).sum(-1)
        losses = {}
        if self.device_alpha:
            f_D = (load * self.num_experts / self.k).view(D, size).mean(-1)
            losses["device"] = self.device_alpha * (f_D * p_D).sum()
        if self.comm_alpha:
            sent_TD = routing.members().view(-1, D, size).any(-1)
            if mask is not None:
                sent_TD = sent_TD & mask.reshape(-1, 1).bool()
            kept = 1 if self.groups is None else self.groups.topk_groups
            f_D = sent_TD.sum(0) * D / (kept * tokens.clamp_min(1))
            losses["comm"] = self.comm_alpha * (f_D * p_D).sum()
        return losses
