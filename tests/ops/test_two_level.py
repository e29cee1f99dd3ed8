import pytest
import torch
import torch.distributed as dist

from moert.ops import ExpertMap, Ranks, combine, dispatch
from moert.ops.all_to_all import Splits, all_to_all, exchange_counts, send_rows
from moert.ops.rank_capacity import Capacity
from moert.ops.two_level import _swapped
from moert.testing import random_routing
from ranks import ranks

E = 9


@pytest.mark.parametrize(("A", "m"), [(2, 2), (3, 4), (8, 8), (64, 1), (1, 8), (32, 2)])
def test_the_way_of_every_chunk(A, m):
    """All ranks in one process: chunks that say where they come from and where they go."""
    R, generator = A * m, torch.Generator().manual_seed(0)
    counts = torch.randint(0, 4, (R, R), generator=generator)
    pairs = [torch.tensor([[i, j] for j in range(R) for _ in range(counts[i, j])]).view(-1, 2) for i in range(R)]

    def exchange(rows: list, sizes: list, members: list[list[int]]) -> list:
        """What each rank has afterwards; sizes[i]: of rank i, for each member of its group."""
        chunks = [r.split(s.tolist()) for r, s in zip(rows, sizes, strict=True)]
        groups = {rank: group for group in members for rank in group}
        return [torch.cat([chunks[other][groups[i].index(i)] for other in groups[i]]) for i in range(R)]

    nodes = [[n * m + i for i in range(m)] for n in range(A)]
    rails = [[n * m + i for n in range(A)] for i in range(m)]
    sent = counts.view(R, A, m)
    passing = exchange([_swapped(*both) for both in zip(pairs, sent, strict=True)], [s.sum(0) for s in sent], nodes)
    between = [torch.stack([sent[other, :, i % m] for other in nodes[i // m]]) for i in range(R)]  # [m, A]
    arrived = exchange(
        [_swapped(*both) for both in zip(passing, between, strict=True)], [b.sum(0) for b in between], rails
    )
    for rank, rows in enumerate(arrived):
        assert (rows[:, 1] == rank).all()
        assert torch.equal(rows[:, 0], torch.arange(R).repeat_interleave(counts[:, rank]))


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


@pytest.mark.parametrize(("R", "local_size"), [(4, 2), (4, 4), (4, 1), (6, 2), (6, 3)])
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
        elsewhere = "every rank must be able to dispatch, got an error on rank 0 (see there)"
        assert told[1] == (elsewhere if rank else "routing must be of type Routing, got NoneType")
