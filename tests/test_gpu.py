"""Every operator with a CUDA kernel beside its reference in float64, on the GPU.  `make test-gpu` runs it."""

import re
from dataclasses import fields, replace

import pytest
import torch

import moert
from moert import ExpertLayout, Routing, cuda
from moert.ops.expert_choice import expert_choice_ref
from moert.ops.fused_experts import fused_experts_ref
from moert.ops.gating import topk_gating_ref
from moert.ops.grouped_gemm import grouped_gemm, grouped_gemm_ref
from moert.ops.permute import permute_plan_ref, permute_ref, unpermute_ref
from moert.ops.union_experts import union_experts, union_experts_ref
from moert.quant.format import PackedTensor
from moert.quant.sub1 import SubOneBitTensor
from moert.testing import (
    DTYPES,
    FUSED_EXPERTS_SHAPES,
    GATING_SHAPES,
    GROUPED_GEMM_SHAPES,
    PERMUTE_SHAPES,
    assert_grads_close,
    assert_rows_close,
)
from moert.types import ACTIVATIONS, Activation, DispatchPlan

DEVICE = "cuda"
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
    pytest.mark.skipif(not cuda.is_built(), reason="needs a moert built with MOERT_CUDA=ON"),
]
pytestmark = NEEDS_GPU


def there(x):
    """x with every tensor in it on the GPU."""
    if torch.is_tensor(x):
        return x.to(DEVICE)
    if isinstance(x, DispatchPlan):
        return DispatchPlan(there(x.offsets), there(x.tokens), there(x.slots))
    if isinstance(x, PackedTensor | SubOneBitTensor):
        return replace(x, **{field.name: there(getattr(x, field.name)) for field in fields(x)})
    return x


def by_gpu(fn):
    """fn of tensors on the CPU, computed on the GPU."""
    return lambda *args: fn(*map(there, args)).cpu()


def same(plan, other):
    return all(torch.equal(getattr(plan, name).cpu(), getattr(other, name)) for name in ("offsets", "tokens", "slots"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GATING_SHAPES, ids=str)
@pytest.mark.parametrize("score", ("softmax", "softmax_over_topk", "sigmoid", "relu", "identity"))
def test_topk_gating(shape, score, dtype):
    logits = torch.randn(shape.T, shape.E).to(dtype)
    weights, ids = moert.topk_gating(there(logits), shape.k, score)
    assert torch.equal(ids.cpu(), topk_gating_ref(logits, shape.k, score)[1])
    assert_rows_close(weights.cpu(), lambda x: topk_gating_ref(x, shape.k, score)[0], logits)
    dweights = torch.randn(shape.T, shape.k)
    assert_grads_close(
        by_gpu(lambda x: moert.topk_gating(x, shape.k, score)[0]),
        lambda x: topk_gating_ref(x, shape.k, score)[0],
        dweights,
        logits,
    )


@pytest.mark.parametrize("limit", (moert.GroupLimit(8, 3, "top2"), moert.GroupLimit(4, 2, "max")), ids=str)
def test_topk_gating_with_bias_and_groups(limit):
    logits, bias = torch.randn(50, 64), torch.randn(64)
    weights, ids = moert.topk_gating(there(logits), 6, "sigmoid", there(bias), True, 2.5, limit)
    ref_weights, ref_ids = topk_gating_ref(logits, 6, "sigmoid", bias, True, 2.5, limit)
    assert torch.equal(ids.cpu(), ref_ids)
    assert torch.allclose(weights.cpu(), ref_weights, rtol=1e-5)


@pytest.mark.parametrize("max_slots", (None, 64, 400))
def test_expert_choice(max_slots):
    scores, segments = torch.randint(-50, 50, (61, 5)) / 8, torch.randint(-1, 8, (61,))
    args = scores, segments, torch.randint(0, 3, (7, 5)), 5, max_slots
    capacity = args[2] if max_slots != 64 else args[2].clamp_max(1)  # at most 35 choices
    args = (*args[:2], capacity, *args[3:])
    weights, ids, plan = moert.expert_choice(*map(there, args))
    ref_weights, ref_ids, ref_plan = expert_choice_ref(*args)
    assert torch.equal(ids.cpu(), ref_ids) and torch.equal(weights.cpu(), ref_weights) and same(plan, ref_plan)


@pytest.mark.parametrize("capacity", (None, 5))
@pytest.mark.parametrize("shape", PERMUTE_SHAPES, ids=str)
def test_permute_plan(shape, capacity):
    ids = shape.routing().ids
    assert same(moert.permute_plan(there(ids), shape.E, capacity), permute_plan_ref(ids, shape.E, capacity))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PERMUTE_SHAPES, ids=str)
