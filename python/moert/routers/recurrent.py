"""Layerwise recurrent routers (RMoE, arXiv:2408.06793): a GRU over depth carries what the layers decided.

Letters: p the width of the routing state.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moert.routers.base import RouterContext
from moert.routers.linear import LinearRouter
from moert.routers.ranks import gating
from moert.types import Routing


class RecurrentState(nn.Module):
    """The cell that the routers of all layers share: (x [T, p], state [T, p]) -> state [T, p], in float32.

    "gru" is torch.nn.GRUCell's step, "rnn" tanh(W_in x + b_in + W_hn h + b_hn).  Weights, those of the routers
    included, start as normal(0, std).  The first layer is given zeros, or (learned_start) the parameter start [p].
    """

    def __init__(
        self,
        p: int = 256,
        cell: str = "gru",
        std: float = 0.02,
        learned_start: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if p < 1:
            raise ValueError(f"p must be at least 1, got {p}")
        if cell not in ("gru", "rnn"):
            raise ValueError(f"cell must be gru or rnn, got {cell}")
        self.p, self.std = p, std
        self.cell = (nn.GRUCell if cell == "gru" else nn.RNNCell)(p, p, device=device, dtype=dtype)
        self.start = nn.Parameter(torch.zeros(p, device=device, dtype=dtype)) if learned_start else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.cell.named_parameters():
            nn.init.zeros_(parameter) if name.startswith("bias") else nn.init.normal_(parameter, std=self.std)
        if self.start is not None:
            nn.init.zeros_(self.start)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        step = torch.gru_cell if isinstance(self.cell, nn.GRUCell) else torch.rnn_tanh_cell
        c = self.cell
        return step(x, state, *(w.to(x.dtype) for w in (c.weight_ih, c.weight_hh, c.bias_ih, c.bias_hh)))


class RecurrentRouter(LinearRouter):
    """The k best experts by softmax(G h), where h = cell(P x, h of the layer before).

    It reads context.previous.state, that of the cell's start where there is none, and returns Routing.state; follow
    gives the next layer's context.  The cell belongs to the model: the router refers to it without registering it.
    first=True says that no layer is before this one, so that a state left over from another forward is an error.
    losses["balance"] is balance_coef times the Switch loss of this layer (load_balance_loss has that of all together).
    """

    reads_ranks = True

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        k: int = 2,
        state: RecurrentState | None = None,
        renorm: bool = True,
        balance_coef: float = 1e-3,
        detach: bool = False,
        first: bool = False,
        logit_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if state is None:
            raise ValueError("state must be the RecurrentState of the model, got None")
        super().__init__(state.p, num_experts, logit_bias, torch.float32, device, dtype)
        if not 1 <= k <= num_experts:
            raise ValueError(f"k must be in [1, {num_experts}], got {k}")
        self.k, self.renorm, self.balance_coef, self.detach, self.first = k, renorm, balance_coef, detach, first
        self._state = (state,)  # in a tuple: its parameters are counted once, with the model's
        self.projection = nn.Parameter(torch.empty(state.p, hidden, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def state(self) -> RecurrentState:
        return self._state[0]

    def reset_parameters(self) -> None:
        for parameter in (self.projection, self.weight):
            nn.init.normal_(parameter, std=self.state.std)
        if self.logit_bias is not None:
            nn.init.zeros_(self.logit_bias)

    def forward(self, x: Tensor, context: RouterContext | None = None) -> Routing:
        context = context or RouterContext()
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            h_Tp = self.state(F.linear(x.to(wide), self.projection.to(wide)), self._before(x, context, wide))
        logits_TE = self.logits(h_Tp, context)
        weights, ids = gating(logits_TE, self.k, context, renormalize=self.renorm)
        routing = Routing(ids, weights, self.num_experts, logits_TE, state=h_Tp)
        return self.balanced(routing, context)

    @property
    def weight_is_one(self) -> bool:
        return self.k == 1 and self.renorm

    def _before(self, x: Tensor, context: RouterContext, dtype: torch.dtype) -> Tensor:
        before = None if context.previous is None else context.previous.state
        if before is None:
            start = x.new_zeros(self.state.p) if self.state.start is None else self.state.start
            return start.to(dtype).expand(len(x), -1)
        if self.first:
            raise ValueError("context.previous must have no state for the first router, got one of another forward")
        if before.shape != (len(x), self.state.p):
            raise ValueError(f"state must have shape [T={len(x)}, p={self.state.p}], got {list(before.shape)}")
        return before.detach() if self.detach else before


def follow(context: RouterContext | None, routing: Routing) -> RouterContext:
    """The context of the next layer, whose previous routing is this one."""
    return replace(context or RouterContext(), previous=routing)
