"""Mixed-integer linear programs by HiGHS (the package highspy)."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Program:
    """min cost . x over low <= x <= high, rows of sum(values * x[columns]) between bounds; integer marks columns."""

    cost: np.ndarray
    high: np.ndarray
    integer: np.ndarray
    rows: list[tuple[np.ndarray, np.ndarray, float, float]] = field(default_factory=list)

    def add(self, columns, values, low: float, high: float) -> None:
        columns = np.asarray(columns, dtype=np.int32)
        self.rows.append((columns, np.broadcast_to(np.asarray(values, dtype=float), columns.shape), low, high))


@dataclass(frozen=True)
class Solution:
    """gap is (value - bound) / |value|: how much better an optimum could be at most; 0 where it is one."""

    x: np.ndarray
    value: float
    gap: float


def solve(
    program: Program, start: np.ndarray, time_limit: float, gap: float, enough: float = 0.0, threads: int = 1
) -> Solution:
    """The best x found in time_limit seconds, at worst `start`, which must be feasible.

    The search ends early where an optimum could be better by no more than `gap` of the value, or by `enough`.
    """
    highs, model = solver(), _model(program)
    for name, value in {
        "mip_rel_gap": float(gap),
        "mip_abs_gap": max(1e-6, float(enough)),
        "time_limit": float(time_limit),
        "threads": threads,
        "random_seed": 0,
    }.items():
        highs.setOptionValue(name, value)
    highs.passModel(model)
    highs.setSolution(len(start), np.arange(len(start), dtype=np.int32), np.asarray(start, dtype=float))
    highs.run()
    x, info = np.asarray(highs.getSolution().col_value), highs.getInfo()
    value = float(program.cost @ start)
    if len(x) == len(start) and info.primal_solution_status == 2 and float(program.cost @ x) <= value:
        value, start = float(program.cost @ x), x
    bound = float(info.mip_dual_bound)
    left = max(0.0, value - bound) if np.isfinite(bound) else float("inf")
    return Solution(start, value, left / max(abs(value), 1e-12) if left > 1e-6 else 0.0)


def solver():
    """HiGHS without its banner; ImportError where it is not installed."""
    try:
        import highspy
    except ImportError as error:
        raise ImportError(f"placement needs highspy, got none: pip install 'moert[place]' ({error})") from error

    class Quiet(highspy.Highs):
        def enableCallbacks(self):  # the last step of the constructor, which else prints a banner
            self.silent()
            super().enableCallbacks()

    return Quiet()


def _model(program: Program):
    import highspy

    model = highspy.HighsLp()
    columns, values, low, high = zip(*program.rows, strict=True)
    model.num_col_, model.num_row_ = len(program.cost), len(program.rows)
    model.col_cost_, model.col_lower_, model.col_upper_ = program.cost, np.zeros(len(program.cost)), program.high
    model.row_lower_, model.row_upper_ = np.array(low, dtype=float), np.array(high, dtype=float)
    kinds = highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger
    model.integrality_ = [kinds[int(whole)] for whole in program.integer]
    matrix = model.a_matrix_
    matrix.format_ = highspy.MatrixFormat.kRowwise
    matrix.start_ = np.cumsum([0, *map(len, columns)]).astype(np.int32)
    matrix.index_, matrix.value_ = np.concatenate(columns), np.concatenate(values)
    return model
