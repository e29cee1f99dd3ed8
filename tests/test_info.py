import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
import torch

import moert
from moert import _C
from moert.info import openmp_runtimes


def run_info(isa):
    """`moert.info()` of a new process under MOERT_ISA."""
    environment = {**os.environ, "MOERT_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import json, moert; print(json.dumps(moert.info()))"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_version_is_said_once():
    assert moert.__version__ == _C.build()["version"] == moert.info()["version"]
    # No distribution where moert runs from the source tree.
    installed = [d.version for d in importlib.metadata.distributions(name="moert")]
    assert set(installed) <= {moert.__version__}


def test_info_is_plain():
    facts = moert.info()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["torch"] == torch.__version__ and facts["threads"]["torch"] == torch.get_num_threads()


def test_every_operator_has_a_kernel():
    listed = moert.info()["operators"]
    for name in torch._C._dispatch_get_all_op_names():
        namespace, operator = name.split("::")
        assert namespace != "moert" or any(operator.startswith(stem) for stem in listed), name


@pytest.mark.parametrize("isa", _C.isas())
def test_kernel_follows_moert_isa(isa):
    facts = json.loads(run_info(isa).stdout)
    assert facts["cpu"]["isa"] == isa
    # VNNI has no kernel of its own: avx512 serves there.
    assert facts["operators"]["grouped_gemm"]["cpu"] == {"avx512_vnni": "avx512"}.get(isa, isa)
    assert any("MOERT_ISA" in text for text in facts["missing"]) == (isa != _C.best_isa())


def test_unknown_isa_is_an_error():
    known = "generic, avx2, avx512, avx512_vnni, avx512_bf16, amx"
    assert f"MOERT_ISA must be one of {known}, got sse9" in run_info("sse9").stderr


# A kernel asks for the instruction set from inside its threads, which an exception may not leave.
@pytest.mark.parametrize(
    "call",
    [
        "fused_experts(x, moert.Routing(x[:, :1].int(), x[:, :1], 2), torch.ones(2, 6, 4), torch.ones(2, 4, 3))",
        "union_experts(x, x[:, :2], torch.zeros(1, dtype=torch.int32), torch.ones(2, 3, 4), torch.ones(2, 4, 3))",
    ],
)
def test_unknown_isa_ends_no_process(call):
    environment = {**os.environ, "MOERT_ISA": "sse9", "PYTHONPATH": os.pathsep.join(sys.path)}
    code = f"import moert, torch; torch.set_num_threads(2); x = torch.ones(64, 4); moert.{call}"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "RuntimeError: MOERT_ISA must be one of" in done.stderr.splitlines()[-1]


def test_one_openmp_runtime():
    torch.ones(1000, 1000) @ torch.ones(1000, 1000)
    moert.permute_plan(torch.zeros(4096, 8, dtype=torch.int32), 8)
    assert len(openmp_runtimes()) == 1, openmp_runtimes()


def test_threads_follow_torch():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert moert.info()["threads"]["torch"] == 1 and _C.threads()["openmp"] == 1
    finally:
        torch.set_num_threads(before)
