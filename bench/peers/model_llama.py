"""llama.cpp, of a GGUF file: one sequence, greedy, as bench/whole_models.py asks for it."""

import time

import numpy as np
from llama_library import Llama, library

CONTEXT = 1024  # tokens
library()  # an import, of which the model takes no part


class Model:
    def __init__(self, spec: dict, threads: int):
        self.llama = Llama(spec["path"], threads, CONTEXT)
        self.weight_bytes = self.llama.weight_bytes

    def prefill(self, ids: list[int]) -> float:
        """Seconds until the first new token is known."""
        self.llama.forget()
        start = time.perf_counter()
        self._next(ids)
        return time.perf_counter() - start

    def decode(self, ids: list[int], count: int) -> list[float]:
        """Seconds of every new token but the first."""
        self.llama.forget()
        token, times = self._next(ids), []
        for _ in range(count - 1):
            start = time.perf_counter()
            token = self._next([token])
            times.append(time.perf_counter() - start)
        return times

    def logits(self, ids: list[int], prompt: int) -> np.ndarray:
        """[len(ids) - prompt + 1, vocabulary]: after the first `prompt` ids and after each one more."""
        self.llama.forget()
        rows = [self.llama.follow(ids[:prompt]).copy()]
        return np.stack(rows + [self.llama.follow([token]).copy() for token in ids[prompt:]])

    def _next(self, ids: list[int]) -> int:
        return int(self.llama.follow(ids).argmax())
