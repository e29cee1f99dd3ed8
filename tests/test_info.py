import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

import moert
from moert import _C
from moert.info import openmp_runtimes


def test_version_is_said_once():
    assert moert.__version__ == _C.build()["version"] == moert.info()["version"]
    # The library may run from a source tree that is not installed.
    assert not installed() or version("moert") == moert.__version__


def installed():
    from importlib.metadata import PackageNotFoundError

    try:
        return version("moert")
    except PackageNotFoundError:
        return None


def test_info_is_plain():
    facts = moert.info()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["torch"] == torch.__version__ and facts["threads"]["torch"] == torch.get_num_threads()


def test_every_operator_has_a_kernel():
    schemas = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("moert::")
    }
    listed = moert.info()["operators"]
    for name in schemas:
        assert any(name.startswith(operator) for operator in listed), name


@pytest.mark.parametrize("isa", _C.isas())
def test_kernel_follows_moert_isa(isa):
    code = "import json, moert; print(json.dumps(moert.info()))"
    out = subprocess.run(
        [sys.executable, "-c", code], env={**_environment(), "MOERT_ISA": isa}, capture_output=True, text=True
    )
    facts = json.loads(out.stdout)
    assert facts["cpu"]["isa"] == isa
    # No stem has kernels for VNNI, which the integer products of quantised experts need, so avx512 is the highest.
    assert facts["operators"]["grouped_gemm"]["cpu"] == {"avx512_vnni": "avx512"}.get(isa, isa)
    assert any("MOERT_ISA" in text for text in facts["missing"]) == (isa != _C.best_isa())


def test_unknown_isa_is_an_error():
    code = "import moert; moert.info()"
    out = subprocess.run(
        [sys.executable, "-c", code], env={**_environment(), "MOERT_ISA": "sse9"}, capture_output=True, text=True
    )
    assert "MOERT_ISA must be one of generic, avx2, avx512, avx512_vnni, got sse9" in out.stderr


def _environment():
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


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
