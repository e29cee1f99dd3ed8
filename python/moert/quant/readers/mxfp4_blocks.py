"""gpt-oss' mxfp4: `_blocks` uint8 [..., rows, columns / 32, 16] and `_scales` uint8 [..., rows, columns / 32]."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moert.quant.format import PackedTensor
from moert.quant.mxfp4 import Mxfp4
from moert.quant.readers.layout import Layout, Parts, Read


@dataclass(frozen=True)
class Mxfp4Blocks(Layout):
    """The bits of moert.quant.Mxfp4 as they lie; all experts of a layer are one tensor."""

    names = ("blocks", "scales")
    format = Mxfp4()
    obstacle = ""

    @classmethod
    def of_config(cls, config: dict) -> "Mxfp4Blocks":
        return cls()

    def carry(self, parts: Parts) -> Read:
        blocks, scales = parts["blocks"], parts["scales"]
        if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
            raise TypeError(f"blocks and scales must be uint8, got {blocks.dtype} and {scales.dtype}")
        if blocks.dim() < 3 or blocks.shape[-1] != 16 or blocks.shape[:-1] != scales.shape:
            got = f"{list(blocks.shape)} and {list(scales.shape)}"
            raise ValueError(f"blocks and scales must be [..., rows, groups, 16] and [..., rows, groups], got {got}")
        return Read(
            PackedTensor(self.format, 32 * scales.shape[-1], blocks.flatten(-2).contiguous(), scales.contiguous())
        )

    def unpack(self, parts: Parts) -> Tensor:
        packed = self.carry(parts).packed
        return packed.format.unpack(packed)
