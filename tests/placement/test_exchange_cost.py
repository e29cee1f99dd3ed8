import numpy as np
import pytest

from moert.placement.exchange_cost import LinkCost, flat, two_level

INSIDE, ACROSS = LinkCost(2.0, 0.5), LinkCost(10.0, 3.0)


def random_bytes(R, seed=0, share=0.7):
    rng = np.random.default_rng(seed)
    return rng.integers(1, 100, (R, R)) * (rng.random((R, R)) < share)


def loop_seconds(messages, num_ranks):
    """messages: (from, to, bytes, link)."""
    out, into = np.zeros(num_ranks), np.zeros(num_ranks)
    for source, target, nbytes, link in messages:
        out[source] += link.latency + nbytes * link.per_byte
        into[target] += link.latency + nbytes * link.per_byte
    return max(out.max(), into.max())


@pytest.mark.parametrize("R,A", [(4, 2), (6, 3), (6, 2), (8, 1), (4, 4), (1, 1)])
def test_times_are_those_of_every_message(R, A):
    nbytes, m = random_bytes(R), R // A
    sent = [
        (i, j, nbytes[i, j], INSIDE if i // m == j // m else ACROSS)
        for i in range(R)
        for j in range(R)
        if i != j and nbytes[i, j]
    ]
    assert flat(nbytes, A)[0].seconds(INSIDE, ACROSS) == pytest.approx(loop_seconds(sent, R))
    # Each row, one after the other: to the rank of its own node with the destination's index, then across.
    steps = [{}, {}]
    for i in range(R):
        for j in range(R):
            middle = i // m * m + j % m
            steps[0][i, middle] = steps[0].get((i, middle), 0) + nbytes[i, j]
            steps[1][middle, j] = steps[1].get((middle, j), 0) + nbytes[i, j]
    for step, moved, link in zip(two_level(nbytes, A), steps, (INSIDE, ACROSS), strict=True):
        sent = [(i, j, total, link) for (i, j), total in moved.items() if i != j and total]
        assert step.seconds(INSIDE, ACROSS) == pytest.approx(loop_seconds(sent, R))
        for (i, j), total in moved.items():
            assert step.nbytes[i, j] == (total if i != j else 0)


@pytest.mark.parametrize("R,A", [(64, 8), (512, 64), (16, 4)])
def test_messages_are_as_many_and_as_large_as_tutel_says(R, A):
    m = R // A
    first, second = two_level(np.ones((R, R)), A)
    assert set((first.nbytes > 0).sum(1)) == {m - 1} and set(first.nbytes[first.nbytes > 0]) == {R / m}
    assert set((second.nbytes > 0).sum(1)) == {A - 1} and set(second.nbytes[second.nbytes > 0]) == {m}
    (only,) = flat(np.ones((R, R)), A)
    assert set((only.nbytes > 0).sum(1)) == {R - 1} and set(only.nbytes[only.nbytes > 0]) == {1}


def test_one_node_and_nodes_of_one_rank_are_flat():
    nbytes = random_bytes(6)
    for A in (1, 6):
        assert sum(step.seconds(INSIDE, ACROSS) for step in two_level(nbytes, A)) == pytest.approx(
            flat(nbytes, A)[0].seconds(INSIDE, ACROSS)
        )


def test_fit_finds_what_the_times_were_made_of():
    messages, sizes = np.array([1, 1, 3, 3, 3]), np.array([64, 4096, 64, 4096, 2**20])
    seconds = messages * (3e-5 + sizes * 2e-9)
    found = LinkCost.fit(messages, sizes, seconds)
    assert found.latency == pytest.approx(3e-5) and found.per_byte == pytest.approx(2e-9)
    assert LinkCost.fit([1, 1], [10, 20], [1.0, 2.0]).latency == pytest.approx(0.0, abs=1e-12)
    falling = LinkCost.fit([1, 1, 1], [10, 20, 30], [1.0, 2.5, 4.0])
    assert falling.latency == 0.0 and 0.1 < falling.per_byte < 0.14
    rising = LinkCost.fit([1, 1], [10, 20], [2.0, 1.0])
    assert rising.per_byte == 0.0 and 1.0 < rising.latency < 2.0
