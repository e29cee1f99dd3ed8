"""Every experts class behind transformers' experts interface, found by scanning, each with a tiny random model."""

import dataclasses
import functools
import importlib
import inspect
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

MARK = "@use_experts_implementation"

# What a configuration field becomes wherever a configuration has it.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 64,
    "unpadded_vocab_size": 64,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "mlp_layer_types": ["sparse", "sparse"],
    "mlp_only_layers": [],
    "n_group": 2,
    "topk_group": 1,
    # Small enough to bite on random activations of about unit size.
    "swiglu_limit": 2.0,
    # Multi-head latent attention, sparse attention, linear attention, state space models
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_num_heads": 4,
    "mamba_n_heads": 4,
    "mamba_head_dim": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    # Encoders of pictures and sound
    "depth": 1,
    "num_heads": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "d_model": 32,
    "output_dim": 32,
    "projection_intermediate_size": 32,
    "projector_hidden_size": 32,
    "output_channels": 8,
    "downsample_channels": [8, 8],
    "downsample_hidden_size": 8,
    "max_source_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Per experts class: further fields, also for one class of configuration only.
GEMMA = {"num_experts": 6, "top_k_experts": 2, "enable_moe_block": True, "global_head_dim": 8, "canvas_length": 8}
GEMMA |= {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
PIXELS = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
QSA = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
SPECIAL: dict[str, dict] = {
    "DeepseekOcr2Text": {"head_dim": 8},
    "DiffusionGemmaText": GEMMA,
    "Gemma4Text": GEMMA,
    "DeepseekV4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "Ernie4_5_VLMoeMoe": {
        "Ernie4_5_VLMoeTextConfig": {"rope_parameters": MROPE | {"mrope_section": [1, 1, 2]}},
        "moe_intermediate_size": [24, 24],
        "moe_num_experts": 6,
        "moe_k": 2,
    },
    "Glm4vMoeText": {"Glm4vMoeTextConfig": {"rope_parameters": MROPE | {"mrope_section": [2, 1, 1]}}},
    "Glm5NextText": LINEAR_AND_FULL | {"index_topk": 4, "index_kpool": 2, "qk_rope_head_dim": 0, "head_dim": 0},
    "GraniteMoeHybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "HYV4VL": {"HYV4VLTextConfig": {"rope_parameters": MROPE | {"mrope_section": [2, 1, 1]}}},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0},
    "KimiLinear": LINEAR_AND_FULL,
    "Lfm2Moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "MiMoV2Flash": {"head_dim": 24, "num_key_value_heads": 2},
    "Qwen3_5Moe": LINEAR_AND_FULL,
    "Qwen3Next": LINEAR_AND_FULL,
    "Qwen4ExpText": LINEAR_AND_FULL | QSA,
    "Qwen3OmniMoeThinkerText": {"Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 63}},
    "Qwen3OmniMoeTalkerText": {
        "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 24},
        "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
        "thinker_hidden_size": 32,
        "num_code_groups": 3,
    },
    "Zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "BailingHybrid": {"layer_group_size": 2},
    "MistralLarge4Text": {"auto": {"model_type": "pixtral", "image_size": 32, "patch_size": 16} | PIXELS},
    "MuseSpark": {
        "moe_hidden_size": 16,
        "MuseSparkAudioConfig": {"num_hidden_layers": 1, "patch_sizes": [16], "hidden_sizes": [32], "depths": [1]},
    },
}


@dataclasses.dataclass(frozen=True)
class Family:
    name: str
    experts: type[nn.Module]

    @property
    def id(self):
        return self.experts.__name__.removesuffix("Experts")


@functools.cache
def families() -> list[Family]:
    found = []
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if MARK in path.read_text():
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            classes = inspect.getmembers(module, inspect.isclass)
            # The decorator wraps __init__ and leaves what it wrapped behind.
            found += [
                Family(path.parent.name, c)
                for _, c in classes
                if c.__module__ == module.__name__ and "_apply_gate" in c.__dict__ and hasattr(c.forward, "__wrapped__")
            ]
    return found


def shrink(config: type[PreTrainedConfig], special: dict) -> dict:
    """Keyword arguments that make a tiny configuration of this class and of all its parts."""
    if not dataclasses.is_dataclass(config):  # an AutoConfig: only its own special fields say which
        return special.get("auto", {})
    fields = {f.name for f in dataclasses.fields(config)}
    kwargs = {name: size for name, size in SIZES.items() if name in fields}
    for name, part in getattr(config, "sub_configs", {}).items():
        kwargs[name] = shrink(part, special)
    return (
        kwargs | {name: value for name, value in special.items() if name in fields} | special.get(config.__name__, {})
    )


def tiny_model(family: Family) -> PreTrainedModel:
    """The first model class of the family whose tiny random model contains its experts, generating ones first."""
    special = SPECIAL.get(family.id, {})
    module = inspect.getmodule(family.experts)
    models = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, PreTrainedModel) and c.__module__ == module.__name__ and c.config_class
    ]
    models.sort(key=lambda c: (not issubclass(c, GenerationMixin), "For" not in c.__name__))
    errors = []
    for model_class in models:
        if special.get("model", model_class.__name__) != model_class.__name__:
            continue
        try:
            config = model_class.config_class(**shrink(model_class.config_class, special))
            torch.manual_seed(0)
            model = model_class(config)
        except Exception as error:
            errors.append(f"{model_class.__name__}: {type(error).__name__}: {error}")
            continue
        if any(isinstance(m, family.experts) for m in model.modules()):
            return randomize(model)
        errors.append(f"{model_class.__name__} has no {family.experts.__name__}")
    raise LookupError(f"{family.id} has no tiny model: " + "; ".join(errors))


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    return model.config.get_text_config(decoder=True)


def tiny_inputs(model: PreTrainedModel, seed: int = 1, generate: bool = False) -> dict:
    """Two rows of seven tokens, or two pictures; for the talker of Qwen3-Omni what its thinker would hand it."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        pixels = torch.randn(2, 3, 32, 32, generator=generator).to(next(model.parameters()).dtype)
        return {"pixel_values": pixels, "dataset_index": torch.tensor([1, 0])}
    if model.base_model_prefix != "talker":
        return {"input_ids": torch.randint(3, 60, (2, 7), generator=generator)}
    dtype, hidden = next(model.parameters()).dtype, text_config(model).hidden_size
    inputs = {"inputs_embeds": torch.randn(2, 7, hidden, generator=generator).to(dtype)}
    if generate:
        inputs |= {"trailing_text_hidden": torch.zeros(2, 3, hidden), "tts_pad_embed": torch.zeros(2, 1, hidden)}
        inputs |= {"talker_input_ids": torch.ones(2, 7, dtype=torch.long), "output_hidden_states": True}
    return inputs


@torch.no_grad()
def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Weights with which every layer matters: an initial deviation of 0.02 would leave gates linear and clamps idle."""
    torch.manual_seed(0)
    for p in model.parameters():
        if p.dim() >= 2:
            p.normal_(std=p.shape[-1] ** -0.5)
    for name, table in model.named_buffers():
        if name.endswith(".tid2eid"):  # a table of zeros sends every token to expert 0
            table.copy_((torch.arange(table.numel()) % 6).view(table.shape))
    return model.eval()
