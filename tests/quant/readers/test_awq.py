"""AWQ checkpoints: written by the published layout, read back bit for bit."""

import pytest
import torch
from foreign import awq
from readers_contract import CONVERT, check_broken, check_converted, check_exact

from moert.quant import Int4Asymmetric
from moert.quant.readers import Awq


def w(rows=16, columns=256):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)) + 0.3


@pytest.mark.parametrize("group,mine", [(32, 32), (64, 64), (128, 128), (256, 128), (-1, 128)])
def test_exact(group, mine):
    parts, expected = awq(w(), group)
    check_exact(Awq(group), parts, expected, Int4Asymmetric(mine))


def test_rows_of_an_odd_number_of_columns():
    parts, expected = awq(w(8, 35), 32)
    check_exact(Awq(32), parts, expected, Int4Asymmetric(32))


def test_small_groups_are_converted():
    parts, expected = awq(w(), 16)
    check_converted(Awq(16), parts, expected, "groups of 16")


def test_of_config():
    config = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    assert Awq.of_config(config) == Awq(128)
    assert Awq.of_config({"w_bit": 4, "q_group_size": 64, "version": "GEMM"}) == Awq(64)


def test_broken():
    check_broken(Awq(32), awq(w(8, 64), 32)[0])


def test_errors():
    for change, message in [
        ({"bits": 8}, "bits must be 4 in AWQ checkpoints, got 8"),
        ({"version": "gemv"}, "version must be gemm in AWQ checkpoints, got gemv"),
        ({"zero_point": False}, "zero_point must be true in AWQ checkpoints, got false"),
        ({"group_size": -2}, "group_size must be -1 or positive, got -2"),
    ]:
        with pytest.raises(ValueError, match=message):
            Awq.of_config({"bits": 4, "group_size": 128} | change)
    parts, _ = awq(w(8, 64), 32)
    with pytest.raises(ValueError, match=r"qzeros must have shape \[2, 1\], got \[1, 1\]"):
        Awq(32).read(parts | {"qzeros": parts["qzeros"][:1]}, CONVERT)
    with pytest.raises(ValueError, match="scales must be finite, got inf or nan"):
        Awq(32).read(parts | {"scales": parts["scales"] / 0}, CONVERT)
