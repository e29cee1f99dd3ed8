"""Experts of a model to packed weights, in place."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from moert import _C
from moert.experts.calibrated import FloatGluExperts
from moert.experts.glu import GluExperts
from moert.experts.quantized import QuantizedExperts
from moert.ops.kinds import expect
from moert.quant.bit_nested import BitNested
from moert.quant.calibration import calibrate_
from moert.quant.float_experts import FloatExperts, LayerReport, PackFormat, round_experts
from moert.quant.format import Format, RowFormat
from moert.quant.fp8 import Fp8
from moert.quant.gptq import GPTQ
from moert.quant.int4 import Int4, Int4Asymmetric
from moert.quant.int8 import Int8
from moert.quant.mxfp4 import Mxfp4
from moert.quant.sub1 import SubOneBit
from moert.quant.ternary import Ternary2, Ternary5

PRECISIONS = ("auto", "full", "bfloat16", "int8", "int8_group32", "fp8_group128", "int8_weights", "int8_group160")
FORMATS = {kind.name: kind for kind in (Int8, Int4, Int4Asymmetric, Mxfp4, Ternary2, Ternary5, Fp8, BitNested)}


class Quantized(list[str]):
    """The names of the modules that were packed, in order; `layers` says of calibrated ones what their experts saw."""

    def __init__(self, names: Iterable[str] = (), layers: Iterable[LayerReport] = ()):
        super().__init__(names)
        self.layers = tuple(layers)


def quantize_(
    model: nn.Module,
    format: str | Format | SubOneBit = "int4",
    group: int | None = None,
    skip: Sequence[str] = (),
    precision: str = "auto",
    calibration: Iterable[Any] | None = None,
    method: str | GPTQ = "gptq",
) -> Quantized:
    """Replace the GluExperts of the model by QuantizedExperts, one after the other; returns their names, in order.

    In a transformers model the experts of its experts interface are packed where they are, and save_pretrained writes
    them packed.

    format is a name (with the group, or the format's own default) or a format.  skip has names of modules, * and ? as
    in file names; what they name, and what lies below it, stays; one that names none is an error,
    as is a model without any GluExperts left.

    calibration: batches that the model is run with, each a tensor, a mapping or a sequence of arguments.  Without them
    weights are rounded to nearest; with them by `method`, "gptq" or GPTQ(…), layer by layer.  An expert that sees too
    few rows is rounded: a warning and the result's `layers` say which.

    "fp8" and "bit_nested" are rounded to nearest only; "bit_nested_5_4" is BitNested(5, 4).  "sub1" is QMoE's code of
    under one bit (SubOneBitExperts).  Precision "auto" is "full" rows over fp8, sub1, and bit_nested of 8 bits in
    groups of 32 or 64; over any other bit_nested it is "int8_group32".
    """
    expect(nn.Module, model=model)
    fmt = any_format_of(format, group)
    check_options(skip, precision, [fmt])
    check_skip(model, skip)
    settings = method_of(method)
    if calibration is not None and not isinstance(fmt, RowFormat | SubOneBit):
        raise ValueError(f"calibration must be None for {fmt}, which is rounded to nearest, got batches")
    found = [
        name for name, module in model.named_modules() if isinstance(module, GluExperts) and not skipped(name, skip)
    ]
    if not found and any(hasattr(module, "is_concatenated") for module in model.modules()):
        from moert.integrations.transformers import quantizer  # its model: transformers is there

        config = quantizer.MoertConfig(fmt.spelling, fmt.group, skip, precision)
        return quantizer.quantize_(model, config, calibration, settings)
    if not found or found == [""]:
        got = "experts without a module around them" if found else f"none in {type(model).__name__}"
        raise ValueError(f"model must hold experts of moert or transformers that skip does not name, got {got}")
    for name in found:
        module = model.get_submodule(name)
        check_weights(name, module.gate_up_proj, module.down_proj)
    owners = {name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in found}
    if calibration is not None or isinstance(fmt, SubOneBit):
        experts = {name: FloatGluExperts(*owner, precision) for name, owner in owners.items()}
        return Quantized(found, pack_(model, experts, calibration, fmt, settings))
    for owner, attribute in owners.values():
        setattr(owner, attribute, QuantizedExperts.pack(getattr(owner, attribute), (fmt, fmt), precision))
    return Quantized(found)


def pack_(
    model: nn.Module,
    experts: Mapping[str, FloatExperts],
    calibration: Iterable[Any] | None,
    fmt: PackFormat,
    settings: GPTQ,
) -> list[LayerReport]:
    """Packs the experts, by the batches of calibration or rounded."""
    if calibration is not None:
        return calibrate_(model, experts, calibration, fmt, settings)
    for name, each in experts.items():
        try:
            packed = round_experts(each, (fmt, fmt))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: {error}") from error
        each.replace(packed)
    return []


def any_format_of(format: str | Format | SubOneBit, group: int | None = None) -> Format | SubOneBit:
    """format_of, and "sub1"."""
    if format not in ("sub1", SubOneBit()):
        return format_of(format, group, (*FORMATS, "sub1"))
    if group is not None:
        raise ValueError(f"group must be None for sub1, whose values belong to rows, got {group}")
    return SubOneBit()


def method_of(method: str | GPTQ) -> GPTQ:
    """ "gptq" -> GPTQ()."""
    if isinstance(method, GPTQ):
        return method
    if method != "gptq":
        raise ValueError(f'method must be "gptq" or a GPTQ, got {method!r}')
    return GPTQ()


def format_of(format: str | Format, group: int | None = None, names: Iterable[str] = FORMATS) -> Format:
    """ "int4" and 64 -> Int4(64); "bit_nested_5_4" -> BitNested(5, 4).  names: what an error says there is."""
    if isinstance(format, Format):
        if group is not None:
            raise ValueError(f"group must be None with a format that has its own, {format}, got {group}")
        return format
    if not isinstance(format, str):
        raise ValueError(f"format must be one of {', '.join(names)}, got {format!r}")
    options = {} if group is None else {"group": group}
    if nested := re.fullmatch(r"bit_nested_(\d)_(\d)", format):
        return BitNested(int(nested[1]), int(nested[2]), **options)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(names)}, got {format}")
    if options and FORMATS[format] is Fp8:
        raise ValueError(f"group must be None for fp8, whose scales belong to blocks of 128 x 128, got {group}")
    return FORMATS[format](**options)


def check_options(skip: Sequence[str], precision: str, formats: Iterable[Format | SubOneBit]) -> None:
    if isinstance(skip, str):
        raise TypeError(f"skip must be a sequence of names, got {skip!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision}")
    for fmt in formats:
        if precision not in (taken := _C.precisions(fmt.name)):
            raise ValueError(f"precision must be one of {', '.join(taken)} for {fmt.name}, got {precision}")


def check_skip(model: nn.Module, skip: Sequence[str]) -> None:
    """A name that is misspelt would pack what was to stay."""
    names = [name for name, _ in model.named_modules()]
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"skip must name modules of {type(model).__name__}, got {pattern}, which names none")


def check_weights(name: str, *weights: Tensor) -> None:
    """[E, rows, columns], not the panels of prepack_, and finite: found before the first experts are replaced."""
    for weight in weights:
        if weight.dim() != 3:
            raise ValueError(f"{name} must have weights of 3 dimensions (unprepack_ first), got {weight.dim()}")
        for e, matrix in enumerate(weight.detach()):
            if not matrix.isfinite().all():
                raise ValueError(f"{name} must have finite weights, got inf or nan in expert {e}")


def skipped(name: str, skip: Sequence[str]) -> bool:
    parts = name.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(each, pattern) for each in above for pattern in skip)
