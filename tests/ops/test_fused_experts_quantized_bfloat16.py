"""Rows and dequantized weights rounded to bfloat16, and where "auto" takes them."""

import os
import subprocess
import sys

import pytest
import torch
from tests.ops.test_fused_experts_quantized import (
    FEW,
    FORMATS,
    FULL_ONLY,
    LARGE,
    LONG,
    ODD,
    ONE_OF_EACH,
    assert_rounded_close,
    case,
    error,
)

from moert import _C, batch_invariant
from moert.ops.fused_experts_quantized import default_precision, fused_experts_quantized, fused_experts_quantized_ref
from moert.quant import Fp8, Int4, Int8, Ternary2, Ternary5
from moert.testing import DTYPES, FUSED_EXPERTS_SHAPES, Shape


@pytest.mark.parametrize("fmt", [*FORMATS, *FULL_ONLY], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(fmt, dtype):
    every = dtype == torch.float32 and fmt in [*ONE_OF_EACH, *FULL_ONLY]
    for shape in (*FUSED_EXPERTS_SHAPES[1:], FEW, LONG) if every else (ODD, LONG):
        args, run = case(shape, fmt, dtype, bias=True)
        args[0][:, ::5] *= 20
        y = run(fused_experts_quantized, *args, "bfloat16")
        assert_rounded_close(y, run, args, "bfloat16")


@pytest.mark.parametrize("I", [70, 300])
def test_rows_that_are_laid_out_in_parts(I):
    """All rows of a tile, 256, of 2300 columns do not fit at once; a tile has all its weights then, gated or not."""
    args, run = case(Shape("many long rows", 300, 1, 1, 2300, I), Int4(128), torch.bfloat16)
    assert_rounded_close(run(fused_experts_quantized, *args, "bfloat16"), run, args, "bfloat16")


@pytest.mark.parametrize("fmt", [Int4(), Int8(), Fp8()], ids=str)
def test_it_is_rounded_but_less_than_int8(fmt):
    """Products of two numbers that are off by 2^-9 at most, by less than half of that as a rule."""
    args, run = case(LARGE, fmt)
    full = run(fused_experts_quantized, *args, "full")
    rounded = error(run(fused_experts_quantized, *args, "bfloat16"), full)
    assert 2**-11 < rounded < 2**-7
    if isinstance(fmt, Int4 | Int8):
        assert rounded < error(run(fused_experts_quantized, *args, "int8_group32"), full)


@pytest.mark.parametrize("fmt", [Int4(), Fp8(), Ternary2(), Ternary5()], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 15, 16, 39, 40], ids=str)
def test_auto_takes_it_where_an_expert_has_many_rows(fmt, rows):
    shape = Shape("rows an expert", 4 * rows, 4, 1, 96, 40)
    args, run = case(shape, fmt)
    w1, w2 = fmt.pack(torch.ones(4, 80, 96)), fmt.pack(torch.ones(4, 96, 40))
    by_format = default_precision(w1, w2)
    least = _C.bf16_rows(by_format, isinstance(fmt, Ternary2 | Ternary5))
    expected = "bfloat16" if least and rows >= least else by_format
    assert default_precision(w1, w2, shape.T * shape.k) == expected
    of_format = {Int4(): 16, Fp8(): 8, Ternary2(): 40, Ternary5(): 40}
    assert least == (of_format[fmt] if _C.isa() == "amx" else 0)
    auto = run(fused_experts_quantized, *args, "auto")
    assert torch.equal(auto, run(fused_experts_quantized, *args, expected))
    assert_rounded_close(auto, run, args, "auto")
    with batch_invariant(True):
        assert torch.equal(run(fused_experts_quantized, *args, "auto"), run(fused_experts_quantized, *args, by_format))


def test_every_isa_rounds_alike():
    """Rows and weights whose products are sums of few bits: what is left of an instruction set is its rounding."""
    code = (
        "import torch\n"
        "from moert import Routing, fused_experts_quantized as f\n"
        "from moert.quant import *\n"
        "g = torch.Generator().manual_seed(0)\n"
        "x = torch.zeros(40, 200)\n"
        "x[torch.arange(40), torch.arange(40) * 5] = torch.rand(40, generator=g) + 1\n"
        "w1 = torch.randn(1, 200, 200, generator=g)\n"
        "eye = Int8().pack(torch.eye(200)[None] * 127)\n"
        "r = Routing(torch.zeros(40, 1).int(), torch.ones(40, 1), 1)\n"
        "formats = Int8(), Int8(32), Int4(), Int4Asymmetric(), Mxfp4(), Ternary2(), Ternary5(), Fp8(), BitNested()\n"
        "for fmt in (*formats, SubOneBit()):\n"
        "    print(f(x, r, fmt.pack(w1), eye, activation='relu', precision='bfloat16').numpy().tobytes().hex())\n"
    )
    outputs = [
        subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "MOERT_ISA": isa}) for isa in _C.isas()
    ]
    assert len(set(outputs)) == 1 and len(outputs[0]) > 10 * 40 * 200 * 8


def test_errors():
    args, run = case(ODD, Int4(), torch.float64)
    with pytest.raises(RuntimeError, match="x must have dtype Float, BFloat16 or Half for bfloat16 rows, got Double"):
        run(fused_experts_quantized, *args, "bfloat16")


def test_reference_of_auto():
    args, run = case(LONG, Fp8())
    with batch_invariant(True):
        assert torch.equal(
            run(fused_experts_quantized_ref, *args, "auto"), run(fused_experts_quantized_ref, *args, "full")
        )
