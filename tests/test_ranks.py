"""The helper that runs the ranks of a job: results in order, and every way in which a rank can fail."""

import os
import signal
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from ranks import ranks


def sum_of_ranks(start: int) -> tuple[int, int, float]:
    x = torch.tensor([start + dist.get_rank()])
    dist.all_reduce(x)
    return dist.get_rank(), os.getpid(), x.item()


def one_fails(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "raises":
            raise ValueError("the second rank is tired")
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    dist.barrier()


def test_results_come_in_order_and_no_process_stays():
    results = ranks(2, sum_of_ranks, 10)
    assert [(rank, total) for rank, _, total in results] == [(0, 21), (1, 21)]
    assert not any(psutil.pid_exists(pid) for _, pid, _ in results)


@pytest.mark.parametrize(
    "how,error,message",
    [
        ("raises", RuntimeError, "rank 1 of 2: Traceback(.|\n)*ValueError: the second rank is tired"),
        ("is killed", RuntimeError, "rank 1 of 2: ended without a result"),
        ("hangs", TimeoutError, "every rank must finish within 3 s, got nothing from 0, 1"),
    ],
)
def test_one_rank_fails(how, error, message):
    before = set(psutil.Process().children(recursive=True))
    started = time.monotonic()
    with pytest.raises(error, match=message):
        ranks(2, one_fails, how, timeout=3 if how == "hangs" else 60)
    assert time.monotonic() - started < 30
    assert set(psutil.Process().children(recursive=True)) <= before
