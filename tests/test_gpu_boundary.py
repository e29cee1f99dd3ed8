"""The calls of tests/test_boundary_calls.py on the GPU.  `make test-gpu` runs it."""

import pytest
import torch
from tests.test_boundary_calls import VALID
from tests.test_gpu import NEEDS_GPU, there

pytestmark = NEEDS_GPU
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


@pytest.mark.parametrize("op", VALID)
def test_a_valid_call_gives_what_the_cpu_gives(op):
    operator = getattr(torch.ops.moert, op)
    expected = operator(
        **{name: value.clone() if torch.is_tensor(value) else value for name, value in VALID[op].items()}
    )
    got = operator(**{name: there(value) for name, value in VALID[op].items()})
    for a, b in zip(*((out,) if torch.is_tensor(out) else out or () for out in (got, expected)), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", VALID)
def test_a_tensor_elsewhere_reaches_no_kernel(op):
    operator = getattr(torch.ops.moert, op).default
    for argument in operator._schema.arguments:
        value = VALID[op].get(argument.name)
        if torch.is_tensor(value):
            elsewhere = {name: other if name == argument.name else there(other) for name, other in VALID[op].items()}
            with pytest.raises(RuntimeError, match=f"{argument.name} must be on the GPU like .*, got another device"):
                operator.redispatch(CUDA, **elsewhere)


def test_weights_in_panels_are_refused():
    """As moert.prepack_ leaves them for a CPU."""
    panels = {name: torch.zeros(4, 1, 1, 16, 2, device="cuda") for name in ("w1", "w2")}
    call = {name: there(value) for name, value in VALID["fused_experts"].items()}
    with pytest.raises(RuntimeError, match=r"w1 must not lie in panels on a GPU, got prepacked weights \(unprepack_\)"):
        torch.ops.moert.fused_experts(**(call | panels))
