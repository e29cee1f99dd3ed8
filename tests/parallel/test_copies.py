import copy
import re

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.parallel.test_expert_parallel import E, block, layer, mine, one_process, step, tokens

from moert import GluExperts, Routing, batch_invariant
from moert.ops import ExpertMap, dispatch
from moert.parallel import ExpertParallel, load_checkpoint, save_checkpoint, shard_experts_
from moert.parallel.copies import Copies
from moert.placement import PlacedLayer, Topology
from moert.testing import DTYPES, assert_rows_close, random_routing
from ranks import error_of, ranks

PLACED = PlacedLayer("experts", np.array([0, 1, 2, 0, 1, 2, 0]), ((0, 1), (0, 2), (4, 0), (5, 1)))
OTHER = PlacedLayer("experts", np.array([2, 2, 1, 1, 0, 0, 0]), ((6, 1), (0, 0), (6, 2)))


@pytest.mark.parametrize("local_size", [None, 1, 2, 4])
def test_choices_go_where_the_replay_counts_them(local_size):
    R = 4
    placed = PlacedLayer("", np.array([0, 1, 2, 3, 0, 1, 2]), ((0, 2), (0, 3), (1, 3), (4, 1), (6, 0)))
    routing = random_routing(24, E, 3, "sentinels")
    routing = Routing(torch.where(routing.ids < E, routing.ids, -1), routing.weights, E)
    experts = ExpertMap.of(placed.expert_to_rank, E, R)
    for rank in range(R):
        copies = Copies.of(experts, placed.replicas, rank, local_size)
        got = copies.routed(routing)
        assert got.num_experts == E + 5 and got.weights is routing.weights
        where = torch.where(got.ids < 0, -1, copies.map.expert_to_rank.long()[got.ids])
        topology = Topology(R, R // (local_size or R))
        homes = np.full(24, rank)
        assert where.tolist() == placed.ranks(routing.ids.numpy(), homes, topology).tolist()
        held = copies.map.experts_of(rank)
        expert_of = [*range(E), *(expert for expert, _ in placed.replicas)]
        assert copies.expert_ids == [expert_of[v] for v in held]
    plain = Copies.of(experts, (), 0, local_size)
    assert plain.routed(routing) is routing and plain.expert_ids == experts.experts_of(0)


def test_errors():
    experts = ExpertMap.of([0, 1], 2, 2)
    for pair in ((2, 0), (0, 2), (-1, 0), (0, 0)):
        text = rf"replicas of a placement must be other \(expert, rank\) in \[0, E=2\) x \[0, R=2\), got \({pair[0]}, "
        with pytest.raises(ValueError, match=text):
            Copies.of(experts, (pair,), 0, None)
    with pytest.raises(ValueError, match=r"got \(0, 1\)"):
        Copies.of(experts, ((0, 1), (0, 1)), 0, None)
    copies = Copies.of(experts, ((0, 1),), 0, None)
    with pytest.raises(ValueError, match="routing must be to E=2 experts, got 3"):
        copies.routed(random_routing(4, 3, 2))


def like_one_process(options: dict) -> None:
    """Outputs and gradients: a copy's are those of the expert, all of them, on every rank."""
    for dtype in DTYPES:
        x, dy = tokens(3, dtype)
        alone, spread = layer(dtype, bias=True), layer(dtype, bias=True)
        shard_experts_(spread, placement={"experts": PLACED}, **options)
        expected = one_process(alone, x, dy)
        for name, got in zip(("y", "dx"), step(spread, mine(x, 3), mine(dy, 3)), strict=True):
            assert_rows_close(got, lambda x, name=name: mine(expected[x.dtype][name], 3), x)
        ids = spread.experts.expert_ids
        for name, parameter in spread.experts.local.named_parameters():
            grad = parameter.grad.flatten(1)
            assert_rows_close(grad, lambda x, name=name: expected[x.dtype][f"experts.{name}"][ids], x)
    assert "copies=4" in repr(spread)


@pytest.mark.parametrize("options", [{}, {"degree": 2}], ids=str)
def test_forward_and_backward(options):
    assert ranks(3, like_one_process, options) == [None] * 3


def trained(folder: str) -> None:
    """Copies stay one expert, bit for bit; a checkpoint has it once, and another placement goes on from it."""
    rank = dist.get_rank()
    x = torch.randn(12, 12, generator=torch.Generator().manual_seed(1))
    model = shard_experts_(block(), placement={"moe.experts": PLACED}, gradients="mean")
    dense = [p for name, p in model.named_parameters() if ".local." not in name]

    def steps(model, optimizer, n):
        for _ in range(n):
            optimizer.zero_grad()
            model(x.chunk(3)[rank]).square().mean().backward()
            for p in (p for name, p in model.named_parameters() if ".local." not in name):
                dist.all_reduce(p.grad)
                p.grad /= 3
            optimizer.step()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps(model, optimizer, 3)
    for parameter in model.moe.experts.local.parameters():
        held = dict(zip(model.moe.experts.expert_ids, parameter.detach().tolist(), strict=True))
        everywhere = [None] * 3
        dist.all_gather_object(everywhere, held)
        for expert, weight in held.items():
            assert all(weight == other.get(expert, weight) for other in everywhere)
        assert sum(map(len, everywhere)) == E + 4
    save_checkpoint(folder, model, optimizer)
    other = shard_experts_(block(), placement={"moe.experts": OTHER}, gradients="mean")
    again = torch.optim.AdamW(other.parameters(), lr=0.5)
    load_checkpoint(folder, other, again)
    steps(model, optimizer, 2)
    steps(other, again, 2)
    with torch.no_grad(), batch_invariant(True):
        torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-6)
    assert all(torch.isfinite(p).all() for p in dense)


