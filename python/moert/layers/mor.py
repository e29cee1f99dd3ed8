"""Mixture-of-Recursions (arXiv:2507.10524): one stack of blocks, run as often as each token's router says."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from moert.layers.packed import Rows, all_rows, chosen_of, run_chosen
from moert.routers.base import RouterContext
from moert.routers.depth import DepthRouter, TokenDepthRouter
from moert.runtime.skippable_kv import RecursiveKV
from moert.types import Routing

GATINGS = ("weighted", "additive", "replace")


class RecursiveStack(nn.Module):
    """F = the blocks in their order, run up to depths times; x [B, S, H] -> y, the routings (one a depth, or one).

    mode "expert": at depth r the router of that depth keeps the share capacity[r] of all tokens, best of those still
    active, and x_i <- x_i + g_i F(x)_i, where F includes its own residual ("weighted", as released; "additive" has
    g = 1, "replace" x_i <- F(x)_i).  mode "token": one router gives each token its depth d; x_i <- F(x)_i before its
    last depth, then y_i = x_i of the start + p_i F(x)_i.  Tokens see only tokens that are active at the same depth.
    kv "recursion" keeps keys and values of each depth; "shared" reads those of the first, which all tokens reach.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        depths: int,
        hidden: int,
        mode: str = "expert",
        capacity: Sequence[float] | None = None,
        alpha: float = 0.1,
        gating: str = "weighted",
        kv: str = "recursion",
        causal: str = "aux",
        bce_coef: float = 0.001,
        balance: str = "loss",
    ):
        super().__init__()
        share = [(depths - r) / depths for r in range(depths)] if capacity is None else list(capacity)
        if mode not in ("expert", "token"):
            raise ValueError(f"mode must be expert or token, got {mode}")
        if gating not in GATINGS:
            raise ValueError(f"gating must be one of {', '.join(GATINGS)}, got {gating}")
        if kv not in ("recursion", "shared"):
            raise ValueError(f"kv must be recursion or shared, got {kv}")
        if len(share) != depths or any(a < b for a, b in zip(share, share[1:], strict=False)):
            raise ValueError(f"capacity must be {depths} shares that do not increase, got {share}")
        if kv == "shared" and share[0] < 1:
            raise ValueError(f"capacity must begin with 1 for kv shared, got {share[0]}")
        self.blocks, self.depths, self.mode, self.gating, self.kv = nn.ModuleList(blocks), depths, mode, gating, kv
        if mode == "expert":
            options = {"gate": "sigmoid", "causal": causal, "alpha": alpha, "loss_coef": bce_coef}
            self.routers = nn.ModuleList([DepthRouter(hidden, c, **options) for c in share])
        else:
            self.routers = nn.ModuleList([TokenDepthRouter(hidden, depths, balance=balance)])

    def causal_(self, on: bool = True) -> "RecursiveStack":
        """Each token decides for itself how deep it goes (mode "token" always does)."""
        for router in self.routers if self.mode == "expert" else ():
            router.causal_(on)
        return self

    def new_kv(self, batch: int) -> RecursiveKV:
        return RecursiveKV(self.depths, len(self.blocks), batch, self.kv)

    def forward(
        self,
        x: Tensor,
        context: RouterContext | None = None,
        positions: Tensor | None = None,
        kv: RecursiveKV | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        B, S, H = x.shape
        if kv is None and self.kv == "shared":
            kv = self.new_kv(B)
        boundaries = torch.arange(B + 1, device=x.device, dtype=torch.int32) * S
        context = replace(context or RouterContext(), cu_seqlens=boundaries)
        run = self._by_expert if self.mode == "expert" else self._by_token
        return run(x, context, positions, kv)

    def stack(self, rows_NH: Tensor, rows: Rows, kv) -> Tensor:
        for block in self.blocks:
            rows_NH = block(rows_NH, rows, kv)
        return rows_NH

    def _by_expert(self, x, context, positions, kv):
        B, S, H = x.shape
        active, routings = context.mask, []
        for r, router in enumerate(self.routers):
            routing = router(x.reshape(-1, H), replace(context, mask=active))
            active = chosen_of(routing)
            # Where top-k takes every token there is nothing to decide.
            if router.capacity == 1 and router.causal:
                active = torch.ones_like(active) if context.mask is None else context.mask.reshape(-1).bool()
            limit = None if router.causal or kv is not None else min(S, router.limit(S))
            weights = routing.weights if self.gating == "weighted" else torch.ones_like(routing.weights)
            residual = None
            if self.gating == "replace":
                residual = x.reshape(-1, H).masked_fill(active[:, None], 0)
            x = run_chosen(self._at(r, kv), x, active, weights, residual, limit, positions)
            routings.append(routing)
        return x, routings

    def _by_token(self, x, context, positions, kv):
        H = x.shape[-1]
        routing = self.routers[0](x.reshape(-1, H), context)
        depth, start = routing.ids[:, 0], x.reshape(-1, H)
        counts = torch.ones_like(depth, dtype=torch.bool) if context.mask is None else context.mask.reshape(-1).bool()
        for r in range(self.depths):
            active, last = (depth >= r) & counts, ((depth == r) & counts)[:, None]
            # One weighted sum does both: a token at its last depth starts from its first state, the others from zero.
            residual = torch.where(last, start, x.reshape(-1, H).masked_fill(active[:, None], 0))
            weights = torch.where(last, routing.weights, 1)
            x = run_chosen(self._at(r, kv), x, active, weights, residual, None, positions)
        return x, [routing]

    def _at(self, depth: int, kv: RecursiveKV | None):
        return lambda rows_NH, rows: self.stack(rows_NH, rows, None if kv is None else kv.at(depth))


class MoRModel(nn.Module):
    """first, the recursive stack, last ("middle-cycle"): x [B, S, H] -> y, routings; first, last are packed blocks."""

    def __init__(self, first: nn.Module, stack: RecursiveStack, last: nn.Module):
        super().__init__()
        self.first, self.stack, self.last = first, stack, last

    def forward(self, x: Tensor, context: RouterContext | None = None) -> tuple[Tensor, list[Routing]]:
        rows = all_rows(x)
        x = self.first(x.flatten(0, 1), rows).view(x.shape)
        x, routings = self.stack(x, context)
        return self.last(x.flatten(0, 1), rows).view(x.shape), routings
