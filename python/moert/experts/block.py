"""One feed-forward network cut into blocks that are its experts (BlockFFN, arXiv:2507.08771; arXiv:2303.01610)."""

from math import log2

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moert.experts.base import Experts
from moert.ops.autocast import autocast_dtype
from moert.ops.fused_experts import apply_activation, fused_experts
from moert.ops.union_experts import experts_in_use, union_experts
from moert.pages import in_large_pages
from moert.types import Activation, Routing

MODES = ("auto", "dense", "token", "union")


class BlockExperts(Experts):
    """num_experts blocks of `block` columns of one network; up_proj [E, block, H], down_proj [E, block, H].

    All blocks together are a dense network (down_proj holds columns as rows, so that a block is one piece of memory).
    It runs in one of three modes of the same result:

    dense   two products over the whole network, each block's activations times the routing weight
    token   fused_experts: only what each token uses
    union   union_experts: what any of the tokens uses, for all of them; for few tokens, without gradient

    auto takes union for up to union_tokens tokens; else token where fewer than a share sparse_below of all (token,
    expert) pairs are used, else dense.  sparse_below None is where the two were as fast, forward and backward together,
    measured on one core with AVX-512 for blocks of 64, 128, 256: .8, .9, 1 in float32, .6, .75, .9 in lower precision
    (wider blocks make better rows).  Under torch.compile the share is not counted: it is k / E.
    """

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        block: int,
        act: str = "silu",
        bias: bool = False,
        mode: str = "auto",
        union_tokens: int = 64,
        sparse_below: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, size in (("hidden", hidden), ("num_experts", num_experts), ("block", block)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode}")
        self.activation = Activation(act)
        if self.activation.gated:
            raise ValueError(f"act must be an activation without a gate, got {act}")
        self.hidden, self.num_experts, self.block, self.mode = hidden, num_experts, block, mode
        self.union_tokens, self.sparse_below = union_tokens, sparse_below

        def parameter(*shape):
            return nn.Parameter(in_large_pages(torch.empty(num_experts, *shape, device=device, dtype=dtype)))

        self.up_proj, self.down_proj = parameter(block, hidden), parameter(block, hidden)
        self.up_proj_bias, self.down_proj_bias = (parameter(block), parameter(hidden)) if bias else (None, None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the two linear layers of the dense network."""
        width = self.num_experts * self.block
        for fan_in, parameters in (
            (self.hidden, (self.up_proj, self.up_proj_bias)),
            (width, (self.down_proj, self.down_proj_bias)),
        ):
            for parameter in parameters:
                if parameter is not None:
                    nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        return getattr(self, f"_{self._mode(x, routing)}")(x, routing)

    def _mode(self, x: Tensor, routing: Routing) -> str:
        if self.mode != "auto":
            return self.mode
        if not torch.is_grad_enabled() and x.shape[0] <= self.union_tokens:
            return "union"
        below = _sparse_below(self.block, autocast_dtype(x)) if self.sparse_below is None else self.sparse_below
        return "token" if self._share(routing) < below else "dense"

    def _share(self, routing: Routing) -> float:
        """Of all (token, expert) pairs, those in use; under torch.compile those that could be."""
        T, k = routing.ids.shape
        if torch.compiler.is_compiling() or T == 0:
            return k / self.num_experts
        used = (routing.ids >= 0) & (routing.ids < self.num_experts)
        return used.sum().item() / (T * self.num_experts)

    def _dense(self, x: Tensor, routing: Routing) -> Tensor:
        gains_TE = routing.dense_weights()
        bias = None if self.up_proj_bias is None else self.up_proj_bias.flatten()
        h_TEI = F.linear(x, self.up_proj.flatten(0, 1), bias).unflatten(-1, (self.num_experts, self.block))
        a_TEI = apply_activation(h_TEI, self.activation) * gains_TE[..., None].to(h_TEI.dtype)
        # Under autocast the activations have its dtype, and the product's other side follows.
        y = F.linear(a_TEI.flatten(1), self.down_proj.flatten(0, 1).T)
        if self.down_proj_bias is None:
            return y
        return y + F.linear(gains_TE.to(y.dtype), self.down_proj_bias.T)

    def _token(self, x: Tensor, routing: Routing) -> Tensor:
        bias = (self.up_proj_bias, self.down_proj_bias)
        return fused_experts(x, routing, self.up_proj, self.down_proj.mT, bias, self.activation)

    def _union(self, x: Tensor, routing: Routing) -> Tensor:
        gains_TE, bias = routing.dense_weights(), (self.up_proj_bias, self.down_proj_bias)
        ids = experts_in_use(gains_TE)
        return union_experts(x, gains_TE, ids, self.up_proj, self.down_proj.mT, bias, self.activation)

    def extra_repr(self) -> str:
        return (
            f"hidden={self.hidden}, num_experts={self.num_experts}, block={self.block}, "
            f"act={self.activation.name}, mode={self.mode}"
        )


def _sparse_below(block: int, dtype: torch.dtype) -> float:
    at_64, per_doubling = (0.8, 0.1) if dtype.itemsize >= 4 else (0.6, 0.15)
    return min(1.0, max(0.3, at_64 + per_doubling * log2(block / 64)))
