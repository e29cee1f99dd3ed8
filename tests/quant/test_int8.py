import contract
import numpy as np
import pytest
import torch

from moert.quant import Int8
from moert.quant.int8 import pack_ref, unpack_ref


@pytest.mark.parametrize("group", [None, 32, 64, 128])
def test_gives_the_reference_s_bits(group):
    contract.check_against_reference(Int8(group), pack_ref, unpack_ref)


def test_codes_round_trip():
    contract.check_codes_round_trip("int8", range(256), 1)


def test_inputs():
    contract.check_inputs(Int8())


@pytest.mark.parametrize("group, bits", [(None, 8 + 16 / 1024), (32, 8.5), (64, 8.25), (128, 8.125)])
def test_size(group, bits):
    fmt = Int8(group)
    assert fmt.bits_per_weight((4, 8, 1024)) == bits and fmt.block == (1, group)
    assert fmt.nbytes((8, 100)) == 8 * (112 + 2 * (1 if group is None else -(-100 // group)))


@pytest.mark.parametrize("group", [None, 32])
def test_no_error_above_half_a_step_and_uniform_within_it(group):
    w = torch.randn(64, 1024)
    fmt = Int8(group)
    packed = fmt.pack(w)
    step = packed.scales.float().reshape(-1, 1)
    error = contract.groups_of(fmt.unpack(packed) - w, group) / step
    assert error.abs().max() <= 0.5 + 2**-16  # the quotient w / scale is rounded once before it is rounded to a code
    np.testing.assert_allclose(error.square().mean().sqrt(), 12**-0.5, rtol=0.02)


def test_wrong_group():
    with pytest.raises(ValueError, match="group must be one of None, 32, 64, 128 for int8, got 16"):
        Int8(16)
