import inspect
import re

import pytest

from moert.cli.errors import CommandError
from moert.cli.packing import ALL, NAMES, packing_format, packings, rounding
from moert.cli.quantize import quantize
from moert.cli.run import run
from moert.quant import BitNested, Fp8, Int4, Int8, Mxfp4, SubOneBit
from moert.quant.quantize import FORMATS


def test_names():
    assert (
        packing_format("int4:128") == Int4(128)
        and packing_format("int4") == Int4()
        and packing_format("mxfp4") == Mxfp4()
    )
    assert packings(["mxfp4", "int4", "mxfp4"]) == ["mxfp4", "int4"]
    assert packings(["int8", "all"]) == list(ALL)
    assert len({packing_format(name) for name in ALL}) == len(ALL)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int3", "quantize must name a format and a group that it has: format must be one of int8, .*, got int3"),
        (
            "int4:7",
            "quantize must name a format and a group that it has: group must be one of 32, 64, 128 for int4, got 7",
        ),
        ("sub1:32", "quantize must name a format and a group that it has: group must be None for sub1"),
        ("int4:x", "quantize must be FORMAT or FORMAT:GROUP, got int4:x"),
    ],
)
def test_what_is_refused(name, message):
    with pytest.raises(CommandError, match=message):
        packings([name])


def help_of(command, parameter):
    return inspect.signature(command).parameters[parameter].annotation.__metadata__[0].help


def test_every_format_has_a_name():
    assert {packing_format(name).name for name in ALL} == {*FORMATS, "sub1"}
    assert list(dict.fromkeys(name.partition(":")[0] for name in ALL)) == list(NAMES)
    assert f"all: {', '.join(NAMES)}." in help_of(run, "quantize")
    assert re.sub(r" \(. bits\)", "", help_of(quantize, "format")).replace(" or ", ", ") == f"{', '.join(NAMES)}."
    assert packing_format("sub1") == SubOneBit() and packing_format("fp8") == Fp8()
    assert packing_format("bit_nested_5_4:64") == BitNested(5, 4, 64) and packing_format("int8:64") == Int8(64)


def test_how_they_were_packed():
    assert rounding(["int4"]) == "Packed experts are rounded to nearest; by data: moert quantize --calibrate."
    assert "to nearest, sub1 too, which by data errs less than half as much;" in rounding(["int4", "sub1"])
