import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from moert.layers import FeedForward


def test_is_the_mlp_of_llama():
    theirs = LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2))
    mine = FeedForward(16, 24)
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(mine(x), theirs(x))


def test_without_a_gate():
    ffn, x = FeedForward(8, 12, "gelu_tanh", bias=True), torch.randn(4, 8)
    assert sorted(ffn.state_dict()) == ["down_proj.bias", "down_proj.weight", "up_proj.bias", "up_proj.weight"]
    torch.testing.assert_close(ffn(x), ffn.down_proj(F.gelu(ffn.up_proj(x), approximate="tanh")))


def test_errors():
    with pytest.raises(ValueError, match="activation must be one of swiglu, .*, got swish"):
        FeedForward(8, 12, "swish")
