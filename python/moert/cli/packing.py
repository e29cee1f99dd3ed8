"""How the command line names a format of packed experts: int4, or int4:128 with the columns of a scale."""

from collections.abc import Iterable

from moert.cli.errors import CommandError, first_line
from moert.quant.format import Format
from moert.quant.quantize import FORMATS, any_format_of
from moert.quant.sub1 import SubOneBit

NAMES = (*FORMATS, "bit_nested_5_4", "sub1")  # what moert.quantize_ calls them
# Every format, in the groups that its error depends on most; others are asked for by name.
_GROUPS = {"int4": ("int4:32", "int4:128"), "int4_asymmetric": ("int4_asymmetric:32", "int4_asymmetric:128")}
ALL = tuple(packing for name in NAMES for packing in _GROUPS.get(name, (name,)))


def packings(wanted: list[str]) -> list[str]:
    """The names in order, each once; "all" is every one of ALL."""
    named = [name for each in wanted for name in (ALL if each == "all" else (each,))]
    for name in named:
        packing_format(name)
    return list(dict.fromkeys(named))


def packing_format(name: str) -> Format | SubOneBit:
    format, _, group = name.partition(":")
    if group and not group.isdecimal():
        raise CommandError(f"quantize must be FORMAT or FORMAT:GROUP, got {name}")
    try:
        return any_format_of(format, int(group) if group else None)
    except ValueError as error:
        raise CommandError(f"quantize must name a format and a group that it has: {first_line(error)}") from error


def rounding(names: Iterable[str]) -> str:
    """One line on how the experts were packed."""
    sub1 = ", sub1 too, which by data errs less than half as much" if "sub1" in names else ""
    return f"Packed experts are rounded to nearest{sub1}; by data: moert quantize --calibrate."
