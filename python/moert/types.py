"""The values that pass between routers, experts and layers.  Letters: T tokens, k choices per token, E experts."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Where each token goes: ids [T, k] of any integer dtype, weights [T, k]; ids outside [0, num_experts) are dropped.

    logits [T, E] are kept where a loss needs them; losses maps names to scalars that training adds to its loss; state
    is what the router of the next layer, or this one at the next token, wants to know.  plan is the ids' DispatchPlan
    where the router has it already, as expert choice does: experts then read their tokens without a sort, and what they
    keep for the backward pass has plan.tokens' number of rows, not T * k.
    """

    ids: Tensor
    weights: Tensor
    num_experts: int
    logits: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    state: Any = None
    plan: "DispatchPlan | None" = None

    def dense_weights(self) -> Tensor:
        """[T, E]: the weight that each expert has for each token, 0 where it was not chosen; weights of repeats add."""
        T, E = self.ids.shape[0], self.num_experts
        return self.weights.new_zeros(T, E + 1).scatter_add(1, self._columns(), self.weights)[:, :E]

    def members(self) -> Tensor:
        """bool [T, E]: whether each expert was chosen for each token, whatever its weight."""
        T, E = self.ids.shape[0], self.num_experts
        return torch.zeros(T, E + 1, dtype=torch.bool, device=self.ids.device).scatter(1, self._columns(), True)[:, :E]

    def _columns(self) -> Tensor:
        """ids, int64; those that are dropped are E."""
        ids = self.ids.long()
        return torch.where((ids >= 0) & (ids < self.num_experts), ids, self.num_experts)


@dataclass(frozen=True)
class DispatchPlan:
    """Rows in expert order (S slots): offsets [E+1], tokens [S], slots [T, k], all int32.

    Expert e owns slots offsets[e] .. offsets[e+1]-1, in token order; tokens[s] is the token of slot s, -1 where it has
    none; slots[t, j] is the slot of choice j of token t, -1 where the choice was dropped.  S is T*k, a bound on the
    choices that are kept, or E*capacity.
    """

    offsets: Tensor
    tokens: Tensor
    slots: Tensor


@dataclass(frozen=True)
class Onto:
    """What is added to the sum over a token's choices: scale[t] * rows[t] + sum over c of mix[t, c] * constants[c].

    rows [T, H] and constants [C, H] have the dtype of the experts' x, scale [T] and mix [T, C] that or float32 (float64
    for float64); all are optional, a scale goes with rows and is one by default, mix and constants go together.
    """

    rows: Tensor | None = None
    scale: Tensor | None = None
    mix: Tensor | None = None
    constants: Tensor | None = None

    def added_to(self, y: Tensor) -> Tensor:
        """y [T, H] plus all this, for experts that do not add it themselves."""
        if self.rows is not None:
            y = y + (self.rows if self.scale is None else self.scale[:, None].to(y.dtype) * self.rows)
        return y if self.mix is None else y + self.mix.to(y.dtype) @ self.constants.to(y.dtype)


ACTIVATIONS = (
    *("swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_clamped", "swiglu_oai"),
    *("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"),
)


@dataclass(frozen=True)
class Activation:
    """What happens between the two GEMMs of an expert, computed in float32.

    Gated, with g the gate and u the up half of the first GEMM: swiglu silu(g)*u; geglu gelu(g)*u; geglu_tanh;
    reglu relu(g)*u; swiglu_clamped silu(min(g, limit)) * clamp(u, -limit, limit) (DeepSeek-V4);
    swiglu_oai g*sigmoid(alpha*g)*(u+1) of g and u clamped likewise (gpt-oss).
    Not gated: silu, gelu, gelu_tanh, relu, relu2 (relu squared), identity.
    """

    name: str = "swiglu"
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self):
        if self.name not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.name}")
        if not self.limit >= 0:  # below, a clamp between -limit and limit has no meaning that all agree on
            raise ValueError(f"limit must be at least 0, got {self.limit}")

    @classmethod
    def of(cls, activation: "str | Activation") -> "Activation":
        """A name stands for the activation with its default numbers."""
        if isinstance(activation, str):
            return cls(activation, 1.702, 7.0)  # a field's default would be a variable to torch 2.11's compiler
        if not isinstance(activation, cls):
            raise TypeError(f"activation must be a name or an Activation, got {type(activation).__name__}")
        return activation

    @property
    def gated(self) -> bool:
        return "glu" in self.name


@dataclass(frozen=True)
class ExpertLayout:
    """How expert weights lie in memory: Hugging Face's w1 [E, 2I, H], w2 [E, H, I] unless a flag says otherwise.

    transposed: w1 [E, H, 2I], w2 [E, I, H].  interleaved: gate and up alternate along 2I, instead of all gates first.
    """

    transposed: bool = False
    interleaved: bool = False


@dataclass(frozen=True)
class GroupLimit:
    """Experts in num_groups equal contiguous groups, of which a token uses only its topk_groups best.

    A group is as good as the sum of its two best experts (score "top2", DeepSeek-V3) or as its best one ("max",
    DeepSeek-V2).
    """

    num_groups: int
    topk_groups: int
    score: str = "top2"


FREE_KINDS = ("zero", "copy", "const")


def check_kinds(kinds: list[str] | tuple[str, ...]) -> int:
    """How many experts are feed-forward networks ("ffn"), which must come first; the others cost next to nothing."""
    num_ffn = next((i for i, kind in enumerate(kinds) if kind != "ffn"), len(kinds))
    for i, kind in enumerate(kinds):
        if i >= num_ffn and kind not in FREE_KINDS:
            raise ValueError(f"kinds[{i}] must be {', '.join(FREE_KINDS)} after the first ffn experts, got {kind}")
    return num_ffn
