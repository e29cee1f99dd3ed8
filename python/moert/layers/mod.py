"""Mixture-of-Depths (arXiv:2404.02258): a block that only some tokens of a sequence pass through."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from moert.layers.packed import chosen_of, run_chosen
from moert.routers.base import RouterContext, TakesContext
from moert.routers.depth import DepthRouter, TokenDepthRouter
from moert.types import Routing


class MoDBlock(TakesContext):
    """y = x + r * block.delta(x) for the tokens that router chooses, y = x for the others; they see each other only.

    block.delta(x [N, H], rows, kv) is what a block adds to its input (see PackedBlock); r is the routing's weight.
    x [B, S, H] -> y, Routing of the B*S tokens.  kv (SkippableKV) needs a causal router: skipped tokens write none.
    """

    def __init__(self, block: nn.Module, router: DepthRouter | TokenDepthRouter):
        super().__init__()
        self.block, self.router = block, router

    def forward(
        self, x: Tensor, context: RouterContext | None = None, positions: Tensor | None = None, kv=None
    ) -> tuple[Tensor, Routing]:
        if kv is not None and not self.router.causal:
            raise ValueError("kv must be None unless router.causal_() was called, got a cache")
        B, S, H = x.shape
        boundaries = torch.arange(B + 1, device=x.device, dtype=torch.int32) * S
        context = replace(context or RouterContext(), cu_seqlens=boundaries)
        routing = self.router(x.reshape(-1, H), context)
        limit = None if self.router.causal else min(S, self.router.limit(S, context.step))

        def delta(rows_NH, rows):
            return self.block.delta(rows_NH, rows, kv)

        chosen, weights = chosen_of(routing), routing.weights
        return run_chosen(delta, x, chosen, weights, limit=limit, positions=positions, context=context), routing
