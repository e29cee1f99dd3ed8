from argparse import Namespace

import pytest
import torch

from moert import _C
from timing import FLOP, Limits


@pytest.mark.parametrize("multiply", [_C.multiply_floats, _C.multiply_bytes])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_peaks_do_as_much_in_each_thread(multiply, threads):
    task = multiply(1, threads)
    assert task == threads * multiply(1, 1)
    assert multiply(0, threads) == 0 and 0 < task < FLOP / 100
    assert multiply(task, threads) == task and multiply(task + 1, threads) == 2 * task


@pytest.mark.parametrize("arguments", [(-1, 1), (1, 0), (1, 1025)])
def test_peaks_of_wrong_numbers(arguments):
    with pytest.raises(ValueError, match=r"operations must be at least 0 and threads in \[1, 1024\]"):
        _C.multiply_floats(*arguments)


@pytest.mark.parametrize("feature", ["avx512bf16", "amx_bf16", None])
def test_limits(monkeypatch, feature):
    features = dict.fromkeys(("avx512bf16", "amx_bf16"), False) | ({feature: True} if feature else {})
    monkeypatch.setattr("timing._C", Namespace(cpu_features=lambda: features, multiply_floats=_C.multiply_floats))
    limits = Limits([torch.float32, torch.bfloat16])
    assert limits.functions.keys() == limits.work.keys()
    assert limits.of("float32") == ["float32", "FMA peak"] and limits.functions.keys() >= {"read", "copy"}
    assert limits.of("bfloat16") == (["bfloat16", "FMA peak"] if feature else ["FMA peak"])


def test_rates():
    assert all(rate > 0 for rate in Limits([torch.float32]).rates().values())


def test_limits_of_a_revision_without_the_peak(monkeypatch):
    monkeypatch.setattr("timing._C", Namespace(cpu_features=dict))  # of a CPU that is no x86-64
    assert Limits([torch.bfloat16]).of("bfloat16") == ["bfloat16"]
