"""What a quantized matrix of another library is here: its tensors by name, and the format that they become."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moert.quant.format import PARTS, Format, PackedTensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
Parts = dict[str, Tensor]  # the tensors that stand for one weight, by the last part of their names


@dataclass(frozen=True)
class Read:
    """A packed matrix, and what of it is not as in the file: nothing, if empty."""

    packed: PackedTensor
    changed: str = ""


class Layout(ABC):
    """How a library stores a weight [rows, columns]: a frozen dataclass of what its configuration says."""

    names: tuple[str, ...]  # of the tensors in a weight's place
    of_experts: bool = False  # the names follow that of a whole weight of experts, instead of replacing a matrix
    in_halves: bool = False  # gate rows come before up rows, also where the model's class has them by turns

    @property
    @abstractmethod
    def format(self) -> Format | None:
        """The format that holds the same numbers; None where there is none with a kernel."""

    @property
    @abstractmethod
    def obstacle(self) -> str:
        """Why there is none, in a few words."""

    @abstractmethod
    def carry(self, parts: Parts) -> Read:
        """The same numbers in `format`."""

    @abstractmethod
    def unpack(self, parts: Parts) -> Tensor:
        """The float32 weights that the parts stand for."""

    def read(self, parts: Parts, convert: Format) -> Read:
        """The matrix in `format`, or rounded to the nearest of `convert` where there is none."""
        if self.format is None:
            return Read(convert.pack(self.unpack(parts)), f"converted to {convert}: {self.obstacle}")
        read = self.carry(parts)
        read.packed.format.check_values(read.packed)
        return read


def part(parts: Parts, name: str, dtypes: Iterable[torch.dtype], shape: tuple[int | None, ...]) -> Tensor:
    """The tensor of that name, contiguous; None in shape: any size from 1 on."""
    if name not in parts:
        raise ValueError(f"parts must hold {name}, got {', '.join(parts)}")
    tensor = parts[name]
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    fits = tensor.dim() == len(shape) and all(
        want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")
    if 0 in tensor.shape:  # the other sizes, which cost a file nothing then, would be allocated or gone through
        raise ValueError(f"{name} must have sizes of at least 1, got {list(tensor.shape)}")
    return tensor.contiguous()


def our_group(group: int, groups: tuple[int, ...] = (128, 64, 32)) -> int | None:
    """The largest group of ours that groups of that many columns are made of; -1 is a whole row."""
    if group == -1:
        return groups[0]
    return next((mine for mine in groups if group % mine == 0), None) if group > 0 else None


def spread(values: Tensor, columns: int, group: int, mine: int) -> Tensor:
    """values [rows, groups] of groups of `group` columns (-1: a row), repeated for groups of `mine`."""
    starts = torch.arange(-(-columns // mine)) * mine
    return values[:, starts // (columns if group == -1 else group)]


def num_groups(columns: int, group: int) -> int:
    return 1 if group == -1 else -(-columns // group)


def finite(scales: Tensor, name: str) -> Tensor:
    if not scales.float().isfinite().all():
        raise ValueError(f"{name} must be finite, got inf or nan")
    return scales


def float16(scales: Tensor, name: str) -> tuple[Tensor, str]:
    """The scales as float16, and what that changed: at most 2^-11 of each, 2^-25 of those below 2^-14."""
    half = finite(scales, name).to(torch.float16)
    if not half.isfinite().all():
        raise ValueError(f"{name} must be at most 65504, got {float(scales.abs().max())}")
    return half, "" if torch.equal(half.to(scales.dtype), scales) else "scales rounded to float16"


def joinable(matrices: list[PackedTensor], convert: Format) -> tuple[list[PackedTensor], list[str]]:
    """What cat_rows can join, and what that changed: where blocks of rows do not end with a matrix, it is converted."""
    block = matrices[0].format.block[0]
    if all(m.shape[-2] % block == 0 for m in matrices[:-1]):
        return matrices, []
    why = f"converted to {convert}: gate and up share blocks of {block} rows"
    packed = [convert.pack(m.format.unpack(m)) for m in matrices]
    return packed, [why] * sum(m.shape[:-2].numel() for m in matrices)


def cat_rows(matrices: list[PackedTensor]) -> PackedTensor:
    """Matrices of one format and one number of columns, one below the other."""
    first = matrices[0]
    if any((m.format, m.columns) != (first.format, first.columns) for m in matrices):
        raise ValueError(f"matrices must all be {first.format} of {first.columns} columns, got others")
    return PackedTensor(first.format, first.columns, *_each(matrices, lambda parts: torch.cat(parts, -2)))


def stack(matrices: list[PackedTensor]) -> PackedTensor:
    """Matrices of one format and one shape as [E, rows, columns]."""
    first = matrices[0]
    if any((m.format, m.shape) != (first.format, first.shape) for m in matrices):
        raise ValueError(f"matrices must all be {first.format} {list(first.shape)}, got others")
    return PackedTensor(first.format, first.columns, *_each(matrices, torch.stack))


def _each(matrices: list[PackedTensor], join) -> list[Tensor | None]:
    parts = [[getattr(m, part) for m in matrices] for part in PARTS]
    return [None if same[0] is None else join(same) for same in parts]
