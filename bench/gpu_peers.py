"""Other implementations of a layer's experts, as far as they can be imported: forward(x, weights, w1, w2)."""

import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

COPIES = 16  # tokens up to which batched_mm, which copies the weights of every choice, is worth a look
Forward = Callable[..., Tensor]


def peers(layer, ids: Tensor, T: int) -> dict[str, Forward]:
    """Those with gradients."""
    ways = transformers_ways(layer, ids, T)
    if find_spec("liger_kernel"):
        ways["Liger-Kernel"] = functools.partial(_liger, ids.int())
    if find_spec("scattermoe"):
        ways["ScatterMoE"] = functools.partial(_scattermoe, layer, ids)
    return ways


def inference_peers(layer, ids: Tensor) -> dict[str, Forward]:
    """Those without."""
    if not find_spec("megatron"):
        return {}
    tokens = torch.tensor(len(ids), dtype=torch.int32, device=ids.device)  # before a graph is captured
    return {"Megatron-Core": functools.partial(_megatron, layer, ids.int(), tokens)}


def _liger(ids: Tensor, x: Tensor, weights: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    from liger_kernel.ops import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(x, w1, w2, ids, weights.to(x.dtype))


def _megatron(layer, ids: Tensor, tokens: Tensor, x: Tensor, weights: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Its kernels after vLLM's, which versions from 2026 on have."""
    from megatron.core.inference.moe.vllm_fused_moe import ActivationType, vllm_fused_moe

    swiglu, y = ActivationType.SWIGLU, torch.empty_like(x)
    return vllm_fused_moe(x, weights, w1, w2, swiglu, layer.E, 0, tokens, ids, out=y)


def transformers_ways(layer, ids: Tensor, T: int) -> dict[str, Callable[..., Tensor]]:
    """The ways in which stock transformers runs the experts of Qwen3-MoE."""
    if not find_spec("transformers"):
        return {}
    from transformers import Qwen3MoeConfig
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    sizes = {"hidden_size": layer.H, "moe_intermediate_size": layer.I, "num_experts": layer.E}
    with torch.device("meta"):
        experts = Qwen3MoeExperts(Qwen3MoeConfig(**sizes, num_experts_per_tok=layer.k))
    del experts.gate_up_proj, experts.down_proj
    wide = ids.long()

    def run(forward, x, weights, w1, w2):
        experts.gate_up_proj, experts.down_proj = w1, w2
        return forward(experts, x, wide, weights.to(x.dtype))

    ways = {"loop": type(experts).forward.__wrapped__, "grouped_mm": ALL_EXPERTS_FUNCTIONS["grouped_mm"]}
    if T <= COPIES:
        ways["batched_mm"] = ALL_EXPERTS_FUNCTIONS["batched_mm"]
    return {f"transformers {name}": functools.partial(run, forward) for name, forward in ways.items()}


def _scattermoe(layer, ids: Tensor, x: Tensor, weights: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    from scattermoe.mlp import GLUMLP

    with torch.device("meta"):
        experts = GLUMLP(layer.H, layer.I, layer.E, layer.k, activation=torch.nn.SiLU())
    up_then_gate = torch.cat(w1.chunk(2, dim=1)[::-1], dim=1)
    named = {"experts.weight": up_then_gate, "output_experts.weight": w2}
    return torch.func.functional_call(experts, named, (x, weights.to(x.dtype), ids.long()))
