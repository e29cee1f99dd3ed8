"""Bit-nested weights: one packed tensor is a valid tensor at every smaller number of bits."""

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from moert import _C
from moert.pages import in_large_pages
from moert.quant import reference
from moert.quant.format import Format, PackedTensor, flat, float_weights


@dataclass(frozen=True)
class BitNested(Format):
    """`base` bits at level 1 and one more a level: BitNested(2, 3) is 2, 3 and 4 bits, BitNested(5, 4) is 5 to 8.

    A weight's bits halve the range from -8.5 to 7.5 scales again and again, and it is the middle of what is left: 4
    bits are scale * (code - 8), fewer the mean of the codes that begin with them.  The scale, a float16 of either sign,
    is the one of eight with the smallest squared error at the highest level.  codes are bit planes [..., planes, rows,
    row_bytes], the highest bit first, scales [..., rows, groups]; a lower level reads the first planes only.  After
    D2MoE (arXiv 2504.15299), whose levels have a scale each.
    """

    base: int = 2
    levels: int = 3
    group: int = 32

    name = "bit_nested"
    codes_per_byte = 8  # of one plane

    def __post_init__(self):
        if self.group not in (32, 64, 128) or isinstance(self.group, float):
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
        return prod(rows) * (self.planes * 16 * -(-columns // 128) + 2 * -(-columns // self.group))

    @property
    def spelling(self) -> str:
        return self.name if (self.base, self.levels) == (2, 3) else f"{self.name}_{self.base}_{self.levels}"

    def empty(self, shape: tuple[int, ...]) -> PackedTensor:
        *matrices, rows, columns = shape
        size = (*matrices, self.planes, rows, 16 * -(-columns // 128))
        codes = in_large_pages(torch.empty(size, dtype=torch.uint8)).zero_()
        scales = torch.zeros(*matrices, rows, -(-columns // self.group), dtype=torch.float16)
        return PackedTensor(self, columns, codes, scales)

    def check_values(self, packed: PackedTensor) -> None:
        if not packed.scales.isfinite().all():
            raise ValueError(f"scales must be finite for {self}, got inf or nan")
        self.check_codes(packed.codes, packed.columns)

    def pack(self, w: Tensor) -> PackedTensor:
        w = float_weights(w)
        parts = _C.bit_nested_quantize(flat(w, 2).numpy(), self.group, self.planes, torch.get_num_threads())
        shaped = (torch.from_numpy(part).view(*w.shape[:-2], *part.shape[1:]) for part in parts)
        return PackedTensor(self, w.shape[-1], *shaped)

    def unpack(self, packed: PackedTensor) -> Tensor:
        self.check(packed)
        shape = self.shape_of(packed)
        if packed.codes.shape[-3] != self.planes:
            raise ValueError(f"codes must have {self.planes} planes for {self}, got {packed.codes.shape[-3]}")
        codes, scales = flat(packed.codes, 3).numpy(), flat(packed.scales, 2).numpy()
        w = _C.bit_nested_dequantize(codes, scales, packed.columns, self.group, torch.get_num_threads())
        return torch.from_numpy(w).view(shape)

    def lower(self, packed: PackedTensor, levels: int) -> PackedTensor:
        """The first `levels` levels of packed: views of its own memory, no bit of which is changed."""
        self.check(packed)
        if not 1 <= levels <= self.levels:
            raise ValueError(f"levels must be 1 to {self.levels}, got {levels}")
        fmt = BitNested(self.base, levels, self.group)
        return PackedTensor(fmt, packed.columns, packed.codes[..., : fmt.planes, :, :], packed.scales)


def value_ref(code: np.ndarray, planes: int) -> np.ndarray:
    """The mean, in scales, of the 4-bit codes less 8 that begin with these bits, or the part of one that they say."""
    return ((code + np.float32(0.5)) * np.float32(2.0 ** (4 - planes)) - np.float32(8.5)).astype(np.float32)


def pack_ref(w: np.ndarray, planes: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """w float32 [rows, columns] -> codes [planes, rows, row_bytes], scales [rows, groups]."""
    every, scales = np.zeros((*w.shape, planes), np.uint8), []
    for columns in reference.groups(w, group):
        start = len(scales) * group
        scale, codes = _round_group(columns, planes)
        scales.append(scale)
        for plane in range(planes):
            every[:, start : start + group, plane] = codes >> (planes - 1 - plane) & 1
    codes = np.zeros((planes, len(w), 16 * -(-w.shape[1] // 128)), np.uint8)
    packed = np.packbits(every.transpose(2, 0, 1), axis=2, bitorder="little")
    codes[:, :, : packed.shape[2]] = packed
    return codes, np.stack(scales, 1) if scales else np.zeros((len(w), 0), np.float16)


def _round_group(w: np.ndarray, planes: int) -> tuple[np.ndarray, np.ndarray]:
    """w [rows, columns] of one group -> the scale [rows] of least squared error, the first of several, and codes."""
    low, high = 0 - w.min(1, initial=0), w.max(1, initial=0)
    tried = []
    for sign, above, below in ((1, high, low), (-1, low, high)):
        whole = np.maximum(above / np.float32(7.5), below / np.float32(8.5))
        for sixteenths in (17, 16, 15, 14):
            with np.errstate(over="ignore"):  # some may be beyond float16
                scale = (sign * (whole * np.float32(sixteenths / 16))).astype(np.float16)
            wide = scale.astype(np.float32)[:, None]
            with np.errstate(invalid="ignore"):
                units = np.where(wide == 0, np.float32(0), w / np.where(wide == 0, np.float32(1), wide))
                cells = (units + np.float32(8.5)) * np.float32(2.0 ** (planes - 4))
                codes = np.floor(cells.clip(0, 2**planes - 1)).astype(np.int64)
                error = reference.squared_error(w, wide * value_ref(codes, planes))
            tried.append((np.where(np.isfinite(error), error, np.inf), scale, codes))
    best = np.argmin([error for error, _, _ in tried], axis=0)
    rows = np.arange(len(w))
    return np.stack([scale for _, scale, _ in tried])[best, rows], np.stack([c for _, _, c in tried])[best, rows]


def unpack_ref(codes: np.ndarray, scales: np.ndarray, columns: int, group: int) -> np.ndarray:
    """w float32 [rows, columns] of as many planes as codes have."""
    bits = np.unpackbits(codes, axis=2, bitorder="little", count=columns).astype(np.int64)
    code = np.zeros(bits.shape[1:], np.int64)
    for plane in bits:
        code = 2 * code + plane
    return value_ref(code, len(codes)) * reference.per_column(scales.astype(np.float32), columns, group)
