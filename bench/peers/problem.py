"""One MoE layer as every peer computes it, from numpy alone, so that each environment makes the same numbers.

Letters: T tokens, H hidden, I intermediate, E experts, k choices per token.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

# The limits that the machine is measured by: a stream that no cache holds, square products of torch, and as many
# operations as one of those from registers alone, which no product exceeds but by wider instructions.
READ_BYTES = 4 * 2**26
PRODUCT_SIZE = 1536
PRODUCT_FLOP = 2 * PRODUCT_SIZE**3
LIMITS = ("read", "FMA peak", "int8 peak", "product", "bfloat16 product", "int8 product")
ROUTINGS = 8  # calls rotate through them: the weights of one call are not left in a cache by the one before

FLOATS = ("bfloat16", "float32")
FOUR_BITS = ("int4", "mxfp4", "bit_nested")
# Share of zeros among -1, 0 and 1 that these formats hold as they are; that of sub1 is the QMoE paper's.
TERNARY = {"ternary2": 0.38, "ternary5": 0.38, "sub1": 0.885}


@dataclass(frozen=True)
class Problem:
    """SwiGLU experts without bias; weights [E, 2I, H] and [E, H, I] in dtype, routing weights sum to one."""

    model: str
    H: int
    I: int
    E: int
    k: int
    T: int
    dtype: str  # float32, bfloat16, or a format of packed weights under float32 rows: "mxfp4", "int4:32" by 32 columns
    routing: str = "uniform"  # or zipf: expert e as likely as 1 / (e + 1)
    training: bool = False  # forward and the gradients of x, the routing weights and the weights

    @property
    def packed(self) -> bool:
        return self.dtype not in FLOATS

    @property
    def format(self) -> tuple[str, int | None]:
        """The name in dtype, and the columns of a scale where it says so."""
        name, _, group = self.dtype.partition(":")
        return name, int(group) if group else None

    @property
    def products(self) -> tuple[str, ...]:
        """The limits of LIMITS that bound it: packed weights are multiplied in int8 or, by some, in bfloat16.

        bfloat16 where the CPU has no arithmetic of it is multiplied as float32, and AMX exceeds both peaks.
        """
        named = {"float32": ("FMA peak",), "bfloat16": ("bfloat16 product", "FMA peak")}
        return named.get(self.dtype, ("int8 peak", "int8 product", "bfloat16 product"))

    @property
    def tolerance(self) -> float:
        """What the error of a row's output, relative to float32 throughout, stays below by rounding alone.

        Four bits err by 0.09 to 0.17 of a weight in each of three matrices, by 0.14 to 0.27 of the outputs and by 0.3
        of single rows; eight bits, bfloat16 and weights that their format holds exactly by about 0.03.  One wrong
        expert of four is off by 0.5, swapped gates and ups by 0.7, choices weighted alike by 0.6 at T = 16, zeros by 1.
        A gradient's row has been rounded to bfloat16 four times, by up to 0.06.
        """
        if self.format[0] in FOUR_BITS:
            return 0.4
        return 0.1 if self.training else 0.05

    def of_weights(self) -> "Problem":
        """Equal for all problems with the same weights."""
        return replace(self, T=0, routing="uniform", training=False)

    def windows(self) -> list[np.ndarray]:
        """Views [E, 2I, H] and [E, H, I] in float32: every expert is a window of one random stream, made quickly."""
        rng = np.random.default_rng(0)
        views = []
        for rows, columns in ((2 * self.I, self.H), (self.H, self.I)):
            stream = rng.standard_normal(rows * columns + 64 * self.E, dtype=np.float32)
            if self.format[0] in TERNARY:
                stream = _ternary(stream, TERNARY[self.format[0]])
            stream *= np.float32(columns**-0.5)
            steps = (64 * 4, columns * 4, 4)
            views.append(np.lib.stride_tricks.as_strided(stream, (self.E, rows, columns), steps, writeable=False))
        return views

    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        w1, w2 = self.windows()
        return np.ascontiguousarray(w1), np.ascontiguousarray(w2)

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

    def reference(self) -> np.ndarray:
        """y [T, H] of the first routing, in float32 throughout."""
        x, (ids, shares) = self.x(), self.routings()[0]
        w1, w2 = self.windows()
        y = np.zeros_like(x)
        for e in np.unique(ids):
            token, choice = np.where(ids == e)  # an expert is chosen once by a token
            gate, up = np.split(x[token] @ w1[e].T, 2, axis=1)
            y[token] += shares[token, choice, None] * (gate / (1 + np.exp(-gate)) * up @ w2[e].T)
        return y

    def gradients(self) -> np.ndarray:
        """Of the first routing, where the gradient of y is one: those of x and of three rows of each expert's weights.

        [T + 3E, H]: first and last rows of w1, first rows of w2, cut or with zeros up to H; in float32 throughout.
        """
        x, (ids, shares) = self.x(), self.routings()[0]
        w1, w2 = self.windows()
        dx = np.zeros_like(x)
        first, last, down = np.zeros((3, self.E, self.H), np.float32)
        width = min(self.H, self.I)
        for e in np.unique(ids):
            token, choice = np.where(ids == e)
            rows, share = x[token], shares[token, choice, None]
            gate, up = np.split(rows @ w1[e].T, 2, axis=1)
            sigmoid = 1 / (1 + np.exp(-gate))
            act = gate * sigmoid * up
            dact = share * w2[e].sum(0)
            dgate, dup = dact * up * sigmoid * (1 + gate * (1 - sigmoid)), dact * gate * sigmoid
            dx[token] += np.concatenate([dgate, dup], 1) @ w1[e]
            first[e], last[e] = dgate[:, 0] @ rows, dup[:, -1] @ rows
            down[e, :width] = share[:, 0] @ act[:, :width]
        return np.concatenate([dx, first, last, down])

    @property
    def flop(self) -> float:
        return (3 if self.training else 1) * 2.0 * self.T * self.k * 3 * self.H * self.I

    def bytes(self, weight_bytes: int) -> float:
        """Of the experts in use, given those of all: a mean over the routings; trained, twice and all gradients."""
        used = float(np.mean([len(np.unique(ids)) for ids, _ in self.routings()]))
        return (2 * used + self.E if self.training else used) * weight_bytes / self.E


def _ternary(stream: np.ndarray, zeros: float) -> np.ndarray:
    """The signs of the largest numbers, so many of them zero; mean square 1."""
    bound = np.quantile(np.abs(stream[: 2**20]), zeros)
    return np.sign(stream) * (np.abs(stream) > bound) * np.float32((1 - zeros) ** -0.5)


_CACHES: list = []


def kept(make: Callable) -> Callable:
    """make(problem, …) of the weights alone, kept until `forget`: problems with the same ones follow each other."""
    cached = functools.lru_cache(maxsize=1)(make)
    _CACHES.append(cached)
    return lambda problem, *more: cached(problem.of_weights(), *more)


def forget() -> None:
    for cached in _CACHES:
        cached.cache_clear()
