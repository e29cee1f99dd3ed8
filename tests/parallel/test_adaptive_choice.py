"""What is chosen at each call, by hand or from what was learnt, and what travels then."""

from itertools import cycle

import pytest
import torch
import torch.distributed as dist
from tests.parallel.test_adaptive import DEGREES, TOKENS, H, experts_of, inputs, mine, settings, step, use

from moert import Routing
from moert.parallel import AdaptiveExperts, Setting, adaptive
from moert.routers import CapacityPolicy
from moert.testing import random_routing
from ranks import ranks


def train(experts: AdaptiveExperts, E: int, change, steps: int = 20) -> list[float]:
    """Loss of all ranks at each step, on other tokens each time; parameters stay where they are."""
    held = {name: (p.data_ptr(), p.shape, p) for name, p in experts.named_parameters()}
    optimizer, losses = torch.optim.AdamW(experts.parameters(), lr=1e-2), []
    for n in range(steps):
        change(experts)
        generator = torch.Generator().manual_seed(n)
        T = TOKENS[(dist.get_rank() + n) % 4]
        x, routing = torch.randn(8, H, generator=generator)[:T], random_routing(8, E, 1 + n % 2, generator=generator)
        routing = Routing(routing.ids[:T], routing.weights[:T], E)
        optimizer.zero_grad()
        loss = (experts(x, routing) - x.flip(-1)).square().sum()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item())
        now = {name: (p.data_ptr(), p.shape, p) for name, p in experts.named_parameters()}
        assert all(held[name][:2] == now[name][:2] and held[name][2] is now[name][2] for name in held)
        assert held.keys() == now.keys()
    return losses


def switching(E: int) -> tuple[list[float], ...]:
    """As r = 1 all the time: another setting at each step, or what is learnt."""

    def stay(experts):
        use(experts, Setting(1, 1, 1))

    def switch(experts):
        use(experts, next(order))

    def learn(experts):
        use(experts, Setting("auto", "auto", "auto"))

    def fresh():
        return AdaptiveExperts(experts_of(E), local_size=2)

    order = cycle(settings(fresh())[::-3])
    return train(fresh(), E, stay), train(fresh(), E, switch), train(fresh(), E, learn)


