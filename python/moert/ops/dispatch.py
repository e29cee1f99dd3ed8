"""Dispatch and combine: rows to the ranks that hold their experts, and back.

A row travels once to each rank that has any of its experts, its routing with it; that rank adds up what its experts
make of the row before it goes back.  Letters: T tokens, k choices, E experts of R ranks, N rows sent, M received.
"""

from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moert.ops.all_to_all import Counting, Hold, Sending, Splits, at_home, fresh_rows, refusing, stand_in
from moert.ops.compiled_dispatch import CompiledSplits
from moert.ops.expert_map import ExpertMap
from moert.ops.kinds import OPTIONAL, expect
from moert.ops.payload import WORD, check_payload, encode_ref, rounded_width
from moert.ops.permute import permute, unpermute
from moert.ops.rank_capacity import Capacity, plan_within
from moert.ops.ranks import Ranks
from moert.ops.records import fields_of, gradient_records, gradients_of, record_bytes
from moert.ops.same_device import same_device
from moert.types import DispatchPlan, Routing


class Dispatched:
    """x [M, H] and routing (ids [M, k] int16, weights [M, k]) of what arrived, in the order of ranks and their tokens.

    The routing's ids are those of this rank's own experts, -1 for choices that are not its business.  plan says where
    each token went (offsets [R+1], tokens [N], slots [T, k]) and splits how many rows went and came: for combine.
    dropped [] is how many of this rank's rows had no room, None without a capacity.  wait() returns when rows are here,
    this object; whoever reads x or routing waits too.
    """

    def __init__(self, plan: DispatchPlan, splits: Splits, dropped: Tensor | None, held=(), flight=None):
        self.plan, self.splits, self.dropped = plan, splits, dropped
        self._held, self._flight, self._x, self._routing = held, flight, None, None

    def wait(self) -> "Dispatched":
        if self._x is None:
            if any(held.requires_grad for held in self._held):
                with torch.enable_grad():  # whoever is first to read
                    self._x, weights = _Arrive.apply(*self._held, self._flight)
            else:
                self._x, weights = self._flight.arrive()
            self._routing = Routing(self._flight.ids, weights, self._flight.num_local)
        return self

    @property
    def x(self) -> Tensor:
        return self.wait()._x

    @property
    def routing(self) -> Routing:
        return self.wait()._routing


def dispatch(
    x: Tensor,
    routing: Routing,
    experts: ExpertMap,
    group: dist.ProcessGroup | Ranks | None = None,
    asynchronous: bool = False,
    payload: str | None = None,
    capacity: Capacity | None = None,
    parts: int = 1,
) -> Dispatched:
    """Send each row of x [T, H] to the ranks of the group (None: all) that hold the experts of its routing.

    Every rank of the group must call it, with any T.  Ids outside [0, E) are dropped; a row without others goes
    nowhere.  float32, bfloat16, float16, float64; rows arrive bit for bit, or with payload "int8" or "float8_e4m3"
    rounded to it, a scale for each row (weights: float32); gradients and combine's rows travel whole.  parts: of how
    many such calls this is one.  Where H, k, E, the dtypes, payload, capacity.rows, parts, the placement or the need
    for gradients differ between ranks, or one has an error of its own, all raise one that names the ranks.  x and
    routing.weights get gradients, once, as if nothing were rounded.  group: also Ranks, which may be reached in two
    levels, for the same bits, or be waited for inside a guard.

    With a capacity every rank sends as many rows to every other: M = R * capacity.rows, some of them empty (zero,
    without an expert).  On a GPU nothing is read on the host then, and nothing compared: what must be the same on every
    rank is the caller's business there.
    """
    ranks = Ranks.of(group)
    if torch.compiler.is_compiling():
        return _compiled(x, routing, experts, ranks, payload, capacity, parts)
    flight = exchange(x, routing, experts, ranks, payload, capacity, parts, None, asynchronous)
    held = Hold.apply(flight.home, x, routing.weights) if any(flight.needs) else ()
    there = Dispatched(flight.plan, flight.splits, flight.dropped, held, flight)
    return there if asynchronous else there.wait()


