"""Ranks that are killed, hang, or end by an error of their own: those that are left name them, without a Pulse."""

import os
import re
import signal
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.parallel.test_pulse import LOST, Fault, counted

from moert import GluExperts, MoELayer, Routing, TopKRouter
from moert.ops import Capacity, ExpertMap, Ranks, all_to_all, combine, dispatch, exchange_counts, roll_call
from moert.ops.dispatch import combine_ref
from moert.ops.roll_call import PATIENCE, roll
from moert.parallel import shard_experts_
from moert.testing import random_routing
from ranks import ranks

HANGS = ("is stopped", "sleeps")


class Calls:
    """A guard as a Pulse has it."""

    def __init__(self, group):
        self.exchanging = lambda: roll_call.roll_call(group)


def exchanges(how: str, folder: str, at: int, options: dict, compiled: bool = False) -> tuple[str, float]:
    """Layers forward and backward until one rank is lost; what the others are told, and when."""
    group = dist.new_group(timeout=timedelta(seconds=10 if how in HANGS else 60))
    fault = Fault(how, folder)
    torch.manual_seed(0)
    layers = [MoELayer(TopKRouter(8, 6, 2), GluExperts(6, 8, 8)) for _ in range(2)]
    model = shard_experts_(torch.nn.Sequential(*layers), group, **options)
    if dist.get_rank() == LOST:
        for each in model:
            ways = each.experts.ranks
            each.experts.ranks = Ranks(group, counted(at, fault, Calls(group)), ways.levels, ways.layer)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    x = torch.randn(9, 8)
    try:
        for _ in range(100):
            run(x).sum().backward()
    except RuntimeError as error:
        return str(error), time.time() - float(Path(folder, "when").read_text())
    return "every step was made", 0.0


def assert_named(told, within: float) -> None:
    for rank in (0, 2):
        text, seconds = told[rank]
        said = re.search(r"every rank must take part in the exchange, got no word from rank 1: ", text)
        assert said, text
        assert seconds < within, seconds


@pytest.mark.parametrize("how", ["is killed", "is stopped", "raises", "sleeps"])
def test_a_rank_is_lost(tmp_path, how):
    # A kill is seen at once; who stops or sleeps is missed after the group's ten seconds.
    told = ranks(3, exchanges, how, str(tmp_path), 7, {}, may_end=(LOST,))
    assert_named(told, 25 if how in HANGS else 15)


@pytest.mark.parametrize("at", [3, 12, 21])
def test_a_rank_is_killed_while_parts_travel(tmp_path, at):
    assert_named(ranks(3, exchanges, "is killed", str(tmp_path), at, {"degree": 2}, may_end=(LOST,)), 10)


def test_a_rank_is_killed_in_a_graph(tmp_path):
    assert_named(ranks(3, exchanges, "is killed", str(tmp_path), 9, {}, True, may_end=(LOST,)), 60)


def test_a_rank_is_killed_in_two_levels(tmp_path):
    """Who waits for ranks that wait for the lost one may be named too."""
    told = ranks(4, exchanges, "is killed", str(tmp_path), 9, {"local_size": 2}, may_end=(LOST,))
    for rank in (0, 2, 3):
        text, seconds = told[rank]
        assert re.search(r"got no word from ranks? (\d, )*1(, \d)*: ", text), text
        assert seconds < 2 * PATIENCE + 5


