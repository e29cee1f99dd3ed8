"""Rows of int8 over codes of 4 bits, whose products are the same for one row and for many."""

import pytest
import torch

from moert import Routing
from moert.ops.fused_experts_quantized import fused_experts_quantized
from moert.quant import Int4, Int4Asymmetric, Mxfp4
from moert.quant.format import PackedTensor

FORMATS = [Int4(32), Int4(64), Int4(128), Int4Asymmetric(32), Int4Asymmetric(128), Mxfp4()]
PRECISIONS = ("int8", "int8_group32")


def one_expert(x, w1, w2, precision):
    routing = Routing(torch.zeros(len(x), 1).int(), torch.ones(len(x), 1), 1)
    return fused_experts_quantized(x, routing, w1, w2, activation="relu", precision=precision)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("H,I", [(200, 96), (1056, 544)])
def test_a_token_has_the_same_bits_in_any_company(fmt, precision, H, I):
    """Register blocks of 1 to 12 rows, several of them, all of a tile."""
    x = torch.randn(300, H)
    w1, w2 = fmt.pack(torch.randn(1, I, H) / H**0.5), fmt.pack(torch.randn(1, H, I) / I**0.5)
    whole = one_expert(x, w1, w2, precision)
    for n in (*range(1, 14), 24, 40, 257):
        assert torch.equal(one_expert(x[-n:], w1, w2, precision), whole[-n:])


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("I", [32, 200, 544, 1056])
@pytest.mark.parametrize("T", [1, 5, 11])
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
