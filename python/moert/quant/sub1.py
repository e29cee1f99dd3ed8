"""QMoE's code: ternary weights that are mostly zero, in less than one bit each."""

import hashlib
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import prod

import numpy as np
import torch
from torch import Tensor

from moert import _C
from moert.quant.format import flat, float_weights

PARTS = ("codes", "row_ptr", "matrix_base", "minmax")  # of a packed tensor


@dataclass(frozen=True)
class SubOneBitTensor:
    """Ternary w [..., rows, columns]: digits 0, 1, 2 stand for 0, a row's low and its high.

    codes uint16 [codewords] of all matrices; row r of matrix m is codes[matrix_base[m] + row_ptr[m, r]] up to
    ... row_ptr[m, r + 1].  row_ptr int32 [matrices, rows + 1], matrix_base int64 [matrices + 1], minmax bfloat16
    [..., rows, 2] (low, high).
    """

    columns: int
    codes: Tensor
    row_ptr: Tensor
    matrix_base: Tensor
    minmax: Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.minmax.shape[:-1], self.columns])

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.row_ptr, self.matrix_base, self.minmax))

    @property
    def format(self) -> "SubOneBit":
        return SubOneBit()

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the operators take in the places of codes, scales and zeros; row_ptr tells where matrices begin."""
        return self.codes, self.minmax, self.row_ptr

    def part(self, first: int, last: int) -> "SubOneBitTensor":
        """Matrices first .. last - 1 of [E, rows, columns]; the codes are a view."""
        base = self.matrix_base[first : last + 1]
        codes = self.codes[int(base[0]) : int(base[-1])]
        return SubOneBitTensor(self.columns, codes, self.row_ptr[first:last], base - base[0], self.minmax[first:last])

    @property
    def bits_per_weight(self) -> float:
        """What the weights took, row tables included; 0 for a tensor without weights."""
        return 8 * self.nbytes / prod(self.shape) if prod(self.shape) else 0.0


@dataclass(frozen=True)
class SubOneBit:
    """Sub-1-bit dictionary code (QMoE, arXiv 2310.16795): about 0.75 bits at 88.5 % zeros, more where there are fewer.

    A row's low and high are its extremes, 0 included; a weight beyond half of one becomes it, any other 0.
    """

    name = "sub1"
    group = None
    spelling = "sub1"

    def pack(self, w: Tensor) -> SubOneBitTensor:
        """w [..., rows, columns], float32, bfloat16 or float16 on the CPU, rounded to each row's three values."""
        w = float_weights(w)
        if not w.isfinite().all():
            raise ValueError("w must be finite, got inf or nan")
        low, high = row_limits(w)
        digits = (w < low / 2).to(torch.uint8) + 2 * (w > high / 2).to(torch.uint8)
        return self.encode(digits, torch.cat([low, high], -1).bfloat16())

    def empty(self, shape: tuple[int, ...], codewords: int = 0) -> SubOneBitTensor:
        """A packed tensor [E, rows, columns] of so many codewords, all bytes 0: to be loaded into."""
        E, rows, columns = shape
        codes, ends = torch.zeros(codewords, dtype=torch.uint16), torch.zeros(E, rows + 1, dtype=torch.int32)
        limits = torch.zeros(E, rows, 2, dtype=torch.bfloat16)
        return SubOneBitTensor(columns, codes, ends, torch.zeros(E + 1, dtype=torch.int64), limits)

    def pack_each(self, matrices: Iterable[Tensor], shape: tuple[int, ...]) -> SubOneBitTensor:
        """The matrices [rows, columns] of a tensor of this shape, one after the other."""
        pieces = [self.pack(w[None]) for w in matrices]
        return self.join(pieces) if pieces else self.empty(shape)

    def check_values(self, packed: SubOneBitTensor) -> None:
        """What the kernels take for granted, of bytes that come from a file."""
        packed = SubOneBitTensor(packed.columns, *(getattr(packed, name).cpu() for name in PARTS))
        _check(packed)
        if not packed.minmax.isfinite().all():
            raise ValueError("minmax must be finite, got inf or nan")
        ends, sizes = packed.row_ptr, packed.row_ptr[:, -1].long()
        if (ends[:, 0] != 0).any() or (ends.diff(dim=1) < 0).any():
            raise ValueError("row_ptr must rise from 0 in every matrix, got others")
        if not torch.equal(packed.matrix_base, torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])):
            raise ValueError("matrix_base must rise by the codewords of each matrix, got others")
        if len(packed.codes) != int(packed.matrix_base[-1]):
            raise ValueError(f"codes must hold {int(packed.matrix_base[-1])} codewords, got {len(packed.codes)}")
        symbols, all_codes = -(-packed.columns // 2), packed.codes.numpy()
        for m, (first, last) in enumerate(pairwise(packed.matrix_base.tolist())):
            lengths = np.cumsum(_lengths()[all_codes[first:last]], dtype=np.int64)
            reached = np.concatenate([[0], lengths])[ends[m].numpy()]
            if (wrong := np.flatnonzero(np.diff(reached) != symbols)).size:
                raise ValueError(f"codes must hold {packed.columns} columns a row, got others in row {wrong[0]} of {m}")

    def join(self, pieces: Sequence[SubOneBitTensor]) -> SubOneBitTensor:
        """Pieces [n, rows, columns] with the same rows and columns, one after the other."""
        codes = torch.from_numpy(np.concatenate([piece.codes.numpy() for piece in pieces]))
        sizes = torch.cat([piece.matrix_base.diff() for piece in pieces])
        base = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        row_ptr, minmax = (torch.cat([getattr(piece, name) for piece in pieces]) for name in ("row_ptr", "minmax"))
        return SubOneBitTensor(pieces[0].columns, codes, row_ptr, base, minmax)

    def encode(self, digits: Tensor, minmax: Tensor) -> SubOneBitTensor:
        """digits uint8 [..., rows, columns] of 0, 1, 2 and minmax bfloat16 [..., rows, 2], lossless."""
        if minmax.dtype != torch.bfloat16 or minmax.shape != (*digits.shape[:-1], 2):
            expected = [*digits.shape[:-1], 2]
            raise ValueError(f"minmax must be bfloat16 {expected}, got {minmax.dtype} {list(minmax.shape)}")
        rows, columns = digits.shape[-2:]
        parts = [_C.sub1_encode(matrix, torch.get_num_threads()) for matrix in flat(digits, 2).numpy()]
        base = np.cumsum([0] + [len(codes) for codes, _ in parts], dtype=np.int64)
        codes = np.concatenate([codes for codes, _ in parts] or [np.zeros(0, np.uint16)])
        row_ptr = np.stack([ptr for _, ptr in parts]) if parts else np.zeros((0, rows + 1), np.int32)
        return SubOneBitTensor(columns, *map(torch.from_numpy, (codes, row_ptr, base)), minmax)

    def decode(self, packed: SubOneBitTensor) -> Tensor:
        """The digits uint8 [..., rows, columns]."""
        _check(packed)
        base, ptrs = packed.matrix_base.tolist(), packed.row_ptr
        rises = all(a <= b for a, b in zip(base, base[1:], strict=False))
        if len(base) != len(ptrs) + 1 or base[0] != 0 or base[-1] != len(packed.codes) or not rises:
            raise ValueError(f"matrix_base must rise from 0 to {len(packed.codes)} over {len(ptrs)} matrices")
        digits = [
            _C.sub1_decode(packed.codes[a:b].numpy(), ptr.numpy(), packed.columns, torch.get_num_threads())
            for a, b, ptr in zip(base, base[1:], ptrs, strict=False)
        ]
        empty = np.zeros((0, *packed.shape[-2:]), np.uint8)
        return torch.from_numpy(np.stack(digits) if digits else empty).view(packed.shape)

    def unpack(self, packed: SubOneBitTensor) -> Tensor:
        """The float32 weights [..., rows, columns]."""
        _check(packed)
        if not packed.minmax.isfinite().all():
            raise ValueError("minmax must be finite, got inf or nan")
        low, high = packed.minmax.float().split(1, -1)
        digits = self.decode(packed)
        return torch.where(digits == 1, low, torch.where(digits == 2, high, 0.0))


def row_limits(w: Tensor) -> tuple[Tensor, Tensor]:
    """What digits 1 and 2 stand for in each row of w, [..., rows, 1]: its extremes, 0 included; -1 and 1 of zeros."""
    low, high = extremes(w)
    low, high = low.clamp(max=0), high.clamp(min=0)
    empty = (low == 0) & (high == 0)
    return torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)


