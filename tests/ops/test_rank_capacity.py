import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from moert import Routing
from moert.ops.dispatch import combine, combine_ref, dispatch
from moert.ops.expert_map import ExpertMap
from moert.ops.payload import rounded_ref
from moert.ops.rank_capacity import DROPS, Capacity, plan_within, plan_within_ref
from moert.routers import CapacityPolicy
from moert.testing import ID_DTYPES, assert_rows_close, random_routing
from ranks import error_of, ranks

dispatching = importlib.import_module("moert.ops.dispatch")  # moert.ops.dispatch is the function

E = 7


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("kind", ["uniform", "one_expert", "empty_experts", "sentinels"])
@pytest.mark.parametrize("R", [1, 3])
def test_plan(R, kind, drop):
    for T, k in ((0, 2), (1, 1), (9, 3), (40, E)):
        exact = torch.randint(0, 8, (T, k)) / 8  # sums that no order of adding changes
        routing = replace(random_routing(T, E, k, kind), weights=exact)
        experts = ExpertMap.of(torch.randint(0, R, (E,)), E, R)
        for rows in (0, 1, 5, 100):
            capacity = Capacity(rows, drop)
            expected = plan_within_ref(routing, experts, capacity)
            for dtype in ID_DTYPES:
                same = Routing(routing.ids.to(dtype), routing.weights, E)
                (plan, dropped), (other, count) = plan_within(same, experts, capacity), expected
                assert torch.equal(plan.offsets, other.offsets) and torch.equal(plan.tokens, other.tokens)
                assert torch.equal(plan.slots, other.slots) and dropped == count


def test_ties_stay_in_the_order_of_their_tokens():
    routing = Routing(torch.zeros(6, 1, dtype=torch.int32), torch.tensor([[1.0], [2], [2], [1], [2], [2]]), 1)
    plan, dropped = plan_within(routing, ExpertMap.of(None, 1, 1), Capacity(3, "weight"))
    assert plan.tokens.tolist() == [1, 2, 4] and dropped == 3


def kept(routing: Routing, plan, experts: ExpertMap) -> Routing:
    """The routing without the choices that were dropped."""
    where = experts.expert_to_rank[routing.ids.long().clamp(0, E - 1)]
    sent = torch.zeros(len(routing.ids), experts.num_ranks, dtype=torch.bool)
    for t, slots in enumerate(plan.slots.tolist()):
        for slot in slots:
            if slot >= 0:
                sent[t, int(torch.searchsorted(plan.offsets, slot, right=True)) - 1] = True
    good = (routing.ids >= 0) & (routing.ids < E) & sent.gather(1, where.long())
    return Routing(torch.where(good, routing.ids, -1), routing.weights, E)


def travels(capacity: Capacity) -> list[int]:
    """What arrives, what comes back and gradients: those of a dispatch of the routing that is kept."""
    rank, R = dist.get_rank(), dist.get_world_size()
    experts, counts = ExpertMap.of([(3 * e + 1) % R for e in range(E)], E, R), []
    generator = torch.Generator().manual_seed(rank)
    for T, dtype in ((6, torch.float32), (0, torch.bfloat16), (9, torch.float64)):
        T += rank
        x = torch.randn(T, 10, generator=generator).to(dtype).requires_grad_()
        routing = random_routing(T, E, 3, "sentinels", generator, torch.promote_types(dtype, torch.float32))
        weights = routing.weights.requires_grad_()
        got = dispatch(x, routing, experts, capacity=capacity)
        assert got.x.shape == (R * capacity.rows, 10) and got.routing.ids.shape == (R * capacity.rows, 3)
        counts.append(got.dropped.item())
        same = kept(routing, got.plan, experts)
        plain = dispatch(x, same, experts)
        used = (got.routing.ids >= 0).any(-1)
        assert torch.equal(got.x[used], plain.x) and (got.x[~used] == 0).all()
        assert torch.equal(got.routing.ids[used], plain.routing.ids) and (got.routing.weights[~used] == 0).all()
        assert torch.equal(got.routing.weights[used], plain.routing.weights)
        y = torch.cos(got.x) * got.routing.weights.sum(1, keepdim=True).to(dtype)
        z = torch.cos(plain.x) * plain.routing.weights.sum(1, keepdim=True).to(dtype)
        back = combine(y, got)
        assert_rows_close(back.detach(), lambda z: combine_ref(z, same, experts), z.detach())
        dy = torch.randn(back.shape, generator=generator).to(dtype)
        grads, expected = (torch.autograd.grad(out, (x, weights), dy) for out in (back, combine(z, plain)))
        assert all(map(torch.equal, grads, expected))
        payload = None if dtype == torch.float64 else "int8"
        later = dispatch(x, routing, experts, asynchronous=True, capacity=capacity, payload=payload).wait()
        assert torch.equal(later.routing.ids, got.routing.ids) and later.dropped == got.dropped
        assert torch.equal(later.x, rounded_ref(got.x.detach(), payload) if payload else got.x)
        assert torch.equal(later.routing.weights, got.routing.weights)
    return counts


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("rows", [0, 2, 40])
def test_dispatch(rows, drop):
    counts = torch.tensor(ranks(3, travels, Capacity(rows, drop)))
    assert (counts > 0).any() if rows < 40 else (counts == 0).all()


