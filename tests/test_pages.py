import mmap
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from moert.pages import in_large_pages

# In a process of its own: what others have given back may be written already, and is taken again.
PROGRAM = """
import mmap, re, sys
from pathlib import Path
import torch
from moert import GluExperts
from moert.pages import in_large_pages
from moert.quant import BitNested, Int4
from moert.runtime.huge_pages import HUGE

def large(tensor):  # bytes in large pages of the mapping that the middle of the tensor is in
    middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, last = (int(bound, 16) for bound in bounds.groups())
            inside = first <= middle < last
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the tensor must be mapped")

memory = mmap.mmap(-1, 64 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
if not large(torch.frombuffer(memory, dtype=torch.uint8).zero_()):
    sys.exit("the system grants no large pages")
experts = GluExperts(8, 1024, 2048)  # 128 MB and 64
written = in_large_pages(torch.empty(64 * HUGE, dtype=torch.uint8)).zero_()
packed = [fmt.empty((16, 4096, 2048)).codes for fmt in (Int4(), BitNested())]
print([name for name, x in (("written", written), ("w1", experts.gate_up_proj), ("w2", experts.down_proj),
                            ("int4", packed[0]), ("bit_nested", packed[1])) if large(x) < HUGE])
"""


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs Linux")
def test_what_is_made_is_in_large_pages():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    if "grants no large pages" in run.stderr:
        pytest.skip(run.stderr.strip())
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


@pytest.mark.parametrize("shape", [(), (0,), (3,), (1 << 23,)])
def test_others_are_left_alone(shape):
    x = torch.empty(shape)
    assert in_large_pages(x) is x
    assert in_large_pages(torch.empty(shape, device="meta")).device.type == "meta"
    with FakeTensorMode():
        assert in_large_pages(torch.empty(shape)).shape == shape
