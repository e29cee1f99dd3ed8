"""Mixture-of-Recursions (arXiv:2507.10524): one stack of blocks, run as often as each token's router says."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moert.layers.packed import Rows, all_rows, chosen_of, run_chosen
from moert.routers.base import RouterContext, TakesContext
from moert.routers.depth import DepthRouter, TokenDepthRouter
from moert.routers.within import causal_routers_
from moert.runtime.skippable_kv import STRATEGIES, ModelKV, RecursiveKV, SkippableKV, at_layer
from moert.types import Routing

GATINGS = ("weighted", "additive", "replace")
GATES = ("last", "every")


@dataclass(frozen=True)
class Pass:
    """What one pass does to the states: y = residual + weights * F(the active rows), y = residual elsewhere.

    active [T] bool, residual [T, H], weights [T, 1]; routing is what said so.
    """

    active: Tensor
    residual: Tensor
    weights: Tensor
    routing: Routing


class RecursiveStack(TakesContext):
    """F = the blocks in their order, run up to depths times; x [B, S, H] -> y, the routings (one a depth, or one).

    mode "expert": at depth r the router of that depth keeps the share capacity[r] of all tokens, best of those still
    active, and x_i <- x_i + g_i F(x)_i, where F includes its own residual ("weighted", as released; "additive" has
    g = 1, "replace" x_i <- F(x)_i).  mode "token": one router gives each token its depth d; x_i <- F(x)_i before its
    last depth, then y_i = x_i of the start + p_i F(x)_i ("additive": p = 1, "replace": F(x)_i); gates "every" has the
    score of each depth before its F as well.  alpha (None: 0.1, or 1 for softmax) times a score is g or p; score is
    that of mode "token", a depth's gate is a sigmoid.  Tokens see only tokens that are active at the same depth.
    kv "recursion" keeps keys and values of each depth; "shared" reads those of the first, which all tokens reach;
    "update" reads each token's of the deepest depth that it has reached so far.
    In the first `warmup` steps (context.step) the capacities fall from 1.  inner gives the routers a layer with GELU.
    order names the blocks of each depth, where these are not all blocks every time.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        depths: int,
        hidden: int,
        mode: str = "expert",
        capacity: Sequence[float] | None = None,
        alpha: float | None = None,
        gating: str = "weighted",
        kv: str = "recursion",
        causal: str = "aux",
        bce_coef: float = 0.001,
        z_coef: float | None = None,
        balance: str = "loss",
        balance_coef: float = 0.1,
        warmup: int = 0,
        inner: int | None = None,
        order: Sequence[Sequence[int]] | None = None,
        score: str = "softmax",
        gates: str = "last",
        threshold: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        share = [(depths - r) / depths for r in range(depths)] if capacity is None else list(capacity)
        if mode not in ("expert", "token"):
            raise ValueError(f"mode must be expert or token, got {mode}")
        idle = {"capacity": (capacity, None), "causal": (causal, "aux"), "bce_coef": (bce_coef, 0.001)}
        idle |= {"warmup": (warmup, 0), "threshold": (threshold, 0.5)}
        if mode == "expert":
            idle = {"balance": (balance, "loss"), "balance_coef": (balance_coef, 0.1), "score": (score, "softmax")}
        if mode == "expert" or gating in ("additive", "replace"):
            idle |= {"gates": (gates, "last")}
        for name, (value, default) in idle.items():
            if value != default:
                raise ValueError(f"{name} must be {default} in mode {mode}, gating {gating}: unused there, got {value}")
        if gating not in GATINGS:
            raise ValueError(f"gating must be one of {', '.join(GATINGS)}, got {gating}")
        if gates not in GATES:
            raise ValueError(f"gates must be one of {', '.join(GATES)}, got {gates}")
        if kv not in STRATEGIES:
            raise ValueError(f"kv must be one of {', '.join(STRATEGIES)}, got {kv}")
        if len(share) != depths or any(a < b for a, b in zip(share, share[1:], strict=False)):
            raise ValueError(f"capacity must be {depths} shares that do not increase, got {share}")
        if kv != "recursion" and share[0] < 1:
            raise ValueError(f"capacity must begin with 1 for kv {kv}, got {share[0]}")
        order = [range(len(blocks))] * depths if order is None else order
        if len(order) != depths or len({len(each) for each in order}) != 1:
            raise ValueError(f"order must be {depths} lists of the same length, got {order}")
        self.blocks, self.depths, self.mode, self.gating, self.kv = nn.ModuleList(blocks), depths, mode, gating, kv
        self.order, self.gates = [list(each) for each in order], gates
        options = {"inner": inner, "device": device, "dtype": dtype}
        if mode == "expert":
            options |= {"gate": "sigmoid", "causal": causal, "alpha": 0.1 if alpha is None else alpha}
            options |= {"loss_coef": bce_coef, "z_coef": z_coef or 0.0, "warmup": warmup, "threshold": threshold}
            self.routers = nn.ModuleList([DepthRouter(hidden, c, **options) for c in share])
        else:
            options |= {"balance": balance, "balance_coef": balance_coef, "z_coef": 1e-5 if z_coef is None else z_coef}
            self.routers = nn.ModuleList([TokenDepthRouter(hidden, depths, score, alpha, **options)])

    @property
    def causal(self) -> bool:
        return self.routers[0].causal

    def causal_(self, on: bool = True) -> "RecursiveStack":
        """Each token decides for itself how deep it goes (mode "token" always does), and which experts it uses."""
        return causal_routers_(self, on)

    def new_kv(self, batch: int) -> RecursiveKV:
        return RecursiveKV(self.depths, len(self.order[0]), batch, self.kv)

    def forward(
        self,
        x: Tensor,
        context: RouterContext | None = None,
        positions: Tensor | None = None,
        kv: RecursiveKV | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        B, S, H = x.shape
        if kv is None and self.kv != "recursion":
            kv = self.new_kv(B)
        boundaries = torch.arange(B + 1, device=x.device, dtype=torch.int32) * S
        context = replace(context or RouterContext(), cu_seqlens=boundaries)
        start, before, routings = x.reshape(-1, H), None, []
        for r in range(self.depths):
            before = self.decide(r, x.reshape(-1, H), start, context, before)
            limit = None if self.causal or kv is not None else min(S, self.routers[r].limit(S, context.step))
            choice = (before.active, before.weights, before.residual, limit, positions, context)
            x = run_chosen(self._at(r, kv), x, *choice)
            routings.append(before.routing)
        return x, routings if self.mode == "expert" else routings[:1]

    def run(self, rows_NH: Tensor, rows: Rows, depth: int, kv=None) -> Tensor:
        """F of the rows, with the blocks of a depth; kv is what these extend."""
        for place, block in enumerate(self.order[depth]):
            rows_NH = self.blocks[block](rows_NH, rows, at_layer(kv, place))
        return rows_NH

    def decide(self, r: int, x_TH: Tensor, start_TH: Tensor, context: RouterContext, before: Pass | None) -> Pass:
        """The pass of depth r over states that started as start_TH; before is the pass of the depth above."""
        return (self._by_expert if self.mode == "expert" else self._by_token)(r, x_TH, start_TH, context, before)

    def _by_expert(self, r, x_TH, start_TH, context, before):
        router, mask = self.routers[r], context.mask if before is None else before.active
        routing = router(x_TH, replace(context, mask=mask))
        active = chosen_of(routing)
        # Where top-k takes every token there is nothing to decide.
        if router.capacity == 1 and router.causal:
            active = torch.ones_like(active) if mask is None else mask.reshape(-1).bool()
        weights = routing.weights if self.gating == "weighted" else torch.ones_like(routing.weights)
        residual = x_TH.masked_fill(active[:, None], 0) if self.gating == "replace" else x_TH
        return Pass(active, residual, weights, routing)

    def _by_token(self, r, x_TH, start_TH, context, before):
        routing = self.routers[0](x_TH, context) if before is None else before.routing
        depth, mask = routing.ids[:, 0], context.mask
        counts = torch.ones_like(depth, dtype=torch.bool) if mask is None else mask.reshape(-1).bool()
        active, last = (depth >= r) & counts, ((depth == r) & counts)[:, None]
        # One weighted sum does both: a token at its last depth starts from its first state, the others from zero.
        residual = x_TH.masked_fill(active[:, None], 0)
        if self.gating != "replace":
            residual = torch.where(last, start_TH, residual)
        weights = torch.ones_like(routing.weights)
        if self.gating == "weighted" and self.gates == "every":
            weights = self.routers[0].weight_of(routing, r)
        elif self.gating == "weighted":
            weights = torch.where(last, routing.weights, weights)
        return Pass(active, residual, weights, routing)

    def _at(self, depth: int, kv: RecursiveKV | None):
        return lambda rows_NH, rows: self.run(rows_NH, rows, depth, None if kv is None else kv.at(depth))


class MoRModel(nn.Module):
    """first, the recursive stack, last ("middle-cycle"): x [B, S, H] -> y, routings; first, last are packed blocks."""

    def __init__(self, first: nn.Module, stack: RecursiveStack, last: nn.Module):
        super().__init__()
        self.first, self.stack, self.last = first, stack, last

    def new_kv(self, batch: int) -> ModelKV:
        return ModelKV(SkippableKV(1, batch), self.stack.new_kv(batch), SkippableKV(1, batch))

    def forward(
        self,
        x: Tensor,
        context: RouterContext | None = None,
        positions: Tensor | None = None,
        kv: ModelKV | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        rows, kv = all_rows(x, positions, context), kv or ModelKV(None, None, None)
        x = self.first(x.flatten(0, 1), rows, at_layer(kv.first, 0)).view(x.shape)
        x, routings = self.stack(x, context, positions, kv.stack)
        return self.last(x.flatten(0, 1), rows, at_layer(kv.last, 0)).view(x.shape), routings
