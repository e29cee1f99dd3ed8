from argparse import Namespace

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
    features = {"avx512bf16": False, "amx_bf16": False}
    monkeypatch.setattr("timing._C", Namespace(cpu_features=lambda: features))
    assert Limits([torch.bfloat16]).of("bfloat16") == ["bfloat16"]
