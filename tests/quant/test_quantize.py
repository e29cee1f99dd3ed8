import pytest
import torch
from torch import nn

from moert import GluExperts, MoELayer, QuantizedExperts, TopKRouter, quantize_
from moert.experts import HeteroExperts
from moert.quant import BitNested, Fp8, Int4, Int8, Mxfp4
from moert.quant.quantize import any_format_of, format_of


def model():
    layers = [MoELayer(TopKRouter(64, num_experts=4, k=2), GluExperts(4, 64, 32)) for _ in range(3)]
    hetero = HeteroExperts(GluExperts(4, 64, 32), ["ffn"] * 4 + ["zero"], 64)
    layers.append(MoELayer(TopKRouter(64, num_experts=5, k=2), hetero))
    return nn.Sequential(*layers)


def test_every_layer():
    net, x = model(), torch.randn(9, 64)
    with torch.no_grad():
        before = [layer(x) for layer in net]  # each alone: behind another one a token might choose other experts
        names = quantize_(net, "int8", group=32)
        assert names == ["0.experts", "1.experts", "2.experts", "3.experts.ffn"]
        assert all(isinstance(net.get_submodule(n), QuantizedExperts) for n in names)
        for layer, y in zip(net, before, strict=True):
            assert 0 < (layer(x) - y).norm() / y.norm() < 0.05
    assert not any(isinstance(m, GluExperts) for m in net.modules())


def test_skip_and_formats():
    net = model()
    kept = net[1].experts
    assert quantize_(net, Mxfp4(), skip=("1", "3.*"), precision="full") == ["0.experts", "2.experts"]
    assert net[1].experts is kept and isinstance(net[3].experts.ffn, GluExperts)
    assert net[0].experts.formats == (Mxfp4(), Mxfp4()) and net[0].experts.precision == "full"
    assert quantize_(net, "int4", group=64) == ["1.experts", "3.experts.ffn"]
    assert net[1].experts.formats == (Int4(64), Int4(64))


def test_format_of():
    assert format_of("int4") == Int4(32) and format_of("int8") == Int8(None) and format_of(Int8(64)) == Int8(64)
    with pytest.raises(ValueError, match="format must be one of int8, .*, ternary5, fp8, bit_nested, got int3"):
        format_of("int3")
    with pytest.raises(ValueError, match="format must be one of int8, .*, bit_nested, sub1, got int3"):
        any_format_of("int3")
    with pytest.raises(ValueError, match="group must be one of 32, 64, 128 for int4, got 16"):
        format_of("int4", 16)
    assert format_of("fp8") == Fp8() and format_of("bit_nested", 64) == BitNested(2, 3, 64)
    assert format_of("bit_nested_5_4") == BitNested(5, 4)
    with pytest.raises(ValueError, match="group must be None with a format that has its own, .*, got 32"):
        format_of(Int4(), 32)


def test_nothing_to_quantize():
    with pytest.raises(
        ValueError, match="model must hold experts of moert or transformers that skip does not name, got none in Linear"
    ):
        quantize_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got none in Sequential"):
        quantize_(model(), skip=["*"])
    with pytest.raises(ValueError, match="skip must name modules of Sequential, got 9.experts, which names none"):
        quantize_(model(), skip=["0", "9.experts"])
    with pytest.raises(ValueError, match="got experts without a module around them"):
        quantize_(GluExperts(2, 32, 32))


def test_prepacked_weights_are_refused():
    from moert import prepack_

    net = nn.Sequential(MoELayer(TopKRouter(64, num_experts=4, k=2), GluExperts(4, 64, 64)))
    assert prepack_(net) == ["0.experts"]
    for options in ({}, {"calibration": [torch.randn(4, 64)]}):
        with pytest.raises(
            ValueError, match=r"0.experts must have weights of 3 dimensions \(unprepack_ first\), got 5"
        ):
            quantize_(net, "int8", **options)


def test_precisions_that_a_format_does_not_take():
    for fmt, precision, taken in [
        ("sub1", "int8", "auto, full, bfloat16 for sub1"),
        ("fp8", "int8_group32", "auto, full, bfloat16, fp8_group128 for fp8"),
        ("int4", "fp8_group128", "auto, full, .*, int8_weights, int8_group160 for int4"),
        ("ternary5", "int8_weights", "auto, .* for ternary5"),
    ]:
        net = model()
        with pytest.raises(ValueError, match=f"precision must be one of {taken}, got {precision}"):
            quantize_(net, fmt, precision=precision)
        assert isinstance(net[0].experts, GluExperts)


@pytest.mark.parametrize("fmt", ["int8", "fp8", "bit_nested", "sub1"])
def test_precision_is_that_of_the_packed_experts(fmt):
    net = model()
    quantize_(net, fmt, precision="full")
    assert [net[0].experts.precision, net[3].experts.ffn.precision] == ["full", "full"]
