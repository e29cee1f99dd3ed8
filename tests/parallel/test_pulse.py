"""Ranks that are killed, stopped, or end by an error of their own, in the middle of exchanges."""

import copy
import os
import random
import re
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moert import GluExperts, MoELayer, TopKRouter
from moert.parallel import Pulse, shard_experts_
from ranks import ranks

LOST, INTERVAL = 1, 0.5


class Fault:
    """Ends this rank in its own way, and notes when."""

    def __init__(self, how: str, folder: str):
        self.how, self.when = how, Path(folder, "when")

    def __call__(self):
        self.when.write_text(str(time.time()))
        if self.how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "is stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.how == "sleeps":
            time.sleep(60)
        raise ValueError("an error of its own")


def exchanges(how: str, folder: str, seed: int) -> tuple[str, float]:
    """Layers forward and backward until one rank is lost, at a time that the seed says; what the others are told."""
    limit = 10 if how in ("is stopped", "sleeps") else 60
    group = dist.new_group(timeout=timedelta(seconds=limit))
    lost, fault = dist.get_rank() == LOST, Fault(how, folder)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(MoELayer(TopKRouter(8, 6, 2), GluExperts(6, 8, 8)) for _ in range(3)))
    pulse = Pulse(group, INTERVAL)
    shard_experts_(model, group, pulse=pulse)
    at = random.Random(seed).randrange(20, 120)  # a step has 21 guarded calls: three a layer forward, four backward
    if lost:
        guard = counted(at, fault, pulse)
        for each in model:
            each.experts.ranks = replace(each.experts.ranks, guard=guard)
    x = torch.randn(9, 8)
    try:
        for _ in range(100):
            model(x).sum().backward()
    except RuntimeError as error:
        return str(error), time.time() - float(fault.when.read_text())
    return "every step was made", 0.0


def counted(at: int, fault: Fault, pulse: Pulse):
    """The pulse's guard until its call number `at`."""
    calls = iter(range(at + 1))

    @contextmanager
    def guard():
        if next(calls) == at:
            fault()
        with pulse.exchanging():
            yield

    return guard


def assert_named(told, how: str, within: float) -> None:
    words = "rank 1 did not come to it" if how == "sleeps" else "got no sign of life from rank 1"
    for rank in (0, 2):
        text, seconds = told[rank]
        assert re.match(f"every rank must take part in the exchange, {words}: ", text), text
        assert seconds < within, seconds


@pytest.mark.parametrize("seed", range(3))
def test_a_rank_is_killed(tmp_path, seed):
    assert_named(ranks(3, exchanges, "is killed", str(tmp_path), seed, may_end=(LOST,)), "is killed", 10)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 50))
def test_a_rank_is_killed_at_many_points(tmp_path, seed):
    assert_named(ranks(3, exchanges, "is killed", str(tmp_path), seed, may_end=(LOST,)), "is killed", 10)


@pytest.mark.parametrize("how", ["raises", "is stopped", "sleeps"])
def test_a_rank_is_lost_otherwise(tmp_path, how):
    # Ten seconds of the group's own, then three intervals.
    assert_named(ranks(3, exchanges, how, str(tmp_path), 0, may_end=(LOST,)), how, 25)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("how", ["raises", "is stopped", "sleeps"])
def test_a_rank_is_lost_otherwise_at_many_points(tmp_path, how, seed):
    assert_named(ranks(3, exchanges, how, str(tmp_path), seed, may_end=(LOST,)), how, 25)


def alive() -> None:
    """Nobody is missing: the error is the exchange's own.  A pulse that was stopped is gone to the others."""
    pulse = Pulse(interval=0.5)
    dist.barrier()  # each has given a sign
    told = "every rank must take part in the exchange, all are alive: boom"
    with pytest.raises(RuntimeError, match=told), pulse.exchanging():
        raise RuntimeError("boom")
    with pytest.raises(ValueError, match="not an exchange's"), pulse.exchanging():
        raise ValueError("not an exchange's")
    dist.barrier()
    if dist.get_rank() == 1:
        pulse.stop()
    dist.barrier()
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match="got no sign of life from rank 1: boom"), pulse.exchanging():
            raise RuntimeError("boom")
        pulse.stop()
    dist.barrier()
    layer = shard_experts_(MoELayer(TopKRouter(8, 6, 2), GluExperts(6, 8, 8)))
    assert torch.equal(copy.deepcopy(layer.experts.local.down_proj), layer.experts.local.down_proj)


def of_two_among_three() -> None:
    """The ranks of a mesh by their numbers among all; a slow one is given its own time; it ends with its block."""
    mesh = DeviceMesh("cpu", [1, 2])
    if dist.get_rank() == 0:
        return
    with Pulse(mesh, 0.1 if dist.get_rank() == 1 else 1.0) as pulse:
        dist.barrier(mesh.get_group())
        if dist.get_rank() == 1:
            with pytest.raises(RuntimeError, match="all are alive: boom"), pulse.exchanging():
                raise RuntimeError("boom")
        else:
            with pulse.exchanging():
                time.sleep(1)
        dist.barrier(mesh.get_group())
        if dist.get_rank() == 1:
            pulse.stop()
        dist.barrier(mesh.get_group())
        if dist.get_rank() == 2:
            with pytest.raises(RuntimeError, match="no sign of life from rank 1: boom"), pulse.exchanging():
                raise RuntimeError("boom")
    assert not [thread for thread in threading.enumerate() if thread.name == "moert.pulse"]


def test_a_mesh_of_two_among_three():
    assert ranks(3, of_two_among_three) == [None] * 3


def test_all_are_alive():
    assert ranks(2, alive) == [None] * 2


class Slow:
    """A store into which the first text goes late."""

    def __init__(self):
        self.text, self.asked = "", threading.Event()

    def set(self, key: str, text: str) -> None:
        if not self.asked.is_set():
            self.asked.set()
            time.sleep(0.3)
        self.text = text


def blames_while_it_beats() -> str:
    pulse = Pulse(interval=60)
    pulse._store = Slow()
    beat = threading.Thread(target=pulse._write)
    beat.start()
    pulse._store.asked.wait()
    pulse._blame([1])
    beat.join()
    pulse.stop()
    return pulse._store.text


def test_a_beat_does_not_take_back_what_was_said():
    assert ranks(1, blames_while_it_beats) == ["0 0 60 1"]


def test_errors():
    def wrong(**options):
        with pytest.raises((TypeError, ValueError)) as error:
            Pulse(**options)
        return str(error.value)

    assert wrong(group=3) == "group must be of type ProcessGroup or DeviceMesh or None, got int"
    assert wrong(interval=0) == "interval must be a number of seconds above zero, got 0"
