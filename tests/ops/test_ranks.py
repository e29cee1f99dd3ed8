import inspect
from datetime import timedelta

import pytest
import torch.distributed as dist

from moert.ops.ranks import Ranks, named
from ranks import ranks


def members(group) -> list[int]:
    return dist.get_process_group_ranks(group)


def groups() -> None:
    """Of a group of processes 3, 1, 2, 0, in nodes of two; one node and nodes of one rank have no levels."""
    limit = timedelta(seconds=77)
    order, options = [0, 1, 2, 3], {}
    if "sort_ranks" in inspect.signature(dist.new_group).parameters:  # not torch 2.11
        order, options = [3, 1, 2, 0], {"sort_ranks": False}
    odd = dist.new_group(order, timeout=limit, **options)
    near = Ranks.in_nodes(2, odd)
    assert near.size == 4 and near.rank == order.index(dist.get_rank()) and near.guard is None
    for group in (near.levels.node, near.levels.rail):
        assert group._get_backend(group._device_types[0]).options._timeout == limit
    assert Ranks.of(near) is near and Ranks.of(odd).group is odd and Ranks.of(None).size == 4
    assert Ranks.in_nodes(4, odd).levels is None and Ranks.in_nodes(1, odd).levels is None
    assert named([0], odd) == f"rank {order[0]}" and named([1, 3], odd) == f"ranks {order[1]}, {order[3]}"
    for wrong, kind, text in (
        (3, ValueError, "local_size must divide the R=4 ranks, got 3"),
        (0, ValueError, "local_size must divide the R=4 ranks, got 0"),
        (2.0, TypeError, "local_size must be of type int, got float"),
    ):
        with pytest.raises(kind, match=text):
            Ranks.in_nodes(wrong)
    again = Ranks.in_nodes(2, odd).levels
    assert again.node is near.levels.node and again.rail is near.levels.rail
    node, index = divmod(near.rank, 2)
    assert members(near.levels.node) == order[2 * node : 2 * node + 2]
    assert members(near.levels.rail) == order[index::2]


def test_groups():
    assert ranks(4, groups) == [None] * 4
