import threading
from functools import partial

import pytest
import torch
import torch.distributed as dist

from moert.ops import ExpertMap, Ranks, combine, dispatch, two_level
from moert.ops.all_to_all import Splits, all_to_all, exchange_counts, send_rows
from moert.ops.rank_capacity import Capacity
from moert.ops.ranks import Levels
from moert.ops.two_level import TwoSteps
from moert.testing import random_routing
from ranks import ranks

E = 9


class Group:
    """Threads of this process as ranks that exchange rows, which are counted: messages to others and their rows."""

    def __init__(self, size: int):
        self.barrier, self.given = threading.Barrier(size, timeout=60), [None] * size
        self.messages, self.rows = [0] * size, [0] * size

    def exchange(self, me: int, into, rows, received, sent) -> None:
        chunks = rows.split(sent.tolist())
        assert len(rows) == sum(sent) and len(into) == sum(received)
        self.messages[me] += sum(len(chunk) > 0 for other, chunk in enumerate(chunks) if other != me)
        self.rows[me] += sum(len(chunk) for other, chunk in enumerate(chunks) if other != me)
        self.given[me] = chunks
        self.barrier.wait()
        arrived = [theirs[me] for theirs in self.given]
        assert [len(chunk) for chunk in arrived] == received.tolist()
        into.copy_(torch.cat(arrived))
        self.barrier.wait()


class Work:
    def __init__(self, exchange):
        self.wait = exchange


