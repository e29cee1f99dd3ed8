"""Experts on several ranks with their rows on a GPU: a group of one rank over NCCL.  `make test-gpu` runs it."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
from tests.test_gpu import DEVICE, NEEDS_GPU, there

import moert
from moert import Routing
from moert.ops import Capacity, ExpertMap, Ranks, all_to_all, combine, dispatch, exchange_counts, start_combine
from moert.parallel import AdaptiveExperts, Pulse, load_checkpoint, save_checkpoint, shard_experts_
from moert.testing import DTYPES, PERMUTE_SHAPES

pytestmark = NEEDS_GPU


@pytest.fixture
def one_rank():
    """A group of this process alone, rows over NCCL, numbers over Gloo."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"payload": "int8"},
        {"payload": "float8_e4m3"},
        {"capacity": Capacity(40)},
        {"capacity": Capacity(9, "weight")},
        {"asynchronous": True},
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dispatch(dtype, options, one_rank):
    """What arrives: the bits of the CPU's; what comes back, and gradients, within the rounding of their sums."""
    for shape in PERMUTE_SHAPES:
        routing, experts = shape.routing(), ExpertMap.of(None, shape.E, 1)
        leaves, dy = (torch.randn(shape.T, shape.H).to(dtype), routing.weights.float()), torch.randn(shape.T, shape.H)

        def run(x, weights, ids, dy, experts=experts, E=shape.E):
            x, weights = x.requires_grad_(), weights.requires_grad_()
            got = dispatch(x, Routing(ids, weights, E), experts, **options).wait()
            y = combine(got.x * got.routing.weights.sum(1, keepdim=True).to(x.dtype), got)
            return got.x, got.routing.ids, y, *torch.autograd.grad(y, (x, weights), dy.to(y.dtype))

        expected = run(*(leaf.clone() for leaf in leaves), routing.ids, dy)
        got = run(*map(there, leaves), there(routing.ids), there(dy))
        for name, a, b in zip(("x", "ids", "y", "dx", "dweights"), got, expected, strict=True):
            close = name in ("y", "dx", "dweights")
            assert torch.allclose(a.cpu(), b, rtol=1e-2 if close else 0, atol=1e-2 if close else 0), name


def test_compiled_dispatch(one_rank):
    """dispatch_rows, dispatch_exchange and dispatch_gradients: the bits of eager calls."""
    experts, E, H, k = ExpertMap.of(None, 7, 1), 7, 12, 2

    def run(x, ids, weights):
        arrived = dispatch(x, Routing(ids, weights, E), experts)
        y = torch.tanh(arrived.x) * arrived.routing.weights.sum(1, keepdim=True).to(x.dtype)
        return combine(y, arrived, x)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (20, 30, 2):
        ids = torch.randint(-1, E + 1, (T, k), device=DEVICE).int()
        leaves = [torch.randn(T, n, device=DEVICE).requires_grad_() for n in (H, k)]
        expected, got = (fn(leaves[0], ids, leaves[1]) for fn in (run, compiled))
        assert torch.equal(got, expected)
        dy = torch.randn_like(got)
        grads = [torch.autograd.grad(y, leaves, dy) for y in (expected, got)]
        assert all(map(torch.equal, *grads))


def test_expert_parallel(one_rank):
    """A layer whose experts are spread over one rank is the layer; forward, backward, in parts."""
    torch.manual_seed(0)
    alone = moert.MoELayer(moert.TopKRouter(64, 8, 2), moert.GluExperts(8, 64, 32)).to(DEVICE)
    for degree in (1, 4):
        spread = shard_experts_(copy.deepcopy(alone), degree=degree)
        x = torch.randn(50, 64, device=DEVICE)
        results = []
        for model in (alone, spread):
            model.zero_grad()
            y = model(x)
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad for p in model.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", ({"payload": "int8"}, {"capacity": Capacity(100)}, {"local_size": 1}), ids=str)
def test_expert_parallel_with(options, one_rank):
    alone, x = layer(), torch.randn(50, 64, device=DEVICE)
    spread = shard_experts_(copy.deepcopy(alone), degree=2, **options)
    with torch.no_grad():
        y, expected = spread(x), alone(x)
    error = (y - expected).norm() / expected.norm()
    assert error < (1e-2 if "payload" in options else 1e-4), error
    if "capacity" in options:
        assert spread.experts.dropped.item() == 0
    else:
        assert spread.experts.traffic == ([50], [50])


