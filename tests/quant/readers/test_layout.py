"""What the layouts share: sizes of groups, scales, one matrix below the other."""

import pytest
import torch

from moert.quant import Int4, Int4Asymmetric, Int8
from moert.quant.readers import Awq, CompressedInt, Fp8Blocks, Ggml, Gptq, Mxfp4Blocks, layout_of
from moert.quant.readers.layout import cat_rows, float16, our_group, part, spread, stack


def test_our_group():
    assert [our_group(g) for g in (-1, 32, 64, 96, 128, 192, 256, 2048)] == [128, 32, 64, 32, 128, 64, 128, 128]
    assert [our_group(g) for g in (0, -2, 16, 100)] == [None] * 4


def test_spread_gives_every_column_the_scale_it_had():
    values = torch.arange(6.0).view(2, 3)
    assert spread(values, 700, 256, 128).tolist() == [[0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5]]
    assert spread(values[:, :1], 200, -1, 128).tolist() == [[0, 0], [3, 3]]


def test_float16_says_what_it_changed():
    exact = torch.tensor([1.5, -0.25, 0.0, 2**-24])
    assert torch.equal(float16(exact, "s")[0].float(), exact) and float16(exact, "s")[1] == ""
    rounded, changed = float16(torch.tensor([0.1, 1e-9]), "s")
    assert changed == "scales rounded to float16" and rounded[1] == 0
    assert abs(float(rounded[0]) / 0.1 - 1) < 2**-11


@pytest.mark.parametrize("fmt", [Int8(), Int4(32), Int4Asymmetric(64)], ids=str)
def test_cat_rows_and_stack(fmt):
    w = torch.randn(4, 6, 200)
    packed = [fmt.pack(each) for each in w]
    assert torch.equal(fmt.unpack(stack(packed)), fmt.unpack(fmt.pack(w)))
    assert torch.equal(fmt.unpack(cat_rows(packed)), fmt.unpack(fmt.pack(w)).flatten(0, 1))


def test_layout_of():
    weights = {"num_bits": 8, "strategy": "channel"}
    for config, layout in [
        ({"quant_method": "gptq", "bits": 4, "group_size": 64}, Gptq(64)),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, Awq(64)),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, Fp8Blocks()),
        ({"quant_method": "mxfp4"}, Mxfp4Blocks()),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "int-quantized",
                "config_groups": {"g": {"weights": weights}},
            },
            CompressedInt(8, False, "channel"),
        ),
    ]:
        assert layout_of(config) == layout


def test_errors():
    with pytest.raises(
        ValueError, match="quant_method must be one of gptq, awq, compressed-tensors, fp8, mxfp4, gguf, got aqlm"
    ):
        layout_of({"quant_method": "aqlm"})
    with pytest.raises(TypeError, match="quantization_config must be a dict, got str"):
        layout_of("gptq")
    with pytest.raises(ValueError, match=r"x must have shape \[2, \*\], got \[3\]"):
        part({"x": torch.zeros(3)}, "x", (torch.float32,), (2, None))
    with pytest.raises(ValueError, match="matrices must all be .* got others"):
        cat_rows([Int8().pack(torch.ones(2, 32)), Int8(32).pack(torch.ones(2, 32))])
    with pytest.raises(ValueError, match="matrices must all be .* got others"):
        stack([Int8().pack(torch.ones(2, 32)), Int8().pack(torch.ones(3, 32))])


def test_sizes_of_zero():
    """The other size costs a file nothing: 2^40 columns or rows would be allocated, or gone through."""
    huge = 2**40
    for layout, parts in [
        (Gptq(32), {"qweight": torch.empty(0, huge, dtype=torch.int32)}),
        (Awq(32), {"qweight": torch.empty(huge, 0, dtype=torch.int32)}),
        (Fp8Blocks(), {"weight": torch.empty(huge, 0, dtype=torch.float8_e4m3fn)}),
        (CompressedInt(8, False, "channel"), {"weight": torch.empty(huge, 0, dtype=torch.int8)}),
        (Mxfp4Blocks(), {"blocks": torch.empty(2, huge, 0, 16, dtype=torch.uint8)}),
        (Ggml("Q5_0"), {"blocks": torch.empty(huge, 0, dtype=torch.uint8)}),
        (Ggml("Q8_0"), {"blocks": torch.empty(huge, 0, dtype=torch.uint8)}),
    ]:
        with pytest.raises(ValueError, match=r"(qweight|weight|blocks) must have sizes of at least 1, got \[.*1099511"):
            layout.read(parts, Int8(128))
