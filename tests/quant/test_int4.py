import contract
import numpy as np
import pytest
import torch

from moert.quant import Int4, Int4Asymmetric
from moert.quant.int4 import asymmetric_pack_ref, asymmetric_unpack_ref, pack_ref, unpack_ref


@pytest.mark.parametrize("group", [32, 64, 128])
def test_gives_the_reference_s_bits(group):
    contract.check_against_reference(Int4(group), pack_ref, unpack_ref)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_asymmetric_gives_the_reference_s_bits(group):
    contract.check_against_reference(Int4Asymmetric(group), asymmetric_pack_ref, asymmetric_unpack_ref)


def test_codes_round_trip():
    contract.check_codes_round_trip("int4", range(16), 2)
    contract.check_codes_round_trip("int4_asymmetric", range(16), 2)


@pytest.mark.parametrize("fmt", [Int4(), Int4Asymmetric()])
def test_inputs(fmt):
    contract.check_inputs(fmt)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_size(group):
    assert Int4(group).bits_per_weight((4, 8, 1024)) == 4 + 16 / group
    assert Int4Asymmetric(group).bits_per_weight((4, 8, 1024)) == 4 + 24 / group
    groups = -(-2880 // group)  # 2880 is no multiple of 128: the last group is half of one
    assert Int4(group).nbytes((7, 2880)) == 7 * (1440 + 2 * groups)
    assert Int4(group).nbytes((7, 33)) == 7 * (32 + 2 * -(-33 // group))


@pytest.mark.parametrize("group", [32, 128])
def test_error_is_below_that_of_the_plain_grid(group):
    w = torch.randn(128, 1024)
    error = contract.groups_of(Int4(group).unpack(Int4(group).pack(w)) - w, group)
    plain = contract.groups_of(w, group).abs().amax(1, keepdim=True) / 7  # its error: at most half, uniform within
    assert (error.square().sum(1) <= group * (plain[:, 0] * (1 + 2**-10) / 2) ** 2).all()
    assert error.square().mean() < (plain.square() / 12).mean()


@pytest.mark.parametrize("group", [32, 128])
def test_asymmetric_error_is_at_most_half_a_step(group):
    w = torch.randn(128, 1024) + torch.randn(128, 1)
    fmt = Int4Asymmetric(group)
    packed = fmt.pack(w)
    error = contract.groups_of(fmt.unpack(packed) - w, group) / packed.scales.float().reshape(-1, 1)
    assert error.abs().max() <= 0.5 + 2**-16
    np.testing.assert_allclose(error.square().mean().sqrt(), 12**-0.5, rtol=0.05)


def test_zero_is_exact():
    w = torch.rand(4, 64) + 1
    w[:, ::2] = 0
    for fmt in (Int4(), Int4Asymmetric()):
        assert (fmt.unpack(fmt.pack(w))[:, ::2] == 0).all()


@pytest.mark.parametrize("kind", [Int4, Int4Asymmetric])
def test_wrong_group(kind):
    with pytest.raises(ValueError, match="group must be one of 32, 64, 128 for int4.*, got None"):
        kind(None)
