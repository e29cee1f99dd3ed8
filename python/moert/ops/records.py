"""Rows as they travel, with their routing or, going home, with gradients of it: csrc/moert/dispatch.h.

Letters: T tokens, k choices, N records sent, M received; a record is bytes, a multiple of 16 of them.
"""

import torch
from torch import Tensor

from moert.ops.permute import unpermute
from moert.types import DispatchPlan


def record_bytes(dtype: torch.dtype, weight_dtype: torch.dtype, H: int, k: int, ids: bool = True) -> int:
    """The size of a row as it travels, with its ids or (gradients) without: csrc/moert/dispatch.h."""
    return max(1, _ids_at(dtype, weight_dtype, H, k) + 2 * k * ids) + 15 & ~15


def _ids_at(dtype, weight_dtype, H, k):
    return _weights_at(dtype, weight_dtype, H) + k * weight_dtype.itemsize


def _weights_at(dtype, weight_dtype, H):
    return -(-H * dtype.itemsize // weight_dtype.itemsize) * weight_dtype.itemsize


def fields_of(records: Tensor, dtype, weight_dtype, H: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [N, H], weights [N, k] and ids [N, k] where they lie in the records."""
    ids = _ids_at(dtype, weight_dtype, H, k)
    return *numbers_of(records, dtype, weight_dtype, H, k), records[:, ids : ids + 2 * k].view(torch.int16)


def numbers_of(records: Tensor, dtype, weight_dtype, H: int, k: int) -> tuple[Tensor, Tensor]:
    """Rows and weights, or their gradients, where they lie in the records."""
    weights = _weights_at(dtype, weight_dtype, H)
    return (
        records[:, : H * dtype.itemsize].view(dtype),
        records[:, weights : weights + k * weight_dtype.itemsize].view(weight_dtype),
    )


def gradient_records(drows: Tensor, dweights: Tensor, ids: Tensor, needs) -> Tensor:
    """Gradients of rows [M, H] and, where they are needed, of their weights [M, k], as they travel home."""
    (M, H), k = drows.shape, dweights.shape[1] if needs[1] else 0
    kind = drows.dtype, dweights.dtype, H, k
    records = drows.new_empty(M, record_bytes(*kind, ids=False), dtype=torch.uint8)
    to_rows, to_weights = numbers_of(records, *kind)
    to_rows.copy_(drows)
    # Each choice has its gradient from the one copy that came for it.
    to_weights.copy_(torch.where(ids >= 0, dweights, 0)[:, :k])
    return records


def gradients_of(records: Tensor, types, shapes, plan: DispatchPlan, needs) -> tuple[Tensor | None, Tensor | None]:
    """What arrives home of x [T, H] and of the weights [T, k], added up."""
    (_, H), (_, k) = shapes
    drows, dweights = numbers_of(records, *types, H, k if needs[1] else 0)
    pairs = zip((drows, dweights), needs, strict=True)
    return tuple(unpermute(rows, plan) if needed else None for rows, needed in pairs)
