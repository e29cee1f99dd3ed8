"""Bit-nested weights: one packed tensor is a valid tensor at every smaller number of bits."""

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from moert import _C
from moert.quant import reference
from moert.quant.format import Format, PackedTensor, flat, float_weights


@dataclass(frozen=True)
class BitNested(Format):
    """`base` bits at level 1 and one more a level: BitNested(2, 3) is 2, 3 and 4 bits, BitNested(5, 4) is 5 to 8.

    Level 1 is asymmetric, w = scale * (q - zero); each further level adds + or - its own scale, the mean of what the
    levels below leave (D2MoE, arXiv 2504.15299, "matryoshka weight quantisation"; per-group, without error feedback).
    codes are bit planes [..., planes, rows, row_bytes], scales float16 [..., levels, rows, groups], zeros uint8
    [..., rows, groups]; a lower level reads the first planes and scales only.
    """

    base: int = 2
    levels: int = 3
    group: int = 128

    name = "bit_nested"

    def __post_init__(self):
        if self.group not in (32, 64, 128):
            raise ValueError(f"group must be one of 32, 64, 128 for bit_nested, got {self.group}")
        if not 1 <= self.base <= 8:
            raise ValueError(f"base must be 1 to 8, got {self.base}")
        if not 1 <= self.levels <= 9 - self.base:
            raise ValueError(f"levels must be 1 to {9 - self.base} over a base of {self.base}, got {self.levels}")

    @property
    def planes(self) -> int:
        """The bits of the highest level."""
        return self.base + self.levels - 1

    @property
    def block(self) -> tuple[int, int]:
        return 1, self.group

    def shape_of(self, packed: PackedTensor) -> torch.Size:
        if packed.codes.dim() < 3:
            raise ValueError(f"codes must be [..., planes, rows, bytes] for {self}, got {list(packed.codes.shape)}")
        *lead, _planes, rows, _bytes = packed.codes.shape
        return torch.Size([*lead, rows, packed.columns])

    def nbytes(self, shape: tuple[int, ...]) -> int:
        *rows, columns = shape
        groups = -(-columns // self.group)
        return prod(rows) * (self.planes * 16 * -(-columns // 128) + groups * (2 * self.levels + 1))

    @property
    def spelling(self) -> str:
        return self.name if (self.base, self.levels) == (2, 3) else f"{self.name}_{self.base}_{self.levels}"

    def empty(self, shape: tuple[int, ...]) -> PackedTensor:
        *matrices, rows, columns = shape
        codes = torch.zeros(*matrices, self.planes, rows, 16 * -(-columns // 128), dtype=torch.uint8)
        scales = torch.zeros(*matrices, self.levels, rows, -(-columns // self.group), dtype=torch.float16)
        zeros = torch.zeros(*matrices, rows, -(-columns // self.group), dtype=torch.uint8)
        return PackedTensor(self, columns, codes, scales, zeros)

    def check_values(self, packed: PackedTensor) -> None:
        if not packed.scales.isfinite().all():
            raise ValueError(f"scales must be finite for {self}, got inf or nan")
        if (packed.zeros >= 2**self.base).any():
            raise ValueError(f"zeros must be below {2**self.base} for {self}, got {int(packed.zeros.max())}")

    def pack(self, w: Tensor) -> PackedTensor:
        w = float_weights(w)
        sizes = (self.group, self.base, self.levels, torch.get_num_threads())
        parts = _C.bit_nested_quantize(flat(w, 2).numpy(), *sizes)
        shaped = (torch.from_numpy(part).view(*w.shape[:-2], *part.shape[1:]) for part in parts)
        return PackedTensor(self, w.shape[-1], *shaped)

    def unpack(self, packed: PackedTensor) -> Tensor:
        self.check(packed)
        parts = [flat(x, n).numpy() for x, n in ((packed.codes, 3), (packed.scales, 3), (packed.zeros, 2))]
        sizes = (packed.columns, self.group, self.base, self.levels, torch.get_num_threads())
        return torch.from_numpy(_C.bit_nested_dequantize(*parts, *sizes)).view(packed.shape)

    def lower(self, packed: PackedTensor, levels: int) -> PackedTensor:
        """The first `levels` levels of packed: views of its own memory, no bit of which is changed."""
        self.check(packed)
        if not 1 <= levels <= self.levels:
            raise ValueError(f"levels must be 1 to {self.levels}, got {levels}")
        fmt = BitNested(self.base, levels, self.group)
        codes, scales = packed.codes[..., : fmt.planes, :, :], packed.scales[..., :levels, :, :]
        return PackedTensor(fmt, packed.columns, codes, scales, packed.zeros)


def pack_ref(w: np.ndarray, base: int, levels: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """w float32 [rows, columns] -> codes [planes, rows, row_bytes], scales [levels, rows, groups], zeros."""
    top = np.float32(2**base - 1)
    bits, scales, zeros = [], [], []
    for columns in reference.groups(w, group):
        low, high = columns.min(1, initial=0), columns.max(1, initial=0)
        scale = reference.float16_up((high / 2 - low / 2) / (top / 2))
        zero = reference.nearest(-low[:, None], scale).clip(0, top).astype(np.float32)
        q = (reference.nearest(columns, scale) + zero).clip(0, top)
        value = (q - zero).astype(np.float32) * scale.astype(np.float32)[:, None]
        planes, found = [q.astype(np.int64) >> b & 1 for b in range(base)], [scale]
        for _ in range(levels - 1):
            rest = np.add.accumulate(np.abs(columns - value).astype(np.float64), axis=1)[:, -1] / columns.shape[1]
            found.append(rest.astype(np.float32).astype(np.float16))
            planes.append(columns - value >= 0)
            value = value + np.where(planes[-1], 1, -1).astype(np.float32) * found[-1].astype(np.float32)[:, None]
        bits.append(np.stack(planes).astype(np.uint8))
        scales.append(np.stack(found))
        zeros.append(zero[:, 0])
    if not bits:
        empty = np.zeros((base + levels - 1, len(w), 0), np.uint8)
        return empty, np.zeros((levels, len(w), 0), np.float16), np.zeros((len(w), 0), np.uint8)
    every = np.concatenate(bits, 2)
    codes = np.zeros((*every.shape[:2], 16 * -(-w.shape[1] // 128)), np.uint8)
    packed = np.packbits(every, axis=2, bitorder="little")
    codes[:, :, : packed.shape[2]] = packed
    return codes, np.stack(scales, 2), np.stack(zeros, 1).astype(np.uint8)


def unpack_ref(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, columns: int, base: int, group: int):
    """w float32 [rows, columns] at the level that the scales have."""
    bits = np.unpackbits(codes, axis=2, bitorder="little", count=columns).astype(np.float32)
    q = sum(bits[b] * np.float32(2**b) for b in range(base))
    each = [reference.per_column(scale.astype(np.float32), columns, group) for scale in scales]
    w = (q - reference.per_column(zeros.astype(np.float32), columns, group)) * each[0]
    for plane, scale in zip(bits[base:], each[1:], strict=True):
        w = w + (2 * plane - 1) * scale
    return w.astype(np.float32)
