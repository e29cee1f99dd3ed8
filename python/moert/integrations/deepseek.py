"""Weights of DeepSeek's MoE layers under moert's names."""

import re

import torch
from torch import Tensor

_OURS = {"gate.weight": "router.weight", "gate.e_score_correction_bias": "router.expert_bias"}


def moe_layer_state(state: dict[str, Tensor], prefix: str = "mlp.") -> dict[str, Tensor]:
    """state_dict of one DeepSeek MoE block, keys under prefix -> that of an MoELayer.

    The layer is MoELayer(DeepSeekRouter, GluExperts, FeedForward).  Experts may be numbered modules
    (experts.3.gate_proj.weight) or the stacked tensors of newer libraries (experts.gate_up_proj).
    """
    out, numbered = {}, {}
    for name, tensor in state.items():
        if not name.startswith(prefix):
            continue
        name = name.removeprefix(prefix)
        if match := re.fullmatch(r"experts\.(\d+)\.(gate|up|down)_proj\.weight", name):
            numbered[int(match[1]), match[2]] = tensor
        elif name in _OURS or name.startswith(("shared_experts.", "experts.")):
            out[_OURS.get(name, name)] = tensor
        else:
            raise ValueError(f"{prefix}{name} must be a weight of gate, experts or shared_experts, got another name")
    if numbered:
        E = 1 + max(e for e, _ in numbered)
        pairs = [torch.cat([numbered[e, "gate"], numbered[e, "up"]]) for e in range(E)]
        out["experts.gate_up_proj"] = torch.stack(pairs)
        out["experts.down_proj"] = torch.stack([numbered[e, "down"] for e in range(E)])
    return out
