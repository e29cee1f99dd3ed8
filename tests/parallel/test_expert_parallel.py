import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moert import GluExperts, MoELayer, Routing, TopKRouter, batch_invariant
from moert.layers import FeedForward
from moert.parallel import ExpertParallel, expert_parameters, shard_experts_
from moert.testing import DTYPES, row_error
from ranks import ranks

E, H, I, k = 7, 12, 10, 2
TOKENS = (6, 0, 9, 5)  # of the ranks
BOUND = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


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
    y.backward(dy)
    return y.detach(), x.grad


def like_one_process(R: int) -> None:
    """Outputs, gradients of rows and of every parameter; the router's and the shared experts' summed over the ranks."""
    for dtype in DTYPES:
        for placement in (None, [(5 * e + 1) % R for e in range(E)]):
            x, dy = tokens(R, dtype)
            alone, spread = (
                layer(dtype, bias=True),
                shard_experts_(layer(dtype, bias=True), placement={"experts": placement} if placement else None),
            )
            y, dx = step(alone, x, dy)
            got_y, got_dx = step(spread, mine(x, R), mine(dy, R))
            for name, got, expected in (("y", got_y, mine(y, R)), ("dx", got_dx, mine(dx, R))):
                assert row_error(got, expected) <= BOUND[dtype], (name, dtype)
            for name, parameter in alone.named_parameters():
                if name.startswith("experts."):
                    grad = spread.get_parameter(name.replace("experts.", "experts.local.")).grad
                    expected = parameter.grad[spread.experts.expert_ids]
                else:
                    grad, expected = spread.get_parameter(name).grad, parameter.grad
                    dist.all_reduce(grad)
                assert row_error(grad.flatten(1), expected.flatten(1)) <= 4 * BOUND[dtype], (name, dtype)


@pytest.mark.parametrize("R", [2, 3, 4])
def test_forward_and_backward(R):
    ranks(R, like_one_process, R)


def bit_for_bit(R: int) -> None:
    """Where no sum is taken in another order the bits are those of one process: one choice, or all on one rank."""
    torch.manual_seed(1)
    experts, x = GluExperts(E, H, I), torch.randn(5, H)
    spread = ExpertParallel(experts, placement=[e % R for e in range(E)])
    with batch_invariant(True):
        for ids in (
            torch.tensor([[4], [0], [6], [6], [2]]),
            torch.tensor([[0, R], [R, 0], [1, 1 + R], [1, 1], [0, 0]]),
        ):
            routing = Routing(ids, torch.rand(ids.shape), E)
            assert torch.equal(spread(x, routing), experts(x, routing))


def test_bits_are_those_of_one_process():
    ranks(2, bit_for_bit, 2)


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


def dense_part_by(wrap: str, shape: tuple[int, int]) -> None:
    """Some training steps on a mesh of (copies, ranks of the experts): weights like those of one process."""
    R, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "ep"))
    x = torch.randn(R * 4, H, generator=torch.Generator().manual_seed(2))
    alone, spread = block(), block()
    train(alone, x)
    shard_experts_(spread, mesh["ep"], gradients="mean", replicas=mesh["data"])
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
def test_with_data_parallelism_around(wrap, shape):
    ranks(shape[0] * shape[1], dense_part_by, wrap, shape)


def details() -> list[str]:
    """Micro-batches add up; shared experts run between dispatch and its wait; frozen experts get no gradient."""
    x, dy = tokens(2)
    x, dy = mine(x, 2), mine(dy, 2)
    for gradients in ("sum", "mean"):
        model = shard_experts_(layer(), gradients=gradients)
        step(model, x, dy)
        once = model.experts.local.down_proj.grad.clone()
        step(model, x, dy)
        assert torch.allclose(model.experts.local.down_proj.grad, 2 * once)
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
        lambda: ExpertParallel(GluExperts(4, H, I), placement=[1, 1, 1, 1]),
        lambda: ExpertParallel(GluExperts(1, H, I)),
        lambda: ExpertParallel(GluExperts(4, H, I), group=2),
        lambda: ExpertParallel(GluExperts(4, H, I), init_device_mesh("cpu", (1, 2))),
        lambda: shard_experts_(layer(), placement={"expert": [0] * E}),
        lambda: shard_experts_(GluExperts(4, H, I)),
        lambda: model(x),
    ):
        try:
            wrong()
            told.append("")
        except (TypeError, ValueError, RuntimeError) as error:
            told.append(str(error))
    return told


def test_details_and_errors():
    told = ranks(2, details)
    assert told[0][:8] == told[1][:8] == [
        "experts must be of type GluExperts, got Linear",
        "gradients must be one of sum, mean, got all",
        "placement must give every rank an expert, got none for rank 0",
        "placement must give every rank an expert, got none for rank 1",
        "group must be of type ProcessGroup or DeviceMesh or NoneType, got int",
        "group must be a mesh of one dimension (mesh['ep']), got 2",
        "placement must name GluExperts of the model (experts), got expert",
        "model must hold GluExperts, got GluExperts themselves (ExpertParallel(experts, group))",
    ]  # fmt: skip
    assert [t[8] for t in told] == [
        f"rows added to experts (shared_experts) must have shape [{n}, 12], got [{n}, 13]" for n in TOKENS[:2]
    ]
