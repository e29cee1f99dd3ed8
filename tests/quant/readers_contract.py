"""What every reader keeps to: exact where it says so, near where it converts, and an error on what is broken."""

import torch
from foreign import spoiled
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.quant import Int8

CONVERT = Int8(128)


def check_exact(layout, parts, expected, fmt):
    """The packed tensor is in fmt and stands for exactly the expected weights, as unpack says too."""
    read = layout.read(parts, CONVERT)
    assert read.changed == "" and read.packed.format == fmt == layout.format
    assert torch.equal(fmt.unpack(read.packed), expected)
    assert torch.equal(layout.unpack(parts), expected)


def check_converted(layout, parts, expected, why):
    """unpack is exact; the packed tensor is the nearest of CONVERT and says why."""
    assert layout.format is None
    assert torch.equal(layout.unpack(parts), expected)
    read = layout.read(parts, CONVERT)
    assert read.changed == f"converted to {CONVERT}: {why}"
    again = CONVERT.pack(expected)
    assert torch.equal(read.packed.codes, again.codes) and torch.equal(read.packed.scales, again.scales)


def check_broken(layout, parts, examples=60):
    """Spoiled parts are an error that says what, or whole finite weights: never a crash."""

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def spoil(data):
        try:
            read = layout.read(spoiled(parts, data, st), CONVERT)
        except (ValueError, TypeError, RuntimeError) as error:  # the last from the C++ packer
            assert " must " in str(error) and "got" in str(error)
            return
        assert read.packed.format.unpack(read.packed).shape == read.packed.shape

    spoil()
