"""What every quantized format promises: the bits are in csrc/moert/formats.h and docs/formats.md."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod

import torch
from torch import Tensor

from moert import _C
from moert.ops.kinds import expect
from moert.pages import in_large_pages

PARTS = ("codes", "scales", "zeros")  # of a packed tensor
CHECKED_AT_ONCE = 1 << 15  # bytes of codes: cached, and so few that torch starts no threads for them


@dataclass(frozen=True)
class PackedTensor:
    """w [..., rows, columns] in a format: codes uint8 [..., rows, row_bytes], scales and zeros [..., rows, groups].

    The rows of one expert follow each other. zeros is None where the format has none. Fp8 and BitNested say otherwise.
    """

    format: "Format"
    columns: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.format.shape_of(self)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.scales, self.zeros) if part is not None)

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the operators take of it: codes, scales, zeros."""
        return self.codes, self.scales, self.zeros

    def part(self, first: int, last: int) -> "PackedTensor":
        """Matrices first .. last - 1 of [E, rows, columns], as views."""
        parts = (None if (value := getattr(self, name)) is None else value[first:last] for name in PARTS)
        return PackedTensor(self.format, self.columns, *parts)


class Format(ABC):
    """A way to store weights in few bits: a frozen dataclass whose name the kernels know."""

    name: str
    group: int | None = None  # columns of a scale; None: the whole row, or what `block` says
    scale_dtype = torch.float16
    codes_per_byte: int

    @property
    def spelling(self) -> str:
        """What moert.quantize_ calls the format, its group apart."""
        return self.name

    @property
    @abstractmethod
    def block(self) -> tuple[int, int | None]:
        """Rows and columns that share a scale; None columns: the whole row."""

    @abstractmethod
    def nbytes(self, shape: tuple[int, ...]) -> int:
        """The exact size of a packed tensor of this shape."""

    @abstractmethod
    def pack(self, w: Tensor) -> PackedTensor:
        """w [..., rows, columns], float32, bfloat16 or float16 on the CPU, rounded to this format."""

    @abstractmethod
    def unpack(self, packed: PackedTensor) -> Tensor:
        """The float32 weights [..., rows, columns] that the packed ones stand for."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...]) -> PackedTensor:
        """A packed tensor of this shape, all bytes 0: to be loaded into."""

    @abstractmethod
    def check_values(self, packed: PackedTensor) -> None:
        """What the kernels take for granted, of bytes that come from a file."""

    def foreign(self, codes: Tensor) -> Tensor | None:
        """Which bytes are no codes of the format, not 0 there; None: every byte is one."""
        return None

    def after(self, last: Tensor, columns: int) -> Tensor:
        """Not 0 where a byte with codes of so many columns, fewer than it has room for, has more bits than theirs."""
        return last >> columns * (8 // self.codes_per_byte)

    def check_codes(self, codes: Tensor, columns: int) -> None:
        """codes uint8 [..., row_bytes]: all are the format's, and what a row has after its last column is 0."""
        whole, left = divmod(columns, self.codes_per_byte)
        if left and self.after(codes[..., whole], left).any() or codes[..., whole + (left > 0) :].any():
            raise ValueError(f"codes must be 0 after column {columns} for {self}, got others")
        if type(self).foreign is Format.foreign:
            return
        every = codes.reshape(-1)
        for piece in every.split(CHECKED_AT_ONCE) if codes.is_cpu else (every,):  # on a GPU each waits for the last
            if (wrong := self.foreign(piece)).any():
                raise ValueError(f"codes must be those of {self}, got byte {int(piece[wrong.bool()][0])}")

    def pack_each(self, matrices: Iterable[Tensor], shape: tuple[int, ...]) -> PackedTensor:
        """The matrices [rows, columns] of a tensor of this shape, one after the other: float32 of one at a time."""
        whole = self.empty(shape)
        for i, w in enumerate(matrices):
            packed = self.pack(w)
            for part in PARTS:
                if (value := getattr(packed, part)) is not None:
                    getattr(whole, part)[i] = value
        return whole

    def join(self, pieces: Sequence[PackedTensor]) -> PackedTensor:
        """Pieces [n, rows, columns] with the same rows and columns, one after the other."""
        parts = ([getattr(piece, name) for piece in pieces] for name in PARTS)
        joined = (None if values[0] is None else torch.cat(values) for values in parts)
        return PackedTensor(self, pieces[0].columns, *joined)

    def shape_of(self, packed: PackedTensor) -> torch.Size:
        """The shape [..., rows, columns] of the weights that packed holds."""
        return torch.Size([*packed.codes.shape[:-1], packed.columns])

    def check(self, packed: PackedTensor) -> None:
        if packed.format != self:
            raise ValueError(f"packed must be in format {self}, got {packed.format}")
        for name, dtype in (("codes", torch.uint8), ("scales", self.scale_dtype), ("zeros", torch.uint8)):
            part = getattr(packed, name)
            if part is not None and part.dtype != dtype:
                raise ValueError(f"{name} must be {dtype} for {self}, got {part.dtype}")

    def bits_per_weight(self, shape: tuple[int, ...]) -> Fraction:
        """Exactly, scales and the padding of rows included; 0 for a tensor without weights."""
        return Fraction(8 * self.nbytes(shape), prod(shape)) if prod(shape) else Fraction(0)