class Unread(TorchDispatchMode):
    """Refuses what reads a tensor on the host."""

    READ = ("item", "tolist", "numpy", "__bool__", "__int__", "__index__", "__float__")  # Python's own ways

    def __enter__(self):
        self.real = {name: getattr(torch.Tensor, name) for name in self.READ}
        for name in self.READ:
            setattr(torch.Tensor, name, self.refuse)
        return super().__enter__()

    def __exit__(self, *error):
        for name, method in self.real.items():
            setattr(torch.Tensor, name, method)
        return super().__exit__(*error)

    @staticmethod
    def refuse(*_):
        raise AssertionError("a tensor was read on the host")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def unread() -> None:
    """As on a GPU: sizes are known, nothing is read on the host, forward and backward, nor are counts exchanged."""
    exchanges = []
    dispatching.ranks_compare = lambda x, capacity, ranks: capacity is None  # in this process alone
    experts, generator = ExpertMap.of(None, E, dist.get_world_size()), torch.Generator().manual_seed(0)
    x = torch.randn(6, 10, generator=generator).requires_grad_()
    routing = random_routing(6, E, 3, "sentinels", generator)
    routing.weights.requires_grad_()
    send = dist.all_to_all_single
    dist.all_to_all_single = lambda *args, **kwargs: (exchanges.append(len(args[0])), send(*args, **kwargs))[1]
    with Unread():
        for payload in (None, "int8"):
            for drop in DROPS:
                room = CapacityPolicy(1.0)(routing)
                got = dispatch(x, room, experts, capacity=Capacity(2, drop), payload=payload)
                y = got.x * got.routing.weights.sum(1, keepdim=True)
                combine(y, got).sum().backward()
    assert len(exchanges) == 4 * 4  # there and back, and gradients of both


def test_nothing_is_read_on_the_host():
    assert ranks(2, unread) == [None] * 2


def differ() -> list[str]:
    """On a CPU ranks say what they are about to send, which would end a Gloo process where sizes disagree."""
    rank, R = dist.get_rank(), dist.get_world_size()
    experts, told, odd = ExpertMap.of(None, E, R), [], rank == 1
    plain = {"capacity": Capacity(2)}
    for H, k, dtype, options in (
        (5 if odd else 4, 2, torch.float32, plain),
        (4, 3 if odd else 2, torch.float32, plain),
        (4, 2, torch.bfloat16 if odd else torch.float32, plain),
        (4, 2, torch.float32, {"capacity": Capacity(3 if odd else 2)}),
        (4, 2, torch.float32, {"capacity": None if odd else Capacity(2)}),
        (4, 2, torch.float32, plain | {"payload": "int8" if odd else None}),
        (4, 2, torch.float32, plain | {"parts": 2 if odd else 1}),
        (4, 2, torch.float32, {"capacity": 2 if odd else Capacity(2)}),
    ):
        x, routing = torch.randn(3, H).to(dtype), random_routing(3, E, k)
        told.append(error_of(lambda: dispatch(x, routing, experts, **options)))  # noqa: B023
    routing = Routing(torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1), E)
    got = dispatch(torch.ones(3, 4), routing, experts, **plain)  # and they can go on
    assert combine(got.x, got).sum(-1).tolist() == [4, 4, 0]
    return told


