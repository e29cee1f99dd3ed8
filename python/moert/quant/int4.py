"""Four bits times a scale of 32, 64 or 128 columns, around 0 or from a zero point."""

from dataclasses import dataclass

import numpy as np

from moert.quant import reference
from moert.quant.format import RowFormat


@dataclass(frozen=True)
class Int4(RowFormat):
    """4 bits: w = scale * (code - 8), scale a float16 of either sign.

    Of two scales the one with the smaller squared error is kept: max|w| / 7, or the one at which the weight of largest
    magnitude is code 0.
    """

    group: int = 32

    name = "int4"
    weights_per_block = 32
    groups = (32, 64, 128)


@dataclass(frozen=True)
class Int4Asymmetric(RowFormat):
    """4 bits: w = scale * (code - zero), zero a byte of 0 to 15; the range is the group's and always holds 0."""

    group: int = 32

    name = "int4_asymmetric"
    weights_per_block = 32
    has_zeros = True
    groups = (32, 64, 128)


def pack_ref(w: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, None]:
    """Int4: codes uint8 [rows, row_bytes], scales float16 [rows, groups], no zeros."""

    def rule(columns):
        top = reference.largest(columns)
        extreme = np.take_along_axis(columns, np.abs(columns).argmax(1)[:, None], 1)[:, 0]
        coarse = reference.float16_up(top / np.float32(7))
        fine = reference.float16_up(top / np.float32(8)) * np.where(extreme > 0, np.float16(-1), np.float16(1))
        both = [(s, np.clip(reference.nearest(columns, s), -8, 7)) for s in (coarse, fine)]
        errors = [reference.squared_error(columns, q * s.astype(np.float32)[:, None]) for s, q in both]
        better = errors[1] < errors[0]
        scale = np.where(better, fine, coarse)
        return np.where(better[:, None], both[1][1], both[0][1]) + 8, scale, scale

    codes, scales, _ = reference.round_groups(w, group, rule)
    return nibbles(codes), scales.astype(np.float16), None


def unpack_ref(codes: np.ndarray, scales: np.ndarray, zeros: None, columns: int, group: int) -> np.ndarray:
    """Int4: w float32 [rows, columns]."""
    scale = reference.per_column(scales.astype(np.float32), columns, group)
    return (columns_of(codes, columns).astype(np.float32) - 8) * scale


def asymmetric_pack_ref(w: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Int4Asymmetric: codes uint8 [rows, row_bytes], scales float16 and zeros uint8 [rows, groups]."""

    def rule(columns):
        low, high = columns.min(1, initial=0), columns.max(1, initial=0)
        scale = reference.float16_up((high - low) / np.float32(15))
        zero = reference.nearest(-low[:, None], scale)[:, 0].clip(0, 15)
        return (reference.nearest(columns, scale) + zero[:, None]).clip(0, 15), scale, zero

    codes, scales, zeros = reference.round_groups(w, group, rule)
    return nibbles(codes), scales.astype(np.float16), zeros.astype(np.uint8)


def asymmetric_unpack_ref(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, columns: int, group: int
) -> np.ndarray:
    """Int4Asymmetric: w float32 [rows, columns]."""
    scale, zero = (reference.per_column(part.astype(np.float32), columns, group) for part in (scales, zeros))
    return (columns_of(codes, columns).astype(np.float32) - zero) * scale


def nibbles(codes: np.ndarray) -> np.ndarray:
    """codes [rows, columns] below 16, two a byte: the even column in the low bits."""
    pairs = reference.rows_of_blocks(codes, 2)
    return pairs[:, :, 0] + 16 * pairs[:, :, 1]


def columns_of(packed: np.ndarray, columns: int) -> np.ndarray:
    """The way back from nibbles."""
    return np.stack([packed % 16, packed // 16], 2).reshape(len(packed), 2 * packed.shape[1])[:, :columns]
