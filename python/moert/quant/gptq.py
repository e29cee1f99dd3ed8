"""GPTQ (arXiv 2210.17323): weights rounded a column at a time, each error made up for by the columns still to come.

G matrices of R rows and C columns; H their Hessians, sums of x xᵀ over the rows x that a matrix multiplies.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moert.quant.format import PackedTensor, RowFormat
from moert.quant.grid import chosen, grids_of
from moert.quant.sub1 import SubOneBit, SubOneBitTensor


@dataclass(frozen=True)
class GPTQ:
    """How quantize_ calibrates: damp times the mean of H's diagonal is added to it; `block` columns at a time.

    act_order rounds the columns of the largest activations first (scales stay those of their groups).  An expert with
    fewer than min_rows rows of calibration is rounded to nearest.  memory bounds the bytes of the Hessians that are
    there at the same time (or one expert's).
    """

    damp: float = 0.01
    block: int = 128
    act_order: bool = True
    min_rows: int = 32
    memory: int = 2**30

    def __post_init__(self):
        if not 0 < self.damp < math.inf:
            raise ValueError(f"damp must be above 0 and finite, got {self.damp}")
        for name in ("block", "min_rows", "memory"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def gptq(
    w: Tensor, hessian: Tensor, fmt: RowFormat | SubOneBit, settings: GPTQ = GPTQ()
) -> PackedTensor | SubOneBitTensor:
    """w [G, R, C] in the format, such that tr((w - q) H (w - q)ᵀ) is small; hessian [G, C, C], positive semidefinite.

    Scales and zeros are those of rounding to nearest; a row in ternary may take wider ones, where that leaves less.  A
    Hessian that is a multiple of one gives exactly that rounding.
    """
    G, R, C = w.shape
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    order = torch.arange(C).expand(G, C)
    if settings.act_order:
        order = diagonal.argsort(dim=1, descending=True, stable=True)
    factor = torch.stack([inverse_factor(h[o][:, o], settings.damp) for h, o in zip(hessian, order, strict=True)])
    grids = grids_of(fmt, w)
    codes, costs = zip(*(_round_columns(w, factor, order, grid, settings.block) for grid in grids), strict=True)
    if len(grids) == 1:
        return grids[0].pack(codes[0])
    choice = torch.stack(costs).argmin(0)
    return grids[0].rows_of(grids, choice).pack(chosen(codes, choice))


def _round_columns(w: Tensor, factor: Tensor, order: Tensor, grid, block: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [G, R, C] and what they cost each row [G, R], in the damped Hessian; columns in order [G, C]."""
    G, R, C = w.shape
    left = w.float().mT.gather(1, order[:, :, None].expand(G, C, R))  # what is to be rounded, a column a row
    codes, cost = torch.empty(G, C, R, dtype=torch.uint8), left.new_zeros(G, R)
    for start in range(0, C, block):
        stop = min(start + block, C)
        errors = left.new_empty(G, stop - start, R)
        for i in range(start, stop):
            codes[:, i], value = grid.round(left[:, i], order[:, i])
            error = (left[:, i] - value) / factor[:, i, i, None]
            errors[:, i - start] = error
            left[:, i + 1 : stop].baddbmm_(factor[:, i, i + 1 : stop, None], error[:, None], alpha=-1)
        left[:, stop:].baddbmm_(factor[:, start:stop, stop:].mT, errors, alpha=-1)
        cost += errors.square().sum(1)
    return codes.gather(1, order.argsort(1)[:, :, None].expand(G, C, R)).mT, cost


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """The upper triangular U with UᵀU = (H + damp · mean(diag H) · I)⁻¹, float32 [C, C].

    Of H read backwards one Cholesky factor and its inverse: H itself is not inverted.  float64 inside.
    """
    damped = hessian.double()
    damped.diagonal().add_(damp * damped.diagonal().mean())
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=torch.float64), upper=True).float()
