"""Packed experts for bench/gpu_cases.py, and the bfloat16 weights that they stand for."""

import functools
import math

import torch
from torch import Tensor

from moert.quant import Int4, Int8, Mxfp4, SubOneBit
from moert.quant.format import Format, PackedTensor
from moert.quant.sub1 import SubOneBitTensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def packed(
    fmt: Format | SubOneBit, like: Tensor, generator: torch.Generator
) -> tuple[PackedTensor | SubOneBitTensor, Tensor]:
    """Of the shape and on the device of `like` [E, rows, columns]."""
    if isinstance(fmt, Int4 | Int8 | Mxfp4):
        return _random_codes(fmt, like, generator)
    E, device = len(like), like.device
    one, weights = _one_expert(fmt, *like.shape[1:])
    weights = weights.to(device).repeat(E, 1, 1)
    if isinstance(one, SubOneBitTensor):
        base = torch.arange(E + 1) * len(one.codes)
        parts = one.codes.to(device).repeat(E), one.row_ptr.to(device).repeat(E, 1), base
        return SubOneBitTensor(one.columns, *parts, one.minmax.to(device).repeat(E, 1, 1)), weights
    parts = (part if part is None else part.to(device) for part in (one.codes, one.scales, one.zeros))
    repeated = (part if part is None else part.repeat(E, *[1] * (part.dim() - 1)) for part in parts)
    return PackedTensor(one.format, one.columns, *repeated), weights


@functools.lru_cache(maxsize=10)
def _one_expert(fmt, rows: int, columns: int) -> tuple[PackedTensor | SubOneBitTensor, Tensor]:
    """One matrix, packed on the CPU, of which every expert has a copy; kept for the sizes of one layer."""
    one = fmt.pack(torch.randn(1, rows, columns, generator=torch.Generator().manual_seed(0)) * columns**-0.5)
    return one, fmt.unpack(one).bfloat16()


def _random_codes(fmt: Int4 | Int8 | Mxfp4, like: Tensor, generator: torch.Generator) -> tuple[PackedTensor, Tensor]:
    """Every expert's own, with one scale."""
    E, rows, columns = like.shape
    empty, bits = fmt.empty((E, rows, columns)), 128 // fmt.weights_per_block
    codes = torch.zeros(empty.codes.shape, dtype=torch.uint8, device=like.device)
    codes[..., : columns * bits // 8].random_(generator=generator)
    if bits == 8:
        values = codes.view(torch.int8)[..., :columns].bfloat16()
    else:
        numbers = torch.arange(16) - 8.0 if isinstance(fmt, Int4) else torch.tensor(E2M1)
        nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)[..., :columns]
        values = numbers.to(codes.device, torch.bfloat16)[nibbles.int()]
    scale = columns**-0.5 / values[0].float().std().item()
    if isinstance(fmt, Mxfp4):
        exponent = round(math.log2(scale))
        scales, scale = torch.full(empty.scales.shape, 127 + exponent, dtype=torch.uint8), 2.0**exponent
    else:
        scales = torch.full(empty.scales.shape, scale, dtype=torch.float16)
        scale = scales[0, 0, 0].item()
    return PackedTensor(empty.format, columns, codes, scales.to(codes.device)), values * scale
