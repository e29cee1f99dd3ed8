"""The experts that a few tokens use between them, each computed for all of these tokens.

A feed-forward network that is sparse in blocks (BlockFFN, arXiv:2507.08771): no rows move, and each listed expert's
weights are read once.  Letters: T tokens, H hidden, I intermediate, E experts, n listed experts.
"""

import torch
from torch import Tensor

from moert.ops.autocast import autocast
from moert.ops.fused_experts import fused_experts_ref
from moert.ops.kinds import expect, two_biases
from moert.ops.same_device import same_device
from moert.types import Activation, ExpertLayout, Routing


def union_experts(
    x: Tensor,
    gains: Tensor,
    ids: Tensor,
    w1: Tensor,
    w2: Tensor,
    bias: tuple[Tensor | None, Tensor | None] = (None, None),
    activation: str | Activation = "silu",
    layout: ExpertLayout = ExpertLayout(),
) -> Tensor:
    """y[t] = sum over the listed experts e of gains[t, e] * FFN_e(x[t]), in the order of the list.

    x [T, H], gains [T, E], ids [n] of any integer dtype, w1 [E, 2I, H], w2 [E, H, I] (see ExpertLayout), bias ([E, 2I],
    [E, H]) -> y [T, H] in x's dtype.  Ids outside [0, E) are left out, so a list of a fixed length is padded with E; an
    id that is there twice counts twice.  Sums are float32 (float64 for float64).
    """
    activation = Activation.of(activation)
    expect(Tensor, x=x, gains=gains, ids=ids, w1=w1, w2=w2)
    expect(ExpertLayout, layout=layout)
    x, w1, w2, b1, b2 = autocast(x, w1, w2, *two_biases(bias))
    gate = (activation.name, activation.alpha, activation.limit)
    return torch.ops.moert.union_experts(x, gains, ids, w1, w2, b1, b2, *gate, layout.transposed, layout.interleaved)


def experts_in_use(gains: Tensor) -> Tensor:
    """The ids of the experts with a gain for any token: gains [T, E] -> [E] ascending, padded with E."""
    expect(Tensor, gains=gains)
    if gains.dim() != 2:
        raise ValueError(f"gains must have shape [T, E], got {list(gains.shape)}")
    E = gains.shape[1]
    every = torch.arange(E, device=gains.device, dtype=torch.int32)
    return torch.where((gains != 0).any(0), every, E).sort().values


def union_experts_ref(x, gains, ids, w1, w2, bias=(None, None), activation="silu", layout=ExpertLayout()):
    E = len(w1)
    listed = ids[(ids >= 0) & (ids < E)].long()
    routing = Routing(listed.expand(len(x), -1), gains[:, listed], E)
    return fused_experts_ref(x, routing, w1, w2, bias, activation, layout)


@torch.library.register_fake("moert::union_experts")
def _(x, gains, ids, w1, w2, b1, b2, activation, alpha, limit, transposed, interleaved):
    same_device(x=x, gains=gains, ids=ids, w1=w1, w2=w2, b1=b1, b2=b2)
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation, ctx.alpha, ctx.limit, ctx.transposed, ctx.interleaved = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    # The same sum as a routing of every token to every listed expert, whose backward is there already.
    x, gains, ids, w1, w2, b1, b2 = ctx.saved_tensors
    E, n = gains.shape[1], ids.shape[0]
    listed = ids.long()
    listed = torch.where((listed >= 0) & (listed < E), listed, E)
    routed = listed.expand(x.shape[0], n)
    weights = gains.gather(1, routed.clamp_max(E - 1))
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3, 4, 5, 6)]
    needs = sum(1 << bit for bit, want in enumerate(wanted) if want)
    h = x.new_empty(0, w1.shape[2] if ctx.transposed else w1.shape[1])
    choices = (ctx.activation, ctx.alpha, ctx.limit, ctx.transposed, ctx.interleaved, "output")
    out = torch.ops.moert.fused_experts_backward(dy, x, routed, weights, w1, w2, b1, b2, h, *choices, needs)
    dx, dweights, dw1, dw2, db1, db2 = (g if want else None for g, want in zip(out, wanted, strict=True))
    if dweights is not None:
        padded = gains.new_zeros(x.shape[0], E + 1)
        dweights = padded.scatter_add(1, routed, dweights.to(gains.dtype))[:, :E]
    return dx, dweights, None, dw1, dw2, db1, db2, *(None,) * 5


torch.library.register_autograd("moert::union_experts", _backward, setup_context=_setup_context)
