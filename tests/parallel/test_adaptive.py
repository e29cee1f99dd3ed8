import copy
import os
from itertools import cycle, product

import pytest
import torch
import torch.distributed as dist
from tests.parallel.test_slices import slice_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from moert import GluExperts, MoELayer, Routing, TopKRouter, batch_invariant
from moert.analysis import record_routings
from moert.layers import FeedForward
from moert.parallel import (
    AdaptiveExperts,
    Pulse,
    Setting,
    adaptive,
    expert_parameters,
    load_checkpoint,
    save_checkpoint,
)
from moert.routers import CapacityPolicy
from moert.testing import assert_rows_close, random_routing
from moert.types import ExpertLayout, Onto
from ranks import ranks

H, I, DEGREES = 8, 16, (1, 2, 4, 8)
TOKENS = (5, 0, 7, 4)  # of the ranks
SHAPES = [(4, 1), (4, 2), (2, 4)]  # R, E
CASES = (
    ("swiglu", ExpertLayout()),
    ("swiglu_oai", ExpertLayout(True, True)),
    ("gelu", ExpertLayout(True)),
    ("geglu", ExpertLayout(False, True)),
)


def mine(rows: torch.Tensor) -> torch.Tensor:
    return rows.split(TOKENS[: dist.get_world_size()])[dist.get_rank()]


def experts_of(E: int, dtype=torch.float32, **options) -> GluExperts:
    torch.manual_seed(0)
    return GluExperts(E, H, I, **{"bias": True, **options}).to(dtype)


def inputs(E: int, k: int = 2, dtype=torch.float32) -> tuple[torch.Tensor, Routing, torch.Tensor]:
    """Of all ranks' tokens: rows, routing, gradients of outputs."""
    generator, T = torch.Generator().manual_seed(E + k), sum(TOKENS[: dist.get_world_size()])
    x, dy = (torch.randn(T, H, generator=generator).to(dtype) for _ in range(2))
    return x, random_routing(T, E, k, "sentinels", generator=generator), dy


def step(experts, x, routing, dy) -> dict[str, torch.Tensor]:
    """Output and gradients of rows and weights, in fresh graphs; parameters gather theirs anew."""
    experts.zero_grad()
    x, weights = x.clone().requires_grad_(), routing.weights.clone().requires_grad_()
    y = experts(x, Routing(routing.ids, weights, routing.num_experts))
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "dx": x.grad, "dweights": weights.grad}


def my_step(experts, x, routing, dy) -> dict[str, torch.Tensor]:
    return step(experts, mine(x), Routing(mine(routing.ids), mine(routing.weights), routing.num_experts), mine(dy))