def test_rows_there_and_back(shape, dtype):
    routing = shape.routing()
    plan = permute_plan_ref(routing.ids, shape.E)
    x, rows = torch.randn(shape.T, shape.H).to(dtype), torch.randn(plan.tokens.numel(), shape.H).to(dtype)
    assert torch.equal(moert.permute(there(x), there(plan)).cpu(), permute_ref(x, plan))
    args = rows, routing.weights
    y = moert.unpermute(there(rows), there(plan), there(routing.weights))
    assert_rows_close(y.cpu(), lambda r, w: unpermute_ref(r, plan, w), *args)
    fn = by_gpu(lambda r, w: moert.unpermute(r, there(plan), w))
    assert_grads_close(fn, lambda r, w: unpermute_ref(r, plan, w), torch.randn(shape.T, shape.H).to(dtype), *args)


@pytest.mark.parametrize("gathered", (False, True), ids=("", "gathered"))
@pytest.mark.parametrize("biased", (False, True), ids=("plain", "bias"))
@pytest.mark.parametrize("transposed", (False, True), ids=("ENK", "EKN"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GROUPED_GEMM_SHAPES, ids=str)
def test_grouped_gemm(shape, dtype, transposed, biased, gathered):
    E, N, K = shape.E, shape.I, shape.H
    plan = permute_plan_ref(shape.routing().ids, E)
    w = torch.randn((E, K, N) if transposed else (E, N, K)) / K**0.5
    bias = torch.randn(E, N).to(dtype) if biased else None
    x, tokens = torch.randn(shape.T, K).to(dtype), plan.tokens
    if not gathered:
        x, tokens = x[tokens.clamp_min(0).long()], None

    def run(fn, x, w, bias):
        offsets, index = (plan.offsets, tokens) if fn is grouped_gemm_ref else (there(plan.offsets), there(tokens))
        return fn(x, w, offsets, bias, index, None, "output", transposed)

    args = x, w.to(dtype), bias
    op, ref = by_gpu(lambda *a: run(grouped_gemm, *a)), lambda *a: run(grouped_gemm_ref, *a)
    assert_rows_close(op(*args), ref, *args)
    assert_grads_close(op, ref, torch.randn(len(plan.tokens), N).to(dtype), *args)


@pytest.mark.parametrize("allowed", (False, True))
def test_grouped_gemm_rounds_to_tf32_where_torch_may(allowed, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
    x = torch.full((10, 64), 1 + 2**-12, device=DEVICE, requires_grad=True)  # more bits than tf32 has
    w = torch.ones(2, 16, 64, device=DEVICE, requires_grad=True)
    y = grouped_gemm(x, w, torch.tensor([0, 4, 10], dtype=torch.int32, device=DEVICE))
    y.backward(torch.full_like(y, 1 + 2**-12))
    kept = 1 if allowed else 1 + 2**-12
    for value, expected in ((y, 64 * kept), (x.grad, 16 * kept), (w.grad[0], 4 * kept**2)):
        torch.testing.assert_close(value, torch.full_like(value, expected), rtol=1e-6, atol=0)


# E, S, N, K that the persistent kernel multiplies in tiles of so many rows of x and of w; in parts where K is long.
TILES = (
    (4, 2400, 2048, 1024, (128, 256)),  # in pairs
    (16, 2400, 2048, 1024, (128, 256)),
    (4, 2400, 2048, 128, None),  # in pairs: wide ones where they are gathered, else narrow ones
    (16, 2400, 2048, 128, None),
    (2, 300, 256, 128, (128, 128)),
    (2, 300, 256, 2048, (128, 128)),
    (64, 2000, 264, 128, (64, 128)),
    (64, 1000, 264, 1160, (32, 128)),
    (64, 400, 264, 128, (16, 128)),
    (64, 128, 264, 1160, (8, 128)),
    (1, 6, 264, 2048, (16, 128)),
)


def persistent_tiles(names):
    """Rows of x and of w in the tiles of persistent kernels among those named."""
    taken = [re.search(r"grouped_gemm_persistent_kernel<.*?Tiling<[\w:]+, \D*(\d+), \D*(\d+)", name) for name in names]
    return [tuple(map(int, match.groups())) for match in taken if match]


@pytest.mark.parametrize("gathered", (False, True), ids=("", "gathered"))
@pytest.mark.parametrize("transposed", (False, True), ids=("ENK", "EKN"))
@pytest.mark.parametrize("E,S,N,K,tile", TILES)
def test_persistent_grouped_gemm_takes_its_tiles(E, S, N, K, tile, transposed, gathered, monkeypatch):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setenv("MOERT_PERSISTENT_GEMM", "1")
    tile = tile or (128, 256 if gathered else 128)
    counts = torch.bincount(torch.randint(E, (S,)), minlength=E)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    rows = 50 if gathered else S
    # Small integers: every sum is exact, and the right value one.
    x = torch.randint(-3, 4, (rows, K)).bfloat16()
    w = torch.randint(-3, 4, (E, K, N) if transposed else (E, N, K)).bfloat16()
    tokens = torch.randint(rows, (S,), dtype=torch.int32) if gathered else None
    expected = grouped_gemm(x, w, offsets, None, tokens, None, "output", transposed)
    args = *map(there, (x, w, offsets)), None, there(tokens), None, "output", transposed
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        y = grouped_gemm(*args)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert persistent_tiles(names) == [tile], names
    assert any("add_split_sums" in name for name in names) == (K == 2048)
    assert torch.equal(y.cpu(), expected)


LAYOUTS = (ExpertLayout(), ExpertLayout(True), ExpertLayout(True, True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=("ENK", "EKN", "EKN-interleaved"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FUSED_EXPERTS_SHAPES, ids=str)
def test_fused_experts(shape, dtype, layout):
    E, H, I = shape.E, shape.H, shape.I
    routing = shape.routing()
    w1, w2 = torch.randn(E, 2 * I, H) / H**0.5, torch.randn(E, H, I) / I**0.5
    if layout.transposed:
        w1, w2 = w1.mT.contiguous(), w2.mT.contiguous()
    b1, b2, x = torch.randn(E, 2 * I), torch.randn(E, H), torch.randn(shape.T, H)

    def run(fn, x, weights, w1, w2, b1, b2):
        return fn(x, Routing(routing.ids.to(x.device), weights, E), w1, w2, (b1, b2), "swiglu", layout)

    args = x.to(dtype), routing.weights, *(t.to(dtype) for t in (w1, w2, b1, b2))
    op, ref = by_gpu(lambda *a: run(moert.fused_experts, *a)), lambda *a: run(fused_experts_ref, *a)
    assert_rows_close(op(*args), ref, *args)
    # What lies between the products is rounded to dtype, four times on the way to dx.
    assert_grads_close(op, ref, torch.randn(shape.T, H).to(dtype), *args, factor=4)


def experts_case(activation="swiglu", layout=ExpertLayout(), dtype=torch.bfloat16, E=7, I=72):
    """x, weights, w1, w2, b1, b2 and the function (fn, those) -> y; nobody chooses expert 1, some drop."""
    T, k, H, width = 150, 3, 136, 2 * I if Activation(activation).gated else I
    ids = torch.rand(T, E + 1).argsort(1)[:, :k].int()
    ids[ids == 1] = E
    w1, w2 = torch.randn(E, width, H) / H**0.5, torch.randn(E, H, I) / I**0.5
    if layout.transposed:
        w1, w2 = w1.mT.contiguous(), w2.mT.contiguous()
    args = [torch.randn(T, H), torch.rand(T, k), w1, w2, torch.randn(E, width), torch.randn(E, H)]

    def run(fn, x, weights, w1, w2, b1, b2, scale_on="output"):
        routing = Routing(ids.to(x.device), weights, E)
        return fn(x, routing, w1, w2, (b1, b2), Activation(activation, limit=50.0), layout, scale_on)

    return [a.to(dtype) if i != 1 else a for i, a in enumerate(args)], run


@pytest.mark.parametrize("I", (72, 21), ids=("pieces", "odd"))
@pytest.mark.parametrize("scale_on", ("output", "input"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_experts(activation, scale_on, I):
    for layout in (ExpertLayout(), ExpertLayout(True), ExpertLayout(False, True), ExpertLayout(True, True)):
        for dtype in DTYPES:
            args, run = experts_case(activation, layout, dtype, I=I)
            op = by_gpu(lambda *a: run(moert.fused_experts, *a, scale_on))  # noqa: B023
            ref = lambda *a: run(fused_experts_ref, *a, scale_on)  # noqa: B023, E731
            assert_grads_close(op, ref, torch.randn_like(args[0]), *args, factor=4)


def gradients(args, run, dy):
    leaves = [a.detach().requires_grad_() for a in args]
    return torch.autograd.grad(run(moert.fused_experts, *leaves), leaves, dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_the_same_in_every_run(dtype):
    args, run = experts_case(dtype=dtype)
    args, dy = [there(a) for a in args], torch.randn_like(args[0], device=DEVICE)
    first = gradients(args, run, dy)
    for _ in range(5):
        assert all(map(torch.equal, gradients(args, run, dy), first))


@pytest.mark.parametrize("scale_on", ("output", "input"))
@pytest.mark.parametrize("layout", (ExpertLayout(), ExpertLayout(True, True)), ids=("ENK", "EKN-interleaved"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_added_to_main_grads(dtype, layout, scale_on):
    """As the CPU adds them; an expert that nobody chose keeps its bits."""
    args, run = experts_case(layout=layout, dtype=dtype)
    dy, starts, added = torch.randn_like(args[0]), [torch.randn(a.shape) for a in args[2:]], {}
    for device in ("cpu", DEVICE):
        x, weights, *rest = (a.to(device) for a in args)
        parameters = [torch.nn.Parameter(a) for a in rest]
        moert.runtime.add_to_main_grad_(torch.nn.ParameterList(parameters))
        for p, start in zip(parameters, starts, strict=True):
            p.main_grad = start.to(device, copy=True)
        for _ in range(2):
            run(moert.fused_experts, x, weights, *parameters, scale_on).backward(dy.to(device))
        assert all(p.grad is None for p in parameters)
        added[device] = [p.main_grad.cpu() for p in parameters]
    unit = 8 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5
    for got, expected, start in zip(added[DEVICE], added["cpu"], starts, strict=True):
        assert torch.equal(got[1], start[1])
        assert (got - expected).norm() <= unit * (expected - start).norm()


@pytest.mark.parametrize("allowed", (False, True))
def test_experts_round_to_tf32_where_torch_may(allowed, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
    x = torch.full((10, 64), 1 + 2**-12, device=DEVICE)  # more bits than tf32 has
    w1, w2 = torch.ones(2, 16, 64, device=DEVICE), torch.ones(2, 64, 16, device=DEVICE)
    leaves = [t.requires_grad_() for t in (x, w1, w2)]
    ids, one = torch.arange(10, dtype=torch.int32, device=DEVICE)[:, None] % 2, torch.ones(10, 1, device=DEVICE)
    y = moert.fused_experts(x, Routing(ids, one, 2), w1, w2, activation="identity")
    dx, dw1, dw2 = torch.autograd.grad(y, leaves, torch.full_like(y, 1 + 2**-12))
    kept = 1 if allowed else 1 + 2**-12
    for value, expected in ((y, 1024 * kept), (dx, 1024 * kept), (dw1, 5 * 64 * kept**2), (dw2, 5 * 64 * kept**2)):
        torch.testing.assert_close(value, torch.full_like(value, expected), rtol=1e-6, atol=0)


def test_a_captured_step_can_be_replayed():
    args, run = experts_case()
    args, dy = [there(a) for a in args], torch.randn_like(args[0], device=DEVICE)
    expected, stream = gradients(args, run, dy), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(args, run, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradients(args, run, dy)
    for grad in got:
        grad.zero_()
    graph.replay()
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T,n,H,I", ((1, 3, 64, 48), (7, 9, 33, 19), (40, 4, 136, 300)))
def test_union_experts(T, n, H, I, dtype):
    E = 12
    ids, gains = torch.randperm(E)[:n].int(), torch.rand(T, E) + 0.1
    args = torch.randn(T, H), gains, torch.randn(E, I, H) / H**0.5, torch.randn(E, H, I) / I**0.5
    args = [a.to(dtype) if i != 1 else a for i, a in enumerate(args)]
    ref = lambda x, g, w1, w2: union_experts_ref(x, g, ids, w1, w2)  # noqa: E731
    assert_rows_close(by_gpu(lambda x, g, w1, w2: union_experts(x, g, there(ids), w1, w2))(*args), ref, *args)


def test_a_captured_plan_can_be_replayed():
    ids = torch.randint(0, 64, (512, 8), device="cuda", dtype=torch.int32)
    moert.permute_plan(ids, 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = moert.permute_plan(ids, 64)
    ids.copy_(torch.randint(0, 64, (512, 8)))
    graph.replay()
    assert torch.equal(plan.slots.cpu(), permute_plan_ref(ids.cpu(), 64).slots)


def test_a_tensor_on_the_cpu_is_refused():
    logits, message = (
        torch.randn(3, 8, device="cuda"),
        "must be on the GPU like the other arguments, got another device",
    )
    with pytest.raises(RuntimeError, match=f"bias {message}"):
        moert.topk_gating(logits, 2, bias=torch.zeros(8))
    with pytest.raises(RuntimeError, match=f"logits {message}"):
        moert.topk_gating(logits.cpu(), 2, bias=torch.zeros(8, device="cuda"))


@pytest.mark.parametrize("E,k,message", [(2000, 2, "at most 1024 experts"), (64, 40, "k must be at most 32 on a GPU")])
def test_too_large(E, k, message):
    with pytest.raises(RuntimeError, match=message):
        moert.topk_gating(torch.randn(3, E, device="cuda"), k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dispatch_combine(dtype):
    """The bits of the CPU's, rows strided or not; a slot that points nowhere is left out."""
    H, slots, ops = 40, torch.randint(-1, 9, (7, 3)).int(), torch.ops.moert
    rows, own = torch.randn(5, H + 8).to(dtype)[:, :H], torch.randn(4, H).to(dtype)
    for first in (0, 2, 5):
        for residual in (None, torch.randn(7, H).to(dtype)):
            got = ops.dispatch_combine(there(rows), there(own), first, there(slots), there(residual))
            assert torch.equal(got.cpu(), ops.dispatch_combine(rows, own, first, slots, residual))
    astray = torch.where(slots < 0, 99, slots)
    got = ops.dispatch_combine(there(rows), there(own), 0, there(astray))
    assert torch.equal(got.cpu(), ops.dispatch_combine(rows, own, 0, slots))
