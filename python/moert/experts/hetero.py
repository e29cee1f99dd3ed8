"""Experts of several kinds: feed-forward networks, and zero, copy and constant experts that cost next to nothing.

MoE++ (arXiv:2410.07348).  Letters: F the free experts, C the constant ones among them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moert.experts.base import Experts
from moert.types import Onto, Routing, check_kinds


class HeteroExperts(Experts):
    """The experts of ffn, then free ones: zero gives 0, copy x, const a1 x + a2 v with [a1, a2] = softmax(W_c x).

    Only choices of feed-forward experts reach ffn (and with it the plan and the GEMMs); its combine adds what the
    free ones give, where it can (GluExperts).  input_scale multiplies what all experts are given (released MoE++
    weights were trained with 2, the number of choices).
    """

    def __init__(
        self,
        ffn: Experts,
        kinds: list[str],
        hidden: int,
        input_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_ffn, self.num_experts = check_kinds(kinds), len(kinds)
        if ffn.num_experts != self.num_ffn:
            raise ValueError(f"ffn must have {self.num_ffn} experts, as many as kinds, got {ffn.num_experts}")
        self.ffn, self.kinds, self.input_scale = ffn, tuple(kinds), input_scale
        constants = kinds.count("const")

        def parameter(*shape):
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype)) if constants else None

        self.mix_weight, self.constant = parameter(constants, 2, hidden), parameter(constants, hidden)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.constant is not None:
            nn.init.uniform_(self.mix_weight, -(self.constant.shape[1] ** -0.5), self.constant.shape[1] ** -0.5)
            nn.init.normal_(self.constant)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        if routing.num_experts != self.num_experts:
            raise ValueError(f"routing must be over {self.num_experts} experts, got {routing.num_experts}")
        if self.input_scale != 1:
            x = x * self.input_scale
        # An id from num_ffn on is a sentinel for ffn.
        routed = Routing(routing.ids, routing.weights, self.num_ffn)
        if not {"copy", "const"} & set(self.kinds):
            return self.ffn(x, routed)
        return self.ffn.onto(x, routed, self._free(x, routing))

    def _free(self, x: Tensor, routing: Routing) -> Onto:
        """A multiple of x and a mixture of the constants, for every token: no dispatch, and no pass of their own."""
        weights = routing.weights.to(torch.promote_types(x.dtype, torch.float32))

        def weight_of(kind):
            return [
                torch.where(routing.ids == e, weights, 0).sum(-1) for e, each in enumerate(self.kinds) if each == kind
            ]

        scale_T = sum(weight_of("copy"), weights.new_zeros(len(x)))
        if self.constant is None:
            return Onto(x, scale_T)
        w_TC = torch.stack(weight_of("const"), -1)
        a_TC2 = F.linear(x, self.mix_weight.flatten(0, 1)).unflatten(-1, (-1, 2)).softmax(-1, weights.dtype)
        return Onto(x, scale_T + (w_TC * a_TC2[..., 0]).sum(-1), w_TC * a_TC2[..., 1], self.constant)

    def extra_repr(self) -> str:
        return f"kinds={self.kinds}"
