"""Experts of a model to packed weights, in place."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from moert.experts.glu import GluExperts
from moert.experts.quantized import QuantizedExperts
from moert.quant.format import RowFormat
from moert.quant.int4 import Int4, Int4Asymmetric
from moert.quant.int8 import Int8
from moert.quant.mxfp4 import Mxfp4
from moert.quant.ternary import Ternary2, Ternary5

PRECISIONS = ("auto", "full", "int8", "int8_group32")
FORMATS = {kind.name: kind for kind in (Int8, Int4, Int4Asymmetric, Mxfp4, Ternary2, Ternary5)}


def quantize_(
    model: nn.Module,
    format: str | RowFormat = "int4",
    group: int | None = None,
    skip: Sequence[str] = (),
    precision: str = "auto",
) -> list[str]:
    """Replace the GluExperts of the model by QuantizedExperts, one after the other; returns their names, in order.

    In a transformers model the experts of its experts interface are packed where they are, and save_pretrained writes
    them packed.

    format is a name (with the group, or the format's own default) or a format.  skip has names of modules, * and ? as
    in file names; what it names, and what lies below it, stays.  A model without any GluExperts left is an error.
    """
    fmt = format_of(format, group)
    check_options(skip, precision)
    found = [
        name for name, module in model.named_modules() if isinstance(module, GluExperts) and not skipped(name, skip)
    ]
    if not found and any(hasattr(module, "is_concatenated") for module in model.modules()):
        from moert.integrations.transformers import quantizer  # its model: transformers is there

        return quantizer.quantize_(model, quantizer.MoertConfig(fmt.name, fmt.group, skip, precision))
    if not found or found == [""]:
        got = "experts without a module around them" if found else f"none in {type(model).__name__}"
        raise ValueError(f"model must hold GluExperts that skip does not name, got {got}")
    for name in found:
        parent, _, attribute = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, attribute, QuantizedExperts.pack(getattr(owner, attribute), (fmt, fmt), precision))
    return found


def format_of(format: str | RowFormat, group: int | None = None) -> RowFormat:
    """ "int4" and 64 -> Int4(64)."""
    if isinstance(format, RowFormat):
        if group is not None:
            raise ValueError(f"group must be None with a format that has its own, {format}, got {group}")
        return format
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format}")
    return FORMATS[format]() if group is None else FORMATS[format](group)


def check_options(skip: Sequence[str], precision: str) -> None:
    if isinstance(skip, str):
        raise TypeError(f"skip must be a sequence of names, got {skip!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision}")


def skipped(name: str, skip: Sequence[str]) -> bool:
    parts = name.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(each, pattern) for each in above for pattern in skip)
