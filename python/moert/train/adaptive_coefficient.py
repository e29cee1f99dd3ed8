"""BlockFFN's coefficient of the chunk sparsification loss (arXiv:2507.08771): it follows how the loss moves."""

from statistics import fmean


class AdaptiveCoefficient:
    """A loss coefficient: `initial` for `hold` steps, then moved linearly to a new target every `every` steps.

    The target is the coefficient times q, the mean loss of the last `every` steps over that of the `every` before: a
    falling loss lowers it by as much, a rising one raises it by min_factor at least; never above max_factor * initial.
    """

    def __init__(
        self,
        initial: float,
        hold: int = 1000,
        every: int = 100,
        min_factor: float = 1.025,
        max_factor: float = 4.0,
    ):
        if initial <= 0:
            raise ValueError(f"initial must be positive, got {initial}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if hold < 2 * every:
            raise ValueError(f"hold must be at least 2 * every = {2 * every}, got {hold}")
        self.initial, self.hold, self.every = initial, hold, every
        self.min_factor, self.max_factor = min_factor, max_factor
        self.value, self.steps = initial, 0
        self._start = self._target = initial
        self._losses: list[float] = []

    def step(self, loss: float) -> float:
        """Takes the loss of this step, without its coefficient; returns the coefficient of the next."""
        self.steps += 1
        self._losses = [*self._losses, float(loss)][-2 * self.every :]
        since = self.steps - self.hold
        if since < 0:
            return self.value
        if since % self.every == 0:
            self._start, self._target = self._target, min(self._target * self._factor(), self.max_factor * self.initial)
        self.value = self._start + (self._target - self._start) * (since % self.every) / self.every
        return self.value

    def _factor(self) -> float:
        before, last = fmean(self._losses[: self.every]), fmean(self._losses[self.every :])
        if before == 0:
            return 1.0
        q = last / before
        return max(self.min_factor, q) if q > 1 else q

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)
