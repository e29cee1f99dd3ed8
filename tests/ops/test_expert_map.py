import numpy as np
import pytest
import torch

from moert.ops.expert_map import ExpertMap


@pytest.mark.parametrize(
    "E,R,ranks",
    [
        (6, 2, [0, 0, 0, 1, 1, 1]),
        (7, 3, [0, 0, 0, 1, 1, 2, 2]),
        (2, 4, [0, 1]),
        (1, 1, [0]),
    ],
)
def test_without_a_placement_experts_lie_in_blocks(E, R, ranks):
    experts = ExpertMap.of(None, E, R)
    assert experts.expert_to_rank.tolist() == ranks and experts.expert_to_rank.dtype == torch.int32
    assert experts.num_experts == E and experts.num_ranks == R


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda ranks: torch.tensor(ranks, dtype=torch.uint8)])
def test_local_ids_count_a_ranks_experts_in_the_order_of_their_ids(kind):
    experts = ExpertMap.of(kind([2, 0, 2, 0, 0, 2]), 6, 4)
    assert experts.local_ids.tolist() == [0, 0, 1, 1, 2, 2] and experts.local_ids.dtype == torch.int32
    assert [experts.experts_of(rank) for rank in range(4)] == [[1, 3, 4], [], [0, 2, 5], []]


def test_every_swap_of_two_experts_changes_the_checksum():
    seen = {ExpertMap.of(None, 12, 4).checksum}
    for i in range(12):
        for j in range(i):
            ranks = ExpertMap.of(None, 12, 4).expert_to_rank.clone()
            ranks[[i, j]] = ranks[[j, i]]
            if ranks[i] != ranks[j]:
                seen.add(ExpertMap.of(ranks, 12, 4).checksum)
    assert len(seen) == 1 + 12 * 9 // 2


@pytest.mark.parametrize(
    "placement,message",
    [
        ([0, 1], r"placement must have shape \[E=3\], got \[2\]"),
        ([[0, 1, 0]], r"placement must have shape \[E=3\], got \[1, 3\]"),
        ([0, 1, 2], r"placement must hold ranks in \[0, R=2\), got 2"),
        ([0, -1, 1], r"placement must hold ranks in \[0, R=2\), got -1"),
        ([0.0, 1.0, 1.0], r"placement must hold integers, got torch.float32"),
        ([True, False, True], r"placement must hold integers, got torch.bool"),
    ],
)
def test_errors(placement, message):
    with pytest.raises(ValueError, match=message):
        ExpertMap.of(placement, 3, 2)


@pytest.mark.parametrize(
    "ranks,local,message",
    [
        ([0, 1], [0, 0, 0], r"local_ids must be int32 \[E=2\] on the CPU, got torch.int32 \[3\] on cpu"),
        ([0, 1], [0.0, 0.0], r"local_ids must be int32 \[E=2\] on the CPU, got torch.float32 \[2\] on cpu"),
        ([0, 1], [0, 32768], r"local_ids must hold ids in \[0, 32768\), got 32768"),
        ([0, 1], [-1, 0], r"local_ids must hold ids in \[0, 32768\), got -1"),
        ([0.5, 1.0], [0, 0], r"expert_to_rank must be int32 \[E=2\] on the CPU, got torch.float32 \[2\] on cpu"),
    ],
)
def test_a_map_made_by_hand_is_checked(ranks, local, message):
    ranks, local = (torch.tensor(ids) for ids in (ranks, local))
    with pytest.raises(ValueError, match=message):
        ExpertMap(*(ids if ids.is_floating_point() else ids.int() for ids in (ranks, local)), 2)


def test_a_rank_holds_what_a_local_id_can_tell_apart():
    assert ExpertMap.of(None, 32767, 1).local_ids[-1] == 32766
    with pytest.raises(ValueError, match="placement must give a rank at most 32767 experts, got 32768"):
        ExpertMap.of(None, 32768, 1)


def test_the_checksum_knows_of_which_experts_copies_are():
    seen = {ExpertMap(torch.zeros(3).int(), torch.arange(3).int(), 1, copies).checksum for copies in ((), (0,), (1,))}
    assert len(seen) == 3
    again = ExpertMap(torch.zeros(3).int(), torch.arange(3).int(), 1, (1,))
    with torch.device("meta"):  # whatever tensors are made on by default
        assert again.checksum in seen
