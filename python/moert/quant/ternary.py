"""-1, 0 and +1 times a scale, of a row or of a group of its columns, in 2 bits or in 1.6."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from moert.quant import reference
from moert.quant.format import RowFormat


@dataclass(frozen=True)
class Ternary2(RowFormat):
    """2 bits: w = scale * (code - 1), the scale and the zeros of least squared error; scale as float16."""

    group: int | None = None  # None: a scale a row

    name = "ternary2"
    weights_per_block = 64

    def foreign(self, codes: Tensor) -> Tensor:
        return codes & codes >> 1 & 0b01010101  # both bits of a code


@dataclass(frozen=True)
class Ternary5(RowFormat):
    """1.6 bits: five codes a byte in base 3; weights as in Ternary2."""

    group: int | None = None

    name = "ternary5"
    weights_per_block = 80

    def foreign(self, codes: Tensor) -> Tensor:
        return codes * 243 > 242  # what 243 b / 256 leaves, in 8 bits: of two bytes with one number the second is none

    def after(self, last: Tensor, columns: int) -> Tensor:
        return (last.int() * 243 >> 8) % 3 ** (5 - columns)


def round_ref(w: np.ndarray, group: int | None) -> tuple[np.ndarray, np.ndarray]:
    """codes uint8 [rows, columns] of 0, 1, 2 and scales float16 [rows, groups]."""

    def rule(columns):
        magnitudes = -np.sort(-np.abs(columns.astype(np.float64)), axis=1)
        sums, counts = np.add.accumulate(magnitudes, axis=1), np.arange(1, columns.shape[1] + 1)
        if not columns.shape[1]:
            return columns, np.zeros(len(columns)), np.zeros(len(columns))
        best = (sums * sums / counts).argmax(1)
        mean = np.take_along_axis(sums, best[:, None], 1)[:, 0] / counts[best]
        scale = mean.astype(np.float32).astype(np.float16)
        return np.clip(reference.nearest(columns, scale), -1, 1) + 1, scale, scale

    codes, scales, _ = reference.round_groups(w, group, rule)
    return codes, scales.astype(np.float16)


def pack_ref(w: np.ndarray, group: int | None, code: str = "ternary2") -> tuple[np.ndarray, np.ndarray, None]:
    """codes uint8 [rows, row_bytes], scales float16 [rows, groups], no zeros."""
    codes, scales = round_ref(w, group)
    return (quarters if code == "ternary2" else fives)(codes), scales, None


def unpack_ref(
    packed: np.ndarray, scales: np.ndarray, zeros: None, columns: int, group: int | None, code: str = "ternary2"
) -> np.ndarray:
    """w float32 [rows, columns]."""
    table = QUARTERS if code == "ternary2" else FIVES
    codes = table[packed].reshape(len(packed), packed.shape[1] * table.shape[1])[:, :columns]
    return (codes - np.float32(1)) * reference.per_column(scales.astype(np.float32), columns, group)


def quarters(codes: np.ndarray) -> np.ndarray:
    """codes [rows, columns] below 4, four a byte, the first in the lowest bits."""
    return (reference.rows_of_blocks(codes, 4) * np.array([1, 4, 16, 64], np.uint8)).sum(2, dtype=np.uint8)


def fives(codes: np.ndarray) -> np.ndarray:
    """codes [rows, columns] below 3, five a byte: a number in base 3, its first digit the highest, times 256/243."""
    number = (reference.rows_of_blocks(codes, 5) * np.array([81, 27, 9, 3, 1])).sum(2)
    return np.ceil(number * 256 / 243).astype(np.uint8)


QUARTERS = np.array([[byte >> shift & 3 for shift in (0, 2, 4, 6)] for byte in range(256)], np.float32)
# The number of byte b is floor(243 b / 256); its digits in base 3.
FIVES = np.array([[b * 243 // 256 // 3**power % 3 for power in (4, 3, 2, 1, 0)] for b in range(256)], np.float32)
