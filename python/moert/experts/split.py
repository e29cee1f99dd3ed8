"""A trained dense feed-forward network cut into experts (as SMoE-Dropout does with BERT, arXiv:2303.01610)."""

import torch
from torch import Tensor, nn

from moert.experts.base import Experts
from moert.experts.block import BlockExperts
from moert.experts.glu import GluExperts

# An activation module -> its name between the GEMMs, and behind a gate.
_ACTIVATIONS = {
    "ReLU": ("relu", "reglu"),
    "SiLU": ("silu", "swiglu"),
    "SiLUActivation": ("silu", "swiglu"),
    "GELU": ("gelu", "geglu"),
    "GELUActivation": ("gelu", "geglu"),
    "NewGELUActivation": ("gelu_tanh", "geglu_tanh"),
    "GELUTanh": ("gelu_tanh", "geglu_tanh"),
}


@torch.no_grad()
def split_ffn(mlp: nn.Module, num_experts: int, perm: Tensor | None = None) -> Experts:
    """Experts that share the network's I intermediate columns equally; all of them with weight 1 are the network.

    mlp is nn.Sequential(Linear, activation, Linear), which becomes BlockExperts, or has gate_proj, up_proj, down_proj
    and act_fn as Hugging Face's gated networks, which becomes GluExperts.  The columns are cut in order, or in the
    order of perm [I].  The last bias is shared equally.
    """
    gated = hasattr(mlp, "gate_proj")
    if not gated and not (isinstance(mlp, nn.Sequential) and len(mlp) == 3):
        raise ValueError(
            "mlp must be nn.Sequential(Linear, activation, Linear) or have gate_proj, up_proj, down_proj, act_fn, "
            f"got {type(mlp).__name__}"
        )
    first, second = (mlp.up_proj, mlp.down_proj) if gated else (mlp[0], mlp[2])
    activation = _activation_of(mlp.act_fn if gated else mlp[1], gated)
    I, H = first.weight.shape
    if num_experts < 1 or I % num_experts:
        raise ValueError(f"num_experts must divide the intermediate size {I}, got {num_experts}")
    if perm is not None and not torch.equal(perm.sort().values, torch.arange(I)):
        raise ValueError(f"perm must be a permutation of {I} columns, got shape {list(perm.shape)}")

    def cut(columns: Tensor) -> Tensor:
        """[I, ...] -> [E, I / E, ...]"""
        return (columns if perm is None else columns[perm]).unflatten(0, (num_experts, -1))

    biases = any(layer.bias is not None for layer in (first, second, *([mlp.gate_proj] if gated else ())))
    options = {"bias": biases, "device": first.weight.device, "dtype": first.weight.dtype}
    b1, b2 = (torch.zeros_like(layer.weight[:, 0]) if layer.bias is None else layer.bias for layer in (first, second))
    if gated:
        experts = GluExperts(num_experts, H, I // num_experts, activation, **options)
        experts.gate_up_proj.copy_(torch.cat([cut(mlp.gate_proj.weight), cut(first.weight)], 1))
        experts.down_proj.copy_(cut(second.weight.T).mT)
        if biases:
            gate = mlp.gate_proj.bias if mlp.gate_proj.bias is not None else torch.zeros_like(b1)
            experts.gate_up_proj_bias.copy_(torch.cat([cut(gate), cut(b1)], 1))
    else:
        experts = BlockExperts(H, num_experts, I // num_experts, activation, **options)
        experts.up_proj.copy_(cut(first.weight))
        experts.down_proj.copy_(cut(second.weight.T))
        if biases:
            experts.up_proj_bias.copy_(cut(b1))
    if biases:
        experts.down_proj_bias.copy_((b2 / num_experts).expand(num_experts, H))
    return experts


def _activation_of(module: nn.Module, gated: bool) -> str:
    name = type(module).__name__
    if name == "GELU" and module.approximate == "tanh":
        name = "GELUTanh"
    if name not in _ACTIVATIONS:
        raise ValueError(f"mlp must have one of the activations {', '.join(_ACTIVATIONS)}, got {name}")
    return _ACTIVATIONS[name][gated]
