"""Tiny random models of the families whose MoE blocks lie outside transformers' experts interface."""

import collections

import torch
import transformers
from families import SIZES, randomize, tiny_inputs
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

ENCODER_DECODER = {"vocab_size": 64, "d_model": 32, "num_experts": 6, "dropout_rate": 0.0, "dropout": 0.0}
ENCODER_DECODER |= {"decoder_start_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Few enough for tokens to be dropped.
SWITCH = {"d_kv": 8, "d_ff": 24, "num_heads": 4, "expert_capacity": 2, "num_layers": 4, "num_sparse_encoder_layers": 2}
SWITCH |= {"num_decoder_layers": 4, "num_sparse_decoder_layers": 2}
NLLB = {"encoder_layers": 2, "decoder_layers": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2}
NLLB |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
NLLB |= {"attention_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "expert_capacity": 3}
DBRX_PARTS = {
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 2},
}
PICTURE = {"image_size": 28, "patch_size": 14}
# Clamps of the routed and the shared experts, in one layer of two.
STEP = {
    "share_expert_dim": 24,
    "sliding_window": 4,
    "swiglu_limits": [0.5, 0],
    "swiglu_limits_shared": [0, 1.0],
    "mtp_layer_types": [],
}

# Family: the model, its configuration (SIZES where it has such a field), and how its experts run.
MODELS: dict[str, tuple[str, dict, str]] = {
    "dbrx": ("DbrxForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 2} | DBRX_PARTS, "grouped GEMMs"),
    "jetmoe": ("JetMoeForCausalLM", {"kv_channels": 8}, "swiglu"),
    "llama4": ("Llama4ForCausalLM", {"intermediate_size_mlp": 24}, "swiglu, transposed, scaled input"),
    "longcat_flash": (
        "LongcatFlashForCausalLM",
        {"num_layers": 2, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 24, "moe_topk": 3, "zero_expert_num": 3},
        "swiglu, identity experts",
    ),
    "nllb_moe": ("NllbMoeForConditionalGeneration", ENCODER_DECODER | NLLB, "relu, bias, packed"),
    "step3p7": ("Step3p7ForConditionalGeneration", {}, "own gate"),
    "switch_transformers": ("SwitchTransformersForConditionalGeneration", ENCODER_DECODER | SWITCH, "relu, packed"),
    "vitpose_backbone": (
        "VitPoseBackbone",
        {"num_experts": 3, "part_features": 8, "mlp_ratio": 2},
        "one linear, packed",
    ),
}


def outside_model(family: str, **changes) -> PreTrainedModel:
    name, fields, _ = MODELS[family]
    model_class = getattr(transformers, name)
    config_class = model_class.config_class
    fields = _known(config_class, SIZES) | fields | changes
    if family == "step3p7":
        text = _known(config_class.sub_configs["text_config"], SIZES) | STEP
        vision = _known(config_class.sub_configs["vision_config"], SIZES) | PICTURE
        fields = {"text_config": text, "vision_config": vision}
    if family == "vitpose_backbone":
        fields |= {"image_size": (32, 32), "patch_size": (16, 16)}
    torch.manual_seed(0)
    model = randomize(model_class(config_class(**fields)))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("bias"):
                p.normal_(std=0.3)
    return model


def inputs_of(model: PreTrainedModel) -> dict:
    """What a forward without a loss needs."""
    inputs = tiny_inputs(model)
    return inputs | ({"decoder_input_ids": inputs["input_ids"]} if model.config.is_encoder_decoder else {})


def _known(config_class, fields: dict) -> dict:
    """Those fields that the configuration has."""
    return {name: value for name, value in fields.items() if name in config_class.__dataclass_fields__}


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ran = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moert":
            self.ran[func._opname] += 1
        return func(*args, **(kwargs or {}))


def operators_of(call) -> dict[str, int]:
    """How often each operator of moert runs in call()."""
    with _Operators() as operators, torch.no_grad():
        call()
    return dict(operators.ran)
