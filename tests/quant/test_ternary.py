from functools import partial
from itertools import product

import contract
import numpy as np
import pytest
import torch

from moert import _C
from moert.quant import Ternary2, Ternary5
from moert.quant.ternary import pack_ref, unpack_ref

KINDS = [Ternary2, Ternary5]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [None, 32, 64, 128])
def test_gives_the_reference_s_bits(kind, group):
    pack, unpack = (partial(f, code=kind.name) for f in (pack_ref, unpack_ref))
    contract.check_against_reference(kind(group), pack, unpack)


@pytest.mark.parametrize("kind, per_byte", [(Ternary2, 4), (Ternary5, 5)])
def test_codes_round_trip(kind, per_byte):
    contract.check_codes_round_trip(kind.name, range(3), per_byte)


def test_all_243_bytes_round_trip_and_13_are_refused():
    codes = np.array(list(product(range(3), repeat=5)), np.uint8)
    packed = _C.pack_codes("ternary5", codes)
    np.testing.assert_array_equal(_C.unpack_codes("ternary5", packed, 5), codes)
    unused = sorted(set(range(256)) - set(packed[:, 0].tolist()))
    assert len(unused) == 13
    for byte in unused:
        packed[0, 0] = byte
        with pytest.raises(RuntimeError, match=rf"packed must be ternary5 codes.*, got {byte} at row 0, byte 0"):
            _C.unpack_codes("ternary5", packed, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs(kind):
    contract.check_inputs(kind())


def test_size():
    assert Ternary2().bits_per_weight((4, 8, 1024)) == 2 + 16 / 1024
    assert Ternary2(128).bits_per_weight((4, 8, 1024)) == 2.125
    assert float(Ternary5(32).bits_per_weight((2, 1600))) == pytest.approx(1.6 + 0.5)
    assert Ternary5().nbytes((3, 1600)) == 3 * (320 + 2)
    assert Ternary5().nbytes((3, 81)) == 3 * (32 + 2)


def test_error_is_the_least_that_three_levels_have():
    w = torch.randn(32, 4096)
    error = (Ternary2().unpack(Ternary2().pack(w)) - w).square().sum(1)
    # For each k: the k largest magnitudes at their mean; what float16 does to the scale is of second order.
    sums = w.double().abs().sort(1, descending=True)[0].cumsum(1)
    least = w.double().square().sum(1) - (sums.square() / torch.arange(1, 4097)).amax(1)
    torch.testing.assert_close(error.double(), least, rtol=1e-5, atol=0)
    # A Gaussian loses 19.0 % of its energy to its best three levels.
    assert error.sum() / w.square().sum() == pytest.approx(0.190, abs=0.003)


def test_ternary_weights_stay():
    w = torch.randint(-1, 2, (5, 300)) * torch.rand(5, 1).half().float()
    for kind in KINDS:
        assert torch.equal(kind().unpack(kind().pack(w)), w)


def test_wrong_group():
    with pytest.raises(ValueError, match="group must be one of None, 32, 64, 128 for ternary2, got 256"):
        Ternary2(256)
