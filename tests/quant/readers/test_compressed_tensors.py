"""compressed-tensors checkpoints: packed and given back by that library, compared bit for bit."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from readers_contract import CONVERT, check_broken, check_converted, check_exact

from moert.quant import Int4, Int4Asymmetric, Int8
from moert.quant.readers import CompressedInt


def made(format, dtype=torch.float32, rows=16, columns=256, **args):
    """The parts that the library writes of a random weight, and its own dequantisation, with scales of float16."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(type="int", **args), format=format)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)) + 0.2
    group = args.get("group_size") or columns
    parts = weight.unflatten(1, (-1, group)) if args["strategy"] != "tensor" else weight.reshape(1, 1, -1)
    scales, zeros = calculate_qparams(parts.amin(-1), parts.amax(-1), scheme.weights)
    if args["strategy"] == "tensor":
        scales, zeros = scales.reshape(1), zeros.reshape(1)
    state = {"weight": weight, "weight_scale": scales.half().to(dtype), "weight_zero_point": zeros.to(torch.int8)}
    compressor = BaseCompressor.get_value_from_registry(format)
    state = compressor.compress(state, scheme)
    exact = {name: part.float() if name == "weight_scale" else part for name, part in state.items()}
    config = {"format": format, "config_groups": {"group_0": scheme.model_dump()}}
    return CompressedInt.of_config(config), state, compressor.decompress(exact, scheme)["weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "format,bits,strategy,group,symmetric,fmt",
    [
        ("pack-quantized", 4, "group", 32, True, Int4(32)),
        ("pack-quantized", 4, "group", 128, True, Int4(128)),
        ("pack-quantized", 4, "channel", None, True, Int4(128)),
        ("pack-quantized", 4, "group", 64, False, Int4Asymmetric(64)),
        ("pack-quantized", 4, "channel", None, False, Int4Asymmetric(128)),
        ("pack-quantized", 8, "group", 64, True, Int8(64)),
        ("pack-quantized", 8, "channel", None, True, Int8()),
        ("int-quantized", 8, "channel", None, True, Int8()),
        ("int-quantized", 8, "group", 128, True, Int8(128)),
        ("int-quantized", 8, "tensor", None, True, Int8()),
        ("int-quantized", 4, "channel", None, True, Int8()),
    ],
)
def test_exact(format, bits, strategy, group, symmetric, fmt, dtype):
    args = {"num_bits": bits, "strategy": strategy, "group_size": group, "symmetric": symmetric}
    layout, parts, expected = made(format, dtype, **args)
    check_exact(layout, parts, expected, fmt)


def test_sizes_that_fill_no_word():
    args = {"num_bits": 4, "strategy": "channel", "symmetric": False}
    layout, parts, expected = made("pack-quantized", rows=11, columns=35, **args)
    check_exact(layout, parts, expected, Int4Asymmetric(128))


def test_eight_bits_with_a_zero_point_are_converted():
    for format in ("int-quantized", "pack-quantized"):
        layout, parts, expected = made(format, num_bits=8, strategy="channel", symmetric=False)
        check_converted(layout, parts, expected, "8 bits with a zero point")


