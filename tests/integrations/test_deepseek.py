import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from moert import GluExperts, MoELayer
from moert.integrations.deepseek import moe_layer_state
from moert.layers import FeedForward
from moert.routers import DeepSeekRouter


@pytest.fixture
def theirs():
    config = DeepseekV3Config(
        hidden_size=16, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=12,
        n_shared_experts=2, intermediate_size=24,
    )  # fmt: skip
    block = DeepseekV3MoE(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    block.gate.e_score_correction_bias.normal_(std=0.1)
    return block.eval()


@pytest.mark.parametrize("numbered", (False, True))
def test_weights_of_a_block(theirs, numbered):
    state = {f"mlp.{name}": tensor for name, tensor in theirs.state_dict().items()}
    if numbered:
        pair, down = state.pop("mlp.experts.gate_up_proj"), state.pop("mlp.experts.down_proj")
        for e in range(8):
            parts = {"gate": pair[e, :12], "up": pair[e, 12:], "down": down[e]}
            state |= {f"mlp.experts.{e}.{name}_proj.weight": tensor for name, tensor in parts.items()}
    state["self_attn.o_proj.weight"] = torch.zeros(1)
    router = DeepSeekRouter.v3(16, 8, 2, n_group=2, topk_group=1)
    layer = MoELayer(router, GluExperts(8, 16, 12), FeedForward(16, 24))
    layer.load_state_dict(moe_layer_state(state))
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(layer(x), theirs(x))


def test_unknown_weights_are_refused():
    with pytest.raises(ValueError, match="mlp.router.x must be a weight of gate, experts or shared_experts"):
        moe_layer_state({"mlp.router.x": torch.zeros(1)})
