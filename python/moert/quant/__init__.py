"""Formats of quantized weights and the ways into them, each imported when it is asked for."""

from importlib import import_module

_LATER = {
    "GPTQ": "gptq",
    "BitNested": "bit_nested",
    "Format": "format",
    "Fp8": "fp8",
    "Int4": "int4",
    "Int4Asymmetric": "int4",
    "Int8": "int8",
    "Mxfp4": "mxfp4",
    "PackedTensor": "format",
    "SubOneBit": "sub1",
    "SubOneBitTensor": "sub1",
    "Ternary2": "ternary",
    "Ternary5": "ternary",
}
__all__ = sorted(_LATER)  # noqa: PLE0605


def __getattr__(name: str):
    if name in _LATER:
        return getattr(import_module(f"moert.quant.{_LATER[name]}"), name)
    raise AttributeError(f"module 'moert.quant' has no attribute {name!r}")
