"""Permute: rows from token order to expert order and back.

Letters: T tokens, k choices per token, E experts, H hidden; S slots: T*k, of which offsets[E].. are unused, or
E*capacity.
"""

import torch
from torch import Tensor

from moert.ops.kinds import OPTIONAL, expect
from moert.ops.same_device import same_device
from moert.types import DispatchPlan, Routing


def permute_plan(ids: Tensor, num_experts: int, capacity: int | None = None) -> DispatchPlan:
    """Stable counting sort of the choices by expert.

    ids [T, k] of any integer dtype -> offsets [E+1], tokens [S], slots [T, k], all int32 (see DispatchPlan).
    An id outside [0, num_experts) is dropped: its slot is -1, and the last of the S = T*k slots have no token.
    With a capacity every expert has that many slots, S = E*capacity; its later choices are dropped, and slots that it
    does not need have no token: a rectangle, whose sizes do not depend on the ids.
    """
    expect(Tensor, ids=ids)
    return DispatchPlan(*torch.ops.moert.permute_plan(ids, num_experts, capacity))


def plan_of(routing: Routing) -> DispatchPlan:
    """The plan that a routing brings along, else that of its ids.

    One of other sizes is an error; that it is another one of the same sizes nobody sees here.
    """
    plan = routing.plan
    if plan is None:
        return permute_plan(routing.ids, routing.num_experts)
    for name, wanted in (("slots", routing.ids.shape), ("offsets", (routing.num_experts + 1,))):
        if (got := getattr(plan, name).shape) != wanted:
            raise ValueError(f"{name} of routing.plan must have shape {list(wanted)}, got {list(got)}")
    return plan


def permute(x: Tensor, plan: DispatchPlan) -> Tensor:
    """Rows in expert order: x [T, H] -> rows [S, H] with rows[s] = x[tokens[s]]; unused slots are zero."""
    expect(Tensor, x=x)
    expect(DispatchPlan, plan=plan)
    return torch.ops.moert.permute(x, plan.tokens, plan.slots)


def unpermute(
    rows: Tensor, plan: DispatchPlan, weights: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Rows back in token order: y[t] = residual[t] + sum over j of weights[t, j] * rows[slots[t, j]].

    rows [S, H], weights [T, k] (None: all one), residual [T, H] (None: zero) -> y [T, H] in the dtype of rows.  The sum
    is kept in float32 (float64 for float64) and taken in choice order; dropped choices add nothing and get no gradient,
    whatever their weight.
    """
    expect(Tensor, rows=rows)
    expect(DispatchPlan, plan=plan)
    expect(OPTIONAL, weights=weights, residual=residual)
    return torch.ops.moert.unpermute(rows, plan.tokens, plan.slots, weights, residual)


def permute_plan_ref(ids: Tensor, num_experts: int, capacity: int | None = None) -> DispatchPlan:
    if capacity is not None:
        return _capacity_plan_ref(ids, num_experts, capacity)
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


def _capacity_plan_ref(ids, num_experts, capacity):
    slots = torch.full(ids.shape, -1)
    tokens = torch.full((num_experts * capacity,), -1)
    for e in range(num_experts):
        token, choice = (index[:capacity] for index in torch.where(ids.long() == e))
        slots[token, choice] = slot = e * capacity + torch.arange(len(token))
        tokens[slot] = token
    offsets = torch.arange(num_experts + 1) * capacity
    return DispatchPlan(offsets.int(), tokens.int(), slots.int())


def permute_ref(x: Tensor, plan: DispatchPlan) -> Tensor:
    used = torch.where(plan.tokens >= 0)[0]
    return x.new_zeros(len(plan.tokens), x.shape[1]).index_copy(0, used, x[plan.tokens[used].long()])


def unpermute_ref(
    rows: Tensor, plan: DispatchPlan, weights: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    y = rows.new_zeros(plan.slots.shape[0], rows.shape[1]) if residual is None else residual
    for j, slot in enumerate(plan.slots.T):
        token = torch.where(slot >= 0)[0]
        chosen = rows[slot[token].long()]
        y = y.index_add(0, token, chosen if weights is None else chosen * weights[token, j, None].to(rows.dtype))
    return y


@torch.library.register_fake("moert::permute_plan")
def _(ids, num_experts, capacity=None):
    T, k = ids.shape
    S = T * k if capacity is None else num_experts * capacity
    return tuple(ids.new_empty(shape, dtype=torch.int32) for shape in ((num_experts + 1,), (S,), (T, k)))


@torch.library.register_fake("moert::permute")
def _(x, tokens, slots):
    same_device(x=x, tokens=tokens, slots=slots)
    return x.new_empty(tokens.shape[0], x.shape[1])


@torch.library.register_fake("moert::unpermute")
def _(rows, tokens, slots, weights, residual=None):
    same_device(rows=rows, tokens=tokens, slots=slots, weights=weights, residual=residual)
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
    rows, tokens, slots, weights, ctx.residual = *inputs[:4], inputs[4] is not None
    # Without weights the gradient does not depend on the rows: they need not stay in memory.
    ctx.save_for_backward(None if weights is None else rows, tokens, slots, weights)


def _unpermute_backward(ctx, dy):
    rows, tokens, slots, weights = ctx.saved_tensors
    dresidual = dy if ctx.residual else None
    if weights is None:
        return torch.ops.moert.permute(dy, tokens, slots), None, None, None, dresidual
    drows, dweights = torch.ops.moert.unpermute_backward(dy, rows, tokens, slots, weights)
    return drows, None, None, dweights, dresidual


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
