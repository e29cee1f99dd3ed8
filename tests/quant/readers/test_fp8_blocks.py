"""fp8 checkpoints in blocks of 128 x 128, with torch's own float8."""

import pytest
import torch
from foreign import fp8
from readers_contract import CONVERT, check_broken, check_exact
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from moert.quant import Fp8
from moert.quant.readers import Fp8Blocks, layout_of


@pytest.mark.parametrize("rows,columns", [(128, 256), (130, 200), (1, 17)])
def test_exact(rows, columns):
    parts, expected = fp8(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)))
    check_exact(Fp8Blocks(), parts, expected, Fp8())


@pytest.mark.parametrize("rows,columns", [(128, 256), (384, 128), (40, 72)])
def test_exact_by_the_library(rows, columns):
    """transformers' own dequantization; it takes whole blocks, or one for a whole matrix."""
    parts, _ = fp8(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)))
    expected = Fp8Dequantize(None)._dequantize_one(parts["weight"], parts["weight_scale_inv"])
    assert expected.dtype == torch.float32
    check_exact(Fp8Blocks(), parts, expected, Fp8())


def test_of_config():
    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    assert Fp8Blocks.of_config(config) == Fp8Blocks()


def test_broken():
    check_broken(Fp8Blocks(), fp8(torch.randn(8, 64))[0])


def test_errors():
    for config, message in [
        ({}, r"weight_block_size must be \[128, 128\] in fp8 checkpoints, got None"),
        ({"weight_block_size": [64, 128]}, r"weight_block_size must be .* got \[64, 128\]"),
        ({"weight_block_size": [128, 128], "fmt": "e5m2"}, "fmt must be e4m3 in fp8 checkpoints, got e5m2"),
    ]:
        with pytest.raises(ValueError, match=message):
            Fp8Blocks.of_config(config)
    parts, _ = fp8(torch.randn(8, 64))
    with pytest.raises(ValueError, match="weight_scale_inv must be finite, got inf or nan"):
        Fp8Blocks().read(parts | {"weight_scale_inv": torch.tensor([[torch.nan]])}, CONVERT)
    with pytest.raises(ValueError, match=r"weight_scale_inv must have shape \[1, 1\], got \[1, 2\]"):
        Fp8Blocks().read(parts | {"weight_scale_inv": torch.ones(1, 2)}, CONVERT)
    with pytest.raises(ValueError, match="codes must be those of Fp8.*, got byte 127"):
        Fp8Blocks().read(parts | {"weight": torch.full((8, 64), torch.nan).to(torch.float8_e4m3fn)}, CONVERT)
    with pytest.raises(TypeError, match="weight must be torch.float8_e4m3fn, got torch.float8_e5m2"):
        Fp8Blocks().read(parts | {"weight": parts["weight"].to(torch.float8_e5m2)}, CONVERT)


def test_a_block_size_that_is_no_list():
    with pytest.raises(ValueError, match=r"weight_block_size must be \[128, 128\] in fp8 checkpoints, got 5"):
        Fp8Blocks.of_config({"weight_block_size": 5})
    with pytest.raises(ValueError, match=r"quant_method must be one of gptq, .*, got \['gptq'\]"):
        layout_of({"quant_method": ["gptq"]})
