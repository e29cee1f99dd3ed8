"""Rows of int8 over weights whose integers belong to 32 or 160 columns."""

import pytest
import torch

from moert import Routing
from moert.ops.fused_experts_quantized import GROUPS, fused_experts_quantized, fused_experts_quantized_ref
from moert.quant import BitNested, Int4, Int4Asymmetric, Int8, Mxfp4, Ternary2, Ternary5
from moert.quant.format import PackedTensor

GROUPED = [
    *(Int8(32), Int8(128), Int4(32), Int4(64), Int4(128), Ternary5(64), Mxfp4()),
    *(Int4Asymmetric(32), Int4Asymmetric(64), Int4Asymmetric(128)),
]
FORMATS = [Int8(), Ternary5(), *GROUPED]
PRECISIONS = ("int8", "int8_group32", "int8_group160")


def one_expert(x, w1, w2, precision):
    routing = Routing(torch.zeros(len(x), 1).int(), torch.ones(len(x), 1), 1)
    return fused_experts_quantized(x, routing, w1, w2, activation="identity", precision=precision)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("H,I", [(200, 544), (2048, 64), (3300, 32)])
def test_a_token_has_the_same_bits_among_few(fmt, precision, H, I):
    """Register blocks of any number of rows (and integers of whole rows); ternary5 is in panels from 5 on."""
    most = 4 if (fmt, precision) == (Ternary5(), "int8_group160") else 8
    x = torch.randn(most, H)
    w1, w2 = fmt.pack(torch.randn(1, I, H) / H**0.5), fmt.pack(torch.randn(1, H, I) / I**0.5)
    whole = one_expert(x, w1, w2, precision)
    for n in range(1, most):
        assert torch.equal(one_expert(x[-n:], w1, w2, precision), whole[-n:])


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("K", [32, 208, 1100])
@pytest.mark.parametrize("T", [1, 6, 17, 50])
def test_every_group_has_its_scale_and_its_zero(fmt, precision, K, T):
    """Rows of x whose scales are 1, scales of weights that are powers of two: nothing is rounded."""
    x = torch.randint(-3, 4, (T, K)).float()
    x[:, ::32] = 127
    eye = Int8().pack(torch.eye(K)[None] * 127)  # code 127, scale 1
    eye = PackedTensor(eye.format, K, (eye.codes == 127).byte(), eye.scales)
    w2 = fmt.pack(torch.randn(1, K, K))
    powers = torch.randint(-1, 2, w2.scales.shape)
    scales = (127 + powers).byte() if isinstance(fmt, Mxfp4) else (2.0**powers).to(w2.scales.dtype)
    zeros = None if w2.zeros is None else torch.randint(0, 16, w2.zeros.shape).byte()
    w2 = PackedTensor(fmt, K, w2.codes, scales, zeros)
    expected = (x.double() @ fmt.unpack(w2)[0].double().T).float()
    assert torch.equal(one_expert(x, eye, w2, precision), expected)


@pytest.mark.parametrize("fmt", [*FORMATS, Ternary2(), Ternary2(128), BitNested(), BitNested(5)], ids=str)
@pytest.mark.parametrize("byte", [0x00, 0x77, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("T", [2, 3, 10, 40])
def test_sums_at_their_ends(fmt, byte, T):
    """Nothing but the largest products, of either sign: no sum of 16 bits is too small for them."""
    K = 1152
    x = torch.full((T, K), 127.0)
    x[1::2] = -127
    x[-1] = 127 - 254 * (torch.arange(K) % 2)
    eye = Int8().pack(torch.eye(K)[None] * 127)  # code 127, scale 1
    eye = PackedTensor(eye.format, K, (eye.codes == 127).byte(), eye.scales)
    w2 = fmt.pack(torch.ones(1, K, K) if byte else -torch.ones(1, K, K))
    codes = w2.codes if isinstance(fmt, Ternary2 | Ternary5) else torch.full_like(w2.codes, byte)
    scales = torch.full_like(w2.scales, 128 if isinstance(fmt, Mxfp4) else 32)
    zeros = None if w2.zeros is None else torch.full_like(w2.zeros, 0 if byte else 15)
    w2 = PackedTensor(fmt, K, codes, scales, zeros)
    expected = x.double() @ fmt.unpack(w2)[0].double().T
    assert byte in (0x00, 0x80) or expected.abs().max() > 0
    for precision in PRECISIONS:
        got = one_expert(x, eye, w2, precision)
        assert ((got - expected).abs() <= 1e-6 * expected.abs()).all()  # sums of up to 24 bits, each rounded once


@pytest.mark.parametrize("fmt", GROUPED, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("I", [32, 200, 544, 1056])
@pytest.mark.parametrize("T", [1, 5, 11, 30])
def test_an_infinite_scale_stays_in_its_row(fmt, precision, I, T):
    """What pads a row of codes lies beside the scales of the row behind it."""
    H, row = 48, 9
    x, others = torch.randn(T, H), torch.arange(H) != row
    w1, w2 = fmt.pack(torch.randn(1, I, H)), fmt.pack(torch.randn(1, H, I))
    scales = w2.scales.clone()
    scales[:, row] = 255 if isinstance(fmt, Mxfp4) else torch.inf
    broken = one_expert(x, w1, PackedTensor(fmt, I, w2.codes, scales, w2.zeros), precision)
    assert not broken[:, row].isfinite().any()
    assert torch.equal(broken[:, others], one_expert(x, w1, w2, precision)[:, others])


@pytest.mark.parametrize("fmt", [Ternary2(), Ternary2(128), Ternary5(), Ternary5(64)], ids=str)
def test_ternary_rows_err_less_than_with_a_scale_every_256_columns(fmt, monkeypatch):
    """Weights of three values are held as they are, so that all error is of the rows; those of ggml's TQ1_0 and TQ2_0
    have a scale every 256 columns.
    """
    x, routing = torch.randn(16, 2048), Routing(torch.zeros(16, 1).int(), torch.ones(16, 1), 1)
    w1, w2 = fmt.pack(torch.randn(1, 2 * 768, 2048) / 2048**0.5), fmt.pack(torch.randn(1, 2048, 768) / 768**0.5)
    exact = fused_experts_quantized(x, routing, w1, w2, precision="full")

    def error(precision, fn=fused_experts_quantized):
        return ((fn(x, routing, w1, w2, precision=precision) - exact).norm() / exact.norm()).item()

    errors = {precision: error(precision) for precision in ("auto", *PRECISIONS)}
    monkeypatch.setitem(GROUPS, "int8_group160", 256)
    others = error("int8_group160", fused_experts_quantized_ref)
    assert errors["int8_group32"] < errors["int8_group160"] < others < errors["int8"] and errors["auto"] < others
