"""load_gguf: a Mixture-of-Experts model of transformers from a GGUF file, its experts on moert's packed kernels.

transformers' own GGUF loading unpacks all experts, knows neither OLMoE nor Mixtral, and takes the experts' width of
Qwen3-MoE from its defaults; so names and sizes are in gguf_families.py.
"""

import re
from os import PathLike

import torch
from torch import Tensor
from transformers import GptOssConfig, MixtralConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from moert.integrations.transformers import gguf_deepseek
from moert.integrations.transformers.gguf_families import OUTER, config_of, names_of
from moert.integrations.transformers.loading import TOLD, foreign_, loaded
from moert.quant.format import RowFormat
from moert.quant.int8 import Int8
from moert.quant.readers import GgufFile
from moert.quant.readers.ggml import gguf

WHOLE = ([""], ["_down"], ["_gate", "_up"], ["_k", "_v"])  # the parts that make a weight
ROUTERS = ("ffn_gate_inp.weight", "exp_probs_b.bias")
ROPE_FACTORS = "rope_freqs.weight"  # what llama.cpp divides rotary frequencies by: Llama 3's scaling


def load_gguf(
    path: str | PathLike, convert: str | RowFormat = Int8(128), precision: str = "auto", **options
) -> PreTrainedModel:
    """Qwen3-MoE, OLMoE, Mixtral, gpt-oss, DeepSeek-V2 or V3; experts as load_quantized has them, all else unpacked to
    dtype (float32).

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


def _check_shapes(file: GgufFile, model_class: type, config: PretrainedConfig) -> None:
    """Before memory is taken for sizes that only the metadata have."""
    try:
        with torch.device("meta"):
            model = model_class(config)
    except Exception as error:  # whatever sizes can provoke
        raise ValueError(f"{file.path} must have sizes that fit {model_class.__name__}, got {error}") from error
    wanted = {name: list(value.shape) for name, value in model.state_dict().items()}
    found: dict[str, list[str]] = {name: [""] for name in model.all_tied_weights_keys}
    for name, tensor in file.tensors.items():
        if name == ROPE_FACTORS:
            continue
        whole = _name_in_model(file, name, config)
        weight, part = re.fullmatch(r"(.*?)(_gate|_up|_down|_k|_v|)", whole).groups()
        if weight not in wanted:
            raise ValueError(f"{file.path} must hold tensors of {model_class.__name__} alone, got {whole}")
        shape = _shape_in_file(config, part, wanted[weight])
        if list(tensor.shape) != shape:
            raise ValueError(f"{whole} must have shape {shape} by the config, got {list(tensor.shape)}")
        found.setdefault(weight, []).append(part)
    if missing := wanted.keys() - found.keys():
        raise ValueError(f"checkpoint must hold every weight, got no {min(missing)}")
    for weight, parts in found.items():
        if sorted(parts) not in WHOLE:
            raise ValueError(f"{file.path} must hold {weight} once, whole or in its halves, got {len(parts)} tensors")


def _shape_in_file(config: PretrainedConfig, part: str, shape: list[int]) -> list[int]:
    """What a tensor's is that stands for such a part of a weight of this shape."""
    if part in ("_k", "_v"):
        return gguf_deepseek.shape_in_file(config, part)
    if part and len(shape) == 3 and isinstance(config, GptOssConfig):  # its class has [E, columns, rows]
        shape = [shape[0], shape[2], shape[1]]
    return [shape[0], shape[1] // 2, *shape[2:]] if part in ("_gate", "_up") else shape


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
    if whole.endswith(gguf_deepseek.VALUES):
        return []
    if whole.endswith(gguf_deepseek.KEYS):
        return [(whole.removesuffix("_k"), gguf_deepseek.joined(file, name).to(dtype))]
    if ".experts." in whole:
        kind = gguf().GGMLQuantizationType[file.tensors[name].type]
        return [(whole, file.blocks(name)), (f"{whole}_type", torch.tensor(int(kind)))]
    value = file.unpack(name)
    if not name.endswith(ROUTERS):  # which the model may want in float32 whatever dtype is; the loader casts them else
        value = value.to(dtype)
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
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    inner = names_of(config).get(block[2]) if block else OUTER.get(name)
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
