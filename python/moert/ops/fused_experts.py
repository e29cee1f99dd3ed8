"""The whole expert FFN in one operator: gather, GEMM, activation, GEMM, weighted combine.

Letters: T tokens, H hidden, I intermediate, E experts, k choices per token; 2I is I where the activation is not gated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moert.ops.autocast import autocast
from moert.ops.kinds import OPTIONAL, expect, two_biases
from moert.ops.once_differentiable import once_differentiable
from moert.ops.precision import rounds_to_tf32
from moert.ops.same_device import same_device
from moert.types import Activation, ExpertLayout, Onto, Routing


def fused_experts(
    x: Tensor,
    routing: Routing,
    w1: Tensor,
    w2: Tensor,
    bias: tuple[Tensor | None, Tensor | None] = (None, None),
    activation: str | Activation = "swiglu",
    layout: ExpertLayout = ExpertLayout(),
    scale_on: str = "output",
) -> Tensor:
    """y[t] = sum over j of weights[t, j] * FFN_ids[t, j](x[t]), in choice order.

    x [T, H], w1 [E, 2I, H], w2 [E, H, I] (see ExpertLayout), bias ([E, 2I], [E, H]) -> y [T, H] in x's dtype.
    scale_on="input" multiplies the routing weight into the expert's input instead of its output (Llama 4).
    Ids outside [0, E) are dropped: they add nothing and get no gradient.  A routing.plan must be that of the ids; a CPU
    looks whether it is, a GPU does not.
    On a GPU float32 factors are rounded to tf32, in backward too, where torch's own float32 matrix products may be.
    w1 and w2 may lie in panels, as moert.prepack_ leaves them; then there are no gradients.

    Where moert.runtime.add_to_main_grad_ has marked a weight or bias, it gets no gradient: the backward adds it to the
    tensor that is its attribute main_grad, unrounded.
    """
    return _fused_experts(x, routing, w1, w2, Onto(), bias, activation, layout, scale_on)


def fused_experts_onto(
    x: Tensor,
    routing: Routing,
    w1: Tensor,
    w2: Tensor,
    onto: Onto,
    bias: tuple[Tensor | None, Tensor | None] = (None, None),
    activation: str | Activation = "swiglu",
    layout: ExpertLayout = ExpertLayout(),
) -> Tensor:
    """fused_experts plus rows of the tokens and constants (see Onto), added in its combine and rounded once with it."""
    return _fused_experts(x, routing, w1, w2, onto, bias, activation, layout, "output")


def _fused_experts(x, routing, w1, w2, onto, bias, activation, layout, scale_on):
    activation = Activation.of(activation)
    expect(Tensor, x=x, w1=w1, w2=w2)
    expect(Routing, routing=routing)
    expect(Tensor, ids=routing.ids, weights=routing.weights)
    expect(Onto, onto=onto)
    expect(ExpertLayout, layout=layout)
    parameters = (w1, w2, *two_biases(bias))  # autocast's have no attributes
    if routing.num_experts != w1.shape[0]:
        raise ValueError(f"w1 must have E=routing.num_experts={routing.num_experts} experts, got {w1.shape[0]}")
    x, w1, w2, b1, b2, rows, constants = autocast(x, *parameters, onto.rows, onto.constants)
    added = (rows, onto.scale, onto.mix, constants)
    tensors = (x, routing.weights, w1, w2, b1, b2, *added)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if save and w1.dim() == 5:
        raise ValueError("w1 must not lie in panels where gradients are wanted, got prepacked weights (unprepack_)")
    gate = (activation.name, activation.alpha, activation.limit, layout.transposed, layout.interleaved)
    routed = (x, routing.ids, routing.weights, w1, w2, b1, b2)
    plan = routing.plan
    plan = (None, None, None) if plan is None else (plan.offsets, plan.tokens, plan.slots)
    rest = (*plan, *added, *(_main_grads(parameters) if save else (None,) * 4))
    tf32 = rounds_to_tf32(x)
    # For one token every argument counts: what nobody gave is left out.
    rest = (*rest, tf32) if tf32 or any(t is not None for t in rest) else ()
    try:
        return torch.ops.moert.fused_experts(*routed, *gate, scale_on, save, *rest)[0]
    except RuntimeError:
        _check_columns(x, w1, w2, layout.transposed)
        raise


def _check_columns(x, w1, w2, transposed):
    """Where both weights have another H than x, x is wrong; the operator, which goes by x, names w1.

    Asked once it has failed: to look at three shapes takes 0.8 us, much beside one token's rows.
    """
    if x.dim() != 2 or w1.dim() != 3 or w2.dim() != 3:
        return
    (H, H2) = (w1.shape[1], w2.shape[2]) if transposed else (w1.shape[2], w2.shape[1])
    if H == H2 != x.shape[1]:
        raise ValueError(f"x must have H={H} columns, as w1 and w2 have, got {x.shape[1]}") from None


def _main_grads(parameters):
    marked = [getattr(p, "adds_to_main_grad", False) and p.requires_grad for p in parameters]
    grads = [getattr(p, "main_grad", None) if mark else None for p, mark in zip(parameters, marked, strict=True)]
    names = ("w1_main_grad", "w2_main_grad", "b1_main_grad", "b2_main_grad")
    expect(OPTIONAL, **dict(zip(names, grads, strict=True)))
    return grads


def apply_activation(h: Tensor, activation: Activation, interleaved: bool = False) -> Tensor:
    """The activation in plain torch: h [S, 2I] -> [S, I] (or [S, I] -> [S, I] where it is not gated)."""
    name, limit = activation.name, activation.limit
    if not activation.gated:
        return _UNGATED[name](h)
    gate, up = (h[..., ::2], h[..., 1::2]) if interleaved else h.chunk(2, -1)
    if name == "swiglu_oai":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)
    if name == "swiglu_clamped":
        return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    return _GATES[name](gate) * up


_UNGATED = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda h: F.relu(h).square(),
    "identity": lambda h: h,
}
_GATES = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": _UNGATED["gelu_tanh"], "reglu": F.relu}


def fused_experts_ref(
    x, routing, w1, w2, bias=(None, None), activation="swiglu", layout=ExpertLayout(), scale_on="output"
):
    activation = Activation.of(activation)
    b1, b2 = bias
    ids, weights = routing.ids.long(), routing.weights.to(x.dtype)
    if layout.transposed:
        w1, w2 = w1.mT, w2.mT
    y = torch.zeros_like(x)
    for e in range(routing.num_experts):
        token, choice = torch.where(ids == e)
        scale = weights[token, choice, None]
        rows = x[token] * scale if scale_on == "input" else x[token]
        h = F.linear(rows, w1[e], None if b1 is None else b1[e])
        out = F.linear(apply_activation(h, activation, layout.interleaved), w2[e], None if b2 is None else b2[e])
        y = y.index_add(0, token, out if scale_on == "input" else out * scale)
    return y


def fused_experts_onto_ref(x, routing, w1, w2, onto, bias=(None, None), activation="swiglu", layout=ExpertLayout()):
    y = fused_experts_ref(x, routing, w1, w2, bias, activation, layout)
    for t in range(len(x)):
        start = torch.zeros_like(y[t])
        if onto.rows is not None:
            start = onto.rows[t] if onto.scale is None else onto.rows[t] * onto.scale[t].to(x.dtype)
        for c in range(0 if onto.mix is None else onto.mix.shape[1]):
            start = start + onto.mix[t, c].to(x.dtype) * onto.constants[c]
        y = y.index_add(0, torch.tensor([t]), start[None])
    return y


@torch.library.register_fake("moert::fused_experts")
def _(
    x, ids, weights, w1, w2, b1, b2, activation, alpha, limit, transposed, interleaved, scale_on, save,
    offsets=None, tokens=None, slots=None, onto_rows=None, onto_scale=None, mix=None, constants=None,
    w1_main_grad=None, w2_main_grad=None, b1_main_grad=None, b2_main_grad=None, tf32=False,
):  # fmt: skip
    same_device(
        x=x, ids=ids, weights=weights, w1=w1, w2=w2, b1=b1, b2=b2, offsets=offsets, tokens=tokens, slots=slots,
        onto_rows=onto_rows, onto_scale=onto_scale, mix=mix, constants=constants,
        w1_main_grad=w1_main_grad, w2_main_grad=w2_main_grad, b1_main_grad=b1_main_grad, b2_main_grad=b2_main_grad,
    )  # fmt: skip
    rows = ids.shape[0] * ids.shape[1] if tokens is None else tokens.shape[0]
    width = w1.shape[1] * w1.shape[3] if w1.dim() == 5 else w1.shape[2] if transposed else w1.shape[1]
    return x.new_empty(x.shape), x.new_empty(rows if save else 0, width)


@torch.library.register_fake("moert::fused_experts_backward")
def _(
    dy, x, ids, weights, w1, w2, b1, b2, h, activation, alpha, limit, transposed, interleaved, scale_on, needs,
    offsets=None, tokens=None, slots=None, tf32=False,
):  # fmt: skip
    same_device(
        dy=dy, x=x, ids=ids, weights=weights, w1=w1, w2=w2, b1=b1, b2=b2, h=h,
        offsets=offsets, tokens=tokens, slots=slots,
    )  # fmt: skip
    return _empty_gradients((x, weights, w1, w2, b1, b2), needs)


@torch.library.register_fake("moert::fused_experts_backward_")
def _(
    dy, x, ids, weights, w1, w2, b1, b2, h, w1_main_grad, w2_main_grad, b1_main_grad, b2_main_grad, activation, alpha,
    limit, transposed, interleaved, scale_on, needs, offsets=None, tokens=None, slots=None, tf32=False,
):  # fmt: skip
    same_device(
        dy=dy, x=x, ids=ids, weights=weights, w1=w1, w2=w2, b1=b1, b2=b2, h=h,
        w1_main_grad=w1_main_grad, w2_main_grad=w2_main_grad, b1_main_grad=b1_main_grad, b2_main_grad=b2_main_grad,
        offsets=offsets, tokens=tokens, slots=slots,
    )  # fmt: skip
    added = (w1_main_grad, w2_main_grad, b1_main_grad, b2_main_grad)
    needs &= ~sum(4 << i for i, grad in enumerate(added) if grad is not None)
    return _empty_gradients((x, weights, w1, w2, b1, b2), needs)


def _empty_gradients(like, needs):
    """One of each tensor whose bit is set, and empty ones."""
    x, weights, *_ = like
    out = []
    for bit, tensor in enumerate(like):
        needed = tensor is not None and needs >> bit & 1
        empty = (0, weights.shape[1]) if bit == 1 else (0,)
        out.append((x if tensor is None else tensor).new_empty(tensor.shape if needed else empty))
    return tuple(out)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation, ctx.alpha, ctx.limit, ctx.transposed, ctx.interleaved, ctx.scale_on, _ = inputs[:14]
    absent = (None,) * (26 - len(inputs))  # arguments at the end that were left out
    *plan, rows, scale, mix, constants, _, _, _, _, tf32 = rest = (*inputs[14:], *absent)
    ctx.tf32 = bool(tf32)
    # Not saved: other backward passes, of other batches too, may add to them before this one does.
    ctx.main_grads = rest[7:11]
    # The gradient of rows that nothing scales is dy: whoever made them may free them.
    ctx.save_for_backward(*tensors, output[1], *plan, None if scale is None else rows, scale, mix, constants)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _):
    x, ids, weights, w1, w2, b1, b2, h, *plan, rows, scale, mix, constants = ctx.saved_tensors
    given = len(ctx.needs_input_grad)
    if dy is None:
        return (None,) * given
    wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4, 5, 6)]
    needs_onto = (*ctx.needs_input_grad[17:21], *(False,) * (21 - given))
    donto = _onto_gradients(dy, rows, scale, mix, constants, needs_onto)
    if not any(wanted):
        return ((None,) * 17 + donto + (None,) * 5)[:given]
    needs = sum(1 << bit for bit, want in enumerate(wanted) if want)
    choices = (ctx.activation, ctx.alpha, ctx.limit, ctx.transposed, ctx.interleaved, ctx.scale_on)
    out = _gradients(
        (dy, x, ids, weights, w1, w2, b1, b2, h), ctx.main_grads, (*choices, needs, *plan, ctx.tf32), wanted[2:]
    )
    returned = [want and grad is None for want, grad in zip(wanted, (None, None, *ctx.main_grads), strict=True)]
    dx, dweights, dw1, dw2, db1, db2 = (g if here else None for g, here in zip(out, returned, strict=True))
    return (dx, None, dweights, dw1, dw2, db1, db2, *(None,) * 10, *donto, *(None,) * 5)[:given]


def _gradients(tensors, main_grads, rest, wanted):
    """Those of fused_experts_backward; what has a main_grad, and is wanted, is added to it."""
    main_grads = tuple(grad if want else None for grad, want in zip(main_grads, wanted, strict=True))
    if all(grad is None for grad in main_grads):
        return torch.ops.moert.fused_experts_backward(*tensors, *rest)
    if torch.is_grad_enabled():  # an operator that writes has no gradient, and no error of its own
        raise RuntimeError("create_graph must be False where gradients are added to a main_grad, got True")
    # As every write in place does, for graphs that saved them.
    torch.autograd.graph.increment_version([grad for grad in main_grads if grad is not None])
    return torch.ops.moert.fused_experts_backward_(*tensors, *main_grads, *rest)


def _onto_gradients(dy, rows, scale, mix, constants, needs):
    """Those of onto_rows, onto_scale, mix and constants, in the type of sums before they are rounded."""
    drows = dscale = dmix = dconstants = None
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    if needs[0]:
        drows = dy if scale is None else (dy * scale[:, None].to(wide)).to(rows.dtype)
    if needs[1]:
        dscale = (dy.to(wide) * rows).sum(-1).to(scale.dtype)
    if needs[2]:
        dmix = (dy.to(wide) @ constants.T.to(wide)).to(mix.dtype)
    if needs[3]:
        dconstants = (mix.T.to(wide) @ dy.to(wide)).to(constants.dtype)
    return drows, dscale, dmix, dconstants


torch.library.register_autograd("moert::fused_experts", _backward, setup_context=_setup_context)
once_differentiable("moert::fused_experts_backward", "fused_experts")
