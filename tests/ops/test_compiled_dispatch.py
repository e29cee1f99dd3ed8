import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from moert import GluExperts, MoELayer, Routing, TopKRouter
from moert.layers import FeedForward
from moert.ops import Capacity, ExpertMap, Ranks, combine, dispatch
from moert.ops.dispatch import dispatch_plan_ref
from moert.parallel import Pulse, shard_experts_
from moert.placement import PlacedLayer
from moert.testing import random_routing
from ranks import ranks

E, H, k = 7, 12, 2


def problem(T: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(10 * T + dist.get_rank())
    x = torch.randn(T, H, generator=generator).to(dtype).requires_grad_()
    routing = random_routing(T, E, k, "sentinels", generator)
    return x, routing.ids, routing.weights.requires_grad_()


def there_and_back(experts: ExpertMap, **options):
    def run(x, ids, weights, num_experts=E):
        there = dispatch(x, Routing(ids, weights, num_experts), experts, **options)
        y = torch.tanh(there.x) * there.routing.weights.sum(1, keepdim=True).to(x.dtype)
        return combine(y, there, x), there.routing.ids, y

    return run


def operators_of_one_piece() -> None:
    """One graph for any T: results and gradients have the bits of eager calls."""
    rank, R = dist.get_rank(), dist.get_world_size()
    experts = ExpertMap.of([(3 * e + 1) % R for e in range(E)], E, R)
    for options in (
        {},
        {"payload": "int8"},
        {"capacity": Capacity(3, "weight")},
        {"group": Ranks.in_nodes(2)},
        {"group": Ranks.in_nodes(2), "capacity": Capacity(2)},
        {"group": dist.new_group(range(R))},
    ):
        run = there_and_back(experts, **options)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
        for T in (20, 30, 2, 0):
            x, *routed = problem(T + (rank if T else 0))
            expected, got = run(x, *routed), compiled(x, *routed)
            assert all(map(torch.equal, got, expected))
            dy = torch.randn_like(x)
            grads = [torch.autograd.grad(y[0], (x, routed[1]), dy) for y in (expected, got)]
            assert all(map(torch.equal, *grads))
        assert counter.frame_count <= 2  # no tokens are a case of their own
        with torch.no_grad():
            x, *routed = problem(4, torch.bfloat16)
            assert torch.equal(compiled(x, *routed)[0], run(x, *routed)[0])


def test_one_graph():
    assert ranks(4, operators_of_one_piece) == [None] * 4


def layers(backend: str) -> None:
    """A whole layer, shared experts and parts, mean gradients, a pulse: forward and backward as in eager mode."""
    torch.manual_seed(0)
    plain = MoELayer(TopKRouter(H, E, k), GluExperts(E, H, 10), FeedForward(H, 10))
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    copied = {"placement": {"experts": PlacedLayer("experts", np.array([0, 1] * 3 + [0]), ((0, 1), (3, 0)))}}
    with Pulse() as pulse:
        for options in (
            {},
            {"degree": 2, "gradients": "mean", "replicas": alone},
            {"pulse": pulse},
            {"capacity": Capacity(9), "degree": 2},
            copied,
        ):
            torch.manual_seed(0)
            model = MoELayer(TopKRouter(H, E, k), GluExperts(E, H, 10), FeedForward(H, 10))
            model.load_state_dict(plain.state_dict())
            shard_experts_(model, **options)
            torch._dynamo.reset()
            outside = options.keys() & {"placement", "replicas"}  # sums over ranks are not in a graph
            compiled = torch.compile(model, backend=backend, fullgraph=not outside, dynamic=True)
            for T in (6, 11):
                x, _, _ = problem(T + dist.get_rank())
                results = []
                for call in (model, compiled):
                    y = call(x)
                    y.square().sum().backward()
                    results.append((y.detach(), x.grad, *(p.grad for p in model.parameters())))
                    x.grad = None
                    model.zero_grad()
                for got, expected in zip(*results, strict=True):
                    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_layers(backend):
    assert ranks(2, layers, backend, timeout=400) == [None] * 2  # two compilers on the same cores


def differs() -> list[str]:
    run = torch.compile(there_and_back(ExpertMap.of(None, E, 2)), backend="aot_eager", fullgraph=True, dynamic=True)
    x, *routed = problem(3)
    with pytest.raises(RuntimeError) as error:
        run(x.half() if dist.get_rank() else x, *routed)
    with pytest.raises((ValueError, RuntimeError)) as other:
        run(x, routed[0], routed[1], E + dist.get_rank())
    told = []
    for capacity in (Capacity(3 if dist.get_rank() else 2), Capacity(2) if dist.get_rank() else None):
        experts = ExpertMap.of(None, E, 2)
        run = torch.compile(
            there_and_back(experts, capacity=capacity), backend="aot_eager", fullgraph=True, dynamic=True
        )
        with pytest.raises(RuntimeError) as fewer:
            run(x, *routed)
        told.append(str(fewer.value))
    return [str(error.value), str(other.value), *told]


def test_errors():
    text = "the dtype of x must be the same on every rank, got float32 on rank 0, float16 on rank 1"
    told = ranks(2, differs)
    assert all(text in each[0] for each in told)
    assert "every rank must be able to go on, got an error on rank 1 (see there)" in told[0][1]
    assert f"routing must be to E={E} experts, got {E + 1}" in told[1][1]
    for each in told:
        assert "capacity.rows must be the same on every rank, got 2 on rank 0, 3 on rank 1" in each[2]
        assert "capacity.rows must be the same on every rank, got None on rank 0, 2 on rank 1" in each[3]


def checked() -> None:
    experts = ExpertMap.of(None, E, 1)
    for T in (0, 3):
        x, ids, weights = problem(T)
        for rows in (None, 4):
            args = x, weights, ids, experts.expert_to_rank, experts.local_ids, E, 1, [], "", None, rows, "position", 1
            opcheck(torch.ops.moert.dispatch_rows.default, (*args, [True, True], 3))
        sizes = torch.tensor([T]), torch.tensor([T]), torch.empty(0, 0, dtype=torch.int64)
        opcheck(torch.ops.moert.dispatch_exchange.default, (x, *sizes, "", False, T))
        plan = dispatch_plan_ref(ids, experts.expert_to_rank, 1)
        N = int(plan.offsets[-1])
        rows, own = torch.randn(N, H), torch.randint(-1, E, (N, k)).short()
        sizes, slots = (torch.tensor([N]), torch.tensor([N]), sizes[2]), (plan.tokens[:N], plan.slots)
        for needs in ([True, True], [True, False], [False, True]):
            args = rows, torch.rand(N, k), own, *slots, *sizes, "", needs
            opcheck(torch.ops.moert.dispatch_gradients.default, args)


def test_opcheck():
    assert ranks(1, checked) == [None]