@pytest.mark.parametrize("E", [1, 2])
def test_switching_at_each_step(E):
    for fixed, switched, learnt in ranks(4, switching, E):
        assert fixed[-1] < 0.9 * fixed[0] or min(fixed) < 0.9 * fixed[0]
        torch.testing.assert_close(switched, fixed, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(learnt, fixed, rtol=1e-5, atol=1e-5)


def learnt() -> list:
    """What is tried and found, on each rank; calls with and without gradients, loads and wishes are apart."""
    E, told = 1, []
    experts = AdaptiveExperts(experts_of(E), window=8)
    tried = []
    compute, here = experts.slices.forward, experts.slices.here
    experts.slices.forward = lambda *args: (
        tried.append((experts.slices.s // experts.slices.together, experts.slices.degree)),
        compute(*args),
    )[1]
    experts.slices.here = lambda *args: (tried.append((0, 1)), here(*args))[1]

    def call(T, backward=True):
        """T tokens on rank 2, one on the others."""
        T = T if dist.get_rank() == 2 else 1
        y = experts(torch.randn(T, H), Routing(torch.zeros(T, 1, dtype=torch.int32), torch.ones(T, 1), E))
        if backward:
            y.sum().backward()

    for _ in range(3):
        call(5, backward=False)  # a forward whose backward never came does not count
    told.append(tried.copy())
    for _ in range(20):
        call(5)
    training = experts.caches["auto", "auto", "auto", True]
    told += [tried[3:], dict(training.best)]
    call(17)
    told.append((tried[-1], training.knows(17)))
    with torch.no_grad():
        for _ in range(14):
            call(5, backward=False)
    told.append(len(experts.caches))
    assert experts.caches["auto", "auto", "auto", False].knows(5)
    assert not any(p._backward_hooks for p in experts.parameters())  # those of clocks are gone
    experts.r = 2
    tried.clear()
    for _ in range(6):
        call(5)
    told += [tried.copy(), [*experts.caches["auto", "auto", "auto", True].best]]
    return told


def test_learnt_alike_on_every_rank():
    told = ranks(4, learnt)
    assert told == [told[0]] * 4
    waiting, tried, best, after, caches, fixed, loads = told[0]
    assert waiting == [(0, 1)] * 3
    search = tried[:13]
    assert search[0] == (0, 1) and len(set(search)) == 13  # r = 0 once, then 1, 2, 4 with each degree
    assert set(search) == {(0, 1), *((r, degree) for r in (1, 2, 4) for degree in DEGREES)}
    ((key, found),) = best.items()
    assert key == 0 and found in {Setting(r, degree) for r, degree in search}
    assert set(tried[13:]) == {(found.r, found.degree)} and len(tried) == 20
    assert after == ((0, 1), False) and caches == 2 and loads == [0]
    assert fixed[:4] == [(2, degree) for degree in DEGREES] and fixed[4] == fixed[5]


def narrowed() -> tuple[list[bool], float | None]:
    """What is found once fewer are allowed, and the time of a call whose backward never came, but another's did."""
    experts = AdaptiveExperts(experts_of(1))

    def call():
        return experts(torch.randn(3, H), Routing(torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1), 1))

    call()
    (clock,) = experts._clocks.values()
    experts.r, experts.degree = 0, 1
    call().sum().backward()
    seconds = clock.seconds
    experts.r = experts.degree = "auto"
    found = []
    for allowed in ((0, 1, 2), (2,), (1,)):
        experts.allowed["r"], experts.allowed["degree"] = allowed, (1, 2)
        for _ in range(8):
            call().sum().backward()
        (best,) = experts.caches["auto", "auto", "auto", True].best.values()
        found.append(best.r in allowed)
    return found, seconds


def test_allowed_may_be_narrowed():
    assert ranks(2, narrowed) == [([True] * 3, None)] * 2


class FakeTime:
    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def slowest(monkeypatch: pytest.MonkeyPatch) -> int:
    """r = 0 takes 0.5 s and 0.5 or 6.5 s back, r = 1 takes 4 s and 2 s back on both ranks; others' time is not its."""
    fake, rank = FakeTime(), dist.get_rank()
    monkeypatch.setattr(adaptive, "time", fake)
    experts = AdaptiveExperts(experts_of(2), degree=1)

    def slow(compute, forward, backward):
        def call(x, *args):
            fake.now += forward
            x.register_hook(lambda grad: setattr(fake, "now", fake.now + backward))
            return compute(x, *args)

        return call

    experts.slices.here = slow(experts.slices.here, 0.5, (0.5, 6.5)[rank])
    experts.slices.forward = slow(experts.slices.forward, 4, 2)
    for n in range(3):
        x, routing = torch.randn(3, H, requires_grad=True), random_routing(3, 2, 1)
        beside = x.clone()
        beside.register_hook(lambda grad, n=n: setattr(fake, "now", fake.now + 100 * n))
        y = experts(x, routing)
        fake.now += 100
        (y.tanh() + beside).sum().backward()
        fake.now += 100
    return experts.caches["auto", 1, "auto", True].choose(3).r


def with_fake_time() -> int:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return slowest(monkeypatch)


def test_the_slowest_rank_decides():
    assert ranks(2, with_fake_time) == [1, 1]


def dynamic() -> None:
    """Other k and capacity at each call, which a policy decides before any setting does."""
    E = 2
    experts = experts_of(E)
    spread = AdaptiveExperts(experts, degree=2)
    for k, r, factor in ((1, 0, 0.5), (2, 1, 0.5), (4, 2, 1.0), (3, 0, 0), (2, 2, -0.5)):
        x, routing, dy = inputs(E, k)
        own = Routing(mine(routing.ids), mine(routing.weights), E)
        own = CapacityPolicy(factor, align=1)(own, dist.group.WORLD)
        spread.r = r
        got, expected = step(spread, mine(x), own, mine(dy)), step(experts, mine(x), own, mine(dy))
        for name in got:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5)


def test_another_k_and_capacity_at_each_call():
    assert ranks(4, dynamic) == [None] * 4


def travelling() -> dict[int, tuple[int, int]]:
    """For each r: the parameters that come to this rank, and the rows that its tokens send, by spies on torch."""
    E, T, R = 2, 8, dist.get_world_size()
    experts = AdaptiveExperts(experts_of(E), degree=1)
    held = sum(p.numel() for p in experts.parameters())
    gathered, sent, told = [], [], {}
    gather, send = dist.all_gather, dist.all_to_all_single

    def all_gather(parts, own, group=None):
        gathered.append(sum(part.numel() for part in parts) - own.numel())
        return gather(parts, own, group=group)

    def all_to_all_single(into, rows, *sizes, **options):
        if sizes and len(sent) % 2 == 0:  # rows on their way to the experts
            sent.append(len(rows))
        elif sizes:  # their results
            assert len(into) == sent[-1]
            sent.append(0)
        return send(into, rows, *sizes, **options)

    dist.all_gather, dist.all_to_all_single = all_gather, all_to_all_single
    ids = torch.arange(T)[:, None] % 2
    for r in experts.allowed["r"]:
        gathered.clear(), sent.clear()
        experts.r = r
        experts(torch.randn(T, H), Routing(ids, torch.ones(T, 1), E))
        assert sum(gathered) == {0: R - 1, 1: 1, 2: 0}[r] * held * 4  # bytes
        told[r] = sum(sent) / T
    dist.all_gather, dist.all_to_all_single = gather, send
    for r, expected in (
        (1, [[0], [1], [2], [3], [-1]]),
        (2, [[0, 1], [0, 1], [2, 3], [2, 3], [-1, -1]]),
    ):
        routing = Routing(torch.tensor([[0], [0], [1], [1], [2]]), torch.rand(5, 1), E)
        slices = experts._to_slices(routing, r)
        assert slices.ids.tolist() == expected and torch.equal(slices.weights, routing.weights.expand(-1, r))
    return told


def test_what_travels():
    """r = 0: all parameters and no row; then r rows a choice and the fewer parameters.

    Half of the choices have a slice on the first rank and half on the last, where own rows stay.
    """
    assert ranks(4, travelling) == [{0: 0, 1: 1 - own, 2: 2 - own} for own in (0.5, 0, 0, 0.5)]
