import pytest

from moert.placement import Topology


def test_costs():
    topology = Topology(4, 2, across=3.0)
    assert topology.node_of().tolist() == [0, 0, 1, 1]
    assert topology.row_cost().tolist() == [[0, 1, 3, 3], [1, 0, 3, 3], [3, 3, 0, 1], [3, 3, 1, 0]]
    assert Topology(1).row_cost().tolist() == [[0]]


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((0,), "num_ranks must be at least 1, got 0"),
        ((4, 3), "num_nodes must divide num_ranks=4, got 3"),
        ((4, 0), "num_nodes must divide num_ranks=4, got 0"),
        ((4, 2, 0.0), "across must be positive and finite, got 0.0"),
        ((4, 2, float("nan")), "across must be positive and finite, got nan"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Topology(*arguments)
