"""load_gguf: a Mixture-of-Experts model of transformers from a GGUF file, its experts on moert's packed kernels.

transformers' own GGUF loading unpacks all experts, knows neither OLMoE nor Mixtral, and takes the experts' width of
Qwen3-MoE from its defaults; so names and sizes of these and of gpt-oss are here.
"""

import math
import re
from dataclasses import dataclass, field
from os import PathLike

import torch
from torch import Tensor
from transformers import (
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from moert.integrations.transformers.loading import TOLD, foreign_, loaded
from moert.quant.format import RowFormat
from moert.quant.int8 import Int8
from moert.quant.readers import GgufFile
from moert.quant.readers.ggml import gguf

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
ROPE_FACTORS = "rope_freqs.weight"  # what llama.cpp divides rotary frequencies by: Llama 3's scaling
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
    rope_scaling: tuple[str, ...] = ("none",)


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
        rope_scaling=("none", "yarn"),
    ),
}
OUTER = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight", "output": "lm_head.weight"}


def load_gguf(
    path: str | PathLike, convert: str | RowFormat = Int8(128), precision: str = "auto", **options
) -> PreTrainedModel:
    """Qwen3-MoE, OLMoE, Mixtral or gpt-oss; experts as load_quantized has them, all else unpacked to dtype (float32).

    options are from_pretrained's.  The tokenizer is not read: transformers' AutoTokenizer takes gguf_file.
    """
    file = GgufFile(path)
    config = config_of(file)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    _check_shapes(file, model_class, config)
    foreign_(config, {"quant_method": "gguf"}, convert, precision)
    options = {"dtype": torch.float32} | options
    tensors = dict(pair for name in file.tensors for pair in _tensors(file, name, config, options["dtype"]))
    return loaded(path, *model_class.from_pretrained(None, config=config, state_dict=tensors, **TOLD, **options))


def config_of(file: GgufFile) -> PretrainedConfig:
    """The configuration that the metadata stand for."""
    architecture = file.metadata.get("general.architecture")
    if architecture not in FAMILIES or not file.metadata.get(f"{architecture}.expert_count"):
        got = f"{architecture} of {file.metadata.get(f'{architecture}.expert_count', 0)} experts"
        raise ValueError(f"general.architecture must be one of {', '.join(FAMILIES)} with experts, got {got}")
    family, sizes = FAMILIES[architecture], {}
    for key, name in (SIZES | family.sizes).items():
        sizes[name] = _positive(file, f"{architecture}.{key}", float if name == "rms_norm_eps" else int)
    _check(file, architecture, sizes)
    _check_experts(file, architecture)
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} must hold token_embd.weight, got none")
    return family.config(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        rope_parameters=_rope(file, architecture),
        tie_word_embeddings="output.weight" not in file.tensors,
        **sizes,
        **family.fixed,
    )


def _rope(file: GgufFile, architecture: str) -> dict:
    """Frequencies of gpt-oss's YaRN are blended from fractional positions on, as it was trained: llama.cpp rounds."""
    number = lambda key, kind, default=None: _positive(file, f"{architecture}.rope.{key}", kind, default)  # noqa: E731
    rope = {"rope_type": "default", "rope_theta": number("freq_base", float, 1e4)}
    if _scaling(file, architecture) == "none":
        return rope
    return rope | {
        "rope_type": "yarn",
        "factor": float(number("scaling.factor", float)),
        "original_max_position_embeddings": number("scaling.original_context_length", int),
        "beta_fast": float(number("scaling.yarn_beta_fast", float, 32.0)),
        "beta_slow": float(number("scaling.yarn_beta_slow", float, 1.0)),
        "truncate": False,
    }


def _scaling(file: GgufFile, architecture: str) -> str:
    scaling, read = file.metadata.get(f"{architecture}.rope.scaling.type", "none"), FAMILIES[architecture].rope_scaling
    if scaling not in read:
        raise ValueError(f"rope.scaling.type must be {' or '.join(read)}, got {scaling}")
    return scaling


def _positive(file: GgufFile, key: str, kind: type, default: float | None = None) -> float:
    """A value of the metadata, an int where kind is int; 0, negative numbers, infinity and NaN are errors."""
    value = file.metadata.get(key, default)
    if type(value) not in (int, kind) or not 0 < value < math.inf:
        number = "integer" if kind is int else "finite number"
        raise ValueError(f"{key} must be a positive {number}, got {value}")
    return value


