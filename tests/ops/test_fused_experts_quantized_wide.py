"""Tiles of all the columns that one may have, and of more rows than dot products take: one thread, one expert."""

import pytest
import torch
from tests.ops.test_fused_experts_quantized import (
    FORMATS,
    FULL_ONLY,
    HAVE_INT8_WEIGHTS,
    INT8,
    INT8_WEIGHTS,
    assert_rounded_close,
    case,
)

from moert.ops.fused_experts_quantized import fused_experts_quantized, fused_experts_quantized_ref
from moert.quant import Fp8, Int4, Int8, SubOneBit
from moert.testing import DTYPES, Shape, assert_grads_close, assert_rows_close, row_error

# K at which the rows that are dequantized at once are no whole number of panels unless they are made to be.
WIDE = [Shape(f"rows of {I}", 100, 1, 1, 300, I) for I in (300, 700)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("fmt", [*FORMATS, *FULL_ONLY], ids=str)
def test_full(fmt):
    for shape in WIDE:
        args, run = case(shape, fmt, bias=True)
        assert_rows_close(
            run(fused_experts_quantized, *args), lambda *a, f=run: f(fused_experts_quantized_ref, *a), *args
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", [Int8(32), Fp8(), SubOneBit()], ids=str)
def test_dtypes(fmt, dtype):
    args, run = case(WIDE[1], fmt, dtype)
    assert_rows_close(run(fused_experts_quantized, *args), lambda *a: run(fused_experts_quantized_ref, *a), *args)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_int8_rows(fmt):
    weights = (INT8_WEIGHTS,) if fmt.name in HAVE_INT8_WEIGHTS else ()
    for precision in ("bfloat16", *INT8, *weights):
        args, run = case(WIDE[0], fmt, bias=True)
        assert_rounded_close(run(fused_experts_quantized, *args, precision), run, args, precision)


def test_fp8_rows():
    args, run = case(WIDE[1], Fp8(), bias=True)
    y = run(fused_experts_quantized, *args, "fp8_group128")
    exact = run(fused_experts_quantized_ref, *(a.double() for a in args), "fp8_group128")
    rows = sorted(row_error(y[t : t + 1], exact[t : t + 1]) for t in range(len(y)))
    assert rows[len(rows) // 2] < 1e-5 and rows[-1] < 0.05  # a value between two codes may become either


@pytest.mark.parametrize("fmt", [Int8(32), Int4(), Fp8(), SubOneBit()], ids=str)
def test_backward(fmt):
    (x, weights, b1, b2), run = case(WIDE[1], fmt, bias=True)

    def of(fn):
        return lambda x, weights: run(fn, x, weights, *(b.to(x.dtype) for b in (b1, b2)))

    dy = torch.randn_like(x)
    assert_grads_close(of(fused_experts_quantized), of(fused_experts_quantized_ref), dy, x, weights)
