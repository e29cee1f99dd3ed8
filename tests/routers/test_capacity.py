import torch

from moert.routers import within_capacity
from moert.routers.capacity import within_device_capacity
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


def drop_by_loop(ids, affinity, E, D, capacity, kept):
    """A device after the other: its choices, best first, spared ones before all."""
    out = ids.tolist()
    for d in range(D):
        mine = [(t, j) for t, row in enumerate(out) for j, e in enumerate(row) if d * E // D <= e < (d + 1) * E // D]
        mine.sort(key=lambda choice: (not kept[choice[0]], -affinity[choice], choice))
        for t, j in mine[capacity:]:
            if not kept[t]:
                out[t][j] = E
    return out


def test_devices_drop_the_choices_of_the_lowest_affinity():
    for kind, capacity in (("uniform", 20), ("zipf", 9), ("sentinels", 25), ("uniform", 0), ("uniform", 500)):
        ids, affinity, kept = random_routing(60, 8, 3, kind).ids, torch.rand(60, 3), torch.rand(60) < 0.2
        got = within_device_capacity(ids, affinity, 8, 4, torch.tensor(capacity), kept)
        expected = torch.where((ids >= 0) & (ids < 8), ids, 8)
        expected = torch.tensor(drop_by_loop(expected, affinity, 8, 4, capacity, kept))
        real = (ids >= 0) & (ids < 8)
        assert torch.equal(got[real].long(), expected[real])
        left = torch.bincount(torch.where(got < 8, got // 2, 4)[~kept].flatten().long(), minlength=5)[:4]
        assert (left <= capacity).all()
    assert within_device_capacity(ids[:0], affinity[:0], 8, 4, torch.tensor(3), kept[:0]).shape == (0, 3)
