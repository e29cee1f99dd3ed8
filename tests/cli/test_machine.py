import mmap
import subprocess
import sys

import torch

from moert.cli.machine import machine_facts, peak_bytes, reset_peak, resident_bytes


def test_facts():
    facts = machine_facts(("torch", "no-such-package"))
    assert facts["torch"] == torch.__version__ and facts["no-such-package"] is None
    assert facts["processor"] and facts["cores"] >= 1


def test_peak_remembers_what_was_freed_and_reset_forgets_it():
    reset_peak()
    before = resident_bytes()
    with mmap.mmap(-1, 64 * 2**20) as block:  # fresh pages, which malloc may not give
        block[:] = bytes(len(block))
    assert peak_bytes() >= before + 60 * 2**20
    reset_peak()
    if sys.platform == "linux":
        assert peak_bytes() < before + 60 * 2**20


def test_peak_of_a_child_is_its_own():
    block = torch.ones(256 * 2**20, dtype=torch.uint8)
    program = "import sys; sys.modules['torch'] = None; from pathlib import Path; import importlib.util as u; "
    program += (
        f"s = u.spec_from_file_location('m', {machine_facts.__code__.co_filename!r}); m = u.module_from_spec(s); "
    )
    program += "s.loader.exec_module(m); print(m.peak_bytes())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < len(block) // 2
