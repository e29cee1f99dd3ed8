import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from moert import GluExperts, Routing
from moert.experts import BlockExperts, split_ffn

H, I, E = 12, 40, 5


def every_expert(T):
    return Routing(torch.arange(E).expand(T, E), torch.ones(T, E), E)


def networks():
    gated = LlamaMLP(LlamaConfig(hidden_size=H, intermediate_size=I, num_attention_heads=2, mlp_bias=True))
    gate_bias = LlamaMLP(gated.config)
    gate_bias.up_proj.bias = gate_bias.down_proj.bias = None
    return {
        "relu": nn.Sequential(nn.Linear(H, I), nn.ReLU(), nn.Linear(I, H)),
        "gelu": nn.Sequential(nn.Linear(H, I, bias=False), nn.GELU("tanh"), nn.Linear(I, H)),
        "plain": nn.Sequential(nn.Linear(H, I, bias=False), nn.SiLU(), nn.Linear(I, H, bias=False)),
        "gated": gated,
        "gated, with a bias of the gate alone": gate_bias,
    }


@pytest.mark.parametrize("shuffled", (False, True))
@pytest.mark.parametrize("name", networks())
def test_all_experts_are_the_network(name, shuffled):
    mlp, x = networks()[name], torch.randn(9, H)
    experts = split_ffn(mlp, E, torch.randperm(I) if shuffled else None)
    assert isinstance(experts, GluExperts if name.startswith("gated") else BlockExperts)
    assert (experts(x, every_expert(9)) - mlp(x)).abs().max() <= 1e-5


def test_the_cut():
    mlp = networks()["relu"]
    experts = split_ffn(mlp, E)
    assert torch.equal(experts.up_proj[1], mlp[0].weight[8:16])
    assert torch.equal(experts.down_proj[1], mlp[2].weight.T[8:16])
    perm = torch.arange(I).flip(0)
    assert torch.equal(split_ffn(mlp, E, perm).up_proj[0, 0], mlp[0].weight[-1])


@pytest.mark.parametrize(
    "mlp,options,message",
    [
        (nn.Linear(4, 4), {}, r"mlp must be nn.Sequential\(Linear, activation, Linear\) or have .*, got Linear"),
        (nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)), {}, "mlp must have one of .*, got Tanh"),
        (networks()["relu"], {"num_experts": 7}, "num_experts must divide the intermediate size 40, got 7"),
        (networks()["relu"], {"perm": torch.zeros(I)}, r"perm must be a permutation of 40 columns, got shape \[40\]"),
    ],
)
def test_errors(mlp, options, message):
    with pytest.raises(ValueError, match=message):
        split_ffn(**({"mlp": mlp, "num_experts": 4} | options))
