import torch

from moert.routers import within_capacity
from moert.testing import random_routing


def test_first_tokens_stay():
    ids = torch.tensor([[0, 1], [0, 2], [0, 1], [3, -1]], dtype=torch.int32)
    kept = within_capacity(ids, torch.tensor([2, 1, 0]))
    assert kept.tolist() == [[0, 1], [0, 3], [3, 3], [3, 3]]


def test_load_never_exceeds_the_capacity():
    routing, capacity = random_routing(200, 8, 3, "zipf"), torch.arange(0, 160, 20)
    kept = within_capacity(routing.ids, capacity)
    before, after = (torch.bincount(ids.flatten().long(), minlength=9)[:8] for ids in (routing.ids, kept))
    assert torch.equal(after, torch.minimum(before, capacity))
    assert ((kept == routing.ids) | (kept == 8)).all()


def test_compile_and_no_tokens():
    compiled = torch.compile(within_capacity, backend="aot_eager", fullgraph=True)
    ids = random_routing(30, 4, 2).ids
    capacity = torch.tensor([3, 9, 1, 0])
    assert torch.equal(compiled(ids, capacity), within_capacity(ids, capacity))
    assert within_capacity(ids[:0], capacity).shape == (0, 2)