def _check(file: GgufFile, architecture: str, sizes: dict) -> None:
    """Numbers that must fit each other, and those that would change the model in a way that is not read."""
    get = lambda key: file.metadata.get(f"{architecture}.{key}")  # noqa: E731
    blocks = {int(found[1]) for name in file.tensors if (found := re.match(r"blk\.(\d{1,6})\.", name))}
    if get("block_count") != len(blocks) or max(blocks, default=0) >= len(blocks):
        raise ValueError(f"block_count must be that of the tensors, {len(blocks)} in a row, got {get('block_count')}")
    if get("expert_used_count") > get("expert_count"):
        raise ValueError(
            f"expert_used_count must be at most expert_count={get('expert_count')}, got {get('expert_used_count')}"
        )
    head = sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    if head < 1:
        raise ValueError(
            f"attention.head_count must be at most {sizes['hidden_size']}, got {get('attention.head_count')}"
        )
    read = dict.fromkeys(("rope.dimension_count", "attention.key_length", "attention.value_length"), (head,))
    read |= {"rope.scale_linear": (1, 0), "attention.clamp_kqv": (0,)}  # llama.cpp takes 0 for 1
    read |= {"rope.freq_base_swa": (get("rope.freq_base"),)}
    if _scaling(file, architecture) == "none":
        read |= {"rope.scaling.factor": (1, 0)}
    else:
        read |= {f"rope.scaling.{name}": (1,) for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor")}
        read |= {"rope.scaling.yarn_log_multiplier": (0,)}
    if "sliding_window" not in sizes:
        read |= {"attention.sliding_window": (0,)}
    _check_values(file, architecture, read)
    scale = get("attention.scale")
    if scale not in (None, 0) and not (type(scale) is float and math.isclose(scale, head**-0.5, rel_tol=1e-6)):
        raise ValueError(f"{architecture}.attention.scale must be {head**-0.5}, the only one read, got {scale}")


def _check_experts(file: GgufFile, architecture: str) -> None:
    """Of what llama.cpp's router can do, that which the classes of transformers compute."""
    family = FAMILIES[architecture]
    read = {"expert_gating_func": (family.gating,), "expert_weights_norm": (family.weights_norm,)}
    read |= {"expert_weights_scale": (1, 0)}
    _check_values(file, architecture, read)


def _check_values(file: GgufFile, architecture: str, read: dict[str, tuple]) -> None:
    """Values, where the file gives them, that leave the model as it is read."""
    for key, values in read.items():
        if (got := file.metadata.get(f"{architecture}.{key}")) not in (None, *values):
            raise ValueError(f"{architecture}.{key} must be {values[0]}, the only one read, got {got}")


def _check_shapes(file: GgufFile, model_class: type, config: PretrainedConfig) -> None:
    """Before memory is taken for sizes that only the metadata have."""
    try:
        with torch.device("meta"):
            model = model_class(config)
    except Exception as error:  # whatever sizes can provoke
        raise ValueError(f"{file.path} must have sizes that fit {model_class.__name__}, got {error}") from error
    wanted = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    found = set(model.all_tied_weights_keys)
    for name, tensor in file.tensors.items():
        if name == ROPE_FACTORS:
            continue
        whole = _name_in_model(file, name, config)
        weight, half = re.fullmatch(r"(.*?)(_gate|_up|_down)?", whole).groups()
        if weight not in wanted:
            raise ValueError(f"{file.path} must hold tensors of {model_class.__name__} alone, got {whole}")
        shape = list(wanted[weight])
        if half and len(shape) == 3 and isinstance(config, GptOssConfig):  # its class has [E, columns, rows]
            shape[1:] = shape[:0:-1]
        if half in ("_gate", "_up"):
            shape[1] //= 2
        if list(tensor.shape) != shape:
            raise ValueError(f"{whole} must have shape {shape} by the config, got {list(tensor.shape)}")
        found.add(weight)
    if missing := wanted.keys() - found:
        raise ValueError(f"checkpoint must hold every weight, got no {min(missing)}")


def _tensors(file: GgufFile, name: str, config: PretrainedConfig, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    """What a tensor of the file is in the state dict; experts stay as they are, with the number of their type."""
    if name == ROPE_FACTORS:
        if (other := file.unpack(name).flatten()).ne(1).any():
            got = float(other[other.ne(1)][0])
            raise ValueError(f"{name} must be 1 everywhere, as scaled rotary frequencies are not read, got {got}")
        return []
    whole = _name_in_model(file, name, config)
    if "_exps.bias" in name:
        return _biases(file, name, whole, dtype)
    if ".experts." in whole:
        kind = gguf().GGMLQuantizationType[file.tensors[name].type]
        return [(whole, file.blocks(name)), (f"{whole}_type", torch.tensor(int(kind)))]
    value = file.unpack(name).to(dtype)
    if isinstance(config, MixtralConfig) and name.endswith((".attn_q.weight", ".attn_k.weight")):
        heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
        value = _half_by_half(value, heads)
    return [(whole, value)]


def _biases(file: GgufFile, name: str, whole: str, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    """Those of gate and up by turns, as gpt-oss has them, where the file's gate is met."""
    if "_up_exps" in name:
        return []
    bias = file.unpack(name)
    if "_gate_exps" in name:
        bias = torch.stack([bias, file.unpack(name.replace("_gate_", "_up_"))], -1).flatten(1)
    return [(re.sub("_(gate|down)$", "", whole), bias.to(dtype))]


def _name_in_model(file: GgufFile, name: str, config: PretrainedConfig) -> str:
    """Of a weight of experts, and its bias, also which part it is: …gate_up_proj_up, …gate_up_proj_bias_up."""
    names = next(family.names for family in FAMILIES.values() if isinstance(config, family.config))
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    inner = names.get(block[2]) if block else OUTER.get(name.removesuffix(".weight"))
    if inner is None:
        raise ValueError(f"{file.path} must hold tensors of {type(config).__name__} alone, got {name}")
    if block and block[3] == "bias":
        inner = re.sub(r"\.weight$", ".bias", re.sub("_(gate|up|down)$", r"_bias_\1", inner))
    return f"model.layers.{block[1]}.{inner}" if block else inner


def _half_by_half(rows: Tensor, heads: int) -> Tensor:
    """Rows of rotary pairs side by side, as llama.cpp turns them -> the first ones of all pairs, then the second."""
    if rows.shape[0] % (2 * heads):
        raise ValueError(f"attention must have a multiple of {2 * heads} rows, got {rows.shape[0]}")
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
