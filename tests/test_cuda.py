"""The CUDA half as a machine without a GPU sees it: which operators have kernels, and what the others say."""

import re
from pathlib import Path

import pytest
import torch

import moert
from moert import cuda

BINDINGS = sorted(Path("csrc/binding").glob("*.cpp"))
# C++ types of a binding -> types of its schema.
TYPES = {
    "Tensor": "Tensor",
    "std::optional<Tensor>": "Optional[Tensor]",
    "int64_t": "int",
    "std::optional<int64_t>": "Optional[int]",
    "double": "float",
    "bool": "bool",
    "std::string": "str",
}
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def test_every_operator_is_listed():
    names = {n.removeprefix("moert::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("moert::")}
    in_python = {"dispatch_rows", "dispatch_exchange", "dispatch_gradients"}  # over those with kernels
    assert names - in_python == set(cuda.OPERATORS)


@pytest.mark.parametrize("name", cuda.OPERATORS)
def test_every_operator_has_a_kernel_or_a_reason(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"moert::{name}", "CUDA")


@pytest.mark.skipif(bool(cuda.is_built() and torch.version.cuda), reason="needs a moert or a torch without CUDA")
def test_without_cuda_an_operator_says_what_to_build():
    logits = torch.randn(3, 8)
    with pytest.raises(RuntimeError, match="^tensors of topk_gating must be on the CPU, got a GPU: "):
        torch.ops.moert.topk_gating.default.redispatch(CUDA, logits, 2, "softmax", None, False, 1.0, 1, 1, "max")


@pytest.mark.parametrize(
    "built,version,message",
    [
        (
            False,
            None,
            r"tensors of f must be .* GPU: moert is built without CUDA, pip install \. -C cmake.define.MOERT",
        ),
        (True, None, r"tensors of f must be on the CPU, got a GPU: torch 2\S+ has no CUDA, install one that has"),
        (True, "13.0", "tensors of f must be on the CPU, got a GPU: this version has no CUDA kernel for it"),
    ],
)
def test_reasons(monkeypatch, built, version, message):
    monkeypatch.setattr(cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.version, "cuda", version)
    with pytest.raises(RuntimeError, match=message):
        cuda._refusal("f")(torch.zeros(1))


def bound():
    """What each binding's source registers: operator -> (file, types and names of its arguments, number of results)."""
    found = {}
    for path in BINDINGS:
        text = path.read_text()
        for name, function in re.findall(r'm\.impl\("(\w+)", TORCH_BOX\(&(\w+)\)\)', text):
            results, arguments = re.search(rf"^([\w:<>, ]+?)\s+{function}\((.*?)\) {{", text, re.M | re.S).groups()
            typed = [a.replace("const ", "").replace("&", "").split() for a in arguments.split(",")]
            found[name] = (path.name, [(TYPES[kind], name) for kind, name in typed], results.count("Tensor"))
    return found


def cuda_sources():
    """The bindings that are compiled for _cuda."""
    cmake = Path("CMakeLists.txt").read_text()
    listed = re.search(r"moert_operators\(moert_cuda_ops _cuda moert_cuda(.*?)\)", cmake, re.S)
    return {Path(source).name for source in listed[1].split()}


@pytest.mark.parametrize("name", cuda.OPERATORS)
def test_a_binding_takes_what_its_schema_says(name):
    schema = getattr(torch.ops.moert, name).default._schema
    _, arguments, results = bound()[name]
    assert arguments == [(str(a.type), a.name) for a in schema.arguments]
    assert results == len(schema.returns)


def test_bindings_of_both_devices_are_compiled_for_both():
    for path in BINDINGS:
        text = path.read_text()
        assert ("MOERT_DISPATCH_KEY, m" in text) == (path.name in cuda_sources()), path.name
    assert cuda_sources() == {file for file, *_ in bound().values()}


def test_archs_are_those_of_the_build():
    archs = moert.info()["cuda"]["archs"]
    assert bool(archs) == cuda.is_built()
    assert not archs or {"80", "90a-real"} <= set(archs)
