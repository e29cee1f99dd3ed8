"""Tiny checkpoints as other libraries leave them, and beside each the float one that it stands for."""

import json

from foreign import awq, fp8, gptq, mxfp4
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen3MoeConfig

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
SIZES |= {"vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0}
CONFIGS = {
    "qwen3": lambda: Qwen3MoeConfig(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, **SIZES),
    "qwen3-128": lambda: Qwen3MoeConfig(moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2, **SIZES),
    "mixtral": lambda: MixtralConfig(intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, **SIZES),
    "deepseek": lambda: DeepseekV3Config(  # a dense layer first, groups of experts, a shared one, latent attention
        intermediate_size=64,
        moe_intermediate_size=128,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        **SIZES | {"num_hidden_layers": 3, "head_dim": 8},
    ),
    "gpt-oss": lambda: GptOssConfig(
        intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2, **SIZES
    ),
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
SOURCES = {
    "gptq": (GPTQ, lambda w: gptq(w, 32)),
    "gptq_v2": (GPTQ | {"checkpoint_format": "gptq_v2", "sym": False}, lambda w: gptq(w, 32, False, v1=False)),
    "desc_act": (GPTQ | {"desc_act": True}, lambda w: gptq(w, 32, act_order=True)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, lambda w: awq(w, 32)),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}, fp8),
    "mxfp4": ({"quant_method": "mxfp4"}, mxfp4),
}


def write(folder, family, source, write_matrix=None, plain=()):
    """Both checkpoints of random weights below folder, "foreign" and "float"; names with a word of plain stay float."""
    config, written = SOURCES[source] if isinstance(source, str) else (source, write_matrix)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    for path in ("foreign", "float"):
        model.save_pretrained(folder / path)
    tensors = load_file(folder / "float" / "model.safetensors")
    foreign, floats = {}, {}
    for name, tensor in tensors.items():
        kept = any(
            word in name for word in (*plain, "embed", "norm", "lm_head", "gate.weight", "router", "bias", "sinks")
        )
        experts_alone = source == "mxfp4" and "experts" not in name
        if kept or experts_alone:
            foreign[name] = floats[name] = tensor
        elif source == "mxfp4":
            parts, value = written(tensor.mT.float().contiguous())
            foreign |= {f"{name}_{part}": each for part, each in parts.items()}
            floats[name] = value.mT.contiguous()
        else:
            parts, floats[name] = written(tensor.float())
            foreign |= {name.removesuffix("weight") + part: each.contiguous() for part, each in parts.items()}
    for path, content in (("foreign", foreign), ("float", floats)):
        save_file(content, folder / path / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((folder / "foreign" / "config.json").read_text())
    (folder / "foreign" / "config.json").write_text(json.dumps(text | {"quantization_config": config}))
    return folder / "foreign", folder / "float"
