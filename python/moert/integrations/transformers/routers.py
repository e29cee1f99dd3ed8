"""moert's routers as the gates of Hugging Face models."""

from collections.abc import Callable

from torch import Tensor, nn

from moert.routers.base import Router
from moert.routers.topk import TopKRouter

# Gates whose whole rule is: softmax, the k best, perhaps renormalised (always, or as norm_topk_prob says).
_SOFTMAX_GATES = {
    "MixtralTopKRouter": True,
    "OlmoeTopKRouter": None,
    "Qwen2MoeTopKRouter": None,
    "Qwen3MoeTopKRouter": None,
}


class RouterGate(nn.Module):
    """A router where transformers expects a gate: hidden_states [..., H] -> logits [T, E], weights [T, k], ids [T, k].

    The weights are float32, or narrow: of the dtype of the logits, as those of most gates.
    """

    def __init__(self, router: Router, narrow: bool = False):
        super().__init__()
        self.router, self.narrow = router, narrow

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        routing = self.router(hidden_states.reshape(-1, hidden_states.shape[-1]))
        weights = routing.weights.to(routing.logits.dtype) if self.narrow else routing.weights
        return routing.logits, weights, routing.ids.long()


def topk_router_of(gate: nn.Module) -> TopKRouter:
    """The router that computes what a gate of Mixtral, OLMoE, Qwen2-MoE or Qwen3-MoE does, with its own weight."""
    renormalize = _SOFTMAX_GATES[type(gate).__name__]
    E, H = gate.weight.shape
    router = TopKRouter(H, E, gate.top_k, renormalize=gate.norm_topk_prob if renormalize is None else renormalize)
    router.weight = gate.weight
    return router


def use_routers_(model: nn.Module, make: Callable[[nn.Module], Router] = topk_router_of) -> list[str]:
    """Put make(gate), by default a TopKRouter that does the same, in place of every gate; returns their names.

    The routers then take contexts (moert.routers.given_context).  A gate's weight gets the name gate.router.weight, and
    transformers' output_router_logits no longer sees it.
    """
    gates = {name: m for name, m in model.named_modules() if type(m).__name__ in _SOFTMAX_GATES}
    if not gates:
        raise ValueError(f"model must have gates of {', '.join(_SOFTMAX_GATES)}, got {type(model).__name__}")
    for name, gate in gates.items():
        parent, _, own = name.rpartition(".")
        narrow = _SOFTMAX_GATES[type(gate).__name__] is None
        setattr(model.get_submodule(parent), own, RouterGate(make(gate), narrow).train(gate.training))
    return list(gates)