def test_ranks_that_differ():
    told = ranks(3, differ)
    same = "must be the same on every rank, got"
    expected = [
        f"H {same} 4 on ranks 0, 2, 5 on rank 1",
        f"k {same} 2 on ranks 0, 2, 3 on rank 1",
        f"the dtype of x {same} float32 on ranks 0, 2, bfloat16 on rank 1",
        f"capacity.rows {same} 2 on ranks 0, 2, 3 on rank 1",
        f"capacity.rows {same} 2 on ranks 0, 2, None on rank 1",
        f"the payload {same} none on ranks 0, 2, int8 on rank 1",
        f"the number of parts {same} 1 on ranks 0, 2, 2 on rank 1",
        "every rank must be able to go on, got an error on rank 1 (see there)",
    ]
    assert told[0] == told[2] == expected
    assert told[1] == [*expected[:-1], "capacity must be of type Capacity or None, got int"]


def test_who_compares():
    """Never for rows of a GPU, whose sizes are known; for what is no tensor where only Gloo sends."""
    gpu, on_gpu = torch.empty(0, device="meta"), SimpleNamespace(through_host=False)
    for x, ways, expected in ((torch.zeros(1), on_gpu, True), (gpu, on_gpu, False), (None, on_gpu, False)):
        assert dispatching.ranks_compare(x, Capacity(1), ways) == expected
        assert dispatching.ranks_compare(x, None, ways)
    assert dispatching.ranks_compare(None, Capacity(1), SimpleNamespace(through_host=True))


def as_gshard_has_it(factor: float) -> tuple[int, int]:
    """Room for C tokens of each expert: what CapacityPolicy keeps, n * C rows hold for the n experts of each rank."""
    rank, R = dist.get_rank(), dist.get_world_size()
    generator, experts = torch.Generator().manual_seed(rank), ExpertMap.of(None, 6, R)
    x, routing = torch.randn(24, 5, generator=generator), random_routing(24, 6, 2, generator=generator)
    policy = CapacityPolicy(factor)
    kept, C = policy(routing), policy.capacity(routing)
    got, plain = dispatch(x, kept, experts, capacity=Capacity(6 // R * C)), dispatch(x, kept, experts)
    used = (got.routing.ids >= 0).any(-1)
    assert got.dropped == 0 and torch.equal(got.x[used], plain.x) and got.x.shape[0] == 6 * C  # [E, C] of GShard
    assert torch.equal(combine(got.x, got), combine(plain.x, plain))
    return int((kept.ids < 0).sum()), int((routing.ids < 0).sum())


@pytest.mark.parametrize("factor", [0.5, 1.0, 8.0])
def test_capacity_of_each_expert(factor):
    for dropped, before in ranks(2, as_gshard_has_it, factor):
        assert before == 0 and (dropped > 0) == (factor < 8)


def test_errors():
    assert ranks(1, refused) == [None]


def refused() -> None:
    x, routing, experts = torch.randn(3, 4), random_routing(3, E, 2), ExpertMap.of(None, E, 1)
    with pytest.raises(TypeError, match="capacity must be of type Capacity or None, got int"):
        dispatch(x, routing, experts, capacity=2)
    with pytest.raises(ValueError, match="rows must be at least 0, got -1"):
        Capacity(-1)
    with pytest.raises(TypeError, match="rows must be of type int, got float"):
        Capacity(2.5)
    with pytest.raises(ValueError, match="drop must be one of position, weight, got random"):
        Capacity(1, "random")
    # An id of 64 bits whose lower half is an expert's is none.
    far = Routing(torch.tensor([[0, 2**32 + 1]]), torch.ones(1, 2), E)
    for capacity in (None, Capacity(1)):
        assert dispatch(x[:1], far, experts, capacity=capacity).routing.ids.tolist() == [[0, -1]]
