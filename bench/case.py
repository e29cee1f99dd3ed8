"""What a bench file gives to run.py."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One problem: every provider is called with the same inputs and must give the same result.

    `moert` is among the providers and `torch`, eager and in the same dtype, is what it is compared with.  flop and
    bytes are what the forward cannot avoid: each input read once, the output written once.  A step forward and
    backward is three times that, for each product has two gradients, unless step_bytes says what it moves.  The bytes
    pass at the rate of a read, or of a copy where about as many are written.
    """

    inputs: tuple[Tensor, ...]
    providers: dict[str, Callable[..., Tensor]]
    flop: float
    bytes: float
    like: str = "read"  # or "copy"
    step_bytes: float | None = None
