import pytest
import torch

from moert import _C
from timing import FLOP, Limits


@pytest.mark.parametrize("multiply", [_C.multiply_floats, _C.multiply_bytes])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_peaks_do_what_is_asked_in_whole_tasks(multiply, threads):
    task = multiply(1, threads)
    assert multiply(0, threads) == 0 and 0 < task < FLOP / 100
    assert multiply(task, threads) == task and multiply(task + 1, threads) == 2 * task


def test_limits():
    limits = Limits([torch.float32])
    assert limits.functions.keys() == limits.work.keys() == {"read", "copy", "float32", "FMA peak"}
    assert limits.of("float32") == ["float32", "FMA peak"] and limits.of("bfloat16") == ["FMA peak"]
    assert all(rate > 0 for rate in limits.rates().values())


def test_limits_of_a_revision_without_the_peak(monkeypatch):
    monkeypatch.setattr("timing._C", object())
    assert Limits([torch.float32]).of("float32") == ["float32"]
