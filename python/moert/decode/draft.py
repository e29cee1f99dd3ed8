"""Drafts for speculative decoding: tokens that are cheap to guess, and the distribution that they were drawn from."""

from collections import Counter, defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moert.decode.cached import CachedModel


class ModelDraft:
    """A smaller language model with the target's vocabulary."""

    def __init__(self, model: nn.Module):
        self.model = CachedModel(model)

    def propose(
        self, tokens: list[int], count: int, temperature: float, generator: torch.Generator | None
    ) -> tuple[list[int], Tensor | None]:
        """Up to `count` tokens after `tokens`, and the distributions [count, V] they were drawn from.

        temperature 0 takes the best token each time; None for the distributions says that each token was certain.
        """
        drafted, distributions = [], []
        for _ in range(count):
            (logits,) = self.model.logits([*tokens, *drafted], 1)
            if temperature == 0:
                drafted.append(logits.argmax().item())
            else:
                distributions.append((logits / temperature).softmax(-1))
                drafted.append(torch.multinomial(distributions[-1], 1, generator=generator).item())
        return drafted, torch.stack(distributions) if distributions else None


class NGramDraft:
    """What followed most often after the last `order`, or fewer, tokens, in the text given and in what is decoded."""

    def __init__(self, order: int = 4, text: Iterable[int] = ()):
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}")
        self.order = order
        self._followers: dict[tuple[int, ...], Counter] = defaultdict(Counter)
        self._seen: list[int] = []
        self._observe(list(text))
        self._seen = []

    def _observe(self, tokens: list[int]) -> None:
        """Counts what is new in tokens, which begins with what was seen before."""
        for end in range(len(self._seen), len(tokens)):
            for n in range(1, min(self.order, end) + 1):
                self._followers[tuple(tokens[end - n : end])][tokens[end]] += 1
        self._seen = list(tokens)

    def propose(
        self, tokens: list[int], count: int, temperature: float, generator: torch.Generator | None
    ) -> tuple[list[int], Tensor | None]:
        """As ModelDraft.propose; shorter where nothing is known to follow."""
        if tokens[: len(self._seen)] != self._seen:
            self._seen = []
        self._observe(tokens)
        drafted: list[int] = []
        while len(drafted) < count and (token := self._next([*tokens[-self.order :], *drafted])) is not None:
            drafted.append(token)
        return drafted, None

    def _next(self, tokens: list[int]) -> int | None:
        for n in range(min(self.order, len(tokens)), 0, -1):
            if followers := self._followers.get(tuple(tokens[-n:])):
                return max(followers.items(), key=lambda item: (item[1], -item[0]))[0]
        return None
