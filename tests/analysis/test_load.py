import numpy as np

from analysis.traces import layer, random_trace
from moert.analysis.load import call_loads, homes_of, imbalance, rank_loads, ranks_of, traffic


def test_imbalance():
    assert imbalance(np.array([[1, 3], [2, 2], [0, 0]])).tolist() == [1.5, 1.0, 1.0]


def test_loads_of_ranks_are_those_of_a_loop():
    for recorded in random_trace().layers:
        place = np.array([0, 2, 2, 1, 0, 1, 2, 0])
        ranks = ranks_of(recorded, place)
        expected = np.zeros((3, 3), dtype=int)
        for t, ids in enumerate(recorded.ids):
            for e in ids[ids >= 0]:
                expected[0 if t < 10 else 2, place[e]] += 1
        assert np.array_equal(call_loads(recorded, ranks, 3), expected)
        assert np.array_equal(rank_loads(ranks, 3), expected.sum(0))


def test_homes_are_equal_blocks_of_a_call():
    homes = homes_of(layer(np.zeros((14, 1)), 1, calls=[8, 0, 5, 1]), 4)
    assert homes.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 2, 3, 0]


def test_traffic_is_that_of_a_loop():
    for recorded in random_trace(k=3).layers:
        ranks = ranks_of(recorded, np.arange(8) % 3)
        homes = homes_of(recorded, 3)
        expected = np.zeros((3, 3), dtype=int)
        for home, chosen in zip(homes, ranks, strict=True):
            for rank in {r for r in chosen if r >= 0}:
                expected[home, rank] += 1
        assert np.array_equal(traffic(ranks, homes, 3), expected)


def test_no_tokens():
    (recorded,) = random_trace(layers=1, T=0, calls=()).layers
    ranks = ranks_of(recorded, np.zeros(8, dtype=int))
    assert traffic(ranks, homes_of(recorded, 2), 2).tolist() == [[0, 0], [0, 0]]
    assert call_loads(recorded, ranks, 2).shape == (0, 2) and rank_loads(ranks, 2).tolist() == [0, 0]
