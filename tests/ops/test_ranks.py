from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch.distributed as dist

from moert.ops.ranks import Ranks, named
from ranks import ranks


def members(group) -> list[int]:
    return dist.get_process_group_ranks(group)


def groups() -> list[list[int]]:
    """Of a group of processes 3, 1, 2, 0, in nodes of two; one node and nodes of one rank have no levels."""
    limit = timedelta(seconds=77)
    odd = dist.new_group([3, 1, 2, 0], sort_ranks=False, timeout=limit)
    near = Ranks.in_nodes(2, odd)
    assert near.size == 4 and near.rank == [3, 1, 2, 0].index(dist.get_rank()) and near.guard is nullcontext
    for group in (near.levels.node, near.levels.rail):
        assert group._get_backend(group._device_types[0]).options._timeout == limit
    assert Ranks.of(near) is near and Ranks.of(odd).group is odd and Ranks.of(None).size == 4
    assert Ranks.in_nodes(4, odd).levels is None and Ranks.in_nodes(1, odd).levels is None
    assert named([0], odd) == "rank 3" and named([1, 3], odd) == "ranks 1, 0"
    for wrong, kind, text in (
        (3, ValueError, "local_size must divide the R=4 ranks, got 3"),
        (0, ValueError, "local_size must divide the R=4 ranks, got 0"),
        (2.0, TypeError, "local_size must be of type int, got float"),
    ):
        with pytest.raises(kind, match=text):
            Ranks.in_nodes(wrong)
    return [members(near.levels.node), members(near.levels.rail)]


def test_groups():
    of_process = ranks(4, groups)
    assert of_process == [[[2, 0], [1, 0]], [[3, 1], [1, 0]], [[2, 0], [3, 2]], [[3, 1], [3, 2]]]
