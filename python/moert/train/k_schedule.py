"""How many experts a token uses, as training goes on or as a caller asks (SMoE-Dropout, arXiv:2303.01610)."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from moert.routers.within import routers_in

_LADDER = (1, 2, 4, 8, 16)


def _rung(s: float) -> int:
    return min(int(5 * s), 4)


# mode -> (share s of the steps done, k_min, k_max) -> k before rounding and clipping.
MODES: dict[str, Callable[[float, int, int], float]] = {
    "linear_increase": lambda s, low, high: low + (high - low) * s,
    "linear_decrease": lambda s, low, high: high - (high - low) * s,
    "cosine_increase": lambda s, low, high: high - (high - low) * math.cos(math.pi * s / 2),
    "cosine_decrease": lambda s, low, high: low + (high - low) * math.cos(math.pi * s / 2),
    "exp_increase": lambda s, low, high: high - (high - low) * 0.99 ** math.floor(300 * s + 1e-9),
    "multi_step_increase": lambda s, low, high: _LADDER[_rung(s)],
    "multi_step_decrease": lambda s, low, high: _LADDER[4 - _rung(s)],
}


def set_active_experts(model: nn.Module, k: int) -> int:
    """Set k of every router of the model that has one; returns how many there are.  Nothing caches k."""
    routers = [router for router in routers_in(model).values() if hasattr(router, "k")]
    if not routers:
        raise ValueError("model must have a router with a k, got none")
    most = min(router.num_experts for router in routers)
    if not 1 <= k <= most:
        raise ValueError(f"k must be in [1, {most}], got {k}")
    for router in routers:
        router.k = k
    return len(routers)


class KSchedule:
    """Sets k of every router of the model from k_min to k_max (or back) over total_steps calls of step().

    Halves round up: k(s) = floor(x + 0.5), where Python's round would take the even neighbour.
    """

    def __init__(self, model: nn.Module, k_min: int, k_max: int, total_steps: int, mode: str = "linear_increase"):
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode}")
        if not 1 <= k_min <= k_max:
            raise ValueError(f"k_min must be in [1, k_max={k_max}], got {k_min}")
        if total_steps < 0:
            raise ValueError(f"total_steps must not be negative, got {total_steps}")
        self.model, self.k_min, self.k_max, self.total_steps, self.mode = model, k_min, k_max, total_steps, mode
        self.steps, self._accumulating = 0, False
        set_active_experts(model, k_max)  # is it possible at all?
        set_active_experts(model, self.k_at(0))

    def k_at(self, step: int) -> int:
        if self.total_steps == 0:
            return self.k_max
        k = MODES[self.mode](min(step / self.total_steps, 1.0), self.k_min, self.k_max)
        return min(max(math.floor(k + 0.5), self.k_min), self.k_max)

    def step(self) -> int:
        """After the optimizer's step; the k of the next."""
        if self._accumulating:
            raise RuntimeError("step() must be called outside accumulating(), got a call between two parts of one step")
        self.steps += 1
        set_active_experts(self.model, self.k_at(self.steps))
        return self.k_at(self.steps)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Around the forwards and backwards of one optimizer step, which must all have one k."""
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False

    def state_dict(self) -> dict:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        set_active_experts(self.model, self.k_at(self.steps))
