"""Formats whose parts are not rows of codes and scales: fp8 in blocks, planes of bits, codewords."""

import pytest
import torch

from moert import Routing
from moert.ops.fused_experts import fused_experts_ref
from moert.ops.fused_experts_quantized import fused_experts_quantized
from moert.quant import BitNested, Fp8, SubOneBit, SubOneBitTensor
from moert.quant.format import PackedTensor
from moert.testing import Shape


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_lower_levels_are_read_where_they_lie(levels):
    fmt = BitNested(2, 3, 64)
    w1, w2 = torch.randn(4, 2 * 96, 200) / 14, torch.randn(4, 200, 96) / 10
    routing = Shape("few", 9, 4, 2, 200, 96).routing()
    x = torch.randn(9, 200)
    whole = fmt.pack(w1), fmt.pack(w2)
    lower = [fmt.lower(w, levels) for w in whole]
    copied = [PackedTensor(w.format, w.columns, w.codes.contiguous(), w.scales) for w in lower]
    assert levels == 3 or not lower[0].codes.is_contiguous()
    exact = fused_experts_ref(x, routing, w1, w2)
    for precision in ("full", "bfloat16", "int8", "int8_group32", "int8_group160"):
        y = fused_experts_quantized(x, routing, *lower, precision=precision)
        assert torch.equal(y, fused_experts_quantized(x, routing, *copied, precision=precision))
        assert (y - exact).norm() / exact.norm() < (0.7, 0.34, 0.17)[levels - 1]


def test_errors_of_other_layouts():
    x, routing = torch.randn(3, 40), Routing(torch.zeros(3, 2).int(), torch.ones(3, 2), 4)
    shapes = torch.randn(4, 10, 40), torch.randn(4, 40, 5)
    for fmt in (Fp8(), SubOneBit()):
        w1, w2 = map(fmt.pack, shapes)
        for precision in ("int8", "int8_group32", "int8_group160"):
            known = "auto, full, bfloat16" + (", fp8_group128" if fmt.name == "fp8" else "")
            message = f"precision must be one of {known} for {fmt.name}, got {precision}"
            with pytest.raises(RuntimeError, match=message):
                fused_experts_quantized(x, routing, w1, w2, precision=precision)
    fp8, down = map(Fp8().pack, shapes)
    for codes, scales, message in [
        (fp8.codes, fp8.scales.half(), "scales1 must have dtype Float for 40 columns of fp8, got Half"),
        (
            fp8.codes,
            fp8.scales[:, :0],
            r"scales1 must have .*blocks of rows=1, blocks of columns=1\] .*got \[4, 0, 1\]",
        ),
    ]:
        with pytest.raises(RuntimeError, match=message):
            fused_experts_quantized(x, routing, PackedTensor(Fp8(), 40, codes, scales), down)
    nested, down = map(BitNested().pack, shapes)
    bytes_of_zeros = torch.zeros_like(nested.scales, dtype=torch.uint8)
    for codes, scales, zeros, message in [
        (nested.codes, nested.scales, bytes_of_zeros, "zeros1 must be None for bit_nested, got a tensor"),
        (nested.codes[:, :0], nested.scales, None, "planes must be 1 to 8, got 0"),
        (nested.codes[:, None], nested.scales, None, r"codes1 must be \[E, planes, rows, bytes\], got shape"),
        (nested.codes, nested.scales[..., 0], None, r"scales1 must have shape \[E=4, rows=10, groups=2\]"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            fused_experts_quantized(x, routing, PackedTensor(BitNested(), 40, codes, scales, zeros), down)
    with pytest.raises(ValueError, match=r"codes must be \[..., planes, rows, bytes\] for BitNested.*, got \[16\]"):
        packed = PackedTensor(BitNested(), 40, nested.codes[0, 0, 0], nested.scales, nested.zeros)
        fused_experts_quantized(x, routing, packed, down)
    sub1, down = map(SubOneBit().pack, shapes)
    ends = sub1.row_ptr.clone()
    ends[2, -1] = -1
    for codes, row_ptr, minmax, message in [
        (sub1.codes[1:], sub1.row_ptr, sub1.minmax, "codes1 must hold the .* codewords of zeros1, got"),
        (sub1.codes, ends, sub1.minmax, "zeros1 must rise from 0, got -1 codewords in expert 2"),
        (sub1.codes, sub1.row_ptr[:, 1:], sub1.minmax, r"zeros1 must have shape \[E=4, rows \+ 1=11\]"),
        (sub1.codes.view(torch.int16), sub1.row_ptr, sub1.minmax, "codes1 must have dtype UInt16"),
    ]:
        packed = SubOneBitTensor(40, codes, row_ptr, sub1.matrix_base, minmax)
        with pytest.raises(RuntimeError, match=message):
            fused_experts_quantized(x, routing, packed, down)


def test_broken_row_tables_read_nothing_outside():
    """Of bytes that no file reader has checked: some numbers, and no crash (the sanitizers look closer)."""
    sub1 = SubOneBit().pack(torch.randn(2, 24, 70))
    down = SubOneBit().pack(torch.randn(2, 70, 12))
    routing = Routing(torch.tensor([[0, 1], [1, 0]]).int(), torch.ones(2, 2), 2)
    ends = sub1.row_ptr.clone()
    ends[:, 1:-1] = torch.randint(-(2**31), 2**31 - 1, ends[:, 1:-1].shape, dtype=torch.int64).int()
    codes = torch.full_like(sub1.codes.view(torch.int16), -1).view(torch.uint16)
    for packed in (
        SubOneBitTensor(70, sub1.codes, ends, sub1.matrix_base, sub1.minmax),
        SubOneBitTensor(70, codes, sub1.row_ptr, sub1.matrix_base, sub1.minmax),
    ):
        for T in (1, 2):
            r = Routing(routing.ids[:T], routing.weights[:T], 2)
            assert fused_experts_quantized(torch.randn(T, 70), r, packed, down).isfinite().all()
