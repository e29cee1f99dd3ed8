"""Signed bytes times a scale, of a row or of a group of its columns."""

from dataclasses import dataclass

import numpy as np

from moert.quant import reference
from moert.quant.format import RowFormat


@dataclass(frozen=True)
class Int8(RowFormat):
    """8 bits: w = scale * code, scale = max|w| / 127 as float16, rounded up; no error above scale / 2."""

    group: int | None = None  # None: a scale a row

    name = "int8"
    weights_per_block = 16


def pack_ref(w: np.ndarray, group: int | None) -> tuple[np.ndarray, np.ndarray, None]:
    """codes uint8 [rows, row_bytes], scales float16 [rows, groups], no zeros."""

    def rule(columns):
        scale = reference.float16_up(reference.largest(columns) / np.float32(127))
        return reference.nearest(columns, scale).astype(np.int8).view(np.uint8), scale, scale

    codes, scales, _ = reference.round_groups(w, group, rule)
    return reference.rows_of_blocks(codes, 1)[:, :, 0], scales.astype(np.float16), None


def unpack_ref(codes: np.ndarray, scales: np.ndarray, zeros: None, columns: int, group: int | None) -> np.ndarray:
    """w float32 [rows, columns]."""
    scale = reference.per_column(scales.astype(np.float32), columns, group)
    return codes[:, :columns].view(np.int8).astype(np.float32) * scale
