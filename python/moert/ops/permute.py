"""Permute: rows from token order to expert order and back.

Letters: T tokens, k choices per token, E experts, H hidden; T*k slots, of which the last offsets[E].. are unused.
"""

import torch
from torch import Tensor

from moert.ops.same_device import same_device
from moert.types import DispatchPlan


def permute_plan(ids: Tensor, num_experts: int) -> DispatchPlan:
    """Stable counting sort of the choices by expert.

    ids [T, k] of any integer dtype -> offsets [E+1], tokens [T*k], slots [T, k], all int32 (see DispatchPlan).
    An id outside [0, num_experts) is dropped: its slot is -1, and the last slots have no token.
    """
    return DispatchPlan(*torch.ops.moert.permute_plan(ids, num_experts))


def permute(x: Tensor, plan: DispatchPlan) -> Tensor:
    """Rows in expert order: x [T, H] -> rows [T*k, H] with rows[s] = x[tokens[s]]; unused slots are zero."""
    return torch.ops.moert.permute(x, plan.tokens, plan.slots)


def unpermute(rows: Tensor, plan: DispatchPlan, weights: Tensor | None = None) -> Tensor:
    """Rows back in token order, summed over the choices: y[t] = sum over j of weights[t, j] * rows[slots[t, j]].

    rows [T*k, H], weights [T, k] (None: all one) -> y [T, H] in the dtype of rows.  The sum is kept in float32 (float64
    for float64) and taken in choice order; dropped choices add nothing and get no gradient, whatever their weight.
    """
    return torch.ops.moert.unpermute(rows, plan.tokens, plan.slots, weights)


def permute_plan_ref(ids: Tensor, num_experts: int) -> DispatchPlan:
    T, k = ids.shape
    expert = ids.flatten().long()
    expert = torch.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    order = expert.argsort(stable=True)
    count = torch.bincount(expert, minlength=num_experts + 1)[:num_experts]
    offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
    tokens = torch.arange(T).repeat_interleave(k)[order]
    tokens[offsets[-1] :] = -1
    slots = torch.empty_like(order).scatter_(0, order, torch.arange(T * k))
    slots[expert == num_experts] = -1
    return DispatchPlan(offsets.int(), tokens.int(), slots.view(T, k).int())


def permute_ref(x: Tensor, plan: DispatchPlan) -> Tensor:
    return x[plan.tokens.clamp_min(0).long()].masked_fill(plan.tokens[:, None] < 0, 0)


def unpermute_ref(rows: Tensor, plan: DispatchPlan, weights: Tensor | None = None) -> Tensor:
    y = rows.new_zeros(plan.slots.shape[0], rows.shape[1])
    for j, slot in enumerate(plan.slots.T):
        token = torch.where(slot >= 0)[0]
        chosen = rows[slot[token].long()]
        y = y.index_add(0, token, chosen if weights is None else chosen * weights[token, j, None].to(rows.dtype))
    return y


@torch.library.register_fake("moert::permute_plan")
def _(ids, num_experts):
    T, k = ids.shape
    return tuple(ids.new_empty(shape, dtype=torch.int32) for shape in ((num_experts + 1,), (T * k,), (T, k)))


@torch.library.register_fake("moert::permute")
def _(x, tokens, slots):
    same_device(x=x, tokens=tokens, slots=slots)
    return x.new_empty(tokens.shape[0], x.shape[1])


@torch.library.register_fake("moert::unpermute")
def _(rows, tokens, slots, weights):
    same_device(rows=rows, tokens=tokens, slots=slots, weights=weights)
    return rows.new_empty(slots.shape[0], rows.shape[1])


@torch.library.register_fake("moert::unpermute_backward")
def _(dy, rows, tokens, slots, weights):
    same_device(dy=dy, rows=rows, tokens=tokens, slots=slots, weights=weights)
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


# The operators are closed under differentiation: permute and plain unpermute are each other's transpose, and the
# gradient of unpermute_backward, bilinear in (dy, rows) and (dy, weights), is unpermute and itself again.


def _setup_permute(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _permute_backward(ctx, drows):
    return torch.ops.moert.unpermute(drows, *ctx.saved_tensors, None), None, None


def _setup_unpermute(ctx, inputs, output):
    rows, tokens, slots, weights = inputs
    # Without weights the gradient does not depend on the rows: they need not stay in memory.
    ctx.save_for_backward(None if weights is None else rows, tokens, slots, weights)


def _unpermute_backward(ctx, dy):
    rows, tokens, slots, weights = ctx.saved_tensors
    if weights is None:
        return torch.ops.moert.permute(dy, tokens, slots), None, None, None
    drows, dweights = torch.ops.moert.unpermute_backward(dy, rows, tokens, slots, weights)
    return drows, None, None, dweights


def _setup_unpermute_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _unpermute_backward_backward(ctx, ddrows, ddweights):
    dy, rows, tokens, slots, weights = ctx.saved_tensors
    ddy = torch.ops.moert.unpermute(ddrows, tokens, slots, weights)
    ddy = ddy + torch.ops.moert.unpermute(rows, tokens, slots, ddweights)
    grad_rows, grad_weights = torch.ops.moert.unpermute_backward(dy, ddrows, tokens, slots, ddweights)
    return ddy, grad_rows, None, None, grad_weights


torch.library.register_autograd("moert::permute", _permute_backward, setup_context=_setup_permute)
torch.library.register_autograd("moert::unpermute", _unpermute_backward, setup_context=_setup_unpermute)
torch.library.register_autograd(
    "moert::unpermute_backward", _unpermute_backward_backward, setup_context=_setup_unpermute_backward
)
