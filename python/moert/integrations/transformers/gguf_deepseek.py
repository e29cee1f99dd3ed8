"""What llama.cpp calls deepseek2: DeepSeek-V2 (a softmax routes) and V3 (a sigmoid with a bias), latent attention."""

import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config, PretrainedConfig

from moert.integrations.transformers.gguf_metadata import Metadata
from moert.quant.readers import GgufFile

ARCHITECTURE = "deepseek2"
CONFIGS = {1: DeepseekV2Config, 2: DeepseekV3Config}  # by llama.cpp's numbers of softmax and sigmoid
SIZES = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "feed_forward_length": "intermediate_size",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_shared_count": "n_shared_experts",
    "attention.kv_lora_rank": "kv_lora_rank",
    "rope.dimension_count": "qk_rope_head_dim",
}
# The two halves of a head's rows of kv_b_proj, where they are apart: those of keys are turned.
KEYS, VALUES = "self_attn.kv_b_proj.weight_k", "self_attn.kv_b_proj.weight_v"
NAMES = {
    "attn_q": "self_attn.q_proj.weight",
    "attn_q_a": "self_attn.q_a_proj.weight",
    "attn_q_a_norm": "self_attn.q_a_layernorm.weight",
    "attn_q_b": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm.weight",
    "attn_kv_b": "self_attn.kv_b_proj.weight",
    "attn_k_b": KEYS,
    "attn_v_b": VALUES,
    "attn_output": "self_attn.o_proj.weight",
    "exp_probs_b": "mlp.gate.e_score_correction_bias",
} | {
    f"ffn_{name}{kind}": f"mlp.{module}{name}_proj.weight"
    for kind, module in (("", ""), ("_shexp", "shared_experts."))
    for name in ("gate", "up", "down")
}


def config_of(metadata: Metadata, **common) -> PretrainedConfig:
    """The configuration without what every architecture has in common."""
    kind, sizes = _kind(metadata), metadata.sizes(SIZES)
    heads, rank, rotary = (sizes[name] for name in ("num_attention_heads", "kv_lora_rank", "qk_rope_head_dim"))
    # Files whose kv_b_proj is in halves say the sizes of heads in keys of their own, as one head has the latent rows.
    latent = metadata.get("attention.key_length_mla") is not None
    key, value = (metadata.positive(f"attention.{name}_length{'_mla' * latent}", int) for name in ("key", "value"))
    if latent:
        read = {"attention.key_length": (rank + rotary,), "attention.value_length": (rank,)}
        metadata.check(read | {"attention.head_count_kv": (1,)})
    else:
        metadata.check({"attention.head_count_kv": (heads,)})
    if rotary % 2:
        raise ValueError(f"rope.dimension_count must be even, got {rotary}")
    if key <= rotary:
        raise ValueError(f"attention.key_length must be above rope.dimension_count={rotary}, got {key}")
    if (dense := metadata.count("leading_dense_block_count")) >= sizes["num_hidden_layers"]:
        got = f"block_count={sizes['num_hidden_layers']}, got {dense}"
        raise ValueError(f"leading_dense_block_count must be below {got}")
    # llama.cpp takes 0 for 1.
    scale = metadata.positive("expert_weights_scale", float) if metadata.get("expert_weights_scale") else 1.0
    rope = _rope(metadata)
    metadata.check_counts()
    metadata.check_attention(key**-0.5)
    return metadata.config(
        kind,
        rope_parameters=rope,
        num_key_value_heads=heads,
        qk_nope_head_dim=key - rotary,
        v_head_dim=value,
        q_lora_rank=metadata.count("attention.q_lora_rank") or None,
        first_k_dense_replace=dense,
        routed_scaling_factor=scale,
        **_choice(metadata, kind),
        **sizes,
        **common,
    )


def _kind(metadata: Metadata) -> type[PretrainedConfig]:
    if (gating := metadata.get("expert_gating_func", 1)) not in tuple(CONFIGS):
        raise ValueError(f"expert_gating_func must be one of {', '.join(map(str, CONFIGS))}, got {gating}")
    return CONFIGS[gating]


def _choice(metadata: Metadata, kind: type[PretrainedConfig]) -> dict:
    """How experts are chosen: of the best groups by their largest score (V2) or the sum of their two largest (V3).

    A file from before llama.cpp knew of groups says nothing of them and is run, as there, without.
    """
    groups, used = (metadata.count(f"expert_group_{name}") or 1 for name in ("count", "used_count"))
    experts, k = metadata.get("expert_count"), metadata.get("expert_used_count")
    if experts % groups or experts < 2 * groups:
        got = f"{groups} groups"
        raise ValueError(f"expert_group_count must divide {experts} experts into groups of at least 2, got {got}")
    if used > groups:
        raise ValueError(f"expert_group_used_count must be at most {groups}, got {used}")
    if k > used * (experts // groups):
        raise ValueError(
            f"expert_used_count must be at most {used * (experts // groups)}, those of the groups, got {k}"
        )
    if type(norm := metadata.get("expert_weights_norm", False)) is not bool:
        raise ValueError(f"expert_weights_norm must be true or false, got {norm}")
    found = {"n_group": groups, "topk_group": used}
    if kind is DeepseekV3Config:
        return found | {"norm_topk_prob": norm, "num_mtp_layers": 0}
    metadata.check({"expert_weights_norm": (False,)})  # its class of transformers has none
    return found | {"topk_method": "greedy" if groups == 1 else "group_limited_greedy"}


def _rope(metadata: Metadata) -> dict:
    """YaRN with a scale of the products of heads, which llama.cpp has as a tenth."""
    rope = metadata.rope(("none", "yarn"))
    if rope["rope_type"] == "default":
        return rope
    scale = 10 * metadata.positive("rope.scaling.yarn_log_multiplier", float)
    return rope | {"mscale": scale, "mscale_all_dim": scale}


def shape_in_file(config: PretrainedConfig, half: str) -> list[int]:
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    return [heads, rank, config.qk_nope_head_dim] if half == "_k" else [heads, config.v_head_dim, rank]


def joined(file: GgufFile, keys: str) -> Tensor:
    """kv_b_proj.weight [heads * (keys + values), rank] from the names of its halves."""
    keys, values = file.unpack(keys), file.unpack(keys.replace("attn_k_b", "attn_v_b"))
    return torch.cat([keys.mT, values], 1).flatten(0, 1)
