import mmap
import re
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from moert import GluExperts
from moert.pages import in_large_pages
from moert.quant import Int4
from moert.runtime.huge_pages import HUGE


@pytest.fixture
def unwritten(monkeypatch):
    """Else torch fills what is uninitialised, as tests want it, before anything can be asked for."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


def large(tensor: torch.Tensor) -> int:
    """Bytes in large pages of the mapping that the middle of the tensor is in."""
    middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, last = (int(bound, 16) for bound in bounds.groups())
            inside = first <= middle < last
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the tensor must be mapped")


@pytest.fixture
def granted():
    if sys.platform != "linux":
        pytest.skip("needs Linux")
    memory = mmap.mmap(-1, 64 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    if not large(torch.frombuffer(memory, dtype=torch.uint8).zero_()):
        pytest.skip("the system grants no large pages")


@pytest.mark.usefixtures("granted", "unwritten")
def test_what_is_written_is_in_large_pages():
    # Not one page after the other may be granted, but some are.
    assert large(in_large_pages(torch.empty(64 * HUGE, dtype=torch.uint8)).zero_()) >= HUGE


@pytest.mark.usefixtures("granted", "unwritten")
def test_own_weights_are():
    experts = GluExperts(8, 1024, 2048)  # 128 MB and 64
    assert large(experts.gate_up_proj) >= HUGE and large(experts.down_proj) >= HUGE
    assert large(Int4(32).empty((16, 4096, 1024)).codes) >= HUGE


@pytest.mark.parametrize("shape", [(), (0,), (3,), (1 << 23,)])
def test_others_are_left_alone(shape):
    x = torch.empty(shape)
    assert in_large_pages(x) is x
    assert in_large_pages(torch.empty(shape, device="meta")).device.type == "meta"
    with FakeTensorMode():
        assert in_large_pages(torch.empty(shape)).shape == shape
