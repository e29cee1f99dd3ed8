"""gpt-oss' mxfp4: `_blocks` uint8 [experts, rows, columns / 32, 16] and `_scales` uint8, the same without the 16."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moert.quant.format import PackedTensor
from moert.quant.mxfp4 import Mxfp4
from moert.quant.readers.layout import Layout, Parts, Read, part


@dataclass(frozen=True)
class Mxfp4Blocks(Layout):
    """The bits of moert.quant.Mxfp4 as they lie; all experts of a layer are one tensor."""

    names = ("blocks", "scales")
    of_experts = True
    format = Mxfp4()
    obstacle = ""

    @classmethod
    def of_config(cls, config: dict) -> "Mxfp4Blocks":
        return cls()

    def carry(self, parts: Parts) -> Read:
        blocks = part(parts, "blocks", (torch.uint8,), (None, None, None, 16))
        scales = part(parts, "scales", (torch.uint8,), tuple(blocks.shape[:-1]))
        return Read(
            PackedTensor(self.format, 32 * scales.shape[-1], blocks.flatten(-2).contiguous(), scales.contiguous())
        )

    def unpack(self, parts: Parts) -> Tensor:
        packed = self.carry(parts).packed
        return packed.format.unpack(packed)
