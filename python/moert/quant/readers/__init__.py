"""Quantized matrices of other libraries' checkpoints, as packed tensors of moert.quant (docs/quantized.md).

One file a layout.  Where a format of moert holds the same numbers, bits are moved and nothing is rounded.
"""

from moert.quant.readers.awq import Awq
from moert.quant.readers.compressed_tensors import CompressedInt
from moert.quant.readers.fp8_blocks import Fp8Blocks
from moert.quant.readers.ggml import Ggml, GgmlExperts
from moert.quant.readers.gguf_file import GgufFile, gguf_experts
from moert.quant.readers.gptq import Gptq
from moert.quant.readers.layout import Layout, Read
from moert.quant.readers.mxfp4_blocks import Mxfp4Blocks

METHODS = {
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": CompressedInt,
    "fp8": Fp8Blocks,
    "mxfp4": Mxfp4Blocks,
    "gguf": GgmlExperts,
}

__all__ = [
    "Awq",
    "CompressedInt",
    "Fp8Blocks",
    "Ggml",
    "GgmlExperts",
    "GgufFile",
    "Gptq",
    "Layout",
    "Mxfp4Blocks",
    "Read",
    "gguf_experts",
    "layout_of",
]


def layout_of(config: dict) -> Layout:
    """The layout that the quantization_config of a config.json describes."""
    if not isinstance(config, dict):
        raise TypeError(f"quantization_config must be a dict, got {type(config).__name__}")
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"quant_method must be one of {', '.join(METHODS)}, got {method}")
    return METHODS[method].of_config(config)
