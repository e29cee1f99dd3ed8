import contract
import numpy as np
import pytest
import torch

from moert import _C
from moert.quant import Mxfp4
from moert.quant.mxfp4 import E2M1, pack_ref, unpack_ref


def test_gives_the_reference_s_bits():
    contract.check_against_reference(Mxfp4(), pack_ref, unpack_ref)


def test_codes_round_trip():
    contract.check_codes_round_trip("mxfp4", range(16), 2)


def test_inputs():
    contract.check_inputs(Mxfp4())


def test_size():
    assert Mxfp4().bits_per_weight((4, 8, 1024)) == 4.25 and Mxfp4().block == (1, 32)
    assert Mxfp4().nbytes((3, 33)) == 3 * (32 + 2)


def test_every_scale_and_code_means_what_ocp_says():
    codes = np.tile(np.arange(16, dtype=np.uint8), (255, 2))
    scales = np.arange(255, dtype=np.uint8)[:, None]
    w = _C.dequantize("mxfp4", _C.pack_codes("mxfp4", codes), scales, None, 32, 32)
    expected = np.concatenate([E2M1, -E2M1]).astype(np.float64) * 2.0 ** (scales - 127.0)
    with np.errstate(over="ignore"):  # 4 and 6 times 2^127 are infinite in float32
        np.testing.assert_array_equal(w[:, :16], expected.astype(np.float32))


def test_what_is_representable_stays():
    w = torch.tensor([[*E2M1, *-E2M1] * 2]) * 2.0 ** torch.arange(-100, 100, 7)[:, None]
    assert torch.equal(Mxfp4().unpack(Mxfp4().pack(w)), w)


def test_error():
    w = torch.randn(128, 1024)
    error = contract.groups_of(Mxfp4().unpack(Mxfp4().pack(w)) - w, 32)
    groups = contract.groups_of(w, 32)
    # At the larger of the two exponents nothing saturates: at most a fifth of a weight, or a quarter of the scale.
    scale = 2.0 ** (groups.abs().amax(1, keepdim=True).log2().floor() - 1)
    assert (error.square().sum(1) <= torch.maximum(groups.abs() / 5, scale / 4).square().sum(1)).all()
    # Below OCP's own choice of the exponent, which is the smaller one.
    y = groups.abs() / (scale / 2)
    grid = torch.from_numpy(E2M1)
    ocp = grid[(y[..., None] - grid).abs().argmin(-1)]
    assert error.square().sum() < ((y - ocp) * scale / 2).square().sum()


def test_wrong_group():
    with pytest.raises(ValueError, match="group must be one of 32 for mxfp4, got 64"):
        Mxfp4(64)
