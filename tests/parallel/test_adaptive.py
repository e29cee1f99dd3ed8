import copy
import os
import re
from itertools import product

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
    expert_parameters,
    load_checkpoint,
    save_checkpoint,
)
from moert.testing import assert_rows_close, random_routing
from moert.types import ExpertLayout, Onto
from ranks import error_of, ranks

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


class Wide(nn.Module):
    """Shared experts that stay in float32 under autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.float())


def beside_others(folder: str) -> None:
    """Shared experts, rows added by others, autocast, compiled models, recorded routings, checkpoints."""
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
    for r in spread.experts.allowed["r"]:
        spread.experts.r = r
        compiled = torch.compile(spread, backend="aot_eager", dynamic=True)(mine(x))
        assert torch.equal(compiled, spread(mine(x)))
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
    experts = AdaptiveExperts(experts_of(3), r=0, pulse=Pulse(interval=0.5))
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


def window_anew() -> list[int]:
    experts, (x, routing, _) = AdaptiveExperts(experts_of(2)), inputs(2)
    own = mine(x), Routing(mine(routing.ids), mine(routing.weights), 2)
    experts.r, windows = "auto", []
    for window in (128, 3):
        experts.window = window
        experts(*own)
        windows += [cache.window for cache in experts.caches.values()]
    return windows


def test_a_window_that_is_set_anew_is_used():
    assert ranks(2, window_anew) == [[128, 3]] * 2


def refused() -> list[str]:
    told, odd = [], dist.get_rank() == 1
    experts = AdaptiveExperts(experts_of(1), r=1, degree=1)
    allowed, (x, routing, _) = experts.allowed, inputs(1, 1)
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
        at(window=64),
        at(allowed={**experts.allowed, "r": (0, 1)}),
        lambda: experts(x.clone().requires_grad_(odd), routing),
    ):
        experts.r, experts.degree, experts.window, experts.allowed = 1, 1, 128, allowed
        experts.requires_grad_(len(told) < 20)
        told.append(error_of(wrong))
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
    assert told[0][13] == "every rank must be able to go on, got an error on rank 1 (see there)"
    both = [
        "r must be the same on every rank, got 1 on rank 0, 0 on rank 1",
        "degree must be the same on every rank, got 1 on rank 0, 2 on rank 1",
        'r == "auto" must be the same on every rank, got no on rank 0, yes on rank 1',
    ]
    assert told[0][14:17] == told[1][14:17] == both
    assert told[0][17] == "every rank must be able to go on, got an error on rank 1 (see there)"
    assert told[1][17] == 'r must be "auto" or one of 0, 1, 2, got 5'
    needs = "the need for gradients must be the same on every rank, got no on rank 0, yes on rank 1"
    assert told[0][20] == told[1][20] == needs
    assert told[0][18] == told[1][18] == "window must be the same on every rank, got 128 on rank 0, 64 on rank 1"
    allowed = r"the checksum of allowed must be the same on every rank, got \d+ on rank 0, \d+ on rank 1"
    assert told[0][19] == told[1][19] and re.fullmatch(allowed, told[0][19])


def one_rank_cannot() -> list[str]:
    """What is wrong on one rank alone: the others do not wait for it."""
    odd, told = dist.get_rank() == 1, []
    for options in ({"r": 3}, {"window": 0}, {"local_size": 2.0}, {"replicas": 3}, {"local_size": 1}, {"window": 4}):
        told.append(error_of(lambda options=options: AdaptiveExperts(experts_of(1), **(options if odd else {}))))
    double, of_two = torch.float64 if odd else torch.float32, experts_of(2 if odd else 1)
    for experts in (
        GluExperts(1, H, 2 * I if odd else I),
        experts_of(1, double),
        experts_of(1, bias=odd),
        of_two,
        experts_of(3 if odd else 2),
    ):
        told.append(error_of(lambda experts=experts: AdaptiveExperts(experts)))
    return told


def test_an_error_of_one_rank():
    own = [
        'r must be "auto" or one of 0, 1, 2, got 3',
        "window must be a whole number of at least 1, got 0",
        "local_size must be of type int or None, got float",
        "replicas must be of type ProcessGroup or DeviceMesh or None, got int",
        "local_size must be the same on every rank, got None on rank 0, 1 on rank 1",
        "window must be the same on every rank, got 128 on rank 0, 4 on rank 1",
        f"I must be the same on every rank, got {I} on rank 0, {2 * I} on rank 1",
        "the dtype of weights must be the same on every rank, got float32 on rank 0, float64 on rank 1",
        "bias must be the same on every rank, got no on rank 0, yes on rank 1",
        "E must be the same on every rank, got 1 on rank 0, 2 on rank 1",
        "experts must be a multiple or a divisor of the R=2 ranks, got 3",
    ]
    elsewhere = "every rank must be able to go on, got an error on rank 1 (see there)"
    told = ranks(2, one_rank_cannot, timeout=60)
    assert told[1] == own and told[0] == [elsewhere] * 4 + own[4:10] + [elsewhere]
