import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend

from moert.ops.all_to_all import WORDS, Splits, all_to_all, all_to_all_ref, exchange_counts, send_rows
from moert.ops.ranks import Ranks
from ranks import error_of, ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)


def splits_of(counts: list[list[int]]) -> Splits:
    """counts[i][j] rows from rank i to rank j."""
    rank = dist.get_rank()
    return Splits(counts[rank], [row[rank] for row in counts])


def exchanges(R: int) -> None:
    """Every rank: rows, counts and gradients against what the others are known to send."""
    generator = torch.Generator().manual_seed(R)
    uneven = torch.randint(0, 5, (R, R), generator=generator)
    one_takes_all = torch.zeros(R, R, dtype=torch.int64)
    one_takes_all[:, R - 1] = 3
    silent = uneven.clone()
    silent[0] = 0
    for counts in (uneven, one_takes_all, silent, torch.zeros(R, R, dtype=torch.int64)):
        splits, rank = splits_of(counts.tolist()), dist.get_rank()
        assert exchange_counts(counts[rank], {"H": 3}, Ranks()) == exchange_counts(counts[rank]) == splits
        for dtype in DTYPES:
            rows = (100 * torch.randn(sum(splits.sent), 3)).to(dtype)
            got = all_to_all(rows, splits)
            assert got.dtype == dtype and torch.equal(got, all_to_all_ref(rows, splits))
            assert torch.equal(all_to_all(got, splits.reversed), rows)
            assert torch.equal(all_to_all(rows.mT.contiguous().mT, splits), got)
        rows = torch.randn(sum(splits.sent), 3, requires_grad=True)
        dy = torch.randn(sum(splits.received), 3)
        (drows,) = torch.autograd.grad(all_to_all(rows, splits), rows, dy)
        assert torch.equal(drows, all_to_all_ref(dy, splits.reversed))
        (ones,) = torch.autograd.grad(all_to_all(rows, splits).sum(), rows)  # of a gradient without strides
        assert torch.equal(ones, torch.ones_like(rows))
        received, work = send_rows(rows.detach(), splits, asynchronous=True)
        work.wait()
        assert torch.equal(received, all_to_all_ref(rows, splits))


@pytest.mark.parametrize("R", [2, 3, 4])
def test_forward_and_backward(R):
    assert ranks(R, exchanges, R) == [None] * R


def in_graphs(backend: str) -> list[int]:
    """Results and gradients of eager calls; from two rows a rank on one graph has all sizes."""
    R, rank, frames, quick = dist.get_world_size(), dist.get_rank(), [], backend == "aot_eager"

    def run(rows, splits):
        return all_to_all(rows + rows, splits)

    for group in (None, dist.new_group(range(R)), Ranks.in_nodes(2)) if quick else (None,):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
        for n in range(5):
            splits = exchange_counts([2 + (rank + 2 * j + n) % 4 for j in range(R)], {}, group)
            same_in_a_graph(run, compiled, splits, torch.bfloat16, True)
        frames.append(counter.frame_count)
        nodes = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
        name = "moert.dispatch_exchange" if isinstance(group, Ranks) else "_c10d_functional"
        assert any(name in node for node in nodes), nodes
        few = list(enumerate(DTYPES if quick else DTYPES[:1]))
        for n, dtype in few:  # each rank that has, or gets, 0 or 1 is a case of its own
            torch._dynamo.reset()
            splits = exchange_counts([(rank * j + n) % 2 for j in range(R)], {}, group)
            same_in_a_graph(run, compiled, splits, dtype, dtype in (torch.float32, torch.bfloat16))
    nothing, none = torch.empty(0, 10)[:, ::2], Splits([0] * R, [0] * R)
    assert torch.compile(all_to_all, backend="aot_eager", fullgraph=True)(nothing, none).shape == (0, 5)
    with pytest.raises(Exception, match="rows must have shape"):
        compiled(torch.zeros(99, 5), splits)
    return frames


def same_in_a_graph(run, compiled, splits: Splits, dtype: torch.dtype, trains: bool) -> None:
    rows = (100 * torch.randn(5, sum(splits.sent))).to(dtype).mT.requires_grad_(trains)
    expected, got = run(rows, splits), compiled(rows, splits)
    assert got.dtype == dtype and torch.equal(got, expected)
    if trains:
        dy = torch.randn(5, len(got)).to(dtype).mT
        assert torch.equal(*(torch.autograd.grad(y, rows, dy)[0] for y in (expected, got)))


@pytest.mark.parametrize("backend, R, groups", [("aot_eager", 4, 3), ("inductor", 2, 1)])
def test_in_graphs(backend, R, groups):
    assert ranks(R, in_graphs, backend, timeout=400) == [[1] * groups] * R


def disagreements() -> list[str]:
    rank, told = dist.get_rank(), []
    ones = torch.ones(3, dtype=torch.int64)
    for counts, facts in (
        (ones, {"H": 16 if rank == 1 else 32}),
        (ones, {"H": 8, "k": rank}),
        (ones, {"H": 8, "the dtype of x": "bfloat16" if rank == 0 else "float32"}),
        (None if rank == 2 else ones, {"H": 8}),
    ):
        told.append(error_of(exchange_counts, counts, facts, Ranks()))
    pair = dist.new_group([1, 2])
    if rank:
        with pytest.raises(RuntimeError, match="H must be the same on every rank, got 1 on rank 1, 2 on rank 2"):
            exchange_counts(ones[:2], {"H": rank}, Ranks(pair))
    rows = torch.zeros(3, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(all_to_all(rows, Splits([1] * 3, [1] * 3)).square().sum(), rows, create_graph=True)
    for wrong in (
        lambda: all_to_all(torch.zeros(4, 2), Splits([1] * 3, [1] * 3)),
        lambda: all_to_all(torch.zeros(3), Splits([1] * 3, [1] * 3)),
        lambda: exchange_counts(ones, {"dtype": "int4"}),
        lambda: grad.sum().backward(),
    ):
        told.append(error_of(wrong))
    return told


def test_errors():
    told = ranks(3, disagreements)
    here = [
        r"rows must have shape [N=3, H], got [4, 2]",
        r"rows must have shape [N=3, H], got [3]",
        f"facts must be integers, None or some of {', '.join(WORDS)}, got int4",
        "trying to differentiate twice a function that was marked with @once_differentiable",
    ]
    everywhere = [
        "H must be the same on every rank, got 32 on ranks 0, 2, 16 on rank 1",
        "k must be the same on every rank, got 0 on rank 0, 1 on rank 1, 2 on rank 2",
        "the dtype of x must be the same on every rank, got float32 on ranks 1, 2, bfloat16 on rank 0",
        "every rank must be able to go on, got an error on rank 2 (see there)",
    ]
    assert told[0] == told[1] == everywhere + here
    assert told[2] == [*everywhere[:3], "", *here]  # the rank that fails raises its own