def test_groups_in_another_order_are_converted():
    layout, parts, plain = made("pack-quantized", num_bits=4, strategy="group", group_size=64, symmetric=True)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    ordered = CompressedInt(4, True, "group", 64, act_order=True)
    parts["weight_g_idx"] = (torch.arange(256) // 64)[order].int()
    scale = parts["weight_scale"][:, parts["weight_g_idx"].long()]
    expected = plain / parts["weight_scale"].repeat_interleave(64, 1) * scale
    check_converted(ordered, parts, expected, "columns of a group are not neighbours (actorder)")


def test_scales_in_bfloat16_are_exact_in_float16():
    layout, parts, _ = made("pack-quantized", num_bits=4, strategy="group", group_size=64, symmetric=True)
    parts["weight_scale"] = parts["weight_scale"].bfloat16()
    check_exact(layout, parts, layout.unpack(parts), Int4(64))


def test_broken():
    args = {"strategy": "group", "group_size": 32, "rows": 16, "columns": 64}
    for format, bits, symmetric in [("pack-quantized", 4, False), ("int-quantized", 8, True)]:
        layout, parts, _ = made(format, num_bits=bits, symmetric=symmetric, **args)
        check_broken(layout, parts)


def test_errors():
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}

    def config(format="pack-quantized", **change):
        return {"format": format, "config_groups": {"group_0": {"weights": weights | change}}}

    assert CompressedInt.of_config(config()) == CompressedInt(4, True, "group", 32)
    assert CompressedInt.of_config(config(actorder="weight")) == CompressedInt(4, True, "group", 32)
    assert CompressedInt.of_config(config(actorder="group")).act_order
    for bad, message in [
        (
            config("float-quantized"),
            "format must be one of pack-quantized, int-quantized in compressed-tensors, got float",
        ),
        (config(num_bits=3), "weights must be int of 4 or 8 bits, got int of 3"),
        (config(type="float"), "weights must be int of 4 or 8 bits, got float of 4"),
        (config(strategy="block"), "strategy must be one of tensor, channel, group, got block"),
        (config(group_size=None), "group_size must be positive, got None"),
        ({"config_groups": {}}, "config_groups must be a dict of schemes, got {}"),
    ]:
        with pytest.raises(ValueError, match=message):
            CompressedInt.of_config(bad)
    both = {"a": {"weights": weights}, "b": {"weights": weights | {"num_bits": 8}}}
    with pytest.raises(ValueError, match="config_groups must agree on one scheme of weights, got 2"):
        CompressedInt.of_config({"format": "pack-quantized", "config_groups": both})
    layout, parts, _ = made("pack-quantized", rows=8, columns=64, num_bits=4, strategy="group", group_size=32)
    with pytest.raises(ValueError, match=r"weight_shape must fit weight_packed, 4 bits a weight, got \[8, 99\]"):
        layout.read(parts | {"weight_shape": torch.tensor([8, 99])}, CONVERT)
    with pytest.raises(ValueError, match="weight_scale must be finite, got inf or nan"):
        layout.read(parts | {"weight_scale": parts["weight_scale"] * torch.inf}, CONVERT)
    ordered = CompressedInt(4, True, "group", 32, act_order=True)
    with pytest.raises(ValueError, match="parts must hold weight_g_idx, got weight_scale, weight_packed, weight_shape"):
        ordered.read(parts, CONVERT)
    with pytest.raises(ValueError, match=r"weight_g_idx must be in \[0, 2\), got 0 to 63"):
        ordered.read(parts | {"weight_g_idx": torch.arange(64)}, CONVERT)
    with pytest.raises(ValueError, match=r"weight must be in \[-8, 7\] with num_bits 4, got -9 to -9"):
        CompressedInt(4, False, "channel").read(
            {"weight": torch.full((2, 2), -9).char(), "weight_scale": torch.ones(2, 1)}, CONVERT
        )


def test_parts_that_the_scheme_has_no_use_for():
    layout, parts, expected = made("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=True)
    order = torch.arange(256, dtype=torch.int32) // 32
    for plain in ({"weight_g_idx": order}, {"weight_g_idx": order * 0 - 1}, {"weight_zero_point": parts_of_zeros()}):
        assert torch.equal(layout.unpack(parts | plain), expected)
    with pytest.raises(ValueError, match="weight_g_idx must be in order without actorder, got another order"):
        layout.read(parts | {"weight_g_idx": order.flip(0)}, CONVERT)
    with pytest.raises(ValueError, match="weight_zero_point must be zero in a symmetric scheme, got others"):
        layout.read(parts | {"weight_zero_point": parts_of_zeros() + 1}, CONVERT)


def parts_of_zeros():
    """Packed along 16 rows, 8 groups: code 0 of 4 bits is stored as 8."""
    return torch.full((2, 8), -0x77777778, dtype=torch.int32)


@pytest.mark.parametrize(("order", "act"), [("Group", True), ("dynamic", True), ("static", False), (None, False)])
def test_spellings_of_actorder(order, act):
    weights = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32, "actorder": order}
    config = {"format": "pack-quantized", "config_groups": {"a": {"weights": weights}}}
    assert CompressedInt.of_config(config).act_order == act


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ([1], "config_groups must hold schemes with a dict of weights"),
        ({"weights": [1]}, "config_groups must hold schemes with a dict of weights"),
        ({"weights": {"num_bits": 4, "group_size": 32, "actorder": "x"}}, "actorder must be one of None, .*, got x"),
    ],
)
def test_configurations_of_other_kinds(group, message):
    with pytest.raises(ValueError, match=message):
        CompressedInt.of_config({"format": "pack-quantized", "config_groups": {"a": group}})
