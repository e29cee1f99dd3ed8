"""A Qwen3-MoE of transformers as GGUF files, its experts in any type that the gguf package rounds to."""

from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from moert.integrations.transformers.gguf_families import FAMILIES, NAMES, OUTER, SIZES

EXPERTS = {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}
ROUTER = "ffn_gate_inp"


def write_gguf(model: nn.Module, kind: str, path: Path) -> None:
    """Experts are of the type, matrices beside them F16 in a file of F16 and BF16 else, routers and norms F32.

    The model's experts become the numbers that the file holds.
    """
    writer = gguf.GGUFWriter(path, "qwen3moe")
    _add_sizes(writer, model.config)
    tensors = {name: model.get_parameter(inner) for name, inner in OUTER.items()}
    for i in range(model.config.num_hidden_layers):
        tensors |= {f"blk.{i}.{name}.weight": _weight(model, i, name) for name in NAMES}
    for name, weight in tensors.items():
        of_experts = name.split(".")[-2] in EXPERTS
        data, of = rounded(weight, kind if of_experts else _beside(name, weight, kind))
        if of_experts:
            weight.copy_(torch.from_numpy(gguf.quants.dequantize(data, of).reshape(weight.shape)))
        writer.add_tensor(name, data, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rounded(weight: Tensor, kind: str) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    of = gguf.GGMLQuantizationType[kind]
    return gguf.quants.quantize(weight.detach().float().contiguous().numpy(), of), of


def _add_sizes(writer: gguf.GGUFWriter, config) -> None:
    for key, name in (SIZES | FAMILIES["qwen3moe"].sizes).items():
        value = getattr(config, name)
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"qwen3moe.{key}", value)
    writer.add_uint32("qwen3moe.attention.value_length", config.head_dim)
    writer.add_float32("qwen3moe.rope.freq_base", config.rope_parameters["rope_theta"])
    writer.add_uint32("qwen3moe.vocab_size", config.vocab_size)
    writer.add_string("tokenizer.ggml.model", "no_vocab")  # ids go in, ids come out


def _weight(model: nn.Module, layer: int, name: str) -> Tensor:
    """A view of the model's own: gate and up are halves of one parameter."""
    inner = NAMES[name]
    if name not in EXPERTS:
        return model.get_parameter(f"model.layers.{layer}.{inner}")
    parameter, _, half = inner.rpartition("_")
    weight = model.get_parameter(f"model.layers.{layer}.{parameter}").data
    return weight if half == "down" else weight.chunk(2, dim=1)[half == "up"]


def _beside(name: str, weight: Tensor, kind: str) -> str:
    if weight.dim() == 1 or ROUTER in name:
        return "F32"
    return "F16" if kind == "F16" else "BF16"