def exchange(x, routing, experts, ranks, payload, capacity, parts, needs, asynchronous=False, layer=None) -> "_Flight":
    """dispatch without its part in the graph; needs: gradients of x, of weights; None: what they and ranks say."""
    compare, dropped = ranks_compare(x, capacity, ranks), None
    with refusing(ranks, FACTS) if compare else nullcontext():
        plan, needs = _plan(x, routing, experts, ranks, payload, capacity), needs or _needs(x, routing)
        if capacity is None:
            ends = plan.offsets.tolist()
            counts = [end - begin for begin, end in zip(ends, ends[1:], strict=False)]
            plan = DispatchPlan(plan.offsets, plan.tokens[: sum(counts)], plan.slots)
        else:
            plan, dropped = plan_within(routing, experts, capacity)
            counts = [capacity.rows] * ranks.size
    if compare:
        layer = ranks.layer if layer is None else layer
        counting = Counting(counts, _facts(x, routing, experts, payload, capacity, parts, needs, layer), ranks)
    flight = _Flight(x, routing, experts, (plan, dropped), payload, needs)
    flight.pack(counts, ranks)  # while the counts travel
    flight.start(counting.wait() if compare else _even(capacity.rows, ranks))
    if not asynchronous:
        flight.wait()
    return flight


def ranks_compare(x: Tensor, capacity: Capacity | None, ranks: Ranks) -> bool:
    """Whether they say what they are about to send: for rows of a GPU the host must not wait if sizes are known.

    In a group with NCCL beside Gloo a rank whose rows are no tensor, or lie elsewhere than those of others, is on its
    own with a capacity.
    """
    return capacity is None or isinstance(x, Tensor) and x.device.type == "cpu" or ranks.through_host


def _needs(x: Tensor, routing: Routing) -> tuple[bool, ...]:
    return tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, routing.weights))


def _compiled(x, routing, experts, ranks, payload, capacity, parts) -> Dispatched:
    expect((Capacity, type(None)), capacity=capacity)
    rows, drop = (None, "") if capacity is None else (capacity.rows, capacity.drop)
    maps = experts.expert_to_rank, experts.local_ids, routing.num_experts, experts.num_ranks, list(experts.copy_of)
    options = ranks.name, payload, rows, drop, parts, list(_needs(x, routing)), ranks.layer
    x, weights, ids, offsets, tokens, slots, *splits, dropped = torch.ops.moert.dispatch_rows(
        x, routing.weights, routing.ids, *maps, *options
    )
    sizes = CompiledSplits(*splits, ranks.name)
    there = Dispatched(DispatchPlan(offsets, tokens, slots), sizes, None if capacity is None else dropped)
    there._x, there._routing = x, Routing(ids, weights, experts.held[ranks.rank])
    return there


def _even(rows: int, ranks: Ranks) -> Splits:
    sizes, levels = [rows] * ranks.size, ranks.levels
    return Splits(sizes, sizes, ranks, levels and torch.full(levels.shape, rows))


class Returning:
    """Results on their way home.  Those of this rank's own tokens stay where the experts left them."""

    def __init__(self, y: Tensor, dispatched: Dispatched, asynchronous: bool):
        splits, self._plan = dispatched.splits, dispatched.plan
        if isinstance(splits, CompiledSplits):
            self._rows = splits.back(y, self._plan)
            return
        home, rows, self._rows, self._own = splits.reversed, y.detach(), None, None
        mine, came = (at_home(counts, home.ranks, y.device) for counts in (home.sent, home.received))
        if mine is None:
            self._there = Sending(rows, home, asynchronous)
        else:
            self._own = rows[mine.own], came.own.start
            self._there = Sending(rows[mine.others], home.others, asynchronous)
        needed = y.requires_grad and torch.is_grad_enabled()
        self._way = _WayBack(y.shape, self._plan, splits)
        self._held = Hold.apply(self._way.home, y)[0] if needed else None

    def wait(self, residual: Tensor | None = None) -> Tensor:
        """combine's [T, H]."""
        expect(OPTIONAL, residual=residual)
        if self._rows is not None:
            return unpermute(self._rows, self._plan, None, residual)
        landing = residual, self._way, self._there.wait(), self._own
        return _landed(*landing) if self._held is None and residual is None else _Land.apply(self._held, *landing)


def combine(y: Tensor, dispatched: Dispatched, residual: Tensor | None = None) -> Tensor:
    """Rows back where they came from: y [M, H], what the experts made of dispatched.x, in its dtype -> [T, H].

    y must need gradients on every rank or on none: nothing compares this.
    Each token's rows are added in float32 (float64 for float64), in the order of its choices, onto residual [T, H]
    (None: zero).  A token that went nowhere is the residual.
    """
    return start_combine(y, dispatched, asynchronous=False).wait(residual)


