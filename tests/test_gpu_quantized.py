"""Packed experts beside their reference in float64, on the GPU.  `make test-gpu` runs it."""

from dataclasses import replace

import pytest
import torch
from tests.ops.test_fused_experts_quantized import assert_rounded_close
from tests.test_gpu import NEEDS_GPU, by_gpu, there

import moert
from moert import Routing
from moert.ops.fused_experts_quantized import fused_experts_quantized_ref
from moert.quant import BitNested, Fp8, Int4, Int4Asymmetric, Int8, Mxfp4, SubOneBit, Ternary2, Ternary5
from moert.testing import DTYPES, FUSED_EXPERTS_SHAPES, assert_grads_close, assert_rows_close, row_error

pytestmark = NEEDS_GPU


def quantized(shape, fmt, dtype):
    """x, weights, b1, b2 and the function (fn, those) -> y, on whichever device they are."""
    E, H, I = shape.E, shape.H, shape.I
    routing = shape.routing()
    packed = [fmt.pack(torch.randn(E, 2 * I, H) / H**0.5), fmt.pack(torch.randn(E, H, I) / I**0.5)]
    moved = [there(w) for w in packed]
    args = torch.randn(shape.T, H), routing.weights, torch.randn(E, 2 * I), torch.randn(E, H)
    args = [a.to(dtype) if i != 1 else a for i, a in enumerate(args)]

    def run(fn, x, weights, b1, b2, precision="full"):
        w1, w2 = moved if x.is_cuda else packed
        return fn(x, Routing(routing.ids.to(x.device), weights, E), w1, w2, (b1, b2), "swiglu", precision)

    return args, run


FORMATS = (Int8(), Int8(64), Int4(32), Int4Asymmetric(128), Mxfp4(), Ternary2(), Ternary5(32), Fp8(), BitNested())


@pytest.mark.parametrize("fmt", (*FORMATS, BitNested(5, 4), SubOneBit()), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FUSED_EXPERTS_SHAPES, ids=str)
def test_fused_experts_quantized(shape, dtype, fmt):
    args, run = quantized(shape, fmt, dtype)
    op, ref = by_gpu(lambda *a: run(moert.fused_experts_quantized, *a)), lambda *a: run(fused_experts_quantized_ref, *a)
    assert_rows_close(op(*args), ref, *args)


