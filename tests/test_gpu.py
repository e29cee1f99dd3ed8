"""Every operator with a CUDA kernel beside its reference in float64, on the GPU.  `make test-gpu` runs it."""

import pytest
import torch

import moert
from moert import cuda
from moert.ops.gating import topk_gating_ref
from moert.ops.permute import permute_plan_ref, permute_ref, unpermute_ref
from moert.testing import DTYPES, GATING_SHAPES, PERMUTE_SHAPES, assert_rows_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
    pytest.mark.skipif(not cuda.is_built(), reason="needs a moert built with MOERT_CUDA=ON"),
]


def on_gpu(x):
    """x with every tensor in it on the GPU."""
    if torch.is_tensor(x):
        return x.cuda()
    return type(x)(*map(on_gpu, (x.offsets, x.tokens, x.slots)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GATING_SHAPES, ids=str)
@pytest.mark.parametrize("score", ("softmax", "softmax_over_topk", "sigmoid", "relu", "identity"))
def test_topk_gating(shape, score, dtype):
    logits = torch.randn(shape.T, shape.E).to(dtype)
    weights, ids = moert.topk_gating(logits.cuda(), shape.k, score)
    assert torch.equal(ids.cpu(), topk_gating_ref(logits, shape.k, score)[1])
    assert_rows_close(weights.cpu(), lambda x: topk_gating_ref(x, shape.k, score)[0], logits)


@pytest.mark.parametrize("capacity", (None, 5))
@pytest.mark.parametrize("shape", PERMUTE_SHAPES, ids=str)
def test_permute_plan(shape, capacity):
    ids = shape.routing().ids
    plan, ref = moert.permute_plan(ids.cuda(), shape.E, capacity), permute_plan_ref(ids, shape.E, capacity)
    for name in ("offsets", "tokens", "slots"):
        assert torch.equal(getattr(plan, name).cpu(), getattr(ref, name)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PERMUTE_SHAPES, ids=str)
def test_rows_there_and_back(shape, dtype):
    routing = shape.routing()
    plan = permute_plan_ref(routing.ids, shape.E)
    x, rows = torch.randn(shape.T, shape.H).to(dtype), torch.randn(plan.tokens.numel(), shape.H).to(dtype)
    assert torch.equal(moert.permute(x.cuda(), on_gpu(plan)).cpu(), permute_ref(x, plan))
    y = moert.unpermute(rows.cuda(), on_gpu(plan), routing.weights.cuda())
    assert_rows_close(y.cpu(), lambda r, w: unpermute_ref(r, plan, w), rows, routing.weights)


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
    logits = torch.randn(3, 8, device="cuda")
    with pytest.raises(RuntimeError, match="bias must be on a GPU like the other arguments, got another device"):
        moert.topk_gating(logits, 2, bias=torch.zeros(8))


@pytest.mark.parametrize("E,k,message", [(2000, 2, "at most 1024 experts"), (64, 40, "k must be at most 32 on a GPU")])
def test_too_large(E, k, message):
    with pytest.raises(RuntimeError, match=message):
        moert.topk_gating(torch.randn(3, E, device="cuda"), k)
