"""Tiny GGUF files of whole models, written by the gguf package, and the float model of what is in each."""

import gguf
import pytest
import torch
from foreign_checkpoint import CONFIGS, SIZES
from k_quants import K_QUANTS, k_quantize
from transformers import AutoModelForCausalLM, DeepseekV2Config, GptOssConfig, OlmoeConfig, Qwen3MoeConfig

from moert.integrations.transformers import load_gguf
from moert.integrations.transformers.quantized import PackedExperts

IDS = torch.arange(14).view(2, 7) * 5 % 96
ROPE = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8, "beta_fast": 32.0, "beta_slow": 1.0}
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
LATENT |= {"intermediate_size": 64, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "hidden_size": 64}
LATENT |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 96}
LATENT |= {"max_position_embeddings": 64, "pad_token_id": 0}
LATENT |= {"rope_parameters": ROPE | {"rope_theta": 1e4, "mscale": 0.7, "mscale_all_dim": 0.7}}
OLMOE = {name: size for name, size in SIZES.items() if name != "head_dim"}
FAMILIES = {
    "qwen3moe": CONFIGS["qwen3"],
    "llama": CONFIGS["mixtral"],
    # Blocks of 256 columns.
    "wide": lambda: Qwen3MoeConfig(
        moe_intermediate_size=256,
        num_experts=4,
        num_experts_per_tok=2,
        **SIZES | {"hidden_size": 256, "head_dim": 64},
    ),
    "olmoe": lambda: OlmoeConfig(intermediate_size=32, num_experts=4, num_experts_per_tok=2, **OLMOE),
    # A sliding window, shorter than IDS, in its first layer; YaRN.
    "gpt-oss": lambda: GptOssConfig(
        intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=4, **SIZES
    ),
    "deepseek-v2": lambda: DeepseekV2Config(
        n_routed_experts=4, n_shared_experts=2, num_experts_per_tok=2, q_lora_rank=None, **LATENT
    ),
    "deepseek-v2-groups": lambda: DeepseekV2Config(
        n_routed_experts=4,
        num_experts_per_tok=2,
        topk_method="group_limited_greedy",
        n_group=2,
        topk_group=1,
        q_lora_rank=32,
        **LATENT,
    ),
    "deepseek-v3": CONFIGS["deepseek"],
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
DEEPSEEK_NAMES = {
    name: NAMES[name] for name in NAMES if "_norm" not in name and not name.endswith(("k_proj", "v_proj"))
} | {
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
GPT_OSS_NAMES = NAMES | {"post_attention_layernorm": "post_attention_norm", "mlp.router": "ffn_gate_inp"}


ARCHITECTURES = {
    "wide": "qwen3moe",
    "deepseek-v2": "deepseek2",
    "deepseek-v2-groups": "deepseek2",
    "deepseek-v3": "deepseek2",
}  # else the family's name
OTHER_NAMES = {"gpt-oss": GPT_OSS_NAMES, "deepseek2": DEEPSEEK_NAMES}


def numbers(config, arch, halves):
    """What the metadata say; halves: as for a kv_b_proj in halves."""
    found = {
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "context_length": config.max_position_embeddings,
        "expert_count": 4,
        "expert_used_count": config.num_experts_per_tok,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    if "factor" in config.rope_parameters:
        found |= {"rope.scaling.type": "yarn", "rope.scaling.factor": config.rope_parameters["factor"]}
        first = config.rope_parameters["original_max_position_embeddings"]
        found |= {"rope.scaling.original_context_length": first}
    if arch == "gpt-oss":
        found |= {"attention.sliding_window": config.sliding_window}
    if arch == "deepseek2":
        return found | latent_numbers(config, halves)
    width = "expert_feed_forward_length" if arch in ("qwen3moe", "gpt-oss") else "feed_forward_length"
    found |= {width: getattr(config, "moe_intermediate_size", None) or config.intermediate_size}
    return found | {"attention.key_length": config.hidden_size // config.num_attention_heads}


def latent_numbers(config, halves):
    key, rank = config.qk_nope_head_dim + config.qk_rope_head_dim, config.kv_lora_rank
    lengths = {"key": key, "value": config.v_head_dim}
    found = {f"attention.{name}_length{'_mla' * halves}": length for name, length in lengths.items()}
    if halves:
        found |= {"attention.key_length": rank + config.qk_rope_head_dim, "attention.value_length": rank}
        found |= {"attention.head_count_kv": 1}
    if config.q_lora_rank:
        found |= {"attention.q_lora_rank": config.q_lora_rank}
    if "mscale" in config.rope_parameters:
        found |= {"rope.scaling.yarn_log_multiplier": 0.1 * config.rope_parameters["mscale"]}
    if config.model_type == "deepseek_v3":
        found |= {"expert_gating_func": 2, "expert_weights_norm": True, "expert_weights_scale": 2.5}
    if config.n_group:
        found |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    return found | {
        "attention.kv_lora_rank": rank,
        "rope.dimension_count": config.qk_rope_head_dim,
        "leading_dense_block_count": config.first_k_dense_replace,
        "feed_forward_length": config.intermediate_size,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
    }


def float_model(family):
    config = FAMILIES[family]()
    if config.model_type == "qwen3_moe":
        config.norm_topk_prob = True
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for name, value in model.state_dict().items():
        if "bias" in name or "sinks" in name:
            value.normal_()
    return model


def written(path, family, kinds, skip=(), extra=None, halves=False, **change):
    """A file whose gate, up, down and attention are of these types; the float model of what is in it."""
    model, arch = float_model(family), ARCHITECTURES.get(family, family)
    writer = gguf.GGUFWriter(path, arch)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (numbers(model.config, arch, halves) | change).items():
        add[type(value)](key if key.startswith("tokenizer") else f"{arch}.{key}", value)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)

    def put(name, tensor, kind):
        name_of_kind, kind = kind, gguf.GGMLQuantizationType[kind]
        floats = tensor.detach().float().contiguous().numpy()
        data = k_quantize(floats, name_of_kind) if name_of_kind in K_QUANTS else gguf.quants.quantize(floats, kind)
        if name not in skip:
            writer.add_tensor(name, data, raw_dtype=kind)
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(gguf.quants.dequantize(data, kind)))

    body = model.model
    put("token_embd.weight", body.embed_tokens.weight, "Q8_0")
    put("output.weight", model.lm_head.weight, "F16")
    put("output_norm.weight", body.norm.weight, "F32")
    for i, layer in enumerate(body.layers):
        put_layer(lambda name, *rest, i=i: put(f"blk.{i}.{name}", *rest), layer, arch, kinds, halves)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def check_refused(path, family, message, **change):
    """Such metadata of a family are an error with that message."""
    written(path, family, ("Q8_0",) * 4, **change)
    with pytest.raises(ValueError, match=message):
        load_gguf(path)


def put_layer(put, layer, arch, kinds, halves):
    values = layer.state_dict()
    for inner, name in OTHER_NAMES.get(arch, NAMES).items():
        weight = values.get(f"{inner}.weight")
        if weight is None:
            continue
        if (bias := values.get(f"{inner}.bias")) is not None:
            put(f"{name}.bias", bias, "F32")
        kind = kinds[3] if name in ("attn_q", "attn_k", "attn_v", "attn_output") else "F32"
        if arch == "llama" and name in ("attn_q", "attn_k"):  # as llama.cpp turns the rows of a head
            turned = weight.view(4, 2, -1, 64).transpose(1, 2).reshape(weight.shape).contiguous()
            put(f"{name}.weight", turned, kind)
            weight.copy_(turned.view(4, -1, 2, 64).transpose(1, 2).reshape(weight.shape))
        elif halves and name == "attn_kv_b":
            keys, values_of = weight.view(4, -1, weight.shape[-1]).split(16, 1)
            put("attn_k_b.weight", keys.mT, "F32")
            put("attn_v_b.weight", values_of, "F32")
        else:
            put(f"{name}.weight", weight, kind)
    if arch == "gpt-oss":
        put("attn_sinks.weight", layer.self_attn.sinks.data, "F32")
    if (bias := values.get("mlp.gate.e_score_correction_bias")) is not None:
        put("exp_probs_b.bias", bias, "F32")
    parts = experts_of(layer.mlp.experts) if hasattr(layer.mlp, "experts") else {}
    for (name, part), kind in zip(parts.items(), (*kinds[:3], *["F32"] * 3), strict=False):
        put(f"ffn_{name}", part, kind)


def experts_of(experts):
    """Views of the parameters, weights [E, rows, columns] first."""
    w1, w2 = experts.gate_up_proj.data, experts.down_proj.data
    if not experts.is_transposed:
        gate, up = w1.chunk(2, 1)
        return {"gate_exps.weight": gate, "up_exps.weight": up, "down_exps.weight": w2}
    w1, b1 = w1.mT, experts.gate_up_proj_bias.data
    return {
        "gate_exps.weight": w1[:, ::2],
        "up_exps.weight": w1[:, 1::2],
        "down_exps.weight": w2.mT,
        "gate_exps.bias": b1[:, ::2],
        "up_exps.bias": b1[:, 1::2],
        "down_exps.bias": experts.down_proj_bias.data,
    }


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.flatten(0, 1)


def formats(model):
    packed = [module for module in model.modules() if isinstance(module, PackedExperts)]
    return [(module.w1_format, module.w2_format) for module in packed]
