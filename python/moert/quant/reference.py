"""What the references of the formats share, in NumPy and written apart from the kernels."""

from collections.abc import Callable

import numpy as np


def float16_up(x: np.ndarray) -> np.ndarray:
    """The smallest float16 that is not below x >= 0."""
    half = x.astype(np.float16)
    with np.errstate(over="ignore"):  # beyond 65504 the next one is infinity
        above = np.nextafter(half, np.float16(np.inf))
    return np.where(half.astype(np.float32) < x, above, half).astype(np.float16)


def groups(w: np.ndarray, group: int | None) -> list[np.ndarray]:
    """The columns of w [rows, columns] that share a scale, the last group as short as it comes."""
    if group is None:
        return [w]
    return [w[:, start : start + group] for start in range(0, w.shape[1], group)]


def round_groups(w: np.ndarray, group: int | None, rule: Callable) -> tuple[np.ndarray, ...]:
    """rule(columns) -> codes, scale [rows], zero [rows] of every group -> codes [rows, columns], scales, zeros."""
    parts = [rule(columns) for columns in groups(w, group)]
    if not parts:
        none = np.zeros((len(w), 0), np.uint8)
        return none, none, none
    codes, scales, zeros = zip(*parts, strict=True)
    return np.concatenate(codes, 1).astype(np.uint8), np.stack(scales, 1), np.stack(zeros, 1)


def per_column(values: np.ndarray, columns: int, group: int | None) -> np.ndarray:
    """values [rows, groups] repeated for the columns that share them."""
    return np.repeat(values, group or max(columns, 1), axis=1)[:, :columns]


def largest(w: np.ndarray) -> np.ndarray:
    """max |w| of each row, 0 of an empty one."""
    return np.abs(w).max(1, initial=0).astype(np.float32)


def squared_error(w: np.ndarray, rounded: np.ndarray) -> np.ndarray:
    """The sum of each row's squared differences in float64, added from left to right."""
    difference = w.astype(np.float64) - rounded.astype(np.float64)
    return np.add.accumulate(difference * difference, axis=1)[:, -1]


def nearest(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """w / scale of its row to the nearest integer, ties to even; 0 where the scale is."""
    scale = scale.astype(np.float32)[:, None]
    return np.where(scale == 0, 0, np.rint(w / np.where(scale == 0, np.float32(1), scale)))


def rows_of_blocks(codes: np.ndarray, codes_per_byte: int) -> np.ndarray:
    """codes [rows, columns] with zeros up to whole blocks of 16 bytes, as [rows, row_bytes, codes_per_byte]."""
    rows, columns = codes.shape
    width = -(-columns // (16 * codes_per_byte)) * 16
    padded = np.zeros((rows, width * codes_per_byte), np.uint8)
    padded[:, :columns] = codes
    return padded.reshape(rows, width, codes_per_byte)