class RowFormat(Format):
    """A format whose scales belong to groups within a row.  Its dataclass has `group`: the columns of a scale."""

    weights_per_block: int  # in 16 bytes of codes
    has_zeros = False
    groups = (None, 32, 64, 128)

    def __post_init__(self):
        if self.group not in self.groups or isinstance(self.group, float):  # 32.0 in a config.json
            allowed = ", ".join(map(str, self.groups))
            raise ValueError(f"group must be one of {allowed} for {self.name}, got {self.group!r}")

    @property
    def codes_per_byte(self) -> int:
        return self.weights_per_block // 16

    @property
    def block(self) -> tuple[int, int | None]:
        return 1, self.group

    def nbytes(self, shape: tuple[int, ...]) -> int:
        *rows, columns = shape
        groups = 1 if self.group is None else -(-columns // self.group)
        row = 16 * -(-columns // self.weights_per_block) + groups * (self.scale_dtype.itemsize + self.has_zeros)
        return prod(rows) * row

    def empty(self, shape: tuple[int, ...]) -> PackedTensor:
        *rows, columns = shape
        groups = 1 if self.group is None else -(-columns // self.group)
        blocks = -(-columns // self.weights_per_block)
        codes = in_large_pages(torch.empty(*rows, 16 * blocks, dtype=torch.uint8)).zero_()
        scales = torch.zeros(*rows, groups, dtype=self.scale_dtype)
        return PackedTensor(
            self, columns, codes, scales, torch.zeros_like(scales, dtype=torch.uint8) if self.has_zeros else None
        )

    def check_values(self, packed: PackedTensor) -> None:
        finite = (packed.scales != 255) if packed.scales.dtype == torch.uint8 else packed.scales.isfinite()
        if not finite.all():
            raise ValueError(f"scales must be finite for {self}, got inf or nan")
        if packed.zeros is not None and (packed.zeros > 15).any():
            raise ValueError(f"zeros must be at most 15 for {self}, got {int(packed.zeros.max())}")
        self.check_codes(packed.codes, packed.columns)

    def pack(self, w: Tensor) -> PackedTensor:
        rows = flat(float_weights(w)).numpy()
        parts = _C.quantize(self.name, rows, self.group or 0, torch.get_num_threads())
        shaped = [
            None if part is None else torch.from_numpy(part).view(*w.shape[:-1], part.shape[-1]) for part in parts
        ]
        return PackedTensor(self, w.shape[-1], *shaped)

    def unpack(self, packed: PackedTensor) -> Tensor:
        self.check(packed)
        parts = (packed.codes, packed.scales, packed.zeros)
        codes, scales, zeros = (None if part is None else flat(part).numpy() for part in parts)
        w = _C.dequantize(self.name, codes, scales, zeros, packed.columns, self.group or 0, torch.get_num_threads())
        return torch.from_numpy(w).view(packed.shape)


def flat(x: Tensor, dims: int = 1) -> Tensor:
    """x contiguous with all but its last dims as one, also where it has no element."""
    return x.contiguous().view(prod(x.shape[:-dims]), *x.shape[-dims:])


def float_weights(w: Tensor) -> Tensor:
    """w as float32, detached; bfloat16 and float16 widen exactly."""
    expect(Tensor, w=w)
    if w.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"w must be float32, bfloat16 or float16, got {w.dtype}")
    if w.device.type != "cpu":
        raise ValueError(f"w must be on the CPU, got {w.device}")
    if w.dim() < 2:
        raise ValueError(f"w must have at least 2 dimensions, got {w.dim()}")
    return w.detach().float()
