"""DeepSeek's fp8: weight float8_e4m3fn [rows, columns], weight_scale_inv a block of 128 x 128."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moert.quant.format import PackedTensor
from moert.quant.fp8 import Fp8
from moert.quant.readers.bits import rows_of_bytes
from moert.quant.readers.layout import FLOATS, Layout, Parts, Read, finite, part


@dataclass(frozen=True)
class Fp8Blocks(Layout):
    """The bits of moert.quant.Fp8 exactly."""

    names = ("weight", "weight_scale_inv")
    format = Fp8()
    obstacle = ""

    @classmethod
    def of_config(cls, config: dict) -> "Fp8Blocks":
        if (block := config.get("weight_block_size")) not in ([128, 128], (128, 128)):
            raise ValueError(f"weight_block_size must be [128, 128] in fp8 checkpoints, got {block}")
        if config.get("fmt", "e4m3") != "e4m3":
            raise ValueError(f"fmt must be e4m3 in fp8 checkpoints, got {config['fmt']}")
        return cls()

    def carry(self, parts: Parts) -> Read:
        weight = part(parts, "weight", (torch.float8_e4m3fn,), (None, None))
        blocks = tuple(-(-size // 128) for size in weight.shape)
        scales = finite(part(parts, "weight_scale_inv", FLOATS, blocks), "weight_scale_inv").float()
        return Read(PackedTensor(Fp8(), weight.shape[1], rows_of_bytes(weight.view(torch.uint8)), scales))

    def unpack(self, parts: Parts) -> Tensor:
        packed = self.carry(parts).packed
        return packed.format.unpack(packed)
