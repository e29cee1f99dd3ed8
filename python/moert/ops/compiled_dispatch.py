"""dispatch and combine inside torch.compile: each exchange is one operator, whose sizes are data-dependent.

What an eager call does happens inside the operator: the comparison of the ranks, the guard, the wait.  It returns when
the rows are here, so nothing overlaps.  Letters: T tokens, k choices, E experts of R ranks, N rows sent, M received.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from moert.ops.all_to_all import Splits, send_rows
from moert.ops.compiled_order import register_exchange
from moert.ops.expert_map import ExpertMap
from moert.ops.rank_capacity import Capacity
from moert.ops.ranks import HANDLES, Ranks
from moert.ops.records import gradient_records, gradients_of
from moert.types import DispatchPlan, Routing

# rows [M, H], weights [M, k], ids [M, k], offsets [R+1], tokens [N], slots [T, k], sent [R], received [R],
# between [m, A] or nothing, dropped [] (0 without a capacity).
Arrived = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class CompiledSplits:
    """Splits in tensors."""

    sent: Tensor
    received: Tensor
    between: Tensor
    ranks: str

    def back(self, y: Tensor, plan: DispatchPlan) -> Tensor:
        """The rows of combine."""
        num_rows = plan.tokens.shape[0]
        return torch.ops.moert.dispatch_exchange(y, self.received, self.sent, self.between, self.ranks, True, num_rows)


def ranks_of(name: str) -> Ranks:
    """Of Ranks.name."""
    return HANDLES[name] if name in HANDLES else Ranks(_resolve_process_group(name) if name else None)


@torch.library.custom_op("moert::dispatch_rows", mutates_args=())
def dispatch_rows(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    expert_to_rank: Tensor,
    local_ids: Tensor,
    num_experts: int,
    num_ranks: int,
    copy_of: list[int],
    ranks: str,
    payload: str | None,
    rows: int | None,
    drop: str,
    parts: int,
    needs_gradient: list[bool],
    layer: int,
) -> Arrived:
    """dispatch, in plain tensors.  num_experts: the routing's; num_ranks and copy_of: of the maps; rows and drop: of
    the capacity; needs_gradient: of x and of the weights.
    """
    from moert.ops.dispatch import exchange  # which imports this module

    way = ranks_of(ranks)
    experts = ExpertMap(expert_to_rank, local_ids, num_ranks, tuple(copy_of))
    routing = Routing(ids, weights, num_experts)
    capacity = None if rows is None else Capacity(rows, drop)
    flight = exchange(x, routing, experts, way, payload, capacity, parts, tuple(needs_gradient), layer=layer)
    here, there = flight.arrive(), flight.splits
    sizes = (torch.tensor(each, dtype=torch.int64) for each in (there.sent, there.received))
    between = torch.empty(0, 0, dtype=torch.int64) if there.between is None else there.between.clone()
    dropped = ids.new_zeros((), dtype=torch.int64) if flight.dropped is None else flight.dropped
    # The parts of a record share memory, which results of an operator must not.
    arrived = (each.clone(memory_format=torch.contiguous_format) for each in (*here, flight.ids))
    plan = flight.plan
    return *arrived, plan.offsets, plan.tokens.clone(), plan.slots, *sizes, between, dropped


order_dispatch = register_exchange(torch.ops.moert.dispatch_rows.default)


@dispatch_rows.register_fake
def _(x, weights, ids, to_rank, local_ids, E, num_ranks, copy_of, ranks, payload, rows, drop, parts, needs, layer):
    order_dispatch()
    way, (T, k) = ranks_of(ranks), ids.shape
    R, ctx = way.size, torch.library.get_ctx()
    N, M = (ctx.new_dynamic_size(), ctx.new_dynamic_size()) if rows is None else (R * rows, R * rows)
    counts = torch.empty(R, dtype=torch.int64, device="cpu")
    between = counts.new_empty(way.levels.shape if way.levels else (0, 0))
    plan = (ids.new_empty(shape, dtype=torch.int32) for shape in ((R + 1,), (N,), (T, k)))
    arrived = x.new_empty(M, x.shape[1]), weights.new_empty(M, k), ids.new_empty(M, k, dtype=torch.int16)
    return *arrived, *plan, counts, torch.empty_like(counts), between, ids.new_empty((), dtype=torch.int64)


@torch.library.custom_op("moert::dispatch_exchange", mutates_args=())
def sent_rows(
    rows: Tensor, sent: Tensor, received: Tensor, between: Tensor, ranks: str, back: bool, num_rows: int
) -> Tensor:
    """all_to_all of rows [N, H] -> [num_rows, H], the sum of received."""
    splits = Splits(sent.tolist(), received.tolist(), ranks_of(ranks), between if between.numel() else None, back)
    return send_rows(rows, splits)[0]


order_exchange = register_exchange(torch.ops.moert.dispatch_exchange.default)


@sent_rows.register_fake
def _(rows, sent, received, between, ranks, back, num_rows):
    order_exchange()
    return rows.new_empty(num_rows, rows.shape[1])


def _keep_send(ctx, inputs, output):
    rows, ctx.sent, ctx.received, ctx.between, ctx.ranks, ctx.back, _ = inputs
    ctx.num_rows = rows.shape[0]


def _send_back(ctx, drows):
    way = ctx.received, ctx.sent, ctx.between, ctx.ranks, not ctx.back
    return torch.ops.moert.dispatch_exchange(drows.contiguous(), *way, ctx.num_rows), *[None] * 6


sent_rows.register_autograd(_send_back, setup_context=_keep_send)


def _keep_dispatch(ctx, inputs, output):
    *_, ctx.ranks, _, _, _, _, ctx.needs, _ = inputs
    _, _, ids, _, tokens, slots, sent, received, between, _ = output
    ctx.save_for_backward(ids, tokens, slots, sent, received, between)
    ctx.mark_non_differentiable(*output[2:])


def _dispatch_back(ctx, drows, dweights, *_):
    grads = torch.ops.moert.dispatch_gradients(drows, dweights, *ctx.saved_tensors, ctx.ranks, ctx.needs)
    return *(grad if needed else None for grad, needed in zip(grads, ctx.needs, strict=True)), *[None] * 13


dispatch_rows.register_autograd(_dispatch_back, setup_context=_keep_dispatch)


@torch.library.custom_op("moert::dispatch_gradients", mutates_args=())
def sent_gradients(
    drows: Tensor,
    dweights: Tensor,
    ids: Tensor,
    tokens: Tensor,
    slots: Tensor,
    sent: Tensor,
    received: Tensor,
    between: Tensor,
    ranks: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of dispatch's x [T, H] and weights [T, k] (those not needed: nothing), in one exchange."""
    home = Splits(received.tolist(), sent.tolist(), ranks_of(ranks), between if between.numel() else None, True)
    back, _ = send_rows(gradient_records(drows, dweights, ids, needs), home)
    shapes, plan = (drows.shape, dweights.shape), DispatchPlan(None, tokens, slots)
    grads = gradients_of(back, (drows.dtype, dweights.dtype), shapes, plan, needs)
    pairs = zip(grads, (drows, dweights), strict=True)
    return tuple(like.new_empty(0) if grad is None else grad for grad, like in pairs)


order_gradients = register_exchange(torch.ops.moert.dispatch_gradients.default)


@sent_gradients.register_fake
def _(drows, dweights, ids, tokens, slots, sent, received, between, ranks, needs):
    order_gradients()
    T, shapes = slots.shape[0], []
    for grad, needed in zip((drows, dweights), needs, strict=True):
        shapes.append(grad.new_empty(T, grad.shape[1]) if needed else grad.new_empty(0))
    return tuple(shapes)
