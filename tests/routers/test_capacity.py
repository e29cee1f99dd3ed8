import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from moert.routers import CapacityPolicy, within_capacity
from moert.routers.capacity import within_device_capacity
from moert.testing import random_routing
from ranks import ranks


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


def drop_by_turns(ids, best, E, capacity, prioritized):
    """Choice by choice in the order of the policy: slot 0 of all tokens, slot 1 of all tokens, …"""
    taken, kept = [0] * E, [[-1] * len(row) for row in ids]
    tokens = sorted(range(len(ids)), key=lambda t: (-best[t] if prioritized else 0, t))
    for j in range(len(ids[0]) if ids else 0):
        for t in tokens:
            e = ids[t][j]
            if 0 <= e < E and taken[e] < capacity:
                taken[e], kept[t][j] = taken[e] + 1, e
    return kept


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("prioritized", [False, True])
def test_capacity_policy(k, prioritized):
    for T, kind in ((50, "zipf"), (37, "sentinels"), (1, "uniform"), (64, "one_expert"), (0, "uniform")):
        E, drops = 8, []
        routing = replace(random_routing(T, E, k, kind), logits=torch.randn(T, E))
        for given in (routing, replace(routing, logits=None)):
            probs = given.weights if given.logits is None else given.logits.softmax(-1)
            counts = [sum(row.count(e) for row in routing.ids.tolist()) for e in range(E)]
            q = math.ceil(T / E)
            for factor, align, expected in (
                (4, 1, 4 * k * q),
                (0.5, 1, k * (q // 2)),
                (1.3, 4, math.ceil(k * int(1.3 * q) / 4) * 4),
                (0, 1, max(counts)),
                (-4, 1, min(max(counts), 4 * k * q)),
                (-0.5, 3, math.ceil(min(max(counts), k * (q // 2)) / 3) * 3),
                (0, 300, math.ceil(max(counts) / 384) * 384),
                (0, 256, math.ceil(max(counts) / 256) * 256),
            ):
                policy = CapacityPolicy(factor, align, prioritized)
                assert policy.capacity(given) == expected
                got = policy(given)
                best = probs.amax(-1).tolist() if T else []
                ids = drop_by_turns(routing.ids.tolist(), best, E, expected, prioritized)
                assert got.ids.tolist() == ids and got.weights is given.weights and got.num_experts == E
                drops.append(((got.ids < 0) & (routing.ids >= 0) & (routing.ids < E)).sum().item())
                assert drops[-1] == 0 or factor != 0
        assert T < 8 or max(drops) > 0  # the cases do drop


def unequal_tokens() -> tuple[int, list]:
    """T and the most tokens of an expert are the largest of any rank."""
    T = (5, 40, 0)[dist.get_rank()]
    routing = random_routing(T, 4, 2, "zipf", generator=torch.Generator().manual_seed(0))
    capacities = [CapacityPolicy(f).capacity(routing, dist.group.WORLD) for f in (4, 1, 0, -0.5)]
    alone, within = CapacityPolicy(-0.5), CapacityPolicy(-0.5)(routing, dist.group.WORLD)
    loads = torch.bincount(within.ids[within.ids >= 0], minlength=4)
    assert loads.max() <= capacities[3] and (T == 40 or alone.capacity(routing) < capacities[3])
    return torch.bincount(routing.ids.flatten(), minlength=4).max().item(), capacities


def test_capacity_of_a_group():
    told = ranks(3, unequal_tokens)
    most = max(most for most, _ in told)
    assert [capacities for _, capacities in told] == [[80, 20, most, min(most, 10)]] * 3


def test_capacity_policy_errors():
    with pytest.raises(ValueError, match="align must be a whole number of at least 1, got 0"):
        CapacityPolicy(1.0, align=0)
