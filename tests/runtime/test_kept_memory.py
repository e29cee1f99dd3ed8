"""The setting is the process's: each test has one of its own."""

import subprocess
import sys

import pytest

from moert.runtime import kept_memory

if sys.platform != "linux":
    pytest.skip("keep_memory needs glibc", allow_module_level=True)

PROGRAM = """
import os, resource, threading, torch
from moert import Routing, fused_experts
from moert.runtime import keep_memory, release_memory

MiB = 2**20

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def faults(call):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def touch():
    torch.ones(64 * MiB, dtype=torch.uint8)

torch.set_num_threads(1)
"""


def run(body: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM + body], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_memory_stays_and_is_released():
    run("""
touch()
start = resident()
touch()
assert resident() < start + 8 * MiB
keep_memory()
touch()
assert resident() > start + 60 * MiB
counts = [faults(touch) for _ in range(40)]
fresh = sum(count >= 100 for count in counts)  # malloc may take some more places before it comes back to one
assert fresh < 8, counts
assert resident() < start + (2 + fresh) * 64 * MiB
assert release_memory()
assert resident() < start + 8 * MiB
touch()  # and again
assert resident() > start + 60 * MiB
""")


def test_a_training_step_takes_no_fresh_pages():
    run("""
E, H, I, T = 4, 1024, 2048, 16  # gradients of 64 and 32 MiB
w1, w2 = (torch.randn(shape, requires_grad=True) for shape in ((E, 2 * I, H), (E, H, I)))
routing = Routing(torch.arange(T * 2, dtype=torch.int32).view(T, 2) % E, torch.full((T, 2), 0.5), E)
x = torch.randn(T, H)

def step():
    w1.grad = w2.grad = None
    fused_experts(x, routing, w1, w2).square().sum().backward()

step()
expected = w1.grad.clone()
keep_memory()
counts = [faults(step) for _ in range(8)]
assert min(counts) < 1000, counts  # 24 thousand pages of 4 KiB
assert torch.equal(w1.grad, expected)
w1.grad.resize_(2 * w1.numel())  # ordinary tensors
""")


def test_a_child_allocates():
    run("""
keep_memory()
touch()
stop = threading.Event()
def work():
    while not stop.is_set():
        torch.ones(8 * MiB, dtype=torch.uint8)
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        memory = bytearray(64 * MiB)
        release_memory()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
stop.set()
for thread in threads:
    thread.join()
""")


def test_poison_reaches_kept_memory():
    run("""
keep_memory()
torch.zeros(16 * MiB)
torch.use_deterministic_algorithms(True)
assert torch.empty(16 * MiB).isnan().all()
""")


def test_what_does_not_fit_is_an_error():
    run("""
keep_memory()
touch()
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
try:
    torch.empty(16 << 30, dtype=torch.uint8)
except RuntimeError as error:
    assert "allocate memory" in str(error), error
else:
    raise AssertionError("16 GiB within a limit of 8")
touch()
""")


@pytest.mark.parametrize("call", [kept_memory.keep_memory, kept_memory.release_memory])
def test_errors(call, monkeypatch):
    monkeypatch.setattr(kept_memory.ctypes, "CDLL", lambda name: object())
    with pytest.raises(RuntimeError, match=f"{call.__name__} must run on Linux with glibc, got a C library without m"):
        call()


def test_a_refusal(monkeypatch):
    monkeypatch.setattr(kept_memory, "_function", lambda name, caller: lambda option, value: 0)
    with pytest.raises(RuntimeError, match="malloc must take M_MMAP_MAX=0 and M_TRIM_THRESHOLD=-1, got a refusal"):
        kept_memory.keep_memory()
