"""The whole expert FFN over packed weights (moert.quant, docs/quantized.md).

Letters: T tokens, H hidden, I intermediate, E experts, k choices per token; 2I is I where the activation is not gated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moert import _C
from moert.numerics import is_batch_invariant
from moert.ops.autocast import autocast
from moert.ops.fused_experts import apply_activation
from moert.ops.kinds import expect, two_biases
from moert.ops.once_differentiable import once_differentiable
from moert.ops.same_device import same_device
from moert.quant.format import PackedTensor
from moert.quant.sub1 import SubOneBitTensor
from moert.types import Activation, Routing


def fused_experts_quantized(
    x: Tensor,
    routing: Routing,
    w1: PackedTensor | SubOneBitTensor,
    w2: PackedTensor | SubOneBitTensor,
    bias: tuple[Tensor | None, Tensor | None] = (None, None),
    activation: str | Activation = "swiglu",
    precision: str = "auto",
    scale_on: str = "output",
) -> Tensor:
    """y[t] = sum over j of weights[t, j] * FFN_ids[t, j](x[t]), in choice order, as fused_experts.

    x [T, H], w1 packed [E, 2I, H] (gate rows, then up rows), w2 packed [E, H, I], bias ([E, 2I], [E, H]) -> y [T, H].
    precision is that of the rows of both products: "full"; "bfloat16", which the weights are rounded to as well;
    "int8", a scale a token; "int8_group32" and "int8_group160", a scale every 32 or 160 columns; "int8_weights" over
    int8, int4 and mxfp4, as "int8", and weights in groups become int8 with a scale a row; over fp8 weights
    "fp8_group128", e4m3 and a scale every 128 columns; "auto", what default_precision says.  "bfloat16", "int8_weights"
    and "int8_group160" are on a CPU alone; on a GPU "auto" is "full".  Gradients go to x and the routing weights alone,
    and are those of full precision.  NaN or infinity in a token makes its whole output NaN in all but "full" and
    "bfloat16".
    """
    activation = Activation.of(activation)
    expect(Tensor, x=x)
    expect(Routing, routing=routing)
    expect((PackedTensor, SubOneBitTensor), w1=w1, w2=w2)
    if routing.num_experts != w1.shape[0]:
        raise ValueError(f"w1 must have E=routing.num_experts={routing.num_experts} experts, got {w1.shape[0]}")
    if x.dim() == 2 and x.shape[1] != w1.columns:
        raise ValueError(f"x must have H={w1.columns} columns, as w1 has, got {x.shape[1]}")
    for name, w in (("w1", w1), ("w2", w2)):
        if any(part is not None and part.requires_grad for part in w.operands):
            raise ValueError(f"{name} must not require gradients: packed weights have none")
    x, b1, b2 = autocast(x, *two_biases(bias))
    return torch.ops.moert.fused_experts_quantized(
        x,
        routing.ids,
        routing.weights,
        *w1.operands,
        *w2.operands,
        b1,
        b2,
        w1.format.name,
        _group(w1),
        w2.format.name,
        _group(w2),
        activation.name,
        activation.alpha,
        activation.limit,
        precision,
        scale_on,
    )


def default_precision(w1: PackedTensor | SubOneBitTensor, w2: PackedTensor | SubOneBitTensor, rows: int = 0) -> str:
    """What "auto" is on a CPU: the finer one of the two matrices (docs/quantized.md says how it was measured), or
    "bfloat16" where the CPU has tile registers and `rows`, the ids that are not dropped, are many for the experts.
    """
    order = ("int8_group160", "int8_group32", "full")
    each = (_C.default_precision(w.format.name, _group(w), getattr(w.format, "planes", 0)) for w in (w1, w2))
    by_format = max(each, key=order.index)
    least = _C.bf16_rows(by_format, all(w.format.name.startswith("ternary") for w in (w1, w2)))
    return "bfloat16" if least and rows >= least * w1.shape[0] else by_format


def _group(w: PackedTensor | SubOneBitTensor) -> int:
    return getattr(w.format, "group", None) or 0


def fused_experts_quantized_ref(
    x, routing, w1, w2, bias=(None, None), activation="swiglu", precision="auto", scale_on="output"
):
    activation = Activation.of(activation)
    if precision == "auto":
        rows = 0 if is_batch_invariant() else int((routing.ids >= 0).sum())
        precision = "full" if x.is_cuda else default_precision(w1, w2, rows)
    first, second = (w.format.unpack(w).to(x.dtype) for w in (w1, w2))
    if precision == "bfloat16":
        first, second = first.bfloat16().to(x.dtype), second.bfloat16().to(x.dtype)
    if precision == "int8_weights":
        first, second = rounded_weights(w1).to(x.dtype), rounded_weights(w2).to(x.dtype)
        precision = "int8"
    b1, b2 = bias
    y = torch.zeros_like(x)
    for e in range(routing.num_experts):
        token, choice = torch.where(routing.ids.long() == e)
        weight = routing.weights[token, choice, None].to(x.dtype)
        h = F.linear(rounded(x[token], precision), first[e])
        h = h * weight if scale_on == "input" else h
        act = apply_activation(h if b1 is None else h + b1[e], activation)
        out = F.linear(rounded(act, precision), second[e], None if b2 is None else b2[e])
        y = y.index_add(0, token, out if scale_on == "input" else out * weight)
    return y


GROUPS = {"int8": None, "int8_group32": 32, "int8_group160": 160, "fp8_group128": 128}  # columns of a scale; None: all


def rounded(x: Tensor, precision: str) -> Tensor:
    """The rows that codes stand for: x [S, K] to the nearest multiple of max|x| / 127 of its row or group, to the
    nearest e4m3 times max|x| / 448, or to the nearest bfloat16.
    """
    if precision == "full" or x.numel() == 0:
        return x
    if precision == "bfloat16":
        return x.bfloat16().to(x.dtype)
    K = x.shape[1]
    group = GROUPS[precision] or K
    fp8 = precision == "fp8_group128"
    grouped = F.pad(x.float(), (0, -K % group)).unflatten(1, (-1, group))
    scale = grouped.abs().amax(-1, keepdim=True) / (448 if fp8 else 127)
    codes = torch.where(scale > 0, grouped / scale, 0)
    codes = codes.to(torch.float8_e4m3fn).to(x.dtype) if fp8 else codes.round()
    return (codes * scale.to(x.dtype)).flatten(1)[:, :K].to(x.dtype)


def rounded_weights(w: PackedTensor) -> Tensor:
    """w [E, N, K] in groups to the nearest multiple of a scale a row, the largest that its groups can hold / 127; what
    a group's scale is of the row's is rounded to a 2048th.
    """
    group = _group(w)
    if not group:
        return w.format.unpack(w).float()
    ones = torch.full_like(w.scales, 127 if w.format.name == "mxfp4" else 1)
    values = w.format.unpack(PackedTensor(w.format, w.columns, w.codes, ones, w.zeros)).float()
    scales = w.scales.float()
    if w.format.name == "mxfp4":  # values are multiples of a half
        values, scales = 2 * values, torch.exp2(scales - 128)
    largest = {"int8": 127, "int4": 8, "mxfp4": 12}
    by_code = torch.maximum(w.zeros, 15 - w.zeros) if w.zeros is not None else largest[w.format.name]
    most = (scales * by_code).abs().amax(-1, keepdim=True)
    scale = most / 127
    scale = torch.where(scale < 2.0**-116, 0, scale)
    factors = (scales * torch.where(scale > 0, 2048 / scale, 0)).round() / 2048
    return (values * factors.repeat_interleave(group, -1)[..., : w.columns] + 0.5).floor() * scale


TENSORS = ("x", "ids", "weights", "codes1", "scales1", "zeros1", "codes2", "scales2", "zeros2", "b1", "b2")


@torch.library.register_fake("moert::fused_experts_quantized")
def _(*args):
    same_device(**dict(zip(TENSORS, args, strict=False)))
    return args[0].new_empty(args[0].shape)


@torch.library.register_fake("moert::fused_experts_quantized_backward")
def _(dy, x, ids, weights, *args):
    same_device(dy=dy, **dict(zip(TENSORS, (x, ids, weights, *args), strict=False)))
    (T, k), needs = weights.shape, args[-1]
    return x.new_empty(x.shape if needs & 1 else (0,)), weights.new_empty(T if needs & 2 else 0, k)


def _setup_context(ctx, inputs, output):
    *tensors, format1, group1, format2, group2, act, alpha, limit, _, scale_on = inputs
    ctx.options = (format1, group1, format2, group2, act, alpha, limit, scale_on)
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    if any(ctx.needs_input_grad[9:11]):
        raise RuntimeError("bias must not require gradients over packed weights, got one that does")
    needs = wanted[0] + 2 * wanted[1]
    grads = torch.ops.moert.fused_experts_quantized_backward(dy, *ctx.saved_tensors, *ctx.options, needs)
    dx, dweights = (g if want else None for g, want in zip(grads, wanted, strict=True))
    return dx, None, dweights, *(None,) * 17


torch.library.register_autograd("moert::fused_experts_quantized", _backward, setup_context=_setup_context)
once_differentiable("moert::fused_experts_quantized_backward", "fused_experts_quantized")
