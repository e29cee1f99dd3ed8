"""The values that weights can take once their scales are fixed: for methods that choose the codes themselves.

G matrices of R rows and C columns; scales and zeros are those of rounding to nearest (docs/formats.md).
"""

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from moert import _C
from moert.quant.format import PackedTensor, RowFormat, flat
from moert.quant.sub1 import SubOneBit, SubOneBitTensor, row_limits

# Levels are integers times the scale: the least, the greatest, and what is added to make the code.
_LEVELS = {"int8": (-127, 127, 0), "int4": (-8, 7, 8), "ternary2": (-1, 1, 1), "ternary5": (-1, 1, 1)}
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
# Halfway between two values, or just below it where the upper one has the even code.
_E2M1_BOUNDS = torch.tensor([0.25, 0.75 - 2**-24, 1.25, 1.75 - 2**-23, 2.5, 3.5 - 2**-22, 5])


WIDTHS = (1.5, 2.0)
FLOAT16_MAX = 65504.0


class Grid:
    """The grid of w [G, R, C] in a format."""

    def __init__(self, fmt: RowFormat, w: Tensor):
        self.format, (_, self.rows, self.columns) = fmt, w.shape
        packed = fmt.pack(w)
        self.packed_zeros = packed.zeros
        self.zeros = None if packed.zeros is None else packed.zeros.float().mT.contiguous()
        self._set_scales(packed.scales)

    def wider(self, times: float) -> "Grid":
        """This grid with float16 scales so many times as large (at most the largest that there is)."""
        other = copy(self)
        other._set_scales((self.packed_scales.float() * times).clamp(-FLOAT16_MAX, FLOAT16_MAX).half())
        return other

    def rows_of(self, grids: Sequence["Grid"], choice: Tensor) -> "Grid":
        """Row r of matrix g from grids[choice[g, r]]: grids of the same weights."""
        other = copy(self)
        other._set_scales(chosen([grid.packed_scales for grid in grids], choice))
        return other

    def round(self, w: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """w [G, R], the columns `column` [G] of each matrix, to nearest -> codes uint8 and values float32 [G, R]."""
        scale = self._of_group(self.scales, column)
        level = torch.where(scale == 0, 0, w / torch.where(scale == 0, 1, scale))
        if self.format.name == "mxfp4":
            code = torch.bucketize(level.abs(), _E2M1_BOUNDS)
            value = _E2M1[code].copysign(level)
            return (code + 8 * level.signbit()).to(torch.uint8), value * scale
        if self.zeros is not None:
            zero = self._of_group(self.zeros, column)
            code = (level.round() + zero).clamp(0, 15)
            return code.to(torch.uint8), (code - zero) * scale
        low, high, offset = _LEVELS[self.format.name]
        level = level.round().clamp(low, high)
        return (level + offset).remainder(256).to(torch.uint8), level * scale

    def pack(self, codes: Tensor) -> PackedTensor:
        """codes uint8 [G, R, C] -> the tensor in the format."""
        packed = torch.from_numpy(_C.pack_codes(self.format.name, flat(codes).numpy(), torch.get_num_threads()))
        shaped = packed.view(*codes.shape[:-1], packed.shape[-1])
        return PackedTensor(self.format, self.columns, shaped, self.packed_scales, self.packed_zeros)

    def _set_scales(self, scales: Tensor) -> None:
        self.packed_scales = scales
        exponents = scales.dtype == torch.uint8
        # [G, groups, R]: the rows of a group lie together.
        self.scales = (_power_of_two(scales) if exponents else scales.float()).mT.contiguous()

    def _of_group(self, part: Tensor, column: Tensor) -> Tensor:
        return part[torch.arange(len(column)), column // (self.format.group or self.columns)]


class SubOneGrid:
    """The three values of each row of w [G, R, C] in QMoE's code: its extremes and 0; codes are digits."""

    def __init__(self, w: Tensor):
        low, high = row_limits(w.float())
        self.minmax = torch.cat([low, high], -1).bfloat16()
        self.low, self.high = low[..., 0], high[..., 0]

    def round(self, w: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """As Grid.round; a row without negative (positive) weights never gets a low (high)."""
        is_low, is_high = (w < self.low / 2) & (self.low < 0), (w > self.high / 2) & (self.high > 0)
        low, high = self.minmax.float().unbind(-1)
        value = torch.where(is_low, low, torch.where(is_high, high, 0.0))
        return is_low.to(torch.uint8) + 2 * is_high.to(torch.uint8), value

    def pack(self, codes: Tensor) -> SubOneBitTensor:
        return SubOneBit().encode(codes, self.minmax)


def grids_of(fmt: RowFormat | SubOneBit, w: Tensor) -> list[Grid] | list[SubOneGrid]:
    """The grids among which each row may choose.

    Three values at the scale of rounding cut off what is beyond them, and what makes up for other errors soon is: with
    ternary formats wider grids are tried too (docs/quantized.md has what that changes).
    """
    if isinstance(fmt, SubOneBit):
        return [SubOneGrid(w)]
    grid = Grid(fmt, w)
    return [grid, *(grid.wider(times) for times in WIDTHS)] if fmt.name in ("ternary2", "ternary5") else [grid]


def chosen(parts: Sequence[Tensor], choice: Tensor) -> Tensor:
    """parts[choice[g, r]][g, r] of parts [G, R, n]."""
    picked = parts[0].clone()
    for i, part in enumerate(parts):
        picked[choice == i] = part[choice == i]
    return picked


def _power_of_two(scales: Tensor) -> Tensor:
    """2^(scale - 127) exactly; that of 0 is subnormal."""
    return torch.ldexp(torch.ones_like(scales, dtype=torch.float64), scales.int() - 127).float()