def start_combine(y: Tensor, dispatched: Dispatched, asynchronous: bool = True) -> Returning:
    """combine, begun: this rank may do something else while rows travel.

    y must not be written before the last wait().
    """
    expect(Tensor, y=y)
    expect(Dispatched, dispatched=dispatched)
    x = dispatched.x
    # Rows of another size than the others expect would end a Gloo process.
    if y.shape != x.shape:
        raise ValueError(f"y must have shape [M={x.shape[0]}, H={x.shape[1]}], got {list(y.shape)}")
    if y.dtype != x.dtype:
        raise ValueError(f"y must have the dtype of the rows dispatched ({x.dtype}), got {y.dtype}")
    return Returning(y, dispatched, asynchronous)


def dispatch_ref(x: Tensor, routing: Routing, experts: ExpertMap, group: dist.ProcessGroup | None = None):
    """The rows and the routing that arrive here, taken from the tokens of all ranks; without gradient."""
    rank, everything = dist.get_rank(group), [None] * dist.get_world_size(group)
    dist.all_gather_object(everything, (x.detach(), routing.ids, routing.weights.detach()), group)
    mine = torch.tensor([*experts.experts_of(rank), -1], dtype=torch.int64)
    rows, ids, weights = [], [], []
    for theirs in everything:
        for row, token_ids, token_weights in zip(*theirs, strict=True):
            here = torch.isin(token_ids.long(), mine[:-1])
            if here.any():
                local = [(mine == i).nonzero()[0, 0].item() if h else -1 for i, h in zip(token_ids, here, strict=True)]
                rows.append(row)
                ids.append(torch.tensor(local))
                weights.append(torch.where(here, token_weights, 0))
    k = routing.ids.shape[1]
    ids = torch.stack(ids) if ids else torch.empty(0, k, dtype=torch.int64)
    weights = torch.stack(weights) if weights else routing.weights.new_empty(0, k)
    rows = torch.stack(rows) if rows else x.new_empty(0, x.shape[1])
    return rows, Routing(ids, weights, len(mine) - 1)


