"""The architectures of GGUF files that load_gguf knows, with llama.cpp's names of their numbers and tensors."""

from dataclasses import dataclass, field

from transformers import GptOssConfig, MixtralConfig, OlmoeConfig, PretrainedConfig, Qwen3MoeConfig

from moert.integrations.transformers import gguf_deepseek
from moert.integrations.transformers.gguf_metadata import NO_SCALING, Metadata
from moert.quant.readers import GgufFile

SIZES = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "expert_used_count": "num_experts_per_tok",
}
NAMES = {
    "attn_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "attn_q": "self_attn.q_proj.weight",
    "attn_k": "self_attn.k_proj.weight",
    "attn_v": "self_attn.v_proj.weight",
    "attn_output": "self_attn.o_proj.weight",
    "attn_q_norm": "self_attn.q_norm.weight",
    "attn_k_norm": "self_attn.k_norm.weight",
    "ffn_gate_inp": "mlp.gate.weight",
    "ffn_gate_exps": "mlp.experts.gate_up_proj_gate",
    "ffn_up_exps": "mlp.experts.gate_up_proj_up",
    "ffn_down_exps": "mlp.experts.down_proj_down",
}
GPT_OSS_NAMES = {name: inner for name, inner in NAMES.items() if not name.endswith("_norm")} | {
    "attn_norm": NAMES["attn_norm"],
    "post_attention_norm": NAMES["ffn_norm"],
    "attn_sinks": "self_attn.sinks",
    "ffn_gate_inp": "mlp.router.weight",
}
SOFTMAX = 1  # llama.cpp's number of it, over all experts
SOFTMAX_OF_CHOSEN = 3  # and over the chosen experts


@dataclass(frozen=True)
class Family:
    """What llama.cpp calls an architecture: the names of its numbers and tensors, and what it takes for granted."""

    config: type[PretrainedConfig]
    sizes: dict[str, str]  # beside SIZES
    fixed: dict = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=lambda: NAMES)
    gating: int = SOFTMAX
    weights_norm: bool = False  # whether the chosen weights are divided by their sum
    rope_scaling: tuple[str, ...] = (NO_SCALING,)


FAMILIES = {
    "qwen3moe": Family(
        Qwen3MoeConfig,
        {"attention.key_length": "head_dim", "expert_feed_forward_length": "moe_intermediate_size"}
        | {"expert_count": "num_experts"},
        {"norm_topk_prob": True},
        weights_norm=True,
    ),
    "olmoe": Family(OlmoeConfig, {"expert_count": "num_experts", "feed_forward_length": "intermediate_size"}),
    "llama": Family(
        MixtralConfig,
        {"expert_count": "num_local_experts", "feed_forward_length": "intermediate_size"},
        weights_norm=True,
    ),
    "gpt-oss": Family(
        GptOssConfig,
        {"attention.key_length": "head_dim", "expert_feed_forward_length": "intermediate_size"}
        | {"expert_count": "num_local_experts", "attention.sliding_window": "sliding_window"},
        names=GPT_OSS_NAMES,
        gating=SOFTMAX_OF_CHOSEN,
        rope_scaling=(NO_SCALING, "yarn"),
    ),
}
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ARCHITECTURES = (*FAMILIES, gguf_deepseek.ARCHITECTURE)


def config_of(file: GgufFile) -> PretrainedConfig:
    """The configuration that the metadata stand for."""
    metadata = Metadata(file)
    if metadata.architecture not in ARCHITECTURES or not metadata.get("expert_count"):
        got = f"{metadata.architecture} of {metadata.get('expert_count', 0)} experts"
        raise ValueError(f"general.architecture must be one of {', '.join(ARCHITECTURES)} with experts, got {got}")
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} must hold token_embd.weight, got none")
    vocabulary = file.tensors["token_embd.weight"].shape[0]
    common = {"vocab_size": vocabulary, "tie_word_embeddings": "output.weight" not in file.tensors}
    common |= metadata.tokens(vocabulary)
    if metadata.architecture == gguf_deepseek.ARCHITECTURE:
        return gguf_deepseek.config_of(metadata, **common)
    return _config_of(FAMILIES[metadata.architecture], metadata, **common)


def _config_of(family: Family, metadata: Metadata, **common) -> PretrainedConfig:
    sizes = metadata.sizes(SIZES | family.sizes)
    metadata.check_counts()
    head = sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    if head < 1:
        got = sizes["num_attention_heads"]
        raise ValueError(f"attention.head_count must be at most {sizes['hidden_size']}, got {got}")
    if head % 2:
        raise ValueError(f"the columns of a head, which are turned in pairs, must be even, got {head}")
    rope = metadata.rope(family.rope_scaling)
    metadata.check_attention(head**-0.5, "sliding_window" in sizes)
    read = dict.fromkeys(("rope.dimension_count", "attention.key_length", "attention.value_length"), (head,))
    read |= {"rope.scaling.yarn_log_multiplier": (0,), "expert_weights_scale": (1, 0)}
    metadata.check(read | {"expert_gating_func": (family.gating,), "expert_weights_norm": (family.weights_norm,)})
    if rope["rope_type"] == "yarn":
        rope["truncate"] = False  # of gpt-oss, which blends frequencies from fractional places on; llama.cpp rounds
    return metadata.config(family.config, rope_parameters=rope, **common, **sizes, **family.fixed)


def names_of(config: PretrainedConfig) -> dict[str, str]:
    """What the tensors of a block are called in the model, by llama.cpp's names."""
    if isinstance(config, tuple(gguf_deepseek.CONFIGS.values())):
        return NAMES | gguf_deepseek.NAMES
    return next(family.names for family in FAMILIES.values() if isinstance(config, family.config))