@pytest.mark.parametrize("fmt", (*FORMATS, BitNested(5, 4), SubOneBit()), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FUSED_EXPERTS_SHAPES, ids=str)
def test_gradients_through_quantized_experts(shape, dtype, fmt):
    """Of x and the routing weights; twice the same bits."""
    (x, weights, b1, b2), run = quantized(shape, fmt, dtype)
    op = by_gpu(lambda x, weights: run(moert.fused_experts_quantized, x, weights, there(b1), there(b2)))
    ref = lambda x, weights: run(fused_experts_quantized_ref, x, weights, b1.to(x.dtype), b2.to(x.dtype))  # noqa: E731
    dy = torch.randn(shape.T, shape.H).to(dtype)
    # What lies between the products is rounded to dtype, four times on the way to dx, and so are the weights.
    assert_grads_close(op, ref, dy, x, weights, factor=4)
    leaves = [a.clone().requires_grad_() for a in (x, weights)]
    first, again = (torch.autograd.grad(op(*leaves), leaves, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


TENSOR_CORE_FORMATS = (Int8(), Int8(32), Int4(32), Int4(128), Int4Asymmetric(64), Mxfp4(), Ternary2(), Fp8())
MORE_ON_TENSOR_CORES = (Ternary5(), BitNested(), BitNested(5, 3, 32), SubOneBit())


@pytest.mark.parametrize("fmt", (*TENSOR_CORE_FORMATS, *MORE_ON_TENSOR_CORES), ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("T,E,H,I", ((1, 8, 512, 384), (7, 8, 320, 136), (200, 4, 264, 128), (1000, 3, 128, 72)))
def test_quantized_experts_on_tensor_cores(T, E, H, I, dtype, fmt):
    """Few and many rows an expert; a token has the bits that it has alone."""
    shape = replace(FUSED_EXPERTS_SHAPES[0], T=T, E=E, H=H, I=I, k=2)
    (x, weights, b1, b2), run = quantized(shape, fmt, dtype)
    args = x, weights, b1, b2
    op, ref = by_gpu(lambda *a: run(moert.fused_experts_quantized, *a)), lambda *a: run(fused_experts_quantized_ref, *a)
    y = op(*args)
    assert_rows_close(y, ref, *args)
    assert torch.equal(y, op(*args))
    packed = [there(fmt.pack(torch.randn(E, 2 * I, H))), there(fmt.pack(torch.randn(E, H, I)))]
    ids, x, weights = there(shape.routing().ids), there(x), there(weights)
    whole = moert.fused_experts_quantized(x, Routing(ids, weights, E), *packed)
    for t in range(0, T, max(1, T // 5)):
        one = slice(t, t + 1)
        alone = moert.fused_experts_quantized(x[one], Routing(ids[one], weights[one], E), *packed)
        assert torch.equal(alone, whole[one])


def test_captured_quantized_experts_can_be_replayed():
    """Forward and backward."""
    (x, weights, b1, b2), run = quantized(FUSED_EXPERTS_SHAPES[1], Int4(32), torch.bfloat16)
    x, weights, b1, b2 = (there(a) for a in (x, weights, b1, b2))
    x.requires_grad_()

    def step():
        y = run(moert.fused_experts_quantized, x, weights, b1, b2)
        return y, *torch.autograd.grad(y, x, torch.ones_like(y))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the autograd engine's first call is not for capture
        expected = [a.detach().clone() for a in step()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for a in got:
        a.detach().zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


INT8_FORMATS = (*TENSOR_CORE_FORMATS[:-1], Ternary2(128), Ternary5(), Ternary5(32), BitNested(), BitNested(5, 4))
INT8_SHAPES = ((1, 8, 512, 384), (7, 8, 320, 136), (61, 7, 37, 21), (200, 4, 264, 128), (1000, 3, 128, 72))


@pytest.mark.parametrize("precision", ("int8", "int8_group32"))
@pytest.mark.parametrize("fmt", INT8_FORMATS, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("T,E,H,I", INT8_SHAPES)
def test_rows_of_int8(T, E, H, I, dtype, fmt, precision):
    """Few and many rows an expert; twice the same bits, and those that a token has alone."""
    shape = replace(FUSED_EXPERTS_SHAPES[0], T=T, E=E, H=H, I=I, k=2)
    args, run = quantized(shape, fmt, dtype)
    op = by_gpu(lambda *a: run(moert.fused_experts_quantized, *a, precision))
    y = op(*args)
    assert_rounded_close(y, run, args, precision)
    assert torch.equal(y, op(*args))
    packed = [there(fmt.pack(torch.randn(E, 2 * I, H))), there(fmt.pack(torch.randn(E, H, I)))]
    ids, x, weights = there(shape.routing().ids), there(args[0]), there(args[1])
    whole = moert.fused_experts_quantized(x, Routing(ids, weights, E), *packed, precision=precision)
    for t in range(0, T, max(1, T // 5)):
        one = slice(t, t + 1)
        alone = moert.fused_experts_quantized(x[one], Routing(ids[one], weights[one], E), *packed, precision=precision)
        assert torch.equal(alone, whole[one])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("T,E,H,I", (*INT8_SHAPES, (300, 4, 1024, 256)))
def test_rows_of_fp8(T, E, H, I, dtype):
    """The codes are a CPU's but for values between two of them, in sums that tensor cores keep in fewer bits."""
    shape = replace(FUSED_EXPERTS_SHAPES[0], T=T, E=E, H=H, I=I, k=2)
    args, run = quantized(shape, Fp8(), dtype)
    op = by_gpu(lambda *a: run(moert.fused_experts_quantized, *a, "fp8_group128"))
    y = op(*args)
    expected = run(moert.fused_experts_quantized, *args, "fp8_group128")
    assert row_error(y, expected) < 0.05 and ((y - expected).norm() / expected.norm()) < 5e-3
    assert torch.equal(y, op(*args))
    one = slice(T // 2, T // 2 + 1)
    routing = shape.routing()
    packed = [there(Fp8().pack(torch.randn(E, 2 * I, H))), there(Fp8().pack(torch.randn(E, H, I)))]
    ids, x, weights = there(routing.ids), there(args[0]), there(args[1])
    whole = moert.fused_experts_quantized(x, Routing(ids, weights, E), *packed, precision="fp8_group128")
    routing = Routing(ids[one], weights[one], E)
    alone = moert.fused_experts_quantized(x[one], routing, *packed, precision="fp8_group128")
    assert torch.equal(alone, whole[one])


@pytest.mark.parametrize("fmt", (Int8(), Ternary2(), Ternary5()), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("activation", ("identity", "relu", "reglu"))
def test_rows_of_int8_have_the_bits_of_a_cpu(activation, dtype, fmt):
    """One choice of weight 1 and scales of whole rows: no sum but one of integers."""
    T, E, H, I = 40, 3, 297, 345
    width = 2 * I if activation == "reglu" else I
    packed = fmt.pack(torch.randn(E, width, H)), fmt.pack(torch.randn(E, H, I))
    x, routing = torch.randn(T, H).to(dtype), Routing(torch.randint(E, (T, 1)).int(), torch.ones(T, 1), E)
    expected = moert.fused_experts_quantized(x, routing, *packed, activation=activation, precision="int8")
    routing = Routing(there(routing.ids), there(routing.weights), E)
    y = moert.fused_experts_quantized(there(x), routing, *map(there, packed), activation=activation, precision="int8")
    assert torch.equal(y.cpu(), expected)


@pytest.mark.parametrize("precision", ("int8", "int8_group32"))
def test_numbers_that_are_not_finite_in_rows_of_int8(precision):
    (x, *rest), run = quantized(FUSED_EXPERTS_SHAPES[2], Int4(32), torch.float32)
    x[0, 3], x[1, 0], x[2] = torch.nan, -torch.inf, x[2] * 2.0**-120
    y = run(moert.fused_experts_quantized, *map(there, (x, *rest)), precision).cpu()
    expected = run(moert.fused_experts_quantized, x, *rest, precision)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.allclose(y[2:], expected[2:], rtol=1e-2, atol=1e-2)


def test_precision_of_quantized_experts():
    args, run = quantized(FUSED_EXPERTS_SHAPES[0], Int4(32), torch.float32)
    auto, full = (run(moert.fused_experts_quantized, *map(there, args), precision) for precision in ("auto", "full"))
    assert torch.equal(auto, full)
    with pytest.raises(
        RuntimeError, match="precision must be one of auto, full, int8, int8_group32, fp8_group128, got $"
    ):
        run(moert.fused_experts_quantized, *map(there, args), "")
    with pytest.raises(RuntimeError, match="x must have dtype Float, BFloat16 or Half for int8 rows, got Double"):
        run(moert.fused_experts_quantized, *(there(a.double()) for a in args), "int8")
    args, run = quantized(FUSED_EXPERTS_SHAPES[0], Fp8(), torch.float32)
    with pytest.raises(RuntimeError, match="precision must be one of auto, full, fp8_group128 for fp8, got int8"):
        run(moert.fused_experts_quantized, *map(there, args), "int8")
