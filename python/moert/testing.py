"""What tests and benches share: the error rule and random routings."""

import torch
from torch import Tensor


def row_error(out: Tensor, ref: Tensor) -> float:
    """Relative error of the worst row (token): a global norm cannot see one dropped token in thousands."""
    if out.numel() == 0:
        return 0.0
    out, ref = out.double().flatten(0, -2), ref.double().flatten(0, -2)
    size = ref.norm(dim=-1)
    # Rows that cancel to almost nothing are held to the error of a row of a thousandth of the largest.
    error = ((out - ref).norm(dim=-1) / size.clamp_min(max(1e-3 * size.max().item(), 1e-30))).max().item()
    return float("inf") if error != error else error


def assert_rows_close(out: Tensor, fn, *args, factor: float = 2.0, floor: float = 1e-6) -> None:
    """out is at most `factor` times further from fn(args in float64) than fn(args) itself, row by row.

    The floor is the rounding of a float32 sum: plain torch may be exact by luck.
    """

    def double(x):
        return x.double() if torch.is_tensor(x) and x.is_floating_point() else x

    ref, same = fn(*map(double, args)), fn(*args)
    assert out.shape == ref.shape, f"shape {list(out.shape)}, expected {list(ref.shape)}"
    got, allowed = row_error(out, ref), factor * row_error(same, ref) + floor
    assert got <= allowed, f"worst row is off by {got:.3g}, allowed {allowed:.3g} ({factor} x torch in {same.dtype})"