@pytest.mark.parametrize(
    ("A", "m"), [(2, 2), (3, 2), (2, 3), (3, 4), (4, 3), (2, 8), (8, 2), (4, 4), (5, 3), (16, 1), (1, 8)]
)
def test_every_factorisation(A, m, monkeypatch):
    """Rows that say where they come from and where they go, there and back, in the order of the straight way; with the
    messages of Tutel's analysis: m - 1 within a node and A - 1 across, whatever the sizes.
    """
    R, generator = A * m, torch.Generator().manual_seed(0)
    nodes, rails = [Group(m) for _ in range(A)], [Group(A) for _ in range(m)]
    rank_of, failed, across = threading.local(), [], 0

    def exchange(into, rows, received, sent, group, asynchronous=False):
        node, index = divmod(rank_of.rank, m)
        call = partial(group.exchange, index if group in nodes else node, into, rows, received, sent)
        return Work(call) if asynchronous else call()

    monkeypatch.setattr(two_level, "_exchange", exchange)
    for counts in (torch.randint(0, 4, (R, R), generator=generator), torch.randint(1, 4, (R, R), generator=generator)):
        sent = counts.view(R, A, m)
        across += 2 * sum(int(sent[rank].sum()) - int(sent[rank, rank // m].sum()) for rank in range(R))

        def run(rank: int, counts=counts, sent=sent) -> None:
            try:
                rank_of.rank = rank
                node, index = divmod(rank, m)
                pairs = [[rank, other] for other in range(R) for _ in range(counts[rank, other])]
                rows, into = torch.tensor(pairs).view(-1, 2), torch.full((int(counts[:, rank].sum()), 2), -1)
                # between[l, n] rows of rank l of this node pass here on their way to node n.
                between = torch.stack([sent[node * m + other, :, index] for other in range(m)])
                levels = Levels(nodes[node], rails[index])
                TwoSteps(rows, into, counts[rank], counts[:, rank], between, levels, False).wait()
                assert (into[:, 1] == rank).all()
                assert torch.equal(into[:, 0], torch.arange(R).repeat_interleave(counts[:, rank]))
                home = torch.full_like(rows, -1)
                TwoSteps(into, home, counts[:, rank], counts[rank], between, levels, True).wait()
                assert torch.equal(home, rows)
            except BaseException as error:
                failed.append(error)
                for group in (*nodes, *rails):
                    group.barrier.abort()

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(R)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed[0]
    assert sum(sum(group.rows) for group in rails) == across  # each row once
    # Two exchanges each way, of which those of the second counts leave nobody out.
    assert all(m - 1 <= messages / 2 <= 2 * (m - 1) for group in nodes for messages in group.messages)
    assert all(A - 1 <= messages / 2 <= 2 * (A - 1) for group in rails for messages in group.messages)


def like_flat(local_size: int) -> None:
    """Rows there and back, counts, results and gradients: the bits of the straight way."""
    rank, R = dist.get_rank(), dist.get_world_size()
    near = Ranks.in_nodes(local_size)
    generator = torch.Generator().manual_seed(R)
    for counts in (torch.randint(0, 5, (R, R), generator=generator), torch.zeros(R, R, dtype=torch.int64)):
        flat, two = (exchange_counts(counts[rank], {"H": 3}, way) for way in (Ranks(), near))
        assert flat == two == Splits(counts[rank].tolist(), counts[:, rank].tolist())
        for dtype in (torch.float32, torch.bfloat16, torch.uint8):
            rows = (100 * torch.randn(sum(flat.sent), 3)).to(dtype)
            got = all_to_all(rows, two)
            assert torch.equal(got, all_to_all(rows, flat)) and torch.equal(all_to_all(got, two.reversed), rows)
            later, work = send_rows(got, two.reversed, asynchronous=True)
            work.wait()
            assert torch.equal(later, rows)
        rows, dy = torch.randn(sum(flat.sent), 3, requires_grad=True), torch.randn(sum(flat.received), 3)
        grads = [torch.autograd.grad(all_to_all(rows, splits), rows, dy)[0] for splits in (flat, two)]
        assert torch.equal(*grads)
    experts, T = ExpertMap.of([(4 * e + 1) % R for e in range(E)], E, R), 5 * rank % 7
    x = torch.randn(T, 6, generator=generator).requires_grad_()
    routing = random_routing(T, E, 3, "sentinels", generator)
    weights = routing.weights.requires_grad_()
    for options in ({}, {"payload": "int8"}, {"capacity": Capacity(2)}, {"asynchronous": True}):
        results = []
        for way in (None, near):
            there = dispatch(x, routing, experts, way, **options).wait()
            y = combine(torch.tanh(there.x) * there.routing.weights.sum(1, keepdim=True), there)
            results.append((there.x, there.routing.ids, y, *torch.autograd.grad(y.sum(), (x, weights))))
        assert all(map(torch.equal, *results))


EIGHT = [pytest.param(8, m, marks=pytest.mark.slow) for m in (2, 4)]


@pytest.mark.parametrize(("R", "local_size"), [(4, 2), (4, 4), (4, 1), (6, 2), (6, 3), *EIGHT])
def test_same_bits_as_flat(R, local_size):
    assert ranks(R, like_flat, local_size) == [None] * R


def messages(local_size: int) -> list[tuple[str, int, int]]:
    """Of each collective: within a node, across, or straight; messages of this rank to others; bytes of them all."""
    real, seen, near = dist.all_to_all_single, [], Ranks.in_nodes(local_size)
    kinds = {dist.group.WORLD: "straight", None: "straight"}
    kinds |= {near.levels.node: "within", near.levels.rail: "across"}

    def counted(output, input, output_sizes=None, input_sizes=None, group=None, *args, **kwargs):
        n, me = dist.get_world_size(group), dist.get_rank(group)
        sizes = input_sizes or [len(input) // n] * n
        others = [size for rank, size in enumerate(sizes) if rank != me and size]
        seen.append((kinds[group], len(others), sum(others) * input[0].nbytes))
        return real(output, input, output_sizes, input_sizes, group, *args, **kwargs)

    dist.all_to_all_single = counted
    for way in (Ranks(), near):
        splits = exchange_counts(torch.ones(dist.get_world_size(), dtype=torch.int64), {}, way)
        all_to_all(torch.zeros(sum(splits.sent), 16, dtype=torch.uint8), splits)
    return seen


def test_messages_are_those_of_the_analysis():
    """Tutel, section on 2DH: n ranks, m of a node; within a node messages of n / m chunks, across of m chunks."""
    n, m, number, row = 6, 3, 8, 16
    for seen in ranks(n, messages, m):
        straight, levels = seen[:2], seen[2:]
        assert straight == [("straight", n - 1, (n - 1) * number), ("straight", n - 1, (n - 1) * row)]
        within, across = (m - 1, (m - 1) * (n // m)), (n // m - 1, (n // m - 1) * m)
        assert levels == [
            (name, count, chunks * size)
            for size in (number, row)
            for name, (count, chunks) in (("within", within), ("across", across))
        ]


def refused() -> list[str]:
    told, rank, near = [], dist.get_rank(), Ranks.in_nodes(2)
    x, routing = torch.randn(3, 4), random_routing(3, E, 2)
    experts = ExpertMap.of(None, E, 4)
    for call in (
        lambda: dispatch(x[:, : 3 if rank == 1 else 4], routing, experts, near),
        lambda: dispatch(x, routing if rank else None, experts, near),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
            call()
        told.append(str(error.value))
    there = dispatch(x, routing, experts, near)
    assert combine(there.x, there).shape == x.shape
    return told


def test_errors():
    for rank, told in enumerate(ranks(4, refused)):
        assert told[0] == "H must be the same on every rank, got 4 on ranks 0, 2, 3, 3 on rank 1"
        elsewhere = "every rank must be able to go on, got an error on rank 0 (see there)"
        assert told[1] == (elsewhere if rank else "routing must be of type Routing, got NoneType")
