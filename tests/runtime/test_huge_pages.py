import copy
import sys

import pytest
import torch
from torch import nn

from moert import GluExperts, QuantizedExperts, Routing
from moert.quant import Fp8, Int4
from moert.runtime import huge_pages_
from moert.runtime.huge_pages import HUGE

if sys.platform != "linux":
    pytest.skip("huge_pages_ needs Linux", allow_module_level=True)


def experts():
    return GluExperts(8, 96, 80).bfloat16()


def test_parameters_stay_what_they_are():
    module = experts()
    before, objects = copy.deepcopy(module.state_dict()), list(module.parameters())
    moved = huge_pages_(module, smallest=0)
    assert moved == sum(p.nbytes for p in objects)
    assert all(a is b for a, b in zip(module.parameters(), objects, strict=True))
    after = module.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.data_ptr() % HUGE == 0 for p in module.parameters())
    copied = copy.deepcopy(module)
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), objects, strict=True))


def test_same_results_forward_and_backward():
    module, x = experts(), torch.randn(5, 96).bfloat16()
    routing = Routing(torch.randint(0, 8, (5, 2)), torch.rand(5, 2), 8)

    def run():
        y = module(x, routing)
        return y, *torch.autograd.grad(y.float().square().sum(), list(module.parameters()))

    before = run()
    huge_pages_(module, smallest=0)
    assert all(torch.equal(a, b) for a, b in zip(run(), before, strict=True))


def test_packed_experts():
    float_experts, x = GluExperts(8, 96, 80), torch.randn(5, 96)
    routing = Routing(torch.randint(0, 8, (5, 2)), torch.rand(5, 2), 8)
    for fmt in (Int4(), Fp8()):
        module = QuantizedExperts.pack(float_experts, (fmt, fmt))
        before = module(x, routing)
        assert huge_pages_(module, smallest=0) == sum(buffer.nbytes for buffer in module.buffers()) >= module.nbytes
        assert all(buffer.data_ptr() % HUGE == 0 for buffer in module.buffers())
        assert torch.equal(module(x, routing), before)


def test_views_and_shared_memory_stay_so():
    module, memory = nn.Module(), torch.randn(100)
    module.one = nn.Parameter(memory[10:50].view(5, 8).T)
    module.other = nn.Parameter(memory[:20])
    expected = module.one.detach().clone()
    assert huge_pages_(module, smallest=0) == memory.nbytes
    assert torch.equal(module.one, expected) and module.one.stride() == (1, 8)
    with torch.no_grad():
        module.other[10] = 7
    assert module.one[0, 0] == 7


def test_small_parameters_stay_where_they_are():
    module = experts()
    places = [p.data_ptr() for p in module.parameters()]
    assert huge_pages_(module) == 0 and [p.data_ptr() for p in module.parameters()] == places


def test_a_system_without_large_pages(monkeypatch):
    monkeypatch.delattr("mmap.MADV_HUGEPAGE")
    with pytest.raises(RuntimeError, match="huge_pages_ must run on Linux, got a system without MADV_HUGEPAGE"):
        huge_pages_(experts())