def combine_ref(y: Tensor, routing: Routing, experts: ExpertMap, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sums of this rank's tokens, out of the results of all ranks; without gradient."""
    rank, everything = dist.get_rank(group), [None] * dist.get_world_size(group)
    dist.all_gather_object(everything, (y.detach(), routing.ids), group)
    sums = y.new_zeros(len(routing.ids), y.shape[1])
    for holder, (theirs, _) in enumerate(everything):
        mine = torch.tensor(experts.experts_of(holder), dtype=torch.int64)
        went = [torch.isin(ids.long(), mine).any(-1) for _, ids in everything]
        begin = sum(int(w.sum()) for w in went[:rank])
        sums[went[rank]] += theirs[begin : begin + int(went[rank].sum())]
    return sums


def dispatch_plan_ref(ids: Tensor, expert_to_rank: Tensor, num_ranks: int) -> DispatchPlan:
    """Of the operator dispatch_plan: offsets [R+1], tokens [T*k], slots [T, k]; a slot stands at the first choice."""
    tokens, slots, offsets = torch.full((ids.numel(),), -1), torch.full(ids.shape, -1), [0]
    expert_to_rank = expert_to_rank.tolist()
    for r in range(num_ranks):
        n = offsets[-1]
        for t, row in enumerate(ids.tolist()):
            wanted = [j for j, e in enumerate(row) if 0 <= e < len(expert_to_rank) and expert_to_rank[e] == r]
            if wanted:
                tokens[n], slots[t, wanted[0]], n = t, n, n + 1
        offsets.append(n)
    return DispatchPlan(torch.tensor(offsets).int(), tokens.int(), slots.int())


def dispatch_pack_ref(x, weights, ids, expert_to_rank, local_ids, offsets, tokens, payload="none") -> Tensor:
    """Of the operator dispatch_pack: records [N, bytes], uint8; each a row, its weights and its ids (fields_of)."""
    if payload != "none":
        x = encode_ref(x, payload)
    (_, H), k = x.shape, ids.shape[1]
    records = torch.zeros(len(tokens), record_bytes(x.dtype, weights.dtype, H, k), dtype=torch.uint8)
    to_rows, to_weights, to_ids = fields_of(records, x.dtype, weights.dtype, H, k)
    tokens = tokens[: offsets[-1]]
    to_rows, to_weights, used_ids = (field[: len(tokens)] for field in (to_rows, to_weights, to_ids.fill_(-1)))
    rank = torch.arange(len(offsets) - 1).repeat_interleave(offsets.long().diff())[:, None]
    e = ids[tokens].long()
    known = (e >= 0) & (e < len(expert_to_rank))
    e = torch.where(known, e, 0)
    here = known & (expert_to_rank[e] == rank)
    to_rows.copy_(x[tokens])
    to_weights.copy_(torch.where(here, weights[tokens], 0))
    used_ids.copy_(torch.where(here, local_ids[e], -1))
    return records


FACTS = ("H", "k", "E", "the dtype of x", "the dtype of weights", "the payload", "capacity.rows",
         "the number of parts", "the checksum of placement", "x.requires_grad", "weights.requires_grad",
         "the number of the layer")  # fmt: skip


def _facts(
    x: Tensor, routing: Routing, experts: ExpertMap, payload, capacity, parts: int, needs, layer
) -> dict[str, int | str]:
    """What all ranks must agree on: sizes and types of what travels, and whether gradients will travel back."""
    types = [str(t.dtype).removeprefix("torch.") for t in (x, routing.weights)]
    words = ["yes" if needed else "no" for needed in needs]
    sizes = (x.shape[1], routing.ids.shape[1], experts.num_experts)
    options = payload or "none", capacity and capacity.rows, parts
    return dict(zip(FACTS, (*sizes, *types, *options, experts.checksum, *words, layer), strict=True))


def _plan(x: Tensor, routing: Routing, experts: ExpertMap, ranks: Ranks, payload, capacity) -> DispatchPlan:
    """Where each token goes; with the checks of all that dispatch is given."""
    expect(Tensor, x=x)
    expect(Routing, routing=routing)
    expect(ExpertMap, experts=experts)
    expect((Capacity, type(None)), capacity=capacity)
    if experts.num_ranks != ranks.size:
        raise ValueError(f"experts must lie on the R={ranks.size} ranks, got {experts.num_ranks}")
    if routing.num_experts != experts.num_experts:
        raise ValueError(f"routing must be to E={experts.num_experts} experts, got {routing.num_experts}")
    check_payload(payload)
    if payload is not None and routing.weights.dtype != torch.float32:
        raise ValueError(f"routing.weights must be float32 beside a payload, got {routing.weights.dtype}")
    where = experts.on(x.device)[0], experts.num_ranks
    return DispatchPlan(*torch.ops.moert.dispatch_plan(routing.ids, *where, x.detach(), routing.weights.detach()))


def _routed(x: Tensor, routing: Routing, experts: ExpertMap) -> tuple[Tensor, ...]:
    return x.detach(), routing.weights.detach(), routing.ids, *experts.on(x.device)


def _one_more(x, weights, ids, *maps):
    return F.pad(x, (0, 0, 0, 1)), F.pad(weights, (0, 0, 0, 1)), F.pad(ids.long(), (0, 0, 0, 1), value=-1), *maps


class _Flight:
    """What the two nodes of a dispatch share: rows and weights on their way, then their gradients on the way home."""

    def __init__(self, x: Tensor, routing: Routing, experts: ExpertMap, where: tuple, payload: str | None, needs):
        self.plan, self.dropped = where
        self.shapes, self.needs = (x.shape, routing.weights.shape), needs
        self._types, self._payload = (x.dtype, routing.weights.dtype), payload
        self._experts, self.ids = experts, None
        self._routed, self._tokens = _routed(x, routing, experts), self.plan.tokens
        if self.dropped is not None:  # an empty row is that of one token more, which goes nowhere
            self._routed, self._tokens = _one_more(*self._routed), torch.where(self._tokens < 0, len(x), self._tokens)

    def pack(self, counts: list[int], ranks: Ranks) -> None:
        """What travels of the rows, so many for each rank."""
        self._mine = at_home(counts, ranks, self._routed[0].device)
        part = slice(0, sum(counts)) if self._mine is None else self._mine.others
        (_, H), (_, k) = self.shapes
        size = record_bytes(*self._word(), k)
        self._records = self._routed[0].new_empty(part.stop - part.start, size, dtype=torch.uint8)
        self._pack(self._records, part.start)

    def start(self, splits: Splits) -> None:
        self.splits, self.num_local = splits, self._experts.held[splits.ranks.rank]
        self._arrived = fresh_rows(self._records, sum(splits.received))
        came = at_home(splits.received, splits.ranks, self._records.device)
        if came is None:
            self._there = Sending(self._records, splits, True, self._arrived)
        else:
            self._there = Sending(self._records, splits.others, True, self._arrived[came.others])
            self._pack(self._arrived[came.own], self._mine.own.start)  # while the others travel
        self._records = self._routed = self._tokens = None

    def _pack(self, records: Tensor, first: int) -> None:
        plan = self.plan.offsets, self._tokens
        torch.ops.moert.dispatch_pack_(records, *self._routed, *plan, first, self._payload or "none")

    def wait(self) -> None:
        self._there.wait()

    def arrive(self) -> tuple[Tensor, Tensor]:
        """Rows [M, H] and weights [M, k]; sets the ids."""
        self.wait()
        (_, H), (_, k) = self.shapes
        records, self._arrived, self._there = self._arrived, None, None  # the graph holds this object
        rows, weights, self.ids = fields_of(records, *self._word(), k)
        if self._payload:
            rows = records.new_empty(len(records), H, dtype=self._types[0])
            torch.ops.moert.dispatch_unpack_(rows, records, self._payload)
        return rows, weights

    def _word(self) -> tuple[torch.dtype, torch.dtype, int]:
        """What the elements of a row travel as, the type of weights, how many of the former there are."""
        H = self.shapes[0][1]
        dtype, width = (WORD, rounded_width(H)) if self._payload else (self._types[0], H)
        return dtype, self._types[1], width

    def send_back(self, drows: Tensor, dweights: Tensor) -> None:
        self._back = Sending(gradient_records(drows, dweights, self.ids, self.needs), self.splits.reversed)

    def home(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of x and of the weights, added up over the ranks."""
        back, self._back = self._back, None
        return gradients_of(back.wait(), self._types, self.shapes, self.plan, self.needs)


class _WayBack:
    """What the nodes of a combine share: the gradient of its results on its way to the experts."""

    def __init__(self, shape: torch.Size, plan: DispatchPlan, splits: Splits):
        self.shape, self.plan, self._splits = shape, plan, splits
        self._backward, self._sent = None, []

    def send(self, dy: Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:  # what one before has left needed no gradient of the results, or failed
            self._backward, self._sent = backward, []
        self._sent.append(Sending(permute(dy, self.plan), self._splits))

    def home(self) -> tuple[Tensor]:
        sent, self._sent = self._sent, []  # one for each time that the results were waited for
        first, *others = (sending.wait() for sending in sent)
        return (sum(others, first),)


def _landed(residual: Tensor | None, way: _WayBack, rows: Tensor, own: tuple[Tensor, int] | None) -> Tensor:
    """Added up: rows of all ranks, or of others and own ones with the slot of their first."""
    if own is None:
        return unpermute(rows, way.plan, None, residual)
    return torch.ops.moert.dispatch_combine(rows, *own, way.plan.slots, residual)


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx, held, residual, way, rows, own):
        ctx.way, ctx.has_residual = way, residual is not None
        return _landed(residual, way, rows, own)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        held = None
        if ctx.needs_input_grad[0]:
            ctx.way.send(dy)
            held = stand_in(ctx.way.shape, dy)
        return held, dy if ctx.has_residual else None, None, None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, flight):
        ctx.flight = flight
        return flight.arrive()

    @staticmethod
    @once_differentiable
    def backward(ctx, drows, dweights):
        flight = ctx.flight
        flight.send_back(drows, dweights)
        return *map(stand_in, flight.shapes, (drows, dweights)), None


@torch.library.register_fake("moert::dispatch_plan")
def _(ids, expert_to_rank, num_ranks, x=None, weights=None):
    same_device(ids=ids, expert_to_rank=expert_to_rank, x=x, weights=weights)
    T, k = ids.shape
    return tuple(ids.new_empty(shape, dtype=torch.int32) for shape in ((num_ranks + 1,), (T * k,), (T, k)))


def _check_devices(x, weights, ids, expert_to_rank, local_ids, offsets, tokens, **others):
    maps = {"expert_to_rank": expert_to_rank, "local_ids": local_ids}
    same_device(x=x, weights=weights, ids=ids, **maps, offsets=offsets, tokens=tokens, **others)


@torch.library.register_fake("moert::dispatch_pack")
def _(x, weights, ids, expert_to_rank, local_ids, offsets, tokens, payload="none"):
    _check_devices(x, weights, ids, expert_to_rank, local_ids, offsets, tokens)
    H = x.shape[1]
    dtype, width = (x.dtype, H) if payload == "none" else (WORD, rounded_width(H))
    size = record_bytes(dtype, weights.dtype, width, ids.shape[1])
    return x.new_empty(tokens.shape[0], size, dtype=torch.uint8)


@torch.library.register_fake("moert::dispatch_pack_")
def _(records, x, weights, ids, expert_to_rank, local_ids, offsets, tokens, first, payload):
    _check_devices(x, weights, ids, expert_to_rank, local_ids, offsets, tokens, records=records)


@torch.library.register_fake("moert::dispatch_unpack_")
def _(rows, records, payload):
    same_device(rows=rows, records=records)


@torch.library.register_fake("moert::dispatch_combine")
def _(rows, own, first, slots, residual=None):
    same_device(rows=rows, own=own, slots=slots, residual=residual)
    return rows.new_empty(slots.shape[0], rows.shape[1])
