import os
import subprocess
import sys

import numpy as np
import peer_moert
import peer_transformers
import pytest
import torch
from problem import LIMITS, Problem
from worker import Worker

# Takes 64 MiB in blocks that malloc keeps when they are freed, as moert.runtime.keep_memory has it.
KEPT = """
import numpy as np
from worker import Worker
worker = Worker("none", 1)
worker.providers = {"blocks": lambda turn: [np.ones(2**20) for _ in range(8)]}
for _ in range(2):
    print(worker.memory("blocks")["bytes"])
"""


def test_memory_that_malloc_kept_counts():
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(peer_moert.__file__)}
    environment |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KEPT], env=environment, capture_output=True, text=True, check=True)
    for taken in map(int, done.stdout.split()):
        assert 60 * 2**20 < taken < 80 * 2**20


def test_a_training_step_of_moert_takes_what_it_saves():
    threads, problem = torch.get_num_threads(), Problem("small", 256, 512, 4, 4, 2048, "float32", training=True)
    worker = Worker("moert", threads)
    loaded = worker.load(problem.__dict__)
    taken = worker.memory("moert")["bytes"] - loaded["weight_bytes"]
    saved = problem.T * problem.k * 2 * problem.I * 4  # the pre-activations
    assert saved <= taken < 4 * saved


def test_a_call_that_raises_is_answered():
    worker = Worker("none", 1)
    worker.providers = {"large": lambda turn: peer_transformers.require_memory(2**60), "fine": lambda turn: np.ones(3)}
    why = worker.answer({"save": "large", "path": "/nonexistent"})["error"]
    assert why.startswith("MemoryError: the copy of the weights of every choice must fit into ")
    assert len(worker.answer({"time": "fine", "seconds": 0.0})["times"]) == 1


def test_limits_of_this_cpu():
    limits = Worker("moert", torch.get_num_threads()).answer({"limits": 0.0})["limits"]
    assert set(limits) <= set(LIMITS) and {"read", "product", "FMA peak", "int8 peak"} <= set(limits)
    features = peer_moert._C.cpu_features()
    assert ("int8 product" in limits) == features["avx512vnni"]
    assert ("bfloat16 product" in limits) == (features["avx512bf16"] or features["amx_bf16"])
    assert all(seconds > 0 for seconds in limits.values())


@pytest.mark.parametrize("training", [False, True])
def test_a_loop_of_torch(training):
    problem = Problem("tiny", 64, 32, 8, 2, 5, "float32", training=training)
    found = peer_transformers.providers(problem, torch.get_num_threads())
    names = {"torch loop", "transformers eager", "transformers grouped_mm"}
    assert set(found) == names | (set() if training else {"transformers batched_mm"})
    expected = problem.gradients() if training else problem.reference()
    np.testing.assert_allclose(found["torch loop"](0), expected, rtol=1e-3, atol=1e-4)
