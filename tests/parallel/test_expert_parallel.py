import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moert import GluExperts, MoELayer, Routing, TopKRouter, batch_invariant
from moert.analysis import record_routings
from moert.layers import FeedForward
from moert.ops.rank_capacity import Capacity
from moert.parallel import ExpertParallel, expert_parameters, shard_experts_
from moert.placement import PlacedLayer
from moert.testing import DTYPES, assert_rows_close
from moert.types import Onto
from ranks import error_of, ranks

E, H, I, k = 7, 12, 10, 2
TOKENS = (6, 0, 9, 5)  # of the ranks
COPIED = PlacedLayer("", np.array([0, 1] * 3 + [0]), ((0, 1), (3, 0)))


def layer(dtype=torch.float32, bias=False, shared=True) -> MoELayer:
    torch.manual_seed(3)
    experts = GluExperts(E, H, I, bias=bias)
    return MoELayer(TopKRouter(H, E, k), experts, FeedForward(H, I) if shared else None).to(dtype)


def tokens(R: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens, gradients of all outputs."""
    generator = torch.Generator().manual_seed(R)
    return tuple(torch.randn(sum(TOKENS[:R]), H, generator=generator).to(dtype) for _ in range(2))


def mine(x: torch.Tensor, R: int) -> torch.Tensor:
    return x.split(TOKENS[:R])[dist.get_rank()]


def step(model, x, dy):
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(dy.to(y.dtype))
    return y.detach(), x.grad


def one_process(model, x, dy) -> dict[torch.dtype, dict[str, torch.Tensor]]:
    """Output, gradients of rows and of every parameter, in x's dtype and in float64."""
    results = {}
    for dtype in (x.dtype, torch.float64):
        same = copy.deepcopy(model).to(dtype)
        y, dx = step(same, x.to(dtype), dy.to(dtype))
        results[dtype] = {"y": y, "dx": dx, **{name: p.grad.flatten(1) for name, p in same.named_parameters()}}
    return results


def like_one_process(R: int) -> None:
    """Outputs, gradients of rows and of every parameter; the router's and the shared experts' summed over the ranks."""
    for dtype in DTYPES:
        for placement in (None, [(5 * e + 1) % R for e in range(E)]):
            x, dy = tokens(R, dtype)
            alone, spread = layer(dtype, bias=True), layer(dtype, bias=True)
            shard_experts_(spread, placement={"experts": placement} if placement else None)
            expected = one_process(alone, x, dy)
            for name, got in zip(("y", "dx"), step(spread, mine(x, R), mine(dy, R)), strict=True):
                assert_rows_close(got, lambda x, name=name: mine(expected[x.dtype][name], R), x)
            for name, _ in alone.named_parameters():
                if name.startswith("experts."):
                    grad = spread.get_parameter(name.replace("experts.", "experts.local.")).grad
                    rows = spread.experts.expert_ids
                else:
                    grad, rows = spread.get_parameter(name).grad.float(), slice(None)
                    dist.all_reduce(grad)
                assert_rows_close(grad.flatten(1), lambda x, name=name, rows=rows: expected[x.dtype][name][rows], x)


@pytest.mark.parametrize("R", [2, 3, 4])
def test_forward_and_backward(R):
    assert ranks(R, like_one_process, R) == [None] * R


def in_parts(R: int) -> None:
    """However the tokens are cut, also into more parts than there are tokens: the bits of the whole."""
    x, dy = tokens(R)
    onto = Onto(rows=torch.randn(len(mine(x, R)), H), scale=torch.rand(len(mine(x, R))))
    with batch_invariant(True):
        for shared in (True, False):
            results = {}
            for degree in (1, 2, 4, 8):
                model = shard_experts_(layer(shared=shared), degree=degree)
                routing = model.router(mine(x, R))
                added = model.experts(mine(x, R), routing, onto)
                results[degree] = *step(model, mine(x, R), mine(dy, R)), added.detach()
                grads = {name: p.grad.flatten(1) for name, p in model.named_parameters() if p.grad is not None}
                if degree == 1:
                    expected = grads
                assert all(map(torch.equal, results[degree], results[1]))
                for name, grad in grads.items():
                    torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("R", [2, 3])
def test_in_parts(R):
    assert ranks(R, in_parts, R) == [None] * R


def in_two_levels() -> None:
    """Nodes of two ranks: the bits of the straight way, also in parts."""
    x, dy = tokens(4)
    with batch_invariant(True):
        for degree in (1, 2):
            results = []
            for local_size in (None, 2):
                model = shard_experts_(layer(), degree=degree, local_size=local_size)
                results.append([*step(model, mine(x, 4), mine(dy, 4)), *(p.grad for p in model.parameters())])
            assert all(map(torch.equal, *results))


def test_in_two_levels():
    assert ranks(4, in_two_levels) == [None] * 4


def within_a_capacity() -> list[int]:
    """Room for all is the layer without one; none leaves what shared experts make; both also in parts."""
    x = torch.randn(5, H)
    routed, dropped = layer(), []
    alone = layer(shared=False)
    for degree in (1, 2):
        plenty = shard_experts_(layer(), degree=degree, capacity=Capacity(5))
        torch.testing.assert_close(plenty(x), routed(x), rtol=1e-5, atol=1e-6)
        none = shard_experts_(layer(), degree=degree, capacity=Capacity(0, "weight"))
        assert torch.equal(none(x), none.shared_experts(x)) and "capacity=Capacity(rows=0" in repr(none.experts)
        assert none.experts.dropped > 0 == plenty.experts.dropped
        one = shard_experts_(layer(shared=False), degree=degree, capacity=Capacity(1))
        with batch_invariant(True):
            changed = (one(x) != alone(x)).any(1).sum().item()
        dropped.append(one.experts.dropped.item())
        assert 0 < changed <= dropped[-1]
    return dropped


def test_a_capacity():
    assert all(a > b > 0 for a, b in ranks(2, within_a_capacity))


def with_a_payload() -> float:
    """The error of the layer's output beside rows that travel whole, relative."""
    x = torch.randn(5, H)
    whole, spread = layer(shared=False), layer(shared=False)
    shard_experts_(spread, degree=2, payload="int8")
    assert "degree=2, payload=int8" in repr(spread.experts)
    expected = whole(x)
    return ((spread(x) - expected).norm() / expected.norm()).item()


def test_a_payload():
    assert all(1e-4 < error < 0.02 for error in ranks(2, with_a_payload))


def bit_for_bit(R: int) -> None:
    """Where no sum is taken in another order the bits are those of one process, of results and of rows' gradients: one
    choice, or all on one rank.
    """
    torch.manual_seed(1)
    experts, x = GluExperts(E, H, I), torch.randn(5, H)
    spread = ExpertParallel(experts, placement=[e % R for e in range(E)])
    with batch_invariant(True):
        for ids in (
            torch.tensor([[4], [0], [6], [6], [2]]),
            torch.tensor([[0, R], [R, 0], [1, 1 + R], [1, 1], [0, 0]]),
        ):
            weights, dy = torch.rand(ids.shape), torch.randn(5, H)
            results = []
            for layer in (spread, experts):
                leaves = [tensor.clone().requires_grad_() for tensor in (x, weights)]
                y = layer(leaves[0], Routing(ids, leaves[1], E))
                results.append((y, *torch.autograd.grad(y, leaves, dy)))
            assert all(map(torch.equal, *results))


@pytest.mark.parametrize("R", [2, 3, 4])
def test_bits_are_those_of_one_process(R):
    assert ranks(R, bit_for_bit, R) == [None] * R


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(H, H)
        self.moe = layer()

    def forward(self, x):
        return x + self.moe(torch.tanh(self.inner(x)))


def block() -> Block:
    torch.manual_seed(0)
    return Block()


def train(model, x, steps=3) -> list[float]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def dense_part_by(wrap: str, shape: tuple[int, int], placed: PlacedLayer | None) -> None:
    """Some training steps on a mesh of (copies, ranks of the experts): weights like those of one process."""
    R, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "ep"))
    x = torch.randn(R * 4, H, generator=torch.Generator().manual_seed(2))
    alone, spread = block(), block()
    train(alone, x)
    placement = placed and {"moe.experts": placed}
    shard_experts_(spread, mesh["ep"], placement, gradients="mean", replicas=mesh["data"], degree=2)
    own = expert_parameters(spread)
    assert list(own) == ["moe.experts.local.gate_up_proj", "moe.experts.local.down_proj"]
    if wrap == "DDP":
        spread._ddp_params_and_buffers_to_ignore = list(own)
        model = DistributedDataParallel(spread)
    else:
        model = fully_shard(spread, mesh=init_device_mesh("cpu", (R,)), ignored_params=set(own.values()))
    train(model, x[4 * rank : 4 * rank + 4])
    for name, parameter in alone.named_parameters():
        if ".experts." in name:
            got, expected = own[name.replace("experts.", "experts.local.")], parameter[spread.moe.experts.expert_ids]
        else:
            got, expected = whole(spread.get_parameter(name)), parameter
        assert (got - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("wrap", ["DDP", "FSDP2"])
@pytest.mark.parametrize("shape", [(1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("placed", [None, COPIED], ids=["once", "copies"])
def test_with_data_parallelism_around(wrap, shape, placed):
    R = shape[0] * shape[1]
    assert ranks(R, dense_part_by, wrap, shape, placed) == [None] * R


def details() -> list[str]:
    """Micro-batches add up; shared experts run between dispatch and its wait; frozen experts get no gradient."""
    x, dy = tokens(2)
    x, dy = mine(x, 2), mine(dy, 2)
    for gradients in ("sum", "mean"):
        model = shard_experts_(layer(), gradients=gradients)
        step(model, x, dy)
        once = model.experts.local.down_proj.grad.clone()
        step(model, x, dy)
        assert torch.equal(model.experts.local.down_proj.grad, 2 * once)
    model = shard_experts_(layer())
    calls = []

    class Spy(nn.Module):
        def forward(self, rows):
            calls.append(rows.shape)
            return torch.zeros_like(rows)

    model.shared_experts = Spy()
    plain = model(x)
    model.shared_experts = None
    assert torch.equal(model(x), plain) and calls == [x.shape]
    model.experts.local.requires_grad_(False)
    step(model, x, dy)
    assert model.experts.local.down_proj.grad is None
    assert "num_experts=7, num_ranks=2, gradients=sum" in repr(model)
    told = []
    model.shared_experts = nn.Linear(H, H + 1)
    for wrong in (
        lambda: ExpertParallel(nn.Linear(2, 2)),
        lambda: ExpertParallel(GluExperts(4, H, I), gradients="all"),
        lambda: ExpertParallel(GluExperts(4, H, I), degree=0),
        lambda: ExpertParallel(GluExperts(4, H, I), degree="2"),
        lambda: ExpertParallel(GluExperts(4, H, I), payload="fp4"),
        lambda: ExpertParallel(GluExperts(4, H, I), capacity=2),
        lambda: ExpertParallel(GluExperts(4, H, I), local_size=3),
        lambda: ExpertParallel(GluExperts(4, H, I), placement=[1, 1, 1, 1]),
        lambda: ExpertParallel(GluExperts(1, H, I)),
        lambda: ExpertParallel(GluExperts(4, H, I), group=2),
        lambda: ExpertParallel(GluExperts(4, H, I), init_device_mesh("cpu", (1, 2))),
        lambda: shard_experts_(layer(), placement={"expert": [0] * E}),
        lambda: shard_experts_(GluExperts(4, H, I)),
        lambda: model(x),
    ):
        told.append(error_of(wrong))
    return told


class Twice(nn.Module):
    """The same experts under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = layer(), layer()
        self.second.experts = self.first.experts


def sharded_once() -> None:
    """One module stays one; what is sharded, or is not there, is refused."""
    model = shard_experts_(Twice(), placement={"second.experts": [0, 1, 1, 1, 1, 1, 1]})
    assert model.first.experts is model.second.experts
    assert model.first.experts.expert_ids == ([0] if dist.get_rank() == 0 else [1, 2, 3, 4, 5, 6])
    both = {"first.experts": [0] * E, "second.experts": [0] * E}
    once = "placement must name a module once, got first.experts, second.experts for the same"
    inner = shard_experts_(block().moe)
    model = nn.ModuleDict({"encoder": inner, "decoder": layer()})
    again = "model must hold GluExperts that are not sharded already, got encoder.experts.local"
    for text, wrong in (
        (once, lambda: shard_experts_(Twice(), placement=both)),
        (again, lambda: shard_experts_(model)),
        ("model must hold GluExperts, got none in Linear", lambda: shard_experts_(nn.Linear(2, 2))),
    ):
        with pytest.raises(ValueError) as error:
            wrong()
        assert str(error.value) == text
    assert isinstance(model["decoder"].experts, GluExperts)  # nothing is half done


def test_sharded_once():
    assert ranks(2, sharded_once) == [None] * 2


def recorded() -> None:
    """Forward hooks see every call, with and without shared experts, and rows added by others."""
    x = mine(tokens(2)[0], 2)
    for shared in (False, True):
        alone, spread = layer(shared=shared), shard_experts_(layer(shared=shared))
        with record_routings(alone) as expected, record_routings(spread) as got:
            alone(x)
            spread(x)
            for model in (alone, spread):
                model.experts.onto(x, model.router(x), Onto(x))
        assert torch.equal(got.loads()["experts"], expected.loads()["experts"])
        assert got.loads()["experts"].sum() == 2 * x.shape[0] * k


def test_recorded():
    assert ranks(2, recorded) == [None] * 2


def reduced_in_the_graph() -> None:
    """Mean gradients with frozen experts, after parameters were replaced, and beside sums."""
    x, dy = tokens(2)
    x, dy = mine(x, 2), mine(dy, 2)
    plain = shard_experts_(layer())
    step(plain, x, dy)
    frozen = layer()
    frozen.experts.down_proj.requires_grad_(False)
    frozen = shard_experts_(frozen, gradients="mean")
    replaced = shard_experts_(layer(), gradients="mean")
    replaced.load_state_dict({name: value.clone() for name, value in replaced.state_dict().items()}, assign=True)
    for model in (frozen, replaced):
        step(model, x, dy)
        assert torch.equal(model.experts.local.gate_up_proj.grad, plain.experts.local.gate_up_proj.grad / 2)
    assert frozen.experts.local.down_proj.grad is None
    assert torch.equal(replaced.experts.local.down_proj.grad, plain.experts.local.down_proj.grad / 2)


def test_reduced_in_the_graph():
    assert ranks(2, reduced_in_the_graph) == [None] * 2


class Wide(nn.Module):
    """Shared experts that stay in float32 under autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.to(torch.promote_types(x.dtype, torch.float32)))


class Free(nn.Module):
    """Adds a multiple of x, as MoE++ does."""

    def __init__(self):
        super().__init__()
        self.moe = layer(shared=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.moe.experts.onto(x, self.moe.router(x), Onto(x, x.new_ones(len(x))))


def under_autocast() -> None:
    x, dy = tokens(2)
    wide = layer(shared=False)
    wide.shared_experts = Wide()
    for model in (layer(shared=False), layer(), wide, Free()):
        spread = shard_experts_(copy.deepcopy(model))
        with torch.autocast("cpu", torch.bfloat16):
            expected = one_process(model, x, dy)  # float64 is not cast
            results = step(spread, mine(x, 2), mine(dy, 2))
        assert [got.dtype for got in results] == [torch.bfloat16, torch.float32]
        for name, got in zip(("y", "dx"), results, strict=True):
            assert_rows_close(got, lambda x, name=name: mine(expected[x.dtype][name], 2), x)


def test_under_autocast():
    assert ranks(2, under_autocast) == [None] * 2


def one_rank_is_refused() -> None:
    """Rows to add that do not fit are an error on every rank, before anybody waits."""
    x = mine(tokens(2)[0], 2).contiguous()
    odd, told = dist.get_rank() == 0, "every rank must be able to go on, got an error on rank 0"
    for options in ({}, {"degree": 2}, {"capacity": Capacity(9)}, {"capacity": Capacity(9), "degree": 2}):
        model = shard_experts_(layer(shared=False), **options)
        with pytest.raises(ValueError if odd else RuntimeError, match="rows added to experts" if odd else told):
            model.experts.onto(x, model.router(x), Onto(x[1:] if odd else x))
        with pytest.raises(TypeError if odd else RuntimeError, match="routing must be of type" if odd else told):
            model.experts(x, None if odd else model.router(x))
        with pytest.raises(TypeError if odd else RuntimeError, match="x must be of type" if odd else told):
            model.experts(None if odd else x, model.router(x))


def test_one_rank_is_refused():
    assert ranks(2, one_rank_is_refused, timeout=60) == [None] * 2


def test_details_and_errors():
    told = ranks(2, details)
    assert told[0][:13] == told[1][:13] == [
        "experts must be of type GluExperts, got Linear",
        "gradients must be one of sum, mean, got all",
        "degree must be at least 1, got 0",
        "degree must be of type int, got str",
        "payload must be None or one of int8, float8_e4m3, got fp4",
        "capacity must be of type Capacity or None, got int",
        "local_size must divide the R=2 ranks, got 3",
        "placement must give every rank an expert, got none for rank 0",
        "placement must give every rank an expert, got none for rank 1",
        "group must be of type ProcessGroup or DeviceMesh or None, got int",
        "group must be a mesh of one dimension (mesh['ep']), got 2",
        "placement must name experts of the model (experts), got expert",
        "model must hold GluExperts, got GluExperts themselves (ExpertParallel(experts, group))",
    ]  # fmt: skip
    assert [t[13] for t in told] == [
        f"rows added to experts (shared_experts) must have shape [{n}, 12], got [{n}, 13]" for n in TOKENS[:2]
    ]


def traffic() -> None:
    """Rows of the last call, also in parts, of which nobody is asked for more than three exchanges."""
    x, R, rank = mine(tokens(2)[0], 2), dist.get_world_size(), dist.get_rank()
    for degree in (1, 2):
        model, calls, send = shard_experts_(layer(shared=False), degree=degree), [], dist.all_to_all_single
        assert model.experts.traffic is None
        dist.all_to_all_single = lambda *args, **kwargs: (calls.append(1), send(*args, **kwargs))[1]
        try:
            model(x)
        finally:
            dist.all_to_all_single = send
        assert len(calls) == 3 * degree
        sent, received = model.experts.traffic
        where = model.experts.map.expert_to_rank[model.router(x).ids.long()]
        assert sent == [int((where == r).any(-1).sum()) for r in range(R)]
        everywhere = [None] * R
        dist.all_gather_object(everywhere, sent)
        assert received == [theirs[rank] for theirs in everywhere]


def test_traffic():
    assert ranks(2, traffic) == [None] * 2
