"""OCP Microscaling MXFP4: e2m1 times a power of two of 32 columns."""

from dataclasses import dataclass

import numpy as np
import torch

from moert.quant import reference
from moert.quant.format import RowFormat
from moert.quant.int4 import columns_of, nibbles

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


@dataclass(frozen=True)
class Mxfp4(RowFormat):
    """4 bits: w = 2^(scale - 127) * e2m1(code), scale a byte below 255.

    Of two exponents the one with the smaller squared error is kept: OCP's floor(log2(max|w|)) - 2, or the next.
    """

    group: int = 32

    name = "mxfp4"
    weights_per_block = 32
    scale_dtype = torch.uint8
    groups = (32,)


def pack_ref(w: np.ndarray, group: int = 32) -> tuple[np.ndarray, np.ndarray, None]:
    """codes uint8 [rows, row_bytes], scales uint8 [rows, groups], no zeros."""

    def rule(columns):
        exponent = np.frexp(reference.largest(columns))[1] - 3
        exponent = np.where(reference.largest(columns) == 0, -127, exponent).clip(-127, 126)
        both = [(e, e2m1_codes(np.ldexp(columns.astype(np.float64), -e[:, None]))) for e in (exponent, exponent + 1)]
        errors = [reference.squared_error(columns, np.ldexp(value(c), e[:, None])) for e, c in both]
        better = errors[1] < errors[0]
        scale = np.where(better, exponent + 1, exponent) + 127
        return np.where(better[:, None], both[1][1], both[0][1]), scale, scale

    codes, scales, _ = reference.round_groups(w, group, rule)
    return nibbles(codes), scales.astype(np.uint8), None


def unpack_ref(codes: np.ndarray, scales: np.ndarray, zeros: None, columns: int, group: int = 32) -> np.ndarray:
    """w float32 [rows, columns]."""
    exponent = reference.per_column(scales.astype(np.int32), columns, group) - 127
    return np.ldexp(value(columns_of(codes, columns)), exponent).astype(np.float32)


def e2m1_codes(y: np.ndarray) -> np.ndarray:
    """The nearest e2m1 of each y; of two equally near ones the even code."""
    distance = np.abs(np.abs(y)[..., None] - E2M1)
    near = distance == distance.min(-1, keepdims=True)
    code = np.where(near.sum(-1) == 2, (near & (np.arange(8) % 2 == 0)).argmax(-1), near.argmax(-1))
    return code + 8 * np.signbit(y)


def value(codes: np.ndarray) -> np.ndarray:
    """float64 of each e2m1 code."""
    return np.where(codes >= 8, -1.0, 1.0) * E2M1[codes % 8]
