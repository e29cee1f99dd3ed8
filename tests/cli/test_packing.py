import pytest

from moert.cli.errors import CommandError
from moert.cli.packing import ALL, packing_format, packings
from moert.quant import Int4, Mxfp4


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
        ("int4:x", "quantize must be FORMAT or FORMAT:GROUP, got int4:x"),
    ],
)
def test_what_is_refused(name, message):
    with pytest.raises(CommandError, match=message):
        packings([name])
