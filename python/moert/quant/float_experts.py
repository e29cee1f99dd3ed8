"""One layer's experts packed by what they see: GPTQ over the rows that the routing sends to each.

Letters as in moert.types; place 0 is the product with H columns (w1), place 1 the one with I (w2).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moert.ops.permute import permute_plan
from moert.quant.format import Format, PackedTensor
from moert.quant.gptq import GPTQ, gptq
from moert.quant.sub1 import SubOneBit, SubOneBitTensor

PackFormat = Format | SubOneBit
Packed = PackedTensor | SubOneBitTensor

_CHUNK = 4096  # rows in float32 at once


class FloatExperts(ABC):
    """The experts of a module as calibration reads them, and what it does with the packed ones."""

    module: nn.Module
    shapes: tuple[torch.Size, torch.Size]  # [E, 2I, H] and [E, H, I]

    @abstractmethod
    def inputs(self, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """What the module is called with -> x [T, H] and ids [T, k]."""

    @abstractmethod
    def matrix(self, place: int, e: int) -> Tensor:
        """The weight of expert e, float32 [rows, columns], as it is packed."""

    @abstractmethod
    def middle(self, h: Tensor, e: int) -> Tensor:
        """x w1ᵀ of expert e [n, 2I] -> what its second product multiplies, float32 [n, I]."""

    @abstractmethod
    def replace(self, packed: tuple[Packed, Packed]) -> None:
        """The packed weights in place of the float ones."""


@dataclass(frozen=True)
class LayerReport:
    """How the experts of a module came to their codes: the rows each saw, and those with too few: only rounded."""

    name: str
    rows: tuple[int, ...]
    rounded: tuple[int, ...]


@torch.no_grad()
def pack_experts(
    experts: FloatExperts,
    x: Tensor,
    ids: Tensor,
    formats: tuple[PackFormat, PackFormat],
    settings: GPTQ = GPTQ(),
    on_experts: Callable[[int], None] = lambda count: None,
) -> tuple[tuple[Packed, Packed], tuple[int, ...]]:
    """x [T, H] and ids [T, k] of the calls -> both weights packed, and the rows of each expert.

    w1 sees the rows that the routing gives its expert, w2 what the packed w1 and the gate make of them.  As many
    experts at a time as settings.memory holds the Hessians of; on_experts hears how many are done.
    """
    E = experts.shapes[0][0]
    plan = permute_plan(ids, E)
    tokens = [plan.tokens[a:b].long() for a, b in pairwise(plan.offsets.tolist())]
    pieces = [], []
    columns = max(shape[2] for shape in experts.shapes)
    together = max(1, settings.memory // (8 * columns**2))  # the Hessian and its factor
    for start in range(0, E, together):
        group = range(start, min(start + together, E))
        first = _pack_group(experts, 0, group, lambda e: _rows(x, tokens[e]), tokens, formats[0], settings)
        w1 = formats[0].unpack(first)

        def hidden(e):
            return (experts.middle(F.linear(rows, w1[e - start]), e) for rows in _rows(x, tokens[e]))

        second = _pack_group(experts, 1, group, hidden, tokens, formats[1], settings)
        pieces[0].append(first)
        pieces[1].append(second)
        on_experts(len(group))
    packed = tuple(fmt.join(each) for fmt, each in zip(formats, pieces, strict=True))
    return packed, tuple(map(len, tokens))


def round_experts(experts: FloatExperts, formats: tuple[PackFormat, PackFormat]) -> tuple[Packed, Packed]:
    """Both weights rounded to nearest, an expert at a time."""
    E = experts.shapes[0][0]
    return tuple(
        fmt.join([fmt.pack(experts.matrix(place, e)[None]) for e in range(E)]) for place, fmt in enumerate(formats)
    )


def _pack_group(experts, place, group, rows_of, tokens, fmt, settings) -> Packed:
    """One weight of the experts in group; rows_of(e) are those that it multiplies."""
    columns = experts.shapes[place][2]
    hessians = torch.zeros(len(group), columns, columns)
    for hessian, e in zip(hessians, group, strict=True):
        if len(tokens[e]) < settings.min_rows:
            hessian.fill_diagonal_(1)  # rounds
            continue
        for rows in rows_of(e):
            hessian.addmm_(rows.T, rows)
        if not hessian.isfinite().all():
            raise ValueError(f"calibration must give expert {e} finite rows, got inf or nan")
        if not hessian.any():
            hessian.fill_diagonal_(1)  # every row is zero: nothing to make up for
    return gptq(torch.stack([experts.matrix(place, e) for e in group]), hessians, fmt, settings)


def _rows(x: Tensor, tokens: Tensor) -> Iterator[Tensor]:
    return (x[chunk].float() for chunk in tokens.split(_CHUNK))
