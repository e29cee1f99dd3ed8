import torch

from moert.ops.autocast import autocast


def test_outside_autocast_nothing_changes():
    x = torch.zeros(2)
    assert autocast(x, None) == (x, None) and autocast(x, None)[0] is x


def test_tensors_take_the_dtype_of_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        x, missing, half, double = autocast(torch.zeros(2), None, torch.zeros(2).half(), torch.zeros(2).double())
    assert x.dtype == half.dtype == torch.bfloat16 and missing is None
    assert double.dtype == torch.float64  # torch's own operators leave float64 alone


def test_nested_region_that_is_off():
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert autocast(torch.zeros(2))[0].dtype == torch.float32


def test_meta_has_no_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast(torch.zeros(2, device="meta"))[0].dtype == torch.float32


def test_compile_in_every_supported_torch():
    torch._dynamo.reset()
    compiled = torch.compile(autocast, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2))[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(torch.zeros(2))[0].dtype == torch.bfloat16