def _check(packed: SubOneBitTensor) -> None:
    kinds = {"codes": (torch.uint16, 1), "row_ptr": (torch.int32, 2), "matrix_base": (torch.int64, 1)}
    for name, (dtype, dims) in kinds.items():
        part = getattr(packed, name)
        if part.dtype != dtype or part.dim() != dims:
            raise ValueError(f"{name} must be {dtype} of {dims} dimensions, got {part.dtype} {list(part.shape)}")
    rows = packed.row_ptr.shape[1] - 1
    *matrices, width = packed.minmax.shape if packed.minmax.dim() else (0,)
    if packed.minmax.dtype != torch.bfloat16 or width != 2 or prod(matrices) != len(packed.row_ptr) * rows:
        got = f"{packed.minmax.dtype} {list(packed.minmax.shape)}"
        raise ValueError(f"minmax must be torch.bfloat16 [{len(packed.row_ptr)} matrices, {rows} rows, 2], got {got}")


def extremes(w: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest of each row [..., rows, 1]; 0 where there is none."""
    if w.shape[-1] == 0:
        return w.new_zeros(*w.shape[:-1], 1), w.new_zeros(*w.shape[:-1], 1)
    return w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)


@cache
def _lengths() -> np.ndarray:
    """How many pairs of columns each codeword stands for, uint8 [65536]."""
    return (_C.sub1_table()[:, 0] & 15).astype(np.uint8)


@cache
def dictionary_hash() -> str:
    """SHA-256 of the decode table, little endian: a file that names another was written with another dictionary."""
    return hashlib.sha256(_C.sub1_table().astype("<u4").tobytes()).hexdigest()


def dictionary_ref() -> list[tuple[int, ...]]:
    """The 65536 sequences of symbols in order of their codewords, by heapq."""
    probability = [(0.885, 0.0575, 0.0575)[s % 3] * (0.885, 0.0575, 0.0575)[s // 3] for s in range(9)]
    candidates, found = [(-1.0, ())], []
    while len(found) < 65536:
        negative, sequence = heapq.heappop(candidates)
        if sequence:
            found.append(sequence)
        if len(sequence) < 14:
            for s in range(9):
                heapq.heappush(candidates, (negative * probability[s], (*sequence, s)))
    return found


def encode_ref(digits: list[int], dictionary: dict[tuple[int, ...], int]) -> list[int]:
    """The codewords of one row: at each place the longest sequence of the dictionary."""
    padded = digits + [0] * (len(digits) % 2)
    symbols, codes = [a + 3 * b for a, b in zip(padded[::2], padded[1::2], strict=True)], []
    while symbols:
        length = max(n for n in range(1, min(14, len(symbols)) + 1) if tuple(symbols[:n]) in dictionary)
        codes.append(dictionary[tuple(symbols[:length])])
        symbols = symbols[length:]
    return codes
