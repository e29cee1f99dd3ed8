"""gpt-oss' blocks and scales, against what transformers makes of them."""

import pytest
import torch
from foreign import mxfp4
from readers_contract import CONVERT, check_broken, check_exact
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

from moert.quant import Mxfp4
from moert.quant.readers import Mxfp4Blocks


def test_exact():
    w = torch.randn(3, 8, 96, generator=torch.Generator().manual_seed(0))
    parts, expected = mxfp4(w)
    check_exact(Mxfp4Blocks(), parts, expected, Mxfp4())
    theirs = _convert_moe_packed_tensors(parts["blocks"], parts["scales"], dtype=torch.float32)
    assert torch.equal(expected, theirs.mT)  # they turn it around as they unpack


def test_every_byte_and_scale():
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 253, 16, 16)
    scales = torch.arange(253, dtype=torch.uint8).view(1, 253, 1).expand(1, 253, 16)
    parts = {"blocks": blocks, "scales": scales}
    theirs = _convert_moe_packed_tensors(**parts, dtype=torch.float32).mT
    check_exact(Mxfp4Blocks(), parts, theirs.contiguous(), Mxfp4())


def test_broken():
    check_broken(Mxfp4Blocks(), mxfp4(torch.randn(2, 4, 64))[0])


def test_errors():
    assert Mxfp4Blocks.of_config({"quant_method": "mxfp4"}) == Mxfp4Blocks()
    parts, _ = mxfp4(torch.randn(2, 4, 64))
    with pytest.raises(ValueError, match=r"scales must have shape \[2, 4, 2\], got \[2, 4, 1\]"):
        Mxfp4Blocks().read(parts | {"scales": parts["scales"][..., :1]}, CONVERT)
    with pytest.raises(TypeError, match="blocks must be torch.uint8, got torch.int8"):
        Mxfp4Blocks().read(parts | {"blocks": parts["blocks"].char()}, CONVERT)
    with pytest.raises(ValueError, match="scales must be finite"):
        Mxfp4Blocks().read(parts | {"scales": torch.full_like(parts["scales"], 255)}, CONVERT)
