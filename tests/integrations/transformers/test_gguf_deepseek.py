"""DeepSeek-V2 and V3 in GGUF files: latent attention whole and in halves, dense layers, shared experts, routing."""

import numpy as np
import pytest
import torch
from gguf_writer import check_refused, formats, logits, written
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config

from moert.integrations.transformers import load_gguf
from moert.integrations.transformers.gguf_families import config_of
from moert.quant import Int4, Int8
from moert.quant.readers import GgufFile
from moert.testing import row_error

KINDS = ("Q4_0", "Q4_0", "Q8_0", "Q8_0")


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("family", ["deepseek-v2", "deepseek-v2-groups", "deepseek-v3"])
def test_exact(family, halves, tmp_path):
    reference = written(tmp_path / "m.gguf", family, KINDS, halves=halves)
    model = load_gguf(tmp_path / "m.gguf", precision="full")
    assert formats(model) == [(Int4(32), Int8(32))] * 2
    assert row_error(logits(model), logits(reference)) < 5e-6
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert row_error(logits(again), logits(model)) < 1e-6


@pytest.mark.parametrize("family", ["deepseek-v2", "deepseek-v3"])
def test_routers_stay_in_float32(family, tmp_path):
    reference = written(tmp_path / "m.gguf", family, KINDS).model.layers[1].mlp.gate.state_dict()
    layer = load_gguf(tmp_path / "m.gguf", dtype=torch.bfloat16).model.layers[1]
    gate = layer.mlp.gate.state_dict()
    assert gate.keys() == reference.keys() and all(torch.equal(gate[name], reference[name]) for name in gate)
    assert {layer.input_layernorm.weight.dtype, layer.self_attn.kv_b_proj.weight.dtype} == {torch.bfloat16}


def test_configurations(tmp_path):
    """What neither the logits nor the shapes of these files would show."""
    written(tmp_path / "m.gguf", "deepseek-v2", KINDS)
    config = config_of(GgufFile(tmp_path / "m.gguf"))
    assert type(config) is DeepseekV2Config and config.q_lora_rank is None and config.first_k_dense_replace == 1
    assert config.rope_parameters["mscale"] == pytest.approx(0.7, rel=1e-6) and "truncate" not in config.rope_parameters
    written(tmp_path / "m.gguf", "deepseek-v3", KINDS, expert_weights_norm=False, expert_weights_scale=1.5)
    config = config_of(GgufFile(tmp_path / "m.gguf"))
    assert type(config) is DeepseekV3Config and not config.norm_topk_prob and config.routed_scaling_factor == 1.5
    assert (config.n_group, config.topk_group, config.q_lora_rank, config.num_mtp_layers) == (2, 1, 32, 0)


@pytest.mark.parametrize(
    "family,change,message",
    [
        ("deepseek-v2", {"expert_gating_func": 3}, "expert_gating_func must be one of 1, 2, got 3"),
        (
            "deepseek-v2",
            {"expert_weights_norm": True},
            "expert_weights_norm must be False, the only one read",
        ),
        ("deepseek-v2", {"rope.dimension_count": 7}, "rope.dimension_count must be even, got 7"),
        (
            "deepseek-v2",
            {"attention.temperature_scale": 0.5},
            "temperature_scale must be 0, the only one read",
        ),
        ("deepseek-v3", {"expert_used_count": 3}, "expert_used_count must be at most 2, those of the groups, got 3"),
        ("deepseek-v2", {"rope.scaling.yarn_log_multiplier": 0.0}, "yarn_log_multiplier must be a positive finite"),
        ("deepseek-v2", {"rope.scaling.type": "linear"}, "rope.scaling.type must be none or yarn, got linear"),
        (
            "deepseek-v2",
            {"rope.dimension_count": 24},
            "key_length must be above rope.dimension_count=24, got 24",
        ),
        (
            "deepseek-v2",
            {"leading_dense_block_count": 4},
            "leading_dense_block_count must be below block_count=3",
        ),
        ("deepseek-v2", {"leading_dense_block_count": -1.0}, "leading_dense_block_count must be an integer from 0 on"),
        ("deepseek-v2", {"attention.head_count_kv": 1}, "attention.head_count_kv must be 4, the only one read, got 1"),
        ("deepseek-v2", {"attention.scale": 0.5}, "attention.scale must be 0.2.*, the only one read, got 0.5"),
        ("deepseek-v2", {"attention.kv_lora_rank": 2**30}, "must have shape .* by the config, got"),
        ("deepseek-v3", {"expert_group_count": 3}, "must divide 4 experts into groups of at least 2, got 3 groups"),
        ("deepseek-v3", {"expert_group_count": 4}, "must divide 4 experts into groups of at least 2, got 4 groups"),
        ("deepseek-v3", {"expert_group_used_count": 3}, "expert_group_used_count must be at most 2, got 3"),
        ("deepseek-v3", {"expert_weights_norm": 1}, "expert_weights_norm must be true or false, got 1"),
    ],
)
def test_metadata(family, change, message, tmp_path):
    check_refused(tmp_path / "m.gguf", family, message, **change)


@pytest.mark.parametrize("name", ["attn_k_b", "attn_v_b", "ffn_up_exps", "ffn_gate_exps"])
def test_a_missing_half(name, tmp_path):
    written(tmp_path / "m.gguf", "deepseek-v2", KINDS, (f"blk.1.{name}.weight",), halves=True)
    with pytest.raises(ValueError, match=r"must hold model.layers.1\..* once, whole or in its halves, got 1 tensors"):
        load_gguf(tmp_path / "m.gguf")


def test_a_weight_twice(tmp_path):
    extra = {"blk.1.attn_kv_b.weight": np.zeros((128, 32), np.float32)}
    written(tmp_path / "m.gguf", "deepseek-v2", KINDS, extra=extra, halves=True)
    with pytest.raises(ValueError, match="must hold .*kv_b_proj.weight once, whole or in its halves, got 3 tensors"):
        load_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["attn_q", "ffn_up_shexp"])
def test_a_missing_tensor(name, tmp_path):
    written(tmp_path / "m.gguf", "deepseek-v2", KINDS, (f"blk.1.{name}.weight",))
    with pytest.raises(ValueError, match="must hold every weight, got no model.layers.1"):
        load_gguf(tmp_path / "m.gguf")


def test_latent_sizes(tmp_path):
    written(tmp_path / "m.gguf", "deepseek-v2", KINDS, halves=True, **{"attention.key_length": 24})
    with pytest.raises(ValueError, match="attention.key_length must be 40, the only one read, got 24"):
        load_gguf(tmp_path / "m.gguf")
