"""The whole expert FFN in one operator: gather, GEMM, activation, GEMM, weighted combine.

Letters: T tokens, H hidden, I intermediate, E experts, k choices per token; 2I is I where the activation is not gated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moert.types import Activation, ExpertLayout, Routing


def fused_experts(
    x: Tensor,
    routing: Routing,
    w1: Tensor,
    w2: Tensor,
    bias: tuple[Tensor | None, Tensor | None] = (None, None),
    activation: str | Activation = "swiglu",
    layout: ExpertLayout = ExpertLayout(),
    scale_on: str = "output",
) -> Tensor:
    """y[t] = sum over j of weights[t, j] * FFN_ids[t, j](x[t]), in choice order.

    x [T, H], w1 [E, 2I, H], w2 [E, H, I] (see ExpertLayout), bias ([E, 2I], [E, H]) -> y [T, H] in x's dtype.
    scale_on="input" multiplies the routing weight into the expert's input instead of its output (Llama 4).
    Ids outside [0, E) are dropped: they add nothing and get no gradient.
    """
    raise RuntimeError("fused_experts must be built first")


def apply_activation(h: Tensor, activation: Activation, interleaved: bool = False) -> Tensor:
    """The activation in plain torch: h [S, 2I] -> [S, I] (or [S, I] -> [S, I] where it is not gated)."""
    name, limit = activation.name, activation.limit
    if not activation.gated:
        return _UNGATED[name](h)
    gate, up = (h[..., ::2], h[..., 1::2]) if interleaved else h.chunk(2, -1)
    if name == "swiglu_oai":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)
    if name == "swiglu_clamped":
        return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    return _GATES[name](gate) * up


_UNGATED = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda h: F.relu(h).square(),
    "identity": lambda h: h,
}
_GATES = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": _UNGATED["gelu_tanh"], "reglu": F.relu}


def fused_experts_ref(
    x, routing, w1, w2, bias=(None, None), activation="swiglu", layout=ExpertLayout(), scale_on="output"
):
    activation = Activation(activation) if isinstance(activation, str) else activation
    b1, b2 = bias
    ids, weights = routing.ids.long(), routing.weights.to(x.dtype)
    if layout.transposed:
        w1, w2 = w1.mT, w2.mT
    y = torch.zeros_like(x)
    for e in range(routing.num_experts):
        token, choice = torch.where(ids == e)
        scale = weights[token, choice, None]
        rows = x[token] * scale if scale_on == "input" else x[token]
        h = F.linear(rows, w1[e], None if b1 is None else b1[e])
        out = F.linear(apply_activation(h, activation, layout.interleaved), w2[e], None if b2 is None else b2[e])
        y = y.index_add(0, token, out if scale_on == "input" else out * scale)
    return y
