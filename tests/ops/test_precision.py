from types import SimpleNamespace

import pytest
import torch

from moert.ops.precision import rounds_to_tf32

FLOATS = SimpleNamespace(is_cuda=True, dtype=torch.float32)


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    torch.set_float32_matmul_precision("highest")


def test_every_setting_of_torch_counts():
    matmul = torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("highest")
    assert not rounds_to_tf32(FLOATS)
    for precision in ("high", "medium"):
        torch.set_float32_matmul_precision(precision)
        assert rounds_to_tf32(FLOATS)
    matmul.allow_tf32 = False
    assert not rounds_to_tf32(FLOATS)
    matmul.allow_tf32 = True
    assert rounds_to_tf32(FLOATS)
    matmul.fp32_precision = "ieee"
    assert not rounds_to_tf32(FLOATS)
    matmul.fp32_precision = "tf32"
    assert rounds_to_tf32(FLOATS)


@pytest.mark.parametrize("x", (torch.ones(1), SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)), ids=("CPU", "bf16"))
def test_other_products_are_not_asked(x):
    torch.backends.cuda.matmul.allow_tf32 = True
    assert not rounds_to_tf32(x)


@pytest.mark.parametrize("name, on, off", (("allow_tf32", True, False), ("fp32_precision", "tf32", "ieee")))
def test_compiled_with_the_setting_of_the_call(name, on, off):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    fn = torch.compile(lambda x: x + rounds_to_tf32(FLOATS), fullgraph=True, backend=count)
    for value in (on, on, off, off, on):
        setattr(torch.backends.cuda.matmul, name, value)
        assert fn(torch.zeros(1)).item() == (value == on)
    assert len(graphs) == 2
