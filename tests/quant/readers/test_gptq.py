"""GPTQ checkpoints: written by the published layout, read back bit for bit."""

import pytest
import torch
from foreign import gptq
from readers_contract import CONVERT, check_broken, check_converted, check_exact

from moert.quant import Int4, Int4Asymmetric
from moert.quant.readers import Gptq


def w(rows=16, columns=256):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))


@pytest.mark.parametrize("group,mine", [(32, 32), (64, 64), (128, 128), (256, 128), (96, 32), (-1, 128)])
@pytest.mark.parametrize("v1", [True, False])
def test_exact(group, mine, v1):
    columns = 288 if group == 96 else 256
    parts, expected = gptq(w(columns=columns), group, v1=v1)
    check_exact(Gptq(group, zero_offset=int(v1)), parts, expected, Int4(mine))
    parts, expected = gptq(w(columns=columns).abs() - 0.6, group, symmetric=False, v1=v1)
    check_exact(Gptq(group, False, zero_offset=int(v1)), parts, expected, Int4Asymmetric(mine))


def test_rows_that_end_within_a_block():
    parts, expected = gptq(w(8, 40), 32)
    check_exact(Gptq(32), parts, expected, Int4(32))
    del parts["g_idx"]
    check_exact(Gptq(32), parts, expected, Int4(32))
    check_exact(Gptq(-1), *gptq(w(8, 8), -1), Int4(128))


def test_groups_in_another_order_are_converted():
    for symmetric in (True, False):
        parts, expected = gptq(w(), 64, symmetric, act_order=True)
        why = "columns of a group are not neighbours (desc_act)"
        check_converted(Gptq(64, symmetric, act_order=True), parts, expected, why)
    parts, expected = gptq(w(), 16)
    check_converted(Gptq(16), parts, expected, "groups of 16")


def test_scales_that_are_no_float16_are_rounded_and_said():
    parts, _ = gptq(w(), 32)
    parts["scales"] = parts["scales"].float() * 1.0001
    read = Gptq(32).read(parts, CONVERT)
    assert read.changed == "scales rounded to float16"
    exact = Gptq(32).unpack(parts)
    assert (read.packed.format.unpack(read.packed) - exact).abs().max() <= 2**-11 * exact.abs().max()


def test_of_config():
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    assert Gptq.of_config(config) == Gptq(128)
    assert Gptq.of_config(config | {"checkpoint_format": "gptq_v2", "sym": False}) == Gptq(128, False, zero_offset=0)
    assert Gptq.of_config(config | {"desc_act": True}) == Gptq(128, act_order=True)
    assert Gptq.of_config(config | {"desc_act": True, "group_size": -1}) == Gptq(-1)


def test_broken():
    check_broken(Gptq(32), gptq(w(8, 64), 32)[0])
    check_broken(Gptq(32, False), gptq(w(8, 64), 32, False)[0])
    check_broken(Gptq(32, act_order=True), gptq(w(8, 64), 32, act_order=True)[0])


def test_errors():
    config = {"bits": 4, "group_size": 128}
    for change, message in [
        ({"bits": 3}, "bits must be 4 in GPTQ checkpoints, got 3"),
        ({"group_size": 0}, "group_size must be -1 or positive, got 0"),
        ({"group_size": "x"}, "group_size must be -1 or positive, got x"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format must be gptq or gptq_v2, got marlin"),
        ({"dynamic": {"x": {}}}, "dynamic must be empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            Gptq.of_config(config | change)
    parts, _ = gptq(w(8, 64), 32)
    for change, layout, message in [
        ({"scales": parts["scales"] * float("nan")}, Gptq(32), "scales must be finite, got inf or nan"),
        ({"scales": torch.full((2, 8), 1e6)}, Gptq(32), "scales must be at most 65504, got 1000000.0"),
        ({"scales": parts["scales"][:1]}, Gptq(32), r"scales must have shape \[2, 8\], got \[1, 8\]"),
        ({}, Gptq(64), r"scales must have shape \[1, 8\], got \[2, 8\]"),
        ({"qzeros": parts["qzeros"] + 1}, Gptq(32), "qzeros must stand for 8 everywhere with sym=true, got 9"),
        ({"qzeros": parts["qzeros"] * 0 - 1}, Gptq(32), "qzeros must be at most 14 in checkpoint_format gptq, got 15"),
        ({"g_idx": parts["g_idx"].flip(0)}, Gptq(32), "g_idx must be column // group_size with desc_act=false"),
        ({"g_idx": parts["g_idx"] + 1}, Gptq(32, act_order=True), r"g_idx must be in \[0, 2\), got 1 to 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            layout.read(parts | change, CONVERT)
    with pytest.raises(ValueError, match="qweight must have a multiple of 8 rows of the weight, got 4"):
        Gptq(32).read(parts | {"qweight": parts["qweight"][:, :4]}, CONVERT)
    with pytest.raises(TypeError, match=r"qweight must be torch.int32, got torch.int64"):
        Gptq(32).read(parts | {"qweight": parts["qweight"].long()}, CONVERT)
    del parts["g_idx"]
    with pytest.raises(ValueError, match="parts must hold g_idx with desc_act=true, got qweight, qzeros, scales"):
        Gptq(32, act_order=True).read(parts, CONVERT)
    del parts["qzeros"]
    with pytest.raises(ValueError, match="parts must hold qzeros, got qweight, scales"):
        Gptq(32).read(parts, CONVERT)
