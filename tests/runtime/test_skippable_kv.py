import pytest
import torch

from moert.layers.packed import Rows
from moert.runtime import RecursiveKV, SkippableKV


def rows(positions, offsets):
    return Rows(torch.tensor(positions), torch.tensor(offsets))


def test_each_sequence_grows_by_its_own_rows():
    kv = SkippableKV(2, 2)
    k = torch.arange(3.0).view(3, 1, 1)
    keys = kv.extend(1, k, -k, rows([0, 1, 0], [0, 2, 3]))
    assert [p.tolist() for _, _, p in keys] == [[0, 1], [0]]
    keys = kv.extend(1, k[:1] + 9, k[:1], rows([5], [0, 0, 1]))
    assert keys[1][0].flatten().tolist() == [2, 9] and keys[1][2].tolist() == [0, 5]
    assert (kv.stored(0), kv.stored(1), kv.stored()) == (0, 4, 4)


def test_rows_without_a_token_are_not_kept():
    last = torch.iinfo(torch.int64).max
    keys = SkippableKV(1, 1).extend(0, torch.ones(3, 1, 1), torch.ones(3, 1, 1), rows([0, 4, last], [0, 3]))
    assert keys[0][2].tolist() == [0, 4]


def test_shared_keys_are_the_first_depths():
    k = torch.ones(2, 1, 1)
    shared, apart = RecursiveKV(3, 1, 1, "shared"), RecursiveKV(3, 1, 1)
    for kv in (shared, apart):
        for depth in range(3):
            keys = kv.at(depth).extend(0, k * depth, k, rows([0, 1], [0, 2]))
            assert (keys[0][0] == (0 if kv is shared else depth)).all()
    assert (shared.stored(), apart.stored()) == (2, 6)


def test_errors():
    with pytest.raises(ValueError, match="rows must be of 2 sequences, got 1"):
        SkippableKV(1, 2).extend(0, torch.ones(1, 1, 1), torch.ones(1, 1, 1), rows([0], [0, 1]))
    with pytest.raises(ValueError, match="strategy must be recursion or shared, got both"):
        RecursiveKV(2, 1, 1, "both")
