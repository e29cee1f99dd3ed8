"""Weights in groups that become int8 with a scale a row, so that sums of whole rows are integers."""

import pytest
import torch
from tests.ops.test_fused_experts_quantized import (
    FEW,
    LONG,
    ODD,
    ONE_OF_EACH,
    assert_rounded_close,
    case,
    error,
)
from tests.ops.test_fused_experts_quantized import (
    INT8_WEIGHTS as PRECISION,
)

from moert import Routing, batch_invariant
from moert.ops.fused_experts import fused_experts_ref
from moert.ops.fused_experts_quantized import fused_experts_quantized
from moert.quant import BitNested, Fp8, Int4, Int4Asymmetric, Int8, Mxfp4, SubOneBit, Ternary2
from moert.testing import DTYPES, FUSED_EXPERTS_SHAPES, Shape

FORMATS = [
    *(Int8(), Int8(32), Int8(128), Int4(32), Int4(64), Int4(128)),
    *(Int4Asymmetric(32), Int4Asymmetric(128), Mxfp4()),
]
MANY = Shape("experts of more rows than a tile register", 90, 4, 2, 330, 200)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(fmt, dtype):
    every = dtype == torch.float32 and fmt in ONE_OF_EACH
    for shape in (*FUSED_EXPERTS_SHAPES[1:], FEW, LONG, MANY) if every else (ODD, LONG, MANY):
        args, run = case(shape, fmt, dtype, bias=True)
        args[0][:, ::5] *= 20
        y = run(fused_experts_quantized, *args, PRECISION)
        assert_rounded_close(y, run, args, PRECISION)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_error_is_that_of_the_weights(fmt):
    """Gaussian rows: at most 1.5 times what the weights alone have, but where those have 8 bits and small groups."""
    w1, w2 = torch.randn(8, 768, 512) / 512**0.5, torch.randn(8, 512, 384) / 384**0.5
    routing, packed = Shape("wide", 64, 8, 2, 512, 384).routing(), (fmt.pack(w1), fmt.pack(w2))
    x = torch.randn(64, 512)
    exact = fused_experts_ref(x, routing, w1, w2)
    weights_only = error(fused_experts_quantized(x, routing, *packed, precision="full"), exact)
    whole = error(fused_experts_quantized(x, routing, *packed, precision=PRECISION), exact)
    assert whole < (0.03 if isinstance(fmt, Int8) else 1.03 * weights_only)
    assert (whole > 1.5 * weights_only) == isinstance(fmt, Int8)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_token_has_the_same_bits_whatever_comes_with_it(fmt):
    """Sums are integers: the kernel for few rows, panels and tile registers agree."""
    w1, w2 = fmt.pack(torch.randn(1, 80, 330)), fmt.pack(torch.randn(1, 330, 40))
    x = torch.randn(70, 330)

    def run(n):
        routing = Routing(torch.zeros(n, 1).int(), torch.ones(n, 1), 1)
        return fused_experts_quantized(x[:n], routing, w1, w2, precision=PRECISION)

    whole = run(70)
    for n in (1, 4, 7, 8, 33):
        assert torch.equal(run(n), whole[:n])
    with batch_invariant(True):
        assert torch.equal(run(70), whole)


@pytest.mark.parametrize("scale_on", ["output", "input"])
@pytest.mark.parametrize("activation", ["swiglu_oai", "gelu", "relu2"])
def test_two_formats_and_other_variants(activation, scale_on):
    for fmt in ((Int8(), Int4()), (Mxfp4(), Int8()), (Int4Asymmetric(64), Int8(32))):
        args, run = case(ODD, fmt, activation=activation, bias=True)
        y = run(fused_experts_quantized, *args, PRECISION, scale_on)
        assert_rounded_close(y, run, args, PRECISION, scale_on=scale_on)


def test_weights_of_a_scale_a_row_stay_as_they_are():
    args, run = case(MANY, Int8())
    assert torch.equal(run(fused_experts_quantized, *args, PRECISION), run(fused_experts_quantized, *args, "int8"))


def one_expert(x, w1, w2):
    """As case, both products and nothing between them."""
    ids = torch.zeros(len(x), 1).int()

    def run(fn, x, weights, precision):
        return fn(x, Routing(ids, weights, 1), w1, w2, (None, None), "identity", precision)

    return [x, torch.ones(len(x), 1)], run


@pytest.mark.parametrize("fmt", [Int4(), Int4Asymmetric(), Mxfp4(), Int8(32)], ids=str)
def test_rows_of_zeros_and_of_one_large_group(fmt):
    """A row of nothing is 0; the codes of small groups beside a large one are those of the row's scale."""
    w = torch.randn(1, 64, 128)
    w[0, 3] = 0
    w[0, 5, 32:64] *= 1000
    w1, w2 = fmt.pack(w), Int8().pack(torch.eye(128, 64)[None])
    args, run = one_expert(torch.randn(12, 128), w1, w2)
    y = run(fused_experts_quantized, *args, PRECISION)
    assert not y[:, 3].any() and y[:, 5].all() and y.isfinite().all()
    assert_rounded_close(y, run, args, PRECISION)


@pytest.mark.parametrize("byte", [0, 3, 6, 10, 12, 14, 16, 20, 100, 200])
def test_scales_at_the_ends_of_float32(byte):
    """Groups of 2^(byte - 127) and of half of it: below 2^-109 a row is 0."""
    w1 = Mxfp4().pack(torch.randn(1, 64, 64))
    w1.scales[..., 0], w1.scales[..., 1] = byte, max(byte - 1, 0)
    w2 = Int8().pack(torch.eye(64)[None])
    args, run = one_expert(torch.rand(12, 64) * 2.0 ** (100 - byte), w1, w2)  # y is of the size of 2^-27
    y = run(fused_experts_quantized, *args, PRECISION)
    assert y.isfinite().all() and y.any() == (byte > 15)
    assert_rounded_close(y, run, args, PRECISION)


def test_a_large_channel_costs_what_the_table_says():
    """docs/quantized.md: one scale a token loses more than 4 bits do where one channel is 30 times the others."""
    w1, w2 = torch.randn(8, 1024, 1024) / 32, torch.randn(8, 1024, 512) / 512**0.5
    routing, packed = Shape("wide", 64, 8, 2, 1024, 512).routing(), (Int4().pack(w1), Int4().pack(w2))
    x = torch.randn(64, 1024)
    x[:, 7] *= 30
    exact = fused_experts_ref(x, routing, w1, w2)
    far = {p: error(fused_experts_quantized(x, routing, *packed, precision=p), exact) for p in ("full", PRECISION)}
    assert 1.1 < far[PRECISION] / far["full"] < 1.3


@pytest.mark.parametrize("fmt", [Ternary2(32), BitNested(), Fp8(), SubOneBit()], ids=str)
def test_formats_that_do_not_have_it(fmt):
    args, run = case(ODD, fmt)
    with pytest.raises(RuntimeError, match=f"precision must be one of auto, .* for {fmt.name}, got int8_weights"):
        run(fused_experts_quantized, *args, PRECISION)
