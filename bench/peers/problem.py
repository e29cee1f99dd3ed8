"""One MoE layer as every peer computes it, from numpy alone, so that each environment makes the same numbers.

Letters: T tokens, H hidden, I intermediate, E experts, k choices per token.
"""

from dataclasses import dataclass

import numpy as np

# The two limits that the machine is measured by: a stream that no cache holds, and a square float32 product.
READ_BYTES = 4 * 2**26
PRODUCT_SIZE = 1536
PRODUCT_FLOP = 2 * PRODUCT_SIZE**3
ROUTINGS = 8  # calls rotate through them: the weights of one call are not left in a cache by the one before


@dataclass(frozen=True)
class Problem:
    """SwiGLU experts without bias; weights [E, 2I, H] and [E, H, I] in dtype, routing weights sum to one."""

    model: str
    H: int
    I: int
    E: int
    k: int
    T: int
    dtype: str  # float32 or bfloat16
    routing: str = "uniform"  # or zipf: expert e as likely as 1 / (e + 1)
    training: bool = False  # forward and the gradients of x, the routing weights and the weights

    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        """float32; every expert is a window of one random stream, which is made faster than as many numbers."""
        rng = np.random.default_rng(0)
        shapes = ((2 * self.I, self.H), (self.H, self.I))
        made = []
        for shape in shapes:
            size = shape[0] * shape[1]
            stream = rng.standard_normal(size + 64 * self.E, dtype=np.float32) * np.float32(shape[1] ** -0.5)
            made.append(np.stack([stream[64 * e : 64 * e + size].reshape(shape) for e in range(self.E)]))
        return made[0], made[1]

    def x(self) -> np.ndarray:
        return np.random.default_rng(1).standard_normal((self.T, self.H), dtype=np.float32)

    def routings(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids int32 [T, k], weights float32 [T, k]), ROUTINGS of them."""
        rng = np.random.default_rng(2)
        found = []
        for _ in range(ROUTINGS):
            noise = rng.gumbel(size=(self.T, self.E))
            if self.routing == "zipf":
                noise -= np.log(np.arange(1, self.E + 1))
            ids = np.argsort(-noise, axis=1)[:, : self.k].astype(np.int32)
            weights = rng.random((self.T, self.k), dtype=np.float32) + np.float32(0.1)
            found.append((ids, weights / weights.sum(1, keepdims=True)))
        return found

    @property
    def flop(self) -> float:
        return (3 if self.training else 1) * 2.0 * self.T * self.k * 3 * self.H * self.I

    @property
    def weight_bytes(self) -> int:
        return self.E * 3 * self.H * self.I * (4 if self.dtype == "float32" else 2)

    @property
    def bytes(self) -> float:
        """Of the weights of the experts in use, a mean over the routings; trained, twice and all gradients once."""
        used = float(np.mean([len(np.unique(ids)) for ids, _ in self.routings()]))
        matrices = 2 * used + self.E if self.training else used
        return matrices * 3 * self.H * self.I * (4 if self.dtype == "float32" else 2)
