"""Low-rank adapters over frozen packed experts: W x + scaling · B A x, in slots (LoRA, arXiv 2106.09685).

Letters as in moert.types; r the rank, w1 and w2 the products with H and I columns.
"""

from collections.abc import Callable, Sequence
from math import sqrt

import torch
from torch import Tensor, nn

from moert.experts.packed_linear import packed_linear
from moert.ops.grouped_gemm import grouped_gemm
from moert.ops.permute import plan_of, unpermute
from moert.quant.format import PackedTensor
from moert.types import Routing


class ExpertLora(nn.Module):
    """The adapter of one weight [E, N, K]: A [E, r, K] uniform as in nn.Linear, B [E, N, r] zero, in float32."""

    def __init__(self, shape: Sequence[int], rank: int, alpha: float):
        super().__init__()
        E, N, K = shape
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.scaling = alpha / rank
        self.A = nn.Parameter(torch.empty(E, rank, K).uniform_(-1 / sqrt(K), 1 / sqrt(K)))
        self.B = nn.Parameter(torch.zeros(E, N, rank))

    def forward(self, x: Tensor, offsets: Tensor, tokens: Tensor | None = None) -> Tensor:
        """What is added to the rows of grouped_gemm with the same arguments."""
        low = grouped_gemm(x, self.A.to(x.dtype), offsets, tokens=tokens)
        return self.scaling * grouped_gemm(low, self.B.to(x.dtype), offsets)

    def extra_repr(self) -> str:
        return f"rank={self.A.shape[1]}, scaling={self.scaling:g}"


class PackedWeights:
    """What modules over packed weights share, beside nn.Module: adapters, and a forward product by product."""

    def packed_pair(self) -> tuple[PackedTensor, PackedTensor]:
        """w1 [E, 2I, H] and w2 [E, H, I]."""
        raise TypeError(f"{type(self).__name__} must define packed_pair()")

    @property
    def adapters(self) -> tuple[ExpertLora | None, ExpertLora | None]:
        return getattr(self, "lora_w1", None), getattr(self, "lora_w2", None)

    def run_unfused(
        self, x: Tensor, routing: Routing, bias: tuple[Tensor | None, Tensor | None], gate: Callable, last: Callable
    ) -> Tensor:
        """gate: [S, 2I] -> [S, I] between the products, last: [S, H] before the weighted sum.  Full precision."""
        plan = plan_of(routing)
        first, second = self.adapters
        w1, w2 = self.packed_pair()
        h_SI = packed_linear(x, w1, plan.offsets, bias[0], plan.tokens)
        if first is not None:
            h_SI = h_SI + first(x, plan.offsets, plan.tokens)
        h_SI = gate(h_SI)
        y_SH = packed_linear(h_SI, w2, plan.offsets, bias[1])
        if second is not None:
            y_SH = y_SH + second(h_SI, plan.offsets)
        return unpermute(last(y_SH), plan, routing.weights).to(x.dtype)


def add_lora_(model: nn.Module, rank: int = 8, alpha: float = 16.0, freeze: bool = True) -> list[str]:
    """Gives both weights of all packed experts in the model an adapter; returns the modules' names.

    freeze: parameters without "lora_" in their names, as adapters have it, PEFT's too, stop requiring gradients.
    The outputs stay as they were until training moves B from zero, but for the precision of the rows, now "full".
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, PackedWeights)}
    if not found:
        raise ValueError(f"model must hold packed experts (quantize_), got none in {type(model).__name__}")
    for name, module in found.items():
        if any(module.adapters):
            raise ValueError(f"model must have no adapters yet, got some in {name}")
    for module in found.values():
        for place, weight in zip(("lora_w1", "lora_w2"), module.packed_pair(), strict=True):
            module.add_module(place, ExpertLora(weight.shape, rank, alpha))
    if freeze:
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.requires_grad_(False)
    return list(found)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters of packed experts alone, by their names in the model: what to save."""
    adapters = [name for name, module in model.named_modules() if isinstance(module, ExpertLora)]
    return {f"{name}.{part}": getattr(model.get_submodule(name), part).detach() for name in adapters for part in "AB"}


@torch.no_grad()
def load_lora_(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies what lora_state_dict gave into a model with adapters of the same places and rank (add_lora_)."""
    mine = lora_state_dict(model)
    if mine.keys() != state.keys():
        other = sorted(mine.keys() ^ state.keys())
        raise ValueError(f"state must hold the model's {len(mine)} adapter weights, got a difference in {other[0]}")
    for name, value in state.items():
        if value.shape != mine[name].shape:
            raise ValueError(f"{name} must have shape {list(mine[name].shape)}, got {list(value.shape)}")
    for name, value in state.items():
        mine[name].copy_(value)