def part_of(name: str, whole: torch.Tensor, experts: GluExperts, R: int) -> torch.Tensor:
    """Of a parameter of all experts, or its gradient, what this rank holds."""
    E, rank = experts.num_experts, dist.get_rank()
    if E >= R:
        return whole[rank * E // R : (rank + 1) * E // R]
    return slice_of(name, whole, experts, rank % (R // E), R // E)[rank * E // R][None]


def settings(experts: AdaptiveExperts, degrees=DEGREES) -> list[Setting]:
    return [Setting(*each) for each in product(experts.allowed["r"], degrees, experts.allowed["levels"])]


def use(experts: AdaptiveExperts, setting: Setting) -> None:
    experts.r, experts.degree, experts.levels = setting


def like_one_process(E: int) -> tuple[int, ...]:
    R = dist.get_world_size()
    for number, (activation, layout) in enumerate(CASES):
        experts = experts_of(E, activation=activation, layout=layout)
        x, routing, dy = inputs(E, k=1 + number)
        expected = step(experts, x, routing, dy)
        spread = AdaptiveExperts(experts, local_size=2)
        for name, whole in spread.whole().items():
            assert torch.equal(whole, experts.get_parameter(name))
        for setting in settings(spread, (2,) if number else DEGREES):
            use(spread, setting)
            for name, got in my_step(spread, x, routing, dy).items():
                torch.testing.assert_close(got, mine(expected[name]), rtol=1e-5, atol=1e-5)
            for name, p in spread.slices.local.named_parameters():
                whole = experts.get_parameter(name)
                assert torch.equal(p, part_of(name, whole, experts, R))
                torch.testing.assert_close(p.grad, part_of(name, whole.grad, experts, R), rtol=1e-5, atol=1e-5)
    assert spread.allowed["levels"] == ((1, 2) if R == 4 else (1,))  # two ranks are one node
    return spread.allowed["r"]


@pytest.mark.parametrize(("R", "E"), SHAPES)
def test_forward_and_backward(R, E):
    allowed = {1: (0, 1, 2, 4), 2: (0, 1, 2), 4: (0, 1)}[E]
    assert ranks(R, like_one_process, E) == [allowed] * R


def narrow(E: int) -> None:
    """bfloat16 and float16 by the rule for all operators; r = 0 has the bits of one process."""
    R = dist.get_world_size()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        experts = experts_of(E, dtype)
        x, routing, dy = inputs(E, dtype=dtype)
        wide, double = copy.deepcopy(experts).double(), Routing(routing.ids, routing.weights.double(), E)
        expected = {dtype: step(experts, x, routing, dy), torch.float64: step(wide, x.double(), double, dy)}
        spread = AdaptiveExperts(experts, degree=2)
        for r in spread.allowed["r"]:
            spread.r = r
            results = my_step(spread, x, routing, dy)
            for name in ("y", "dx"):
                assert_rows_close(results[name], lambda x, name=name: mine(expected[x.dtype][name]), x)
            for name, p in spread.slices.local.named_parameters():
                held = {each.down_proj.dtype: each.get_parameter(name).grad for each in (experts, wide)}
                held = {type: part_of(name, grad, experts, R).flatten(1) for type, grad in held.items()}
                # Each rank's gradient is rounded before they are added up, where one process rounds their sum.
                floor = max(2e-6, R * torch.finfo(dtype).eps / 2)
                assert_rows_close(p.grad.flatten(1), lambda x, held=held: held[x.dtype], x, floor=floor)
        spread.r = 0
        with batch_invariant(True), torch.no_grad():
            whole = experts(x, routing)
            assert torch.equal(spread(mine(x), Routing(mine(routing.ids), mine(routing.weights), E)), mine(whole))


@pytest.mark.parametrize(("R", "E"), SHAPES[:2])
def test_narrow_types(R, E):
    assert ranks(R, narrow, E) == [None] * R


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
    """r = 0: all parameters and no row; then r rows a choice and the fewer parameters."""
    assert ranks(4, travelling) == [{0: 0, 1: 1, 2: 2}] * 4


class Wide(nn.Module):
    """Shared experts that stay in float32 under autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.float())


def beside_others(folder: str) -> None:
    """Shared experts, rows added by others, autocast, recorded routings, checkpoints."""
    E = 2
    x, _, dy = inputs(E)
    for shared in (None, FeedForward(H, I), Wide()):
        torch.manual_seed(1)
        alone = MoELayer(TopKRouter(H, E, 1), experts_of(E), shared)
        spread = MoELayer(alone.router, AdaptiveExperts(alone.experts, degree=1), shared)
        onto = Onto(x, torch.rand(len(x)))
        own = Onto(mine(x), mine(onto.scale))
        for r in spread.experts.allowed["r"]:
            spread.experts.r = r
            torch.testing.assert_close(spread(mine(x)), mine(alone(x)), rtol=1e-5, atol=1e-5)
            got = spread.experts.onto(mine(x), alone.router(mine(x)), own)
            torch.testing.assert_close(got, mine(alone.experts.onto(x, alone.router(x), onto)), rtol=1e-5, atol=1e-5)
            with torch.autocast("cpu", torch.bfloat16):
                got, expected = spread(mine(x)), mine(alone(x))
            assert got.dtype == expected.dtype
            torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)  # a few roundings to bfloat16
    with record_routings(spread) as recorded:
        spread(mine(x))
    assert [*recorded.loads()] == ["experts"] and recorded.loads()["experts"].sum() == len(mine(x))
    assert list(expert_parameters(spread)) == [
        f"experts.slices.local.{name}" for name, _ in alone.experts.named_parameters()
    ]
    experts, optimizer = spread.experts, torch.optim.AdamW(spread.experts.parameters())
    step(experts, mine(x), random_routing(len(mine(x)), E, 1), mine(dy))
    optimizer.step()
    save_checkpoint(folder, experts, optimizer)
    other = AdaptiveExperts(GluExperts(E, H, I, bias=True))
    load_checkpoint(folder, other, torch.optim.AdamW(other.parameters()))
    assert all(map(torch.equal, other.parameters(), experts.parameters()))


def test_beside_others(tmp_path):
    assert ranks(4, beside_others, str(tmp_path)) == [None] * 4


def on_a_mesh() -> None:
    """(data, ep) = (2, 2): gradients are the mean over all ranks, and the same on both copies."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "ep"))
    E, R = 1, 4
    experts = experts_of(E)
    x, routing, dy = inputs(E, 1)
    step(experts, x, routing, dy)
    spread = AdaptiveExperts(experts, mesh["ep"], gradients="mean", replicas=mesh["data"])
    for setting in settings(spread, (1, 2)):
        use(spread, setting)
        my_step(spread, x, routing, dy)
        for name, p in spread.slices.local.named_parameters():
            expected = slice_of(name, experts.get_parameter(name).grad, experts, mesh["ep"].get_local_rank(), 2) / R
            torch.testing.assert_close(p.grad, expected, rtol=1e-5, atol=1e-5)


def test_on_a_mesh():
    assert ranks(4, on_a_mesh) == [None] * 4


def one_ends() -> str:
    """Rank 1 is gone after a forward of r = 0: the others, whose gradients are to be added up, are told."""
    experts = AdaptiveExperts(experts_of(3), r=0, pulse=Pulse(interval=0.1))
    x, routing, _ = inputs(3, 1)
    y = experts(mine(x), Routing(mine(routing.ids), mine(routing.weights), 3))
    if dist.get_rank() == 1:
        os._exit(0)
    with pytest.raises(RuntimeError) as error:
        y.sum().backward()
    return str(error.value)


def test_a_lost_rank_is_named():
    told = ranks(3, one_ends, timeout=60, may_end=(1,))
    named = "every rank must take part in the exchange, got no sign of life from rank 1: "
    assert told[0].startswith(named) and told[2].startswith(named)


def refused() -> list[str]:
    told, odd = [], dist.get_rank() == 1
    experts = AdaptiveExperts(experts_of(1), r=1, degree=1)
    x, routing, _ = inputs(1, 1)
    routing = Routing(mine(routing.ids), mine(routing.weights), 1)
    x = mine(x)

    def at(**changed):
        def call():
            if odd:
                for name, value in changed.items():
                    setattr(experts, name, value)
            experts(x, routing)

        return call

    for wrong in (
        lambda: AdaptiveExperts(nn.Linear(2, 2)),
        lambda: AdaptiveExperts(experts_of(3)),
        lambda: AdaptiveExperts(GluExperts(1, 8, 7)),
        lambda: AdaptiveExperts(GluExperts(1, 7, 8, bias=True)),
        lambda: AdaptiveExperts(experts_of(1), r=3),
        lambda: AdaptiveExperts(experts_of(1), degree=3),
        lambda: AdaptiveExperts(experts_of(1), levels=2),
        lambda: AdaptiveExperts(experts_of(1), window=0),
        lambda: AdaptiveExperts(experts_of(1), local_size=3),
        lambda: AdaptiveExperts(experts_of(1), gradients="all"),
        lambda: experts(x[:, 1:], routing),
        lambda: experts(x, Routing(routing.ids, routing.weights, 2)),
        lambda: experts(x, routing.ids),
        lambda: experts.onto(x, routing, Onto(torch.ones(1, 1) if odd else x)),
        at(r=0),
        at(degree=2),
        at(r="auto"),
        at(r=5),
        lambda: experts(x.clone().requires_grad_(odd), routing),
    ):
        experts.r, experts.degree = 1, 1
        experts.requires_grad_(len(told) < 18)
        try:
            wrong()
            told.append("")
        except (TypeError, ValueError, RuntimeError) as error:
            told.append(str(error))
    return told


def test_errors():
    told = ranks(2, refused, timeout=60)
    assert told[0][:10] == told[1][:10] == [
        "experts must be of type GluExperts, got Linear",
        "experts must be a multiple or a divisor of the R=2 ranks, got 3",
        "experts must have an intermediate size that 2 divides, got 7",
        "experts with bias must have a hidden size that 2 divides, got 7",
        'r must be "auto" or one of 0, 1, 2, got 3',
        'degree must be "auto" or one of 1, 2, 4, 8, got 3',
        'levels must be "auto" or one of 1, got 2',
        "window must be a whole number of at least 1, got 0",
        "local_size must divide the R=2 ranks, got 3",
        "gradients must be one of sum, mean, got all",
    ]  # fmt: skip
    assert [t[10:13] for t in told] == [
        [
            f"x must have shape [T, H=8], got [{T}, 7]",
            "routing must be to E=1 experts, got 2",
            "routing must be of type Routing, got Tensor",
        ]
        for T in TOKENS[:2]
    ]
    assert told[1][13] == "rows added to experts (shared_experts) must have shape [0, 8], got [1, 1]"
    assert told[0][13] == "every rank must be able to dispatch, got an error on rank 1 (see there)"
    both = [
        "r must be the same on every rank, got 1 on rank 0, 0 on rank 1",
        "degree must be the same on every rank, got 1 on rank 0, 2 on rank 1",
        'r == "auto" must be the same on every rank, got no on rank 0, yes on rank 1',
    ]
    assert told[0][14:17] == told[1][14:17] == both
    assert told[0][17] == "every rank must be able to dispatch, got an error on rank 1 (see there)"
    assert told[1][17] == 'r must be "auto" or one of 0, 1, 2, got 5'
    needs = "the need for gradients must be the same on every rank, got no on rank 0, yes on rank 1"
    assert told[0][18] == told[1][18] == needs