def test_training(tmp_path):
    assert ranks(3, trained, str(tmp_path / "checkpoint")) == [None] * 3


def of_a_frozen_stack() -> None:
    model = layer()
    model.experts.down_proj.requires_grad_(False)
    spread = shard_experts_(copy.deepcopy(model), placement={"experts": PLACED})
    x, dy = tokens(3)
    step(spread, mine(x, 3), mine(dy, 3))
    assert spread.experts.local.down_proj.grad is None and spread.experts.local.gate_up_proj.grad is not None


def test_frozen():
    assert ranks(3, of_a_frozen_stack) == [None] * 3


def differ() -> list[str]:
    """Copies of other experts at the same places: ids of the same numbers would be those of other experts."""
    told = []
    homes, more = np.array([0, 0, 0, 0, 1, 1, 2]), np.array([0, 0, 0, 0, 1, 1, 2, 1])
    odd = dist.get_rank() == 2
    for usual, other in (
        (PlacedLayer("experts", homes, ((0, 1),)), PlacedLayer("experts", homes, ((3, 1),))),
        (PlacedLayer("experts", homes, ((0, 1), (3, 2))), PlacedLayer("experts", homes, ((3, 1), (0, 2)))),
        (PlacedLayer("experts", homes, ((0, 1),)), PlacedLayer("experts", more)),  # one expert more in its stead
    ):
        placed, x = other if odd else usual, torch.randn(4, 12)
        experts = GluExperts(len(placed.expert_to_rank), 12, 10)
        told.append(error_of(lambda experts=experts, placed=placed: ExpertParallel(experts, placement=placed)))
        copies = Copies.placed(placed, experts.num_experts, 3, dist.get_rank(), None)
        routing = copies.routed(random_routing(4, experts.num_experts, 2))
        told.append(error_of(dispatch, x, routing, copies.map))
    return told


def test_ranks_with_other_copies_are_refused():
    text = r"the checksum of placement must be the same on every rank, got \d+ on ranks 0, 1, \d+ on rank 2"
    for told in ranks(3, differ):
        assert told.pop(4) == "E must be the same on every rank, got 7 on ranks 0, 1, 8 on rank 2"
        assert len(told) == 5 and all(re.fullmatch(text, each) for each in told), told