def killed_amid_bytes(at: int, options: dict, compiled: bool, two_levels: bool = False) -> tuple[str, str]:
    """Rank 1 ends while the megabytes number `at` travel; the others go on in a group of their own."""
    R = dist.get_world_size()
    group = dist.new_group(timeout=timedelta(seconds=10 if two_levels else 60))
    if two_levels:
        group = Ranks.in_nodes(2, group)
    experts, count, send = ExpertMap.of(None, 6, R), iter(range(99)), dist.all_to_all_single
    x, routing = torch.randn(1000, 2048, requires_grad=True), random_routing(1000, 6, 2)

    def begun(output, *args, **options):
        """Of the rows: on their way, and this rank ends."""
        sent = send(output, *args, **options)
        if output.numel() > 2**20 and next(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return sent

    def there_and_back(x, ids, weights):
        there = dispatch(x, Routing(ids, weights, 6), experts, group, **options)
        return combine(torch.tanh(there.x), there)

    if dist.get_rank() == LOST:
        dist.all_to_all_single = begun
    run = torch.compile(there_and_back, backend="aot_eager") if compiled else there_and_back
    with pytest.raises(RuntimeError) as error:
        run(x, routing.ids, routing.weights).sum().backward()
    others = [rank for rank in range(R) if rank != LOST]
    left = dist.new_group(others, use_local_synchronization=True, timeout=timedelta(seconds=60))
    x, routing = x[:5].detach(), random_routing(5, 6, 2, generator=torch.Generator().manual_seed(dist.get_rank()))
    there = dispatch(x, routing, ExpertMap.of(None, 6, R - 1), left)
    expected = combine_ref(there.x, routing, ExpertMap.of(None, 6, R - 1), left)
    return str(error.value), str(torch.allclose(combine(there.x, there), expected))


@pytest.mark.parametrize(
    "at, options, compiled",
    [
        (0, {}, False),  # there, then back, and the gradients of both
        *(pytest.param(at, {}, False, marks=pytest.mark.slow) for at in (1, 2, 3)),
        pytest.param(2, {}, True, marks=pytest.mark.slow),
        pytest.param(1, {"payload": "int8"}, False, marks=pytest.mark.slow),
        pytest.param(3, {"capacity": Capacity(500)}, False, marks=pytest.mark.slow),
        pytest.param(0, {"asynchronous": True}, False, marks=pytest.mark.slow),
    ],
)
def test_a_rank_is_killed_amid_bytes(at, options, compiled):
    told = ranks(3, killed_amid_bytes, at, options, compiled, may_end=(LOST,))
    for rank in (0, 2):
        error, same = told[rank]
        assert error.startswith("every rank must take part in the exchange, got no word from rank 1: "), error
        assert same == "True"


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 3])
def test_a_rank_is_killed_amid_bytes_in_two_levels(at):
    """Who waits for ranks that wait for the lost one does so for the group's time, and may be named too."""
    told = ranks(4, killed_amid_bytes, at, {}, False, True, may_end=(LOST,))
    for rank in (0, 2, 3):
        error, same = told[rank]
        assert re.search(r"got no word from ranks? (\d, )*1(, \d)*: ", error), error
        assert same == "True"


def raw_exchanges(folder: str) -> str:
    """all_to_all itself, forward and backward, until one rank is lost."""
    splits = exchange_counts([2] * 3)
    if dist.get_rank() == LOST:
        splits = replace(splits, ranks=Ranks(None, counted(5, Fault("is killed", folder), Calls(None))))
    with pytest.raises(RuntimeError) as error:
        for _ in range(100):
            all_to_all(torch.ones(6, 4, requires_grad=True), splits).sum().backward()
    return str(error.value)


def test_a_rank_is_killed_in_all_to_all(tmp_path):
    told = ranks(3, raw_exchanges, str(tmp_path), may_end=(LOST,))
    for rank in (0, 2):
        assert "every rank must take part in the exchange, got no word from rank 1: " in told[rank], told


def words() -> None:
    """A rank that goes on takes its word back; who alone fails names all others; one process is none's business."""
    rank = dist.get_rank()
    everywhere = "every rank must take part in the exchange, it failed on all of them: boom"
    last, roll_call.LAST = roll_call.LAST, 10  # each is heard, however late
    dist.barrier()
    with pytest.raises(RuntimeError, match=everywhere), roll_call.roll_call(None):
        raise RuntimeError("boom")
    dist.barrier()
    with pytest.raises(ValueError, match="not an exchange's"), roll_call.roll_call(None):
        raise ValueError("not an exchange's")
    with roll_call.roll_call(None):
        dist.barrier()
    dist.barrier()
    assert not roll(dist.group.WORLD).check(["0"]) and not roll(dist.group.WORLD).check(["1"])
    dist.barrier()  # both have looked before one writes again
    roll_call.LAST = last
    if rank == 0:
        alone = "got no word from rank 1: boom"
        with pytest.raises(RuntimeError, match=alone), roll_call.roll_call(None):
            raise RuntimeError("boom")
    dist.barrier()
    with pytest.raises(torch.OutOfMemoryError, match="^boom$"), roll_call.roll_call(None):
        raise torch.OutOfMemoryError("boom")
    if rank == 0:  # as another process would have left it, in a store that outlives both
        roll(dist.group.WORLD).set("1", "failed")
    dist.barrier()
    roll_call._seen.clear()
    with roll_call.roll_call(None):
        dist.barrier()
    assert not roll(dist.group.WORLD).check(["1"])
    dist.barrier()
    roll_call.store_of = gone
    ended = "every rank must take part in the exchange, the process that keeps the store ended: boom"
    with pytest.raises(RuntimeError, match=ended), roll_call.roll_call(None):
        raise RuntimeError("boom")


def gone(group):
    raise RuntimeError("Connection reset by peer")


def test_words():
    assert ranks(2, words) == [None] * 2


def of_one() -> None:
    with pytest.raises(RuntimeError, match="^boom$"), roll_call.roll_call(None):
        raise RuntimeError("boom")


def test_one_process():
    assert ranks(1, of_one) == [None]