def test_adaptive_experts(one_rank):
    """Whatever travels: results and gradients of one process."""
    alone, x = layer(), torch.randn(30, 64, device=DEVICE)
    spread = copy.deepcopy(alone)
    spread.experts = AdaptiveExperts(spread.experts, r=0, degree=1, levels=1)
    expected = step(alone, x)
    for r, degree in ((0, 1), (1, 1), (1, 4)):
        spread.experts.r, spread.experts.degree = r, degree
        for a, b in zip(step(spread, x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_checkpoint(one_rank, tmp_path):
    """Weights and the optimizer's state, from the GPU and back."""
    model, other = shard_experts_(layer()), shard_experts_(layer())
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (model, other)]
    x = torch.randn(20, 64, device=DEVICE)
    step(model, x)
    optimizers[0].step()
    save_checkpoint(tmp_path / "saved", model, optimizers[0])
    load_checkpoint(tmp_path / "saved", other, optimizers[1])
    for each, optimizer in zip((model, other), optimizers, strict=True):
        step(each, x)
        optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert a.device.type == DEVICE and torch.equal(a, b)


def test_all_to_all(one_rank):
    splits = exchange_counts([7], {"H": 5})
    rows = torch.randn(7, 5, device=DEVICE, requires_grad=True)
    got = all_to_all(rows, splits)
    (grad,) = torch.autograd.grad(got, rows, dy := torch.randn_like(rows))
    assert torch.equal(got, rows) and torch.equal(grad, dy)


def test_rows_that_travel_while_this_rank_computes(one_rank):
    """Asynchronous there and back, with work between that would overwrite what is not waited for."""
    x, routing, experts = *problem(), ExpertMap.of(None, 7, 1)
    expected = combine(torch.tanh(dispatch(x, routing, experts).x), dispatch(x, routing, experts))
    for _ in range(20):
        arriving = dispatch(x, routing, experts, Ranks(), asynchronous=True)
        torch.full((1 << 22,), float("nan"), device=DEVICE)  # freed at once: memory that the next one may get
        back = start_combine(torch.tanh(arriving.wait().x), arriving)
        torch.full((1 << 22,), float("nan"), device=DEVICE)
        assert torch.equal(back.wait(), expected)


def test_capacity_in_a_cuda_graph(one_rank):
    """Nothing is read on the host: one graph, whose results follow what its inputs hold."""
    x, routing = problem()
    experts, capacity = ExpertMap.of(None, 7, 1), Capacity(40)

    def run():
        got = dispatch(x, routing, experts, capacity=capacity)
        return combine(got.x * 2, got)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, run())


def test_errors(one_rank):
    x, routing = problem()
    with pytest.raises(ValueError, match="experts must lie on the R=1 ranks, got 2"):
        dispatch(x, routing, ExpertMap.of(None, 7, 2))
    with Pulse() as pulse:
        told = re.escape("every rank must take part in the exchange, all are alive: boom")
        with pytest.raises(RuntimeError, match=told), pulse.exchanging():
            raise RuntimeError("boom")


def layer() -> moert.MoELayer:
    torch.manual_seed(0)
    return moert.MoELayer(moert.TopKRouter(64, 8, 2), moert.GluExperts(8, 64, 32)).to(DEVICE)


def problem() -> tuple[torch.Tensor, Routing]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, 8, (30, 3), generator=generator).int()
    return torch.randn(30, 16, generator=generator).to(DEVICE), Routing(there(ids), torch.rand(30, 3).to(DEVICE), 7)


def step(model, x) -> list[torch.Tensor]:
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters())]
