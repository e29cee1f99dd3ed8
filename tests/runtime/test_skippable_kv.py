import pytest
import torch

from moert.layers.packed import Rows
from moert.runtime import RecursiveKV, SkippableKV
from moert.runtime.skippable_kv import Joined, at_layer


def rows(positions, offsets, length=None):
    return Rows(torch.tensor(positions), torch.tensor(offsets), length)


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
    keys = SkippableKV(1, 1).extend(0, torch.ones(3, 1, 1), torch.ones(3, 1, 1), rows([0, 4, last], [0, 3], 3))
    assert keys[0][2].tolist() == [0, 4]


def test_shared_keys_are_the_first_depths():
    k = torch.ones(2, 1, 1)
    shared, apart = RecursiveKV(3, 1, 1, "shared"), RecursiveKV(3, 1, 1)
    for kv in (shared, apart):
        for depth in range(3):
            keys = kv.at(depth).extend(0, k * depth, k, rows([0, 1], [0, 2]))
            assert (keys[0][0] == (0 if kv is shared else depth)).all()
    assert (shared.stored(), apart.stored()) == (2, 6)


def test_updated_keys_replace_those_of_the_first_depth_for_that_depth_alone():
    k, kv = torch.arange(3.0).view(3, 1, 1), RecursiveKV(3, 1, 1, "update")
    kv.at(0).extend(0, k, k, rows([0, 1, 2], [0, 3]))
    one = kv.at(1).extend(0, k[:2] + 10, k[:2], rows([0, 2], [0, 2]))
    two = kv.at(2).extend(0, k[:1] + 20, k[:1], rows([2], [0, 1]))
    assert one[0][0].flatten().tolist() == [10, 1, 11] and two[0][0].flatten().tolist() == [10, 1, 20]
    assert kv.depths[0].keys[0][0][0].flatten().tolist() == [0, 1, 2] and kv.stored() == 6


@pytest.mark.parametrize("strategy", ("recursion", "shared", "update"))
def test_positions_are_told_beforehand(strategy):
    kv, k = RecursiveKV(2, 1, 2, strategy), torch.ones(3, 1, 1)
    for depth, step in ((0, rows([0, 1, 0], [0, 2, 3])), (1, rows([1, 0], [0, 1, 2])), (0, rows([2, 1], [0, 1, 2]))):
        told = kv.at(depth).positions(0, step)
        keys = kv.at(depth).extend(0, k[: len(step.positions)], k[: len(step.positions)], step)
        assert [at.tolist() for at in told] == [at.tolist() for _, _, at in keys]


def test_sequences_that_were_apart_are_one_batch():
    k, apart = torch.arange(3.0).view(3, 1, 1), [SkippableKV(2, 1), SkippableKV(2, 1)]
    apart[1].extend(1, k[:1] + 9, k[:1], rows([0], [0, 1]))
    joined, step = at_layer(Joined(apart), 1), rows([0, 1, 1], [0, 2, 3])
    assert [at.tolist() for at in joined.positions(0, step)] == [[0, 1], [0, 1]]
    keys = joined.extend(0, k, k, step)
    assert [each.flatten().tolist() for each, _, _ in keys] == [[0, 1], [9, 2]]
    assert at_layer(None, 1) is None and apart[0].stored(1) == 2


def test_errors():
    with pytest.raises(ValueError, match="rows must be of 2 sequences, got 1"):
        SkippableKV(1, 2).extend(0, torch.ones(1, 1, 1), torch.ones(1, 1, 1), rows([0], [0, 1]))
    with pytest.raises(ValueError, match="strategy must be one of recursion, shared, update, got both"):
        RecursiveKV(2, 1, 1, "both")
